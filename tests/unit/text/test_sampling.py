"A sample is uniform, reproducible, bounded in size, and the text itself if that is small enough."

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langmlm.text.selection import TextSample, affordable_bytes


@pytest.fixture
def documents() -> list[str]:
    "Two megabytes of numbered documents."
    draw = random.Random(0)
    return [f"{number} " + "x" * draw.randrange(200) for number in range(20_000)]


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=50), times=st.integers(1, 2_000))
def test_pieces(text: str, times: int):
    "Long documents are split into pieces whose concatenation is the document."
    pieces = list(TextSample([text * times], 10**9).pieces())
    assert "".join(pieces) == text * times
    assert max(map(len, pieces)) <= 10_000


def test_pieces_begin_with_a_space():
    "A document is split before a space, so that no word changes."
    pieces = list(TextSample(["storm flood bridge closed " * 2_000], 10**9).pieces())
    assert len(pieces) > 4 and all(piece.startswith(" ") for piece in pieces[1:])
    assert [len(piece) for piece in TextSample(["x" * 25_000], 10**9).pieces()] == [10_000, 10_000, 5_000]


def test_sample(documents: list[str]):
    "The sample has nearly the wanted size, and depends on the documents and the seed only."
    sample, again = TextSample(iter(documents), 300_000, seed=1), TextSample(documents, 300_000, seed=1)
    kept = list(sample.pieces())
    assert kept == list(again.pieces()) == list(sample.pieces())
    assert kept != list(TextSample(documents, 300_000, seed=2).pieces())
    assert [sample.total_bytes, sample.bytes] == [sum(map(len, documents)), sum(map(len, kept))]
    assert 260_000 < sample.bytes <= 300_000
    assert list(TextSample(documents, 10**9).pieces()) == documents
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        TextSample(documents, 0)


def test_every_piece_has_the_same_chance():
    "Over many seeds, first and last, short and long pieces are sampled equally often; shrinking keeps that."
    few = [("a" if number % 2 else "b" * 60) + str(number) for number in range(40)]
    times = Counter(text for seed in range(400) for text in TextSample(few, 600, seed).pieces())
    shares = [times[text] / 400 for text in few]
    assert max(shares) - min(shares) < 0.2
    sample = TextSample(few, 10**6, seed=3)
    part = list(sample.pieces(600))
    sample.shrink(600)
    assert [list(sample.pieces()), sample.bytes] == [part, sum(map(len, part))]


def test_affordable_bytes():
    "All of a text with few distinct words is affordable; of one where every word is new, as much as the limit."
    draw = random.Random(0)
    repeated = [" ".join(f"word{draw.randrange(1_000)}" for _ in range(20)) for _ in range(5_000)]
    always_new = [" ".join(f"{draw.randrange(10**7):07}" for _ in range(18)) for _ in range(5_000)]
    samples = [TextSample(texts, 10**6) for texts in (repeated, always_new)]
    affordable = [affordable_bytes(sample, str.split, limit=100_000, probe_bytes=80_000) for sample in samples]
    assert affordable[0] == samples[0].bytes
    distinct = len("".join(set(" ".join(TextSample(always_new, affordable[1]).pieces()).split())))
    assert 80_000 < distinct < 110_000
    assert affordable_bytes(samples[1], str.split, limit=10**6) == samples[1].bytes
