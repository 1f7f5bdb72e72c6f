"""What is known of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kit.utils import hardware

LIMIT, USED, CACHED = 8 << 20, 7 << 20, 4 << 20
FIRST = {
    "memory/memory.limit_in_bytes": LIMIT,
    "memory/memory.usage_in_bytes": USED,
    "memory/memory.stat": f"total_cache 1\ntotal_inactive_file {CACHED}",
}
SECOND = {
    "memory.max": LIMIT,
    "memory.current": USED,
    "memory.stat": f"anon 1\ninactive_file {CACHED}",
}


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a limit, whose control groups a test may fill; this process is in one."""
    monkeypatch.setattr(hardware, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(hardware, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("9:cpu,memory:/slurm/job_7/step_0\n0::/user.slice/job 7.scope\n")
    return tmp_path / "groups"


def fill(groups: Path, group: str, files: dict[str, object]) -> None:
    for name, content in files.items():
        kind, _, last = name.rpartition("/")
        (groups / kind / group).mkdir(parents=True, exist_ok=True)
        (groups / kind / group / last).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("files", "group"),
    [
        (FIRST, "."),
        (SECOND, "."),
        (FIRST, "slurm/job_7/step_0"),
        (FIRST, "slurm/job_7"),
        (SECOND, "user.slice/job 7.scope"),
    ],
    ids=["v1 container", "v2 container", "v1 group", "group above it", "v2 group"],
)
def test_memory_is_that_of_the_container_whose_cached_files_are_free(
    groups: Path, files: dict[str, object], group: str
) -> None:
    fill(groups, group, files)
    assert hardware.free_memory() == LIMIT - USED + CACHED
    assert hardware.total_memory() == LIMIT
    assert hardware.Card.host().total == LIMIT


def test_the_smallest_limit_of_all_groups_around_a_process_holds(groups: Path) -> None:
    fill(groups, "user.slice", SECOND | {"memory.max": LIMIT // 2})
    fill(groups, "user.slice/job 7.scope", SECOND)
    assert hardware.total_memory() == LIMIT // 2
    assert hardware.free_memory() == LIMIT // 2 - USED + CACHED


@pytest.mark.parametrize("limit", ["max", 9223372036854771712, None])
def test_a_container_without_a_limit_has_the_machines_memory(groups: Path, limit: object) -> None:
    if limit:
        fill(groups, ".", SECOND | {"memory.max": limit})
    assert hardware.total_memory() == psutil.virtual_memory().total
    assert hardware.free_memory() > 100 * LIMIT


def test_limits_of_other_groups_are_none_of_ours(groups: Path) -> None:
    fill(groups, "system.slice", SECOND)
    fill(groups, "slurm/job_8", FIRST)
    assert hardware.total_memory() == psutil.virtual_memory().total
