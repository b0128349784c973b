"Learning rate, optimizers and precision."

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from transformers import RobertaConfig, RobertaForMaskedLM
from transformers.optimization import get_wsd_schedule

from langmlm.train.config import _RULES
from langmlm.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    _bf16_is_native,
    _MuonWithAdamW,
    choose_precision,
    learning_rate_at,
    make_optimizer,
    step_if_finite,
)


def test_options_name_what_there_is():
    "The rules of `TrainingConfig`, which is read without importing PyTorch, repeat the names."
    rules = {names: values for names, values, *_ in _RULES}
    assert rules["optim"] == OPTIMIZERS and rules["lr_scheduler_type"] == tuple(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str):
    "The peak is reached and never exceeded, and no step has a learning rate of 0."
    rates = [learning_rate_at(step, 1_000, 50, 2e-4, schedule) for step in range(1_000)]
    assert max(rates) == 2e-4 and min(rates) > 0
    assert (rates[0] < 2e-4) == (schedule != "constant")


def test_learning_rate():
    "Warm-up is linear, ends at the peak, and all rates are proportional to the peak."
    assert learning_rate_at(0, 1_000, 50, 2e-4) == 2e-4 / 50
    assert learning_rate_at(49, 1_000, 50, 2e-4) == learning_rate_at(50, 1_000, 50, 2e-4) == 2e-4
    assert learning_rate_at(700, 1_000, 50, 1e-4) == learning_rate_at(700, 1_000, 50, 2e-4) / 2
    assert learning_rate_at(0, 1, 0, 2e-4) == 2e-4
    with pytest.raises(KeyError, match="sawtooth"):
        learning_rate_at(60, 1_000, 50, 2e-4, "sawtooth")


@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_warmup_stable_decay(warmup_steps: int):
    "At the peak until the last part of the run, and then as transformers with `decay_type='1-sqrt'`."
    _, optimizer, _ = make_pair(2)
    scheduler = get_wsd_schedule(optimizer, warmup_steps, 30, 120 + warmup_steps, decay_type="1-sqrt")
    for step in range(warmup_steps, 120 + warmup_steps):
        rate = learning_rate_at(step, 120 + warmup_steps, warmup_steps, 1.0, "warmup_stable_decay", 0.25)
        assert rate == pytest.approx(scheduler.lr_lambdas[0](step)) and (rate == 1) == (step <= 90 + warmup_steps)


def test_stable_phase_does_not_depend_on_the_length():
    "A run that is made longer before its decay continues as if it had been planned so."
    short, long = ([learning_rate_at(step, total, 5, 1e-3, "warmup_stable_decay") for step in range(80)] for total in (100, 300))
    assert short == long


def make_pair(size: int) -> tuple:
    "Make a matrix, a vector, and an optimizer for each."
    matrix, vector = nn.Parameter(torch.ones(size, size)), nn.Parameter(torch.ones(size))
    return [matrix, vector], Muon([matrix], lr=0.1, momentum=0.9), AdamW([vector], lr=0.1, fused=True)


def step_all(weights: list, *optimizers) -> None:
    "Set gradients that depend on the weights, and step."
    for weight in weights:
        weight.grad = torch.sin(torch.arange(weight.numel())).view_as(weight) + weight.detach()
    for optimizer in optimizers:
        optimizer.step()


def test_muon_with_adamw_equals_both_alone():
    "Also after a copy, and after a state was loaded, as Accelerate does before the first step."
    apart, muon, adamw = make_pair(4)
    together, *pair = make_pair(4)
    joined = _MuonWithAdamW(*pair)
    for _ in range(3):
        joined.load_state_dict(joined.state_dict())
        step_all(apart, muon, adamw)
        step_all(together, joined)
    copied, twin = copy.deepcopy((together, joined))
    step_all(apart, muon, adamw)
    step_all(together, joined)
    step_all(copied, twin)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(together + copied, apart + apart))
    assert {weight.ndim: sorted(state) for weight, state in joined.state.items()} == {
        1: ["exp_avg", "exp_avg_sq", "step"],
        2: ["momentum_buffer"],
    }


def test_muon_with_adamw_returns_the_loss():
    "A closure is called once, before both steps."
    weights, *pair = make_pair(2)
    calls = []
    assert _MuonWithAdamW(*pair).step(lambda: calls.append(1) or torch.tensor(3.0)) == 3 and calls == [1]


def test_muon_accepts_matrices_of_one_group():
    "PyTorch raises for everything else."
    (matrix, vector), muon, _ = make_pair(4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        _MuonWithAdamW(muon, AdamW([matrix, vector]))
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        Muon([vector])


@pytest.fixture(scope="module")
def model() -> RobertaForMaskedLM:
    "A small model."
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=300, **sizes))


def group_names(model: nn.Module, optim: str) -> list[list[str]]:
    "Return the names of the weights of each parameter group."
    names = {weight: name for name, weight in model.named_parameters()}
    return [[names[weight] for weight in group["params"]] for group in make_optimizer(model, optim).param_groups]


def test_parameter_groups(model):
    "Vectors have no weight decay; Muon gets the matrices of the layers, AdamW those of embeddings and head."
    decay, no_decay = group_names(model, "adamw_torch_fused")
    assert all(name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name for name in no_decay)
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decay)
    by_muon, by_adamw, still_no_decay = group_names(model, "muon")
    assert still_no_decay == no_decay and set(by_muon) | set(by_adamw) == set(decay)
    assert all(name.startswith("roberta.encoder.layer.") for name in by_muon)
    assert all("embeddings" in name or "lm_head" in name for name in by_adamw)
    assert [group["weight_decay"] for group in make_optimizer(model, "muon").param_groups] == [0.01, 0.01, 0.0]


def test_optimizer_options(model):
    "Every argument reaches the optimizer; the kernel is fused unless `adamw_torch` is asked for."
    assert OPTIMIZERS == ("adamw_torch_fused", "adamw_torch", "muon")
    assert make_optimizer(model).defaults["fused"] and not make_optimizer(model, "adamw_torch").defaults["fused"]
    for optim in OPTIMIZERS:
        adamw = make_optimizer(model, optim, weight_decay=0.3, betas=(0.5, 0.6), epsilon=1e-3)
        assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.5, 0.6), 1e-3)
        assert {group["weight_decay"] for group in adamw.param_groups} == {0.3, 0.0}
        assert make_optimizer(model, optim, betas=(0, 0.9)).defaults["betas"] == (0.0, 0.9)  # PyTorch takes no 0 for 0.0
    with pytest.raises(ValueError, match="optim must be one of .*, got 'sgd'"):
        make_optimizer(model, optim="sgd")
    with pytest.raises(ValueError, match="empty parameter list"):
        make_optimizer(nn.Linear(2, 2), optim="muon")


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_gradients_are_skipped(optim: str, value: float):
    "Neither weights nor optimizer state change; a finite gradient steps."
    layers = nn.ModuleDict({"encoder": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    optimizer = make_optimizer(layers, optim)
    initial = [weight.detach().clone() for weight in layers.parameters()]
    sum(weight.sin().sum() for weight in layers.parameters()).backward()
    step_if_finite(optimizer, torch.tensor(1.0))
    assert not any(torch.equal(weight, then) for weight, then in zip(layers.parameters(), initial))
    before = [weight.detach().clone() for weight in layers.parameters()]
    state = [tensor.clone() for tensors in optimizer.state.values() for tensor in tensors.values()]
    layers["head"].weight.grad[0, 0] = value
    step_if_finite(optimizer, torch.tensor(value))
    assert all(torch.equal(weight, then) for weight, then in zip(layers.parameters(), before))
    now = [tensor for tensors in optimizer.state.values() for tensor in tensors.values()]
    assert state and all(torch.equal(tensor, then) for tensor, then in zip(now, state, strict=True))


def test_precision():
    "bf16 where it is native or asked for, fp16 only on a GPU."
    assert choose_precision("cpu", bf16=False) == "no" and choose_precision("cpu", bf16=True) == "bf16"
    assert choose_precision("cpu") == ("bf16" if _bf16_is_native("cpu") else "no")
    assert choose_precision("cuda", fp16=True) == "fp16"
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_precision("cpu", fp16=True)
    with pytest.raises(ValueError, match="cannot both be True"):
        choose_precision("cpu", bf16=True, fp16=True)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_on_old_gpus(monkeypatch, capability: tuple, native: bool):
    "Asking for it there is an error with a remedy; not asking leaves it out."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("cuda") == ("bf16" if native else "no") and choose_precision("cuda", fp16=True) == "fp16"
    if native:
        assert choose_precision("cuda", bf16=True) == "bf16"
    else:
        with pytest.raises(ValueError, match="bf16=True needs a GPU of compute capability 8.0 or above: set fp16=True"):
            choose_precision("cuda", bf16=True)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_on_gpus(monkeypatch, capability: tuple, native: bool):
    "GPUs support bf16 from compute capability 8.0 on."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _bf16_is_native("cuda") == native
    assert not _bf16_is_native("mps")


def test_private_api_of_torch():
    "The private functions that tell whether a CPU has bf16; if they are gone, use torch.cpu.get_capabilities()."
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
