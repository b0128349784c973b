"Make README.md from nbs/index.ipynb with pandoc, or say how the one that is there differs."

import argparse
import difflib
import json
import os
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pypandoc
from execnb.nbio import nb2str, read_nb
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
PACKAGE = "langmlm"
IMAGES = "index_files"  # Beside README.md, for the pictures that index.ipynb stores


def processed_index() -> dict:
    "The index notebook as nbdev hands it to the documentation."
    notebook = read_nb(INDEX)
    FilterDefaults()(notebook)
    return json.loads(nb2str(notebook))


def as_pandoc_wants(notebook: dict) -> dict:
    "Drop front matter, widget states, directives and the text beside a picture; give every result the integer count that pandoc needs."
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] != "raw"]
    for cell in cells:
        lines = "".join(cell["source"]).splitlines(keepends=True)
        cell["source"] = "".join(line for line in lines if not line.startswith("#|"))
        for output in cell.get("outputs", []):
            if output["output_type"] == "execute_result":
                output["execution_count"] = 1
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": output["data"]["image/png"]}
    return {**notebook, "cells": cells, "metadata": {}}


def render(title: str, notebook: dict) -> str:
    "The text of README.md; pictures are written next to it."
    arguments = [f"--extract-media={IMAGES}", f"--lua-filter={ROOT / 'tools' / 'readme.lua'}"]
    body = pypandoc.convert_text(json.dumps(as_pandoc_wants(notebook)), "gfm", format="ipynb", extra_args=arguments)
    return f"# {title}\n\n\n{body}"


def title_of(path: Path) -> str:
    "The first heading of a notebook."
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return next(line for source in sources for line in source.splitlines() if line.startswith("# "))[2:].strip()


def main() -> int:
    "Write README.md, or compare."
    if not entry_points(group="nbdev", name=PACKAGE):
        sys.exit(f"{PACKAGE} is not installed here, so names would not become links: pip install -e .")
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write README.md")
    arguments = parser.parse_args()
    shutil.rmtree(ROOT / IMAGES, ignore_errors=True)
    wanted = render(title_of(INDEX), processed_index())
    if arguments.write:
        README.write_text(wanted, encoding="utf-8")
        return 0
    present = README.read_text(encoding="utf-8") if README.exists() else ""
    names = {"fromfile": "README.md", "tofile": "from index.ipynb"}
    print("\n".join(difflib.unified_diff(present.splitlines(), wanted.splitlines(), **names, lineterm="")))
    return int(present != wanted)


if __name__ == "__main__":
    sys.exit(main())
