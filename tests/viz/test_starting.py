"""The line that is shown while a session starts."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kit.cluster.progress import READY, Stage
from kit.viz.live.progress import Starting, done_line, shown, under_way
from tests.viz.test_hostile_text import HOSTILE, assert_harmless, assert_visible

FOUND = {
    "engine": Stage("loading weights, capturing graphs", 110.0),
    "trainer": Stage("compiling layers (kept for the next start)", 105.0),
}


def test_both_sides_are_told_with_their_seconds() -> None:
    assert under_way(100.0, FOUND, 133.4, ray=True) == (
        "starting 33 s · engine: loading weights, capturing graphs 23 s · "
        "trainer: compiling layers (kept for the next start) 28 s"
    )


def test_before_the_processes_tell_anything_the_line_says_what_they_wait_for() -> None:
    assert under_way(100.0, {}, 104.0, ray=False) == "starting 4 s · Ray"
    waits = under_way(100.0, {}, 104.0, ray=True)
    assert waits == "starting 4 s · engine: process, imports · trainer: process, imports"


def test_a_side_that_is_ready_counts_no_seconds() -> None:
    found = FOUND | {"trainer": Stage(READY, 120.0)}
    assert under_way(100.0, found, 133.0, ray=True).endswith("· trainer: ready")


def test_the_line_that_stays_says_what_took_how_long() -> None:
    ready = {"engine": Stage(READY, 138.0), "trainer": Stage(READY, 141.0)}
    words = "Started in 41.2 s: engine after 38.0 s, trainer after 41.0 s."
    assert done_line(100.0, ready, 141.2) == words
    assert done_line(100.0, {}, 141.2) == "Started in 41.2 s."


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:16]))
def test_a_stage_stays_in_its_place_whatever_it_says(text: str) -> None:
    line = under_way(0.0, {"engine": Stage(text, 0.0)}, 1.0, ray=True)
    assert "\n" not in line
    assert_harmless(shown(line)["text/html"])
    assert_visible(shown(line)["text/plain"])


def test_where_nobody_watches_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kit.viz.live.progress.PATIENCE", 0.0)
    heard = io.StringIO()
    monkeypatch.setattr(sys, "stderr", heard)
    with Starting(dict, lambda: False) as starting:
        pass
    assert (starting.line, heard.getvalue()) == ("", "")


def in_a_terminal(body: str, patience: float) -> str:
    """What a terminal gets from a start whose block is `body`."""
    code = f"""
    import threading
    from pathlib import Path
    from kit.viz.live import progress
    progress.PATIENCE = {patience}
    with progress.Starting(dict, lambda: False) as starting:
        {body}
    """
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=slave, stdout=subprocess.DEVNULL
    ) as process:
        process.wait(timeout=60)
    os.close(slave)
    heard = b""
    try:
        while part := os.read(master, 65_536):
            heard += part
    except OSError:  # how a terminal ends whose other side is closed
        pass
    os.close(master)
    return heard.decode()


SHOWN_ONCE = "\n        ".join(("while not starting.line:", "    threading.Event().wait(0.01)"))


def test_a_terminal_keeps_one_line_of_a_start() -> None:
    heard = in_a_terminal(SHOWN_ONCE, patience=0.0)
    first, *_, last = heard.split("\r\x1b[K")[1:]
    assert re.match(r"starting \d+ s · Ray", first)
    assert last.startswith("Started in ")
    assert heard.count("\n") == 1


def test_a_terminal_keeps_nothing_of_a_start_that_failed() -> None:
    heard = in_a_terminal(f"{SHOWN_ONCE}\n        raise SystemExit(1)", patience=0.0)
    assert heard.endswith("\r\x1b[K")
    assert "Started" not in heard


def test_a_line_that_cannot_be_shown_costs_the_start_nothing(tmp_path: Path) -> None:
    body = f"import sys; sys.stderr.close()\n        {SHOWN_ONCE}\n        Path('done').touch()"
    in_a_terminal(body.replace("'done'", repr(str(tmp_path / "done"))), patience=0.0)
    assert (tmp_path / "done").exists()


def test_a_quick_start_shows_nothing() -> None:
    assert in_a_terminal("pass", patience=1000.0) == ""
