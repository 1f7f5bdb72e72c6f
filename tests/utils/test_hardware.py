"""What is known of the machine's memory."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("files", [FIRST, SECOND], ids=["cgroup v1", "cgroup v2"])
def test_cached_files_of_a_container_are_free_memory(
    files: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(hardware, "CONTAINER", tmp_path)
    assert hardware.free_memory() == LIMIT - USED + CACHED


@pytest.mark.parametrize("limit", ["max", None])
def test_a_container_without_a_limit_has_the_machines_memory(
    limit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(USED))
    monkeypatch.setattr(hardware, "CONTAINER", tmp_path)
    assert hardware.free_memory() > 100 * LIMIT
