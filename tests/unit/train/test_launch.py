"Devices, processes and signals."

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized
from forks import forked_python
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from langmlm.data.masking import mask_batch
from langmlm.model.attention import _has_flash_attention
from langmlm.model import triton_attention
from langmlm.model.triton_attention import has_triton_kernel
from langmlm.train.config import TrainingConfig
from langmlm.train.launch import (
    StopRequest,
    _check_processes,
    check_importable,
    count_processes,
    explain_inexact,
    launch_processes,
    make_accelerator,
    signal_exit,
    start_trackers,
    stop_on_signals,
)

CONFIG = TrainingConfig(bf16=False, use_cpu=True)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def test_precision_changes_within_a_process():
    "Accelerate would keep the precision of the first run."
    assert make_accelerator(replace(CONFIG, bf16=True)).mixed_precision == "bf16"
    assert make_accelerator(CONFIG).mixed_precision == "no"


def test_device_changes_within_a_process():
    "Accelerate would keep the device of the first run."
    make_accelerator(CONFIG)
    PartialState._shared_state["device"] = torch.device("cuda")  # As if the run before had been on a GPU
    assert make_accelerator(CONFIG).device.type == "cpu"


def test_environment_does_not_scale_gradients(monkeypatch: pytest.MonkeyPatch):
    "Accelerate would divide the loss by the number in the variable, and compile the model."
    module = torch.nn.Linear(3, 1)
    gradients = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER" if steps == "4" else "NO")
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make_accelerator(CONFIG)
        assert accelerator.gradient_accumulation_steps == 1 and accelerator.state.dynamo_plugin.backend.value == "NO"
        accelerator.backward(module(torch.ones(3)).sum())
        gradients.append(module.weight.grad.clone())
        module.weight.grad = None
    assert torch.equal(*gradients) and gradients[0].sum() == 3


@pytest.mark.parametrize(
    ("variable", "name"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron")],
)
def test_sharding_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str, name: str):
    "What is not supported is named, with the variable that asks for it."
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"^{name}.* is not supported.* unset {variable}"):
        make_accelerator(CONFIG)
    monkeypatch.setenv(variable, "false")
    make_accelerator(CONFIG)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "head_size", "reason"),
    [
        ("cpu", None, "no", 64, None),
        ("cuda", (8, 0), "bf16", 64, None),
        ("cuda", (9, 0), "fp16", 256, None),
        ("cuda", (9, 0), "no", 64, "float32"),
        ("cuda", (9, 0), "bf16", 20, None),
        ("cuda", (9, 0), "bf16", 132, "heads of 132 dimensions"),
        ("cuda", (9, 0), "bf16", 264, "heads of 264 dimensions"),
        ("cuda", (7, 5), "fp16", 64, "a GPU of compute capability 7.5"),
        ("cuda", (7, 0), "no", 64, "a GPU of compute capability 7.0"),
    ],
)
def test_inexact_runs(monkeypatch, device: str, capability, precision: str, head_size: int, reason: str | None):
    "Where PyTorch's kernel with atomic additions is used, the reason is given; nowhere else."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    found = explain_inexact(torch.device(device), precision, head_size)
    assert (found is None) if reason is None else f"the attention kernel for {reason}" in found


def test_compiled_runs_on_a_cpu():
    "What is compiled depends on the batches that come first; a GPU gets batches of one shape."
    assert "a resumed run" in explain_inexact(torch.device("cpu"), "no", 64, compiled=True)
    assert explain_inexact(torch.device("cpu"), "no", 64) is None


def test_a_process_that_was_stopped_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    "SIGTERM to one process saves a checkpoint in all of them: the caller ends as if it had received the signal."

    def stop(config: LaunchConfig, function: Callable) -> Callable:
        def raise_error(*args):
            raise ChildFailedError("train", {0: ProcessFailure(0, 1, 143, "<N/A>")})

        return raise_error

    monkeypatch.setattr("langmlm.train.launch.elastic_launch", stop)
    with pytest.raises(SystemExit) as ended:
        launch_processes(len, ((),), 2)
    assert ended.value.code == 143


def test_a_script_without_a_file(monkeypatch: pytest.MonkeyPatch):
    "Processes cannot import what was read from standard input."
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/nowhere/<stdin>", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(RuntimeError, match="this script, which has no file: save it, and run the file"):
        count_processes(TrainingConfig(n_gpus=2, use_cpu=True))


def test_devices_without_measurements():
    assert "runs on mps have not been tested" in explain_inexact(torch.device("mps"), "no", 64)


def test_inexact_is_where_the_kernels_are_missing(monkeypatch: pytest.MonkeyPatch):
    "It agrees with the choice of the kernel: Triton's, else FlashAttention, else PyTorch's for jagged tensors."
    monkeypatch.setattr(triton_attention, "_ENABLED", True)
    for capability in ((7, 5), (8, 0)):
        for dtype, precision in ((torch.float16, "fp16"), (torch.float32, "no")):
            for head_size in (8, 20, 64, 132, 136, 256, 264):
                monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
                monkeypatch.setattr(triton_attention, "_is_supported_device", lambda: capability >= (8, 0))
                query = SimpleNamespace(dtype=dtype, shape=(5, 2, head_size), is_cuda=True)
                exact = explain_inexact(torch.device("cuda"), precision, head_size) is None
                assert exact == (has_triton_kernel(query, head_size) or _has_flash_attention(query))


def test_use_cpu():
    "Accelerate is told to stay on the CPU if there is a GPU, and only then."
    gpu = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("cuda")}
    with patch.multiple("torch.accelerator", **gpu), patch("langmlm.train.launch.Accelerator") as accelerator:
        make_accelerator(CONFIG)
        make_accelerator(replace(CONFIG, use_cpu=False))
    assert [call.kwargs["cpu"] for call in accelerator.call_args_list] == [True, False]
    make_accelerator(CONFIG)


def test_processes():
    "A number of processes other than the launched one is an error that names the command."
    with pytest.raises(
        ValueError, match="n_gpus must be .*1, got 64: .*`accelerate launch --num_processes 64 script.py`"
    ):
        _check_processes(replace(CONFIG, n_gpus=64))
    for n_gpus in (None, 0, 1):
        _check_processes(replace(CONFIG, n_gpus=n_gpus))


GPUS = {"is_available": lambda: True, "current_accelerator": lambda: torch.device("cuda"), "device_count": lambda: 4}


@pytest.mark.parametrize(("n_gpus", "expected"), [(None, 1), (0, 1), (1, 1), (2, 2), (4, 4)])
def test_processes_to_start(monkeypatch: pytest.MonkeyPatch, caplog, n_gpus: int | None, expected: int):
    "As many as `n_gpus`, but none under a launcher; a warning says so if GPUs are not used by default."
    monkeypatch.delenv("RANK", raising=False)
    with patch.multiple("torch.accelerator", **GPUS):
        assert count_processes(replace(CONFIG, use_cpu=False, n_gpus=n_gpus)) == expected
        warnings = (
            ["one of 4 visible GPUs is used, since each further one adds its batches to a step: set n_gpus=4 for all"]
            if n_gpus is None
            else []
        )
        assert caplog.messages == warnings
        monkeypatch.setenv("RANK", "0")
        assert count_processes(replace(CONFIG, use_cpu=False, n_gpus=n_gpus)) == 1


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch):
    "GPUs, CPU cores, or a CPU that was not asked for: the error says what there is."
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert count_processes(replace(CONFIG, n_gpus=2)) == 2
    with pytest.raises(ValueError, match="n_gpus must be at most the number of CPU cores, 2, got 3"):
        count_processes(replace(CONFIG, n_gpus=3))
    with patch.multiple("torch.accelerator", **GPUS):
        with pytest.raises(ValueError, match="n_gpus must be at most the number of visible GPUs, 4, got 8"):
            count_processes(replace(CONFIG, use_cpu=False, n_gpus=8))
    with patch("torch.accelerator.is_available", lambda: False):
        with pytest.raises(ValueError, match="n_gpus=2, but no GPU is visible: set n_gpus=None, or use_cpu=True"):
            count_processes(replace(CONFIG, use_cpu=False, n_gpus=2))


def test_no_trackers():
    "Without `report_to`, no tracker starts."
    accelerator = make_accelerator(CONFIG)
    start_trackers(accelerator, CONFIG)
    assert accelerator.trackers == []


def test_private_api_of_accelerate():
    "The state of a Python process can be reset; if this fails, see whether Accelerate has a public way by now."
    make_accelerator(CONFIG)
    AcceleratorState._reset_state()
    assert not is_initialized() and PartialState().initialized
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state
    make_accelerator(CONFIG)
    assert is_initialized()


def test_second_signal_stops_at_once(caplog):
    "The first signal is recorded and logged, the second raises."
    request = StopRequest()
    assert (request.received, request.agreed) == (0, 0)
    request.receive(signal.SIGTERM)
    assert request.received == signal.SIGTERM and "SIGTERM: stopping with a checkpoint" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        request.receive(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        request.receive(signal.SIGTERM)
    assert caught.value.code == 143


EXIT = """
import os, signal
from langmlm.train.launch import signal_exit

for number in (signal.SIGTERM, signal.SIGINT):
    if os.fork() == 0:
        raise signal_exit(number)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
os._exit(0)
"""


def test_exit_status():
    "SIGTERM: 128 plus its number. SIGINT: the process dies of it, which a shell shows as 128 plus its number."
    done = subprocess.run([forked_python(), "-c", EXIT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["143", "-2"]
    assert signal_exit(signal.SIGINT, "resume with ...").args == ("resume with ...",)


def test_agreement_of_one_process():
    "A single process agrees with itself."
    accelerator, request = make_accelerator(CONFIG), StopRequest()
    assert not request.agree(accelerator)
    request.received = signal.SIGTERM
    assert request.agree(accelerator) and request.agreed == signal.SIGTERM


def test_stop_on_signals():
    "The step in progress is finished, and the handlers are restored."
    accelerator, handlers = make_accelerator(CONFIG), [signal.getsignal(number) for number in SIGNALS]
    finished = 0
    with stop_on_signals() as request:
        for step in range(1, 6):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            finished = step
            if request.agree(accelerator):
                break
    assert finished == 2 and [signal.getsignal(number) for number in SIGNALS] == handlers


def test_late_signal():
    "A signal after the last step takes effect at the end of the block."
    with pytest.raises(SystemExit), stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)


def test_ignored_signals_stay_ignored():
    "As under `nohup`."
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads():
    "Signals of a run in another thread stay with the main thread."
    seen, handler = [], signal.getsignal(signal.SIGTERM)

    def run():
        with stop_on_signals() as request:
            seen.append((request.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(0, handler)]


def test_launchers_repeat_sigterm(monkeypatch: pytest.MonkeyPatch):
    "SLURM signals all processes, and the launcher passes on its own signal: that is one request, unlike Ctrl-C twice."
    monkeypatch.setenv("RANK", "0")
    request = StopRequest()
    request.receive(signal.SIGTERM)
    request.receive(signal.SIGTERM)
    assert request.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        request.receive(signal.SIGINT)
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit):
        request.receive(signal.SIGTERM)


def in_notebook(batch, epoch, rules):
    "A mask function that a notebook defines."


in_notebook.__module__, in_notebook.__qualname__ = "__main__", "in_notebook"


def test_functions_that_new_processes_cannot_import(monkeypatch: pytest.MonkeyPatch):
    "Lambdas, and what is defined in a notebook, whose main module has no file."
    main = ModuleType("__main__")
    main.in_notebook = in_notebook
    monkeypatch.setitem(sys.modules, "__main__", main)
    check_importable("mask", mask_batch)
    for function in (lambda batch, epoch, rules: None, in_notebook, partial(in_notebook, epoch=0)):
        with pytest.raises(ValueError, match="mask=.*<function .* cannot be imported by the processes that n_gpus starts"):
            check_importable("mask", function)
    main.__file__ = "script.py"
    check_importable("mask", in_notebook)


def test_launcher_handles_no_ignored_signal(monkeypatch: pytest.MonkeyPatch):
    "`nohup` ignores SIGHUP, which would otherwise end a run with `n_gpus` when its terminal is closed."
    configs, before = [], signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr("langmlm.train.launch.elastic_launch", lambda config, function: lambda: configs.append(config))
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            launch_processes(mask_batch, (), 2)
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
    ignoring, usual = ({*config.signals_to_handle.split(",")} for config in configs)
    assert usual >= {"SIGTERM", "SIGHUP"} and ignoring == usual - {"SIGHUP"}


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("launched", [False, True])
def test_terminals_repeat_sighup(monkeypatch: pytest.MonkeyPatch, first: int, launched: bool):
    "The system and the shell send it when a terminal is closed, and a launcher then SIGTERM: no step is cut off."
    request, later = StopRequest(), [signal.SIGHUP]
    if launched:
        monkeypatch.setenv("RANK", "0")
        later += [signal.SIGHUP, signal.SIGTERM]
    request.receive(first)
    try:
        for number in later:
            request.receive(number)
    except SystemExit:
        pytest.fail("the repetition counts")
    assert request.received == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_a_launcher_repeats(monkeypatch: pytest.MonkeyPatch, number: int):
    "A terminal or a scheduler sends them to all processes, and the launcher to its own: one repetition is no second signal."
    monkeypatch.setenv("RANK", "1")
    request = StopRequest()
    try:
        for _ in range(2):
            request.receive(number)
    except KeyboardInterrupt:  # It would end pytest
        pytest.fail("the repetition counts")
    assert request.received == number
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            request.receive(number)
    monkeypatch.delenv("RANK")
    alone = StopRequest()
    alone.receive(number)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        alone.receive(number)
