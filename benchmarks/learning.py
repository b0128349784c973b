"Compare losses on a held-out split after the same number of real tokens, and after the same time."

import shutil
from dataclasses import dataclass
from pathlib import Path

from data import Data
from processes import Contender, Failure
from workloads import PEERS, train_job

PARTS = (1 / 8, 1 / 4, 1 / 2, 1)  # Of the tokens, and of the seconds: points of the curve
ROWS_PER_STEP = 32
LOG_PARTS = 100  # langmlm can be stopped at log entries: this many of them until all tokens are seen
WARM_UP_STEPS = 100  # Learning rate warm-up; constant afterwards


@dataclass(frozen=True)
class Course:
    "How long every contender trains."

    device: str
    tokens: int
    seconds: float
    limit: float  # Seconds after which a contender is stopped
    max_steps: int  # More than any contender takes
    precisions: dict[str, str]  # Of every peer


def learning_contenders(mean_tokens: float, max_length: int) -> dict[str, tuple[str, dict]]:
    """Contenders by name: the peer and the changes to its job.

    All steps hold about as many real tokens as 32 lines. Contenders with full rows, or with a token budget, take fewer
    rows of max_length for them.
    """
    full_rows = max(1, round(ROWS_PER_STEP * mean_tokens / max_length))
    return {
        "langmlm-lines": ("langmlm", {"packing": False, "batch_size": ROWS_PER_STEP}),
        "langmlm-packed": ("langmlm", {"batch_size": full_rows}),
        "trainer-dynamic": ("trainer-dynamic", {"batch_size": ROWS_PER_STEP}),
        "trainer-concatenated": ("trainer-concatenated", {"batch_size": full_rows}),
        "langformers": ("langformers", {"batch_size": ROWS_PER_STEP}),
    }


def run_learning(data: Data, model: dict, max_length: int, course: Course) -> dict:
    "Train the contenders one after the other, and evaluate the snapshots of all with one script."
    results: dict[str, dict] = {}
    tokenizer = data.tokenizer("small", max_length)
    made = data.dataset("langmlm", "short", "small", max_length)
    mean_tokens = made["tokens"] / made["sequences"]
    judge_job = {
        "do": "judge",
        "tokenizer": tokenizer,
        "text": str(data.held_out),
        "max_length": max_length,
        "mlm_probability": 0.15,
        "seed": 1,
        "device": course.device,
    }
    with Contender(data.place, "trainer", "judge.py", judge_job) as judge:
        judge.receive()
        for name, (peer, changes) in learning_contenders(mean_tokens, max_length).items():
            print(f"  {name}", flush=True)
            folder = data.work / "learning" / name
            try:
                place = {"tokenizer": tokenizer, "dataset": data.dataset(peer, "short", "small", max_length)["path"]}
                log_every = round(course.tokens / LOG_PARTS / (ROWS_PER_STEP * mean_tokens))
                job = train_job(
                    peer,
                    place,
                    model,
                    max_length,
                    device=course.device,
                    precision=course.precisions[peer],
                    lr_scheduler_type="constant_with_warmup",
                    warmup_steps=WARM_UP_STEPS,
                    warm_up_steps=0,
                    logging_steps=max(1, log_every),
                    max_steps=course.max_steps,
                    run_folder=str(folder / "run"),
                    **changes,
                )
                points, peak = learn(data, peer, job, course, folder)
            except Failure as failure:
                print(f"  {name} {failure}", flush=True)
                results[name] = {"failed": str(failure)}
                continue
            results[name] = {"precision": job["precision"], "rows_per_step": job["batch_size"], **peak}
            results[name] |= judged(judge, points, course)
            shutil.rmtree(folder)
    return {"contenders": results}


def learn(data: Data, peer: str, job: dict, course: Course, folder: Path) -> tuple[list[dict], dict]:
    "Train until both goals or the limit are reached; return the snapshots and the peak memory."
    tokens, seconds = [course.tokens * part for part in PARTS], [course.seconds * part for part in PARTS]
    points: list[dict] = []
    with Contender(data.place, PEERS[peer].environment, PEERS[peer].script, job) as contender:
        contender.receive()
        while tokens or seconds:
            ends = {"tokens": tokens[0] if tokens else None, "seconds": min([*seconds[:1], course.limit])}
            done = contender.ask(do="round", **ends)["round"]
            point = {"tokens": done["all_tokens"], "seconds": done["all_seconds"]}
            reached = {"tokens": bool(tokens), "seconds": bool(seconds)}
            tokens = [goal for goal in tokens if goal > point["tokens"]]
            seconds = [goal for goal in seconds if goal > point["seconds"]]
            point["last_of"] = [
                end for end, left in (("tokens", tokens), ("seconds", seconds)) if reached[end] > bool(left)
            ]
            point["folder"] = str(folder / f"snapshot-{len(points)}")
            contender.ask(do="save", folder=point["folder"])
            points.append(point)
            if point["seconds"] >= course.limit:
                break
        return points, contender.ask(do="stop")


def judged(judge: Contender, points: list[dict], course: Course) -> dict:
    "Return the loss curve of a contender, and its two end points."
    curve, ends = [], {"after_tokens": None, "after_seconds": None}
    for point in points:
        answer = judge.ask(do="judge", folder=point["folder"])
        shutil.rmtree(point["folder"])
        curve.append({"tokens": point["tokens"], "seconds": point["seconds"], "loss": answer["loss"]})
        ends |= {f"after_{end}": curve[-1] for end in point["last_of"]}
        print(f"    {point['tokens']:,} tokens, {point['seconds']:,.1f} s: loss {answer['loss']:.3f}", flush=True)
    given_up = None if ends["after_tokens"] else f"{course.tokens:,} tokens not reached in {course.limit:,.0f} s"
    return {**ends, "given_up": given_up, "hidden_tokens": answer["predictions"], "curve": curve}
