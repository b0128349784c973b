"Read the notebooks, and find problems in their shape, outputs, demonstrations and place in the sidebar."

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

MAX_CELLS = 60
MAX_EXPORTED_LINES = 420  # Of a notebook
MAX_CELL_LINES = 45  # Of an exported cell; imports alone, and a class, may have more
MAX_CLASS_LINES = 65  # Of an exported cell with nothing but one class, which cannot be split
EXPORT_DIRECTIVES = {"export", "exports", "exporti"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users|var/folders)/|site-packages|[A-Z]:\\\\")
PLUMBING = {"logger"}  # nbdev puts it into `__all__`, but it is not for users


@dataclass(frozen=True)
class Cell:
    "One cell of a notebook."

    kind: str  # "code", "markdown" or "raw"
    source: str
    outputs: list  # Stored outputs of a code cell

    @property
    def directives(self) -> dict[str, str]:
        "The `#| name value` lines at the top of the cell."
        found = {}
        for line in self.source.splitlines():
            match = re.match(r"#\s*\|\s*([\w-]+):?\s*(.*)", line)
            if match is None:
                break
            found[match[1]] = match[2].strip()
        return found

    @property
    def is_exported(self) -> bool:
        "Whether the cell becomes part of the package."
        return self.kind == "code" and bool(EXPORT_DIRECTIVES & self.directives.keys())

    @property
    def lines(self) -> int:
        "Number of lines without the directives."
        return len(self.source.splitlines()) - len(self.directives)

    @property
    def tree(self) -> ast.Module | None:
        "The syntax tree of a code cell without its magics; None if it is not Python."
        lines = [line for line in self.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            return ast.parse("\n".join(lines)) if self.kind == "code" else None
        except SyntaxError:
            return None


@dataclass(frozen=True)
class Notebook:
    "One notebook; a chapter if it exports a module."

    path: Path
    cells: list[Cell]

    @property
    def module(self) -> str | None:
        "Name of the exported module inside the package, such as `text.files`; None if the notebook exports nothing."
        names = [cell.directives["default_exp"] for cell in self.cells if "default_exp" in cell.directives]
        return names[0] if names else None


def read_notebook(path: Path) -> Notebook:
    "Read one notebook from disk."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return Notebook(path, [Cell(cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])) for cell in cells])


def notebook_paths(folder: Path) -> list[Path]:
    "The notebooks in a folder and below: index first, folder by folder, numbered ones in order."

    def order(path: Path) -> tuple:
        number = re.match(r"\d+", path.name)
        return path.parent, path.stem != "index", int(number[0]) if number else sys.maxsize, path.name

    hidden = (".", "_")
    paths = (path.relative_to(folder) for path in folder.rglob("*.ipynb"))
    return [
        folder / path for path in sorted(paths, key=order) if not any(part.startswith(hidden) for part in path.parts)
    ]


def read_book(folder: Path) -> list[Notebook]:
    "All notebooks of a folder."
    return [read_notebook(path) for path in notebook_paths(folder)]


def public_names(source: str) -> list[str]:
    "The names in a module's `__all__`."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in PLUMBING]
    return []


def used_names(tree: ast.Module | None) -> set[str]:
    "Names and attributes that code uses; importing a name is not using it."
    nodes = list(ast.walk(tree)) if tree else []
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def demonstration_problems(notebook: Notebook, module_source: str) -> list[str]:
    "Public names that no demonstration in their notebook uses, and that no demonstrated function returns."
    demonstrations = [cell.tree for cell in notebook.cells if cell.kind == "code" and not cell.is_exported]
    shown = set().union(*map(used_names, demonstrations))
    for node in ast.walk(ast.parse(module_source)):
        if isinstance(node, ast.FunctionDef) and node.name in shown and node.returns:
            shown |= set(re.findall(r"\w+", ast.unparse(node.returns)))
    return [f"{name} has no demonstration" for name in public_names(module_source) if name not in shown]


def max_lines(cell: Cell) -> int:
    "The lines that an exported cell may have."
    is_class = len(cell.tree.body) == 1 and isinstance(cell.tree.body[0], ast.ClassDef)
    return MAX_CLASS_LINES if is_class else MAX_CELL_LINES


def shape_problems(notebook: Notebook) -> list[str]:
    "A notebook that is too long, or whose cells the documentation would drop or run wrongly."
    exported = [(number, cell) for number, cell in enumerate(notebook.cells) if cell.is_exported]
    lines = sum(cell.lines for _, cell in exported)
    problems = []
    if len(notebook.cells) > MAX_CELLS:
        problems.append(f"{len(notebook.cells)} cells, more than {MAX_CELLS}")
    if lines > MAX_EXPORTED_LINES:
        problems.append(f"{lines} exported lines, more than {MAX_EXPORTED_LINES}")
    problems += [
        f"cell {number} exports {cell.lines} lines, more than {max_lines(cell)}"
        for number, cell in exported
        if cell.lines > max_lines(cell) and not only_imports(cell.tree)
    ]
    return problems + title_problems(notebook) + import_cell_problems(notebook)


def title_problems(notebook: Notebook) -> list[str]:
    "A title cell that holds more than one H1 and one `>` line: the documentation drops the rest of it."
    titles = [cell.source.strip() for cell in notebook.cells if cell.kind == "markdown"]
    if titles and re.fullmatch(r"# .+\n+> .+", titles[0]):
        return []
    return ["the first text cell is not an H1 with one `>` line below it and nothing else"]


def only_imports(tree: ast.Module | None) -> bool:
    "Whether code consists of import statements."
    return bool(tree and tree.body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def import_cell_problems(notebook: Notebook) -> list[str]:
    "More than one exported cell with imports; demonstrations with imports, which the documentation would run."
    problems, exporting = [], []
    for number, cell in enumerate(notebook.cells):
        if (tree := cell.tree) is None or cell.directives.get("eval") == "false":
            continue
        nodes = tree.body if cell.is_exported else ast.walk(tree)  # An exported function may import late
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes):
            if cell.is_exported:
                exporting.append(number)
            elif not only_imports(tree):
                problems.append(f"cell {number} imports and does something else too")
    if len(exporting) > 1:
        problems.append(f"cells {', '.join(map(str, exporting))} export imports; one cell should hold them all")
    return problems


def output_problems(notebook: Notebook) -> list[str]:
    "Stored outputs that hold an error, or a path of the machine that ran them."
    problems = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.outputs:
            data = output.get("data", {})
            shown = json.dumps([output.get("text"), data.get("text/plain"), data.get("text/html")])
            if output["output_type"] == "error":
                problems.append(f"cell {number} stores an error: {output.get('ename')}")
            elif found := MACHINE_PATH.search(shown):
                problems.append(f"cell {number} stores a path of the machine: {found[0]}")
    return problems


def sidebar_links(contents: list) -> list[str]:
    "All notebooks that a sidebar links to, from top to bottom."
    links = []
    for entry in contents:
        if isinstance(entry, str):
            links.append(entry)
        else:
            links += [entry["href"]] if "href" in entry else []
            links += sidebar_links(entry.get("contents", []))
    return links


def sidebar_problems(names: list[str], links: list[str]) -> list[str]:
    "Notebooks that the sidebar lacks or lists twice, and links that lead nowhere."
    problems = [f"the sidebar lacks {name}" for name in names if name not in links]
    problems += [f"the sidebar links to {link}, which is no notebook" for link in links if link not in names]
    return problems + [f"the sidebar lists {name} twice" for name in names if links.count(name) > 1]
