"""Half an hour of everything that can go wrong, at random: `make soak`.

    python -m tests.faults.soak [MINUTES] [SEED]

Steps, interrupts, kills, restarts, checkpoints and a full disk, in an order that the seed says.
What an interrupt or a killed engine leaves must be, bit by bit, what undisturbed steps leave; at
the end no process, no shared memory and no open port may be left, and memory must be flat.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from kit import RLSession
from kit.errors import CheckpointError, StackError
from tests.faults.interrupts import digests, interrupted
from tests.processes import alive, kill, named_memory, of_engine, of_head, of_trainer

EPISODE = 6
"""Steps from the first weights until it begins again, so that all digests are known."""
FLAT = 1.25
"""Memory at the end, as a multiple of what it was after a third of the time."""


class Soak:
    """A session, what it has to be after each step, and what was done to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.stacks: list[tuple[int, str]] = []
        self.shared: set[str] = set()
        """Names of shared memory that its processes were seen with."""
        self.session = self._noted(RLSession.start("tiny"))
        self.first = self.session.save(folder / "first")
        self.kept = self.first
        self.expected = [digests(self.session)]
        begin = time.perf_counter()
        for _ in range(EPISODE):
            self.session.step()
            self.expected.append(digests(self.session))
        self.seconds = (time.perf_counter() - begin) / EPISODE
        self.again()

    def _noted(self, session: RLSession) -> RLSession:
        cluster = session.debug.stack.cluster
        self.stacks.append((cluster.entry.head, str(cluster.directory)))
        return session

    def once(self) -> None:
        """One thing at random, and a look whether the weights are those of whole steps."""
        if self.session.step_count == EPISODE:
            self.again()
        things: dict[str, tuple[float, Callable[[], Any]]] = {
            "step": (6, self.session.step),
            "step, interrupted": (10, lambda: self.press(self.session.step)),
            "train, interrupted twice": (4, lambda: self.press(self.train, 0.01)),
            "sync, interrupted": (3, lambda: self.press(self.session.sync)),
            "evaluate, interrupted": (2, lambda: self.press(self.session.evaluate)),
            "save": (2, self.save),
            "save, interrupted": (3, lambda: self.press(self.save)),
            "save on a full disk": (2, self.save_where_it_is_full),
            "engine killed": (2, self.kill_engine),
            "closed, and begun anew where it was": (1.5, self.reopen),
            "trainer killed": (0.7, lambda: self.lose(of_trainer(self.session))),
            "Ray killed": (0.4, lambda: self.lose(of_head(self.session, self.draw.randrange(3)))),
        }
        name = self.draw.choices([*things], [weight for weight, _ in things.values()])[0]
        things[name][1]()
        self.done[name] += 1
        for process in self.session.debug.stack.cluster.processes():
            self.shared |= named_memory(process.pid)
        step = self.session.step_count
        if digests(self.session) != self.expected[step]:
            raise AssertionError(f"after {name!r}, the weights are not those of {step} steps")

    def press(self, work: Callable[[], Any], again: float | None = None) -> None:
        interrupted(work, self.draw.uniform(0, 1.2) * self.seconds, again)

    def train(self) -> None:
        self.session.train(EPISODE - self.session.step_count, show=False)

    def save(self) -> None:
        self.kept = self.session.save(self.folder / f"kept-{self.draw.randrange(3)}")

    def save_where_it_is_full(self) -> None:
        with small_disk(self.folder / "small") as small:
            if small is None:
                return
            try:
                self.session.save(small / "checkpoint")
            except CheckpointError:
                if os.listdir(small):
                    raise AssertionError("a part of a checkpoint was left") from None
            else:
                raise AssertionError("a checkpoint found room on a full disk")

    def kill_engine(self) -> None:
        with suppress(psutil.NoSuchProcess):  # it may be dead already, and nobody has missed it
            kill(of_engine(self.session, 0, self.draw.randrange(3)))

    def lose(self, process: psutil.Process) -> None:
        """Kill what holds the weights; the error must say so, and a checkpoint continue."""
        kill(process)
        try:
            self.session.train(EPISODE, show=False)
        except StackError as error:
            if "RLSession.load" not in str(error):
                raise
        else:
            raise AssertionError("a step without a trainer")
        self.session = self._noted(RLSession.load(self.kept))

    def reopen(self) -> None:
        """End the session and load its checkpoint, on the processes that it has left."""
        self.session.close(keep_warm=True)
        self.session = self._noted(RLSession.load(self.kept))

    def again(self) -> None:
        """Back to the first weights."""
        self.session.restore(self.first)
        self.kept = self.first

    def memory(self) -> int:
        """Bytes that the notebook's process and the stack hold for themselves."""
        own = psutil.Process().memory_info()
        return int(own.rss - own.shared + self.session.debug.stack.cluster.host_memory())


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 1 MiB; None where one may not be made."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if made else None
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def left_behind(soak: Soak) -> list[str]:
    """What outlives the session, in words."""
    deadline = time.monotonic() + 60
    while any(alive(*stack) for stack in soak.stacks) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = [f"process {name}" for stack in soak.stacks for name in alive(*stack)]
    found += [folder for _, folder in soak.stacks if Path(folder).exists()]
    found += [f"shared memory {name}" for name in soak.shared & set(os.listdir("/dev/shm"))]
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    return found + [f"port {c.laddr}" for c in listening]


def main(minutes: float, seed: int) -> int:
    """Run, print what was done, and return 0 if nothing was lost and nothing is left."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak, begin, early = Soak(folder, seed), time.monotonic(), 0
    try:
        while (spent := time.monotonic() - begin) < 60 * minutes:
            soak.once()
            if not early and spent > 20 * minutes:
                early = soak.memory()
        late = soak.memory()
        soak.session.sync(verify=True)
    finally:
        soak.session.close()
        shutil.rmtree(folder, ignore_errors=True)
    for name, count in soak.done.most_common():
        print(f"{count:6}  {name}")
    print(f"{early / 2**20:6.0f}  MiB after a third of the time")
    print(f"{late / 2**20:6.0f}  MiB at the end")
    found = left_behind(soak)
    if early and late > FLAT * early:
        found.append("memory that grows")
    print("\n".join(["left behind:", *found]) if found else "nothing lost, nothing left behind")
    return int(bool(found))


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(float(words[0]) if words else 30.0, int(words[1]) if len(words) > 1 else 0))
