-- Notebook cells become divisions; README.md wants only what is in them.
function Div(division)
  return division.content
end

-- A notebook's neighbours are in nbs/, seen from README.md.
function Link(link)
  if link.target:match("%.ipynb$") and not link.target:match("://") then
    link.target = "nbs/" .. link.target
  end
  return link
end
