"What the documentation does with notebook cells beyond nbdev: `procs` in settings.ini names these processors."

import ast
import re
import textwrap

from nbdev.process import Processor

NAME_LINK = r"\[(`[^`]+`)\]\([^()\s]+\)"
ALIGNED = "#| classes: aligned\n"
COLUMNS = re.compile(r"\S {2,}\S")
WIDTH = 88  # Characters of an output with columns
LINK = re.compile(rf"\[((?:[^\[\]]|{NAME_LINK})+)\](?=\()")


def fold_exports(cell) -> None:
    "Fold exported source, which nbdev shows open: the API entry stands above it."
    if cell.cell_type == "code" and cell.source:
        cell.source = cell.source.replace("#| code-fold: show\n", "#| code-fold: true\n", 1)


def unnest_links(cell) -> None:
    "Keep the outer link where nbdev has linked a name in its text: Markdown has no links in links."
    if cell.cell_type == "markdown" and cell.source:
        cell.source = LINK.sub(lambda found: "[" + re.sub(NAME_LINK, r"\1", found[1]) + "]", cell.source)


def mark_tables(cell) -> None:
    "Give the class `aligned` to cells that print columns: styles.css wraps the lines of all other outputs."
    texts = []
    for output in cell.get("outputs", []) if cell.cell_type == "code" and cell.source else []:
        place, name = (output, "text") if output.get("text") else (output.get("data") or {}, "text/plain")
        texts.append((place, name, "".join(place.get(name, "")).splitlines()))
    if any(sum(bool(COLUMNS.search(line)) for line in lines) > 1 for *_, lines in texts):
        cell.source = ALIGNED + cell.source
        for place, name, lines in texts:
            if name in place:
                place[name] = "\n".join(map(wrap, lines))


def wrap(line: str) -> str:
    "Wrap a line that is wider than a page, below the start of its last column; a table of many columns stays."
    start = max((found.end() - 1 for found in COLUMNS.finditer(line)), default=4)
    if len(line) <= WIDTH or start > WIDTH // 2:
        return line
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * start, break_on_hyphens=False))


class hide_imports(Processor):
    "Leave out the import cells of chapters; pages that export nothing keep theirs, so that their code is complete."

    def begin(self):
        self.is_chapter = getattr(self.nb, "has_docs_", False)

    def cell(self, cell):
        if self.is_chapter and cell.cell_type == "code" and cell.source and is_import_only(cell.source):
            cell.source = "#| include: false\n" + cell.source


def is_import_only(source: str) -> bool:
    "Whether code consists of imports."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)


def embed_html(cell) -> None:
    "Turn HTML outputs into raw blocks, because Quarto adds jquery and require.js from a CDN to pages with `text/html`."
    for output in cell.get("outputs", []) if cell.cell_type == "code" else []:
        html = (output.get("data") or {}).pop("text/html", None)
        if html is not None and "text/markdown" not in output["data"]:
            text = html if isinstance(html, str) else "".join(html)
            output["data"]["text/markdown"] = ["```{=html}\n", text.strip("\n") + "\n", "```\n"]
