"Tokens per second and peak memory of contenders that train in turn."

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from data import Data
from processes import Contender, Failure
from rounds import interleave
from summary import compare, noisy_names, rates, spread
from workloads import PEERS, Workload, train_job

CALIBRATION_SECONDS = 5.0
CALIBRATION_STEPS = 10
MAX_STEPS = 10_000  # More than all rounds have
WARM_UP_STEPS = {"cpu": 3, "cuda": 20}
INTERVALS = {"cpu": 1, "cuda": 4}  # Parts of a timed round; one more goes before it, untimed, on a GPU


@dataclass(frozen=True)
class Pace:
    "How long rounds are."

    device: str
    rounds: int
    round_seconds: float


@dataclass
class Entry:
    "A contender of a workload."

    name: str
    job: dict
    peer: str
    steps: int = 1  # Of a timed round
    running: Contender | None = None

    def start(self, data: Data) -> Contender:
        "Start it, and wait until it is warm."
        self.job["run_folder"] = str(data.work / "runs" / f"{self.name}-{time.time_ns()}")
        contender = Contender(data.place, PEERS[self.peer].environment, PEERS[self.peer].script, self.job)
        try:
            contender.receive()
        except Failure:
            contender.__exit__()
            raise
        return contender


def run_speed(workload: Workload, data: Data, model: dict, pace: Pace) -> dict:
    "Set all contenders up, have them take turns, and compare them."
    results: dict[str, dict] = {}
    with ExitStack() as stack:
        ready: dict[str, Entry] = {}
        for name in workload.contenders:
            print(f"  setting up {name}", flush=True)
            try:
                entry = make_entry(name, workload, data, model, pace)
                set_up(entry, data, pace, stack)
                ready[name] = entry
            except Failure as failure:
                print(f"  {name} {failure}", flush=True)
                results[name] = {"failed": str(failure)}
        lead_in = {name: lead_in_of(entry.steps, pace) for name, entry in ready.items()}
        commands = {name: {"steps": entry.steps, "lead_in": lead_in[name]} for name, entry in ready.items()}
        rounds, failed = interleave({name: entry.running for name, entry in ready.items()}, pace.rounds, commands)
        results |= {name: {"failed": reason} for name, reason in failed.items()}
        for name, figures in rounds.items():
            peak = ready[name].running.ask(do="stop")
            results[name] = figures_of(figures, peak)
            results[name]["dataset"] = data.dataset_figures(
                ready[name].peer, workload.text, workload.model, workload.max_length
            )
    comparison = compare(rounds)
    for name in noisy_names(comparison):
        print(f"  too noisy to tell: {name}", flush=True)
    return {"contenders": results, **comparison}


def make_entry(name: str, workload: Workload, data: Data, model: dict, pace: Pace) -> Entry:
    "A contender's job, with its dataset made."
    peer, precision = name.rsplit("-", 1)
    place = {
        "tokenizer": data.tokenizer(workload.model, workload.max_length),
        "dataset": data.dataset(peer, workload.text, workload.model, workload.max_length)["path"],
    }
    job = train_job(
        peer,
        place,
        model,
        workload.max_length,
        device=pace.device,
        precision=precision,
        batch_size=workload.batch_size,
        warm_up_steps=WARM_UP_STEPS[pace.device],
        logging_steps=1,
        max_steps=MAX_STEPS,
    )
    return Entry(name, job, peer)


def lead_in_of(steps: int, pace: Pace) -> int:
    "Steps that go untimed before a round: on a GPU, memory that was given back for the others is fetched again."
    return math.ceil(steps / INTERVALS[pace.device]) if pace.device == "cuda" else 0


def set_up(entry: Entry, data: Data, pace: Pace, stack: ExitStack) -> None:
    "Start it, and find how many steps fill a round."
    entry.running = stack.enter_context(entry.start(data))
    seconds: list[float] = []
    while sum(seconds) < min(CALIBRATION_SECONDS, pace.round_seconds) and len(seconds) < CALIBRATION_STEPS:
        seconds.append(entry.running.ask(do="round", steps=1)["round"]["seconds"])
    parts = INTERVALS[pace.device]
    interval = max(1, round(pace.round_seconds / median(seconds) / parts))
    entry.steps = interval * parts
    if PEERS[entry.peer].paced_by_log:  # Which writes: once a round, as seldom as it can be
        entry.running.__exit__()
        entry.job["logging_steps"] = interval
        entry.job["max_steps"] = (pace.rounds + 2) * (entry.steps + interval) + WARM_UP_STEPS[pace.device]
        entry.running = stack.enter_context(entry.start(data))


def figures_of(rounds: list[dict], peak: dict) -> dict:
    "What a result says of one contender."
    computed = sum(figures["computed"] for figures in rounds)
    return {
        "tokens_per_second": spread(rates(rounds)),
        "padding_share": 1 - sum(figures["tokens"] for figures in rounds) / computed,
        "steps_per_round": rounds[0]["steps"],
        **peak,
        "rounds": [{name: figures[name] for name in ("seconds", "tokens", "computed", "steps")} for figures in rounds],
    }
