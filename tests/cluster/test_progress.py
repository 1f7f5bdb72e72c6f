"""Processes tell what they do while they start, and nothing of it can stop a start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.cluster import progress
from kit.cluster.progress import READY


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"stage-{name}").write_text(text)


def test_what_one_process_tells_another_reads(tmp_path: Path) -> None:
    code = "from kit.cluster import progress\nprogress.report('trainer', 'loading weights')"
    env = os.environ | {progress.DIRECTORY_ENV: str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)
    found = progress.read(tmp_path)
    assert list(found) == ["trainer"]
    assert found["trainer"].words == "loading weights"


def test_the_last_stage_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.DIRECTORY_ENV, str(tmp_path))
    progress.report("engine", "importing SGLang")
    before = progress.read(tmp_path)["engine"].since
    progress.report("engine", READY)
    after = progress.read(tmp_path)["engine"]
    assert after.words == READY
    assert after.since >= before
    assert len(list(tmp_path.iterdir())) == 1


def test_of_several_processes_the_one_behind_is_shown(tmp_path: Path) -> None:
    write(tmp_path, "engine-10", f'["{READY}", 5.0]')
    write(tmp_path, "engine-11", '["loading weights", 3.0]')
    write(tmp_path, "engine-12", '["loading weights", 2.0]')
    write(tmp_path, "engine-13", f'["{READY}", 1.0]')
    assert progress.read(tmp_path)["engine"] == progress.Stage("loading weights", 2.0)


def test_when_all_are_ready_the_last_one_tells_since_when(tmp_path: Path) -> None:
    for place, since in enumerate((3.0, 7.0, 5.0)):
        write(tmp_path, f"engine-{place}", f'["{READY}", {since}]')
    assert progress.read(tmp_path)["engine"] == progress.Stage(READY, 7.0)


def test_a_broken_file_or_none_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "engine-1", "[")
    write(tmp_path, "trainer-2", '["loading weights", 2.0]')
    assert list(progress.read(tmp_path)) == ["trainer"]
    assert progress.read(tmp_path / "gone") == {}


def test_a_report_that_nobody_asked_for_or_that_cannot_be_written_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.DIRECTORY_ENV, raising=False)
    progress.report("engine", "loading weights")
    monkeypatch.setenv(progress.DIRECTORY_ENV, str(tmp_path / "gone"))
    progress.report("engine", "loading weights")
    assert list(tmp_path.iterdir()) == []
