"What the processes of a launcher tell each other, and the folder for unfinished work."

import json
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from langmlm.disk import write_manifest
from langmlm.tokens import processes as module
from langmlm.tokens.processes import ProcessFailed, SharedFolder, process_rank, read_finished, unfinished_folder, work_folder


def make_processes(path: Path, ranks: int = 3) -> list[SharedFolder]:
    "The views of several processes on one folder."
    views = [SharedFolder(path) for _ in range(ranks)]
    for rank, view in enumerate(views):
        view.rank, view.ranks, view._call = rank, ranks, "launch-0"
    return views


def test_single_process(tmp_path: Path):
    "Without a launcher there is one process, which writes no messages."
    assert process_rank() == (0, 1)
    with work_folder(tmp_path / "result", "key", "dataset", "option") as work:
        work.tell("done"), work.check(), work.wait_until(lambda: True)
        assert [path.name for path in work.path.iterdir()] == [".lock"]


def test_finished_results(tmp_path: Path):
    "A result counts if its key is the same and its files are there."
    assert read_finished(tmp_path / "missing", "key") is None
    (tmp_path / "data").write_text("data")
    write_manifest(tmp_path, "dataset", {"key": "key"})
    assert read_finished(tmp_path, "key")["kind"] == "dataset"
    assert read_finished(tmp_path, "other key") is None
    (tmp_path / "data").write_text("torn off")
    assert read_finished(tmp_path, "key") is None


def test_messages(tmp_path: Path):
    "A process waits for what others tell, and knows its own state."
    first, second, third = make_processes(tmp_path)
    assert first.has_told(0, "done") and not first.has_told(1, "done")
    second.tell("done"), third.tell("done")
    first.wait_until(lambda: all(first.has_told(rank, "done") for rank in range(3)))
    assert not second.has_told(0, "done")


def test_failure_reaches_the_others(tmp_path: Path):
    "The error of one process is raised in the others with its message, and they do not repeat it as theirs."
    first, second, third = make_processes(tmp_path)
    with pytest.raises(OSError), module._heartbeat(second):
        raise OSError("disk full")
    for other in (first, third):
        with pytest.raises(ProcessFailed, match="process 1 of 3 failed: OSError: disk full"), module._heartbeat(other):
            other.wait_until(lambda: False)
    second.check()


def test_dead_process(tmp_path: Path):
    "A process without a heartbeat is named after the time-out, with the constant; one with a heartbeat never is."
    first, second = make_processes(tmp_path, 2)
    with patch.object(module, "PROCESS_TIMEOUT", 1.0), patch.object(module, "_HEARTBEAT", 0.1):
        began = time.monotonic()
        with module._heartbeat(second):
            while time.monotonic() - began < 2:
                first.check()
                time.sleep(0.05)
        with pytest.raises(ProcessFailed, match=r"process 1 of 2 .* no heartbeat for 1.0 seconds .*\.PROCESS_TIMEOUT\)"):
            first.wait_until(lambda: False)
    assert module.PROCESS_TIMEOUT >= 60


def test_earlier_calls_are_forgotten(tmp_path: Path):
    "What an earlier launch has left is neither read nor kept."
    old, _ = make_processes(tmp_path, 2)
    old.tell("failed", "long ago"), (tmp_path / "shard-00000.json").touch()
    first, second = make_processes(tmp_path, 2)
    first._call = second._call = "launch-1"
    second.tell("alive")
    second.check()
    first.forget_earlier_calls()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["process-1.launch-1.alive", "shard-00000.json"]
    assert json.loads((tmp_path / "process-1.launch-1.alive").read_text()) == ""


def test_work_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "One job at a time, of whatever key; unfinished work of other keys is mentioned and stays; the folder is kept."
    target = tmp_path / "result"
    with work_folder(target, "a" * 32, "dataset", "option") as work:
        (work.path / "half").touch()
        with pytest.raises(RuntimeError, match="option=.* is in use by another run"):
            with work_folder(target, "a" * 32, "dataset", "option"):
                pass
        with pytest.raises(RuntimeError, match="option=.*aaaa.unfinished' is in use by another run"):
            with work_folder(target, "b" * 32, "dataset", "option"):
                pass
    with work_folder(target, "b" * 32, "dataset", "option") as other:
        assert other.path != work.path == unfinished_folder(target, "a" * 32)
    assert (work.path / "half").exists() and f"{work.path}: unfinished work on other text" in caplog.text
    caplog.clear()
    with work_folder(tmp_path / "res", "a" * 32, "dataset", "option"), work_folder(tmp_path / "result.b", "a" * 32, "dataset", "option"):
        pass
    with work_folder(target, "b" * 32, "dataset", "option"):
        assert "result.b" not in caplog.text
    assert "will be replaced" not in caplog.text
    target.mkdir()
    with work_folder(target, "c" * 32, "dataset", "option"):
        assert "will be replaced" not in caplog.text  # An empty folder is nothing to keep
    write_manifest(target, "dataset", {})
    with work_folder(target, "c" * 32, "dataset", "option"):
        assert f"{target} is of other text or options and will be replaced" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="option=.* cannot be created: .*file. is a file"):
        with work_folder(tmp_path / "file" / "result", "key", "dataset", "option"):
            pass
