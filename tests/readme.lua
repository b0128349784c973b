-- Notebook cells become divisions; README.md wants only what is in them.
function Div(division)
  return division.content
end
