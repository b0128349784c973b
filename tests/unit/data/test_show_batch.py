"A batch is shown as the model gets it, with every masked token."

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from langmlm.data.batching import FlatBatch
from langmlm.data.loader import _html, _show_sequence
from langmlm.data.masking import IGNORE_INDEX, BatchSizes, MaskedBatch, MaskingRules
from langmlm.tasks import MLMTask
from langmlm.testing import tiny_run
from langmlm.tokens.encode import token_bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MLMTask:
    "A run of a few steps with two micro-batches each."
    return tiny_run(tmp_path_factory.mktemp("show"), 150, gradient_accumulation_steps=2, max_steps=9, num_train_epochs=1)


@pytest.mark.parametrize("step", [3, 16])
def test_it_is_the_batch_of_the_step(run: MLMTask, step: int):
    "Texts, labels and inputs are those that the loader gives to the model, in every epoch; the summary counts them."
    index, loader = 1, replace(run.loader, plan=replace(run.loader.plan, max_steps=20))
    assert (loader.plan.epochs_done(step) >= 1) == (step == 16)
    batch = loader.load(step).batches[index][1]
    shown = loader.show_batch(run.tokenizer, step, index, sequences=10**6)
    pieces = [piece for _, sequence in shown.sequences for piece in sequence]
    styles = [style for _, style in pieces if style]
    assert len(styles) == len(batch.labels) and set(styles) <= {"mask", "random", "unchanged"}
    vocabulary = token_bytes(run.tokenizer)
    for (text, style), label, seen in zip(
        (piece for piece in pieces if piece[1]), batch.labels.tolist(), batch.input_ids[batch.masked_positions].tolist()
    ):
        expected = "unchanged" if label == seen else "mask" if seen == run.tokenizer.mask_token_id else "random"
        assert style == expected and text.endswith({"mask": "-> <mask>]", "unchanged": " unchanged]"}.get(style, "]"))
        word = vocabulary[label].decode(errors="replace").strip()
        assert not word or not word.isprintable() or text.startswith(f"[{word} ")
    for style, words in (("mask", "replaced by <mask>"), ("random", "replaced by a random token"), ("unchanged", "unchanged")):
        assert f"{styles.count(style)} {words}" in shown.summary
    tokens, rows = len(batch.input_ids), len(batch.cu_seqlens) - 1
    counts = f"step {step}, micro-batch 1: sequences: {rows} ({rows} shown); tokens: {tokens}; to predict: {len(styles)} ("
    assert shown.summary.startswith(counts)


def masks_in_place(batch: FlatBatch, epoch: int, rules: MaskingRules) -> MaskedBatch:
    "A mask function of a user that changes the batch it gets, and counts every second prediction only."
    positions = torch.arange(1, len(batch.input_ids), 5)
    labels = batch.input_ids[positions].clone()
    labels[::2] = IGNORE_INDEX
    batch.input_ids[positions] = rules.mask_token_id
    return MaskedBatch(batch.input_ids, batch.position_ids, batch.cu_seqlens, positions, labels)


def test_masks_that_are_made_in_place(run: MLMTask):
    "The summary counts what the model predicts, and the text is that of the dataset."
    loader = replace(run.loader, mask=masks_in_place)
    shown = loader.show_batch(run.tokenizer, 3, 1, sequences=10**6)
    styles = [style for _, sequence in shown.sequences for _, style in sequence if style]
    counted = int((loader.load(3).batches[1][1].labels != IGNORE_INDEX).sum())
    assert styles == ["mask"] * counted and f"to predict: {counted} ({counted} replaced by <mask>, 0 " in shown.summary


def test_documents_are_rows(run: MLMTask):
    "Every sequence is a row with its index in the dataset; with its tokens put back, it is the text."
    shown = run.loader.show_batch(run.tokenizer, sequences=10**6)
    vocabulary = token_bytes(run.tokenizer)
    for row, pieces in shown.sequences:
        restored = "".join(re.sub(r"^\[(.*) (unchanged|-> .*)\]$", r"\1", text) if style else text for text, style in pieces)
        original = b"".join(vocabulary[id] for id in run.dataset[row]).decode(errors="replace")
        if "�" not in restored + original and original.isprintable():
            assert restored.replace(" ", "").replace("''", "") == original.replace(" ", "").replace("''", "")
    few = run.loader.show_batch(run.tokenizer, sequences=3)
    lengths = [run.dataset.lengths[row] for row, _ in few.sequences]
    assert len(lengths) == 3 and lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert [row for row, _ in few.sequences][0] == shown.sequences[0][0]
    assert [row for row, _ in few.sequences][-1] == shown.sequences[-1][0]
    assert len(run.loader.show_batch(run.tokenizer, sequences=0).sequences) == 1


def test_treatments_differ_without_color():
    "In words, and in the style of the border; spaces stay outside of the brackets."
    vocabulary = [b"<s>", b"</s>", b"<mask>", b" name", b"x", b" ", b"\n", b"<b>", b"\xe2"]
    ids = np.array([0, 3, 4, 3, 5, 6, 7, 8, 1])
    inputs = np.array([0, 2, 7, 3, 2, 6, 2, 4, 1])
    styles = np.array(["", "mask", "random", "unchanged", "mask", "", "mask", "random", ""], "<U9")
    pieces = _show_sequence(ids, inputs, styles, vocabulary)
    text = "".join(piece for piece, _ in pieces)
    assert text == "<s> [name -> <mask>][x -> <b>] [name unchanged] [' ' -> <mask>]\\n[<b> -> <mask>][� -> x]</s>"
    boxes = [_html(*piece) for piece in pieces if piece[1]]
    borders = {style: re.search(r"border:1px (\w+)", box)[1] for box, (_, style) in zip(boxes, (p for p in pieces if p[1]))}
    assert borders == {"mask": "solid", "random": "dashed", "unchanged": "dotted"}
    assert all("color:#000" in box for box in boxes)
    assert all(unescape(re.sub("<[^>]*>", "", box)) == piece for box, (piece, _) in zip(boxes, (p for p in pieces if p[1])))


def test_html_and_text(run: MLMTask):
    "A notebook gets a table in which all text is escaped, a terminal one line per sequence."
    shown = run.loader.show_batch(run.tokenizer, sequences=4)
    html = shown._repr_html_()
    assert html.count("<tr>") == 5 and "<mask>" not in html and "&lt;mask&gt;" in html and "<s>" not in html
    assert len(str(shown).splitlines()) == 5 and repr(shown) == str(shown)
    assert "\x1b" not in str(shown)


def test_padding_and_shares_do_not_matter(run: MLMTask):
    "Padded batches, and those of other processes, are shown as they are."
    other = replace(run.loader, sizes=BatchSizes(), process_index=1, num_processes=2)
    for micro_batch in (0, 1):
        assert other.show_batch(run.tokenizer, 1, micro_batch) == run.loader.show_batch(run.tokenizer, 1, micro_batch)


def test_task(run: MLMTask, tmp_path: Path):
    "The next step is shown, and the last one at the end; showing changes nothing."
    assert run.show_batch() == run.loader.show_batch(run.tokenizer, 0)
    run.state.step = 9
    assert run.show_batch(sequences=2) == run.loader.show_batch(run.tokenizer, 8, sequences=2)
    run.state.step = 0
    assert run.show_batch(step=4, micro_batch=1) == run.loader.show_batch(run.tokenizer, 4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 9}, "step must be 0 to 8, the last of the run, got 9"),
        ({"step": -1}, "step must be 0 to 8, the last of the run, got -1"),
        ({"micro_batch": 2}, "micro_batch must be 0 to 1, the last of step 0, got 2"),
        ({"micro_batch": -1}, "micro_batch must be 0 to 1, the last of step 0, got -1"),
    ],
)
def test_errors(run: MLMTask, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run.show_batch(**arguments)
