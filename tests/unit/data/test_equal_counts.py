"Processes that gather each other's weights must compute equally many micro-batches."

from dataclasses import replace

import pytest

from langmlm.testing import tiny_run


@pytest.mark.parametrize("equal_counts", [False, True])
def test_equal_counts(data, tmp_path, equal_counts: bool):
    "The last step of an epoch has 1 to 4 micro-batches; what is added has no labels, and the others are unchanged."
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "output_dir": tmp_path / "run"}
    loader = tiny_run(data["tokenizer"].parent, **options).loader
    ragged = 0
    for step in range(loader.plan.total_steps):
        alone = loader.load(step)
        shared = [
            replace(loader, process_index=index, num_processes=3, equal_counts=equal_counts).load(step)
            for index in range(3)
        ]
        counts = {len(part.batches) for part in shared}
        ragged += len(alone.batches) % 3 > 0
        assert not equal_counts or counts == {-(-len(alone.batches) // 3)}
        assert sum(part.predictions for part in shared) == alone.predictions
        predicting = [index for part in shared for index, batch in part.batches if len(batch.labels)]
        assert sorted(predicting) == [index for index, batch in alone.batches if len(batch.labels)]
    assert ragged
