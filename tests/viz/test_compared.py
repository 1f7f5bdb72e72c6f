"""Before and after: the same prompts side by side, and the tokens whose probability moved."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

import kit
from benchmarks.displays import rollout as long_rollout
from kit.errors import DataError
from kit.samples import Batch, Rollout, Sample
from kit.viz.samples.compare import moves
from tests.viz.results import make_rollout


def annotated(rollout: Rollout, by: float, version: int, *, twice: bool = False) -> Rollout:
    """Log-probs of the trainer that lie this much over the engine's on each first token."""

    def one(sample: Sample) -> Sample:
        old = sample.rollout_log_probs or []
        new = [x + by * (i == 0) for i, x in enumerate(old)]
        values = {"trainer_log_prob": new} | ({"trainer_log_prob_before": old} if twice else {})
        versions = [version - 1, version] if twice else [version]
        return replace(sample, token_values=values, annotated_versions=versions)

    return rollout.with_samples(map(one, rollout))


def test_the_same_samples_annotated_before_and_after_show_what_moved() -> None:
    plain = make_rollout()
    shown = kit.compare(annotated(plain, 0.0, 0), annotated(plain, -0.5, 1))
    tokens = sum(s.response_length for s in plain)
    assert f"{tokens:,} tokens before and after: ▲ gained 0   ▼ lost {len(plain)}" in shown.plain
    assert "▼ lost most" in shown.html
    assert "▲ gained most" not in shown.html
    assert shown.html.count(">-0.5<") == 8


def test_a_rollout_annotated_twice_is_enough_beside_a_new_one() -> None:
    before = annotated(make_rollout(seed=1), 0.25, 1, twice=True)
    found = moves(before, make_rollout(seed=1, right=0.9))
    assert (found.gained, found.lost) == (len(before), 0)
    assert [round(move.change, 6) for move in found.up] == [0.25] * 8
    assert all(move.position == 0 for move in found.up)
    assert '<div class="kv-strip">' in kit.compare(before, make_rollout(seed=1)).html


def test_a_sample_that_both_know_is_counted_once() -> None:
    both = annotated(make_rollout(), 0.25, 1, twice=True)
    assert moves(both, both).tokens == sum(s.response_length for s in both)


def test_the_same_weights_twice_move_nothing() -> None:
    rollout = annotated(make_rollout(), 0.0, 3)
    assert not moves(rollout, rollout)


def test_the_most_moved_of_many_are_found_wherever_they_are() -> None:
    alike = long_rollout(16, 50, annotated=True)
    rollout = alike.with_samples(replace(s, tokens=[s.index, *s.tokens]) for s in alike)
    found = moves(rollout, rollout)
    changes = sorted(
        y - x
        for s in rollout
        for x, y in zip(*(s.token_values[n] for n in (
            "trainer_log_prob_before", "trainer_log_prob")), strict=True)
    )  # fmt: skip
    assert [move.change for move in found.up] == changes[:-9:-1]
    assert [move.change for move in found.down] == changes[:8]
    assert found.total == pytest.approx(sum(changes))


def test_a_beginning_that_samples_share_is_listed_once() -> None:
    def answer(index: int, *tokens: int) -> Sample:
        values = [-1.0 - 0.1 * i for i in range(len(tokens))]
        return Sample(
            index=index, prompt="1+1=", tokens=[1, 2, *tokens], response_length=len(tokens),
            annotated_versions=[0, 1], token_values={
                "trainer_log_prob": values, "trainer_log_prob_before": [-3.0] * len(tokens),
            },
        )  # fmt: skip

    rollout = Rollout([answer(0, 7, 8), answer(1, 7, 9), answer(2, 7, 8)])
    found = moves(rollout, rollout)
    assert found.tokens == 6
    assert [(move.sample.index, move.position) for move in found.up] == [(0, 0), (0, 1), (1, 1)]


def test_without_annotations_it_says_how_to_have_them() -> None:
    shown = kit.compare(make_rollout(), make_rollout(seed=2))
    assert "before = session.annotate(rollout)" in shown.html
    assert "before = session.annotate(rollout)" in shown.plain


def test_two_batches_are_compared_as_their_samples() -> None:
    samples = annotated(make_rollout(2), 0.5, 1, twice=True).samples
    batch = Batch(samples, (0.0,) * len(samples))
    assert f"▲ gained {len(samples)}" in kit.compare(batch, batch).plain


@pytest.mark.parametrize("other", [None, 3, Batch((), ())])
def test_things_of_two_kinds_are_refused_by_name(other: object) -> None:
    with pytest.raises(DataError, match=f"A Rollout and a {type(other).__name__} cannot"):
        kit.compare(make_rollout(1), other)


def test_comparing_loads_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys, kit; kit.compare; from kit import Rollout, Sample;"
        "kit.compare(Rollout([Sample(prompt='a')]), Rollout([Sample(prompt='a')]));"
        "print([m for m in ('torch', 'matplotlib', 'pandas', 'ipywidgets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_comparison_of_512_long_samples_stays_under_300_kb() -> None:
    rollout = long_rollout(512, 200, annotated=True)
    page = kit.compare(rollout, rollout, n=64).html
    assert len(page.encode()) < 300_000
    assert len(re.findall("<svg|<script", page)) == 0
