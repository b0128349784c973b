"""Fixtures for all tests: a small tokenizer and dataset, runs on them, a copy of the project; and the count at the end.

Nothing here imports the package before a test needs it, because the process that distributes the tests never does.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {  # For this process before it imports torch, and for the processes that tests start
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell ignores it for what it starts with "&"

HANG = 1_500  # Seconds: limits in tests catch hangs only, on machines of any speed
ARCHITECTURE = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 2e-3,
    "logging_steps": 3,
    "save_steps": 4,
    "bf16": False,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "The arguments of `create_mlm` that name data."
    from langmlm import tasks
    from langmlm.text.corpus import docstrings

    folder = tmp_path_factory.mktemp("data")
    (folder / "data.txt").write_text("\n".join(islice(docstrings(), 75)), encoding="utf-8")
    config = {
        "vocab_size": 500,
        "max_length": 32,
        "path_to_save_tokenizer": folder / "tokenizer",
        "path_to_save_dataset": folder / "dataset",
    }
    tasks.create_tokenizer(folder / "data.txt", config).train()
    return {"tokenizer": folder / "tokenizer", "tokenized_dataset": folder / "dataset"}


@pytest.fixture
def create(data: dict[str, Path]) -> Callable:
    "Make a new run: `create(output_dir, **settings)`."
    from langmlm import tasks

    def create_run(output_dir: Path, **changes) -> tasks.MLMTask:
        settings = {**SETTINGS, "output_dir": output_dir, **changes}
        return tasks.create_mlm(**data, model_config=ARCHITECTURE, training_config=settings)

    return create_run


@pytest.fixture
def resume(data: dict[str, Path]) -> Callable:
    "Resume a run: `resume(checkpoint_path, **settings)`."
    from langmlm import tasks

    def resume_run(checkpoint_path: Path, **changes) -> tasks.MLMTask:
        return tasks.create_mlm(**data, checkpoint_path=checkpoint_path, training_config=changes)

    return resume_run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A copy of the project that a test may change."
    from sandbox import copy_project

    return copy_project(tmp_path / "project")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    "Tell a worker which Python this is."
    node.workerinput["python"] = sys.executable


def pytest_configure(config: pytest.Config) -> None:
    "Start real Python processes in a worker, which may be a fork: see tools/forks.py."
    if hasattr(config, "workerinput"):
        sys.executable = config.workerinput["python"]
        multiprocessing.set_executable(sys.executable)


# The report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Begin with what takes long, so that no worker is left alone with it at the end."
    sizes = {path: path.stat().st_size for path in {item.path for item in items}}

    def order(item: pytest.Item) -> tuple:
        is_long = item.get_closest_marker("slow") is not None
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        return not is_long, {"integration": 0, "book": 1}.get(folder, 2), -sizes[item.path]

    items.sort(key=order)


def pytest_terminal_summary(terminalreporter) -> None:
    "Show what tests measured."
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(value)


def pytest_unconfigure(config: pytest.Config) -> None:
    "Print the counts in the last line; an error outside a test counts as a failure."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    passed, failed, errors, skipped = (
        len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")
    )
    reporter.write_line(f"{passed} passed, {failed + errors} failed" + (f", {skipped} skipped" if skipped else ""))
