"Tokenize text into a dataset on disk, compared with the bare Rust tokenizer and with `map` of `datasets`."

from contextlib import ExitStack

from data import Data
from processes import Contender, Failure
from rounds import interleave
from summary import noisy_names, ratio, spread

KINDS = {"langmlm": "langmlm", "bare": "langmlm", "datasets": "trainer"}  # Contenders and their environments
WARM_UP_DOCUMENTS = 200


def run_tokenizing(data: Data, texts: tuple[str, ...], model: str, max_length: int, rounds: int) -> dict:
    "Tokenize every text with every contender, interleaved."
    return {text: tokenize_text(data, text, model, max_length, rounds) for text in texts}


def tokenize_text(data: Data, text: str, model: str, max_length: int, rounds: int) -> dict:
    "Tokenize one text with every contender, interleaved."
    file = data.train[text]
    with ExitStack() as stack:
        contenders, left_out = {}, {}
        for kind, environment in KINDS.items():
            job = tokenize_job(data, kind, str(file), model, max_length, f"{text}-{kind}")
            try:
                contender = stack.enter_context(Contender(data.place, environment, "tokenize_text.py", job))
                contender.receive()
                contenders[kind] = contender
            except Failure as failure:
                left_out[kind] = str(failure)
        figures, failed = interleave(contenders, rounds, {})
        peaks = {kind: contenders[kind].ask(do="stop") for kind in figures}
    megabytes, tokens = file.stat().st_size / 1e6, figures["langmlm"][0]["tokens"]
    results: dict[str, dict] = {kind: {"failed": reason} for kind, reason in (left_out | failed).items()}
    for kind, made in figures.items():
        seconds = [one["seconds"] for one in made]
        results[kind] = {
            "tokens_per_second": spread([tokens / one for one in seconds]),  # The tokens of langmlm's dataset, for all contenders
            "megabytes_per_second": spread([megabytes / one for one in seconds]),
            "bytes_per_token": made[-1]["bytes"] / made[-1]["tokens"] if "bytes" in made[-1] else None,
            "rounds": seconds,
            **peaks[kind],
        }
    ours = [1 / one["seconds"] for one in figures["langmlm"]]
    pairs = {
        f"langmlm / {kind}": ratio(ours, [1 / one["seconds"] for one in made])
        for kind, made in figures.items()
        if kind != "langmlm"
    }
    for name in noisy_names({"ratios": pairs}):
        print(f"  too noisy to tell: {name}", flush=True)
    return {"megabytes": megabytes, "tokens": tokens, "contenders": results, "ratios": pairs}


def tokenize_job(data: Data, kind: str, text: str, model: str, max_length: int, scratch: str) -> dict:
    "Describe the job of a tokenizing process."
    warm_up = data.work / "texts" / "warm-up.txt"
    if not warm_up.exists():
        lines = data.train["short"].read_text(encoding="utf-8").split("\n")[:WARM_UP_DOCUMENTS]
        warm_up.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "do": "tokenize",
        "kind": kind,
        "text": text,
        "warm_up_text": str(warm_up),
        "tokenizer": data.tokenizer(model, max_length),
        "max_length": max_length,
        "scratch": str(data.work / "tokenizing" / scratch),
    }
