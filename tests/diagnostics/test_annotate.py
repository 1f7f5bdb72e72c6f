"""What annotating says of each token, on the real stack, against what the other verbs say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from kit import Batch, RLSession, Rollout, Sample
from kit.errors import DataError, SessionError


def scored(session: RLSession, prompts: int = 6) -> Rollout:
    return session.score(session.generate()[: 8 * prompts])


def values(samples: Rollout | Batch, name: str) -> list[list[float]]:
    rows = samples if isinstance(samples, Rollout) else samples.samples
    return [s.token_values[name] for s in rows]


def test_annotated_log_probs_are_the_trainers_and_entropies_what_chances_allow(
    session: RLSession,
) -> None:
    rollout = session.annotate(session.generate())
    expected = session.log_probs(rollout)
    for row, other in zip(values(rollout, "trainer_log_prob"), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    vocabulary = len(session.tokenizer)
    for sample in rollout:
        assert all(0 <= x <= math.log(vocabulary) for x in sample.token_values["entropy"])
        assert sample.annotated_versions == [0]
    assert max(x for row in values(rollout, "entropy") for x in row) > 0.1


def test_one_sample_is_annotated_as_it_is_in_its_rollout(session: RLSession) -> None:
    rollout = session.generate(["12+34="], n_samples_per_prompt=4)
    alone = session.annotate(rollout[2])
    among = session.annotate(rollout)[2]
    assert isinstance(alone, Sample)
    for name in ("trainer_log_prob", "entropy"):
        assert alone.token_values[name] == pytest.approx(
            among.token_values[name], rel=1e-5, abs=1e-5
        )


def test_the_shares_of_the_loss_sum_to_the_loss_that_the_update_reports(
    session: RLSession,
) -> None:
    batch = session.annotate(session.advantages(scored(session)))
    report = session.update(batch)
    assert report.applied
    total = math.fsum(x for row in values(batch, "loss") for x in row)
    assert total == pytest.approx(report.metrics["train/loss"], abs=1e-6)
    assert any(x for row in values(batch, "loss") for x in row)


def test_a_change_is_the_log_prob_after_an_update_minus_before(session: RLSession) -> None:
    plain = session.advantages(scored(session))
    first = session.log_probs(plain.samples)
    batch = session.annotate(plain)
    session.update(batch)
    after = session.annotate(batch)
    second = session.log_probs(plain.samples)
    assert after.id == batch.id
    biggest = 0.0
    for sample, old, new in zip(after.samples, first, second, strict=True):
        table = sample.to_pandas()
        for change, x, y in zip(table["change"], old, new, strict=True):
            assert change == pytest.approx(y - x, abs=2e-5 * (1 + max(abs(x), abs(y))))
        assert sample.annotated_versions == [0, 1]
        biggest = max(biggest, table["change"].abs().max())
    assert biggest > 1e-3
    assert values(after, "loss") == values(batch, "loss")


def test_annotating_twice_with_the_same_weights_invents_no_change(session: RLSession) -> None:
    rollout = session.annotate(session.annotate(session.generate()))
    assert rollout[0].annotated_versions == [0]
    with pytest.raises(DataError, match="before and after an update"):
        rollout[0].strip(quantity="change")


def test_a_third_annotation_compares_with_the_second(session: RLSession) -> None:
    rollout = session.annotate(scored(session))
    for _ in range(2):
        session.update(session.advantages(rollout))
        rollout = session.annotate(rollout)
    assert rollout[0].annotated_versions == [1, 2]


def test_advantages_are_those_of_the_batch(session: RLSession) -> None:
    plain = session.advantages(scored(session))
    batch = session.annotate(plain)
    assert [s.advantage for s in batch.samples] == pytest.approx(plain.advantages)
    assert (batch.advantages, batch.id) == (plain.advantages, plain.id)


def test_a_batch_that_was_applied_before_it_was_annotated_has_no_loss(session: RLSession) -> None:
    batch = session.advantages(scored(session))
    session.update(batch)
    sample = session.annotate(batch).samples[0]
    assert "advantage" in sample.token_values
    with pytest.raises(DataError, match=r"session\.annotate\(session\.advantages\(rollout\)\)"):
        sample.strip(quantity="loss")


def test_samples_without_a_response_or_texts_are_annotated_as_far_as_can_be(
    session: RLSession,
) -> None:
    sample = session.generate(["12+34="], n_samples_per_prompt=1)[0]
    bare = replace(sample, metadata={}, rollout_log_probs=None)
    empty = sample.reset_response()
    first, second = session.annotate(Rollout([empty, bare]))
    assert first == empty
    assert second.metadata["token_texts"] == sample.metadata["token_texts"]
    assert session.annotate(empty) == empty
    nothing = Batch((), ())
    assert session.annotate(nothing) is nothing


def test_annotating_changes_no_weight_and_no_later_sample(
    reseeded: Callable[[int], RLSession],
) -> None:
    seen = []
    for looks in (False, True):
        session = reseeded(5)
        rollout = scored(session)
        batch = session.advantages(rollout)
        if looks:
            session.annotate(rollout)
            batch = session.annotate(batch)
        metrics = session.update(batch).metrics
        session.sync()
        seen.append((metrics, [s.tokens for s in session.generate()]))
    assert seen[0] == seen[1]


def test_what_has_no_tokens_is_refused(session: RLSession) -> None:
    with pytest.raises(SessionError, match="annotate needs a rollout, a batch or a sample"):
        session.annotate([1, 2])  # type: ignore[type-var]


def test_a_session_shows_what_to_call_next_as_it_goes_on(session: RLSession) -> None:
    def first() -> str:
        shown = session._repr_mimebundle_()["text/plain"].split("what to call next")[1]
        return shown.split()[0] if "=" not in shown.splitlines()[1] else shown.split()[2]

    assert first() == "session.generate()"
    rollout = session.generate()
    assert first() == "session.score(rollout)"
    rollout = session.score(rollout)
    assert first() == "session.advantages(rollout)"
    session.update(session.advantages(rollout))
    assert first() == "session.sync()"
    session.sync()
    assert first() == "session.generate()"
    shown = session._repr_mimebundle_()["text/html"]
    for words in ("✓ running", "cpu, float32", "host memory", "session.evaluate()"):
        assert words in shown
