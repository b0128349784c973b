"An engine for distributed work tokenizes the parts of a dataset: the contract is `shard=(i, n)` and a join."

import os
from itertools import islice
from pathlib import Path

import pytest
from forks import fork_server

from langmlm import tasks
from langmlm.text.corpus import docstrings

os.environ["DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD"] = "forkserver"  # Workers need no imports
distributed = pytest.importorskip("distributed", reason="needs Dask: pip install dask distributed")


def make_part(part: int, parts: int, texts: str, tokenizer: str, dataset: str) -> int:
    "Tokenize a part on a worker; return the number of its tokens."
    config = {"max_length": 64, "shard": (part, parts), "path_to_save_dataset": dataset}
    return tasks.create_tokenizer(texts, config, tokenizer=tokenizer).train()["tokens"]


def test_dask(data, tmp_path: Path):
    "Four parts on two workers, one of which dies and is replaced, give the dataset of a single process."
    texts = tmp_path / "texts"
    texts.mkdir()
    documents = list(islice(docstrings(), 800))
    for number in range(8):
        (texts / f"{number}.txt").write_text("\n".join(documents[number::8]), encoding="utf-8")
    arguments = {"texts": str(texts), "tokenizer": str(data["tokenizer"]), "dataset": str(tmp_path / "dataset")}
    fork_server()
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    with distributed.LocalCluster(**local) as cluster, distributed.Client(cluster) as client:
        futures = client.map(make_part, range(4), parts=4, **arguments, pure=False)
        worker = next(iter(client.scheduler_info()["workers"]))
        client.restart_workers([worker])  # Its parts are made again by whichever worker is free
        tokens = client.gather(futures)
    parts = sorted(tmp_path.glob("dataset.part-*-of-4"))
    assert len(parts) == len(tokens) == 4 and all(tokens)
    joined = tasks.join_dataset(parts, tmp_path / "dataset")
    config = {"max_length": 64, "path_to_save_dataset": tmp_path / "single"}
    single = tasks.create_tokenizer(texts, config, tokenizer=data["tokenizer"]).train()
    assert joined["content"] == single["content"] and joined["tokens"] == sum(tokens)
