"On equal weights and masks, loss and gradients are those of the stock model on a padded batch."

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_attention import attend_by_sequence
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from langmlm.config import ConfigError
from langmlm.data.masking import IGNORE_INDEX, MaskedBatch, pad_batch
from langmlm.model import attention, roberta
from langmlm.testing import tiny_run
from langmlm.model.roberta import (
    _LOGITS_ROWS,
    FlatMaskedLM,
    ModelConfig,
    build_model,
    find_mismatches,
    linear_cross_entropy,
    complete_config,
)

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Tokenizer(SimpleNamespace):
    "As much of a tokenizer as a config depends on."

    def __len__(self) -> int:
        return 300


TOKENIZER = Tokenizer(pad_token_id=1, cls_token_id=0, sep_token_id=2)


@pytest.fixture
def model() -> RobertaForMaskedLM:
    return build_model(complete_config(ModelConfig(**SIZES, **NO_DROPOUT), TOKENIZER, max_length=30))


@pytest.fixture(scope="module")
def batch() -> MaskedBatch:
    "40 sequences of 3 to 30 tokens; every seventh token is predicted."
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(3, 31, 40))
    starts = np.concatenate([[0], lengths.cumsum()])
    ids, positions = torch.from_numpy(rng.integers(5, 300, starts[-1])), np.arange(starts[-1])
    masked = torch.from_numpy(positions[::7])
    restarting = torch.from_numpy(positions - np.repeat(starts[:-1], lengths) + 2)
    return MaskedBatch(ids, restarting, torch.from_numpy(starts.astype(np.int32)), masked, ids.roll(5)[::7].clone())


def loss_and_gradients(module: nn.Module, batch: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    "The mean loss, and the gradients that there are."
    module.zero_grad()
    loss = module(**vars(batch)) / (batch.labels != IGNORE_INDEX).sum()
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in module.model.named_parameters()}


def test_equals_the_stock_model(model: RobertaForMaskedLM, batch: MaskedBatch):
    "This also fails if the internal modules of RobertaForMaskedLM that `encode` calls move or change."
    lengths = batch.cu_seqlens.diff().tolist()
    flat_labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    flat_labels[batch.masked_positions] = batch.labels
    ids, labels = (
        nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True, padding_value=value)
        for flat, value in ((batch.input_ids, 1), (flat_labels, IGNORE_INDEX))
    )
    expected = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
    expected.backward()
    expected_gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    module = FlatMaskedLM(model)
    loss, gradients = loss_and_gradients(module, batch)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=0)
    padded = loss_and_gradients(module, pad_batch(batch, 4_096, 30, pad_token_id=1))
    torch.testing.assert_close(padded, (loss, gradients), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < abs(loss_and_gradients(module, batch)[0] - loss) < 0.01


def test_positions_from_zero(model: RobertaForMaskedLM, batch: MaskedBatch):
    "Positions that do not begin after the padding id give other hidden states."
    inputs = list(vars(batch).values())[:4]
    module = FlatMaskedLM(model).eval()
    shifted = [inputs[0], inputs[1] - 2, *inputs[2:]]
    assert (module.encode(*inputs) - module.encode(*shifted)).abs().max() > 0.5


def test_sequences_do_not_leak(model: RobertaForMaskedLM, batch: MaskedBatch):
    "A change in the first sequence reaches no prediction of another."
    module = FlatMaskedLM(model).eval()
    changed = batch.input_ids.clone()
    changed[2] = 299
    first, second = (module.encode(ids, *list(vars(batch).values())[1:4]) for ids in (batch.input_ids, changed))
    others = batch.masked_positions >= batch.cu_seqlens[1]
    assert torch.equal(first[others], second[others]) and not torch.equal(first, second)


def test_saved_as_a_stock_model(model: RobertaForMaskedLM, batch: MaskedBatch, tmp_path):
    FlatMaskedLM(model)
    model.save_pretrained(tmp_path)
    loaded = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


def test_build_model(model: RobertaForMaskedLM):
    "The random initialization depends on the seed alone, and leaves generators and the default device alone."
    state = torch.random.get_rng_state()
    with torch.device("meta"), patch("torch.cuda.manual_seed_all") as seed_gpus:
        same, other = build_model(model.config), build_model(model.config, seed=7)
    seed_gpus.assert_not_called()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(same.lm_head.dense.weight, model.lm_head.dense.weight)
    assert not torch.equal(other.lm_head.dense.weight, model.lm_head.dense.weight)


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_linear_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch):
    "Equals the textbook loss, whatever the size of a chunk."
    monkeypatch.setitem(_LOGITS_ROWS, "cpu", rows)
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((50, 16), (1_000, 16), (1_000,))]
    labels = torch.randint(1_000, (50,))
    labels[-3:] = IGNORE_INDEX
    expected = F.cross_entropy(F.linear(*inputs), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = linear_cross_entropy(*inputs, labels)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=0)
    gradients = (torch.autograd.grad(value / 10, inputs) for value in (loss, expected))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = linear_cross_entropy(*inputs, labels)
    assert narrow.dtype == torch.float32 and abs(narrow / expected - 1) < 0.01
    assert linear_cross_entropy(*inputs, torch.full((50,), IGNORE_INDEX)) == 0
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(*inputs, labels + 1_000)


def test_find_mismatches():
    config = complete_config(ModelConfig(**SIZES), TOKENIZER, max_length=64)
    assert (config.vocab_size, config.max_position_embeddings) == (300, 66)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert find_mismatches(config, TOKENIZER, 64) == []
    small = RobertaConfig(vocab_size=200, max_position_embeddings=65, pad_token_id=3, bos_token_id=0, eos_token_id=2)
    errors = find_mismatches(small, TOKENIZER, 64)
    assert [error.partition("=")[0] for error in errors] == ["vocab_size", "max_position_embeddings", "pad_token_id"]
    with pytest.raises(ConfigError, match="vocab_size=200 is too small"):
        complete_config(ModelConfig(vocab_size=200), TOKENIZER, 64)


def test_invalid_values_are_reported_together():
    values = {"num_hidden_layers": 0, "hidden_dropout_prob": 1.0, "layer_norm_eps": 0.0, "hidden_act": "glue"}
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values, is_decoder=True)
    assert all(f"{name} must be" in str(caught.value) for name in (*values, "is_decoder"))
    with pytest.raises(ConfigError, match="hidden_size must be a multiple of num_attention_heads=12, got 100"):
        ModelConfig(hidden_size=100)
    with pytest.raises(ConfigError, match="hidden_size / num_attention_heads must be even in ModernBERT, got 31"):
        ModelConfig(model_type="modernbert", hidden_size=62, num_attention_heads=2)
    assert ModelConfig(hidden_size=62, num_attention_heads=2).hidden_size == 62


def flash_attention(query, key, value, cu_seqlens, max_seqlen, dropout, scale):
    "What the kernel returns without dropout; its other outputs have no contents."
    assert cu_seqlens.diff().max() <= max_seqlen  # Beyond it, the kernel would leave tokens out
    output = attend_by_sequence(query, key, value, cu_seqlens, scale)
    return output, torch.empty(0), torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)


def flash_attention_backward(gradient, query, key, value, cu_seqlens, output, logsumexp, rng_state, unused, *options):
    "The gradients of attention, written out."
    *_, scale = options
    gradients, bounds = [torch.empty_like(part) for part in (query, key, value)], cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:]):
        q, k, v, g = (part[start:end].transpose(0, 1) for part in (query, key, value, gradient))
        weights = torch.softmax(q @ k.mT * scale, -1)
        grad_weights = g @ v.mT
        grad_logits = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        for part, made in zip(gradients, (grad_logits @ k, grad_logits.mT @ q, weights.mT @ g)):
            part[start:end] = made.transpose(0, 1)
    return tuple(gradients)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_the_kernel_is_compiled_with_the_model(
    family: str, model: RobertaForMaskedLM, batch: MaskedBatch, monkeypatch: pytest.MonkeyPatch
):
    "With a CPU version of the kernel, loss and gradients are those of a CPU, in one graph for the whole model."
    if family == "bert":
        config = BertConfig(**SIZES, **NO_DROPOUT, vocab_size=300, max_position_embeddings=30, pad_token_id=1)
        model = BertForMaskedLM(config)
    attention._flash_attention.register_kernel("cpu")(flash_attention)
    attention._flash_attention_backward.register_kernel("cpu")(flash_attention_backward)
    module = FlatMaskedLM(model)
    expected = loss_and_gradients(module, batch)
    monkeypatch.setattr(roberta, "arrange_rows", lambda *_: None)  # As on a GPU
    monkeypatch.setattr(attention, "_has_flash_attention", lambda _: True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, replace(batch)), expected)


def test_a_model_in_training_says_how_to_call_it(tmp_path):
    "Its attention was replaced; without flat batches, transformers would call it with arguments that are missing."
    task = tiny_run(tmp_path)
    with pytest.raises(RuntimeError, match="load `final_model` or a checkpoint"):
        task.model(**task.tokenizer("a", return_tensors="pt"))
