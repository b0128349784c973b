"""The Triton kernel and the model around it, on a CPU.

The kernels run in Triton's interpreter, where Triton is installed. The model is tested everywhere, with a CPU version
of the kernels. `tests/integration/test_gpu.py` tests both on a GPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_reference
from packaging.version import Version
from test_roberta import NO_DROPOUT, SIZES, TOKENIZER, batch, loss_and_gradients  # noqa: F401, `batch` is a fixture
from torch import Tensor, nn

from langmlm.data.masking import MaskedBatch
from langmlm.model import roberta, triton_attention
from langmlm.model.roberta import FlatMaskedLM, ModelConfig, build_model, complete_config
from langmlm.model.triton_attention import attend_triton, has_triton_kernel, token_bounds

ROOT = Path(__file__).resolve().parents[3]
HAS_TRITON = find_spec("triton") is not None
MISSING = None if HAS_TRITON else "Triton is not installed: PyTorch for CPUs comes without it, and it is large"
if HAS_TRITON and Version(np.__version__) >= Version("2.4") and Version(version("triton")) < Version("3.7"):
    MISSING = "Triton's interpreter needs Triton 3.7 or newer, or NumPy below 2.4"


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_kernels_in_the_interpreter():
    "In a process of its own, because Triton reads this variable when kernels are defined."
    script = Path(__file__).with_name("triton_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{script.parent}"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4_000:]


def test_token_bounds():
    "Repeated entries are empty sequences; tokens after the last entry form one more sequence."
    edges = torch.tensor([0, 0, 3, 5, 5, 5], dtype=torch.int32)
    assert token_bounds(edges, 5).tolist() == [[0, 0, 0, 3, 3], [3, 3, 3, 5, 5]]
    assert token_bounds(edges, 7).tolist() == [[0, 0, 0, 3, 3, 5, 5], [3, 3, 3, 5, 5, 7, 7]]
    assert token_bounds(edges, 5).dtype == torch.int32


def test_mask_statistics():
    "The share of kept weights is right, and weights near each other, other heads and other seeds are independent."
    for dropped in (26, 128, 154):
        kept = torch.cat([triton_reference.kept_weights(seed, 2, 512, dropped) for seed in (0, 1, 12345)]).float()
        share, count = 1 - dropped / 256, kept.numel()
        spread = (share * (1 - share)) ** 0.5
        assert abs(kept.mean() - share) < 5 * spread / count**0.5
        centered = (kept - share) / spread
        spectrum = torch.fft.rfft(centered.double(), dim=2)
        for rows in (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 64, 128):
            products = spectrum[:, rows:] * spectrum[:, : 512 - rows].conj()  # Sums of products, for all shifts of columns
            sums = torch.fft.irfft(products.sum((0, 1)), n=512)
            for columns in (-64, -16, -9, -8, -7, -3, -2, -1, 0, 1, 2, 3, 7, 8, 9, 16, 64):
                if rows or columns > 0:
                    assert abs(sums[columns] / centered[:, rows:].numel()) < 6 / count**0.5, (rows, columns)
        for rows in (1, 2, 8, 16):  # The corners of a rectangle
            for columns in (1, 2, 8, 16):
                corners = centered * centered.roll(rows, 1) * centered.roll(columns, 2)
                assert abs((corners * centered.roll((rows, columns), (1, 2))).mean()) < 6 / count**0.5
        for first in range(len(centered)):
            for second in range(first):
                assert abs((centered[first] * centered[second]).mean()) < 6 / 512
        for dim in (1, 2):  # Sums of rows and columns vary as binomials do
            assert abs(kept.sum(dim).var() / (512 * spread**2) - 1) < 6 * (2 / (count / 512)) ** 0.5


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    "On CUDA, in half precision, up to 128 values per head, unless it is switched off."
    monkeypatch.setattr(triton_attention, "_is_supported_device", lambda: True)
    half = torch.empty(1, dtype=torch.float16)
    assert not has_triton_kernel(half, 64)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert has_triton_kernel(half, 64) and has_triton_kernel(half.bfloat16(), 128)
    assert not has_triton_kernel(half.float(), 64) and not has_triton_kernel(half, 136)
    monkeypatch.setattr(triton_attention, "_ENABLED", False)
    assert not has_triton_kernel(half, 64)


def test_errors():
    inputs, bounds = [torch.randn(5, 1, 32)] * 3, token_bounds(torch.tensor([0, 5], dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="seed must be a tensor with dropout=0.1, got None"):
        attend_triton(*inputs, bounds, dropout=0.1)
    if not HAS_TRITON:
        with pytest.raises(RuntimeError, match="attend_triton needs Triton"):
            triton_attention._launch(None, "forward", tuple(inputs), (), 256, 0, 1.0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    "The model takes the path of a GPU, with a CPU version of the kernels."
    triton_attention._attend.register_kernel("cpu")(triton_reference.attend)
    triton_attention._attend_backward.register_kernel("cpu")(triton_reference.attend_backward)
    monkeypatch.setattr(roberta, "arrange_rows", lambda *_: None)
    monkeypatch.setattr(roberta, "has_triton_kernel", lambda *_: True)


def make_module(**changes) -> FlatMaskedLM:
    return FlatMaskedLM(build_model(complete_config(ModelConfig(**SIZES | changes), TOKENIZER, max_length=30)))


def after_seeding(module: nn.Module, batch: MaskedBatch, seed: int = 0):  # noqa: F811
    torch.manual_seed(seed)
    return loss_and_gradients(module, batch)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_equals_the_cpu(batch: MaskedBatch, request: pytest.FixtureRequest, backend: str | None):  # noqa: F811
    "Without dropout, loss and gradients are those of the CPU's own path; compiled, in one graph for the whole model."
    module = make_module(**NO_DROPOUT)
    expected = loss_and_gradients(module, batch)
    request.getfixturevalue("on_a_gpu")
    used = module if backend is None else torch.compile(module, backend=backend, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(used, replace(batch)), expected, atol=1e-5, rtol=1e-4)


def test_every_layer_drops_other_weights(batch: MaskedBatch, on_a_gpu: None):  # noqa: F811
    "Seeds differ between layers, and follow from the global generator alone."
    module = make_module()
    hidden = torch.zeros(1, len(batch.input_ids), 32)

    def seeds(seed: int) -> list[int]:
        torch.manual_seed(seed)
        arguments = roberta._attention_arguments(module.model.config, hidden, batch.cu_seqlens)
        return [int(given["seed"]) for given in arguments]

    assert seeds(1) == seeds(1) and len({*seeds(1), *seeds(2)}) == 4


def test_same_seed_same_dropout(batch: MaskedBatch, on_a_gpu: None):  # noqa: F811
    module = make_module(hidden_dropout_prob=0.0)
    first, again, other = (after_seeding(module, batch, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    assert first[0] != other[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_mask(batch: MaskedBatch, on_a_gpu: None, use_reentrant: bool):  # noqa: F811
    "Layers that are computed again drop the same weights, even if the random state were not restored."
    module = make_module(hidden_dropout_prob=0.0)
    expected = after_seeding(module, batch)
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    enable = getattr(module.model, "activation_checkpointing_enable", None)  # The name before transformers 6 is the other
    (enable or module.model.gradient_checkpointing_enable)(options)
    calls, forward = [], roberta.attend_triton
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roberta, "attend_triton", lambda *arguments: calls.append(1) or forward(*arguments))
        torch.testing.assert_close(after_seeding(module, batch), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 3  # The first of two layers twice, the last, of which only a part is called, once
