"On what, with what, and when figures were taken."

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from processes import ROOT, Failure, ShardPosition, once


def probe(place: ShardPosition) -> dict[str, dict]:
    "What every environment has and sees."

    def probe_one(name: str) -> dict:
        try:
            return once(place, name, "probe.py", {"do": "probe"})
        except Failure as failure:
            raise SystemExit(f"the environment {name!r} does not work: {failure}") from None

    with ThreadPoolExecutor() as pool:
        return dict(zip(place.pythons, pool.map(probe_one, place.pythons)))


def hardware(probes: dict[str, dict]) -> dict:
    "The machine: processor, cores, threads that torch uses, memory, GPU."
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    one = probes["langmlm"]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": one["threads"],
        "memory_gb": round(pages / 1e9, 1),
        "gpu": one["gpu"],
    }


def processor() -> str:
    "The model name of the first core, and the instructions that decide the precision."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {name.strip(): value.strip() for name, value in values.items()}
    native = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()
    ]
    return f"{values.get('model name', 'unknown')} ({', '.join(native) or 'no vector instructions listed'})"


def langmlm_source() -> dict:
    "The commit of the package, whether it was changed since, and a hash of its files."
    package = hashlib.sha256()
    for file in sorted((ROOT / "langmlm").glob("*.py")):
        package.update(file.name.encode() + file.read_bytes())
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "langmlm")
    return {"commit": commit, "changed": None if changed is None else bool(changed), "sha256": package.hexdigest()}


def git(*words: str) -> str | None:
    "What git says; None where there is no repository."
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def measured(place: ShardPosition, probes: dict[str, dict]) -> dict:
    "What is written beside every result."
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(probes),
        "versions": {name: probes[name]["versions"] for name in place.pythons},
        "langmlm": langmlm_source(),
    }
