"`tiny_run` gives a run in one line."

from pathlib import Path

from langmlm import tasks
from langmlm.disk import MANIFEST, is_intact
from langmlm.testing import tiny_run


def test_tiny_run(tmp_path: Path):
    "It trains; tokenizer and dataset are made once; options override those of the fixture."
    run = tiny_run(tmp_path, documents=60, tokenizer_config={"vocab_size": 300}, max_steps=12, logging_steps=4)
    assert isinstance(run, tasks.MLMTask) and run.state.step == 0
    assert run.model.config.vocab_size == len(run.tokenizer) == 300 and run.dataset.max_length == 32
    assert is_intact(tmp_path / "tokenizer") and run.config.run_folder == tmp_path / "run"
    made = [(tmp_path / folder / MANIFEST).stat().st_mtime_ns for folder in ("tokenizer", "dataset")]
    assert [entry["step"] for entry in run.train().log_history] == [4, 8, 12]
    other = tiny_run(
        tmp_path, documents=90, model_config={"hidden_size": 48}, output_dir=tmp_path / "other", save_steps=3
    )
    assert other.model.config.hidden_size == 48 and other.model.config.num_hidden_layers == 1
    assert (other.config.run_folder, other.config.save_steps) == (tmp_path / "other", 3)
    assert [(tmp_path / folder / MANIFEST).stat().st_mtime_ns for folder in ("tokenizer", "dataset")] == made
    resumed = tiny_run(tmp_path, checkpoint_path=tmp_path / "run", max_steps=14)
    assert (resumed.state.step, resumed.config.logging_steps, resumed.loader.plan.total_steps) == (12, 4, 14)


def test_the_same_run_twice(tmp_path: Path):
    "Everything is seeded."
    histories = []
    for name in ("one", "two"):
        log = tiny_run(tmp_path / name, documents=60, max_steps=6, logging_steps=2).train().log_history
        histories.append([(entry["loss"], entry["grad_norm"]) for entry in log])
    assert histories[0] == histories[1] and len(histories[0]) == 3
