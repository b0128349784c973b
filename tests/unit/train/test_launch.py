"Devices, processes and signals."

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized

from langmlm.train.config import TrainingConfig
from langmlm.train.launch import (
    StopRequest,
    agree_to_stop,
    check_processes,
    make_accelerator,
    signal_exit,
    start_trackers,
    stop_on_signals,
)

CONFIG = TrainingConfig(bf16=False, use_cpu=True)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_precision_changes_within_a_process():
    "Accelerate would keep the precision of the first run."
    assert make_accelerator(replace(CONFIG, bf16=True)).mixed_precision == "bf16"
    assert make_accelerator(CONFIG).mixed_precision == "no"


def test_device_changes_within_a_process():
    "Accelerate would keep the device of the first run."
    make_accelerator(CONFIG)
    PartialState._shared_state["device"] = torch.device("cuda")  # As if the run before had been on a GPU
    assert make_accelerator(CONFIG).device.type == "cpu"


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
        check_processes(replace(CONFIG, n_gpus=64))
    for n_gpus in (None, 0, 1):
        check_processes(replace(CONFIG, n_gpus=n_gpus))


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


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_exit_status(name: str, status: int):
    "A shell sees 128 plus the number of the signal."
    script = f"import signal; from langmlm.train.launch import signal_exit; raise signal_exit(signal.{name})"
    command = f'"{sys.executable}" -c "{script}"; exit $?'
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == status
    assert signal_exit(signal.SIGINT, "resume with ...").args == ("resume with ...",)


def test_agreement_of_one_process():
    "A single process agrees with itself."
    accelerator, request = make_accelerator(CONFIG), StopRequest()
    assert not agree_to_stop(request, accelerator)
    request.received = signal.SIGTERM
    assert agree_to_stop(request, accelerator) and request.agreed == signal.SIGTERM


def test_stop_on_signals():
    "The step in progress is finished, and the handlers are restored."
    accelerator, handlers = make_accelerator(CONFIG), [signal.getsignal(number) for number in SIGNALS]
    finished = 0
    with stop_on_signals() as request:
        for step in range(1, 6):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            finished = step
            if agree_to_stop(request, accelerator):
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
