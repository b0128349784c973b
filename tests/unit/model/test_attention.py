"Every path of attention equals attention sequence by sequence, and the private operators beneath are as expected."

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from langmlm.model import attention
from langmlm.model.attention import arrange_rows, attend_in_rows, attend_varlen

LENGTHS = [3, 5, 5, 8, 17, 33, 40, 64]
CU_SEQLENS = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
LAYOUT = arrange_rows(CU_SEQLENS, heads=2)

warnings.filterwarnings("ignore", message=".*nested tensors", category=UserWarning)


def attend_by_sequence(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None = None):
    "The reference: one call for each sequence."
    pieces = []
    for parts in zip(*(tensor.split(cu_seqlens.diff().tolist()) for tensor in (query, key, value))):
        heads_first = (part.transpose(0, 1) for part in parts)
        pieces.append(F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture
def inputs() -> Tensor:
    "Query, key and value."
    return torch.randn(3, sum(LENGTHS), 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def output_and_gradients(function, inputs: Tensor, *arguments, **options) -> tuple[Tensor, ...]:
    "What a function returns, and the gradients of a weighted sum of it."
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, *arguments, **options)
    factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output.detach(), *torch.autograd.grad((output * factors).sum(), leaves)


def test_arrange_rows():
    "Sequences of similar length share a block; rows have the heads first, and repeat the last token as padding."
    assert [(len(block.sources) // block.length, block.length) for block in LAYOUT[0]] == [(8, 8), (2, 17), (4, 40), (2, 64)]
    sequences = iter(torch.arange(sum(LENGTHS)).split(LENGTHS))
    for block in LAYOUT[0]:
        tokens, heads = (part.view(-1, 2, block.length) for part in (block.sources // 2, block.sources % 2))
        assert (heads == torch.arange(2)[:, None]).all()
        for row, sequence in zip(range(len(tokens)), sequences):
            expected = F.pad(sequence, (0, block.length - len(sequence)), value=int(sequence[-1]))
            assert (tokens[row] == expected).all()
            padding = torch.arange(block.length) >= len(sequence)
            assert torch.equal(padding, torch.zeros_like(padding) if block.padding is None else block.padding[row, 0, 0])
    placed = torch.cat([block.sources for block in LAYOUT[0]])
    assert (placed[LAYOUT[1]] == torch.arange(2 * sum(LENGTHS))).all()


def test_blocks_of_rows():
    "Long sequences are divided over several blocks; empty sequences are left out, and so is an empty batch."
    full_rows = torch.arange(0, 512 * 5, 512, dtype=torch.int32)
    assert [len(block.sources) for block in arrange_rows(full_rows, heads=1)[0]] == [2 * 512, 2 * 512]
    assert 2 * 512**2 == attention._LOGITS_PER_BLOCK
    ((block,), _) = arrange_rows(torch.tensor([0, 4, 4, 4], dtype=torch.int32), heads=1)
    assert (block.start, block.length, block.sources.tolist(), block.padding) == (0, 4, [0, 1, 2, 3], None)
    empty = torch.zeros(0, 2, 4)
    assert attend_in_rows(empty, empty, empty, arrange_rows(torch.tensor([0], dtype=torch.int32), 2)).shape == (0, 2, 4)


def test_the_order_of_the_sequences_is_free(inputs: Tensor):
    "Blocks need not be sorted by length; adjacent sequences of different size classes make blocks of their own."
    lengths = [64, 3, 40, 5, 5, 33, 8, 17]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    expected = output_and_gradients(attend_by_sequence, inputs, cu_seqlens)
    found = output_and_gradients(attend_in_rows, inputs, arrange_rows(cu_seqlens, heads=2))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("function", "arguments"), [(attend_in_rows, [LAYOUT]), (attend_varlen, [CU_SEQLENS, 64])])
def test_equals_the_reference(inputs: Tensor, function, arguments: list, scale: float | None):
    expected = output_and_gradients(attend_by_sequence, inputs, CU_SEQLENS, scale=scale)
    found = output_and_gradients(function, inputs, *arguments, scale=scale)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_sequences_are_independent(inputs: Tensor):
    "A change in the first sequence reaches no other, not even in the same block."
    changed = inputs.clone()
    changed[2, :3] += 1
    difference = (attend_in_rows(*changed, LAYOUT) - attend_in_rows(*inputs, LAYOUT)).abs().amax((1, 2))
    assert (difference[:3] > 0).all() and (difference[3:] == 0).all()
    changed[:, :3] = torch.nan
    found = output_and_gradients(attend_in_rows, changed, LAYOUT)
    assert all(part[:3].isnan().all() and not part[3:].isnan().any() for part in found)


def test_a_layout_of_other_tokens_or_heads(inputs: Tensor):
    with pytest.raises(IndexError, match="out of range"):
        attend_in_rows(*inputs[:, :-1], LAYOUT)
    with pytest.raises(RuntimeError, match="shape"):
        attend_in_rows(*inputs, arrange_rows(CU_SEQLENS, heads=1))


@pytest.mark.parametrize(("function", "arguments"), [(attend_in_rows, [LAYOUT]), (attend_varlen, [CU_SEQLENS, 64])])
def test_dropout(inputs: Tensor, function, arguments: list):
    "Draws differ, and their mean is the output without dropout."
    torch.manual_seed(0)
    expected = attend_by_sequence(*inputs, CU_SEQLENS)
    draws = torch.stack([function(*inputs, *arguments, dropout=0.2) for _ in range(200)])
    assert (draws[0] != draws[1]).any() and (draws.mean(0) - expected).abs().mean() < 0.05


def test_gradient_of_dropout(inputs: Tensor):
    "For a fixed draw, the gradient is the derivative."

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend_in_rows(query, key, value, arrange_rows(CU_SEQLENS[:5], heads=1), dropout=0.2)

    small = [tensor[:21, :1, :4].clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(attend, small)


def test_softmax_backward_data():
    "torch._softmax_backward_data (private) is the derivative of the softmax, with these four arguments."
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    weights, gradient = torch.softmax(logits, -1), torch.randn(4, 9, dtype=torch.float64)
    found = torch._softmax_backward_data(gradient, weights.detach(), -1, weights.dtype)
    torch.testing.assert_close(found, torch.autograd.grad(weights, logits, gradient)[0])


def test_flash_attention_operators():
    "torch.ops.aten._flash_attention_* (private) have the arguments and results that we pass and read."
    names = {
        "_flash_attention_forward": (
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale",
            5,
        ),
        "_flash_attention_backward": (
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state "
            "unused scale",
            3,
        ),
    }
    for name, (arguments, results) in names.items():
        schema = getattr(torch.ops.aten, name).default._schema
        assert " ".join(argument.name for argument in schema.arguments).startswith(arguments)
        assert len(schema.returns) == results


def test_flash_attention_without_a_gpu(inputs: Tensor):
    "On tensors without contents, the call is accepted and every input gets a gradient; on a CPU it is not used."
    shapes = [tensor.to("meta", torch.bfloat16).requires_grad_() for tensor in inputs]
    attention._flash_attention(*shapes, CU_SEQLENS.to("meta"), 64, 0.1, 0.25)[0].sum().backward()
    assert [tensor.grad.shape for tensor in shapes] == [inputs[0].shape] * 3
    assert not attention._has_flash_attention(inputs[0])
    own = attention._flash_attention.set_kernel_enabled("cpu", False)  # Another test may have registered a kernel
    with own, pytest.raises(NotImplementedError, match="CPU"):
        attention._flash_attention(*inputs, CU_SEQLENS, 64, 0.0, 0.25)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_weights_are_freed(inputs: Tensor, checkpointed: bool, monkeypatch):
    "After the backward pass, even while the loss is alive; with gradient checkpointing, after the forward pass."
    softmax, made = torch.softmax, []

    def recorded(*arguments) -> Tensor:
        result = softmax(*arguments)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(torch, "softmax", recorded)
    leaves, alive = [tensor.clone().requires_grad_() for tensor in inputs], lambda: sum(weight() is not None for weight in made)
    if checkpointed:
        output = checkpoint(attend_in_rows, *leaves, LAYOUT, 0.1, use_reentrant=False)
        assert len(made) == len(LAYOUT[0]) and alive() == 0
    else:
        output = attend_in_rows(*leaves, LAYOUT, 0.1)
        assert alive() == len(LAYOUT[0])
    output.sum().backward()
    assert alive() == 0 and all(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("length", [11, 12, 13])
def test_the_shortest_sequences_with_a_window(length: int):
    "A window of 10 excludes the first pair of tokens in a sequence of 12."
    query, key, value = torch.randn(3, length, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)
    near = (positions[:, None] - positions).abs() <= 10
    heads_first = (tensor.transpose(0, 1) for tensor in (query, key, value))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=near).transpose(0, 1)
    found = attend_in_rows(query, key, value, arrange_rows(torch.tensor([0, length]), heads=1), window=10)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_padding_outside_of_every_window(inputs: Tensor):
    "Padding that is farther from its sequence than the window has no key with a weight; nothing becomes NaN."
    lengths = [3, 16, 1, 4, 151]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()

    def attend_nearby(*tensors: Tensor) -> Tensor:
        sequence, positions = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)), torch.arange(sum(lengths))
        near = ((positions[:, None] - positions).abs() <= 2) & (sequence[:, None] == sequence)
        heads_first = (tensor.transpose(0, 1) for tensor in tensors)
        return F.scaled_dot_product_attention(*heads_first, attn_mask=near).transpose(0, 1)

    expected = output_and_gradients(attend_nearby, inputs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.1)):
        found = output_and_gradients(attend_in_rows, inputs.to(dtype), arrange_rows(cu_seqlens, heads=2), window=2)
        torch.testing.assert_close([part.double() for part in found], [*expected], atol=tolerance, rtol=tolerance)
