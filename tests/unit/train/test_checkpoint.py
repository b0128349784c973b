"Checkpoints are complete, every damage is noticed, nothing is read through pickle, and a path says where a run starts."

import ast
import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import same_weights
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, ElectraConfig, ElectraForMaskedLM, RobertaForMaskedLM

import langmlm
from langmlm import tasks
from langmlm.disk import MANIFEST, find_damage, hash_json, is_intact, read_json, read_manifest, remove_folder
from langmlm.disk import write_json, write_manifest
from langmlm.folders import checkpoint_step, describe_folder, find_model, list_checkpoints
from langmlm.model.roberta import build_model
from langmlm.testing import tiny_run
from langmlm.train import optim as train_optim
from langmlm.train.checkpoint import (
    TRAINER_STATE,
    StartingPoint,
    find_starting_point,
    load_model,
    load_optimizer,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_model,
    set_aside_newer,
)
from langmlm.train.sharding import gather_run

OPTIMIZER = "optimizer.safetensors"
PACKAGE = Path(langmlm.__file__).parent
MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "merges.txt",
    "vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def run(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tasks.MLMTask:
    "A finished run with checkpoints of three steps."
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    run = tiny_run(data["tokenizer"].parent, output_dir=folder, max_steps=9, save_steps=3, logging_steps=3)
    run.train()
    return run


@pytest.fixture
def folder(run: tasks.MLMTask, tmp_path: Path) -> Path:
    "A copy of the folder of that run."
    shutil.copytree(run.config.run_folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    "A checkpoint in that copy."
    return folder / "checkpoint-6"


def names(folder: Path) -> list[str]:
    "The folders in a folder."
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def new_model(run: tasks.MLMTask, seed: int) -> RobertaForMaskedLM:
    "A model like that of a run, with stock attention and random weights."
    return build_model(AutoConfig.from_pretrained(run.config.run_folder / "final_model"), seed)


def make_optimizer(model: torch.nn.Module, fused: bool = True) -> torch.optim.AdamW:
    "An optimizer for a model."
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def do_step(run: tasks.MLMTask, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    "Do a step without dropout."
    model.eval()
    ids = torch.as_tensor(run.dataset[0].astype("int64"))[None]
    model(input_ids=ids).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_step(
    run: tasks.MLMTask, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int = 1
) -> Path:
    "Save a model and its optimizer as a checkpoint."
    state = gather_run(model, optimizer)[1]
    return save_checkpoint(folder, model, run.tokenizer, state, {"global_step": step, "log_history": []})


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    "Whether two dicts of tensors have the same names and values, to the bit."
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


# The optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_state(run: tasks.MLMTask, tmp_path: Path, fused: bool):
    "Saved by the names of parameters; a restored optimizer continues like the saved one, fused or not, to the bit."
    stock, other = new_model(run, seed=1), new_model(run, seed=7)
    optimizer, successor = make_optimizer(stock, fused), make_optimizer(other, fused)
    assert load_file(save_step(run, tmp_path / "new", stock, optimizer) / OPTIMIZER) == {}
    do_step(run, stock, optimizer)
    do_step(run, other, successor)  # Its own state is replaced
    other.load_state_dict(stock.state_dict())
    saved = save_step(run, tmp_path / "saved", stock, optimizer)
    tensors = load_file(saved / OPTIMIZER)
    assert "lm_head.bias:exp_avg" in tensors and "lm_head.bias:step" in tensors
    load_optimizer(saved, successor, other)
    do_step(run, stock, optimizer)
    do_step(run, other, successor)
    assert same_weights(stock, other)
    continued = load_file(save_step(run, tmp_path / "continued", stock, optimizer) / OPTIMIZER)
    restored = load_file(save_step(run, tmp_path / "restored", other, successor) / OPTIMIZER)
    assert restored.keys() == tensors.keys() and same_tensors(continued, restored)


def test_restored_optimizer_is_a_copy(run: tasks.MLMTask, tmp_path: Path):
    "Steps after it change neither the tensors that were restored nor their file, and the file does not change it."
    stock = new_model(run, seed=1)
    optimizer = make_optimizer(stock)
    do_step(run, stock, optimizer)
    saved = save_step(run, tmp_path, stock, optimizer)
    content, tensors = (saved / OPTIMIZER).read_bytes(), load_file(saved / OPTIMIZER)
    before = {key: value.clone() for key, value in tensors.items()}
    with patch("langmlm.train.checkpoint.load_file", return_value=tensors):
        load_optimizer(saved, optimizer, stock)
    do_step(run, stock, optimizer)
    assert same_tensors(tensors, before)
    load_optimizer(saved, optimizer, stock)
    do_step(run, stock, optimizer)
    assert (saved / OPTIMIZER).read_bytes() == content
    load_optimizer(saved, optimizer, stock)
    with open(saved / OPTIMIZER, "r+b") as stream:
        stream.write(bytes(len(content)))
    assert same_tensors(load_file(save_step(run, tmp_path, stock, optimizer, step=2) / OPTIMIZER), before)


def test_optimizer_state_of_another_model(run: tasks.MLMTask, tmp_path: Path):
    "Names and shapes must fit; the error names the parameters, and the present state stays."
    stock = new_model(run, seed=1)
    optimizer = make_optimizer(stock)
    do_step(run, stock, optimizer)
    saved = save_step(run, tmp_path, stock, optimizer)
    before = load_file(saved / OPTIMIZER)
    wrong = {
        "lm_head.extra:step": torch.ones(1),
        "lm_head.bias:exp_avg": torch.ones(3),
        "lm_head.bias:step": torch.ones(()),
    }
    renamed = {key.replace("lm_head.bias:", "lm_head.extra:"): value for key, value in before.items()}
    contents = [({key: wrong[key]}, key.partition(":")[0]) for key in list(wrong)[:2]]
    contents += [(before | {key: wrong[key]}, name) for (_, name), key in zip(contents, wrong)]
    contents += [(renamed, "lm_head.extra"), (wrong, "lm_head.bias, lm_head.extra")]
    assert renamed.keys() != before.keys() and len(contents) == 6
    for tensors, parameters in contents:
        (saved / OPTIMIZER).unlink()  # What was loaded is mapped from it
        save_file(tensors, saved / OPTIMIZER)
        with pytest.raises(ValueError, match=f"does not fit the model's parameters {parameters}$"):
            load_optimizer(saved, optimizer, stock)
    assert same_tensors(load_file(save_step(run, tmp_path, stock, optimizer, step=2) / OPTIMIZER), before)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_incomplete_optimizer_state(run: tasks.MLMTask, tmp_path: Path, optim: str):
    "A tensor that is missing, whichever, is an error that names its parameter; a state before the first step is none."
    stock = new_model(run, seed=1)
    optimizer = train_optim.make_optimizer(stock, optim)
    load_optimizer(save_step(run, tmp_path / "new", stock, optimizer), optimizer, stock)
    do_step(run, stock, optimizer)
    saved = save_step(run, tmp_path, stock, optimizer)
    complete = load_file(saved / OPTIMIZER)
    load_optimizer(saved, optimizer, stock)
    for missing in [[key] for key in complete] + [[key for key in complete if key.startswith("lm_head.bias:")]]:
        (saved / OPTIMIZER).unlink()  # What was loaded is mapped from it
        save_file({key: value for key, value in complete.items() if key not in missing}, saved / OPTIMIZER)
        with pytest.raises(ValueError, match=f"no or not all tensors of {missing[0].partition(':')[0]}$"):
            load_optimizer(saved, optimizer, stock)
    assert same_tensors(load_file(save_step(run, tmp_path, stock, optimizer, step=2) / OPTIMIZER), complete)


# Saving


def test_files_in_the_final_model(run: tasks.MLMTask, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A folder into which the user has put files is renamed, not replaced."
    for text in ("mine", "mine too"):
        save_model(tmp_path / "final_model", run.model, run.tokenizer)
        (tmp_path / "final_model" / "README.md").write_text(text)
    save_model(tmp_path / "final_model", run.model, run.tokenizer)
    save_model(tmp_path / "final_model", run.model, run.tokenizer)
    assert names(tmp_path) == ["final_model", "superseded-final_model", "superseded-final_model-2"]
    assert not (tmp_path / "final_model" / "README.md").exists()
    assert (tmp_path / "superseded-final_model" / "README.md").read_text() == "mine"
    assert (tmp_path / "superseded-final_model-2" / "README.md").read_text() == "mine too"
    assert "it is now named superseded-final_model" in caplog.text


def test_files(run: tasks.MLMTask, checkpoint: Path):
    "A model that stock `transformers` loads, its tokenizer, the optimizer, the state, and a manifest of all files."
    found = sorted(path.name for path in checkpoint.iterdir())
    assert set(found) == {*MODEL_FILES, OPTIMIZER, TRAINER_STATE, MANIFEST}
    assert {MANIFEST, *read_json(checkpoint / MANIFEST)["files"]} == set(found) and find_damage(checkpoint) == []
    assert read_json(checkpoint / MANIFEST)["kind"] == "checkpoint"
    assert read_json(checkpoint / TRAINER_STATE)["global_step"] == 6 == checkpoint_step(checkpoint)
    final = run.config.run_folder / "final_model"
    assert not {OPTIMIZER, TRAINER_STATE} & {path.name for path in final.iterdir()}
    for saved in (final, run.config.run_folder / "checkpoint-9"):
        assert same_weights(RobertaForMaskedLM.from_pretrained(saved), run.model)
        assert same_weights(load_model(saved), run.model)
        assert AutoTokenizer.from_pretrained(saved)("Return a list.") == run.tokenizer("Return a list.")
        assert not any("gamma" in name or "beta" in name for name in load_file(saved / "model.safetensors"))


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("write_json", OSError(28, "No space left on device")),
        ("save_file", Exception("I/O error: No space left on device (os error 28)")),
        ("write_manifest", KeyboardInterrupt()),
        ("write_tokenizer_files", MemoryError()),
    ],
)
def test_failed_saves_leave_nothing(run: tasks.MLMTask, folder: Path, function: str, error: BaseException):
    "Neither a new checkpoint nor a part of it; an older one of the same step stays."
    before = sorted(path.name for path in folder.iterdir())
    for step in (6, 40):
        state = gather_run(run.model, run.optimizer)[1]
        parts = folder, run.model, run.tokenizer, state, {"global_step": step, "log_history": []}
        with patch(f"langmlm.train.checkpoint.{function}", side_effect=error), pytest.raises(type(error)):
            save_checkpoint(*parts)
        assert sorted(path.name for path in folder.iterdir()) == before and is_intact(folder / "checkpoint-6")
    with pytest.raises(TypeError, match="not JSON"):
        save_checkpoint(*parts[:-1], {"global_step": 40, "wrong": object()})
    assert sorted(path.name for path in folder.iterdir()) == before
    assert save_checkpoint(*parts) == folder / "checkpoint-40" and is_intact(folder / "checkpoint-40")


def test_progress_bars_of_transformers(run: tasks.MLMTask, tmp_path: Path):
    "They are hidden while a model is saved or loaded, and as they were afterwards, whatever happens."
    from transformers.utils import logging as transformers_logging

    shown_before = transformers_logging.is_progress_bar_enabled()
    try:
        for enable, shown in (
            (transformers_logging.enable_progress_bar, True),
            (transformers_logging.disable_progress_bar, False),
        ):
            enable()
            save_model(tmp_path / "model", run.model, run.tokenizer)
            load_model(tmp_path / "model")
            (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
            with pytest.raises(ValueError):
                load_model(tmp_path / "model")
            assert transformers_logging.is_progress_bar_enabled() is shown
    finally:
        (transformers_logging.enable_progress_bar if shown_before else transformers_logging.disable_progress_bar)()


# Listing, pruning, setting aside


def test_list(folder: Path, tmp_path: Path):
    "By step, not by name; damaged ones too, other things not."
    for name in (
        "checkpoint-10",
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-3-old",
        "superseded-checkpoint-3",
        "other-5",
    ):
        (folder / name).mkdir()
    (folder / "checkpoint-11").touch()
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}" for step in (3, 6, 9, 10)]
    assert list_checkpoints(tmp_path / "missing") == []


def test_prune(folder: Path):
    "The newest intact ones stay; damaged ones neither count nor go; those that are needed stay beyond the limit."
    prune_checkpoints(folder, save_total_limit=3)
    assert names(folder) == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "final_model"]
    (folder / "checkpoint-9" / OPTIMIZER).unlink()
    prune_checkpoints(folder, save_total_limit=1, keep=[3])
    assert names(folder) == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "final_model"]
    prune_checkpoints(folder, save_total_limit=1, keep=[6])
    assert names(folder) == ["checkpoint-6", "checkpoint-9", "final_model"]
    assert not [path for path in folder.iterdir() if path.name.endswith(".outdated")]


def test_prune_that_fails(folder: Path, caplog: pytest.LogCaptureFixture):
    "The new checkpoint is safe, so a warning is enough; the next time it is tried again."
    caplog.set_level(logging.WARNING, "langmlm")
    with patch("langmlm.train.checkpoint.remove_folder", side_effect=OSError(30, "Read-only file system")):
        prune_checkpoints(folder, save_total_limit=1)
    (message,) = caplog.messages
    assert "could not be deleted" in message and "Read-only file system" in message and str(folder) in message
    prune_checkpoints(folder, save_total_limit=1)
    assert names(folder) == ["checkpoint-9", "final_model"]


def test_pruning_goes_on_after_a_failure(folder: Path, caplog: pytest.LogCaptureFixture):
    "A checkpoint that cannot be deleted does not keep the others."
    remove = lambda path: remove_folder(path) if path.name != "checkpoint-3" else os.stat("/dev/null/no")  # noqa: E731
    with patch("langmlm.train.checkpoint.remove_folder", remove):
        prune_checkpoints(folder, save_total_limit=1)
    assert names(folder) == ["checkpoint-3", "checkpoint-9", "final_model"]
    assert "could not be deleted: checkpoint-3 ([Errno 20] Not a directory" in caplog.text


def test_files_of_the_user_are_not_pruned(folder: Path, caplog: pytest.LogCaptureFixture):
    "A checkpoint that holds anything else stays whole, also when the extra file does not make it a damaged one."
    (folder / "checkpoint-3" / "notes.txt").write_text("the best one")
    with patch("langmlm.train.checkpoint.is_intact", return_value=True):
        prune_checkpoints(folder, save_total_limit=1)
    assert names(folder) == ["checkpoint-3", "checkpoint-9", "final_model"]
    assert (folder / "checkpoint-3" / "notes.txt").read_text() == "the best one"
    assert "checkpoint-3 is not deleted" in caplog.text and "notes.txt" in caplog.text


def test_superseded_checkpoints_are_bounded(run: tasks.MLMTask, folder: Path):
    "As many as the limit stay, the latest written ones; none goes before the run has come as far again."
    for number in range(1, 5):
        set_aside_newer(folder, step=6)
        again = "" if number == 1 else f"-{number}"
        os.utime(folder / f"superseded-checkpoint-9{again}" / MANIFEST, (number, number))
        shutil.copytree(run.config.run_folder / "checkpoint-9", folder / "checkpoint-9")
    shutil.rmtree(folder / "checkpoint-9")
    every = [f"superseded-checkpoint-9{again}" for again in ("", "-2", "-3", "-4")]
    prune_checkpoints(folder, save_total_limit=2)
    final = "superseded-final_model"
    assert names(folder) == ["checkpoint-3", "checkpoint-6", *every, final]
    shutil.copytree(run.config.run_folder / "checkpoint-9", folder / "checkpoint-9")
    (folder / every[0] / "config.json").unlink()  # Damaged: it neither counts nor goes
    (folder / "superseded-checkpoint-6x").mkdir()
    prune_checkpoints(folder, save_total_limit=2)
    kept = [every[0], *every[2:], "superseded-checkpoint-6x"]
    assert names(folder) == ["checkpoint-6", "checkpoint-9", *sorted(kept), final]


def test_latest_superseded_checkpoints_stay(run: tasks.MLMTask, folder: Path):
    "The latest written one stays if it is of an earlier step than the others."
    for number, step in enumerate((9, 3)):
        shutil.move(folder / f"checkpoint-{step}", folder / f"superseded-checkpoint-{step}")
        os.utime(folder / f"superseded-checkpoint-{step}" / MANIFEST, (number, number))
    prune_checkpoints(folder, save_total_limit=1)  # Step 6 is reached
    assert names(folder) == ["checkpoint-6", "final_model", "superseded-checkpoint-3", "superseded-checkpoint-9"]
    shutil.copytree(run.config.run_folder / "checkpoint-9", folder / "checkpoint-9")
    prune_checkpoints(folder, save_total_limit=1)
    assert names(folder) == ["checkpoint-9", "final_model", "superseded-checkpoint-3"]


def test_newest(folder: Path, caplog: pytest.LogCaptureFixture):
    "Damaged ones are skipped, with a warning that names the damage."
    caplog.set_level(logging.WARNING, "langmlm")
    assert newest_checkpoint(folder).name == "checkpoint-9" and caplog.messages == []
    (folder / "checkpoint-9" / OPTIMIZER).write_bytes((folder / "checkpoint-9" / OPTIMIZER).read_bytes()[:1_000])
    assert newest_checkpoint(folder).name == "checkpoint-6"
    assert "checkpoint-9, which is damaged: optimizer.safetensors has 1,000 bytes instead of " in caplog.text
    for step in (3, 6):
        (folder / f"checkpoint-{step}" / MANIFEST).unlink()
    for path in (folder, folder / "final_model"):
        with pytest.raises(ValueError, match="has no intact checkpoint of langmlm"):
            newest_checkpoint(path)


def test_what_may_not_be_read_is_not_damaged(folder: Path):
    "An older checkpoint in its place would lose steps without a word."
    weights = folder / "checkpoint-9" / "model.safetensors"
    for hidden in (weights, weights.parent):
        with patch("os.access", lambda path, mode: path != hidden):  # Root may read everything
            with pytest.raises(PermissionError, match=f"{hidden} cannot be read by this user: change its permissions"):
                find_starting_point(folder)


def test_others_may_read_as_the_umask_says(run: tasks.MLMTask, tmp_path: Path):
    "safetensors writes files for their owner only."
    for mask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            save_model(tmp_path / f"model-{mask}", run.model, run.tokenizer)
        finally:
            os.umask(before)
        files = [path for path in (tmp_path / f"model-{mask}").iterdir()]
        assert len(files) > 4 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_permissions_that_cannot_be_set(run: tasks.MLMTask, tmp_path: Path):
    "Some file systems have none: the model is saved all the same."
    with patch("os.chmod", side_effect=PermissionError("Operation not permitted")):
        save_model(tmp_path / "model", run.model, run.tokenizer)
    assert is_intact(tmp_path / "model")


def test_dangling_links_are_damage(folder: Path):
    "Not a matter of permissions."
    weights = folder / "checkpoint-9" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("gone")
    assert find_starting_point(folder).trainer_state["global_step"] == 6


def test_another_branch_of_a_run(folder: Path):
    "A run that continues from an earlier step sets its final model aside, too."
    shutil.copytree(folder / "checkpoint-9", folder / "checkpoint-12")
    assert Path(find_starting_point(folder, "weights").weights).name == "checkpoint-12"
    shutil.rmtree(folder / "checkpoint-12")
    set_aside_newer(folder, 9)
    assert (folder / "final_model").is_dir()
    set_aside_newer(folder, 6)
    assert not (folder / "final_model").exists() and is_intact(folder / "superseded-final_model")
    assert find_model(str(folder)) == str(folder / "checkpoint-6") == find_starting_point(folder, "weights").weights


def test_set_aside(run: tasks.MLMTask, folder: Path, caplog: pytest.LogCaptureFixture):
    "Later checkpoints get another name, and what was set aside before stays."
    caplog.set_level(logging.WARNING, "langmlm")
    set_aside_newer(folder, step=9)
    assert caplog.messages == []
    for number in range(3):
        set_aside_newer(folder, step=6)
        assert newest_checkpoint(folder).name == "checkpoint-6"
        if number < 2:
            shutil.copytree(run.config.run_folder / "checkpoint-9", folder / "checkpoint-9")
    aside = [f"superseded-checkpoint-9{again}" for again in ("", "-2", "-3")]
    assert names(folder) == ["checkpoint-3", "checkpoint-6", *aside, "superseded-final_model"]
    assert all(is_intact(folder / name) for name in aside)
    assert caplog.messages[0] == "checkpoint-9 is newer than step 6: renamed to superseded-checkpoint-9"


# Damage


def all_damages(content: bytes) -> list[bytes | None]:
    "Flips of single bits, truncations, an addition, and no file at all (None)."
    places = (0, 8, len(content) // 3, len(content) // 2, len(content) - 1)
    flips = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    return [*flips, content[: len(content) // 2], content[:-1], b"", content + b"\0", None]


def test_every_damage_of_every_file_is_noticed(folder: Path, checkpoint: Path):
    "The first sentence names the file; the checkpoint cannot be used, and its run falls back to an older one."
    shutil.rmtree(folder / "checkpoint-9")
    files, moment = sorted(checkpoint.iterdir()), 10**18
    assert len(files) >= 6
    for file in files:
        content = file.read_bytes()
        for damaged in all_damages(content):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            if damaged is not None:
                os.utime(file, ns=(moment := moment + 10**9, moment))  # Some kernels have coarse clocks
            assert file.name in find_damage(checkpoint)[0]
            with pytest.raises(ValueError, match=f"is damaged: .*{file.name}.* Name the folder of its run"):
                find_starting_point(checkpoint)
            assert Path(find_starting_point(folder).weights).name == "checkpoint-3"
        file.write_bytes(content)
        os.utime(file, ns=(moment := moment + 10**9, moment))
    assert find_damage(checkpoint) == [] and Path(find_starting_point(folder).weights) == checkpoint


def test_extra_files(checkpoint: Path, caplog: pytest.LogCaptureFixture):
    "A note or weights in another format are named in a warning, and the checkpoint is resumed."
    caplog.set_level(logging.WARNING, "langmlm")
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert find_damage(checkpoint) == []
    assert find_starting_point(checkpoint).trainer_state["global_step"] == 6
    assert "contains files that are not part of the checkpoint: pytorch_model.bin" in caplog.text


# Loading


def test_models_that_cannot_be_loaded(run: tasks.MLMTask, folder: Path, tmp_path: Path):
    "No model, another architecture, and weights that are none; the error names the path."
    for path in (folder / "checkpoint-10", tmp_path):
        with pytest.raises(
            ValueError, match=f"checkpoint_path='{path}' is neither a model folder nor a model on the Hub"
        ):
            load_model(path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ElectraForMaskedLM(ElectraConfig(vocab_size=50, **small)).save_pretrained(tmp_path / "electra")
    with pytest.raises(ValueError, match="electra' has model_type='electra'; only encoders of the types bert, "):
        load_model(tmp_path / "electra")
    final = folder / "final_model"
    for content in (b"", b"torn", (final / "model.safetensors").read_bytes()[:-10]):
        (final / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint_path='{final}' has no weights that can be loaded safely"):
            load_model(final)


def test_missing_weights_and_half_precision(run: tasks.MLMTask, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A body without a head gets a random one, with a warning; weights are float32 whatever they were saved in."
    caplog.set_level(logging.WARNING, "langmlm")
    run.model.roberta.save_pretrained(tmp_path / "body")
    assert torch.equal(
        load_model(tmp_path / "body").roberta.embeddings.word_embeddings.weight,
        run.model.roberta.embeddings.word_embeddings.weight,
    )
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("langmlm")]
    assert "body has no weights for" in message and "lm_head.dense.weight" in message and "randomly" in message
    half = new_model(run, seed=1).to(torch.bfloat16)
    save_model(tmp_path / "half", half, run.tokenizer)
    assert {weight.dtype for weight in load_model(tmp_path / "half").parameters()} == {torch.float32}


def test_loaded_weights_are_not_the_file(run: tasks.MLMTask, folder: Path):
    "A model in memory does not change with its file, nor the file with the model."
    final = folder / "final_model"
    model, content = load_model(final), (final / "model.safetensors").read_bytes()
    with open(final / "model.safetensors", "r+b") as stream:
        stream.write(bytes(len(content)))
    assert same_weights(model, run.model)
    with torch.no_grad():
        model.lm_head.bias += 1
    assert (final / "model.safetensors").read_bytes() == bytes(len(content))


def test_optimizer_of_a_checkpoint(run: tasks.MLMTask, checkpoint: Path, tmp_path: Path):
    "Restored from the file; a damaged file is named, a missing one is another error."
    model = load_model(checkpoint)
    optimizer = make_optimizer(model)
    load_optimizer(checkpoint, optimizer, model)
    saved = load_file(checkpoint / OPTIMIZER)
    again = load_file(save_step(run, tmp_path / "again", model, optimizer) / OPTIMIZER)
    assert same_tensors(again, saved) and len(saved) > 20
    with pytest.raises(FileNotFoundError):
        load_optimizer(checkpoint.parent / "final_model", optimizer, model)
    (checkpoint / OPTIMIZER).write_bytes(b"torn")
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        load_optimizer(checkpoint, optimizer, model)


# Pickle


@pytest.fixture
def attack(tmp_path: Path) -> Iterator[object]:
    "An object whose pickle makes a folder when it is loaded; in the end the folder must not exist."

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    yield Attack()
    assert not (tmp_path / "attacked").exists()
    pickle.loads(pickle.dumps(Attack()))  # It would have worked
    assert (tmp_path / "attacked").exists()


def load_everything(folder: Path) -> None:
    "Load what a resumed run loads from a checkpoint."
    model = load_model(find_starting_point(folder).weights)
    load_optimizer(folder, make_optimizer(model), model)


def test_pickles_in_every_file(checkpoint: Path, attack: object, tmp_path: Path):
    "In place of every file of a checkpoint, and in files that other tools would load."
    load_everything(checkpoint)
    bad = tmp_path / "copy" / "checkpoint-6"
    others = ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"]
    for name in [*sorted(file.name for file in checkpoint.iterdir()), *others]:
        shutil.copytree(checkpoint, bad)
        (bad / name).write_bytes(pickle.dumps(attack))
        if name in others:  # Not looked at
            load_everything(bad)
        else:
            with pytest.raises(ValueError, match=name):
                load_everything(bad)
        shutil.rmtree(bad)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", OPTIMIZER, TRAINER_STATE, "pytorch_model.bin"])
def test_pickles_with_a_manifest(run: tasks.MLMTask, checkpoint: Path, attack: object, name: str):
    "Somebody who has written the manifest anew still cannot run code."
    (checkpoint / name).write_bytes(pickle.dumps(attack, protocol=2))
    if name == "pytorch_model.bin":  # Which is not even looked at beside the real weights
        write_manifest(checkpoint, "checkpoint")
        load_everything(checkpoint)
        (checkpoint / "model.safetensors").unlink()
    write_manifest(checkpoint, "checkpoint")
    with pytest.raises((ValueError, OSError)):
        load_everything(checkpoint)


def test_foreign_weights(run: tasks.MLMTask, attack: object, tmp_path: Path):
    "Weights of other tools in PyTorch's format are loaded, but only tensors; anything else in the file is an error."
    foreign = tmp_path / "foreign"
    save_model(foreign, run.model, run.tokenizer)
    (foreign / "model.safetensors").unlink()
    torch.save(run.model.state_dict(), foreign / "pytorch_model.bin")
    assert torch.equal(load_model(foreign).lm_head.bias, run.model.lm_head.bias)
    for content in (pickle.dumps(attack, protocol=2), b"", b"PK"):
        (foreign / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint_path='{foreign}'"):
            load_model(foreign)
    torch.save(attack, foreign / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights that can be loaded safely"):
        load_model(foreign)
    torch.save({**run.model.state_dict(), "attack": attack}, foreign / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights that can be loaded safely"):
        load_model(foreign)


def test_code_beside_a_model(tmp_path: Path, attack: object):
    "Custom code in the folder of a model is never imported."
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'attacked')!r})")
    for model_type in ("mine", "roberta"):
        write_json(
            folder / "config.json",
            {"model_type": model_type, "auto_map": {"AutoConfig": "mine.Config", "AutoModelForMaskedLM": "mine.Model"}},
        )
        with pytest.raises((ValueError, OSError)):
            load_model(find_starting_point(folder).weights)


_heard: list[list[str]] = []  # Holds one list while somebody listens


@cache  # An audit hook cannot be removed
def _listen_to_pickles() -> None:
    "Note every class and function that a pickle names, whichever library loads it."

    def hook(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class" and _heard:
            _heard[0].append(".".join(map(str, arguments)))

    sys.addaudithook(hook)


@pytest.fixture
def unpickled() -> Iterator[list[str]]:
    "What is unpickled during a test."
    _listen_to_pickles()
    _heard.append([])
    yield _heard[0]
    _heard.clear()


def test_nothing_of_ours_is_unpickled(run: tasks.MLMTask, data: dict[str, Path], folder: Path, unpickled: list[str]):
    "Tokenizer, dataset, checkpoint: a resumed run calls neither pickle nor torch.load, whatever library reads them."
    pickle.loads(pickle.dumps(Path()))
    assert unpickled  # The listener works
    unpickled.clear()
    called = AssertionError("something is unpickled")
    with (
        patch("torch.load", side_effect=called),
        patch("pickle.load", side_effect=called),
        patch("pickle.loads", side_effect=called),
    ):
        resumed = tiny_run(data["tokenizer"].parent, checkpoint_path=folder / "checkpoint-6")
        resumed.train()
    assert unpickled == [] and resumed.state.step == 9
    assert same_weights(resumed.model, run.model)


def test_no_module_loads_pickles():
    "No module imports a library that loads pickles or calls a function that might; `weights_only` is set."
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").partition(".")[0]}
                if node.module == "pickle":
                    assert [alias.name for alias in node.names] == ["UnpicklingError"], file
                    continue
            else:
                imported = set()
            assert not imported & {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
            if isinstance(node, ast.Call):
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.jit.load", "np.load", "numpy.load"), file
                assert options.get("allow_pickle", "False") == "False" == options.get("trust_remote_code", "False"), (
                    file
                )
                if "ForMaskedLM.from_pretrained" in called:
                    assert options["weights_only"] == "True", file


# Where a run starts


def test_starting_points(folder: Path):
    "A run's folder and its checkpoints are resumed; models are started from; nothing means random weights."
    assert find_starting_point(None) == StartingPoint(None, None)
    for path, step in ((folder, 9), (folder / "checkpoint-6", 6), (str(folder / "checkpoint-3"), 3)):
        for resume in ("auto", "full"):
            start = find_starting_point(path, resume)
            assert start.trainer_state["global_step"] == step == checkpoint_step(Path(start.weights))
        start = find_starting_point(path, "weights")
        assert start.trainer_state is None
        assert Path(start.weights).name == ("final_model" if path == folder else f"checkpoint-{step}")
    assert find_starting_point(folder / "final_model") == StartingPoint(str(folder / "final_model"))
    (folder / "final_model" / TRAINER_STATE).touch()  # As the checkpoints of other tools have it
    assert find_starting_point(folder / "final_model").trainer_state is None
    assert find_starting_point("owner/some-model") == StartingPoint("owner/some-model")


@pytest.mark.parametrize(
    ("name", "resume", "message"),
    [
        (
            "checkpoint-9",
            "auto",
            "is damaged: optimizer.safetensors has 4 bytes instead of .* Name the folder of its run",
        ),
        ("checkpoint-9", "full", "is damaged: optimizer.safetensors has 4 bytes instead of "),
        ("final_model", "full", "final_model' is not a checkpoint of langmlm and cannot be resumed; resume='weights'"),
        ("owner/some-model", "full", "is not a checkpoint of langmlm and cannot be resumed"),
        (None, "full", "resume='full' needs a checkpoint_path to resume from"),
        (None, "weights", "resume='weights' needs a checkpoint_path"),
        ("checkpoint-77", "auto", "checkpoint-77' does not exist; in '"),
        ("empty", "auto", "contains neither a checkpoint nor a model: to start a run, leave it out"),
        ("empty", "weights", "contains neither a checkpoint nor a model"),
        ("", "yes", "resume must be 'auto', 'full' or 'weights', got 'yes'"),
    ],
)
def test_no_starting_point(folder: Path, name: str | None, resume: str, message: str):
    "The error says what to do."
    (folder / "checkpoint-9" / OPTIMIZER).write_bytes(b"torn")
    (folder / "empty").mkdir()  # Of a run that was killed before its first save
    with pytest.raises(ValueError, match=message):
        find_starting_point(None if name is None else folder / name, resume)


def test_damaged_checkpoints_of_a_run(folder: Path):
    "The newest intact one is used, also for its weights only; if there is none, the error says so."
    (folder / "checkpoint-9" / OPTIMIZER).write_bytes(b"torn")
    assert find_starting_point(folder).trainer_state["global_step"] == 6
    assert Path(find_starting_point(folder, "weights").weights).name == "final_model"  # Which is newer
    (folder / "final_model" / "config.json").unlink()
    assert Path(find_starting_point(folder, "weights").weights).name == "checkpoint-6"
    for name in ("checkpoint-3", "checkpoint-6"):
        (folder / name / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no intact checkpoint of langmlm"):
        find_starting_point(folder)


def test_damaged_weights_are_never_trained_from(folder: Path):
    "Neither those of a final model nor those of a checkpoint; an edited config is the user's affair."
    for name, resume in (("final_model", "auto"), ("checkpoint-9", "weights")):
        weights = folder / name / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is damaged: model.safetensors has other content than was written"):
            find_starting_point(folder / name, resume)
    (folder / "checkpoint-3" / "config.json").write_text("{}", encoding="utf-8")
    assert Path(find_starting_point(folder / "checkpoint-3", "weights").weights).name == "checkpoint-3"


def test_a_run_without_checkpoints_has_a_final_model(folder: Path):
    "With `save_strategy='no'`, the folder of the run stands for it."
    for path in list_checkpoints(folder):
        shutil.rmtree(path)
    assert find_starting_point(folder).weights == str(folder / "final_model")
    with pytest.raises(ValueError, match="final_model' is not a checkpoint of langmlm and cannot be resumed"):
        find_starting_point(folder, "full")


def test_output_folder_of_the_trainer(folder: Path):
    "Its model is used; the checkpoints beside it are not ours, so they are neither resumed nor called damaged."
    trained = folder / "trained"
    shutil.copytree(folder / "final_model", trained)
    for step in (4, 8):
        shutil.copytree(folder / "final_model", trained / f"checkpoint-{step}")
        (trained / f"checkpoint-{step}" / TRAINER_STATE).write_text('{"global_step": 8}', encoding="utf-8")
    for path in trained.rglob(MANIFEST):
        path.unlink()
    assert find_model(str(trained)) == str(trained)
    lines, damage = describe_folder(trained)
    assert "model without a manifest" in lines[0] and damage == []
    for resume in ("auto", "weights"):
        assert find_starting_point(trained, resume) == StartingPoint(str(trained))
    with pytest.raises(ValueError, match="trained' is not a checkpoint of langmlm and cannot be resumed"):
        find_starting_point(trained, "full")
    assert find_starting_point(trained / "checkpoint-8") == StartingPoint(str(trained / "checkpoint-8"))
    (trained / "config.json").unlink()  # The Trainer was killed
    with pytest.raises(ValueError, match="to start from one that another tool has saved, name its folder"):
        find_starting_point(trained)


def test_an_outdated_final_model_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture):
    "After a run was resumed and stopped, the newest checkpoint has its weights."
    assert find_model(str(folder)) == str(folder / "final_model") and not caplog.messages
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-12")
    os.utime(folder / "final_model" / MANIFEST)  # As after a copy: the steps count
    assert find_model(str(folder)) == str(folder / "checkpoint-12")
    assert caplog.messages == [f"checkpoint-12 is used, since {folder / 'final_model'} is older"]
    (folder / "checkpoint-12" / MANIFEST).unlink()
    assert find_model(str(folder)) == str(folder / "final_model")
    shutil.rmtree(folder / "final_model")
    assert find_model(str(folder)) == str(folder / "checkpoint-12")
    assert find_model("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["final_model", "checkpoint-6"])
def test_damaged_weights_are_not_used(folder: Path, name: str):
    "Whether the run or the model is named; a model without a manifest is used as it is."
    if name != "final_model":
        shutil.rmtree(folder / "final_model")
        shutil.rmtree(folder / "checkpoint-9", ignore_errors=True)
    weights = folder / name / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(byte ^ 64 for byte in content[-4:]))
    for given in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name} is damaged: model.safetensors .* name another model"):
            find_model(str(given))
    (folder / name / MANIFEST).unlink()
    assert find_model(str(folder / name)) == str(folder / name)


def test_weights_that_do_not_fit_the_config(folder: Path):
    "The error names the parameter."
    config = folder / "final_model" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"intermediate_size": 64', '"intermediate_size": 128'))
    with pytest.raises(ValueError, match="checkpoint_path='.*final_model' has no weights that can be loaded safely: ."):
        load_model(folder / "final_model")


def test_options_of_a_run_without_a_checkpoint(tmp_path: Path):
    "The remedy names the latest options, not those of the first attempt or files of the user."
    for age, name in ((30, "options.yaml"), (20, "options-2.yaml"), (10, "options_backup.yaml")):
        (tmp_path / name).write_text("model_config: {}")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    with pytest.raises(ValueError, match=f"langmlm train --config {tmp_path}/options-2.yaml --output_dir {tmp_path}"):
        find_starting_point(tmp_path)


@pytest.mark.parametrize("missing", [MANIFEST, OPTIMIZER, TRAINER_STATE])
def test_checkpoint_without_one_of_its_files(checkpoint: Path, missing: str):
    "It is still a checkpoint, and a damaged one: it is never mistaken for a model to start from."
    (checkpoint / missing).unlink()
    with pytest.raises(ValueError, match=f"is damaged: {missing} is missing"):
        find_starting_point(checkpoint)
    assert find_starting_point(checkpoint, "weights").trainer_state is None


@pytest.mark.parametrize(
    "content", [[], 3, {}, {"global_step": 6, "log_history": []}, {"langmlm": {}, "global_step": 6}]
)
def test_state_of_another_tool(checkpoint: Path, content: object):
    "A whole checkpoint, with a state that we have not written."
    (checkpoint / TRAINER_STATE).write_text(json.dumps(content))
    write_manifest(checkpoint, "checkpoint")
    with pytest.raises(ValueError, match="was not written by langmlm, so the run cannot be resumed; resume='weights'"):
        find_starting_point(checkpoint)


def test_hostile_names_in_a_manifest(checkpoint: Path):
    "A manifest that leads out of the checkpoint makes it a damaged one."
    manifest = {"kind": "checkpoint", "files": {"../../secret": {"bytes": 1, "xxh3": "5f3a"}}}
    write_json(checkpoint / MANIFEST, manifest | {"digest": hash_json(manifest)})
    with pytest.raises(ValueError, match="names files outside the folder: ../../secret"):
        find_starting_point(checkpoint)


def test_damage_of_a_model_whose_manifest_is_damaged(tmp_path: Path):
    "Two damaged files are found, as one is."
    task = tiny_run(tmp_path, max_steps=2)
    task.train()
    folder = tmp_path / "run" / "final_model"
    (folder / MANIFEST).write_bytes(b"")
    for find in (find_model, find_starting_point):
        with pytest.raises(ValueError, match="final_model'? is damaged: .*Copy it again"):
            find(str(folder))


@pytest.mark.parametrize("content", [{"name": "app", "icons": []}, {"version": 3, "entries": []}])
def test_manifest_of_another_tool(folder: Path, content: dict):
    "It says nothing about our files: the model is used as one without a manifest, and the folder is not ours."
    model = folder / "final_model"
    write_json(model / MANIFEST, content)
    assert find_model(str(model)) == str(model) and find_starting_point(model).weights == str(model)
    assert read_manifest(model) is None and find_damage(model) == [f"{MANIFEST} is missing"]
