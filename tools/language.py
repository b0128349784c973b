"""Phrases that a reader who knows machine learning would have to decode, with the field's words.

The list is a net for the most frequent ones. `tests/book/test_notebooks.py` searches notebooks, messages and pages
for them.
"""

import re
from pathlib import Path

from book import notebook_paths, read_notebook

# Regular expressions, matched as whole words in lower-case text whose underscores and line breaks are spaces
PHRASES = {
    r"answers? (?:for|of) (?:the )?masked": "labels",
    r"at the door": "early, before the work begins",
    r"blanks?(?![ -](?:lines?|rows?|records?|documents?))(?<!in the blank)(?<!in the blanks)": "space, whitespace",
    r"by heart": "memorize",
    r"derails?|derailed|derailing": "diverge, loss spike",
    r"(?<!segmentation )(?<!page )faults?|faulty": "error, invalid value, problem",
    r"fill up|filled up|filling up": "pad",
    r"first weights": "initial weights",
    r"(?:goes|go|going|went|gone) on (?:with|where|from|as if|bit for bit)": "resume, continue",
    r"how long the mean remembers": "decay rate of the first moment",
    r"length of the gradients?|longer gradients": "gradient norm",
    r"look(?:s|ed)? out for": "detect",
    r"may vary": "hyperparameters, options",
    r"no numbers?(?! of)|numbers that are none|makes? all losses none": "NaN, non-finite",
    r"nobody asks|nobody watches|somebody watches|somebody asks": "say what happens, without a person",
    r"packed (?:files?|archives?)": "compressed file",
    r"played back|play back|plays back": "replay (a CUDA graph)",
    r"runaways?|runs? away|ran away": "loss spike, divergence",
    r"save due|steps ahead|take step": "should_save, prefetch_batches, train_step",
    r"stand-ins?": "random replacement token",
    r"text that was held out": "held-out split, validation split",
    r"unfilled": "unpadded",
    r"way back": "backward pass",
    r"what (?:comes|goes) (?:in|out)|what came (?:in|out)": "input, output",
}
PATTERNS = {re.compile(rf"(?<![a-z])(?:{phrase})(?![a-z])"): words for phrase, words in PHRASES.items()}
TEXT_FILES = {".md", ".py", ".yml", ".yaml", ".ini"}
EXEMPT = {"tools/language.py", "tests/unit/test_tools.py"}  # They name the phrases


def find_phrases(text: str) -> list[str]:
    "The phrases in a text, each with the words to use instead."
    plain = re.sub(r"[\s_]+(?:#\s|>\s)?", " ", text).lower()
    return [f"{match[0]!r} (say: {words})" for pattern, words in PATTERNS.items() for match in pattern.finditer(plain)]


def language_problems(root: Path, names: list[str]) -> list[str]:
    "Phrases in notebooks and in files of text and code, each with its place."
    problems = []
    for path in notebook_paths(root / "nbs"):
        where = path.relative_to(root).as_posix()
        for number, cell in enumerate(read_notebook(path).cells):
            problems += [f"{where}, cell {number}: {found}" for found in find_phrases(cell.source)]
    for name in names:
        # The package is made from the notebooks
        if Path(name).suffix in TEXT_FILES and name not in EXEMPT and not name.startswith("langmlm/"):
            text = (root / name).read_text(encoding="utf-8")
            problems += [f"{name}: {found}" for found in find_phrases(text)]
    return problems
