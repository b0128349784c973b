"The notebooks as a book: its chapters, their cells and modules, and the faults a script can see in them."

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

MAX_CELLS = 60
MAX_EXPORTED_LINES = 250
EXPORT_DIRECTIVES = {"export", "exports", "exporti"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users|var/folders)/|site-packages|[A-Z]:\\\\")


@dataclass(frozen=True)
class Cell:
    "One cell of a notebook."

    kind: str  # "code", "markdown" or "raw"
    source: str
    outputs: list  # As stored, of a code cell

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


@dataclass(frozen=True)
class Notebook:
    "One notebook; a chapter if it exports a module."

    path: Path
    cells: list[Cell]

    @property
    def module(self) -> str | None:
        "Name of the module that the notebook exports, None for a notebook that only tells."
        names = [cell.directives["default_exp"] for cell in self.cells if "default_exp" in cell.directives]
        return names[0] if names else None


def read_notebook(path: Path) -> Notebook:
    "Read one notebook from disk."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return Notebook(path, [Cell(cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])) for cell in cells])


def notebook_paths(folder: Path) -> list[Path]:
    "The notebooks in a folder and below, in reading order: index, chapters by number, other pages, tutorials."
    paths = [
        path
        for path in folder.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    return sorted(paths, key=lambda path: (len(path.parts), path.stem != "index", chapter_number(path), path.name))


def chapter_number(path: Path) -> int:
    "The number that a notebook's name starts with; without one, it comes after those that have one."
    match = re.match(r"\d+", path.name)
    return int(match[0]) if match else sys.maxsize


def read_book(folder: Path) -> list[Notebook]:
    "All notebooks of a folder, in reading order."
    return [read_notebook(path) for path in notebook_paths(folder)]


def chapters(book: list[Notebook]) -> dict[str, Notebook]:
    "The notebooks that export a module, by its name, in reading order."
    return {notebook.module: notebook for notebook in book if notebook.module is not None}


def imported_modules(source: str, package: str) -> set[str]:
    "Modules of the package that a piece of code imports, wherever in the code it does."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            dotted = [f"{base}.{alias.name}" for alias in node.names] if base == package else [base]
        else:
            continue
        found |= {name.split(".")[1] for name in dotted if name.startswith(f"{package}.")}
    return {name for name in found if not name.startswith("__")}


def import_faults(order: list[str], sources: dict[str, str], package: str) -> list[str]:
    "Imports between modules that do not point at an earlier chapter."
    faults = [f"{module} belongs to no notebook" for module in sources if module not in order]
    for position, module in enumerate(order):
        later = imported_modules(sources.get(module, ""), package) - set(order[:position])
        faults += [f"{module} imports {name}, which no earlier chapter exports" for name in sorted(later)]
    return faults


def exported_names(source: str) -> list[str]:
    "The names in a module's `__all__`."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def parsed(source: str) -> ast.Module | None:
    "The syntax tree of a cell less its magics, None if it is not Python."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return None


def used_names(source: str) -> set[str]:
    "Names and attributes that a cell's code uses; importing a name is not using it."
    tree = parsed(source)
    nodes = list(ast.walk(tree)) if tree else []
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def lesson_faults(notebook: Notebook, module_source: str) -> list[str]:
    "Exported names that no lesson of their notebook uses."
    lessons = [cell for cell in notebook.cells if cell.kind == "code" and not cell.is_exported]
    shown = set().union(*(used_names(cell.source) for cell in lessons))
    return [f"{name} has no lesson" for name in exported_names(module_source) if name not in shown]


def shape_faults(notebook: Notebook) -> list[str]:
    "A notebook that is too long, or whose cells the documentation would lose or run wrongly."
    faults = []
    lines = sum(len(cell.source.splitlines()) - len(cell.directives) for cell in notebook.cells if cell.is_exported)
    if len(notebook.cells) > MAX_CELLS:
        faults.append(f"{len(notebook.cells)} cells, more than {MAX_CELLS}")
    if lines > MAX_EXPORTED_LINES:
        faults.append(f"{lines} exported lines, more than {MAX_EXPORTED_LINES}")
    return faults + title_faults(notebook) + mixed_import_faults(notebook)


def title_faults(notebook: Notebook) -> list[str]:
    "A title cell must hold one H1 and one `>` line, nothing else: the documentation drops the rest of it."
    titles = [cell.source.strip() for cell in notebook.cells if cell.kind == "markdown"]
    if titles and re.fullmatch(r"# .+\n+> .+", titles[0]):
        return []
    return ["the first text cell is not an H1 with one `>` line below it and nothing else"]


def mixed_import_faults(notebook: Notebook) -> list[str]:
    "Lessons that import and do something else too: the documentation runs cells with imports, but no other lessons."
    faults = []
    for number, cell in enumerate(notebook.cells):
        tree = parsed(cell.source) if cell.kind == "code" and not cell.is_exported else None
        if tree is None or cell.directives.get("eval") == "false":
            continue
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
        if imports and not all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in tree.body):
            faults.append(f"cell {number} imports and does something else too")
    return faults


def output_faults(notebook: Notebook) -> list[str]:
    "Stored outputs that hold an error, or a path of the machine that ran them."
    faults = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.outputs:
            shown = json.dumps(
                [output.get("text"), output.get("data", {}).get("text/plain"), output.get("data", {}).get("text/html")]
            )
            if output["output_type"] == "error":
                faults.append(f"cell {number} stores an error: {output.get('ename')}")
            elif MACHINE_PATH.search(shown):
                faults.append(f"cell {number} stores a path of the machine: {MACHINE_PATH.search(shown)[0]}")
    return faults


def sidebar_faults(book: list[Notebook], folder: Path, listed: list[str]) -> list[str]:
    "Notebooks that the site's sidebar lacks, lists twice, or has in another order."
    expected = [notebook.path.relative_to(folder).as_posix() for notebook in book]
    if sorted(expected) != sorted(listed):
        return [f"the sidebar has {listed}, the notebooks are {expected}"]
    in_book = [name for name in expected if "/" not in name]
    return [] if [name for name in listed if "/" not in name] == in_book else ["the sidebar is not in chapter order"]
