"What a sharded run cannot do is an error before it begins; elsewhere FSDP changes nothing."

import pytest
import torch

from langmlm.train.config import TrainingConfig
from langmlm.train.launch import make_accelerator
from langmlm.train.sharding import check_sharding, gather_model, gather_run, is_sharded_run, shard_like

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({}, {"FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        ({"optim": "muon"}, {}, "set optim='adamw_torch_fused'"),
        ({"torch_compile": True}, {}, "leave out torch_compile=True"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "leave out --fsdp_offload_params"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set gradient_checkpointing=True"),
    ],
)
def test_what_is_not_supported(launched: pytest.MonkeyPatch, options: dict, variable: dict, message: str):
    check_sharding(TrainingConfig(use_cpu=True))
    for name, value in variable.items():
        launched.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_sharding(TrainingConfig(use_cpu=True, **options))


def test_a_single_process_is_not_sharded(launched: pytest.MonkeyPatch):
    assert is_sharded_run()
    launched.setenv("WORLD_SIZE", "1")
    assert not is_sharded_run()
    assert make_accelerator(TrainingConfig(use_cpu=True, bf16=False)).num_processes == 1


def test_whole_models_are_returned_as_they_are():
    model, value = torch.nn.Linear(3, 2), torch.ones(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    assert gather_model(model) is model and gather_model(model, torch.device("cpu")) is model
    assert gather_run(model, optimizer) == (model, {"weight": {}, "bias": {}})
    assert shard_like(value, model.weight) is value
