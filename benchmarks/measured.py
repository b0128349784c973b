"Describe the hardware, versions and commit of a measurement."

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from processes import ROOT, Failure, Place, once


def probe(place: Place) -> dict[str, dict]:
    "Return the versions and hardware that every environment reports."

    def probe_one(name: str) -> dict:
        try:
            return once(place, name, "probe.py", {"do": "probe"})
        except Failure as failure:
            raise SystemExit(f"the environment {name!r} does not work: {failure}") from None

    with ThreadPoolExecutor() as pool:
        return dict(zip(place.pythons, pool.map(probe_one, place.pythons)))


def hardware(probes: dict[str, dict]) -> dict:
    "Describe the machine: processor, cores, threads of PyTorch, memory, GPU."
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
    "Return the model name of the processor, and the vector instructions that matter for bf16."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {name.strip(): value.strip() for name, value in values.items()}
    native = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()
    ]
    return f"{values.get('model name', 'unknown')} ({', '.join(native) or 'no vector instructions listed'})"


def langmlm_source() -> dict:
    "Return the commit of the package, whether it has uncommitted changes, and a hash of its files."
    package = hashlib.sha256()
    for file in sorted((ROOT / "langmlm").rglob("*.py")):
        package.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "langmlm")
    return {"commit": commit, "changed": None if changed is None else bool(changed), "sha256": package.hexdigest()}


def git(*words: str) -> str | None:
    "Return the output of git; None outside a repository."
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def measured(place: Place, probes: dict[str, dict]) -> dict:
    "Return what every result stores about its measurement."
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(probes),
        "versions": {name: probes[name]["versions"] for name in place.pythons},
        "langmlm": langmlm_source(),
    }
