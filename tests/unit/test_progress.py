"Progress bars appear where somebody can see them."

import io
from unittest.mock import patch

import pytest

from langmlm.progress import progress_bar


class Terminal(io.StringIO):
    "A stream that says it is a terminal."

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("disable", "in_notebook", "stream", "visible"),
    [
        (None, False, io.StringIO, False),
        (None, False, Terminal, True),
        (None, True, io.StringIO, True),
        (False, False, io.StringIO, True),
        (True, True, Terminal, False),
        (True, False, Terminal, False),
    ],
)
def test_where_bars_are_shown(disable, in_notebook: bool, stream: type, visible: bool):
    "By default in notebooks and terminals only; `disable` decides otherwise."
    with patch("langmlm.progress.in_notebook", lambda: in_notebook), patch("sys.stderr", stream()) as written:
        with progress_bar(10, "Training", " steps", initial=3, disable=disable) as bar:
            assert (not bar.disable) == visible
            bar.update(7)
            bar.refresh()
    assert bool(written.getvalue()) == visible


def test_what_a_bar_shows():
    "Description, unit, and how much was done before."
    with patch("sys.stderr", io.StringIO()) as written:
        with progress_bar(10, "Training", " steps", initial=3, disable=False) as bar:
            assert (bar.n, bar.total) == (3, 10)
            bar.update(4)
            bar.refresh()
    assert "Training:  70%" in written.getvalue() and "7/10" in written.getvalue() and "steps" in written.getvalue()


def test_unknown_total():
    "A bar without a total counts."
    with patch("sys.stderr", io.StringIO()):
        with progress_bar(None, "Reading", " documents", disable=False) as bar:
            bar.update(5)
    assert bar.total is None and bar.n == 5
