"Every step is a pure function of lengths, seed and number; every sequence is visited once per epoch."

import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from langmlm.data.batching import (
    BatchPlan,
    make_flat_batch,
    pack_sequences,
    random_bits,
    random_uniform,
    shuffled_order,
)
from langmlm.data.dataset import TokenizedDataset

LENGTHS = np.clip(np.exp(np.random.default_rng(0).random(2_000) * 4.2), 3, 64).astype(np.int32)
OPTIONS = {"seed": 42, "token_budget": 512, "sequences_per_batch": None, "batches_per_step": 4}


def test_random_bits():
    "Known values, so that a run resumes on any machine; arrays broadcast; seeds and keys are not correlated."
    assert random_bits(0).tolist() == [0xE220A8397B1DCDAF]  # The first output of SplitMix64 with seed 0
    assert random_bits(42, 3, 17) == random_bits(42, 3, np.arange(20))[17]
    assert random_bits(1, np.arange(3)[:, None], np.arange(4)).shape == (3, 4)
    draws = random_uniform(42, np.arange(100_000))
    histogram, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(histogram - 10_000).max() < 400 and 0 <= draws.min() and draws.max() < 1
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(draws, random_uniform(43, np.arange(100_000)))[0, 1]) < 0.01


def test_shuffled_order():
    orders = [shuffled_order(1_000, seed=42, epoch=epoch) for epoch in (0, 1, 0)]
    assert np.array_equal(np.sort(orders[0]), np.arange(1_000)) and np.array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any() and (orders[0] != shuffled_order(1_000, seed=43, epoch=0)).any()


def test_pack_sequences():
    "Micro-batches are as full as whole sequences allow: the next sequence would not have fit."
    bounds = pack_sequences(LENGTHS, token_budget=512)
    tokens = np.add.reduceat(LENGTHS, bounds[:-1])
    assert bounds[0] == 0 and bounds[-1] == len(LENGTHS) and tokens.max() <= 512
    assert (tokens[:-1] + LENGTHS[bounds[1:-1]] > 512).all()
    assert pack_sequences(np.array([5, 3, 4, 6, 2, 8]), token_budget=10).tolist() == [0, 2, 4, 6]
    assert pack_sequences(np.zeros(0, int), token_budget=10).tolist() == [0]
    with pytest.raises(ValueError, match="12 tokens does not fit .* raise per_device_train_batch_size"):
        pack_sequences(np.array([5, 12]), token_budget=10)


@pytest.mark.parametrize("changes", [{}, {"sequences_per_batch": 7}, {"batches_per_step": 1}], ids=str)
def test_every_sequence_once_per_epoch(changes: dict):
    plan = BatchPlan(LENGTHS, **OPTIONS | changes, num_train_epochs=3)
    assert plan.total_steps == plan.epoch_ends[-1]
    for epoch, (first, last) in enumerate(zip([0, *plan.epoch_ends], plan.epoch_ends)):
        steps = [plan.batches(step) for step in range(first, last)]
        assert {number for number, _ in steps} == {epoch}
        assert np.array_equal(np.sort(np.concatenate([rows for _, step in steps for rows in step])), np.arange(2_000))
        assert {len(step) for _, step in steps[:-1]} == {plan.batches_per_step}
        assert [plan.locate(step) for step in (first, last - 1)] == [(epoch, 0), (epoch, last - 1 - first)]
    assert [plan.epochs_done(step) for step in (0, plan.epoch_ends[0], plan.total_steps)] == [0, 1, 3]


def test_steps_do_not_depend_on_the_plan():
    "A longer run, a plan asked in another order, and more processes with less accumulation have the same steps."
    plan = BatchPlan(LENGTHS, **OPTIONS, num_train_epochs=2)
    longer = BatchPlan(LENGTHS.copy(), **OPTIONS, num_train_epochs=1, max_steps=100)
    assert longer.total_steps == 100
    for step in (31, 17, 16, 15, 0):
        steps = [[rows.tolist() for rows in some.batches(step)[1]] for some in (plan, longer)]
        assert steps[0] == steps[1]
    sizes = [len(rows) for rows in BatchPlan(LENGTHS, **OPTIONS | {"sequences_per_batch": 8}, num_train_epochs=1).batches(3)[1]]
    assert sizes == [8, 8, 8, 8]


def test_flat_batch():
    "Sequences are sorted by length, and positions restart after the padding id."
    sequences = [[0, 10, 11, 2], [0, 20, 2], [0, 30, 31, 32, 2]]
    dataset = TokenizedDataset(Dataset.from_dict({"input_ids": sequences}))
    batch = make_flat_batch(dataset, [2, 0], pad_token_id=1)
    assert batch.input_ids.tolist() == sequences[0] + sequences[2]
    assert batch.position_ids.tolist() == [2, 3, 4, 5, 2, 3, 4, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 4, 9] and batch.rows.tolist() == [0, 2]
    with pytest.raises(IndexError, match="out of bounds"):
        make_flat_batch(dataset, [3], pad_token_id=1)


def test_imports_nothing_that_reads_files():
    "Batching, masking and the model can be imported without the modules for files, texts and tokens."
    code = (
        "import sys, langmlm.data.batching, langmlm.data.masking, langmlm.model.roberta, langmlm.model.compile\n"
        "print(*(name for name in sys.modules if name.startswith('langmlm.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    allowed = {"langmlm.config", "langmlm.data", "langmlm.data.batching", "langmlm.data.masking"}
    assert not [name for name in loaded if name not in allowed and not name.startswith("langmlm.model")]
