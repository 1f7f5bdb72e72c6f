"""How large displays are, and how the time to build them grows with what they show.

    python -m benchmarks.displays

Prints one table. Bytes are held against the bounds that a notebook is promised; of times only the
growth counts: twice as many samples or tokens must take about twice as long, and no longer at all
where a display is full. Times are the processor's, the best of several, because the machine does
other things.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kit
from kit import Batch, Rollout, Sample, Status
from kit.utils.formatting import columns, data_size

WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "they",
)  # fmt: skip
GROWTH = 3.0
"""A doubling that takes longer than this many times as long is no longer about twice."""


@dataclass(frozen=True, slots=True)
class Case:
    """One display, made of more and more."""

    name: str
    unit: str
    sizes: Sequence[int]
    """Each twice the one before."""
    make: Callable[[int], Any]
    limit: int
    """Bytes of HTML it may take whatever it is made of."""


def response(tokens: int, index: int = 0, group: int = 0, *, annotated: bool = False) -> Sample:
    """A response of English words and punctuation with plausible numbers."""
    draw = random.Random(f"{index} {tokens}")
    texts = [f" {draw.choice(WORDS)}" if draw.random() > 0.06 else ".\n" for _ in range(tokens)]
    chances = (0.9999, 0.99, 0.97, 0.9, 0.6, 0.2, 0.03, 0.004)
    log_probs = [math.log(draw.choice(chances)) for _ in range(tokens)]
    values = {}
    if annotated:
        moved = [min(x + draw.gauss(0, 0.02), 0.0) for x in log_probs]
        values = {
            "trainer_log_prob_before": log_probs,
            "trainer_log_prob": moved,
            "entropy": [abs(draw.gauss(0, 1)) for _ in range(tokens)],
            "advantage": [draw.gauss(0, 1)] * tokens,
            "loss": [draw.gauss(0, 1e-4) for _ in range(tokens)],
        }
    return Sample(
        group_index=group,
        index=index,
        prompt="Write a long text about nothing in particular.",
        tokens=list(range(tokens)),
        response="".join(texts),
        response_length=tokens,
        reward=float(draw.random() > 0.5),
        status=Status.COMPLETED,
        metadata={"token_texts": texts},
        rollout_log_probs=log_probs,
        weight_versions=[0],
        token_values=values,
        annotated_versions=[0, 1] if annotated else [],
    )


def rollout(samples: int, tokens: int = 1_000, *, annotated: bool = False) -> Rollout:
    """Groups of eight."""
    return Rollout(response(tokens, i, i // 8, annotated=annotated) for i in range(samples))


def _batch(samples: int) -> Batch:
    made = rollout(samples).samples
    return Batch(made, tuple((-1.0) ** i for i in range(samples)))


def _comparison(samples: int) -> Callable[[], Any]:
    both = rollout(samples, 200, annotated=True)
    return lambda: kit.compare(both, both)


def _strip(name: str) -> Callable[[int], Callable[[], Any]]:
    def make(tokens: int) -> Callable[[], Any]:
        sample = response(tokens, annotated=True)
        return lambda: sample.strip(quantity=name)

    return make


MANY, LONG = (64, 128, 256, 512, 1024), (500, 1_000, 2_000, 4_000, 8_000)
CASES = (
    Case("rollout, 1,000 tokens each", "samples", MANY, rollout, 1_000_000),
    Case("batch, 1,000 tokens each", "samples", MANY, _batch, 1_000_000),
    Case("comparison, 200 tokens each", "samples", MANY, _comparison, 300_000),
    Case("strip of log-probs", "tokens", LONG, _strip("rollout_log_prob"), 300_000),
    Case("strip of changes", "tokens", LONG, _strip("change"), 300_000),
    Case("strip of the loss", "tokens", LONG, _strip("loss"), 300_000),
    Case("sample, annotated twice", "tokens", LONG, lambda n: response(n, annotated=True), 400_000),
)


def measure(thing: Any, repeats: int) -> tuple[int, float]:
    """(bytes of HTML, least processor time to build it, in seconds)."""
    best = math.inf
    size = 0
    for _ in range(repeats):
        begin = time.process_time()
        shown = thing() if callable(thing) else thing
        page = shown._repr_mimebundle_()["text/html"]
        best = min(best, time.process_time() - begin)
        size = len(page.encode())
    return size, best


def rows_of(case: Case, repeats: int) -> list[list[str]]:
    """One row a size."""
    rows = []
    before = 0.0
    for amount in case.sizes:
        size, seconds = measure(case.make(amount), repeats)
        growth = seconds / before if before else math.nan
        slow = growth > GROWTH
        rows.append(
            [
                case.name,
                f"{amount:,} {case.unit}",
                data_size(size),
                f"{'✓' if size < case.limit else '✗'} under {data_size(case.limit)}",
                f"{1000 * seconds:.0f} ms",
                "" if math.isnan(growth) else f"{'✗' if slow else '✓'} x {growth:.1f}",
            ]
        )
        before = seconds
    return rows


def main() -> None:
    """Print the table; end with 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="times each display is built")
    repeats = parser.parse_args().repeats
    head = ["display", "of", "HTML", "bound", "time", "for twice as much"]
    rows = [row for case in CASES for row in rows_of(case, repeats)]
    print(columns([head, *rows], indent=""))
    raise SystemExit(any("✗" in cell for row in rows for cell in row))


if __name__ == "__main__":
    main()
