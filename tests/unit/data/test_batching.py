"Every step is a pure function of lengths, seed and number; every sequence is visited once per epoch."

import itertools
import math
from collections import Counter

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


class ComputedLengths:
    "The lengths of any number of sequences, as words in lines of text, which are not stored; counts how many are read."

    def __init__(self, sequences: int):
        self.sequences, self.read = sequences, 0

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.read += len(rows)
        return np.clip(np.exp(random_uniform(1, rows) * 4.2), 3, 64).astype(np.int32)


def test_shuffled_order():
    orders = [shuffled_order(1_000, seed=42, epoch=epoch) for epoch in (0, 1, 0)]
    assert np.array_equal(np.sort(orders[0]), np.arange(1_000)) and np.array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any() and (orders[0] != shuffled_order(1_000, seed=43, epoch=0)).any()


@pytest.mark.parametrize("sequences", [0, 1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 10_007, 300_001])
def test_order_is_a_permutation(sequences: int):
    "Of any number of sequences; a part of the order is that part of the whole."
    order = shuffled_order(sequences, 7, 3)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(sequences))
    cuts = [0, sequences // 3, sequences // 2, sequences]
    parts = [shuffled_order(sequences, 7, 3, start, stop) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), order)


@pytest.mark.parametrize("sequences", [2, 3, 4, 5])
def test_all_orders_come_equally_often(sequences: int):
    "A chi-square test over epochs; an even and an odd number of sequences, and squares."
    epochs, possible = 100 * math.factorial(sequences), math.factorial(sequences)
    counts = Counter(tuple(shuffled_order(sequences, 42, epoch).tolist()) for epoch in range(epochs))
    assert len(counts) == possible
    chi_square, freedom = sum((count - 100) ** 2 / 100 for count in counts.values()), possible - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sequences", [100, 1_000, 1_024])
def test_uniformity(sequences: int):
    "Positions, neighbors, distances and repetitions over 1,000 epochs are those of independent random orders."
    epochs = np.array([shuffled_order(sequences, 42, epoch) for epoch in range(1_000)])
    steps = np.diff(epochs, axis=1)
    error = 5 / math.sqrt(1_000)  # Five standard deviations of the mean of a Poisson variable of mean 1
    assert abs((abs(steps) == 1).sum(1).mean() - 2 * (1 - 1 / sequences)) < 2 * error
    assert abs((epochs == np.arange(sequences)).sum(1).mean() - 1) < error
    assert abs((epochs[1:] == epochs[:-1]).sum(1).mean() - 1) < error
    means = epochs.mean(0) / (sequences - 1)  # Of the sequences at each position, over all epochs
    assert abs(means - 0.5).max() < 5 * math.sqrt(1 / 12 / 1_000)
    grid = np.histogram2d(np.tile(np.arange(sequences), 1_000), epochs.ravel(), bins=10)[0]
    expected = np.outer(grid.sum(1), grid.sum(0)) / grid.sum()
    assert ((grid - expected) ** 2 / expected).sum() < 81 + 4 * math.sqrt(2 * 81)


def test_large_orders_are_uniform():
    "A million positions of an order of a billion are spread evenly, without repetition and without correlation."
    order = shuffled_order(10**9, 42, 5, 600_000_000, 601_000_000)
    counts, _ = np.histogram(order, bins=100, range=(0, 10**9))
    assert len(np.unique(order)) == 10**6 and abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.005
    assert abs(np.corrcoef(order, shuffled_order(10**9, 42, 6, 600_000_000, 601_000_000))[0, 1]) < 0.005


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


@pytest.mark.parametrize("token_budget", range(512, 2_048, 97))
def test_no_epoch_ends_with_a_small_step(token_budget: int):
    "With one micro-batch in a step: the tokens that fill none are spread over all steps, not over more of them."
    plan = BatchPlan(LENGTHS, **OPTIONS | {"token_budget": token_budget, "batches_per_step": 1}, num_train_epochs=3)
    tokens = np.array([LENGTHS[plan.batches(step)[1][0]].sum() for step in range(plan.total_steps)])
    greedy = [pack_sequences(LENGTHS[shuffled_order(2_000, 42, epoch)], token_budget) for epoch in range(3)]
    assert tokens.min() > 0.7 * tokens.mean() and tokens.max() <= token_budget
    assert plan.steps_per_epoch == len(greedy[0]) - 1 and abs(len(tokens) - sum(map(len, greedy)) + 3) <= 3


CHANGES = [{}, {"sequences_per_batch": 7}, {"batches_per_step": 1}, {"token_budget": 64, "batches_per_step": 1}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("chunk", [2**20, 300, 7])
def test_every_sequence_once_per_epoch(changes: dict, chunk: int, monkeypatch: pytest.MonkeyPatch):
    "In one chunk or many: all epochs have the same number of steps, and no step or micro-batch is empty or too large."
    monkeypatch.setattr("langmlm.data.batching._CHUNK", chunk)
    plan = BatchPlan(LENGTHS, **OPTIONS | changes, num_train_epochs=3)
    assert plan.total_steps == 3 * plan.steps_per_epoch
    for epoch in range(3):
        first, last = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
        steps = [plan.batches(step) for step in range(first, last)]
        assert {number for number, _ in steps} == {epoch}
        assert np.array_equal(np.sort(np.concatenate([rows for _, step in steps for rows in step])), np.arange(2_000))
        assert all(len(step) and all(map(len, step)) for _, step in steps)
        if plan.sequences_per_batch:
            assert {len(step) for _, step in steps[:-1]} == {plan.batches_per_step}
            assert {len(rows) for _, step in steps for rows in step[:-1]} == {plan.sequences_per_batch}
        else:
            assert max(LENGTHS[rows].sum() for _, step in steps for rows in step) <= plan.token_budget
        assert [plan.locate(step) for step in (first, last - 1)] == [(epoch, 0), (epoch, last - 1 - first)]
    assert [plan.epochs_done(step) for step in (0, plan.steps_per_epoch, plan.total_steps)] == [0, 1, 3]


@pytest.mark.parametrize("sequences", [1_000, 25_000, 100_000])
def test_packing_of_small_datasets(sequences: int):
    "The micro-batches of ten epochs are as full as those of a plan without chunks; steps differ by one micro-batch."
    lengths = ComputedLengths(sequences)[np.arange(sequences)]
    plan, greedy, planned = BatchPlan(lengths, **OPTIONS, num_train_epochs=10), 0, []
    for epoch in range(10):
        greedy += len(pack_sequences(lengths[shuffled_order(sequences, 42, epoch)], 512)) - 1
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        planned += [len(plan.batches(step)[1]) for step in steps]
    assert sum(planned) == pytest.approx(greedy, rel=0.002) and set(planned) <= {2, 3, 4, 5}
    assert np.mean(planned) > 4 - 4 / plan.steps_per_epoch


def test_packing_of_chunks():
    "Chunks lose less than 0.1% of the space in micro-batches, and their steps are nearly always complete."
    plan = BatchPlan(ComputedLengths(3_000_000), **OPTIONS | {"batches_per_step": 64}, num_train_epochs=2)
    steps = [plan.batches(step)[1] for step in range(plan.steps_per_epoch)]
    rows = np.concatenate([batch for step in steps for batch in step])
    greedy = len(pack_sequences(plan.lengths[rows], 512)) - 1
    assert np.array_equal(np.sort(rows), np.arange(3_000_000))
    assert sum(map(len, steps)) < 1.001 * greedy
    sizes = np.array(list(map(len, steps)))
    assert set(sizes) <= {63, 64, 65} and (sizes == 64).mean() > 0.7 and 63.8 < sizes.mean() < 64.05


def test_a_billion_sequences():
    "Only a sample and the chunk of the step are read, whatever the number of epochs; the next chunk may be prepared."
    lengths = ComputedLengths(10**9)
    plan = BatchPlan(lengths, **OPTIONS | {"batches_per_step": 64}, num_train_epochs=100_000)
    assert plan.total_steps == 100_000 * plan.steps_per_epoch and lengths.read < 1.1 * 2**20
    last_of_chunk = 77_777 * plan.steps_per_epoch + 10 * plan._steps_per_chunk - 1
    epoch, batches = plan.batches(last_of_chunk)
    assert epoch == 77_777 and abs(len(batches) - 64) <= 1 and lengths.read < 2.2 * 2**20
    plan.plan_ahead(last_of_chunk)
    before = lengths.read
    for step in (last_of_chunk + 1, last_of_chunk, last_of_chunk + 1):
        plan.batches(step)
    assert lengths.read == before < 3.3 * 2**20
    plan.batches(plan.total_steps - 1)
    before = lengths.read
    plan.plan_ahead(plan.total_steps - 1)  # There is nothing after the end
    assert lengths.read == before
    by_row = BatchPlan(lengths, **OPTIONS | {"sequences_per_batch": 8}, num_train_epochs=1)
    assert by_row.total_steps == 10**9 // 32 and [len(rows) for rows in by_row.batches(20_000_000)[1]] == [8] * 4


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
