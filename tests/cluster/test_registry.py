"""The folder of a user's stacks is that user's own, also where all may write."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from kit.cluster import registry
from kit.cluster.registry import Entry
from kit.errors import StackError

SOMEBODY = 12345
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of others")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folder is, for a user without a home: as in /tmp, where all may write."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "tmp").mkdir(mode=0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f".kit-stacks-{os.getuid()}"


def test_the_folder_in_the_fallback_place_is_made_private(shared: Path) -> None:
    assert registry.folder() == shared
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    shared.chmod(0o777)
    assert registry.folder() == shared
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700


@as_root
@pytest.mark.parametrize("kind", ["a folder", "a link to theirs", "a link to mine"])
def test_what_somebody_else_put_there_is_refused(shared: Path, kind: str) -> None:
    target = shared.parent / "target"
    target.mkdir(mode=0o755)
    if kind == "a folder":
        target.rename(shared)
    else:
        shared.symlink_to(target)
    if kind != "a link to mine":
        os.chown(shared, SOMEBODY, SOMEBODY)
    os.chown(shared, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(StackError, match="belongs to another user"):
        registry.folder()
    if kind != "a folder":
        assert stat.S_IMODE(target.stat().st_mode) == 0o755, "and nothing of it was changed"


def test_a_file_in_its_place_is_refused(shared: Path) -> None:
    shared.touch()
    with pytest.raises(StackError, match="cannot be used"):
        registry.folder()


def entry() -> Entry:
    return registry.new("s", os.getpid(), Path("/tmp/x"), "token", name="n", device="cpu")


def test_a_file_of_wrong_types_is_no_stack(shared: Path) -> None:
    row = asdict(entry())
    file = registry.folder() / "s.json"
    file.write_text(json.dumps(row))
    assert Entry.read(file) == entry_of(row)
    for wrong in (
        {"head": "1"}, {"head": -1}, {"head": 2**40}, {"stack": "../x"}, {"name": 3},
        {"created": []}, {"directory": "\0"}, {"token": None}, {"device_gib": "x"},
    ):  # fmt: skip
        file.write_text(json.dumps(row | wrong))
        assert Entry.read(file) is None, wrong
    for text in ("[" * 9000, "[]", "{", '{"odd": 1}'):
        file.write_text(text)
        assert Entry.read(file) is None
    assert registry.living() == []
    file.unlink()
    file.symlink_to("/dev/zero")
    assert Entry.read(file) is None


def entry_of(row: dict[str, object]) -> Entry:
    return Entry(**row)  # type: ignore[arg-type]


@as_root
def test_a_file_of_somebody_else_is_no_stack(shared: Path) -> None:
    file = registry.folder() / "s.json"
    file.write_text(json.dumps(asdict(entry())))
    assert registry.living()
    os.chown(file, SOMEBODY, SOMEBODY)
    assert registry.living() == []
