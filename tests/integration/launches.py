"Join a launch without a launcher. Imports little: a test runs scripts that end as Python does, with all that is imported."

import os

import torch
from torch import distributed


def join_launch(number: int, rank: int, store: str | os.PathLike) -> None:
    "Set the variables of a launcher; processes meet through a file, since another process might take a free port."
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
