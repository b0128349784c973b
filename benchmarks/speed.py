"Measure tokens per second and peak memory of contenders that train in turns."

import math
import time
from concurrent.futures import ThreadPoolExecutor
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
INTERVALS = 4  # langmlm logs this often in a round; on a GPU, as long a part before it is not timed


@dataclass(frozen=True)
class Pace:
    "The number and length of rounds."

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
        "Start the contender, and wait until it is warmed up."
        self.job["run_folder"] = str(data.work / "runs" / f"{self.name}-{time.time_ns()}")
        contender = Contender(data.place, PEERS[self.peer].environment, PEERS[self.peer].script, self.job)
        try:
            contender.receive()
        except Failure:
            contender.__exit__()
            raise
        return contender


def run_speed(workload: Workload, data: Data, model: dict, pace: Pace) -> dict:
    "Set up all contenders, run them in turns, and compare them."
    with ExitStack() as stack:
        ready, results = set_up_all(workload, data, model, pace, stack)
        commands = {name: command(entry.steps, pace) for name, entry in ready.items()}
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
        print(f"  too noisy: {name}", flush=True)
    return {"contenders": results, **comparison}


def set_up_all(
    workload: Workload, data: Data, model: dict, pace: Pace, stack: ExitStack
) -> tuple[dict[str, Entry], dict[str, dict]]:
    "Set up the contenders, in parallel on a GPU; return those that are ready, and the errors of the others."

    def try_one(name: str) -> Entry | Failure:
        print(f"  setting up {name}", flush=True)
        try:
            entry = make_entry(name, workload, data, model, pace)
            entry.running = stack.enter_context(entry.start(data))
        except Failure as failure:
            print(f"  {name} {failure}", flush=True)
            return failure
        return entry

    with ThreadPoolExecutor(len(workload.contenders) if pace.device == "cuda" else 1) as pool:
        tried = dict(zip(workload.contenders, pool.map(try_one, workload.contenders)))
    for name, one in tried.items():
        if isinstance(one, Entry):
            try:
                calibrate(one, pace)  # One after the other
            except Failure as failure:
                tried[name] = failure
    failed = {name: {"failed": str(one)} for name, one in tried.items() if isinstance(one, Failure)}
    return {name: one for name, one in tried.items() if name not in failed}, failed


def make_entry(name: str, workload: Workload, data: Data, model: dict, pace: Pace) -> Entry:
    "Create a contender's job and its dataset."
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


def command(steps: int, pace: Pace) -> dict[str, int]:
    "Return the command of a round; on a GPU, its first steps are not timed because they allocate memory again."
    lead_in = math.ceil(steps / INTERVALS) if pace.device == "cuda" else 0
    return {"steps": steps, "lead_in": lead_in, "interval": max(1, steps // INTERVALS)}


def calibrate(entry: Entry, pace: Pace) -> None:
    "Find the number of steps of a round."
    seconds: list[float] = []  # Of each step
    if pace.device == "cuda":
        figures = entry.running.ask(do="round", steps=CALIBRATION_STEPS, lead_in=CALIBRATION_STEPS)["round"]
        seconds.append(figures["seconds"] / figures["steps"])
    else:
        while sum(seconds) < min(CALIBRATION_SECONDS, pace.round_seconds) and len(seconds) < CALIBRATION_STEPS:
            seconds.append(entry.running.ask(do="round", steps=1)["round"]["seconds"])
    entry.steps = max(1, round(pace.round_seconds / median(seconds)))


def figures_of(rounds: list[dict], peak: dict) -> dict:
    "Return the results of one contender."
    computed = sum(figures["computed"] for figures in rounds)
    return {
        "tokens_per_second": spread(rates(rounds)),
        "padding_share": 1 - sum(figures["tokens"] for figures in rounds) / computed,
        "steps_per_round": rounds[0]["steps"],
        **({"mfu": median(figures["mfu"] for figures in rounds)} if "mfu" in rounds[0] else {}),
        **peak,
        "rounds": [{name: figures[name] for name in ("seconds", "tokens", "computed", "steps")} for figures in rounds],
    }
