"Measure the peak memory of roberta-base with 32 rows of 512 tokens, where the logits could dominate."

from data import Data
from processes import Contender, Failure
from workloads import PEERS, train_job

BATCH_SIZE = 32  # Rows of `max_length`
STEPS = 2  # The optimizer's memory is allocated in the first


def run_memory(data: Data, model_name: str, model: dict, max_length: int, device: str) -> dict:
    "Measure a run of two steps in each precision; also return the size of all its logits."
    dataset = data.dataset("langmlm", "long", model_name, max_length)["path"]
    place = {"tokenizer": data.tokenizer(model_name, max_length), "dataset": dataset}
    results: dict[str, dict] = {}
    for precision in ("bf16",) if device == "cuda" else ("fp32", "bf16"):
        job = train_job(
            "langmlm",
            place | {"run_folder": str(data.work / "runs" / f"memory-{precision}")},
            model,
            max_length,
            device=device,
            precision=precision,
            batch_size=BATCH_SIZE,
            warm_up_steps=1,
            warmup_steps=0,
            logging_steps=1,
            max_steps=STEPS + 1,
        )
        try:
            with Contender(data.place, "langmlm", PEERS["langmlm"].script, job) as contender:
                contender.receive()
                tokens = contender.ask(do="round", steps=STEPS - 1)["round"]["tokens"]
                results[precision] = {"tokens": tokens, **contender.ask(do="stop")}
        except Failure as failure:
            results[precision] = {"failed": str(failure)}
        print(f"  {precision}: {results[precision]}", flush=True)
    all_logits = BATCH_SIZE * max_length * model["vocab_size"] * 4
    return {
        "batch_size": BATCH_SIZE,
        "max_length": max_length,
        "bytes_of_all_logits": all_logits,
        "contenders": results,
    }
