"Statistics of a corpus, and how they are displayed."

import unicodedata

import numpy as np
import pytest

from langmlm.tokens import report as module
from langmlm.tokens.report import LENGTH_EDGES, Report, add_statistics, check_unknown, count_lengths, count_text
from langmlm.tokens.report import pack_bits, warn_of_unknown


@pytest.fixture
def manifest() -> dict:
    "A manifest of 6,000 documents."
    lengths = np.random.default_rng(0).lognormal(2.5, 1, 6_000).astype(int)
    statistics = add_statistics(300, []) | {"documents": 6_000, "bytes": 400_000, "words": 70_000, "tokens": 90_000}
    statistics |= {"long_documents": 12, "pieces": 30, "duplicates": 600, "unusual": {"U+FFFD": 5, "U+0000": 2}}
    statistics |= {"lengths": count_lengths(lengths), "used": pack_bits(np.arange(300) < 30), "longest_token": "<b>"}
    manifest = {"max_length": 64, "long_lines": "split", "vocab_size": 300, "drop_duplicates": False}
    return manifest | {"statistics": statistics, "splits": {"train": {"documents": 6_000, "sequences": 6_018}}}


def test_count_text(documents: list[str]):
    "Bytes and words are those that Python counts; unusual characters are found, ordinary ones are not."
    size, words, _ = count_text(documents)
    assert size == sum(len(document.encode()) for document in documents)
    assert words == sum(len(document.split()) for document in documents)
    assert count_text(["zero\0 \0 \x85 caf\xe9", "\ufeff\ufffd half-\xadhidden"])[2].total() == 6
    assert not count_text(["\ttab, naïve\u00a0日本\r\n"])[2]
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        count_text(["\ud83d"])


def test_accents_behind_their_letter():
    "Those that NFC joins; letters that have no such character, and scripts with combining vowels, are ordinary."
    words = ["perché", "がくせい", "q\u0301", "กิน", "हिन्दी", "שָׁלוֹם", "क़"]
    composed, decomposed = ([unicodedata.normalize(form, word) for word in words[:3]] + words[3:] for form in ("NFC", "NFD"))
    assert not count_text(composed)[2]
    assert count_text([*composed, *decomposed])[2] == {"U+0301": 1, "U+3099": 1}


def test_every_unusual_character_is_counted():
    "Also those between ordinary characters, which are left out before the search."
    numbers = [*range(0xD800), *range(0xE000, 0x11000), *range(0xF0000, 0x110000, 97)]
    unusual = [number for number in numbers if module._UNUSUAL.fullmatch(chr(number))]
    _, _, found = count_text(["a".join(map(chr, numbers))])
    assert len(unusual) > 6_000 and {found[f"U+{number:04X}"] for number in unusual} == {1}


def test_count_lengths():
    "Every document is in one bin, empty ones in the first."
    bins = count_lengths(np.array([0, 1, 1, 2, 511, 512, 10**9]))
    assert sum(bins) == 7 and bins[:3] == [1, 2, 1] and len(bins) == len(LENGTH_EDGES) + 1


def test_add_statistics():
    "Counts are added, used tokens united, and the longest token stays; parts of other sizes are an error."
    nothing = add_statistics(3, [])
    assert add_statistics(3, [nothing, nothing]) == nothing
    first = nothing | {"documents": 2, "unusual": {"U+0000": 1}, "longest_token": "the", "skipped": {"empty": 1}}
    first |= {"used": pack_bits(np.array([False, True, False])), "lengths": count_lengths(np.array([1, 1]))}
    second = nothing | {"documents": 3, "unusual": {"U+FFFD": 5}, "longest_token": "weather", "skipped": {"empty": 2}}
    second |= {"used": pack_bits(np.array([False, True, True])), "lengths": count_lengths(np.array([0, 1, 5]))}
    both = add_statistics(3, [first, second])
    assert both["documents"] == 5 and both["unusual"] == {"U+0000": 1, "U+FFFD": 5} and both["skipped"] == {"empty": 3}
    assert both["longest_token"] == "weather" and both["used"] == second["used"]
    assert both["lengths"] == count_lengths(np.array([1, 1, 0, 1, 5]))
    with pytest.raises(ValueError, match="shorter"):
        add_statistics(3, [first, second | {"lengths": [1]}])


def test_unknown_tokens(manifest: dict, caplog: pytest.LogCaptureFixture):
    "Of the first shard, more than 90% are an error; of the whole, more than 1% are a warning; the report has the share."
    nothing = add_statistics(3, [])
    for unknown in (0, 1, 900):
        check_unknown(nothing | {"tokens": 1_000, "unknown": unknown})
    check_unknown(nothing)
    with pytest.raises(ValueError, match="901 of the first 1,000 tokens are unknown to the tokenizer.*leave tokenizer out"):
        check_unknown(nothing | {"tokens": 1_000, "unknown": 901})
    for unknown in (0, 10):
        warn_of_unknown(nothing | {"tokens": 1_000, "unknown": unknown})
    warn_of_unknown(nothing)
    assert not caplog.messages
    warn_of_unknown(nothing | {"tokens": 1_000, "unknown": 11})
    assert caplog.messages == ["11 of 1,000 tokens (1.1 %) are unknown to the tokenizer: nothing can be learned from them"]
    statistics = manifest["statistics"]
    with_unknown = Report(manifest | {"statistics": statistics | {"unknown": 4_500}})
    older = Report(manifest | {"statistics": {name: value for name, value in statistics.items() if name != "unknown"}})
    assert dict(module._report_rows(with_unknown))["unknown tokens"] == "4,500 (5.0%)"
    assert dict(module._report_rows(older))["unknown tokens"] == "none"
    older_part = {name: value for name, value in nothing.items() if name != "unknown"}
    assert add_statistics(3, [older_part, nothing | {"unknown": 2}])["unknown"] == 2


def test_report_is_a_mapping(manifest: dict):
    "The report has the keys of the manifest."
    report = Report(manifest)
    assert dict(report) == manifest and len(report) == len(manifest)
    with pytest.raises(KeyError, match="words"):
        report["words"]


def test_report_as_text(manifest: dict):
    "The table names what was counted, in correct plurals."
    text = str(Report(manifest))
    assert "5 x U+FFFD replacement character, 2 x U+0000 NUL" in text and "12 documents, split into 30 sequences" in text
    assert "30 of 300 tokens (10.0%)" in text and "6,018 (train)" in text
    rows = dict(module._report_rows(manifest))
    assert rows["duplicates"] == "600" and rows["validation split"] == "none"
    one = manifest | {"splits": manifest["splits"] | {"validation": {"documents": 1, "sequences": 2}}, "drop_duplicates": True}
    rows = dict(module._report_rows(one))
    assert rows["validation split"] == "1 document" and rows["duplicates"] == "0 dropped"
    assert rows["sequences"] == "6,018 (train) and 2 (validation)"


def test_report_as_html(manifest: dict):
    "Cells are escaped, and neither the table nor the picture forces a width."
    html = Report(manifest)._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html and 'alt="' in html
    assert "max-width:100%" in html and "width=" not in html and "overflow-wrap:anywhere" in html


def test_plot(manifest: dict):
    "The histogram has one pair of axes, and an empty corpus has one, too."
    assert len(Report(manifest).plot().axes) == 1
    empty = Report(manifest | {"statistics": manifest["statistics"] | {"lengths": count_lengths(np.zeros(0, int))}})
    assert "lengths             none" in str(empty)


def test_character_names():
    "Characters without a name in Unicode have one here."
    names = [module._character_name(code_point) for code_point in ("U+0000", "U+FFFD", "U+E000", "U+0003")]
    assert names == ["U+0000 NUL", "U+FFFD replacement character", "U+E000 private use", "U+0003 control character"]
