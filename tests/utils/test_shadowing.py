"""A file that hides a package is named, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kit.errors import StackError
from kit.utils.shadowing import check_hidden_packages, hidden

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["ray.py", "tokenizers.py", "yaml/__init__.py", "PIL/__init__.py"])
def test_a_file_in_the_working_directory_that_hides_a_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    monkeypatch.chdir(tmp_path)
    package = name.partition("/")[0].removesuffix(".py")
    with pytest.raises(StackError, match=rf"{package}\S* hides {package}.*\n.*\n.*rename it"):
        check_hidden_packages()


def test_files_that_hide_nothing_that_is_needed_are_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("utils.py", "config.py", "test.py", "types.py", "reward.py", "train.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "ray").mkdir()  # without __init__.py the installed package comes first
    (tmp_path / "torch.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    check_hidden_packages()
    assert set(hidden(standard_library=True)) == {"types"}


def test_what_a_package_brings_along_for_itself_hides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing Ray puts a folder with a psutil of its own at the front of the path."""
    packages = Path(sysconfig.get_path("purelib"))
    monkeypatch.syspath_prepend(packages / "ray" / "thirdparty_files")
    check_hidden_packages()


def test_packages_in_a_folder_of_their_own_hide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pip install --target` leaves them, for PYTHONPATH."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    (tmp_path / "ray-9.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    check_hidden_packages()


def test_a_file_beside_a_script_is_named_though_the_script_runs_elsewhere(tmp_path: Path) -> None:
    beside = tmp_path / "scripts"
    beside.mkdir()
    (beside / "ray.py").write_text("")
    script = beside / "train.py"
    script.write_text(
        "from kit.utils.shadowing import check_hidden_packages\ncheck_hidden_packages()"
    )
    ended = run([sys.executable, str(script)], tmp_path)
    assert f"{beside / 'ray.py'} hides ray" in ended.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("pydantic", ["-c", "import kit; kit.SessionConfig"]), ("typer", ["-m", "kit", "--help"])],
)
def test_a_failed_import_names_the_file_that_hides_the_package(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / f"{name}.py").write_text("")
    ended = run([sys.executable, *arguments], tmp_path)
    assert ended.returncode == 1
    assert f"{name}.py hides {name}" in ended.stderr


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
