"The micro-batches of a step depend on data, plan, seed and step only; processes share them."

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from langmlm.data.batching import BatchPlan, FlatBatch, make_flat_batch
from langmlm.data.dataset import TokenizedDataset, open_dataset
from langmlm.data.loader import BatchLoader, StepBatches
from langmlm.data.masking import IGNORE_INDEX, BatchSizes, MaskedBatch, MaskingRules, fixed_sizes, mask_batch, masking_rules
from langmlm.tasks import create_mlm, create_tokenizer
from langmlm.testing import tiny_run
from langmlm.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> BatchLoader:
    "The loader of a run with three micro-batches in a step."
    options = {"gradient_accumulation_steps": 3, "num_train_epochs": 3}
    return tiny_run(tmp_path_factory.mktemp("loader"), 150, {"vocab_size": 500, "max_length": 32}, **options).loader


def same_batch(one: MaskedBatch, two: MaskedBatch) -> bool:
    "Whether two micro-batches are equal in all tensors."
    return all(torch.equal(value, vars(two)[name]) for name, value in vars(one).items())


def same_step(one: StepBatches, two: StepBatches) -> bool:
    "Whether two steps have equal micro-batches under equal numbers."
    assert [index for index, _ in one.batches] == [index for index, _ in two.batches]
    return all(same_batch(mine, theirs) for (_, mine), (_, theirs) in zip(one.batches, two.batches, strict=True))


def sequences(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> list[list[int]]:
    "The sequences of a micro-batch, in an order of their own."
    bounds = cu_seqlens.tolist()
    return sorted(input_ids[begin:end].tolist() for begin, end in zip(bounds, bounds[1:]))


def test_counts(loader: BatchLoader):
    "Tokens, lengths, predictions and padding are those of the micro-batches."
    for step in range(loader.plan.total_steps):
        loaded = loader.load(step)
        batches = [batch for _, batch in loaded.batches]
        assert isinstance(loaded, StepBatches) and [index for index, _ in loaded.batches] == list(range(len(batches)))
        assert loaded.tokens == sum(len(batch.input_ids) for batch in batches) == loaded.computed_tokens
        assert loaded.predictions == sum(len(batch.labels) for batch in batches)
        lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches])
        assert loaded.lengths.sum() == loaded.tokens and np.array_equal(np.sort(loaded.lengths), np.sort(lengths))
        assert loaded.padding == 0 and all(len(batch.input_ids) <= loader.plan.token_budget for batch in batches)


def test_sequences_of_the_plan(loader: BatchLoader):
    "Unmasked, the micro-batches are the sequences of the plan, and an epoch holds every token once."
    for step in (0, loader.plan.total_steps - 1):
        _, rows = loader.plan.batches(step)
        for (_, batch), own in zip(loader.load(step).batches, rows, strict=True):
            ids = batch.input_ids.clone()
            ids[batch.masked_positions] = batch.labels
            assert sequences(ids, batch.cu_seqlens) == sorted(loader.dataset[row].tolist() for row in own)
    first_epoch = range(loader.plan.steps_per_epoch)
    assert sum(loader.load(step).tokens for step in first_epoch) == loader.dataset.tokens


def test_deterministic_and_different(loader: BatchLoader):
    "A step is the same whenever it is loaded; other steps, other epochs and other seeds are not."
    again = replace(loader)
    assert all(same_step(loader.load(step), again.load(step)) for step in (3, 0, 1))
    assert not same_batch(loader.load(0).batches[0][1], loader.load(1).batches[0][1])
    reseeded = replace(loader, rules=replace(loader.rules, seed=7)).load(0).batches[0][1]
    assert not same_batch(loader.load(0).batches[0][1], reseeded)
    masks = []
    for epoch in (0, 1):  # The masks of the longest sequence
        longest = int(loader.dataset.lengths[:].argmax())
        for step in range(loader.plan.total_steps):
            number, rows = loader.plan.batches(step)
            for index, own in enumerate(rows):
                if number == epoch and longest in own:
                    batch = loader.load(step).batches[index][1]
                    begin = int(
                        batch.cu_seqlens[
                            make_flat_batch(loader.dataset, own, loader.pad_token_id).rows.tolist().index(longest)
                        ]
                    )
                    end = begin + int(loader.dataset.lengths[longest])
                    inside = (batch.masked_positions >= begin) & (batch.masked_positions < end)
                    masks.append((batch.masked_positions[inside] - begin).tolist())
    assert len(masks) == 2 and masks[0] != masks[1]


def test_prefetch_order(loader: BatchLoader):
    "Steps come in order, each as `load` returns it, with the seconds of waiting; an empty range gives nothing."
    total = loader.plan.total_steps
    prefetched = list(loader.prefetch(2, total))
    assert len(prefetched) == total - 2 and all(waited >= 0 for _, waited in prefetched)
    assert all(same_step(batches, loader.load(step)) for step, (batches, _) in enumerate(prefetched, 2))
    assert list(loader.prefetch(0, 0)) == list(loader.prefetch(5, 5)) == list(loader.prefetch(6, 5)) == []


def test_prefetch_is_one_step_ahead(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch):
    "While a step is computed, the next one is loaded in another thread, and none beyond the last."
    loaded, event = [], threading.Event()

    def load(self, step: int) -> int:
        loaded.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            event.set()
        return step

    monkeypatch.setattr(BatchLoader, "load", load)
    prefetched = loader.prefetch(0, 3)
    assert next(prefetched)[0] == 0
    assert event.wait(600)  # Nobody has asked for step 1
    assert [step for step, _ in loaded] == [0, 1]
    assert [step for step, _ in prefetched] == [1, 2] and [step for step, _ in loaded] == [0, 1, 2]
    assert not any(in_main_thread for _, in_main_thread in loaded)


def test_a_chunk_is_planned_once(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch):
    "While a chunk is being planned, later steps do not plan it again: loading needs the other thread."
    planned, planning = [], threading.Event()

    def plan_ahead(self, step: int) -> None:
        planned.append(step)
        planning.wait(600)

    monkeypatch.setattr(BatchPlan, "plan_ahead", plan_ahead)
    prefetched = loader.prefetch(0, 6)
    assert [len(next(prefetched)) for _ in range(5)] == [2] * 5
    assert planned == [1]
    planning.set()
    assert len([*prefetched]) == 1


def test_errors_while_prefetching(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch):
    "An error in the thread reaches the caller, at the step that has it."

    def load(self, step: int) -> int:
        if step == 2:
            raise OSError("the dataset is gone")
        return step

    monkeypatch.setattr(BatchLoader, "load", load)
    prefetched = loader.prefetch(0, 5)
    assert [next(prefetched)[0], next(prefetched)[0]] == [0, 1]
    with pytest.raises(OSError, match="the dataset is gone"):
        next(prefetched)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_a_step(loader: BatchLoader, processes: int):
    "Together they have the micro-batches of one process; one without any computes the first one without predictions."
    for step in range(loader.plan.total_steps):
        alone = loader.load(step)
        shared = [
            replace(loader, process_index=index, num_processes=processes).load(step) for index in range(processes)
        ]
        assert all(each.tokens == alone.tokens for each in shared)
        assert sum(each.predictions for each in shared) == alone.predictions
        found = {}
        for index, each in enumerate(shared):
            if index < len(alone.batches):
                found |= dict(each.batches)
                assert [number for number, _ in each.batches] == list(range(index, len(alone.batches), processes))
            else:
                ((number, batch),) = each.batches
                assert (number, each.predictions, len(batch.labels)) == (0, 0, 0)
                assert torch.equal(batch.cu_seqlens, alone.batches[0][1].cu_seqlens)
        assert sorted(found) == [index for index, _ in alone.batches]
        assert all(same_batch(found[index], batch) for index, batch in alone.batches)


def test_padding(loader: BatchLoader):
    "Padded batches have few shapes or one, and hold the same tokens, labels and sequences first."
    options = loader.dataset.lengths, loader.plan.token_budget, loader.rules.mlm_probability
    found = {}
    for name, sizes in (("few", BatchSizes()), ("one", fixed_sizes(*options))):
        padded = replace(loader, sizes=sizes)
        shapes, padding = set(), 0
        for step in range(loader.plan.total_steps):
            plain, loaded = loader.load(step), padded.load(step)
            assert (loaded.tokens, loaded.predictions) == (plain.tokens, plain.predictions)
            assert np.array_equal(loaded.lengths, plain.lengths)
            assert loaded.padding == loaded.computed_tokens - plain.computed_tokens >= 0
            padding += loaded.padding
            for (_, full), (_, batch) in zip(loaded.batches, plain.batches, strict=True):
                shapes.add(tuple(len(value) for value in vars(full).values()))
                assert full.input_ids[: len(batch.input_ids)].tolist() == batch.input_ids.tolist()
                assert full.labels[: len(batch.labels)].tolist() == batch.labels.tolist()
                assert set(full.labels[len(batch.labels) :].tolist()) <= {IGNORE_INDEX}
                assert set(full.input_ids[len(batch.input_ids) :].tolist()) <= {loader.pad_token_id}
                assert full.cu_seqlens[: len(batch.cu_seqlens)].tolist() == batch.cu_seqlens.tolist()
                assert full.cu_seqlens.diff().max() <= loader.dataset.max_length
        found[name] = len(shapes), padding
    assert found["one"][0] == 1 < found["few"][0] and 0 < found["few"][1] < found["one"][1]


def test_validation_batches(loader: BatchLoader):
    "All sequences once, in the order of the dataset, with the same masks every time; processes share them."
    batches, again = list(loader.load_in_order()), list(loader.load_in_order())
    assert all(same_batch(*pair) for pair in zip(batches, again, strict=True))
    assert sum(len(batch.input_ids) for batch in batches) == loader.dataset.tokens
    first_row = 0
    for batch in batches:
        ids = batch.input_ids.scatter(0, batch.masked_positions, batch.labels)
        rows = range(first_row, first_row := first_row + len(batch.cu_seqlens) - 1)
        assert sequences(ids, batch.cu_seqlens) == sorted(loader.dataset[row].tolist() for row in rows)
    assert first_row == len(loader.dataset)
    shares = [list(replace(loader, process_index=index, num_processes=2).load_in_order()) for index in (0, 1)]
    assert [len(share) for share in shares] == [-(-len(batches) // 2), len(batches) // 2]
    for number, batch in enumerate(batches):
        assert same_batch(shares[number % 2][number // 2], batch)


def test_validation_has_the_shape_of_training(tmp_path: Path):
    "Short validation sequences are padded like those of the training split, so no other shape is compiled for them."
    lines = [" ".join(["word"] * (1 + number % 40)) + str(number) for number in range(800)]
    (tmp_path / "data.txt").write_text("\n".join(lines), encoding="utf-8")
    paths = {name: tmp_path / name for name in ("path_to_save_tokenizer", "path_to_save_dataset")}
    config = {"vocab_size": 270, "max_length": 64, "validation_fraction": 0.5, **paths}
    create_tokenizer(tmp_path / "data.txt", config).train()
    train, validation = (open_dataset(tmp_path / "path_to_save_dataset", split) for split in ("train", "validation"))
    options = {"seed": 0, "token_budget": 2_048, "sequences_per_batch": None, "batches_per_step": 1, "num_train_epochs": 1}
    sizes = fixed_sizes(train.lengths, 2_048, 0.15)
    rules = masking_rules(load_tokenizer(tmp_path / "path_to_save_tokenizer"))
    loader = BatchLoader(
        dataset=train, plan=BatchPlan(train.lengths, **options), rules=rules, pad_token_id=1, sizes=sizes
    )
    few = replace(loader, dataset=validation)
    shortest = load_from_disk(tmp_path / "path_to_save_dataset")["validation"].select(validation.lengths[:].argsort()[:3])
    few_rows = TokenizedDataset(shortest.flatten_indices(), validation.manifest)
    shapes = {
        tuple(len(value) for value in vars(batch).values())
        for each in (loader, few, replace(few, dataset=few_rows))
        for batch in each.load_in_order()
    }
    assert shapes == {(2_048, 2_048, sizes.bounds, sizes.predictions, sizes.predictions)}
    assert validation.max_length == 64


def masks_nothing(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
    "A mask function of a user."
    nothing = torch.zeros(0, dtype=torch.int64)
    return MaskedBatch(batch.input_ids, batch.position_ids, batch.cu_seqlens, nothing, nothing)


def test_mask_of_a_user(loader: BatchLoader):
    "A function replaces `mask_batch` wherever batches of the split are masked, with the rules and the epoch of the run."
    seen = []

    def shifted(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
        seen.append((epoch, rules))
        return mask_batch(batch, epoch + 100, rules)

    own = replace(loader, mask=shifted)
    last = loader.plan.total_steps - 1
    (_, batch), *_ = own.load(last).batches
    epoch, rows = loader.plan.batches(last)
    expected = mask_batch(make_flat_batch(loader.dataset, rows[0], loader.pad_token_id), epoch + 100, loader.rules)
    assert same_batch(batch, expected) and seen[0] == (epoch, loader.rules)
    assert own.mask_name == "test_mask_of_a_user.<locals>.shifted" and loader.mask_name == "mask_batch"
    assert replace(loader, mask=partial(mask_batch)).mask_name == "partial of mask_batch"
    assert replace(loader, mask=masks_nothing).load(0).predictions == 0


def test_labels_to_ignore(loader: BatchLoader):
    "As data collators write masks: a label for each token, -100 where there is nothing to predict."

    def collated(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
        masked = mask_batch(batch, epoch, rules)
        labels = torch.full_like(masked.input_ids, IGNORE_INDEX)
        labels[masked.masked_positions] = masked.labels
        return replace(masked, masked_positions=torch.arange(len(labels)), labels=labels)

    assert replace(loader, mask=collated).load(0).predictions == loader.load(0).predictions > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masked: None, "mask=wrong must return a MaskedBatch, got NoneType"),
        (lambda masked: replace(masked, labels=masked.labels[1:]), "as many labels as masked_positions, got"),
        (lambda masked: replace(masked, input_ids=masked.input_ids[1:]), "input_ids, and as many labels"),
        (lambda masked: replace(masked, labels=masked.labels.float()), "whose labels are an int64 tensor with one dimension, got "
         "Tensor, torch.float32, ["),
        (lambda masked: replace(masked, labels=masked.labels.numpy()), "an int64 tensor with one dimension, got ndarray, int64, ["),
        (lambda masked: replace(masked, masked_positions=masked.masked_positions.flip(0)), "are ascending, from 0 to"),
        (lambda masked: replace(masked, masked_positions=masked.masked_positions + 10_000), "are ascending, from 0 to"),
        (lambda masked: replace(masked, masked_positions=masked.masked_positions[:1].expand(len(masked.labels))), "are ascending"),
        (lambda masked: replace(masked, input_ids=masked.input_ids - 7), "whose input_ids are ids from 0 to 499, got -7 to"),
        (lambda masked: replace(masked, labels=masked.labels + 500), "whose labels are ids from 0 to 499, got 5"),
    ],
    ids=["nothing", "labels", "ids", "dtype", "array", "order", "range", "twice", "negative", "vocabulary"],
)
def test_invalid_masks(loader: BatchLoader, change: Callable, message: str):
    "What a mask function of a user returns is checked."

    def wrong(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
        return change(mask_batch(batch, epoch, rules))

    wrong.__qualname__ = "wrong"
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        replace(loader, mask=wrong).load(0)


def test_a_mask_changes_no_positions(loader: BatchLoader):
    "Positions and borders are those of the batch, whatever the function returns."

    def careless(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
        masked = mask_batch(batch, epoch, rules)
        return replace(masked, position_ids=torch.arange(4), cu_seqlens=None)

    assert same_step(replace(loader, mask=careless).load(0), loader.load(0))


def usual_masks(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
    "Another one."
    return mask_batch(batch, epoch, rules)


def test_resume_with_other_masks(tmp_path: Path):
    "A run with a mask function is resumed with that function only, and evaluates with the usual masks."
    architecture = tiny_run(tmp_path, tokenizer_config={"validation_fraction": 0.1}).model.config.to_dict()
    architecture = {name: architecture[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    paths = {"tokenizer": tmp_path / "tokenizer", "tokenized_dataset": tmp_path / "dataset", "mask": usual_masks}
    options = {"max_steps": 4, "output_dir": tmp_path / "masked", "bf16": False, "eval_steps": 2, "logging_steps": 1}
    run = create_mlm(**paths, model_config=architecture, training_config=options)
    assert run.validation.mask is mask_batch and run.loader.mask is usual_masks
    run.train(stop_at_step=2)
    with pytest.raises(ValueError, match="mask: then usual_masks, now mask_batch"):
        create_mlm(**paths | {"mask": mask_batch}, checkpoint_path=tmp_path / "masked")
    resumed = create_mlm(**paths, checkpoint_path=tmp_path / "masked")
    assert resumed.state.step == 2 and resumed.loader.mask is usual_masks
