"Masks have the shares that were asked for, depend on nothing but their keys, and survive padding."

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from langmlm.data.batching import FlatBatch, make_flat_batch, pack_sequences
from langmlm.data.dataset import TokenizedDataset
from langmlm.data.masking import (
    IGNORE_INDEX,
    BatchSizes,
    MaskedBatch,
    MaskingRules,
    fixed_sizes,
    mask_batch,
    masking_rules,
    pad_batch,
)

SPECIAL = np.arange(500) < 5
WORD_START = SPECIAL | (np.arange(500) % 3 == 0)
RULES = MaskingRules(0.15, 42, 4, SPECIAL, None)
WHOLE_WORDS = MaskingRules(0.15, 42, 4, SPECIAL, WORD_START)


@pytest.fixture(scope="module")
def dataset() -> TokenizedDataset:
    "4,000 sequences of 3 to 64 tokens."
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.random(4_000) * 4.2), 3, 64).astype(int)
    return TokenizedDataset(
        Dataset.from_dict({"input_ids": [[0, *rng.integers(5, 500, length - 2), 2] for length in lengths]})
    )


@pytest.fixture(scope="module")
def batch(dataset: TokenizedDataset) -> FlatBatch:
    "All sequences."
    return make_flat_batch(dataset, np.arange(4_000), pad_token_id=1)


def test_shares(batch: FlatBatch):
    "15% predicted, of these 80% masked, 10% random, 10% unchanged; labels restore the batch; special tokens stay."
    masked = mask_batch(batch, epoch=0, rules=RULES)
    restored = masked.input_ids.clone()
    restored[masked.masked_positions] = masked.labels
    assert torch.equal(restored, batch.input_ids) and (masked.labels > 4).all()
    assert (masked.masked_positions.diff() > 0).all()
    inputs = masked.input_ids[masked.masked_positions]
    assert len(inputs) / (batch.input_ids > 4).sum() == pytest.approx(0.15, abs=0.01)
    assert (inputs == 4).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (inputs == masked.labels).float().mean() == pytest.approx(0.1, abs=0.01)
    random = inputs[(inputs != 4) & (inputs != masked.labels)]
    assert (random > 4).all() and len(random.unique()) > 400


@pytest.mark.parametrize("rules", [RULES, WHOLE_WORDS], ids=["tokens", "whole words"])
def test_masks_depend_on_their_keys_alone(dataset: TokenizedDataset, rules: MaskingRules):
    "A sequence has the same masks in every batch; other epochs and seeds have others."

    def masked(row: int, rows: list[int], epoch: int = 0, rules: MaskingRules = rules) -> list[int]:
        flat = make_flat_batch(dataset, rows, pad_token_id=1)
        index = flat.rows.tolist().index(row)
        return mask_batch(flat, epoch, rules).input_ids[flat.cu_seqlens[index] : flat.cu_seqlens[index + 1]].tolist()

    row = int(np.argmax(dataset.lengths))
    assert masked(row, [row]) == masked(row, [0, row, 9]) == masked(row, [9, 7, row, 1])
    others = [masked(row, [row], epoch) for epoch in range(4)]
    others.append(masked(row, [row], rules=MaskingRules(0.15, 7, 4, SPECIAL, rules.word_start)))
    assert len(set(map(tuple, others))) == 5


def test_whole_words(batch: FlatBatch):
    "All tokens of a word are predicted or none, and the share stays."
    masked = mask_batch(batch, epoch=0, rules=WHOLE_WORDS)
    chosen = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    chosen[masked.masked_positions] = True
    begins = torch.from_numpy(WORD_START)[batch.input_ids] | (batch.position_ids == 2)
    ordinary = batch.input_ids > 4
    continues = torch.nonzero(~begins & ordinary & ordinary.roll(1)).flatten()
    assert torch.equal(chosen[continues], chosen[continues - 1])
    assert len(masked.labels) / ordinary.sum() == pytest.approx(0.15, abs=0.01)


def test_probability_of_each_token(batch: FlatBatch):
    "An array gives every token its own share; with whole words, the first token of a word decides."
    probabilities = np.full(500, 0.1)
    probabilities[100:200] = 0.6
    ids = batch.input_ids.numpy()
    for rules in (RULES, WHOLE_WORDS):
        chosen = np.zeros(len(ids), bool)
        chosen[mask_batch(batch, 0, replace(rules, mlm_probability=probabilities)).masked_positions] = True
        deciding = WORD_START[ids] if rules is WHOLE_WORDS else np.ones(len(ids), bool)
        often = (ids >= 100) & (ids < 200) & deciding
        assert chosen[often].mean() == pytest.approx(0.6, abs=0.02)
        assert chosen[deciding & ~often & ~SPECIAL[ids]].mean() == pytest.approx(0.1, abs=0.01)
    uniform = mask_batch(batch, 0, replace(RULES, mlm_probability=np.full(500, RULES.mlm_probability)))
    assert torch.equal(uniform.input_ids, mask_batch(batch, 0, RULES).input_ids)


def test_probability_of_the_first_word(batch: FlatBatch):
    "That of its first token, not that of `<s>` before it, which belongs to the word otherwise."
    probabilities = np.where(SPECIAL, 0.0, 0.5)
    rules = replace(WHOLE_WORDS, mlm_probability=probabilities)
    masked = np.concatenate([mask_batch(batch, epoch, rules).masked_positions.numpy() for epoch in range(8)])
    second = batch.cu_seqlens.numpy()[:-1] + 1
    assert np.isin(masked, second).sum() / (8 * len(second)) == pytest.approx(0.5, abs=0.05)
    scalar, array = (mask_batch(batch, 0, replace(WHOLE_WORDS, mlm_probability=p)) for p in (0.3, np.full(500, 0.3)))
    assert torch.equal(scalar.input_ids, array.input_ids)


@pytest.mark.parametrize("probability", [0.0, 1.0, 15])
def test_invalid_probability(probability: float):
    with pytest.raises(ValueError, match=f"mlm_probability must be above 0 and below 1, got {probability}"):
        masking_rules(None, probability)


def lengths_of(batch: MaskedBatch) -> list[int]:
    "Sizes of the five tensors."
    return [len(tensor) for tensor in vars(batch).values()]


def test_pad_batch(dataset: TokenizedDataset):
    "Padding is sequences of padding, empty sequences and ignored labels, and keeps within the token budget."
    small = mask_batch(make_flat_batch(dataset, np.arange(30), pad_token_id=1), epoch=0, rules=RULES)
    tokens, predictions = len(small.input_ids), len(small.labels)
    padded = pad_batch(small, token_budget=2_048, max_length=64, pad_token_id=1)
    assert [size % 64 for size in lengths_of(padded)] == [0] * 5
    assert torch.equal(padded.input_ids[:tokens], small.input_ids) and (padded.input_ids[tokens:] == 1).all()
    assert torch.equal(padded.labels[:predictions], small.labels)
    assert (padded.labels[predictions:] == IGNORE_INDEX).all() and padded.masked_positions.max() < tokens
    assert padded.cu_seqlens[-1] == len(padded.input_ids) and (padded.cu_seqlens.diff() >= 0).all()
    assert padded.cu_seqlens.diff().max() <= 64 and padded.position_ids.max() <= 65
    assert len(pad_batch(small, token_budget=tokens, max_length=64, pad_token_id=1).input_ids) == tokens
    assert len(pad_batch(small, 2_048, 64, 1, BatchSizes(tokens=2_048)).input_ids) == 2_048
    assert torch.equal(small.to("cpu").labels, small.labels)


def test_few_sizes():
    "A size grows by less than 64 or an eighth, and between two powers of two there are eight sizes."

    def padded_size(tokens: int) -> int:
        ids = torch.zeros(tokens, dtype=torch.int64)
        batch = MaskedBatch(ids, ids, torch.tensor([0, tokens], dtype=torch.int32), ids[:0], ids[:0])
        return len(pad_batch(batch, 10**9, 64, 1).input_ids)

    sizes = {tokens: padded_size(tokens) for tokens in [*range(1, 300), *range(300, 20_000, 37)]}
    assert all(tokens <= size < tokens + max(64, tokens / 8) for tokens, size in sizes.items())
    assert len({size for size in sizes.values() if 8_192 < size <= 16_384}) == 8


def test_fixed_sizes(dataset: TokenizedDataset):
    "All packed batches of a dataset have one shape."
    sizes, bounds = fixed_sizes(dataset.lengths, 8_192, 0.15), pack_sequences(dataset.lengths, 8_192)
    flat = (make_flat_batch(dataset, np.arange(*ends), pad_token_id=1) for ends in zip(bounds[:-1], bounds[1:]))
    padded = [pad_batch(mask_batch(batch, 0, RULES), 8_192, 64, 1, sizes) for batch in flat]
    expected = [8_192, 8_192, sizes.bounds, sizes.predictions, sizes.predictions]
    assert len(padded) > 5 and all(lengths_of(batch) == expected for batch in padded)
