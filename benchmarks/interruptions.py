"""Interrupt every kind of work at every call that writes or changes a name, and cut the power at every moment.

    python benchmarks/interruptions.py --write

The tests `test_every_write.py` and `test_power_loss.py` do the same. `--write` stores the counts in
`benchmarks/results/interruptions.json`, which the page `promises` shows.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("tools", "tests", "tests/integration"))]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:4] + [os.environ.get("PYTHONPATH", "")])

from every_write import SCENARIOS, die_everywhere, in_clean_process
from test_power_loss import find_losses, trace

RESULT = ROOT / "benchmarks" / "results" / "interruptions.json"


def main() -> int:
    "Run all scenarios; an exception or a loss ends the script."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"store the counts in {RESULT.name}")
    arguments, counts = parser.parse_args(), {}
    for scenario in SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(os.path.realpath(folder))
            (work / "kills").mkdir()
            calls = in_clean_process(die_everywhere, scenario, work / "kills")
            losses, states = find_losses(scenario, in_clean_process(trace, scenario, work / "power"))
            if losses:
                raise SystemExit(f"{scenario}: {losses}")
        counts[scenario] = {"calls": calls, "states_after_power_failure": states}
        print(scenario, counts[scenario], flush=True)
    if arguments.write:
        facts = {"scenarios": counts, "lost": 0, "date": date.today().isoformat()}
        RESULT.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
