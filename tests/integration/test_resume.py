"A run that is interrupted anywhere and resumed ends with the weights and the log of an uninterrupted one."

from pathlib import Path

import pytest
from helpers import same_weights

from langmlm.train.optim import learning_rate_at

LARGER = {"per_device_train_batch_size": 12}  # Epochs of 5 steps: neither logging nor saves fall on their ends
SCHEDULES = {  # Which data, masks, learning rates, saves and log entries a step has, depends on its number
    "steps": {},
    "epochs": {"save_strategy": "epoch", "lr_scheduler_type": "warmup_stable_decay"},
    "max steps": {"max_steps": 11, "lr_scheduler_type": "cosine"},
    "rows": {"packing": False, "whole_word_masking": True},
}
OPTIMIZERS = {  # What they keep is the same at all steps but the first
    "bf16": {"bf16": True, "gradient_checkpointing": True},
    "muon": {"optim": "muon"},
    "muon in bf16": {"optim": "muon", "bf16": True},
}
VARIANTS = SCHEDULES | OPTIMIZERS


def losses(task) -> list[tuple]:
    "The log of a run, without timings."
    return [
        tuple(entry[name] for name in ("step", "epoch", "loss", "learning_rate", "grad_norm"))
        for entry in task.state.log_history
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_at_every_step(create, resume, tmp_path: Path, variant: str):
    "The run is interrupted after each of its steps in turn; with other optimizers, at the first, a save, and the last."
    settings = LARGER | VARIANTS[variant]
    straight = create(tmp_path / "straight", **settings)
    straight.train()
    last = straight.loader.plan.total_steps - 1
    assert len(losses(straight)) > 3 and losses(straight)[-1][0] == last + 1
    for step in range(1, last + 1) if variant in SCHEDULES else (1, 4, last):
        folder = tmp_path / f"stopped-{step}"
        create(folder, **settings).train(stop_at_step=step)
        resumed = resume(folder)
        assert resumed.state.step == step
        resumed.train()
        assert same_weights(resumed, straight), f"interrupted at step {step}"
        assert losses(resumed) == losses(straight)


def test_many_sessions(create, resume, tmp_path: Path):
    "A run in sessions of three steps, each resumed from the folder of the run."
    straight = create(tmp_path / "straight")
    straight.train()
    create(tmp_path / "sessions").train(stop_at_step=3)
    while (task := resume(tmp_path / "sessions")).state.step < straight.loader.plan.total_steps:
        task.train(stop_at_step=task.state.step + 3)
    assert same_weights(task, straight)
    assert losses(task) == losses(straight)


def test_resuming_an_older_checkpoint(create, resume, tmp_path: Path):
    "Newer checkpoints are renamed, and the end is the same."
    straight = create(tmp_path / "run")
    straight.train()
    older = resume(tmp_path / "run" / "checkpoint-4")
    older.train()
    assert same_weights(older, straight)
    assert (tmp_path / "run" / "superseded-checkpoint-8").is_dir()


def test_moved_and_longer(create, resume, tmp_path: Path):
    "The folder of a finished run is moved, and the run is extended by an epoch."
    create(tmp_path / "run").train()
    (tmp_path / "run").rename(tmp_path / "moved")
    finished = resume(tmp_path / "moved")
    assert finished.state.step == finished.loader.plan.total_steps
    longer = resume(tmp_path / "moved", num_train_epochs=3, output_dir=tmp_path / "longer")
    before = len(losses(longer))
    longer.train()
    assert len(losses(longer)) > before and (tmp_path / "longer" / "final_model").is_dir()


def test_longer_from_the_stable_phase(create, resume, tmp_path: Path):
    "A run that is made longer before its learning rate decays equals one that was planned so."
    stable = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "decay_ratio": 0.5}
    planned = create(tmp_path / "planned", **stable, num_train_epochs=3)
    planned.train()
    create(tmp_path / "run", **stable).train()
    longer = resume(tmp_path / "run" / "checkpoint-4", num_train_epochs=3)
    longer.train()
    assert same_weights(longer, planned) and losses(longer) == losses(planned)
    total, peak = planned.loader.plan.total_steps, planned.config.peak_learning_rate(planned.loader.plan.packing_ratio)
    for step, _, _, rate, _ in losses(planned):
        assert rate == learning_rate_at(step - 1, total, 2, peak, "warmup_stable_decay", 0.5)
    decayed = resume(tmp_path / "run" / "superseded-checkpoint-12", num_train_epochs=3, output_dir=tmp_path / "decayed")
    decayed.train()
    assert not same_weights(decayed, planned)
