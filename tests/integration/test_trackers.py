"What a run logs reaches the trackers of Accelerate, and can be read back from their files."

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard(create, tmp_path: Path):
    "Every entry of the log is in TensorBoard's files, in `logging_dir`."
    task = create(tmp_path / "run", report_to=["tensorboard"], logging_dir=tmp_path / "logs", max_steps=9)
    history = task.train()
    (folder,) = {file.parent for file in (tmp_path / "logs").rglob("events.*") if file.parent.name == "langmlm"}
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [
        (entry["step"], round(entry["loss"], 4)) for entry in history.log_history
    ]


def test_filled_masks_are_text(create, tmp_path: Path):
    "Filled masks are texts in TensorBoard, with `<mask>` in them; the unigram entropy is a line beside the loss."
    settings = {"report_to": ["tensorboard"], "logging_dir": tmp_path / "logs", "max_steps": 4, "eval_steps": 2}
    task = create(tmp_path / "run", probe_sentences=["Return the <mask> of the file."], **settings)
    history = task.train()
    (folder,) = {file.parent for file in (tmp_path / "logs").rglob("events.*") if file.parent.name == "langmlm"}
    events = EventAccumulator(str(folder)).Reload()
    found = events.Tensors("filled_masks/text_summary")
    assert [event.step for event in found] == [2, 4]
    (text,) = found[-1].tensor_proto.string_val
    (predictions,) = history.log_history[-1]["filled_masks"][0]["predictions"]
    assert text.decode().startswith(f"    Return the <mask> of the file. -> {predictions[0][0]!r} ")
    assert {round(event.value, 4) for event in events.Scalars("unigram_entropy")} == {round(history.unigram_entropy, 4)}


SENTENCE = "Return the <mask> of the file."


@pytest.fixture
def train(create: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    "Train a short run in an empty working directory, without network: `train(tracker)` returns its log."
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    local = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": "trackio"}
    local |= {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in local.items():
        monkeypatch.setenv(name, value)

    def train_run(tracker: str) -> list[dict]:
        settings = {"run_name": "first", "max_steps": 6, "eval_steps": 6, "probe_sentences": [SENTENCE]}
        return create(tmp_path / "run", report_to=[tracker], **settings).train().log_history

    return train_run


def losses(log_history: list[dict]) -> list[tuple[int, float]]:
    "Steps and losses in a log."
    return [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]


def test_trackio(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A local database has the name of the run, its losses, its options and the filled masks."
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    log = train("trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert {name for name, _, _ in found} == {"first"}
    assert [(step, metrics["loss"]) for _, step, metrics in found if "loss" in metrics] == losses(log)
    assert [step for _, step, metrics in found if SENTENCE in metrics.get("filled_masks", "")] == [6]
    assert json.loads(config)["learning_rate"] == 2e-3


def test_mlflow(train: Callable):
    "A local store has the name of the run, its losses and its options."
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    log = train("mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == losses(log)
    assert run.data.params["learning_rate"] == "0.002"


def test_wandb_offline(train: Callable, tmp_path: Path):
    "Without network, a file that `wandb sync` uploads later has the losses and the filled masks."
    pytest.importorskip("wandb", reason="wandb is not installed")
    log = train("wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for step, loss in losses(log):
        assert repr(loss).encode() in content, step
    assert SENTENCE.encode() in content.replace(b"\\u003c", b"<").replace(b"\\u003e", b">") and b"first" in content


def test_no_text_of_the_corpus(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Trackers get the user's sentences, not the held-out ones; the log of the run has both."
    from langmlm.testing import tiny_run

    settings = {"max_steps": 4, "eval_steps": 4, "probe_sentences": [SENTENCE], "logging_dir": tmp_path / "logs"}
    split = {"validation_fraction": 0.2}
    log = tiny_run(tmp_path, tokenizer_config=split, report_to=["tensorboard"], **settings).train().log_history
    held_out = [entry["sentence"] for entry in log[-1]["filled_masks"] if "held_out" in entry]
    content = b"".join(path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert SENTENCE.encode() in content and held_out and not any(text[:20].encode() in content for text in held_out)


def test_the_log_is_a_table(create: Callable, tmp_path: Path):
    "No tracker is needed for a CSV file: `log.jsonl` is a table for pandas."
    import pandas as pd

    history = create(tmp_path / "run", max_steps=6).train()
    table = pd.read_json(tmp_path / "run" / "log.jsonl", lines=True)
    table.to_csv(tmp_path / "log.csv", index=False)
    again = pd.read_csv(tmp_path / "log.csv")
    assert [*zip(again["step"], again["loss"].round(6))] == [(step, round(loss, 6)) for step, loss in losses(history.log_history)]
