"What a run logs reaches the trackers of Accelerate."

from pathlib import Path

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
