"""After a power failure, results are old or new: the order in which files and names are flushed makes it so."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from every_write import SCENARIOS, in_clean_process, intact_states, run
from power_loss import crash_states, record, write_tree

from langmlm.disk import find_damage, read_json
from langmlm.folders import list_checkpoints

FLUSHES = {  # Where the package flushes, and a scenario that needs it
    ("write_file", "file"): "replace a folder",
    ("write_file", "folder"): "replace a folder",
    ("atomic_folder", "file"): "replace a folder",
    ("atomic_folder", "folder"): "replace a folder",
    ("_give_name", "folder"): "replace a folder",
    ("_make_folder", "folder"): "write into new folders",
    ("remove_folder", "folder"): "delete a folder",
}


def trace(scenario: str, folder: Path) -> Path:
    "Record an action in a process of its own, and store the record."
    prepare, action, _ = SCENARIOS[scenario]
    before = folder / "before"
    before.mkdir(parents=True)
    run(prepare, before)
    shutil.copytree(before, folder / "after")
    (folder / "steps").write_bytes(pickle.dumps(record(action, folder / "after")))
    return folder


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    "Recorded scenarios, by name."
    made = {}

    def make(scenario: str) -> Path:
        if scenario not in made:
            made[scenario] = in_clean_process(trace, scenario, tmp_path_factory.mktemp("trace") / "work")
        return made[scenario]

    return make


def find_losses(scenario: str, work: Path, without: tuple[str, str] | None = None) -> tuple[list[str], int]:
    "Check all states after a power failure: what is lost in them, and how many there are."
    before, after, losses, known = work / "before", work / "after", [], {}
    results = SCENARIOS[scenario][2]
    old, new = ({name: set(intact_states(folder, name)) for name in results} for folder in (before, after))
    states, last = crash_states(pickle.loads((work / "steps").read_bytes()), without)
    for number, content in enumerate(states):
        folder = work / f"state-{number}"
        write_tree(content, folder)

        def damage(path: Path, folder: Path = folder, content: tuple = content) -> list[str]:
            "The damage of a folder; that of equal folders, of which most states have several, is looked up."
            for name in path.relative_to(folder).parts:
                content = dict(content)[name]
            if content not in known:
                known[content] = find_damage(path)
            return known[content]

        for name in results:
            expected = new[name] if content in last else old[name] and old[name] | new[name]
            if expected and not expected.intersection(intact_states(folder, name, damage)):
                losses.append(f"{name} is lost" + " after the end" * (content in last))
        for manifest in folder.rglob("manifest.json"):
            if not any(part.startswith(".") for part in manifest.relative_to(folder).parts):
                losses += [f"{manifest.parent.name}: {problem}" for problem in damage(manifest.parent)]
        if (before / "facts.json").exists():
            new_facts = read_json(after / "facts.json")["step"]
            losses += check_facts(folder / "facts.json", {new_facts} if content in last else {1, new_facts})
        if (before / "run").exists() and all(map(damage, list_checkpoints(folder / "run"))):
            losses.append("there is no checkpoint")
        shutil.rmtree(folder)
    return losses, len(states)


def check_facts(file: Path, steps: set[int]) -> list[str]:
    "Check a JSON file."
    try:
        return [] if read_json(file)["step"] in steps else ["facts.json is old"]
    except (ValueError, OSError) as error:
        return [str(error)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_failure_at_every_moment(scenario: str, traces: Callable, record_property: Callable):
    "Nothing is lost, and what was finished is there."
    losses, states = find_losses(scenario, traces(scenario))
    assert losses == [] and states > 10
    record_property("summary", f"{scenario}: nothing is lost in {states:,} states after a power failure")


@pytest.mark.parametrize("flush", FLUSHES, ids=" ".join)
def test_every_flush_is_needed(flush: tuple[str, str], traces: Callable):
    "Without any one of them, something is lost."
    losses, _ = find_losses(FLUSHES[flush], traces(FLUSHES[flush]), without=flush)
    assert losses


def test_all_flushes_are_known(traces: Callable):
    "The package flushes in no other place."
    places = set()
    for scenario in SCENARIOS:
        steps = pickle.loads((traces(scenario) / "steps").read_bytes())
        places |= {flush.place for _, flush in steps if flush}
    assert places == FLUSHES.keys()
