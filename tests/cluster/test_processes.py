"""What is told of a stack's processes."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from kit.cluster.processes import SHARED_MEMORY, end, own_memory

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


HOLDS_SEMAPHORES = """
import multiprocessing, os, signal, sys
from multiprocessing import resource_tracker
locks = [multiprocessing.get_context("spawn").Lock() for _ in range(3)]
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
print(*(lock._semlock.name for lock in locks), flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_ended_leaves_no_named_semaphore_though_its_tracker_was_killed() -> None:
    command = [sys.executable, "-c", HOLDS_SEMAPHORES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        files = {f"sem.{name.lstrip('/')}" for name in holder.stdout.readline().split()}
        assert len(files & set(os.listdir(SHARED_MEMORY))) == 3
        end([psutil.Process(holder.pid)])
    assert not files & set(os.listdir(SHARED_MEMORY))
