"""Install a wheel into an empty environment, without downloading gigabytes again.

The environment links to the packages of this one that the wheel requires, directly or not, in the versions that
constraints.txt pins. So pip, which resolves and installs the wheel there, finds them, and fetches only what is missing.
"""

import re
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sandbox import run_command


def wanted(lines: list[str] | None, extras: set[str]) -> list[Requirement]:
    "The requirements among the lines of a package's metadata that hold here, with these extras."
    requirements = map(Requirement, lines or [])
    environments = [{"extra": extra} for extra in extras or {""}]
    return [each for each in requirements if each.marker is None or any(map(each.marker.evaluate, environments))]


def needed(metadata: Distribution) -> dict[str, Distribution]:
    "What is installed here of all that a distribution requires, directly or not, by name."
    found, seen, pending = {}, set(), wanted(metadata.requires, set())
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        with suppress(PackageNotFoundError):  # pip will fetch it
            found[name] = distribution(name)
            pending += wanted(found[name].requires, requirement.extras)
    return found


def pinned(distributions: dict[str, Distribution], constraints: str) -> dict[str, Distribution]:
    "Those whose version is the one that the constraints pin: pip will leave them alone."
    pins = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)(==\S+)$", constraints, re.MULTILINE)}
    return {
        name: found
        for name, found in distributions.items()
        if name in pins and Requirement(name + pins[name]).specifier.contains(found.version, prereleases=True)
    }


def link(distributions: dict[str, Distribution], folder: Path) -> None:
    "Link to the files and folders of distributions."
    for found in distributions.values():
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(found.locate_file(name))


def install(wheel: Path, constraints: str, environment: Path) -> Path:
    "Make an environment with a wheel and what it requires; return its Python."
    run_command([sys.executable, "-m", "venv", "--without-pip", environment], environment.parent)
    python, (packages,) = environment / "bin" / "python", environment.glob("lib/*/site-packages")
    pins = environment / "constraints.txt"
    pins.write_text(constraints, encoding="utf-8")
    (metadata,) = [entry for entry in zipfile.Path(wheel).iterdir() if entry.name.endswith(".dist-info")]
    link(pinned(needed(PathDistribution(metadata)), constraints), packages)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--constraint", pins]
    run_command([*pip, wheel], environment)
    return python
