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
ROOT = HERE.parent
ANSWER_TIMEOUT = 3600  # Seconds to set up, or for one round


class Failure(Exception):
    "A contender ended, or did not reply in time."


@dataclass(frozen=True)
class Place:
    "The interpreter of every environment, and the folder that processes write to."

    pythons: dict[str, Path]
    work: Path


class Contender:
    "One process. A `with` block ends it, whatever happens."

    def __init__(self, place: Place, environment: str, script: str, job: dict):
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
        "Send a message to the contender."
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"ended: {self.last_words()}") from None

    def receive(self, timeout: float = ANSWER_TIMEOUT) -> dict:
        "Return the next message of the contender."
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
        "Send a message to the contender and return its reply."
        self.send(**message)
        return self.receive()

    def last_words(self) -> str:
        "The last line of what it printed, without this machine's folders."
        self.process.poll()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was printed"]
        return lines[-1].replace(str(ROOT), "").replace(str(self.log.parent.parent), "")[-300:]


def variables(environment: str, work: Path) -> dict[str, str]:
    "Environment variables of a contender: no model downloads, all caches in the work folder."
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | {"PYTHONPATH": str(ROOT)} if environment == "langmlm" else kept


def once(place: Place, environment: str, script: str, job: dict) -> dict:
    "Run one job in a process; return its reply and its peak memory."
    with Contender(place, environment, script, job) as contender:
        return contender.receive() | contender.receive()
