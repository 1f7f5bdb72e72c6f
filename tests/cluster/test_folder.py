"""A stack's folder is made where Ray can keep its sockets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from kit.cluster import folder
from kit.errors import StackError


@pytest.mark.parametrize("name", ["slurm_jobdir_" + "x" * 60, "ü"])
def test_a_temporary_folder_that_ray_cannot_use_gives_way_to_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    assert folder.unsuitable(str(place))
    assert str(folder.stacks_root()) in folder.OTHERS


def test_a_short_temporary_folder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert folder.stacks_root() == Path("/var/tmp")
    longest = folder.LONGEST_SOCKET - len(folder.SOCKET)
    assert not folder.unsuitable("/" * longest)
    assert f"{longest + 1} characters" in folder.unsuitable("/" * (longest + 1))


def test_where_no_folder_will_do_the_error_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 60)
    monkeypatch.setattr(folder, "OTHERS", ("/nowhere",))
    with pytest.raises(StackError, match=r"65 characters.*\n.*set TMPDIR"):
        folder.stacks_root()
