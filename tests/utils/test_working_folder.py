"""A session that is started in a folder that was deleted, or among files that hide packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = "from kit import RLSession\nRLSession.start('tiny')"


def started(code: str, folder: Path) -> str:
    """What Python says that starts a session there; it must not come to a start."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr
    assert not list(folder.glob("kit-*"))
    return ended.stderr


def test_a_deleted_working_directory_is_named_before_anything_starts(tmp_path: Path) -> None:
    deleted = "import os\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n"
    said = started(deleted + START, tmp_path)
    assert "The working directory of this process was deleted" in said
    assert "os.chdir" in said


def test_a_file_that_hides_a_package_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("")
    assert "ray.py hides ray" in started(START, tmp_path)
