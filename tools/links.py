"Find links between the project's own pages that lead nowhere."

import re
from pathlib import Path

from book import notebook_paths, read_notebook

LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
EXTERNAL = re.compile(r"^[a-z][a-z0-9+.-]*:|^/")


def page_text(path: Path) -> str:
    "The Markdown of a page: a notebook's text cells, or a whole file."
    if path.suffix == ".ipynb":
        return "\n\n".join(cell.source for cell in read_notebook(path).cells if cell.kind == "markdown")
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    "Markdown without blocks and spans of code, which may look like links; text in backticks as a link's name is kept."
    return CODE.sub(lambda code: "" if code[0].startswith("```") else "code", text)


def anchors(text: str) -> set[str]:
    "The anchors of a page: those of its headings, and those written as `{#name}`."
    headings = re.findall(
        r"^#{1,6}\s+(.+?)\s*(?:\{[^}]*\})?\s*$",
        CODE.sub(lambda code: "" if code[0].startswith("```") else code[0].strip("`"), text),
        re.MULTILINE,
    )
    plain = [re.sub(r"[^\w\s.-]", "", heading.lower()).strip() for heading in headings]
    slugs = {re.sub(r"\s+", "-", heading) for heading in plain}  # As Quarto makes them
    return slugs | {slug.replace(".", "") for slug in slugs} | set(re.findall(r"\{#([\w.-]+)[^}]*\}", text))


def link_problems(root: Path, names: list[str]) -> list[str]:
    "Links to files that do not exist and to anchors that no heading has."
    pages = notebook_paths(root / "nbs") + [root / name for name in names if name.endswith(".md")]
    problems, known = [], {}
    for page in pages:
        where = page.relative_to(root).as_posix()
        for address in LINK.findall(without_code(page_text(page))):
            if EXTERNAL.match(address):
                continue
            name, _, anchor = address.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                problems.append(f"{where} links to {address}, but there is no such file")
            elif anchor and target.suffix in (".ipynb", ".md"):
                if target not in known:
                    known[target] = anchors(page_text(target))
                if anchor not in known[target]:
                    problems.append(f"{where} links to {address}, but there is no such heading")
    return problems
