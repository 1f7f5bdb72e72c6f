"""How the kit scales over the devices of one host: one command, one table.

    python -m benchmarks.many_devices --out scaling                # all GPUs, 4 B and 0.6 B
    python -m benchmarks.many_devices --out scaling --side-by-side # 1 + 2 of four at once
    python -m benchmarks.many_devices --out scaling --missing      # then what did not fit
    python -m benchmarks.many_devices --ways none --faults --sweep # what has to hold beside speed
    python -m benchmarks.many_devices --device cpu --counts 1,2    # to try the benchmark itself

Weights are random, in the shapes of Qwen3, and are written once. The first batch comes from one
device, and every row of a model trains on it before anything else, so that its first gradient can
be compared. Then each makes steps of its own, whose times are in the table. Each row is a process
of its own with a time limit; the most telling come first. OUT/table.md and OUT/results.json are
written whenever there is a new number, so a run that is cut off leaves what it has measured.

It exits with 1 where a row failed, or found something that has to hold and does not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.device_parts import table
from benchmarks.device_parts.children import Child
from benchmarks.device_parts.results import Results, RowResult, State
from benchmarks.device_parts.rows import FAULTS, SWEEP, WAYS, Row, device_sets, plan, waves
from benchmarks.device_parts.shapes import SHAPES
from benchmarks.device_parts.task import Task
from kit.cluster.processes import cores
from kit.utils.files import replace_file
from kit.utils.hardware import Driver, pick_device, visible_gpus

PACKAGES = ("torch", "sglang", "transformers", "ray")
COUNTS = (1, 2, 4, 8)
RESERVE = 20.0
"""Seconds before the limit in which no row runs any more: to end it, and to write the table."""
STARTS = {FAULTS: 2, SWEEP: 2}
"""Sessions that start one after the other in what is tried beside speed; a member of a sweep has a
kernel to start, too.
"""
POLL = 0.2
"""Seconds between two looks at the rows that run."""


@dataclass(slots=True)
class Run:
    """One run: what is known, where it is kept, and how much time is left."""

    options: argparse.Namespace
    device: str
    names: list[str]
    """Of the devices."""
    results: Results
    begin: float = field(default_factory=time.time)

    def all(self, rows: Sequence[Row]) -> None:
        """Measure them, those that fit side by side at once."""
        for row in rows:
            self.results.of(row)
        self.keep()
        self._write_models(dict.fromkeys(row.shape for row in rows))
        beside = self.options.side_by_side
        for wave in waves(rows, len(self.names), side_by_side=beside):
            self._wave([row for row in wave if self._may_begin(row)])

    def keep(self) -> None:
        """Write everything that is known."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.results.write(self.options.out / "results.json")
        replace_file(self.options.out / "table.md", table.page(self.results))

    def left(self) -> float:
        """Seconds until the last row has to be at its end."""
        return 60.0 * float(self.options.minutes) - RESERVE - (time.time() - self.begin)

    def _write_models(self, shapes: Sequence[str] | dict[str, None]) -> None:
        wanted = [name for name in shapes if SHAPES[name].config]
        models = self._models()
        if missing := [name for name in wanted if not (models / name).is_dir()]:
            self._say(f"writing {', '.join(missing)} into {models}")
            module = "benchmarks.device_parts.shapes"
            command = [sys.executable, "-m", module, str(models), self.device, *missing]
            subprocess.run(command, check=False, timeout=max(self.left(), 1.0))

    def _models(self) -> Path:
        return Path(self.options.work) / "models"

    def _may_begin(self, row: Row) -> bool:
        least = STARTS.get(row.way, 1) * SHAPES[row.shape].least_seconds
        why = row.impossible(self.device)
        if SHAPES[row.shape].config and not (self._models() / row.shape).is_dir():
            why = why or "Its model could not be written."
        if not why and (left := self.left()) < least:
            why = f"{max(left, 0):.0f} s were left, and it is not begun with less than {least:.0f}."
        if why:
            self._end(RowResult(row), "not run", why)
        return not why

    def _wave(self, wave: list[Row]) -> None:
        share = cores() // len(wave) if len(wave) > 1 and self.device == "cpu" else None
        running: dict[Row, Child] = {}
        try:
            for row, devices in zip(wave, device_sets(wave, self.names), strict=True):
                beside = [other.key for other in wave if other is not row]
                self.results.put(RowResult(row, "running", beside=beside))
                self._say(f"{row.key} begins" + (f" beside {', '.join(beside)}" * bool(beside)))
                running[row] = Child.start(self._task(row, wave), devices, share)
            self.keep()
            while running:
                time.sleep(POLL)
                for row in list(running):
                    if self.follow(row, running[row]):
                        running.pop(row).end()
        finally:
            for child in running.values():
                child.end()

    def _task(self, row: Row, wave: Sequence[Row]) -> Task:
        options, shape = self.options, SHAPES[row.shape]
        batch = options.out.absolute() / f"first-{row.shape}.jsonl"
        maker = next(other for other in wave if other.shape == row.shape)
        task = Task(
            row=row,
            device=self.device,
            model=shape.folder(self._models()),
            folder=str(Path(options.work).absolute() / "rows" / row.key),
            batch=str(batch),
            deadline=time.time() + min(self.left(), 60.0 * options.row_minutes),
            prompts=(options.prompts or shape.prompts) * (row.devices if options.weak else 1),
            makes_batch=row is maker and not batch.exists(),
            steps=options.steps,
            settings={"device": self.device, **dict(options.set)},
        )
        task.no_batch.unlink(missing_ok=True)
        return task

    def follow(self, row: Row, child: Child) -> bool:
        """Take what a row has measured since; whether it is at its end."""
        result, ended = self.results.of(row), child.ended()
        if news := child.news():
            result.measured = news
            self.keep()
        late = time.time() > child.task.deadline
        if not ended and not late:
            return False
        if child.task.makes_batch and not Path(child.task.batch).exists():
            child.task.no_batch.touch()  # those that wait for it make their own
        result.seconds = round(time.time() - child.begin, 1)
        if ended and child.process.returncode == 0:
            self._end(result, "done")
            return True
        why = str(result.measured.get("error", f"exit code {child.process.returncode}"))
        if not ended:
            why = f"Its time was over after {result.seconds:.0f} s."
        result.log = child.last_lines()
        self._end(result, "failed" if ended else "cut off", why)
        return True

    def _end(self, result: RowResult, state: State, why: str = "") -> None:
        result.state, result.why = state, why
        self.results.put(result)
        self.keep()
        self._say(f"{result.row.key}: {state}{': ' + why if why else ''}")

    def _say(self, text: str) -> None:
        print(f"[{time.time() - self.begin:6.1f} s] {text}", flush=True)


def begun(options: argparse.Namespace, device: str, names: Sequence[str]) -> Results:
    """Results to add to: new ones, or with `--missing` those of the folder, if they compare."""
    cards = [card.name for card in Driver.ask().cards] if device == "cuda" else []
    devices = f"{len(cards)} x {cards[0]}" if cards else f"CPU, {cores()} cores"
    results = Results(
        machine={"devices": devices, "versions": {p: v for p in PACKAGES if (v := _version(p))}},
        workload={
            "weak": options.weak,
            "steps": options.steps,
            "set": dict(options.set),
            "shapes": {name: _in_words(name, options) for name in options.shapes},
        },
    )
    file = options.out / "results.json"
    if options.missing and file.exists():
        old = Results.read(file)
        if (old.machine, old.workload) == (results.machine, results.workload):
            results = old
        else:
            print(f"{file} is of another machine or workload: it is begun anew")
    if not results.rows:
        for batch in options.out.glob("first-*.jsonl*"):
            batch.unlink()
    command = ["python", "-m", "benchmarks.many_devices", *sys.argv[1:]]
    results.commands.append(shlex.join(command))
    return results


def _in_words(name: str, options: argparse.Namespace) -> str:
    shape = SHAPES[name]
    prompts = options.prompts or shape.prompts
    grows = " times the number of devices" if options.weak else ""
    what = f"The shape of Qwen3-{name.upper()}, random weights" if shape.config else "Embedded"
    return (
        f"{what}. A step: {prompts * shape.group} responses{grows} of at most "
        f"{shape.response_tokens} tokens, {shape.group} to each of {prompts} prompts of "
        f"{shape.prompt_tokens}."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _names(known: Sequence[str]) -> Any:
    def chosen(text: str) -> list[str]:
        names = [name for name in text.split(",") if name and name != "none"]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]}; known: {', '.join(known)}, none")
        return [name for name in known if name in names]

    return chosen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.many_devices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "--shapes", type=_names([*SHAPES]), help=f"some of {', '.join(SHAPES)} (default: by device)"
    )
    add("--counts", help="numbers of devices (default: 1, 2, 4, 8, as many as there are)")
    add("--ways", type=_names(WAYS), default=[*WAYS], help=f"some of {', '.join(WAYS)}; or none")
    add("--steps", type=int, default=3, help="of each row, after the first iteration")
    add("--prompts", type=int, help="of a step, instead of the model's usual number")
    add("--weak", action="store_true", help="the batch grows with the number of devices")
    add("--faults", action="store_true", help="kill a rank; load its checkpoint with half as many")
    add("--sweep", action="store_true", help="a sweep with a member on each device")
    add("--side-by-side", action="store_true", help="rows that fit on the devices run at once")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--minutes", type=float, default=9.5, help="of the whole command (default: %(default)s)")
    add("--row-minutes", type=float, default=5.0, help="of a row (default: %(default)s)")
    add("--out", type=Path, default=Path("many-devices"), help="folder of table and results")
    add("--work", default=str(Path(tempfile.gettempdir()) / "kit-many-devices"), metavar="DIR",
        help="folder of weights, logs and checkpoints")  # fmt: skip
    add("--missing", action="store_true", help="only rows that are not done in OUT")
    add("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE",
        help="a setting of every session, such as model.compile=false")  # fmt: skip
    add("--page", action="store_true", help="only write OUT/table.md anew from OUT/results.json")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything, write and print the table; the exit code."""
    options = parser().parse_args(argv)
    if options.page:
        replace_file(
            options.out / "table.md", table.page(Results.read(options.out / "results.json"))
        )
        return 0
    device = pick_device(options.device)
    options.shapes = options.shapes or (["4b", "0.6b"] if device == "cuda" else ["tiny"])
    names = visible_gpus() if device == "cuda" else []
    most = len(names) or max(COUNTS)
    asked = [int(n) for n in (options.counts or "").split(",") if n]
    counts = asked or [n for n in COUNTS if n <= (most if names else 2)]
    if max(counts) > most or min(counts) < 1:
        raise SystemExit(f"--counts is {options.counts}, and there are {most} devices.")
    names = names or [str(n) for n in range(max(counts))]
    rows = plan(options.shapes, counts, options.ways, faults=options.faults, sweep=options.sweep)
    run = Run(options, device, names, begun(options, device, names))
    done = {each.row for each in run.results.rows if each.state == "done"}
    run.all([row for row in rows if row not in done])
    print(table.page(run.results))
    return int(bool(table.wrong(run.results)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the rows' processes end too
    raise SystemExit(main())
