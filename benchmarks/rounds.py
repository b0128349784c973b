"Run contenders in turns, one at a time."

from processes import Contender, Failure

SHOWN = ("seconds", "tokens", "steps")


def rotated(names: list[str], number: int) -> list[str]:
    "Return the order of a round: every round starts with another contender."
    start = number % max(1, len(names))
    return names[start:] + names[:start]


def interleave(
    contenders: dict[str, Contender], rounds: int, commands: dict[str, dict]
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    "Run all rounds of all contenders in turns; return their results, and the errors of those that failed."
    figures: dict[str, list[dict]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in rotated(list(contenders), number):
            if name in failed:
                continue
            try:
                figures[name].append(contenders[name].ask(do="round", **commands.get(name, {}))["round"])
            except Failure as failure:
                failed[name] = str(failure)
                print(f"  {name} {failure}", flush=True)
                continue
            shown = ", ".join(f"{value:,.1f} {unit}" for unit, value in figures[name][-1].items() if unit in SHOWN)
            print(f"  round {number + 1}: {name}: {shown}", flush=True)
    return {name: values for name, values in figures.items() if name not in failed}, failed
