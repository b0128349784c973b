"""Speed and memory of reading text, and of training a tokenizer on it; one process per measurement.

    python benchmarks/reading.py reading --write     # stores results/reading.json; needs 2 GB of disk
    python benchmarks/reading.py learning --write    # trains on 1 GB, with spaces and without: an hour

The text is synthetic: words with Zipf's distribution, so that new ones never stop, and lines of a script without
spaces. `--megabytes` makes it smaller.
"""

import argparse
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULT = Path(__file__).parent / "results" / "reading.json"
SYLLABLES = [
    onset + vowel for onset in [*"bcdfghjklmnprstvwz", "st", "tr", "ch", "sh"] for vowel in [*"aeiou", "ea", "ou", "io"]
]


def word(number: int) -> str:
    "Make the word with a frequency rank; rare words are longer."
    rest, found = number * 2_654_435_761 % 2**40, []
    for _ in range(1 + min(5, number.bit_length() // 4)):
        rest, index = divmod(rest, len(SYLLABLES))
        found.append(SYLLABLES[index])
    return "".join(found)


def lines_of_words(megabytes: float) -> Iterator[str]:
    "Make sentences of 5 to 60 words."
    draw, common, written = np.random.default_rng(0), [word(number) for number in range(100_000)], 0
    while written < megabytes * 1e6:
        numbers = (draw.zipf(1.25, size=200_000) % 2**40).tolist()
        for end in np.cumsum(draw.integers(5, 60, size=6_000)).tolist():
            ranks = numbers[max(end - 30, 0) : end]
            line = " ".join(common[rank] if rank < len(common) else word(rank) for rank in ranks) + "."
            written += len(line) + 1
            yield line


def lines_without_spaces(megabytes: float) -> Iterator[str]:
    "Make lines of 10 to 60 characters; there are 4,000 characters, of three bytes each."
    draw, written = np.random.default_rng(0), 0
    characters = np.array([chr(0x4E00 + offset) for offset in range(4_000)])
    while written < megabytes * 1e6:
        numbers = np.minimum(draw.zipf(1.2, size=100_000), 4_000) - 1
        for end in np.cumsum(draw.integers(10, 60, size=2_800)).tolist():
            line = "".join(characters[numbers[max(end - 35, 0) : end]]) + "。"
            written += 3 * len(line) + 1
            yield line


def write_lines(file: Path, lines: Iterator[str]) -> None:
    "Write a text file."
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)


def write_table(file: Path, lines: Iterator[str]) -> None:
    "Write the same lines in another format."
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(lines)}), file)
    elif file.suffix == ".jsonl":
        write_lines(file, (json.dumps({"id": number, "text": line}) for number, line in enumerate(lines)))
    else:
        write_lines(file, ["text", *(f'"{line}"' for line in lines)])


def files_to_read(folder: Path, megabytes: float) -> dict[str, Callable[[Path], None]]:
    "Return the files to read, and how to make each one."
    some = megabytes / 10
    compressed = gzip.compress("\n".join(lines_of_words(some)).encode(), 6)
    return {
        "lines.txt": lambda file: write_lines(file, lines_of_words(megabytes)),
        "without_spaces.txt": lambda file: write_lines(file, lines_without_spaces(megabytes)),
        "lines.txt.gz": lambda file: file.write_bytes(compressed),
        "lines.jsonl": lambda file: write_table(file, lines_of_words(some)),
        "lines.csv": lambda file: write_table(file, lines_of_words(some)),
        "lines.parquet": lambda file: write_table(file, lines_of_words(some)),
        "one_line_of_200_MB.txt": lambda file: file.write_bytes(b"storm " * (200_000_000 // 6)),
        "10_million_words.txt": lambda file: write_lines(file, (word(number % 50_000) for number in range(10_000_000))),
    }


def measure(what: str, file: str) -> dict:
    "Read a file, or train a tokenizer on it, in this process."
    from langmlm.text.corpus import open_corpus
    from langmlm.tokens.tokenizer import make_untrained_tokenizer, draw_training_text, train_tokenizer
    from langmlm.tokens.tokenizer import TokenizerConfig

    before, config = peak(), TokenizerConfig()
    corpus, began = open_corpus(file), time.perf_counter()
    if what == "learn":
        train_tokenizer(corpus, config)
        seconds, figures = time.perf_counter() - began, {"peak_mb": peak()}
        sample = draw_training_text(corpus, make_untrained_tokenizer(config), config)
        figures |= {"text_mb": sample.total_bytes / 1e6, "sample_mb": sample.bytes / 1e6}
    else:
        processor, documents = time.process_time(), sum(1 for _ in corpus)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        figures = {"documents": documents, "peak_mb": peak()}
        size = sum(len(document.encode()) + 1 for document in corpus) / 1e6
        figures |= {"text_mb": size, "mb_per_second_of_processor": size / processor}
    figures |= {"seconds": seconds, "peak_before_mb": before}
    return {name: round(value, 1) for name, value in figures.items()}


def peak() -> float:
    "Return the peak memory of this process in MB; `ru_maxrss` would include its parent's."
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6


def measure_alone(what: str, file: Path) -> dict:
    "Measure in a process of its own."
    command = [sys.executable, __file__, "measure", what, str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    "Measure, print and store."
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["reading", "learning"])
    parser.add_argument(
        "--megabytes", type=float, help="size of the text (default: 500 for reading, 1,000 for learning)"
    )
    parser.add_argument("--write", action="store_true", help=f"store the results in {RESULT.name}")
    arguments = parser.parse_args()
    size = arguments.megabytes or {"reading": 500, "learning": 1_000}[arguments.part]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part == "reading":
            makers = files_to_read(Path(folder), size)
        else:
            makers = {
                "lines.txt": lambda file: write_lines(file, lines_of_words(size)),
                "without_spaces.txt": lambda file: write_lines(file, lines_without_spaces(size)),
            }
        for name, make in makers.items():
            make(file := Path(folder) / name)
            results[name] = measure_alone({"reading": "read", "learning": "learn"}[arguments.part], file)
            print(name, results[name], flush=True)
            file.unlink()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    stored[arguments.part] = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "megabytes": size, **results}
    if arguments.write:
        RESULT.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
