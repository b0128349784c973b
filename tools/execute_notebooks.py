"""Run notebooks and store their outputs, cleaned. Without paths: every notebook in nbs/.

`--check` stores nothing and lists the cells whose outputs differ from the stored ones.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from book import notebook_paths
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.process import extract_directives
from package import read_settings
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 1_500  # Seconds; catches hangs only
# Without the version of matplotlib in figures, they change only when their content does
KERNEL_ARGUMENTS = ["--InlineBackend.print_figure_kwargs={'bbox_inches': 'tight', 'metadata': {'Software': None}}"]


def is_skipped(cell: nbformat.NotebookNode, flags: set[str]) -> bool:
    "Return whether nbdev_test would skip a cell; its stored output is then kept."
    if cell.cell_type != "code":
        return True
    directives = extract_directives(cell, remove=False)
    evaluates = directives.get("eval:", ["true"])[0].lower() != "false"
    return not evaluates or bool(flags & directives.keys())


def without_widgets(outputs: list) -> list:
    "Remove progress bars and other widgets, which cannot be shown without their kernel."
    return [
        output for output in outputs if not any("jupyter.widget" in mime_type for mime_type in output.get("data", {}))
    ]


def through_files(folder: str) -> Config:
    "The configuration of a kernel that listens to sockets in a folder: on a busy machine, a chosen port may be taken."
    return Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})


def execute(path: Path, flags: set[str], folder: str) -> nbformat.NotebookNode:
    "Run one notebook in its own folder; do not change the file. A temporary folder holds the kernel's sockets."
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        startup_timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=KERNEL_ARGUMENTS,
        config=through_files(folder),
    )
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            if not is_skipped(cell, flags):
                client.execute_cell(cell, number)
                cell.outputs = without_widgets(cell.outputs)
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> str:
    "Return the content of a notebook file after nbdev_clean."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notebook.ipynb"
        nbformat.write(notebook, path)
        nbdev_clean.__wrapped__(str(path))
        return path.read_text(encoding="utf-8")


def stale_cells(stored: str, rerun: str) -> list[int]:
    "Return the numbers of cells whose stored outputs differ from those of another run."
    pairs = zip(json.loads(stored)["cells"], json.loads(rerun)["cells"])
    return [number for number, (before, after) in enumerate(pairs) if before.get("outputs") != after.get("outputs")]


def main() -> int:
    "Run the requested notebooks, one after another, and stop at the first error."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks to run")
    parser.add_argument("--check", action="store_true", help="compare, and store nothing")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flags = set(read_settings(ROOT)["tst_flags"].split())
    stale = []
    for path in arguments.paths or notebook_paths(ROOT / "nbs"):
        print(path, flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                text = cleaned(execute(path.resolve(), flags, folder))
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            return 1
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif cells := stale_cells(path.read_text(encoding="utf-8"), text):
            print(f"  outputs of cells {cells} differ", flush=True)
            stale.append(path)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
