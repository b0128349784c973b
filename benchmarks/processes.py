"Start a contender in its environment, and talk to it in JSON lines."

import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ANSWER_TIMEOUT = 3600  # Seconds to set up, or for one round


class Failure(Exception):
    "A contender ended, or was silent for too long."


@dataclass(frozen=True)
class ShardPosition:
    "Where processes run: interpreters by environment, and a folder for everything that they write."

    pythons: dict[str, Path]
    work: Path


class Contender:
    "One process. Use it in a `with`, which ends it whatever happens."

    def __init__(self, place: ShardPosition, environment: str, script: str, job: dict):
        if environment not in place.pythons:
            raise Failure(f"its environment, {environment}, was left out")
        self.log = place.work / "logs" / f"{time.time_ns()}-{script}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(place.pythons[environment]), str(HERE / "contenders" / script)],
                cwd=place.work,
                env=variables(environment, place.work),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.unread = b""
        self.send(**job)

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *reason) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def send(self, **message) -> None:
        "Tell the contender something."
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"ended: {self.last_words()}") from None

    def receive(self, timeout: float = ANSWER_TIMEOUT) -> dict:
        "The next thing that the contender says."
        deadline, output = time.monotonic() + timeout, self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0, deadline - time.monotonic())):
                    raise Failure(f"no answer in {timeout:.0f} s: {self.last_words()}")
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    raise Failure(f"ended: {self.last_words()}")
                self.unread += piece
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)

    def ask(self, **message) -> dict:
        "Tell the contender something, and wait for the answer."
        self.send(**message)
        return self.receive()

    def last_words(self) -> str:
        "The last line of what it printed, without this machine's folders."
        self.process.poll()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was printed"]
        return lines[-1].replace(str(ROOT), "").replace(str(self.log.parent.parent), "")[-300:]


def variables(environment: str, work: Path) -> dict[str, str]:
    "Variables of a contender's process: no network for models, and all caches in the work folder."
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | {"PYTHONPATH": str(ROOT)} if environment == "langmlm" else kept


def once(place: ShardPosition, environment: str, script: str, job: dict) -> dict:
    "Have a process do one thing: its answer, and its peak memory with it."
    with Contender(place, environment, script, job) as contender:
        return contender.receive() | contender.receive()
