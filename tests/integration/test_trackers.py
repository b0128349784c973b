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
