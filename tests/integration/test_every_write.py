"""Processes that die at every single call that writes or changes a name: old or new results are intact, and a rerun
completes and leaves nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from every_write import SCENARIOS, die_everywhere, in_clean_process


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_death_at_every_call(scenario: str, tmp_path: Path, record_property: Callable):
    "Whenever a process dies, results are old or new, files of the user are there, and the same call completes."
    calls = in_clean_process(die_everywhere, scenario, tmp_path)
    assert calls > 5
    record_property("summary", f"{scenario}: died at each of {calls} calls that write or change a name")
