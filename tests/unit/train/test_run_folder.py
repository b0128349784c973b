"What is in the folder of a run, and what happens when it cannot be written."

import io
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from accelerate import Accelerator

from langmlm import tasks
from langmlm.disk import LOCK, is_intact, read_json, read_manifest
from langmlm.folders import checkpoint_step, list_checkpoints
from langmlm.testing import tiny_run
from langmlm.train.checkpoint import TRAINER_STATE, StartingPoint
from langmlm.train.run_folder import RunFolder, check_run_folder, should_save
from langmlm.train.sharding import gather_run

FULL = OSError(28, "No space left on device")
FULL_IN_RUST = Exception("I/O error: No space left on device (os error 28)")


@pytest.fixture
def start_run(data: dict[str, Path], tmp_path: Path) -> Callable[..., tasks.MLMTask]:
    "Create a run that is not trained here: its steps are counted only."

    def create(name: str = "run", checkpoint_path: Path | None = None, **changes) -> tasks.MLMTask:
        settings = {"output_dir": tmp_path / name, **changes}
        return tiny_run(data["tokenizer"].parent, checkpoint_path=checkpoint_path, **settings)

    return create


def save(run: tasks.MLMTask, *steps: int) -> list[list[int]]:
    "Save checkpoints of some steps; the steps of the checkpoints in the folder after each."
    left = []
    for run.state.step in steps:
        run.run_folder.save(*gather_run(run.model, run.optimizer), run.state)
        left.append([checkpoint_step(path) for path in list_checkpoints(run.config.run_folder)])
    return left


def finish(run: tasks.MLMTask) -> None:
    "End the session of a run."
    run.run_folder.finish(*gather_run(run.model, run.optimizer), run.state)


def names(folder: Path) -> list[str]:
    "The entries of a folder, hidden ones included."
    return sorted(path.name for path in folder.iterdir())


# When


def test_when_to_save(start_run: Callable):
    "Every `save_steps` or after each epoch, and after the last step; or never."
    run = start_run(save_steps=5)
    plan, config, total = run.loader.plan, run.config, run.loader.plan.total_steps

    def due(**changes) -> list[int]:
        return [step for step in range(1, total + 1) if should_save(step, replace(config, **changes), plan)]

    assert total > 10 and due() == sorted({*range(5, total, 5), total})
    assert due(save_steps=1_000) == [total] and due(save_steps=1) == list(range(1, total + 1))
    assert due(save_strategy="epoch") == [plan.steps_per_epoch, 2 * plan.steps_per_epoch]
    assert due(save_strategy="no") == []


# Whose folder


def test_folder_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A folder with results is an error that says what to do; its own run may resume there."
    nothing, folder = StartingPoint(), tmp_path / "run"
    check_run_folder(folder, nothing)
    folder.mkdir()
    (folder / LOCK).touch()
    check_run_folder(folder, nothing)
    for name in (TRAINER_STATE, "log.jsonl"):  # Of a run that was killed before it had a checkpoint
        (folder / name).touch()
    check_run_folder(folder, nothing)
    (folder / "final_model").mkdir()
    with pytest.raises(FileExistsError, match="holds another run: choose another run_name or output_dir$"):
        check_run_folder(folder, nothing)
    (folder / "checkpoint-10").mkdir()
    for start in (nothing, StartingPoint("elsewhere/checkpoint-10", {}), StartingPoint(str(folder / "checkpoint-10"))):
        with pytest.raises(FileExistsError, match=f"output_dir='{folder}' holds another run: .* resume it with"):
            check_run_folder(folder, start)
    check_run_folder(folder, StartingPoint(str(folder / "checkpoint-10"), trainer_state={}))
    check_run_folder(tmp_path / "x" / ".." / "run", StartingPoint(str(folder / "checkpoint-10"), trainer_state={}))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file' is a file: name a folder"):
        check_run_folder(tmp_path / "file", nothing)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link' is a link to nothing: name a folder"):
        check_run_folder(tmp_path / "link", nothing)
    monkeypatch.setattr("os.access", lambda path, mode, effective_ids: path != tmp_path)
    with pytest.raises(PermissionError, match=f"new/run' cannot be written to: you may not create files in '{tmp_path}'"):
        check_run_folder(tmp_path / "new" / "run", nothing)


def test_lock(start_run: Callable, tmp_path: Path):
    "One run in a folder at a time; the lock ends with the session, also with a failed one."
    run = start_run()
    with run.run_folder.hold(step=0):
        assert names(tmp_path / "run") == [LOCK]
        other = start_run()
        with pytest.raises(RuntimeError, match="is in use by another run"), other.run_folder.hold(step=0):
            pass
    with pytest.raises(ZeroDivisionError), run.run_folder.hold(step=0):
        raise ZeroDivisionError
    with other.run_folder.hold(step=0):
        pass


def test_repair(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "What killed runs left is deleted or restored, with a warning, at the beginning of every session; files of others stay."
    caplog.set_level(logging.WARNING, "langmlm")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".checkpoint-5.0a1b2c3d.partial", ".final_model.4e5f6a7b.replaced", ".checkpoint-x.0a1b2c3d.partial"):
        (folder / name).mkdir()
    (folder / ".trainer_state.json.0a1b2c3d.partial").touch()
    (folder / ".notes.0a1b2c3d.partial").touch()
    run = start_run()
    with run.run_folder.hold(step=0):
        left = names(folder)
    assert left == [".checkpoint-x.0a1b2c3d.partial", LOCK, ".notes.0a1b2c3d.partial", "final_model"]
    assert len(caplog.messages) == 3 and all(message.startswith(str(folder)) for message in caplog.messages)
    parts = run.config, run.accelerator, run.tokenizer, run.loader.plan, run.run_folder.description
    second = RunFolder(*parts, StartingPoint())
    with pytest.raises(FileExistsError, match="holds another run"), second.hold(step=0):  # The restored model
        pass
    (folder / ".checkpoint-5.0a1b2c3d.partial").mkdir()
    with run.run_folder.hold(step=0):  # An interrupt during the last session may have left it
        assert ".checkpoint-5.0a1b2c3d.partial" not in names(folder)


def test_the_working_directory_changes(start_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A relative folder would be another one, and the run would be scattered over both."
    monkeypatch.chdir(tmp_path)
    run = start_run(output_dir="here", max_steps=3, save_steps=1)
    run.train(1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="working directory has changed, so output_dir is not '.*/here': change back"):
        run.train()
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.chdir(tmp_path)
    run.train()
    assert checkpoint_step(list_checkpoints(Path("here"))[-1]) == 3


def test_another_task_has_continued_the_run(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "An older task that trains on sets aside what a newer one has written meanwhile, and the log is that of its own steps."
    older = start_run(save_steps=2, max_steps=6, logging_steps=1)
    older.train(3)
    folder = older.config.run_folder
    start_run(checkpoint_path=folder, learning_rate=1e-4).train()
    weights = [read_manifest(folder / name)["digest"] for name in ("checkpoint-4", "final_model")]
    older.train()
    kept = [read_manifest(folder / f"superseded-{name}")["digest"] for name in ("checkpoint-4", "final_model")]
    assert kept == weights and "superseded" in caplog.text
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_state_of_another_tool_is_set_aside(start_run: Callable, tmp_path: Path):
    "The Trainer also writes `trainer_state.json`; a new run in that folder keeps it."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRAINER_STATE).write_text('{"global_step": 500}')
    start_run(output_dir=tmp_path / "run", max_steps=1).train()
    assert (tmp_path / "run" / f"superseded-{TRAINER_STATE}").read_text() == '{"global_step": 500}'
    assert read_json(tmp_path / "run" / TRAINER_STATE)["global_step"] == 1


def test_files_of_a_folder_that_a_resumed_run_moves_to(start_run: Callable, tmp_path: Path):
    "They are as safe as those in the folder of a new run."
    save(start_run(), 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("mine")
    start_run("other", checkpoint_path=tmp_path / "run" / "checkpoint-2", max_steps=3).train()
    assert (tmp_path / "other" / "superseded-log.jsonl").read_text() == "mine"
    start_run("other", checkpoint_path=tmp_path / "other", max_steps=4).train()
    assert len(list((tmp_path / "other").glob("superseded-*"))) == 1


def test_newer_checkpoints_are_set_aside(start_run: Callable, tmp_path: Path):
    "When a session begins, and only when it does."
    run = start_run()
    save(run, 20, 40)
    older = start_run(checkpoint_path=tmp_path / "run" / "checkpoint-20")
    assert "checkpoint-40" in names(tmp_path / "run")
    with older.run_folder.hold(step=older.state.step):
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-20"]
    assert is_intact(tmp_path / "run" / "superseded-checkpoint-40")


# Which checkpoints stay


def test_rollback_checkpoints(start_run: Callable, tmp_path: Path):
    "Those at steps that do not depend on interruptions: due ones, and those after rollbacks; others before them only."
    run = start_run(save_steps=5)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    assert [path.name for path in run.run_folder.rollback_checkpoints(run.state)] == ["checkpoint-3"]
    total = run.loader.plan.total_steps
    run.state.log_history.append({"step": 8, "rollback": {"to_step": 5}})
    for step in (5, 7, 8, 10, total):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    found = [checkpoint_step(path) for path in run.run_folder.rollback_checkpoints(run.state)]
    assert found == [3, 5, 8, 10, total]
    run.run_folder.config = replace(run.config, save_strategy="no")  # All there are come from interruptions
    found = [checkpoint_step(path) for path in run.run_folder.rollback_checkpoints(run.state)]
    assert found == [3, 5, 7, 8, 10, total]


def test_checkpoints_of_the_folder_it_came_from(start_run: Callable, tmp_path: Path):
    "A run that is resumed into another folder may use the checkpoints up to there; its own come first."
    save(start_run(save_steps=5), 5, 10, 15)
    moved = start_run("moved", checkpoint_path=tmp_path / "run" / "checkpoint-10")
    save(moved, 10, 15)
    found = [path.relative_to(tmp_path).as_posix() for path in moved.run_folder.rollback_checkpoints(moved.state)]
    assert found == ["run/checkpoint-5", "moved/checkpoint-10", "moved/checkpoint-15"]


def test_limit_and_rollbacks(start_run: Callable):
    "With `save_total_limit=1`, those that a rollback may need stay until the end, also when it is interrupted."
    run = start_run(max_steps=200, save_steps=40, save_total_limit=1, logging_steps=10)
    left = save(run, 40, 80, 90, 120, 160, 170, 180, 200)  # Interrupted at 90, 170 and 180
    assert left[-4:] == [[80, 120, 160], [80, 120, 160, 170], [80, 120, 160, 180], [200]]
    straight = start_run("straight", max_steps=200, save_steps=40, save_total_limit=1, logging_steps=10)
    assert save(straight, 40, 80, 120, 160, 200)[-2:] == [[80, 120, 160], [200]]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"save_total_limit": 1, "on_loss_spike": "ignore"}, [10]),
        ({"save_total_limit": 1, "on_loss_spike": "warn"}, [10]),
        ({"save_total_limit": 2, "on_loss_spike": "ignore"}, [7, 10]),
        ({"save_total_limit": None}, [2, 5, 7, 10]),
    ],
)
def test_limit(start_run: Callable, changes: dict, left: list[int]):
    "A run that never rolls back keeps to the limit at any time; None keeps all."
    assert save(start_run(save_steps=5, max_steps=50, **changes), 2, 5, 7, 10)[-1] == left


def test_rolled_back_twice_with_a_limit(start_run: Callable):
    "Over many steps with irregular interruptions, a checkpoint 64 or more steps old exists as soon as it can."
    run = start_run(max_steps=400, save_steps=20, save_total_limit=1, logging_steps=10)
    interrupted = [13, 37, 59, 101, 142, 187, 203, 299, 333]
    for step in sorted({*range(20, 400, 20), *interrupted}):
        (left,) = save(run, step)
        regular = [saved for saved in left if saved % 20 == 0]
        last_check = step - step % 10
        assert not regular or min(regular) <= max(20, last_check - 64)
        at_stops = {saved for saved in left if saved in interrupted and saved > min(regular, default=0)}
        assert len(left) <= 6 and step in left and len(at_stops) <= 1


# Errors while writing


def test_disk_errors(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "At every file of a checkpoint: logged with the space that is needed, nothing is left, and training may continue."
    run = start_run(save_total_limit=1, on_loss_spike="ignore")
    save(run, 5, 10)
    run.state.step = 15
    for function, error in (("write_json", FULL), ("save_file", FULL_IN_RUST), ("write_manifest", FULL)):
        caplog.clear()
        with patch(f"langmlm.train.checkpoint.{function}", side_effect=error):
            run.run_folder.save(*gather_run(run.model, run.optimizer), run.state)
        assert names(tmp_path / "run") == ["checkpoint-10", TRAINER_STATE]
        assert read_json(tmp_path / "run" / TRAINER_STATE)["global_step"] == 10
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        said = record.getMessage()
        assert record.levelno == logging.ERROR
        assert said.startswith(f"checkpoint-15 could not be saved in '{tmp_path / 'run'}': No space left on device (")
        assert "a checkpoint needs about " in said and " MB are free" in said
        with pytest.raises(
            OSError, match="checkpoint-15 could not be saved in .*the weights of step 15 are in memory only"
        ):
            with patch(f"langmlm.train.checkpoint.{function}", side_effect=error):
                finish(run)
    with patch("shutil.disk_usage", side_effect=OSError(2, "No such file or directory")):
        with patch("langmlm.train.checkpoint.save_file", side_effect=FULL_IN_RUST):
            run.run_folder.save(*gather_run(run.model, run.optimizer), run.state)
    assert "the free space is unknown: No such file or directory" in caplog.text
    finish(run)  # There is space now
    assert names(tmp_path / "run") == ["checkpoint-15", TRAINER_STATE]
    finish(run)  # And nothing is missing any more


def test_needed_space(start_run: Callable, caplog: pytest.LogCaptureFixture):
    "The space that the message names is that of weights and optimizer, up to rounding to 0.1 MB."
    run = start_run()
    run.train(stop_at_step=1)
    with patch("langmlm.train.checkpoint.write_manifest", side_effect=FULL):
        save(run, 2)
    said = next(message for message in caplog.messages if "needs about" in message)
    needed = float(said.partition("needs about ")[2].partition(" MB")[0]) * 1e6
    checkpoint = run.config.run_folder / "checkpoint-1"
    taken = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert 0.5 * taken - 1e5 < needed < 2 * taken + 1e5


def test_mistakes_are_not_disk_errors(start_run: Callable, tmp_path: Path):
    "Anything but the disk ends the run."
    run = start_run()
    save(run, 10)
    with patch("langmlm.train.checkpoint.save_file", side_effect=TypeError("a mistake")):
        with pytest.raises(TypeError, match="a mistake"):
            save(run, 15)
    assert names(tmp_path / "run") == ["checkpoint-10", TRAINER_STATE]


def test_failed_pruning(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A checkpoint that cannot be deleted does not count as one that could not be saved."
    run = start_run(save_total_limit=1, on_loss_spike="ignore")
    with patch("langmlm.train.checkpoint.remove_folder", side_effect=OSError(30, "Read-only file system")):
        assert save(run, 5, 10)[-1] == [5, 10]
    assert "could not be deleted" in caplog.text
    finish(run)
    assert save(run, 15) == [[15]]


def test_log_on_a_full_disk(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A log that cannot be written is a warning; the next one has all entries."
    run = start_run()
    (tmp_path / "run").mkdir()
    run.state.step = 15
    run.state.log_history.append({"step": 15, "loss": 6.0})
    with patch("os.fsync", side_effect=FULL):
        run.run_folder.save_log(run.state)
    assert "log.jsonl" not in names(tmp_path / "run")
    assert "log.jsonl did not get the entry of step 15: No space left on device" in caplog.messages
    run.run_folder.save_log(run.state)
    assert read_log(tmp_path / "run") == run.state.log_history
    run.state.log_history.append({"step": 20, "loss": 5.0})
    with patch("builtins.open", side_effect=lambda *given, **options: FullFile(io.open(*given, **options))):
        run.run_folder.save_log(run.state)
    assert (tmp_path / "run" / "log.jsonl").read_text().endswith('{"step": 20')
    run.state.log_history.append({"step": 25, "loss": 4.0})
    run.run_folder.save_log(run.state)
    assert read_log(tmp_path / "run") == run.state.log_history
    assert names(tmp_path / "run") == ["log.jsonl"]


def read_log(folder: Path) -> list[dict]:
    "Return the entries of a log file."
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class FullFile:
    "A file on a disk that is full after eleven more bytes."

    def __init__(self, opened):
        self.opened = opened

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.opened.close()

    def write(self, content: bytes) -> int:
        return self.opened.write(content[:11])


def test_state_and_log_of_a_finished_run_are_written_again(start_run: Callable, tmp_path: Path):
    "A full disk, or a kill after the last checkpoint, may leave those of an earlier step, or none."
    start_run(max_steps=2).train()
    (tmp_path / "run" / TRAINER_STATE).unlink()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 2, "lo')
    start_run(checkpoint_path=tmp_path / "run").train()
    saved = read_json(tmp_path / "run" / TRAINER_STATE)
    assert saved["global_step"] == 2 and read_log(tmp_path / "run") == saved["log_history"]


def test_log_is_that_of_the_checkpoint(start_run: Callable, tmp_path: Path):
    "Entries of later steps, by a session that was killed, are gone when a shorter one has saved."
    start_run(max_steps=4, logging_steps=1).train(stop_at_step=2)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    (tmp_path / "run" / "log.jsonl").write_text(before + before.replace('"step": 2', '"step": 3'))
    start_run(checkpoint_path=tmp_path / "run", logging_steps=10).train(stop_at_step=3)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2]


def test_log_is_appended(start_run: Callable, tmp_path: Path):
    "An entry adds its own bytes and rewrites nothing, however long the log is; a new session writes it anew."
    run, again = start_run(), start_run()
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "log.jsonl"
    run.state.log_history += [{"step": step, "loss": 6.0} for step in range(1, 10_001)]
    run.state.step = 10_000
    run.run_folder.save_log(run.state)
    inode, size = file.stat().st_ino, file.stat().st_size
    with patch("langmlm.train.run_folder.write_file", side_effect=AssertionError):
        for step in (10_001, 10_002):
            run.state.log_history.append({"step": step, "loss": 0.5, "note": "é"})
            run.run_folder.save_log(run.state)
    assert file.stat().st_ino == inode and 0 < file.stat().st_size - size < 200
    assert read_log(tmp_path / "run") == run.state.log_history
    with open(file, "a") as stream:
        stream.write('{"step": 3, "lo')  # Torn by a power loss
    again.state.log_history += [{"step": 5, "loss": 1.0}]
    again.run_folder.save_log(again.state)
    assert read_log(tmp_path / "run") == [{"step": 5, "loss": 1.0}]


class Recorder:
    "Stands for the Accelerator of a run with trackers."

    def __init__(self, accelerator: Accelerator, **changes):
        self.__dict__.update(changes)
        self.accelerator = accelerator

    def __getattr__(self, name: str):
        return getattr(self.accelerator, name)


def test_trackers(start_run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "They get the numbers of this step only; whatever they raise is a warning, and the log is written all the same."
    run = start_run(logging_dir=tmp_path / "logs", report_to=["tensorboard"])
    (tmp_path / "run").mkdir()
    log, tracker = Mock(), Mock()
    run.run_folder.accelerator = Recorder(run.accelerator, log=log, trackers=[tracker])
    run.state.log_history += [{"step": 10, "loss": 7.0, "eval_loss": 7.5}]
    run.state.step = 20
    run.state.log_history += [{"step": 20, "loss": 6.0}, {"step": 20, "rollback": {"to_step": 5}}]
    run.run_folder.save_log(run.state)
    log.assert_called_once_with({"loss": 6.0}, step=20)
    run.state.log_history += [{"step": 20, "eval_loss": 6.5}]
    run.run_folder.save_log(run.state)
    log.assert_called_with({"loss": 6.0, "eval_loss": 6.5}, step=20)
    log.side_effect = tracker.finish.side_effect = ConnectionError("the server is away")
    run.state.log_history += [{"step": 20, "note": 1}]
    run.run_folder.save_log(run.state)
    assert "the trackers did not get the entry of step 20: ConnectionError('the server is away')" in caplog.text
    assert read_log(tmp_path / "run") == run.state.log_history and len(run.state.log_history) == 5
    run.state.step = run.loader.plan.total_steps
    finish(run)
    tracker.finish.assert_called_once()
    assert "the trackers could not be closed: ConnectionError('the server is away')" in caplog.text
    assert (tmp_path / "run" / "final_model").is_dir()


# The end


def test_end_of_a_session(start_run: Callable, tmp_path: Path):
    "Before the last step nothing is written; after it, the final model; what fails is retried by the next session."
    run = start_run()
    save(run, 3)
    finish(run)
    assert names(tmp_path / "run") == ["checkpoint-3", TRAINER_STATE]
    last = run.loader.plan.total_steps
    with patch("langmlm.train.checkpoint.save_file", side_effect=FULL):
        save(run, last)
        with pytest.raises(OSError) as caught:
            finish(run)
    assert read_json(tmp_path / "run" / TRAINER_STATE)["global_step"] == last  # That of the final model
    folder = tmp_path / "run"
    assert str(caught.value) == (
        f"checkpoint-{last} could not be saved in {str(folder)!r}; the weights of step {last} are in final_model "
        f"(the latest checkpoint is {folder / 'checkpoint-3'}): "
        "free some space; train() called again in this process saves what is missing, and a resumed run computes it again"
    )
    shutil.rmtree(folder / "final_model")
    with patch("langmlm.train.run_folder.save_model", side_effect=FULL):
        with pytest.raises(OSError, match=r"^final_model could not be saved"):
            finish(run)
    assert is_intact(tmp_path / "run" / f"checkpoint-{last}")
    finish(run)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").exists()


def test_the_model_of_a_finished_run_stays(start_run: Callable, tmp_path: Path):
    "What was edited or added in it is neither moved nor overwritten; damaged weights are written again."
    run = start_run()
    save(run, run.loader.plan.total_steps)
    finish(run)
    model = tmp_path / "run" / "final_model"
    (model / "README.md").write_text("The card that I have written.")
    (model / "model.onnx").write_bytes(b"exported")
    again = start_run(checkpoint_path=tmp_path / "run")
    finish(again)
    assert (model / "README.md").read_text() == "The card that I have written." and (model / "model.onnx").exists()
    assert not list(model.parent.glob("superseded*"))
    (model / "model.safetensors").write_bytes(b"damaged")
    finish(again)
    assert is_intact(model) and (model.parent / "superseded-final_model" / "model.onnx").exists()


def test_checkpoint_of_an_interrupted_step(start_run: Callable, tmp_path: Path):
    "A session that was interrupted after a step, before its checkpoint, is completed by the next one, without any step."
    run = start_run(save_steps=1_000)
    last = run.loader.plan.total_steps
    for step in (7, last):
        run.state.step = step - 1
        run.state.add(torch.tensor([70.0, 10.0, 1.0]))
        run.train(stop_at_step=step)
        assert is_intact(tmp_path / "run" / f"checkpoint-{step}") and run.state.unlogged[-1][0] == step
    assert (tmp_path / "run" / "final_model").is_dir()


def test_nothing_was_ever_saved(start_run: Callable):
    "The message does not name a checkpoint that does not exist."
    run = start_run()
    run.state.step = run.loader.plan.total_steps
    assert run.run_folder.describe_latest() == "there is no checkpoint"
    with (
        patch("langmlm.train.run_folder.save_checkpoint", side_effect=FULL),
        patch("langmlm.train.run_folder.save_model", side_effect=FULL),
    ):
        save(run, run.state.step)
        message = rf"checkpoint-{run.state.step} and final_model could not be saved .*\(there is no checkpoint\)"
        with pytest.raises(OSError, match=message):
            finish(run)
    assert not (run.run_folder.path / TRAINER_STATE).exists()  # It would be of weights that are nowhere


def test_other_processes(start_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Only the main process writes; the others learn whether it worked."
    run, error = start_run(), []
    run.run_folder.accelerator = Recorder(run.accelerator, is_main_process=False)
    monkeypatch.setattr("langmlm.train.launch.process_rank", lambda: (1, 2))
    others = lambda own: [("process 0 on a", error[0] if error else None, {}), *own]  # noqa: E731
    monkeypatch.setattr("langmlm.train.launch.gather_object", others)
    with run.run_folder.hold(step=0):
        save(run, 5)
        run.run_folder.save_log(run.state)
    assert not (tmp_path / "run").exists()
    with patch("langmlm.train.run_folder.broadcast_object_list", return_value=[False]):  # The disk is full
        save(run, 10)
        with pytest.raises(OSError, match="checkpoint-10 could not be saved"):
            finish(run)
    error.append("process 0 on a failed: TypeError: not JSON")
    with pytest.raises(RuntimeError, match="process 0 on a failed: TypeError"):
        save(run, 15)
    with pytest.raises(RuntimeError, match="process 0 on a failed: TypeError"):
        with run.run_folder.hold(step=0):
            pass


def test_precision(start_run: Callable):
    "As Accelerate names it."
    assert start_run().run_folder.precision == "no" and start_run("bf16", bf16=True).run_folder.precision == "bf16"
