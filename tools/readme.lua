-- Notebook cells become divisions; README.md wants only what is in them.
function Div(division)
  return division.content
end

-- Cells whose code is not shown.
function CodeBlock(block)
  return block.text == "" and {} or block
end

-- Addresses are relative to nbs/ in the notebook and to its parent in README.md.
local function from_parent(address)
  if address == "" or address:match("^[#/]") or address:match("^%a[%w+.-]*:") then
    return address
  elseif address:match("^%.%./") then
    return address:sub(4)
  end
  return "nbs/" .. address
end

function Link(link)
  return pandoc.Link(link.content, from_parent(link.target), link.title) -- Without the classes of the site's buttons
end

function Image(image)
  image.src = from_parent(image.src)
  return image
end
