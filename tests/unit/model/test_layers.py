"Replaced layers compute what the stock layers compute, with the same parameters."

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from langmlm.model import attention, layers, triton_attention
from langmlm.model.layers import (
    DeterministicEmbedding,
    FastDropout,
    HalfPrecisionLayerNorm,
    deterministic_algorithms,
    draw_dropout_mask,
    dropout_generator,
    keep_probability,
    replace_layers,
)


def test_dropout_masks():
    "PyTorch's seed decides; the share is the one asked for, neighbors are independent, the limits hold."
    torch.manual_seed(3)
    dropped = draw_dropout_mask((1_000, 1_001), 0.1, dropout_generator())
    torch.manual_seed(3)
    assert torch.equal(draw_dropout_mask((1_000, 1_001), 0.1, dropout_generator()), dropped)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.002)
    assert (dropped[:, 1:] & dropped[:, :-1]).float().mean() == pytest.approx(0.01, abs=0.001)
    limits = [draw_dropout_mask((5,), share, dropout_generator()).any().item() for share in (0.0, 1 - 2**-16)]
    assert limits == [False, True]
    assert keep_probability(0.1) == pytest.approx(0.9, abs=1e-5) and keep_probability(0.0) == 1


def test_fast_dropout():
    "What is kept is scaled, forward and backward alike; evaluation drops nothing."
    layer, ones = FastDropout(0.25), torch.ones(400, 400, requires_grad=True)
    output = layer(ones)
    output.sum().backward()
    assert output.mean().item() == pytest.approx(1, abs=0.01) and torch.equal(ones.grad, output)
    hidden = torch.randn(3, 4)
    assert torch.equal(layer.eval()(hidden), hidden)


@pytest.mark.parametrize(("rows", "padding_idx"), [(50, 1), (5, None), (2, None), (2, 1), (1, None)])
def test_embedding_gradient(rows: int, padding_idx: int | None):
    "The operator torch.ops.aten.embedding_dense_backward still gives the gradient of the stock embedding."
    stock, ours = nn.Embedding(rows, 8, padding_idx), DeterministicEmbedding(rows, 8, padding_idx)
    ours.load_state_dict(stock.state_dict())
    ids, factors = torch.randint(rows, (3, 400)), torch.randn(3, 400, 8)
    assert torch.equal(ours(ids), stock(ids))
    expected, gradient = (torch.autograd.grad((layer(ids) * factors).sum(), layer.weight)[0] for layer in (stock, ours))
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("module", [attention, layers, triton_attention])
def test_operators_of_a_notebook(module: ModuleType):
    "Running the code of a chapter defines operators of its own: the package would crash if its own were replaced."
    before = {name: getattr(torch.ops.langmlm, name) for name in dir(torch.ops.langmlm) if name[0] != "_"}
    assert before
    names = {"__name__": "__main__", "__package__": module.__package__}
    exec(compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec"), names)
    assert {name: getattr(torch.ops.langmlm, name) for name in before} == before


def test_deterministic_algorithms():
    "Both switches are restored, after an error too."
    with pytest.raises(RuntimeError), deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_replace_layers():
    "Nested layers are replaced; subclasses, parameters, their names and the mode stay."

    class OwnDropout(nn.Dropout):
        pass

    model = nn.Sequential(nn.Embedding(9, 8), nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.1)), OwnDropout(0.1)).eval()
    ids, parameters = torch.tensor([3, 1, 3]), dict(model.named_parameters())
    expected = model(ids)
    replace_layers(model)
    kinds = [type(layer) for layer in (model[0], *model[1], model[2])]
    assert kinds == [DeterministicEmbedding, HalfPrecisionLayerNorm, FastDropout, OwnDropout]
    assert torch.equal(model(ids), expected)
    assert {name: id(weight) for name, weight in model.named_parameters()} == {
        name: id(weight) for name, weight in parameters.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
    assert output.dtype == torch.bfloat16 and (output - expected).abs().max() < 0.05
    output.sum().backward()
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}
