"""`Row`: a measured number beside its reference, its floor and its target.

Rows are made from measured numbers only, whenever there are new ones: a part that is missing leaves
out what needs it, and nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.gpu_parts import floors
from benchmarks.gpu_parts.floors import Rates, Samples
from benchmarks.gpu_parts.results import Results
from benchmarks.gpu_parts.workload import Workload

GIB = 1 << 30
MS = 1000.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    value: float | None
    """None: it was tried and there is none; `note` says why."""
    unit: str
    reference: float | None = None
    against: str = ""
    """What the reference is."""
    ratio: float | None = None
    """How many times as good as the reference."""
    bound: float | None = None
    floor: str = ""
    """What gives the bound."""
    share: float | None = None
    """Of the bound: 1 is as good as it can be."""
    target: str = ""
    met: bool | None = None
    note: str = ""


def of(results: Results, work: Workload) -> list[dict[str, Any]]:
    """All rows that the measured numbers allow."""
    table = _Table(results, work)
    found: list[Row] = []
    for section in (
        table.card,
        table.engine,
        table.trainer,
        table.iteration,
        table.sleep,
        table.memory,
        table.start,
        table.small_card,
        table.learning,
        table.out_of_memory,
    ):
        found += section()
    if work.device == "cpu":  # the targets are a GPU's
        found = [replace(row, target="", met=None) for row in found]
    return [asdict(row) for row in found]


def row(
    section: str,
    name: str,
    value: float | None,
    unit: str,
    *,
    lower: bool = False,
    reference: float | None = None,
    against: str = "",
    bound: float | None = None,
    floor: str = "",
    least: float | None = None,
    most: float | None = None,
    least_ratio: float | None = None,
    note: str = "",
) -> Row:
    """A row with what follows from its numbers.

    Args:
        section: where it stands.
        name: what was measured.
        value: in `unit`.
        unit: of value, reference and bound.
        lower: is less better?
        reference: measured in the same run.
        against: what the reference is.
        bound: the best value that there can be.
        floor: what gives the bound.
        least: target: at least so much.
        most: target: at most so much.
        least_ratio: target: at least so many times the reference.
        note: in words.
    """

    def better(other: float | None) -> float | None:
        if not value or not other:
            return None
        return other / value if lower else value / other

    ratio, target, met = better(reference), "", None
    if least is not None:
        target = f"at least {least:,g} {unit}".strip()
        met = value is not None and value >= least
    elif most is not None:
        target = f"at most {most:,g} {unit}"
        met = value is not None and value <= most
    elif least_ratio is not None:
        target = f"at least {least_ratio:g} x {against}"
        met = None if ratio is None else ratio >= least_ratio
    return Row(
        section, name, value, unit, reference, against if reference else "", ratio,
        bound, floor if bound else "", better(bound), target, met, note,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Table:
    """The sections, each from its parts."""

    results: Results
    work: Workload

    @property
    def rates(self) -> Rates | None:
        values = [
            self.results.median("card", n) for n in ("copy", "matrix", "to_device", "to_host")
        ]
        known = [value for value in values if value]
        return Rates(*known) if len(known) == len(values) else None

    def card(self) -> Iterator[Row]:
        names = {
            "copy": ("copy within the device, read and written", 1e9, "GB/s"),
            "matrix": (f"matrix product, {self.work.matrix} rows and columns", 1e12, "TFLOP/s"),
            "to_device": ("copy from pinned host memory", 1e9, "GB/s"),
            "to_host": ("copy to pinned host memory", 1e9, "GB/s"),
        }
        for key, (name, scale, unit) in names.items():
            if rate := self.results.median("card", key):
                yield row("The card", name, rate / scale, unit)

    def engine(self) -> Iterator[Row]:
        work, get = self.work, self.results.median
        for count in work.requests:
            raw = _rate(count * work.response_tokens, get("raw_engine", f"raw_{count}"))
            bound = None
            if self.rates:
                bound = count * work.response_tokens / self._decode_floor(count, self.rates)
            for name, seconds, least in (
                ("SGLang alone", get("raw_engine", f"raw_{count}"), None),
                ("the session's engine", get("engine", f"stack_{count}"), None),
                ("`session.generate()`", get("engine", "session"), 0.97),
            ):
                if seconds is None or (least and count != work.samples):
                    continue
                yield row(
                    "Generating",
                    f"{name}, {_requests(count)}",
                    _rate(count * work.response_tokens, seconds),
                    "tokens/s",
                    reference=None if name == "SGLang alone" else raw,
                    against="SGLang alone",
                    bound=bound,
                    floor="weights and KV cache read once a token",
                    least_ratio=least,
                )
        if without := get("raw_engine", "raw_without"):
            count = work.requests[-1]
            name = f"SGLang alone without log-probs, {_requests(count)}"
            rate = _rate(count * work.response_tokens, without)
            yield row("Generating", name, rate, "tokens/s")

    def _decode_floor(self, count: int, rates: Rates) -> float:
        work = self.work
        return floors.generate_seconds(
            self.results.shape, rates, count, work.prompt_tokens, work.response_tokens, work.width
        )

    @property
    def _groups(self) -> Samples:
        """The session's batch: prompts are shared."""
        work = self.work
        return Samples(work.prompts, work.group, work.prompt_tokens, work.response_tokens)

    @property
    def _apart(self) -> Samples:
        """The batch of the trainer alone: every sample has a prompt of its own."""
        return Samples(self.work.samples, 1, self.work.prompt_tokens, self.work.response_tokens)

    def trainer(self) -> Iterator[Row]:
        get, rates, shape = self.results.median, self.rates, self.results.shape
        tokens = self.work.samples * self.work.length
        for name, seconds, batch in (
            ("the trainer alone", get("training", "log_probs"), self._apart),
            ("`session.log_probs()`", get("log_probs", "seconds"), self._groups),
        ):
            operations = floors.forward_operations(shape, batch)
            if seconds:
                yield row(
                    "Log-probs", name, tokens / seconds, "tokens/s", least=200_000,
                    bound=tokens * rates.matrix / operations if rates else None,
                    floor="operations of the forward pass; the session's samples share prompts",
                )  # fmt: skip
        yield from self._updates(rates)

    def _updates(self, rates: Rates | None) -> Iterator[Row]:
        """Speed, share of the matrix rate, and memory: a section each."""
        part, tokens = self.results.parts.get("training"), self.work.samples * self.work.length
        speeds, shares, peaks = [], [], []
        operations = floors.training_operations(self.results.shape, self._apart)
        for key, found in (part.measured if part else {}).items():
            level, _, size = key.rpartition("_")
            if level not in RECOMPUTED:
                continue
            name = f"micro-batches of {int(size):,} tokens, {RECOMPUTED[level]}"
            goal = level == "alternating" and int(size) == self.work.micro_batches[0]
            if "error" in found:
                speeds.append(row("Updates: speed", name, None, "tokens/s", note=found["error"]))
                continue
            seconds = statistics.median(found["seconds"])
            speeds.append(
                row(
                    "Updates: speed",
                    name,
                    tokens / seconds,
                    "tokens/s",
                    bound=tokens / floors.update_seconds(self.results.shape, rates, self._apart)
                    if rates
                    else None,
                    floor="operations, and the optimizer's bytes",
                )
            )
            if rates:
                share, section = 100 * operations / seconds / rates.matrix, "Updates: MFU"
                shares.append(row(section, name, share, "%", least=30 if goal else None))
            if peak := found["peak"]:
                most, section = 20 if goal else None, "Updates: most allocated memory"
                peaks.append(row(section, name, peak / GIB, "GiB", lower=True, most=most))
        yield from (*speeds, *shares, *peaks)

    def iteration(self) -> Iterator[Row]:
        steps: list[dict[str, float]] | None = self.results.get("iteration", "steps")
        trl = self.results.get("trl", "iterations")
        theirs = statistics.median(i[0] for i in trl) if trl else None
        if theirs and trl:
            yield row("An iteration", "TRL", theirs, "s", lower=True)
            generating = statistics.median(i[1] for i in trl)
            yield row("An iteration", "TRL, generating", generating, "s", lower=True)
        if not steps:
            return

        def middle(name: str) -> float:
            return statistics.median(step[name] for step in steps)

        rates, shape = self.rates, self.results.shape
        floor: dict[str, float] = {}
        if rates:
            floor = {
                "perf/rollout_time": self._decode_floor(self.work.samples, rates),
                "perf/actor_train_time": floors.update_seconds(shape, rates, self._groups),
                "perf/update_weights_time": floors.sync_bytes(shape, self.work.width) / rates.copy,
            }
        yield row(
            "An iteration", "`session.step()`", middle("wall"), "s", lower=True,
            reference=theirs, against="TRL", bound=sum(floor.values()) or None,
            floor="each phase's bytes or operations", least_ratio=3,
        )  # fmt: skip
        phases = [n for n in steps[0] if n.startswith("perf/") and n.endswith("_time")]
        phases.remove("perf/step_time")
        for name in phases:
            yield row(
                "An iteration", f"of it `{name}`", middle(name), "s", lower=True,
                bound=floor.get(name), floor="each phase's bytes or operations",
            )  # fmt: skip
        outside = statistics.median(
            100 * (1 - sum(step[n] for n in phases) / step["wall"]) for step in steps
        )
        yield row("An iteration", "of it outside of all phases", outside, "%", lower=True, most=3)

    def sleep(self) -> Iterator[Row]:
        get, rates = self.results.median, self.rates
        if sync := get("sleep", "sync"):
            size = floors.sync_bytes(self.results.shape, self.work.width)
            yield row(
                "Handing over", "sync of all weights", sync * MS, "ms", lower=True, most=50,
                bound=MS * size / rates.copy if rates else None,
                floor="weights read and written within the device",
            )  # fmt: skip
        if verified := get("sleep", "verified"):
            name = "the same, with a checksum of each parameter compared"
            yield row("Handing over", name, verified, "s", lower=True)
        there_and_back = 1 / rates.to_host + 1 / rates.to_device if rates else 0.0
        state = floors.trainer_state_bytes(self.results.shape) * there_and_back
        for who, unit, scale, most, bound in (
            ("engine", "ms", MS, 100, 0.0),  # it lets go of its memory, and copies nothing
            ("trainer", "s", 1.0, 1, state),
        ):
            asleep, awake = get("sleep", f"sleep_{who}"), get("sleep", f"wake_{who}")
            if asleep is None or awake is None:
                continue
            yield row(
                "Handing over", f"{who} asleep and awake again", (asleep + awake) * scale, unit,
                lower=True, most=most, bound=bound * scale or None,
                floor="the trainer's state to pinned host memory and back",
                note=f"{asleep * scale:.3g} to sleep, {awake * scale:.3g} to wake",
            )  # fmt: skip

    def memory(self) -> Iterator[Row]:
        yield from self._phases("memory", "Memory")

    def _phases(self, part: str, section: str) -> Iterator[Row]:
        """What the memory plan said beside what was seen."""
        for name, total, measured in self.results.get(part, "phases") or []:
            if not measured:
                continue
            off = 100 * abs(total - measured) / measured
            note = f"the plan says {total / GIB:.3g} GiB"
            yield row(section, f"peak in {name}", measured / GIB, "GiB", lower=True, note=note)
            yield row(section, f"the plan is off in {name} by", off, "%", lower=True, most=10)

    def start(self) -> Iterator[Row]:
        cold = self.results.median("start", "cold_seconds")
        alone = self.results.median("raw_engine", "start_seconds")
        if alone:
            yield row("Starting", "SGLang alone", alone, "s", lower=True)
        if cold:
            yield row("Starting", "session, first of the run", cold, "s", lower=True)

    def small_card(self) -> Iterator[Row]:
        steps, taken = (self.results.get("small_card", name) for name in ("steps", "device_memory"))
        if not steps:
            return
        section = f"A card of {self.results.get('small_card', 'gib'):g} GiB"
        name = f"steps of {self.results.get('small_card', 'samples')} samples without running out"
        yield row(section, name, float(len(steps)), "steps", least=20)
        if len(steps) > 1:
            yield row(section, "a step", statistics.median(steps[1:]), "s", lower=True)
        if len(steps) > 2 and taken and taken[-1] and taken[1]:
            most = self.results.get("small_card", "gib")
            yield row(section, "device memory, most", max(taken) / GIB, "GiB", most=most)
            grown = (taken[-1] - taken[1]) / GIB
            yield row(section, "growth after the second step", grown, "GiB", lower=True, most=0)
        yield from self._phases("small_card", section)

    def learning(self) -> Iterator[Row]:
        get = self.results.get
        if get("learning", "differences") is None:
            return
        count = len(get("learning", "differences"))
        section = "Learning: the tiny model on sums, in the notebook for GSM8K"
        yield row(
            section, f"held-out accuracy after {count} steps", 100 * get("learning", "after"), "%",
            reference=100 * get("learning", "before"), against="before", least=90,
        )  # fmt: skip
        worst = max(get("learning", "differences"))
        name = "mean difference of log-probs, trainer and engine, worst step"
        yield row(section, name, worst, "nats", lower=True, most=0.02)

    def out_of_memory(self) -> Iterator[Row]:
        error = self.results.get("out_of_memory", "error")
        if error is None:
            return
        section, named = "Out of memory", "max_tokens_per_gpu" in error
        note = error.splitlines()[0] if error else "the update went through"
        yield row(section, "the error names the setting", float(named), "", least=1, note=note)
        after = float(bool(self.results.get("out_of_memory", "applied_after")))
        yield row(section, "a smaller update works afterwards", after, "", least=1)


RECOMPUTED = {
    "none": "nothing recomputed",
    "selective": "feed-forward parts recomputed",
    "alternating": "every other layer recomputed, of the others the feed-forward part",
    "full": "all recomputed",
}


def _rate(amount: float, seconds: float | None) -> float | None:
    return amount / seconds if seconds else None


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests at once"
