"Add every option to the search index of the site, which otherwise ranks the long tables of All options low."

import json
import sys
from inspect import signature
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Run as a script

from langmlm.model.roberta import ModelConfig  # noqa: E402
from langmlm.tokens.tokenizer import TokenizerConfig  # noqa: E402
from langmlm.train.config import TrainingConfig  # noqa: E402
from tools.showdoc import comments_of, one_line  # noqa: E402

CONFIGS = (TokenizerConfig, ModelConfig, TrainingConfig)
PAGE = "options.html"


def option_entries() -> list[dict]:
    "One entry for each option, in the form of Quarto's index."
    return [
        {
            "objectID": f"{PAGE}#{config.__name__}.{name}",
            "href": f"{PAGE}#{config.__name__}.{name}",
            "title": "All options",
            "section": name,
            "text": f"{one_line(meaning)} ({config.__name__})".replace("`", ""),
            "crumbs": ["Reference", "All options"],
        }
        for config in CONFIGS
        for name, meaning in comments_of(config).items()
        if name in signature(config).parameters
    ]


def add_options(index: list[dict]) -> list[dict]:
    "The index with one entry for each option; those of an earlier call are replaced."
    added = option_entries()
    ids = {entry["objectID"] for entry in added}
    return [entry for entry in index if entry["objectID"] not in ids] + added


if __name__ == "__main__":
    path = ROOT / "_docs" / "search.json"
    index = add_options(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(index, ensure_ascii=False, indent=2), encoding="utf-8")
