"""Routing replay on the real stack: what the engine took is recorded, and the trainer takes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import RLSession, SessionConfig
from kit.errors import ConfigError, SessionError
from kit.lifecycle.checks import check_experts
from kit.models import families
from kit.models.source import find
from kit.samples import Rollout, Sample
from kit.samples.experts import RoutedExperts
from kit.tracking.metrics import rollout_metrics
from tests.small_models import make_model

MOE = (
    SessionConfig.preset("tiny-moe")
    .replace("training.rollout_batch_size", 4)
    .replace("training.use_rollout_routing_replay", True)
    .replace("engine.replicas", 1)
)
CACHED = {"disable_radix_cache": False, "chunked_prefill_size": 16}
"""Prompts are read in parts, and prefixes are found again."""


@pytest.fixture(scope="module")
def session(alone: None) -> Iterator[RLSession]:
    with RLSession.start(MOE.replace("engine.extra", CACHED)) as started:
        yield started


def record(sample: Sample) -> RoutedExperts:
    assert sample.rollout_routed_experts is not None
    return sample.rollout_routed_experts


def in_trainer(session: RLSession, rollout: Rollout) -> list[np.ndarray]:
    """The trainer's own choice for each sample, on weights equal to the engine's."""
    from kit.trainer.probes import Samples

    asked = Samples([s.tokens for s in rollout], [s.response_length for s in rollout])
    routed: Any = session.debug.stack.probe("routing", asked, 1.0)
    return [table.astype(np.uint8) for table in routed.experts]


def differing(session: RLSession, rollout: Rollout) -> float:
    """Share of tokens and layers of which engine and trainer choose other experts."""
    pairs = zip(rollout, in_trainer(session, rollout), strict=True)
    wrong = [(np.sort(record(s).array) != np.sort(own)).any(-1).ravel() for s, own in pairs]
    return float(np.concatenate(wrong).mean())


@pytest.mark.slow
def test_a_stop_string_and_an_interrupted_rollout_keep_one_row_a_token(
    alone: None, tmp_path: Path
) -> None:
    config = (
        MOE.replace("rollout.stop", ["1", "23"])
        .replace("rollout.over_sampling_batch_size", 8)
        .replace("rollout.partial_rollout", True)
        .replace("data.source", "tiny:chain")
    )
    with RLSession.start(config) as session:
        for _ in range(2):
            session.step()
        rollout = session.last_rollout
        assert rollout is not None
        assert all(len(record(s)) == len(s.tokens) - 1 for s in rollout)
        session.save(tmp_path / "checkpoint")
        waiting = [s for group in session.debug.state.buffer.state() for s in group]
        begun = [s for s in waiting if s["response_length"]]
        assert all(s["rollout_routed_experts"] for s in begun)


@pytest.mark.slow
def test_what_a_retracted_request_reports_of_its_response_counts_as_not_recorded(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")  # SGLang's own switch for its tests
    config = (
        MOE.replace("training.rollout_batch_size", 16)
        .replace("data.source", "tiny:chain")
        .replace("rollout.max_response_len", 128)
        .replace("mismatch.on_start", "skip")
    )
    with RLSession.start(config) as session:
        rollout = session.generate(temperature=3.0)
    retracted = [s for s in rollout if not record(s).known.all()]
    assert 0 < len(retracted) < len(rollout)
    for sample in retracted:
        told = len(sample.prompt_tokens) - 1
        assert record(sample).known.tolist() == [
            place < told for place in range(len(record(sample)))
        ]
    assert rollout_metrics(rollout)["rollout/routing/recorded_frac"] < 1


@pytest.mark.slow
def test_every_token_of_prompt_and_response_has_the_experts_of_the_weights_that_wrote_it(
    session: RLSession,
) -> None:
    rollout = session.generate()
    sample = rollout[0]
    assert record(sample).shape == (len(sample.tokens) - 1, 3, 2)
    assert record(sample).layers == (1, 2, 3)  # the first is dense
    assert record(sample).array.dtype == np.uint8
    assert all(record(s).known.all() for s in rollout)
    assert differing(session, rollout) < 0.002  # near ties, which rounding decides


@pytest.mark.slow
def test_after_new_weights_cached_prefixes_bring_no_experts_of_old_ones(
    session: RLSession,
) -> None:
    prompts = [row.prompt for row in session.generate()][:1]
    before = session.generate(prompts, n_samples_per_prompt=8)
    again = session.generate(prompts, n_samples_per_prompt=8)
    rows = len(before[0].prompt_tokens)
    assert len({record(s).array[:rows].tobytes() for s in (*before, *again)}) == 1
    session.configure(learning_rate=0.02)  # far enough that other experts are chosen
    for _ in range(3):
        session.step()
    session.configure(learning_rate=1e-4)
    after = session.generate(prompts, n_samples_per_prompt=8)
    assert record(after[0]).array[:rows].tobytes() != record(before[0]).array[:rows].tobytes()
    assert differing(session, after) < 0.002


@pytest.mark.slow
def test_the_update_follows_the_record_and_its_metrics_say_how_far_the_trainer_agrees(
    session: RLSession,
) -> None:
    rollout = session.score(session.generate())
    report = session.update(session.advantages(rollout))
    assert report.metrics["train/routing/overlap"] > 0.99
    assert report.metrics["train/routing/contradicted_frac"] < 0.01
    session.sync()


@pytest.mark.slow
def test_samples_without_a_record_are_refused_where_the_engines_choice_is_to_be_replayed(
    session: RLSession,
) -> None:
    rollout = session.score(session.generate())
    bare = [Sample.from_dict(s.to_dict() | {"rollout_routed_experts": None}) for s in rollout]
    with pytest.raises(SessionError, match="no sample has a record of the engine's experts"):
        session.update(session.advantages(rollout.with_samples(bare)))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("engine.speculative", {"algorithm": "ngram"}, "record of experts"),
        ("engine.extra", {"chunked_prefill_size": -1}, "chunked_prefill_size: -1"),
        ("engine.extra", {"moe_runner_backend": "flashinfer_trtllm"}, "only triton is known"),
        ("engine.tensor_parallel", 2, "was never compared"),
        ("engine.extra", {"enable_return_routed_experts": False}, "switches the record off"),
        ("training.use_routing_replay", True, "are both set"),
        ("training.true_on_policy", True, "nothing to replay"),
    ],
)
def test_settings_that_contradict_the_replay_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MOE.replace(key, value)


def test_the_own_choice_and_engine_log_probs_as_old_ones_exclude_each_other() -> None:
    config = SessionConfig.preset("tiny-moe").replace("training.use_routing_replay", True)
    with pytest.raises(ConfigError, match=r"with training\.use_rollout_logprobs there is none"):
        config.replace("training.use_rollout_logprobs", True)


@pytest.mark.parametrize("name", ["use_rollout_routing_replay", "use_routing_replay"])
def test_a_dense_model_is_refused_before_anything_starts(tmp_path: Path, name: str) -> None:
    config = SessionConfig.preset("tiny").replace(f"training.{name}", True)
    with pytest.raises(ConfigError, match=rf"training\.{name} is set, and tiny has no experts"):
        check_experts(config, find(config.model))
    moe = config.replace("model.name", "tiny-moe")
    check_experts(moe, find(moe.model))
    # Experts under names of its own are experts: what was tried with them says the family's record.
    granite = config.replace("model.name", str(make_model(tmp_path / "granite", "GraniteMoe")))
    source = find(granite.model)
    assert source.experts is None
    check_experts(granite, source)
    with pytest.raises(ConfigError, match="was not tried with GraniteMoeForCausalLM"):
        families.find(source.architecture).check(granite, source.path, "cpu")
