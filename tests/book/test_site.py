"The site: what its notebooks become before Quarto renders them, its settings, and the code on the landing page."

import json
import re
import subprocess
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forks import forked_python

from langmlm.model.roberta import ModelConfig
from langmlm.text.corpus import docstrings
from langmlm.tokens.tokenizer import TokenizerConfig
from langmlm.train.config import TrainingConfig
from tools.docs_cells import embed_html, fold_exports, hide_imports, is_import_only, mark_tables, unnest_links
from tools.search_index import add_options
from tools.showdoc import parameters

ROOT = Path(__file__).parents[2]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    path for path in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(NBS).parts)
)
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def cells_of(path: Path) -> list[dict]:
    "The cells of a notebook."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


class Cell(dict):
    "A cell as nbdev hands it to a processor."

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def test_exported_source_is_folded():
    cell = Cell(cell_type="code", source='#| code-fold: show\n#| code-summary: "Exported source"\nx = 1')
    fold_exports(cell)
    assert cell.source.startswith("#| code-fold: true\n")


def test_import_cells_of_chapters_are_hidden():
    source = "import os\nfrom pathlib import Path"
    for is_chapter in (True, False):
        notebook = SimpleNamespace(cells=[Cell(cell_type="code", source=source)], has_docs_=is_chapter)
        processor = hide_imports(notebook)
        processor.begin()
        processor.cell(notebook.cells[0])
        assert notebook.cells[0].source.startswith("#| include: false\n") is is_chapter
    assert not is_import_only("import os\nx = 1") and not is_import_only("%time x") and not is_import_only("")


def test_html_outputs_become_raw_blocks():
    html, both = {"text/html": ["<p>a</p>"], "text/plain": ["a"]}, {"text/html": "<p>", "text/markdown": ["a"]}
    cell = Cell(cell_type="code", source="x", outputs=[{"data": html}, {"data": both}, {"text": ["stream"]}])
    embed_html(cell)
    assert html["text/markdown"] == ["```{=html}\n", "<p>a</p>\n", "```\n"] and "text/html" not in html
    assert both == {"text/markdown": ["a"]}


def test_names_in_links_are_not_linked_twice():
    name, other = "[`create_mlm`](https://host/tasks.html#create_mlm)", "[`a`](https://host/a.html)"
    cell = Cell(
        cell_type="markdown", source=f"[{name} and {other}](tasks.ipynb), {name}, [page](a.ipynb) and ![x](a.png)"
    )
    unnest_links(cell)
    assert cell.source == f"[`create_mlm` and `a`](tasks.ipynb), {name}, [page](a.ipynb) and ![x](a.png)"
    assert "unnest_links" in (ROOT / "settings.ini").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "output, aligned",
    [
        ({"text": ["step   loss\n", "   1   6.34\n"]}, True),
        ({"data": {"text/plain": "documents  1,000\nlengths    1 ▁▂█ 9"}}, True),
        ({"text": ["a message of  one line that is as long as messages are\n", "and another"]}, False),
        ({"data": {"text/plain": ["{'a': 1,\n", "  'b': 2}"]}}, False),
    ],
)
def test_only_outputs_with_columns_keep_their_lines(output, aligned):
    cell = Cell(cell_type="code", source="#| echo: false\nx", outputs=[output, output])
    mark_tables(cell)
    assert cell.source == "#| classes: aligned\n" * aligned + "#| echo: false\nx"
    assert "mark_tables" in (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert ".aligned > .cell-output" in (NBS / "styles.css").read_text(encoding="utf-8")


def test_long_lines_of_columns_are_wrapped():
    option, message, table = f"  --name INT   {'what it is ' * 9}", "a message " * 12, "step  loss   " * 9
    outputs = [{"text": f"{option}\n{message}\n{table}\n  --b   c\n"}, {"data": {"text/plain": [message]}}, {"data": {}}]
    cell = Cell(cell_type="code", source="x", outputs=outputs)
    mark_tables(cell)
    assert cell.outputs[1]["data"]["text/plain"].count("\n    ") == 1 and cell.outputs[2] == {"data": {}}
    first, second, *others = cell.outputs[0]["text"].split("\n")
    assert first.startswith("  --name INT   what") and second.startswith(" " * 15 + "is what") and len(first) <= 88
    assert [line[:4] for line in others] == ["a me", "    ", "step", "  --"] and others[2] == table


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).as_posix())
def test_cell_options_are_valid_yaml(path):
    for cell in cells_of(path):
        options = [line[2:] for line in "".join(cell["source"]).splitlines() if re.match(r"#\| [\w-]+: ", line)]
        if cell["cell_type"] == "code":
            assert isinstance(yaml.safe_load("\n".join(options) or "{}"), dict)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).as_posix())
def test_figures_have_alternative_text(path):
    for cell in cells_of(path):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert "#| fig-alt:" in "".join(cell["source"])


def test_overview_links_to_every_notebook():
    text = "".join("".join(cell["source"]) for cell in cells_of(NBS / "map.ipynb"))
    linked = set(re.findall(r"\]\(([\w/]+\.ipynb)\)", text))
    assert linked == {path.relative_to(NBS).as_posix() for path in NOTEBOOKS} - {"index.ipynb", "map.ipynb"}


def test_overview_has_names_and_order_of_the_sidebar():
    "So that readers find there what they have read about here."
    text = "".join("".join(cell["source"]) for cell in cells_of(NBS / "map.ipynb"))
    rows = re.findall(r"^(?:\| |- )\[(.+?)\]\(([\w/]+\.ipynb)\)", text, re.MULTILINE)
    titles = [(cells_of(NBS / path)[0]["source"][0].removeprefix("# ").rstrip(), path) for _, path in rows]
    entries = [entry for section in SITE["website"]["sidebar"]["contents"] for entry in section["contents"]]
    listed = [entry["href"] if isinstance(entry, dict) else entry for entry in entries]
    how_to = re.findall(r"\]\((how_to/\w+\.ipynb)\)", text.split("## How-to pages")[1].split("## Chapters")[0])
    assert rows == titles and len({title for title, _ in titles}) == len(titles)
    assert [path for path in listed if path in dict(map(reversed, rows))] == [path for _, path in rows]
    assert [path for path in listed if path.startswith("how_to/")] == how_to


def test_pages_ask_nothing_of_other_hosts():
    styles = "".join(path.read_text(encoding="utf-8") for path in [*NBS.glob("*.css"), *NBS.glob("assets/*.scss")])
    assert "$web-font-path: false" in styles and "http" not in styles
    for scheme in ("light", "dark"):
        assert "assets/site.scss" in SITE["format"]["html"]["theme"][scheme]


def test_icons_have_labels_and_files_exist():
    website = SITE["website"]
    assert all(
        item.get("text") or item["aria-label"] for item in website["navbar"]["left"] + website["navbar"]["right"]
    )
    assert (NBS / website["favicon"]).exists() and (NBS / website["image"]).exists() and website["image-alt"]
    assert (NBS / "404.qmd").exists() and "license" in website["page-footer"]["left"]


def title_of(path: Path) -> str:
    "The title of a notebook."
    return "".join(cells_of(path)[0]["source"]).splitlines()[0].removeprefix("# ")


def test_every_section_of_the_sidebar_fits_a_screen():
    "At most one section is open. Of 838 pixels, the sections take 26 each, an entry 24, and each further line of it 17."
    sections = SITE["website"]["sidebar"]["contents"]
    for section in sections:
        items = [item if isinstance(item, dict) else {"href": item} for item in section["contents"]]
        titles = [item.get("text") or title_of(NBS / item["href"]) for item in items]
        lines = sum(1 + len(title) // 25 for title in titles)
        assert 26 * len(sections) + 24 * len(titles) + 17 * (lines - len(titles)) < 800, section["section"]


def test_options_are_found_by_their_names():
    page = {"objectID": "a.html", "href": "a.html", "title": "A", "section": "", "text": "learning_rate"}
    index = add_options([page])
    (found,) = [entry for entry in index if entry["section"] == "learning_rate"]
    assert found["href"] == "options.html#TrainingConfig.learning_rate" and found["title"] == "All options"
    assert found["text"] == "Peak learning rate, reached at the end of warm-up (TrainingConfig)"
    assert {entry["section"] for entry in index} > set(TrainingConfig.__dataclass_fields__)
    assert index[0] == page and add_options(index) == index
    assert all(entry.keys() >= page.keys() and entry["text"] for entry in index)
    tables = "".join(parameters(config) for config in (TokenizerConfig, ModelConfig, TrainingConfig))
    anchors = re.findall('<code id="(.*?)">', tables)
    assert [entry["href"] for entry in index[1:]] == [f"options.html#{anchor}" for anchor in anchors]
    text = "".join("".join(cell["source"]) for cell in cells_of(NBS / "options.ipynb"))
    assert all(f"show_doc({anchor.partition('.')[0]})" in text for anchor in anchors)
    assert "nbdev_docs --n_workers 2\n\t$(BIN)/python tools/search_index.py" in (ROOT / "Makefile").read_text()


def test_landing_page_is_shared_with_the_social_image():
    "Without this, Quarto takes the first figure of the page."
    raw, *_ = (cell for cell in cells_of(NBS / "index.ipynb") if cell["cell_type"] == "raw")
    given = yaml.safe_load("".join(raw["source"]).strip("-\n"))
    assert given == {"image": SITE["website"]["image"], "image-alt": SITE["website"]["image-alt"]}


def test_landing_page_code_is_not_wrapped():
    "On a screen of 1280 pixels, a line has room for 78 characters."
    (snippet,) = [
        "".join(cell["source"]) for cell in cells_of(NBS / "index.ipynb") if "tasks" in "".join(cell["source"])
    ]
    lines = [line for line in snippet.splitlines() if line and not line.startswith("#|")]
    assert len(lines) == 5 and max(map(len, lines)) <= 78


def test_search_button_has_a_name():
    script = SITE["format"]["html"]["include-after-body"]["text"]
    assert ".aa-DetachedSearchButton" in script and 'setAttribute("aria-label", "Search")' in script


def test_landing_page_code_runs(tmp_path):
    "With a small vocabulary, a small model and few steps, everything else as it is shown."
    (snippet,) = [
        "".join(cell["source"]) for cell in cells_of(NBS / "index.ipynb") if "tasks" in "".join(cell["source"])
    ]
    small = {
        '"data.txt"': '"data.txt", tokenizer_config={"vocab_size": 400, "max_length": 32}',
        '{"hidden_size": 768}': '{"hidden_size": 24, "num_hidden_layers": 1}',
        '"budget_minutes": 240': '"max_steps": 2, "bf16": False',
    }
    for shown, replacement in small.items():
        assert snippet.count(shown) == 1
        snippet = snippet.replace(shown, replacement)
    (tmp_path / "data.txt").write_text("\n".join(islice(docstrings(), 40)), encoding="utf-8")
    command = [forked_python(), "-c", snippet]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=1_500)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").is_file()
