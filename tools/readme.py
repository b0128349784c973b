"""Make README.md from nbs/index.ipynb with pandoc, and its figures in nbs/images.

Without `--write`, say how the files that are there differ.
"""

import argparse
import base64
import difflib
import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pypandoc
from execnb.nbio import nb2str, read_nb
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # settings.ini names processors in `tools`
INDEX = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
PACKAGE = "langmlm"
IMAGES = Path("images")  # Seen from the notebook
PREFIX = "readme-"  # Of the figures that are made here


def processed_index() -> dict:
    "The index notebook as nbdev hands it to the documentation."
    notebook = read_nb(INDEX)
    FilterDefaults()(notebook)
    return json.loads(nb2str(notebook))


def alt_text(source: str) -> str:
    "The text of a cell's `#| fig-alt:` line."
    lines = [line.split(":", 1)[1].strip() for line in source.splitlines() if line.startswith("#| fig-alt:")]
    return lines[0].strip("\"'") if lines else ""


def without_figures(notebook: dict) -> tuple[dict, dict[str, bytes]]:
    """The notebook as pandoc wants it, and its figures by file name.

    Without raw cells and directives; every figure is a text cell that links to a file; every result has a count.
    """
    cells, figures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        lines = source.splitlines(keepends=True)
        outputs, links = [], []
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                name = f"{PREFIX}{len(figures) + 1}.png"
                figures[name] = base64.b64decode("".join(picture))
                links.append(f"![{alt_text(source)}]({(IMAGES / name).as_posix()})")
            else:
                outputs.append(output | ({"execution_count": 1} if output["output_type"] == "execute_result" else {}))
        if cell["cell_type"] != "raw":
            shown = [] if "#| echo: false\n" in lines else [line for line in lines if not line.startswith("#|")]
            clean = cell | {"source": "".join(shown)}
            cells.append(clean | ({"outputs": outputs} if "outputs" in cell else {}))
        cells += [{"cell_type": "markdown", "metadata": {}, "source": link} for link in links]
    return {**notebook, "cells": cells, "metadata": {}}, figures


def title_of(notebook: dict) -> str:
    "The first heading of a notebook."
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    return next(line for source in sources for line in source.splitlines() if line.startswith("# "))[2:].strip()


def make_readme(title: str, notebook: dict) -> dict[Path, bytes]:
    "The content of README.md and of every figure, by path."
    wanted, figures = without_figures(notebook)
    arguments = [f"--lua-filter={ROOT / 'tools' / 'readme.lua'}"]
    body = pypandoc.convert_text(json.dumps(wanted), "gfm", format="ipynb+link_attributes", extra_args=arguments)
    files = {INDEX.parent / IMAGES / name: picture for name, picture in figures.items()}
    return files | {README: f"# {title}\n\n\n{body}".encode()}


def main() -> int:
    "Write README.md and its figures, or compare them."
    if not entry_points(group="nbdev", name=PACKAGE):
        sys.exit(f"{PACKAGE} is not installed here, so names would not become links: pip install -e .")
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files")
    arguments = parser.parse_args()
    wanted = make_readme(title_of(json.loads(INDEX.read_text(encoding="utf-8"))), processed_index())
    made_before = set((INDEX.parent / IMAGES).glob(f"{PREFIX}*.png")) | ({README} if README.exists() else set())
    stale = [path for path, content in wanted.items() if path not in made_before or path.read_bytes() != content]
    stale += sorted(made_before - wanted.keys())
    if not arguments.write:
        print("\n".join(f"{path.relative_to(ROOT)} is not what nbs/index.ipynb makes: make readme" for path in stale))
        if README in stale and README.exists():
            lines = README.read_text(encoding="utf-8").splitlines(), wanted[README].decode().splitlines()
            print("\n".join(difflib.unified_diff(*lines, "README.md", "from index.ipynb", lineterm="")))
        return int(bool(stale))
    for path in stale:
        path.unlink(missing_ok=True)
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
