"""The kit on one GPU, beside references measured in the same run.

    python -m benchmarks.gpu --json results.json                  # everything that fits the limit
    python -m benchmarks.gpu --json results.json --missing        # then what did not fit
    python -m benchmarks.gpu --json results.json --parts card,training
    python -m benchmarks.gpu --page results.json > docs/performance.md
    python -m benchmarks.gpu --device cpu --small                 # to try the benchmark itself

Parts run one after the other, each in a process of its own save for those that ask one running
session. A part that fails is noted and the next one begins. With `--json`, a file of the same card
and versions is continued: parts that run now replace their numbers, the others keep them. The file
is written whenever there is a new number.

TRL is not a dependency of the kit: `uv pip install --group bench -c requirements.lock`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import card, cards, engine, page, rows, session, training, trl
from benchmarks.gpu_parts.children import NO_TIME, Message, Part, run_apart
from benchmarks.gpu_parts.results import PartResult, Results
from benchmarks.gpu_parts.workload import Workload
from kit.models.source import ModelShape
from kit.utils.hardware import Card

LIMIT = 460.0
"""Seconds of a whole run, unless it is told otherwise."""
MODEL = Part("model", "the model directory", 0, card.write_model)
PARTS = (
    Part("card", "the card's own rates", 10, card.measure),
    Part("start", "a first start", 60, session.start, session.host),
    Part("engine", "generating through the session", 20, session.generate, session.host),
    Part("log_probs", "log-probs through the session", 5, session.log_probs, session.host),
    Part("iteration", "whole steps", 30, session.iteration, session.host),
    Part("sleep", "syncs, sleeping, waking", 5, session.sync_and_sleep, session.host),
    Part("memory", "peaks beside the plan", 0, session.memory, session.host),
    Part("raw_engine", "SGLang alone", 60, engine.measure),
    Part("small_card", "steps on a small card", 100, cards.small_card, cards.small_host),
    Part("out_of_memory", "memory run out on purpose", 10, cards.out_of_memory, cards.small_host),
    Part("trl", "TRL's iteration", 80, trl.measure),
    Part("learning", "the embedded model learns", 45, cards.learning),
    Part("training", "the trainer alone", 40, training.measure),
)
"""In the order of their turns."""
PACKAGES = ("torch", "sglang", "transformers", "ray", "trl")


@dataclass(slots=True)
class Run:
    """One run: what is known so far, where it is kept, and how much time is left."""

    results: Results
    work: Workload
    file: Path | None
    limit: float
    begin: float

    def all(self, parts: Sequence[Part]) -> None:
        """Measure them, group by group."""
        for _, group in groupby(parts, key=lambda part: part.host or part.name):
            self._group(list(group))

    def _group(self, group: list[Part]) -> None:
        while group and self._elapsed() + sum(part.seconds for part in group) > self.limit:
            late = group.pop()
            self._take((late.name, "skipped", NO_TIME))
        if group:
            for message in run_apart(group, self.work, self.begin + self.limit):
                self._take(message)

    def _take(self, message: Message) -> None:
        name, kind, what = message
        if kind == "begin":
            self.results.parts[name] = PartResult(began=round(self._elapsed(), 2))
            self.say(name, "begins")
        elif kind == "say":
            self.say(name, what)
        elif kind == "put":
            key, value = what
            self.results.parts[name].measured[key] = value
        else:
            self._note(name, kind, what or "")
            self.say(name, f"{kind}{': ' + what if what else ''}")
        if kind != "say":
            self.keep()

    def _note(self, name: str, state: Any, message: str) -> None:
        if name == MODEL.name:
            if state == "failed":
                raise SystemExit(f"The model directory could not be written: {message}")
            self.results.model = asdict(ModelShape.read(self.work.model))
        before = self.results.parts.get(name)
        if state == "skipped" and before and before.state == "done":
            return  # an earlier run has it
        part = self.results.parts.setdefault(name, PartResult(began=round(self._elapsed(), 2)))
        part.state, part.message = state, message
        part.seconds = round(self._elapsed() - part.began, 2)

    def keep(self) -> None:
        """Make the rows anew, and write everything."""
        try:
            self.results.rows = rows.of(self.results, self.work) if self.results.model else []
        except Exception:  # a number that nobody expected must not cost the others
            traceback.print_exc()
        if self.file:
            self.results.write(self.file)

    def say(self, name: str, text: str) -> None:
        """A line of progress."""
        print(f"[{self._elapsed():6.1f} s] {name}: {text}", flush=True)

    def _elapsed(self) -> float:
        return time.time() - self.begin


def begun(options: argparse.Namespace, work: Workload) -> Results:
    """Results to add to: those of the file where card and versions are the same, else new ones."""
    there = Card.gpu() if options.device == "cuda" else Card.host()
    if there is None:
        raise SystemExit("The driver shows no GPU. To try the benchmark: --device cpu --small.")
    settings = {**asdict(work), "small": options.small}
    del settings["model"], settings["small_card_steps"]
    results = Results(
        card={**asdict(there), "driver": card.nvidia_smi("driver_version")},
        versions={name: found for name in PACKAGES if (found := _version(name))},
        workload=settings,
    )
    if options.json and options.json.exists() and not options.fresh:
        old = Results.read(options.json)
        if _comparable(old) == _comparable(results):
            results = old
        else:
            print(f"{options.json} is of another card, version or workload: it is begun anew")
    results.commands.append(shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    return results


def _comparable(results: Results) -> Any:
    import json

    what = {"card": results.card, "versions": results.versions, "workload": results.workload}
    return json.loads(json.dumps(what))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def chosen(names: str) -> list[Part]:
    """The parts of a list of names, in the order of their turns; empty takes all.

    A session has to be started before it can be asked.
    """
    known = [part.name for part in PARTS]
    wanted = [name for name in names.split(",") if name] or known
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"There is no part {', '.join(unknown)}. Parts: {', '.join(known)}.")
    return [part for part in PARTS if part.name in wanted]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = "; ".join(f"{part.name} ({part.title})" for part in PARTS)
    made.add_argument("--parts", default="", metavar="NAMES", help=f"comma-separated: {titles}")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--small", action="store_true", help="tiny shapes, to try the benchmark")
    made.add_argument("--json", type=Path, metavar="FILE", help="keep every number here")
    made.add_argument("--fresh", action="store_true", help="do not continue the file")
    made.add_argument("--missing", action="store_true", help="only parts not done in the file")
    made.add_argument("--limit", type=float, default=LIMIT, help="seconds (default: %(default)s)")
    made.add_argument("--small-card-steps", type=int, default=20, metavar="N")
    made.add_argument("--page", type=Path, metavar="FILE", help="only print the page of a file")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table; or print the page of a file."""
    begin = time.time()
    options = parser().parse_args(argv)
    if options.page:
        print(page.page(Results.read(options.page)), end="")
        return
    parts = chosen(options.parts)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as directory:
        work = Workload.of(
            str(Path(directory) / "model"),
            options.device,
            small=options.small,
            small_card_steps=options.small_card_steps,
        )
        run = Run(begun(options, work), work, options.json, options.limit, begin)
        if options.missing:
            there = run.results.parts
            parts = [p for p in parts if p.name not in there or there[p.name].state != "done"]
        run.all([MODEL, *parts])
        run.keep()
    page.show(run.results)


if __name__ == "__main__":
    main()
