"""One member of a sweep while it runs: a `kit run` in a process session of its own."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from kit.runs.overrides import SEED
from kit.runs.parameters import read_parameters
from kit.runs.sweep.plan import Place, as_text
from kit.runs.sweep.state import Member, SweepRecord
from kit.tracking.recorder import NAME_VARIABLE, RUN_DIR_VARIABLE
from kit.tracking.run_folder import new_name
from kit.utils.interrupts import held
from kit.utils.reading import read_end

LOGS = "logs"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_ENDED = {0: "completed", 1: "failed", 2: "failed", 130: "interrupted"}


@dataclass(slots=True, eq=False)
class MemberProcess:
    """A started member and its process."""

    member: Member
    place: Place
    process: subprocess.Popen[bytes]
    begin: float
    log: Path
    stopping: str = ""
    """Why it was asked to end early; empty where it was not."""

    @classmethod
    def start(cls, folder: Path, sweep: SweepRecord, member: Member, place: Place) -> MemberProcess:
        """Start a member in this place, or resume the run in its folder; its state becomes
        `running`.
        """
        name = member.folder or new_name(Path(sweep.notebook).stem)
        log = folder / LOGS / f"{member.number:02}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "kit", "run"]
        if member.folder:
            command += ["--resume", str(folder / member.folder)]
        else:
            command += [sweep.notebook, *_parameters(sweep, member), "--out", str(folder)]
        # An interrupt in between would leave a process that the sweep does not know.
        with held(), log.open("ab") as output:
            output.write(f"{shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=place.environment() | {NAME_VARIABLE: name},
                start_new_session=True,  # Ctrl-C is the sweep's; it ends its members in order
                preexec_fn=partial(_end_with, os.getpid()),
            )
            member.state, member.folder, member.attempts = "running", name, member.attempts + 1
            return cls(member, place, process, time.monotonic(), log)

    def ended(self) -> bool:
        """Whether it has ended; if so, its state says how."""
        member, code = self.member, self.process.poll()
        if member.state != "running":
            return True
        member.seconds = round(time.monotonic() - self.begin, 1)
        if code is None:
            return False
        member.exit_code = code
        if self.stopping and code != 0:
            member.state, member.why = "stopped", self.stopping
        elif code < 0:
            member.state, member.why = "killed", f"by {signal.Signals(-code).name}"
            self._end_leftovers()
        else:
            member.state = _ENDED.get(code, "failed")  # type: ignore[assignment]
        if member.state == "failed":
            member.why = _last_words(self.log)
        return True

    def stop(self, why: str) -> None:
        """Ask the member to end in order, because a rule says so."""
        self.stopping = why
        self.terminate(signal.SIGTERM)

    def terminate(self, number: signal.Signals) -> None:
        """Send `kit run` a signal; at SIGTERM it ends its kernel and keeps its files."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the member and its child processes at once."""
        with suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            for process in [*parent.children(recursive=True), parent]:
                with suppress(psutil.Error):
                    process.kill()
        self.process.wait()
        self.ended()

    def _end_leftovers(self) -> None:
        """End what a `kit run` that was killed could not: its session, and its kernel."""
        from kit.cluster import registry

        for entry in registry.living():
            if entry.group == self.place.group:
                registry.terminate(entry)
        run = str(self.log.parent.parent / str(self.member.folder))
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(RUN_DIR_VARIABLE) == run:
                    process.kill()


def _parameters(sweep: SweepRecord, member: Member) -> list[str]:
    known, words = read_parameters(sweep.notebook), list[str]()
    for name, value in member.parameters.items():
        if name in known:
            words += ["-p", f"{name}={as_text(known[name], value)}"]
        else:  # the notebook has no such parameter; its sessions have a seed
            words += [f"--{SEED}", str(value)]
    return words


def _end_with(sweep: int) -> None:
    """End this new process when the sweep is killed (Linux keeps the setting over exec)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != sweep:  # it was killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def _last_words(log: Path) -> str:
    """Line of a run's output that says why it failed."""
    lines = [line.strip() for line in read_end(log).splitlines()]
    reasons = [line for line in lines if " failed: " in line]
    return (reasons or [line for line in lines if line] or [""])[-1][:300]
