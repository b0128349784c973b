"Create a virtual environment for every peer, and again when its requirements change."

import hashlib
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENTS = HERE / ".environments"  # Not in git
CONSTRAINTS = ROOT / "constraints.txt"
STAMP = "requirements.sha256"
INSTALL_TIMEOUT = 3600  # Seconds, for one call of pip

# Every list is one call of `pip install`. Torch comes first and pinned, so that no later call chooses a version.
# Langformers 0.5.0 says transformers>=4.51, but stops at 5.0 (its tokenizer class and training arguments are gone):
# 4.57.6 is the last before it. `import langformers` also imports its web
# server, labellers and classifiers, so it is installed with all of its requirements.
TORCH = ["torch==2.13.0"]
REQUIREMENTS = {
    "langmlm": [TORCH, ["--constraint", str(CONSTRAINTS), "--editable", str(ROOT)]],
    "trainer": [TORCH, ["--constraint", str(CONSTRAINTS), "transformers", "accelerate", "datasets"]],
    "langformers": [TORCH, ["langformers==0.5.0", "transformers==4.57.6", "accelerate==1.15.0", "datasets==5.0.1"]],
}


def fingerprint(name: str) -> str:
    "Return a hash that changes when an environment has to be created again."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    parts = [sys.version, *sum(REQUIREMENTS[name], [])]
    if str(CONSTRAINTS) in parts:
        parts.append(CONSTRAINTS.read_text(encoding="utf-8"))
    if name == "langmlm":
        parts.append(settings["DEFAULT"]["requirements"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def make_environment(name: str) -> Path:
    "Return the interpreter of an environment; create the environment if it is missing or outdated."
    folder, wanted = ENVIRONMENTS / name, fingerprint(name)
    python, stamp = folder / "bin" / "python", folder / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment {name!r}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    install([sys.executable, "-m", "venv", str(folder)])
    for packages in REQUIREMENTS[name]:
        install([str(python), "-m", "pip", "install", "--quiet", *packages])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def install(command: list[str]) -> None:
    "Run one installation command; if it fails, exit with what it printed."
    done = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def find_pythons(names: list[str], given: list[str]) -> dict[str, Path]:
    "Return the interpreter of every environment: the one given as NAME=PATH, else the one created here."
    chosen = dict(pair.split("=", 1) for pair in given)
    unknown = [name for name in chosen if name not in REQUIREMENTS]
    if unknown:
        raise SystemExit(f"--python {unknown[0]}=...: the environments are {', '.join(REQUIREMENTS)}")
    return {name: Path(os.path.abspath(chosen[name])) if name in chosen else make_environment(name) for name in names}


if __name__ == "__main__":
    for environment in sys.argv[1:] or REQUIREMENTS:
        print(environment, make_environment(environment))
