"The training log, FLOPs, speed and the time estimate."

from time import sleep
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from IPython.core.formatters import DisplayFormatter
from transformers import RobertaConfig

from langmlm.train import metrics
from langmlm.train.metrics import History, SpeedMeter, format_filled_masks, peak_flops, training_flops

STEPS = range(100, 2_001, 100)
ENTRIES = [{"step": step, "epoch": step / 1_000, "loss": 5 + 400 / step, "learning_rate": 1e-4} for step in STEPS]
ROLLBACK = {"step": 850, "epoch": 0.85, "rollback": {"to_step": 700}}
SPIKE = {"step": 850, "epoch": 0.85, "loss_spike": {}}
EVALUATIONS = [{"step": step, "eval_loss": 5.2} for step in range(500, 2_001, 500)]
CPU = torch.device("cpu")


def test_table():
    "A long log shows its first and latest steps, a short one all."
    assert len(str(History(ENTRIES)).splitlines()) == 1 + 12 and repr(History(ENTRIES)) == str(History(ENTRIES))
    assert len(str(History(ENTRIES[:12])).splitlines()) == 1 + 12 and "..." not in str(History(ENTRIES[:12]))
    header, first, ellipsis, *_, last = str(History(ENTRIES)).splitlines()
    assert header.split() == ["step", "epoch", "loss", "learning_rate", "grad_norm"]
    assert first.split()[:2] == ["100", "0.10"] and last.split()[0] == "2,000" and set(ellipsis.split()) == {"..."}
    assert str(History()).split() == header.split()


def test_table_with_events_and_evaluations():
    "Events are always shown; a step and its evaluation share a row."
    history = History([*ENTRIES[:8], ROLLBACK, *ENTRIES[8:], *EVALUATIONS])
    table = str(history)
    assert "rollback to step 700" in table and "rollback to step 700" in history._repr_html_()
    assert "event" not in str(History(ENTRIES)) and "eval_loss" not in str(History(ENTRIES))
    assert "eval_loss" in table and "eval_accuracy" not in table
    assert str(History([*ENTRIES[:8], EVALUATIONS[0]])).split().count("500") == 1
    assert "loss spike" in str(History([SPIKE])) and "loss spike" in str(History([SPIKE, *ENTRIES]))


def test_html():
    "The table of a notebook has a header and a row per line of the text."
    html = History(ENTRIES)._repr_html_()
    assert html.startswith("<table><thead><tr><th>step</th>") and html.count("<tr>") == 13 and html.count("<th>") == 5


def test_plot(tmp_path):
    "The figure has both losses, the baseline and events, and is saved; without a loss there is none."
    figure = History([*ENTRIES, *EVALUATIONS, ROLLBACK]).plot(tmp_path / "loss.png", unigram_entropy=6.2)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training loss", "validation loss", "unigram entropy: 6.20"]
    assert [text.get_text() for text in axes.texts] == ["rollback to step 700"]
    with pytest.raises(ValueError, match="has not reached its first logging step"):
        History().plot()


def test_loss_to_beat(tmp_path):
    "The latest unigram entropy of the log stands below the table, and is a labeled line in the plot, unless another is given."
    history = History(
        [ENTRIES[0] | {"unigram_entropy": 7.5}, *ENTRIES[1:3], ENTRIES[3] | {"unigram_entropy": 6.25}, *EVALUATIONS]
    )
    assert history.unigram_entropy == 6.25 and History(ENTRIES).unigram_entropy is None
    assert str(history).splitlines()[-1] == "loss to beat: 6.250, the unigram entropy"
    assert "<caption" in history._repr_html_() and "loss to beat: 6.250, the unigram entropy<" in history._repr_html_()
    assert "loss to beat" not in str(History(ENTRIES)) and "<caption" not in History(ENTRIES)._repr_html_()
    for given, label in ((None, "unigram entropy: 6.25"), (5.0, "unigram entropy: 5.00")):
        (axes,) = history.plot(unigram_entropy=given).axes
        assert axes.get_legend().get_texts()[-1].get_text() == label
        assert axes.lines[-1].get_ydata()[0] == float(label.split()[-1])
    (axes,) = History(ENTRIES).plot().axes
    assert len(axes.lines) == 1


def test_filled_masks():
    "The latest ones are below the table; text of the model and the user is escaped, and keeps to one line."
    first = {"sentence": "old <mask>", "predictions": [[["x", 1.0]]]}
    probe = {"sentence": "A <mask>\nof\t<mask>.", "predictions": [[[" b", 0.5], ["\n", 0.25]], [[" <i>", 0.125]]]}
    held_out = {"sentence": "a <mask>", "held_out": " c", "predictions": [[[" c", 0.999]]]}
    entries = [EVALUATIONS[0] | {"filled_masks": [first]}, EVALUATIONS[1] | {"filled_masks": [probe, held_out]}]
    history = History([*ENTRIES[:3], *entries])
    assert format_filled_masks([probe]) == [("A <mask> of <mask>.", "", "' b' 50%, '\\n' 25% | ' <i>' 12%")]
    assert str(history).splitlines()[-4:] == [
        "",
        "filled masks at step 1,000:",
        "A <mask> of <mask>. -> ' b' 50%, '\\n' 25% | ' <i>' 12%",
        "a <mask> (held out: ' c') -> ' c' 100%",
    ]
    html = history._repr_html_()
    assert (
        "<mask>" not in html
        and "<i>" not in html
        and "A &lt;mask&gt; of &lt;mask&gt;." in html
        and "step 1,000" in html
    )
    assert "old" not in html and html.count("<table>") == 2 and History(ENTRIES)._repr_html_().count("<table>") == 1


def test_live_display_is_not_repeated():
    "In the cell that displays the table live, the history displays nothing; in later cells it does."
    history, displayed = History(ENTRIES[:2]), []
    cell = patch.object(metrics, "_current_cell", lambda: 5)
    with cell, patch.object(metrics, "in_notebook", lambda: True), patch("IPython.display.display") as display:
        display.return_value.update = lambda value: displayed.append(DisplayFormatter().format(value))
        refresh = history.display_live()
        history.log_history += ENTRIES[2:4]
        refresh()
        assert DisplayFormatter().format(history) == ({}, {})
        assert "text/html" in DisplayFormatter().format(History(ENTRIES))[0]  # Another history
    ((formats, _),) = displayed
    assert formats["text/html"] == history._repr_html_() and formats["text/plain"] == str(history)
    with patch.object(metrics, "_current_cell", lambda: 6):
        assert DisplayFormatter().format(history)[0]["text/html"] == history._repr_html_()


def test_live_display_in_a_notebook():
    "The table is displayed once, and the function updates that display."
    notebook, cell = patch.object(metrics, "in_notebook", lambda: True), patch.object(metrics, "_current_cell", lambda: 5)
    with notebook, cell, patch("IPython.display.display") as display:
        refresh = History(ENTRIES).display_live()
        ((table,), options) = display.call_args
        assert str(table) == str(History(ENTRIES)) and options == {"display_id": True}
        refresh()
        refresh()
        assert [call.args for call in display.return_value.update.call_args_list] == [(table,)] * 2
        display.assert_called_once()
        assert History(ENTRIES).display_live(disable=True) is None
        display.assert_called_once()


def test_live_display_outside_of_notebooks():
    "Nothing is displayed, and a notebook that hides the live table shows the returned one."
    history = History(ENTRIES)
    assert history.display_live() is None is history.display_live(disable=True) is history.display_live(disable=False)
    with patch.object(metrics, "_current_cell", lambda: 5):
        assert "text/html" in DisplayFormatter().format(history)[0]


def test_training_flops():
    "The head and the end of the last layer are counted at predictions only; attention is quadratic in the length."
    rows = np.full(32, 512)
    needed = training_flops(RobertaConfig(), rows, int(0.15 * rows.sum())) / rows.sum()
    assert 0.55e9 < needed < 0.6e9 < training_flops(RobertaConfig(), rows, int(rows.sum())) / rows.sum()
    config = RobertaConfig(vocab_size=7, hidden_size=2, intermediate_size=3, num_hidden_layers=1)
    # 3 * 2 * 2 weights at 5 tokens, 2 * 2 per pair of 3**2 + 2**2; at 1 prediction 2 * 2 + 2 * 2 * 3 and 2 * 2 + 2 * 7
    assert training_flops(config, np.array([3, 2], np.int32), 1) == 6 * (12 * 5 + 4 * 13 + 16 + 18)


def test_peak_flops(monkeypatch):
    "Looked up by the name of a GPU, the more specific name first; measured once elsewhere."
    peak = peak_flops(CPU, "no")
    assert 1e8 < peak < 1e14 and peak_flops(CPU, "no") == peak
    for name, tflops in (
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GH200 480GB", 989),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak_flops.cache_clear()
        assert peak_flops(torch.device("cuda"), "bf16") == tflops * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")  # No A100
    monkeypatch.setattr(torch, "full", Mock(side_effect=ZeroDivisionError))  # It measures
    peak_flops.cache_clear()
    with pytest.raises(ZeroDivisionError):
        peak_flops(torch.device("cuda"), "bf16")
    peak_flops.cache_clear()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_measuring_the_peak_takes_little_time(precision: str):
    "A CPU without instructions for bf16 does a billion operations per second."
    peak_flops.cache_clear()
    with FlopCounterMode(display=False) as counter:
        peak_flops(CPU, precision)
    assert 0 < counter.get_total_flops() < 2e9


def test_speed_meter():
    "Rates and shares of what was added, without the time that was excluded."
    config = RobertaConfig(num_hidden_layers=1, hidden_size=64)
    peak = peak_flops(CPU, "no")  # Measured now, so that it does not take time below
    lengths = np.full(50, 50)
    step_batches = SimpleNamespace(tokens=2_500, computed_tokens=2_525, padding=25, lengths=lengths, predictions=375)
    meter = SpeedMeter(CPU, "no", config)
    sleep(0.1)
    meter.add(step_batches, waited=0.05)
    meter.add(step_batches, waited=0.0)
    assert meter.flops == 2 * training_flops(config, lengths, 375) and meter.tokens == 5_000
    meter.flops = 0.02 * peak
    reading = meter.reading()
    assert list(reading) == ["tokens_per_second", "mfu", "padding_share", "data_wait_share", "memory_gb"]
    assert 0 < reading["tokens_per_second"] <= 50_000 and 0 < reading["mfu"] <= 0.2
    assert reading["tokens_per_second"] / 5_000 == pytest.approx(reading["mfu"] / 0.02, rel=0.1)
    assert reading["padding_share"] == 0.0099 and 0 < reading["data_wait_share"] <= 0.5
    assert 0.05 < reading["memory_gb"] < 100
    assert " tokens/s, " in str(meter) and " of the device's peak (MFU), 1.0% padding, " in str(meter)


def test_excluded_time():
    "Excluding half of the time doubles the speed."
    meter = SpeedMeter(CPU, "no", RobertaConfig())
    meter.tokens = 1_000
    with patch.object(metrics, "perf_counter", lambda: meter._start + 10):
        assert meter.reading()["tokens_per_second"] == 100
    end = meter._start + 10
    meter.exclude(5.0)
    with patch.object(metrics, "perf_counter", lambda: end):
        assert meter.reading()["tokens_per_second"] == 200
