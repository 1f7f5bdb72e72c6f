"""What is told of a stack's processes."""

from __future__ import annotations

import os

import psutil

from kit.cluster.processes import own_memory

MIB = 1 << 20


def test_memory_that_forks_share_counts_once() -> None:
    held = b"x" * (200 * MIB)
    reading, writing = os.pipe()
    forks = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)  # until the end of the test
            os._exit(0)
        forks.append(pid)
    try:
        together = own_memory([psutil.Process(), *map(psutil.Process, forks)])
        ours = psutil.Process().memory_info()
        assert len(held) < together < 1.5 * (ours.rss - ours.shared)
    finally:
        os.close(writing)
        for pid in forks:
            os.waitpid(pid, 0)


def test_a_process_that_has_ended_has_no_memory() -> None:
    child = psutil.Popen(["true"])
    child.wait()
    assert own_memory([child]) == 0
