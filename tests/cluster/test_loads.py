"""Files in which SGLang's schedulers tell how busy they are, and those that dead engines left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import RLSession
from kit.cluster import processes
from kit.doctor import stacks

SHARED = Path(processes.SHARED_MEMORY)


@pytest.fixture
def files() -> Iterator[dict[str, Path]]:
    """Files as SGLang names them: of nobody, of a living process, of another user, and a link."""
    name = f"sglang_loads_of_tests_{os.getpid()}_"
    made = {which: SHARED / f"{name}{which}.shm" for which in ("dead", "living", "other", "link")}
    for path in made.values():
        path.write_bytes(b"SLNS")
    made["link"].unlink()
    made["link"].symlink_to("/etc/hostname")
    if os.getuid() == 0:
        os.chown(made["other"], 65534, 65534)
    else:
        made["other"].unlink()
    yield made
    for path in made.values():
        path.unlink(missing_ok=True)


def test_only_files_of_load_that_no_process_has_open_are_removed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "stacks_root", lambda: tmp_path)  # folders are none of this test's
    code = "import sys; file = open(sys.argv[1], 'rb'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(files["living"])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == "open\n"
        found = processes.unowned_loads()
        assert files["dead"] in found
        assert not {files["living"], files["other"], files["link"]} & {*found}
        said = [finding for finding in stacks.findings([]) if finding.name == "shared memory"]
        assert "leftovers" in said[0].commands[0]
        assert "in shared memory" in stacks.stop(stacks.LEFTOVERS)
        assert not files["dead"].exists()
        assert files["living"].exists()
        assert files["link"].is_symlink()
        assert files["other"].exists() or os.getuid() != 0
        owner.communicate("")


def test_an_engine_keeps_its_file_of_load_in_the_stacks_own_folder(session: RLSession) -> None:
    stack = session.debug.stack
    found = list((stack.cluster.directory / "tmp").rglob("sglang_loads_*"))
    assert len(found) >= stack.layout.replicas  # those of engines before them go with the stack
    for index in range(stack.layout.replicas):
        for process in stack.watch.members(f"engine {index}"):
            assert not [f for f in processes.segments(process.pid) if "sglang_loads" in f]
