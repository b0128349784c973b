"What tests of several packages need."

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from langmlm import tasks
from langmlm.testing import tiny_run


def same_weights(one: tasks.MLMTask | torch.nn.Module, two: tasks.MLMTask | torch.nn.Module) -> bool:
    "Whether two runs or models have the same weights, to the bit."
    first, second = ((each.model if isinstance(each, tasks.MLMTask) else each).state_dict() for each in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def with_validation_split(factory: pytest.TempPathFactory, documents: int, **settings) -> Callable[..., tasks.MLMTask]:
    "A function that creates runs with a validation split, each in a folder of its own beside tokenizer and dataset."
    folder = factory.mktemp("split")

    def create(**changes) -> tasks.MLMTask:
        config = {"validation_fraction": 0.2, "vocab_size": 500}
        return tiny_run(
            folder, documents, config, **{"output_dir": Path(mkdtemp(dir=folder), "run"), **settings, **changes}
        )

    return create
