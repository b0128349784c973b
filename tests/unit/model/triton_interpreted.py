"""The Triton kernels on a CPU, through Triton's interpreter; `test_triton_attention.py` runs this file.

By hand: `TRITON_INTERPRET=1 python -m pytest --noconftest -c /dev/null tests/unit/model/triton_interpreted.py`, which
needs Triton 3.7 (or an older one with NumPy below 2.4), and no other package of langmlm than PyTorch.
"""

import os
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_reference import attend_reference, kept_weights

from langmlm.model import triton_attention
from langmlm.model.triton_attention import attend_triton, token_bounds, window_bounds

LENGTHS = {
    "one": [1],
    "short": [3, 1, 7, 5, 2],
    "empty": [0, 4, 0, 0, 13, 0],
    "crossing": [5, 33, 40, 0, 0],
    "long": [2, 130, 20],
    "aligned": [32, 64, 64],
    "whole": [150],
}


def bounds_of(lengths: list[int]) -> Tensor:
    return token_bounds(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), sum(lengths))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    "Few tokens, several tiles."
    sizes = {name: dict.fromkeys((32, 64, 128), (32, 16, 4, 1, 0)) for name in ("forward", "grad_query")}
    sizes["grad_key"] = dict.fromkeys((32, 64, 128), (16, 32, 4, 1, 0))
    monkeypatch.setattr(triton_attention, "_CONFIGS", sizes)


def relative_error(found: Tensor, expected: Tensor) -> float:
    "Maximum error, as a share of the largest value; near zero, the error itself."
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=0.1))


@pytest.mark.parametrize(("case", "dropout"), [*product(LENGTHS, (0.0, 0.1)), ("crossing", 0.6)])
def test_equals_the_reference(case: str, dropout: float, size=32, dtype=torch.float32, tolerance=1e-5, heads=2, window=None):
    "Output and gradients, with the mask of dropout computed by other means."
    torch.manual_seed(len(case))
    bounds, seed = bounds_of(LENGTHS[case]), torch.tensor([5])
    bounds = bounds if window is None else window_bounds(bounds, window)
    tokens, dropped = bounds.shape[1], round(dropout * 256)
    inputs = [torch.randn(tokens, heads, size, dtype=dtype, requires_grad=True) for _ in range(3)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gradient = torch.randn(tokens, heads, size, dtype=dtype)
    output = attend_triton(*inputs, bounds, dropout, 0.2, seed)
    output.backward(gradient)
    kept = kept_weights(5, heads, tokens, dropped) if dropped else None
    expected = attend_reference(*doubles, bounds, 0.2, kept, dropped)
    expected.backward(gradient.double())
    assert relative_error(output, expected) < tolerance
    for tensor, double in zip(inputs, doubles):
        assert relative_error(tensor.grad, double.grad) < tolerance


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128])
def test_head_sizes(size: int):
    test_equals_the_reference("crossing", 0.1, size, heads=1)


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("window", [1, 8, 40])
def test_windows(case: str, window: int):
    "Narrower and wider than a tile."
    test_equals_the_reference(case, 0.1, window=window, heads=1)


def test_half_precision():
    "In float16; the interpreter has no matrix products of bfloat16."
    test_equals_the_reference("crossing", 0.1, 32, torch.float16, 5e-3, heads=1)


def test_mask_does_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    inputs = [torch.randn(70, 1, 32, requires_grad=True) for _ in range(3)]
    results = []
    for tile in ((32, 16, 4, 1, 0), (16, 64, 4, 1, 0), (64, 32, 4, 1, 0)):
        sizes = {name: {32: tile} for name in ("forward", "grad_query", "grad_key")}
        monkeypatch.setattr(triton_attention, "_CONFIGS", sizes)
        output = attend_triton(*inputs, bounds_of([9, 41, 20]), 0.3, seed=torch.tensor([7]))
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for result in results[1:]:
        assert max(map(relative_error, result, results[0])) < 1e-5


def test_strided_inputs():
    "Transposed and interleaved inputs and gradients, as a model has them, give the same bits as contiguous ones."
    torch.manual_seed(0)
    packed, gradient = torch.randn(45, 3, 2, 32), torch.randn(2, 45, 32)
    results = []
    for inputs, upstream in (
        ([tensor.contiguous() for tensor in packed.unbind(1)], gradient.transpose(0, 1).contiguous()),
        (packed.unbind(1), gradient.transpose(0, 1)),
        (packed.unbind(1), gradient.mT.contiguous().mT.transpose(0, 1)),  # Not contiguous in the last dimension
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = attend_triton(*leaves, bounds_of([5, 0, 40]), 0.1, seed=torch.tensor([3]))
        results.append((output, *torch.autograd.grad(output, leaves, upstream)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_tokens():
    empty = torch.empty(0, 2, 32, requires_grad=True)
    attend_triton(empty, empty, empty, bounds_of([0])).sum().backward()
    assert empty.grad.shape == empty.shape


def test_operators():
    "PyTorch's own checks of custom operators."
    bounds, inputs = bounds_of([3, 6]), [torch.randn(9, 1, 32, requires_grad=True) for _ in range(3)]
    checks = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    torch.library.opcheck(triton_attention._attend, (*inputs, bounds, torch.tensor([1]), 26, 0.1), **checks)
    torch.library.opcheck(triton_attention._attend, (*inputs, bounds, None, 0, 0.1), **checks)


def test_one_graph():
    "The kernels do not divide a compiled function."
    inputs = torch.randn(3, 9, 1, 32, requires_grad=True)

    def attend(inputs: Tensor) -> Tensor:
        return attend_triton(*inputs.unbind(0), bounds_of([3, 6])).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(function(inputs), inputs)[0] for function in (compiled, attend))
    assert torch.equal(found, expected)
