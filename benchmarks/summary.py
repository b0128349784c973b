"Ratios, medians and spreads of measurements, and whether they are too noisy. Pure functions."

from statistics import median, quantiles

NOISY = 0.2  # A result is noisy if its interquartile range exceeds this share of its median


def spread(values: list[float]) -> dict[str, float]:
    "Return median, extremes and quartiles."
    if len(values) == 1:
        return dict.fromkeys(("median", "min", "q1", "q3", "max"), values[0])
    first, _, third = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "min": min(values), "q1": first, "q3": third, "max": max(values)}


def is_noisy(values: dict[str, float]) -> bool:
    "Return whether the interquartile range of a `spread` exceeds 20% of the median."
    return values["q3"] - values["q1"] > NOISY * values["median"]


def rates(rounds: list[dict]) -> list[float]:
    "Return the real tokens per second of every round."
    return [figures["tokens"] / figures["seconds"] for figures in rounds]


def ratio(ours: list[float], theirs: list[float]) -> dict:
    "Return the spread of the ratio, round by round: rounds with the same number ran next to each other."
    values = spread([one / other for one, other in zip(ours, theirs, strict=True)])
    return values | ({"noisy": True} if is_noisy(values) else {})


def best_precision(medians: dict[str, float]) -> str:
    "Return the precision with the higher rate."
    return max(medians, key=medians.get)


def by_peer(names: list[str]) -> dict[str, list[str]]:
    "Group names such as `trainer-dynamic-bf16` by peer; return the precisions of each."
    peers: dict[str, list[str]] = {}
    for name in names:
        peer, precision = name.rsplit("-", 1)
        peers.setdefault(peer, []).append(precision)
    return peers


def compare(rounds: dict[str, list[dict]], ours: str = "langmlm") -> dict:
    "Compare every precision of ours with every contender, and our best precision with the best of each peer."
    speeds = {name: rates(figures) for name, figures in rounds.items()}
    medians = {name: median(values) for name, values in speeds.items()}
    peers = by_peer(list(rounds))
    pairs = {
        f"{ours}-{precision} / {name}": ratio(speeds[f"{ours}-{precision}"], values)
        for precision in peers.get(ours, [])
        for name, values in speeds.items()
        if name != f"{ours}-{precision}"
    }
    chosen = {
        peer: f"{peer}-{best_precision({one: medians[f'{peer}-{one}'] for one in precisions})}"
        for peer, precisions in peers.items()
    }
    best = {
        peer: {"of": [chosen[ours], name], **ratio(speeds[chosen[ours]], speeds[name])}
        for peer, name in chosen.items()
        if ours in chosen and peer != ours
    }
    return {"ratios": pairs, "best": best}


def noisy_names(summary: dict) -> list[str]:
    "Return the names of the noisy ratios of a comparison."
    return [name for group in summary.values() for name, values in group.items() if values.get("noisy")]
