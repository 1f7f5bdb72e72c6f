"""Engine and trainer are equal to the bit, whatever either of them did: on the real stack.

Where there is a GPU it runs there: the tiny model with the kit's own attention, and one of random
weights with FlashAttention-3; with two trainers and two engines if there are two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.errors import ConfigError, ModelError
from kit.samples import Rollout, Sample, Status
from tests.policies import FEW, LONGEST, rambles
from tests.processes import SCHEDULER, kill, of_engine
from tests.small_models import make_model, mixture_of_experts

ON_GPU = torch.cuda.is_available()
PAIR = 1 if torch.cuda.device_count() == 1 else 2
EVERYTHING = {
    "training.true_on_policy": True,
    "training.num_trainers": PAIR,
    "training.max_tokens_per_gpu": 300,  # several micro-batches
    "rollout.temperature": 0.8,
    "engine.replicas": PAIR,
    "engine.extra": {"chunked_prefill_size": 8, "disable_radix_cache": False},
}
"""Two trainers, two engines with a prefix cache, prompts in pieces, and updates that matter."""


def configuration(dtype: str = "float32", **more: object) -> SessionConfig:
    config = SessionConfig.preset("tiny").replace("model.dtype", dtype)
    for name, value in (EVERYTHING | more).items():
        config = config.replace(name, value)
    return config


DTYPES = ["bfloat16"] if ON_GPU else ["float32", "bfloat16"]
WIDE = "heads of 128"
"""A kind of model: FlashAttention-3 computes it."""


@pytest.fixture(scope="module", params=[*DTYPES, WIDE] if ON_GPU else DTYPES)
def exact(
    request: pytest.FixtureRequest, alone: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RLSession]:
    config, reward = configuration(DTYPES[-1] if request.param == WIDE else request.param), None
    if request.param == WIDE:
        folder = tmp_path_factory.mktemp("wide") / "model"
        config = config.replace("model.name", str(make_model(folder, "Qwen3", head_dim=128)))
        reward = is_odd
    with RLSession.start(config, reward=reward) as session:
        yield session


def is_odd(sample: Sample) -> float:
    """A reward that a model of random weights gets now and then."""
    return float(sample.tokens[-2] % 2)


def assert_exact(session: RLSession, rollout: Rollout) -> None:
    report = session.check_mismatch(rollout)
    assert report.tokens > 0
    assert (report.max_abs_diff, report.exact) == (0.0, True), report
    assert "✓ exact" in str(report)
    assert "to the bit" in report.cause


def test_what_would_make_both_sides_differ_is_refused() -> None:
    for name, value in {
        "engine.weight_bits": 8, "engine.weight_noise": 0.1, "engine.tensor_parallel": 2,
        "engine.attention_backend": "flashinfer", "engine.extra": {"quantization": "fp8"},
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=r"true_on_policy is set, and engine\.\w+"):
            configuration(**{"engine.extra": {}, name: value})


@pytest.mark.slow
def test_a_family_without_shared_operators_is_refused_before_anything_starts(
    tmp_path: Path, alone: None
) -> None:
    model = make_model(tmp_path / "model", "Phi3")
    with pytest.raises(ModelError, match="Phi3ForCausalLM"):
        RLSession.start(configuration(**{"model.name": str(model)}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixture_of_experts_is_equal_too(dtype: str, tmp_path: Path, alone: None) -> None:
    model = mixture_of_experts(tmp_path / "model", head_dim=128 if ON_GPU else 32)
    config = configuration(dtype, **{"model.name": str(model), "training.learning_rate": 1e-3})
    with RLSession.start(config, reward=is_odd) as session:
        for _ in range(3):
            metrics = session.step().metrics
            assert metrics["train/grad_norm"] > 0
            assert metrics["train/train_rollout_logprob_abs_diff"] == 0.0
        assert_exact(session, session.generate())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_requests_that_were_retracted_and_read_again_are_equal_too(
    dtype: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")  # SGLang's own switch for its tests
    config = SessionConfig.preset("tiny-moe").replace("model.dtype", dtype)
    for name, value in {
        "training.true_on_policy": True, "training.rollout_batch_size": 16,
        "data.source": "tiny:chain", "rollout.max_response_len": 128, "rollout.temperature": 3.0,
    }.items():  # fmt: skip
        config = config.replace(name, value)
    with RLSession.start(config) as session:
        rollout = session.generate()
        records = [s.rollout_routed_experts for s in rollout]
        retracted = [record for record in records if record and not record.known.all()]
        assert 0 < len(retracted) < len(rollout)
        assert_exact(session, rollout)


@pytest.mark.slow
def test_twenty_steps_differ_in_no_bit(exact: RLSession) -> None:
    first = exact.evaluate().mean_reward
    for _ in range(20):
        report = exact.step()
        metrics = report.metrics
        assert metrics["train/train_rollout_logprob_abs_diff"] == 0.0
        assert metrics["train/train_rollout_kl"] == 0.0
        assert metrics["train/ppo_kl"] == 0.0
        assert metrics["train/ess_ratio"] == 1.0
    assert_exact(exact, exact.generate())
    assert exact.evaluate().mean_reward > first or ON_GPU  # and it learned meanwhile


@pytest.mark.slow
def test_one_request_and_many_read_and_written_are_equal(exact: RLSession) -> None:
    prompts = ["12+34=", "5+6=", "77+11="]
    alone = [exact.generate([prompt], n_samples_per_prompt=1)[0] for prompt in prompts]
    for sample in alone:
        assert_exact(exact, exact.last_rollout.with_samples([sample]))
    many = exact.generate(prompts, n_samples_per_prompt=60)
    assert_exact(exact, many)
    stack = exact.debug.stack
    rows, lengths = [s.tokens for s in many], [s.response_length for s in many]
    trained = exact_rows(exact, many, 1.0)
    for cache in ("none", "refilled", "present"):
        for engine in stack.rescore(rows, lengths, cache=cache):
            assert [row.log_probs for row in engine] == trained


def exact_rows(session: RLSession, rollout: Rollout, temperature: float) -> list[list[float]]:
    from kit.trainer.probes import Samples

    samples = Samples([s.tokens for s in rollout], [s.response_length for s in rollout])
    rows: list[list[float]] = session.debug.stack.probe("recompute", samples, temperature)
    return rows


@pytest.mark.slow
def test_after_an_undo_and_in_an_engine_that_was_started_again(exact: RLSession) -> None:
    exact.snapshot("before")
    first = exact.generate()
    exact.step()
    exact.restore("before")
    again = exact.generate()
    assert_exact(exact, again)
    assert [sample.tokens for sample in again] == [sample.tokens for sample in first]
    for index in range(PAIR):
        kill(of_engine(exact, index, SCHEDULER))
    assert_exact(exact, exact.generate())


@pytest.mark.slow
def test_the_first_part_that_differs_is_named_in_the_report(exact: RLSession) -> None:
    stack, rollout = exact.debug.stack, exact.generate()
    name, agree = stack.first_difference(rollout[0].tokens)
    assert (name, agree >= 10) == ("", True)
    exact.snapshot("equal")
    exact.update(exact.advantages(exact.score(rollout)))
    assert stack.first_difference(rollout[0].tokens) == ("model.embed_tokens", 0)
    exact.sync()
    assert stack.first_difference(rollout[0].tokens)[0] == ""
    stale = exact.check_mismatch(rollout)
    assert (stale.verdict, stale.cause_kind, stale.exact) == ("fail", "stale_weights", False)
    exact.restore("equal")
    assert_exact(exact, exact.generate())


@pytest.mark.slow
def test_what_was_stopped_and_goes_on_is_exact_under_its_own_weights(
    exact: RLSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its later tokens under newer weights are those weights', with what stood before them."""
    rambles(exact, monkeypatch, 6.0, LONGEST)
    monkeypatch.setattr(exact.debug.state, "config", exact.config)
    tree = exact.config.model_dump()
    tree["rollout"] |= {"over_sampling_batch_size": 24, "partial_rollout": True}
    tree["training"] |= FEW
    exact.debug.state.config = SessionConfig(**tree)
    old = exact_under(exact, exact.generate())
    assert old
    exact.update(exact.advantages(exact.score(exact.last_rollout, reward=lambda s: s.index % 2)))
    exact.sync()
    for _ in range(12):
        rollout = exact.generate()
        exact_under(exact, rollout)
        if any(len(s.weight_versions) > 1 for s in rollout):
            return
    pytest.fail("nothing was continued")


def exact_under(session: RLSession, rollout: Rollout) -> int:
    """Assert that tokens of the present weights are equal; how many there are."""
    now, compared = session.engine_version, 0
    rows = exact_rows(session, rollout, 6.0)
    for sample, row in zip(rollout, rows, strict=True):
        if sample.status is Status.PENDING or not sample.weight_versions:
            continue
        if sample.weight_versions[-1] != now:
            continue
        last = (sample.version_lengths or [sample.response_length])[-1]
        start = sample.response_length - last
        assert (sample.rollout_log_probs or [])[start:] == row[start:]
        compared += last
    return compared
