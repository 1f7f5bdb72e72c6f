"""`run_sweep` and `resume_sweep`: one notebook with many parameter values, several at a time.

    papermill_runs/20260131-142501-sweep-02_train_to_solve-1f0c2a/
      sweep.json                                   the grid, the members, their states
      20260131-142502-02_train_to_solve-9d31b0/    a run's folder for each member
      logs/01.log                                  what `kit run` said of each member
      comparison.html                              all members side by side, at the end
      attempts/                                    runs of members that failed and were run again

A member is a `kit run` in a process of its own, so that it is whole whatever becomes of the others,
and can be repeated alone. Its session runs on Ray, as every session does. The members themselves
are not Ray Tune's trials, for three reasons. Tune ends a trial by killing its actor, and that
leaves the notebook's kernel behind, whose files would not be closed in order. Its trials share one
Ray cluster, and a session has a cluster of its own, behind a token of its own; the one more that
Tune wants takes a quarter of a minute to start. And Tune keeps an experiment in pickles, where
`sweep.json` can be read by anything. What is left is a queue, a few places and two stopping rules.

Members that follow each other in one place take over the warm stack of the one before.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rich.console import Console

from kit.errors import RunError
from kit.reports.runs import read_record
from kit.runs.overrides import SEED
from kit.runs.parameters import check_parameters, read_parameters
from kit.runs.progress import say
from kit.runs.sweep.display import SweepDisplay
from kit.runs.sweep.member import MemberProcess
from kit.runs.sweep.plan import Place, notes, places, plan_sweep
from kit.runs.sweep.state import (
    DONE,
    Member,
    Rewards,
    StopBelow,
    StopMedian,
    SweepRecord,
    read_sweep,
)
from kit.tracking.run_folder import METRICS, RUNS, new_folder, new_name, reward_curve

COMPARISON = "comparison.html"

POLL_SECONDS = 0.5
ENDING_SECONDS = 90.0
"""How long members may take to end in order; a kernel is given 40 seconds by `kit run`."""


def run_sweep(
    notebook: str | Path,
    parameters: Mapping[str, object] | Sequence[tuple[str, str]],
    *,
    seeds: int | Sequence[int] = (),
    parallel: int | None = None,
    stop_below: str | None = None,
    stop_median: int | None = None,
    out_root: str | Path = RUNS,
    console: Console | None = None,
) -> tuple[Path, SweepRecord]:
    """Run a notebook with every combination of the values given, each in a folder of its own.

    Args:
        notebook: what to run.
        parameters: by name, a list of values, or text with commas; see `plan_sweep`.
        seeds: how many seeds, or which.
        parallel: members at a time; None takes one a GPU, or one for every two cores.
        stop_below: REWARD@STEP: ends a member whose reward at that step is below.
        stop_median: a step, from which on a member ends when its mean reward so far is below the
            median of the others'.
        out_root: where the sweep's folder is made.
        console: where progress is shown; None takes standard output.

    Returns:
        The sweep's folder, and what is in its `sweep.json`. A member that failed is in there; it
        does not stop the others.

    Raises:
        RunError: before anything starts: an unknown parameter, a wrong value, too few devices.
        KeyboardInterrupt: the sweep was stopped; its members ended in order, and it can be resumed.
    """
    plan = plan_sweep(notebook, parameters, seeds)
    room = places(parallel)
    if stop_below is not None:
        StopBelow.parse(stop_below)
    folder = new_folder(Path(out_root), new_name(f"sweep-{plan.notebook.stem}"), "sweep")
    record = SweepRecord(
        notebook=str(plan.notebook),
        fixed=plan.fixed,
        grid=plan.grid,
        seeds=plan.seeds,
        parallel=len(room),
        stop_below=stop_below,
        stop_median=stop_median,
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        members=[Member(number=i, parameters=p) for i, p in enumerate(plan.members(), start=1)],
    )
    console = console or Console()
    for note in notes(plan):
        say(console, note, "yellow")
    with exclusive(folder):
        record.save(folder)
        Sweep(folder, record, room, console).run()
    return folder, record


def resume_sweep(
    folder: str | Path, *, parallel: int | None = None, console: Console | None = None
) -> tuple[Path, SweepRecord]:
    """Run the members of a sweep that were not completed.

    Those that were killed or interrupted go on from their last checkpoint, as `kit run --resume`
    does. Those that failed begin again with the notebook as it is now, which may have been mended;
    what they left is kept in `attempts/`.

    Raises:
        RunError: no such sweep, it is running, or its notebook takes other parameters now.
    """
    folder = Path(folder).resolve()
    record = read_sweep(folder)
    known = read_parameters(record.notebook)
    for member in record.members:
        given = {k: v for k, v in member.parameters.items() if k != SEED or k in known}
        check_parameters(record.notebook, known, given)
    room = places(parallel or min(record.parallel, len(places())))
    with exclusive(folder):
        record = read_sweep(folder)
        for member in record.members:
            if member.state not in DONE:
                _prepare(folder, member)
        record.status, record.parallel = "running", len(room)
        record.save(folder)
        Sweep(folder, record, room, console or Console()).run()
    return folder, record


class Sweep:
    """A sweep at work: waiting members get the places that become free."""

    def __init__(
        self, folder: Path, record: SweepRecord, room: Sequence[Place], console: Console
    ) -> None:
        self.folder, self.record = folder, record
        self._free = list(reversed(room))
        self._room = room
        self._running: list[MemberProcess] = []
        self._rewards: dict[int, Rewards] = {}
        self._sizes: dict[int, int] = {}
        self._below = StopBelow.parse(record.stop_below) if record.stop_below else None
        self._median = StopMedian(record.stop_median) if record.stop_median is not None else None
        self._display = SweepDisplay(console, folder, record, [p.words for p in room])

    def run(self) -> None:
        """Run every waiting member. However this ends, none of their processes is left."""
        begin, before = time.monotonic(), self.record.seconds
        try:
            with self._display:
                while self._running or self.record.in_state("waiting"):
                    self._start()
                    self._poll()
                    self.record.seconds = round(before + time.monotonic() - begin, 1)
                    self._display.show()
                    if self._running:
                        time.sleep(POLL_SECONDS)
            bad = self.record.in_state("failed", "killed", "interrupted")
            self.record.status = "failed" if bad else "completed"
        finally:
            if self.record.status == "running":
                self.record.status = "interrupted"
            self._end_all()
            self.record.save(self.folder)
            self._compare()
            self._display.summary()

    def _start(self) -> None:
        waiting = self.record.in_state("waiting")
        while waiting and self._free:
            member, place = waiting.pop(0), self._free.pop()
            self._running.append(MemberProcess.start(self.folder, self.record, member, place))
            self.record.save(self.folder)
            self._display.started(member, place.words)

    def _poll(self) -> None:
        """Follow the rewards of running members; record those that ended, end those that must."""
        for running in [*self._running]:
            member = running.member
            self._follow(member)
            if running.ended():
                self._follow(member)
                self._running.remove(running)
                self._free.append(running.place)
                self.record.save(self.folder)
                self._display.ended(member)
            elif not running.stopping and (why := self._stop_because(member)):
                running.stop(why)

    def _follow(self, member: Member) -> Rewards:
        """Rewards of a member so far, which its record then shows too."""
        file = self.folder / (member.folder or "") / METRICS
        size = file.stat().st_size if file.is_file() else 0
        if size != self._sizes.get(member.number, 0):
            self._sizes[member.number] = size
            rewards = self._rewards[member.number] = reward_curve(file.parent)
            if rewards:
                member.steps = len(rewards)
                member.reward_first, member.reward_last = rewards[0][1], rewards[-1][1]
        return self._rewards.get(member.number, [])

    def _stop_because(self, member: Member) -> str:
        rewards = self._follow(member)
        why = self._below.why(rewards) if self._below else ""
        if not why and self._median:
            others = [m for m in self.record.in_state("running", "completed") if m is not member]
            why = self._median.why(rewards, [self._follow(other) for other in others])
        return why

    def _compare(self) -> None:
        """Write the page of all members; the sweep stands without it, so a failure is only told."""
        from kit.runs.compare import compare_runs

        if not any(member.steps for member in self.record.members):
            return
        try:
            compare_runs([self.folder]).save(self.folder / COMPARISON)
        except Exception as error:
            self._display.say(f"{COMPARISON} could not be drawn: {error}")

    def _end_all(self) -> None:
        """End the running members, and the stacks they left warm for each other."""
        from kit.cluster import registry

        if self._running:
            self._display.say("Ending the members that run. Interrupt again to kill them.")
        try:
            for running in self._running:
                running.terminate(signal.SIGTERM)
            deadline = time.monotonic() + ENDING_SECONDS
            while any(not r.ended() for r in self._running) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            pass
        for running in self._running:
            if not running.ended():
                running.kill()
            self._follow(running.member)
        groups = {place.group for place in self._room}
        for entry in registry.living():
            if entry.group in groups:
                registry.terminate(entry)


def _prepare(folder: Path, member: Member) -> None:
    """Reset a member to waiting; its folder is kept if its run can be resumed."""
    run = folder / str(member.folder)
    state, member.state, member.why, member.exit_code = member.state, "waiting", "", None
    if member.folder is None or not run.is_dir():
        member.folder = None
        return
    try:
        record = read_record(run)
    except RunError:  # it was killed before it had one
        record = None
    if record and record.status == "completed":  # the sweep was killed before it saw that
        member.state = "completed"
    elif record is None or state == "failed":
        aside = folder / "attempts"
        aside.mkdir(exist_ok=True)
        run.rename(aside / run.name)
        member.folder, member.steps = None, 0
        member.reward_first = member.reward_last = None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the sweep against a second process; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"The sweep {folder.name} is running.",
                fix="wait for its end, or interrupt it (Ctrl-C) where it runs.",
            ) from None
        yield
    with suppress(OSError):
        os.unlink(folder / ".lock")
