"""A session that is started in a folder that was deleted, or among files that hide packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_runs_are_kept_at_home_where_the_folder_is_not_ones_own_to_write(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kit.utils.files import runs_here; "
    code += "import os; os.setuid(65534); print(runs_here())"
    environment = {"HOME": "/home/somebody", "PATH": "/usr/bin:/bin"}

    def says(code: str) -> str:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return ended.stdout.strip()

    assert says(code) == "/home/somebody/papermill_runs"
    (tmp_path / "papermill_runs").mkdir(mode=0o777)
    (tmp_path / "papermill_runs").chmod(0o777)
    assert says(code.replace("os.setuid(65534)", "pass")) == "papermill_runs"


def test_a_file_that_hides_a_package_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("")
    assert "ray.py hides ray" in started(START, tmp_path)
