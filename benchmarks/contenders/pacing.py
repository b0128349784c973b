"""Shared code of all contenders: JSON lines to and from the runner, and training in rounds.

A contender is one process. It reads its job from stdin, sets up, warms up, sends "ready", and then sleeps in the hook
that its training loop calls after an optimizer step, until the runner starts a round.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Stop(BaseException):
    "Ends training. Not an Exception, so that no peer catches it."


class Channel:
    "Exchanges JSON lines with the runner; what libraries print goes to stderr."

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, **message) -> None:
        "Send a message to the runner."
        print(json.dumps(message), file=self._answers, flush=True)

    def receive(self) -> dict:
        "Return the next command of the runner; stop if the runner has ended."
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}


class Pacer:
    "Splits a training loop into rounds: counts steps, tokens and seconds, and blocks between rounds."

    def __init__(
        self,
        channel: Channel,
        job: dict,  # `device`, and `warm_up_steps` before the first round; 0: the first round begins with training
        totals: Callable[[], tuple[int, int]],  # Real tokens, and tokens computed, since training began
        save: Callable[[Path], None],  # Writes the model as it is now
        more: Callable[[], dict] = dict,  # Further measurements, taken at the end of a round
    ):
        self.channel, self.totals, self.save, self.more = channel, totals, save, more
        self.warm_up_steps, self.on_gpu = job["warm_up_steps"], job["device"] == "cuda"
        self.steps, self.seconds = 0, 0.0  # In all rounds and the warm-up
        self.command: dict = {}

    def begin(self) -> None:
        "Call this right before training begins."
        if self.warm_up_steps:
            self.command = {"steps": self.warm_up_steps, "lead_in": 0, "warm_up": True}
            self._open_round()
        else:
            self.channel.send(ready=True)
            self._wait()

    def step_done(self, steps: int = 1) -> None:
        "Call this after optimizer steps; it returns when training should continue."
        self.steps += steps
        self.round_steps += steps
        if self.leading_in:
            self.leading_in = self.round_steps < self.command["lead_in"]
            if not self.leading_in:
                self._start_clock()
            return
        if "steps" in self.command:
            over = self.round_steps - self.command.get("lead_in", 0) >= self.command["steps"]
        else:
            over = self._reached("seconds", self.seconds + time.perf_counter() - self.began)
            over = over or self._reached("tokens", self.command.get("tokens") and int(self.totals()[0]))
        if over:
            self._close_round()
            self._wait()

    def _reached(self, limit: str, value: float | None) -> bool:
        "Return whether a cumulative limit of the round is reached."
        return self.command.get(limit) is not None and value >= self.command[limit]

    def _open_round(self) -> None:
        self.round_steps, self.leading_in = 0, self.command.get("lead_in", 0) > 0
        self._start_clock()

    def _start_clock(self) -> None:
        self.counted_steps, (self.real, self.computed) = self.steps, map(int, self.totals())
        self._synchronize()
        self.began = time.perf_counter()

    def _close_round(self) -> None:
        "Report what was done since the clock started."
        self._synchronize()
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        real, computed = map(int, self.totals())
        figures = {"seconds": seconds, "tokens": real - self.real, "computed": computed - self.computed}
        figures["steps"] = self.steps - self.counted_steps
        figures |= {"all_tokens": real, "all_seconds": self.seconds, **self.more()}
        self.channel.send(**{"ready" if self.command.get("warm_up") else "round": figures})

    def _wait(self) -> None:
        "Sleep until the runner starts another round; run its commands in between."
        self._synchronize(empty=True)
        while True:
            self.command = self.channel.receive()
            match self.command["do"]:
                case "round":
                    return self._open_round()
                case "save":
                    self.save(Path(self.command["folder"]))
                    self.channel.send(saved=self.command["folder"])
                case "stop":
                    raise Stop

    def _synchronize(self, empty: bool = False) -> None:
        "Wait for the GPU, and release unused memory for the other contenders."
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            if empty:
                torch.cuda.empty_cache()


def peak_memory() -> dict:
    "Return the peak memory of this process in bytes: resident, and on the GPU."
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss includes the parent process before the fork
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        resident = int(lines["VmHWM"].split()[0]) * 1024
    torch = sys.modules.get("torch")
    on_gpu = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None
    return {"peak_resident": resident, "peak_on_gpu": on_gpu}


def bytes_on_disk(folder: str) -> int:
    "Return the size of all files in a folder."
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def serve(tasks: dict[str, Callable[[Channel, dict], None]]) -> None:
    "Run the job that the runner sends, then report the peak memory."
    channel = Channel()
    job = channel.receive()
    try:
        tasks[job["do"]](channel, job)
    except Stop:
        pass
    channel.send(**peak_memory())
    sys.stderr.flush()
    os._exit(0)  # A loop that was interrupted may have threads that would block the exit
