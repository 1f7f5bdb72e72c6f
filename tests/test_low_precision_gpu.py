"""FP8 on a GPU: engine and trainer by the same kernels, what arrives, and the engine alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.samples import Sample
from tests.config.test_quantization import WHOLE_BLOCKS
from tests.small_models import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def is_odd(sample: Sample) -> float:
    """A reward that a model of random weights gets for some of its responses."""
    return float(sum(sample.tokens) % 2)


def started(folder: Path, **changes: Any) -> RLSession:
    model = make_model(folder / "model", "Qwen3", **WHOLE_BLOCKS)
    config = SessionConfig.preset("tiny").replace("model.name", str(model))
    config = config.replace("training.learning_rate", 1e-3).replace("memory.device_gib", 8.0)
    for name, value in changes.items():
        config = config.replace(name.replace("__", "."), value)
    return RLSession.start(config, reward=is_odd)


@pytest.fixture(scope="module", params=["fp8", "int4"])
def exact(
    alone: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[RLSession]:
    how: dict[str, Any] = {"model__quantization": request.param, "training__true_on_policy": True}
    with started(tmp_path_factory.mktemp("exact"), **how) as session:
        yield session


def test_both_sides_are_equal_to_the_bit_while_they_learn(exact: RLSession) -> None:
    for _ in range(3):
        metrics = exact.step().metrics
        assert metrics["train/train_rollout_logprob_abs_diff"] == 0.0
        assert metrics["train/grad_norm"] > 0
    report = exact.check_mismatch(exact.generate())
    assert (report.verdict, report.max_abs_diff, report.exact) == ("pass", 0.0, True), report


def test_codes_and_scales_arrive_in_place(exact: RLSession) -> None:
    exact.update(exact.advantages(exact.score(exact.generate())))
    different = exact.debug.stack.compare_weights().different
    assert any(name.endswith("qkv_proj.weight_scale") for name in different)
    assert exact.sync(verify=True).verified == len(exact.debug.stack.checksums()[0])
    assert not exact.debug.stack.compare_weights().different
    assert not exact.debug.stack.lost_weights()


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_an_engine_that_is_quantised_alone_is_corrected_for_and_not_equal(
    alone: None, tmp_path: Path, method: str
) -> None:
    with started(tmp_path, engine__quantization=method) as session:
        session.step()
        assert session.sync(verify=True).verified
        assert session.config.training.use_tis
        # What the probes leave is bfloat16's, which on a GPU differs from kernel to kernel.
        assert session.check_mismatch(session.generate()).verdict != "pass"


@pytest.mark.parametrize("weights", [None, "fp8"])
def test_an_engine_with_its_cache_in_fp8_starts_and_is_corrected_for(
    alone: None, tmp_path: Path, weights: str | None
) -> None:
    """The start compares the engine with a Transformers whose keys and values are rounded."""
    how: dict[str, Any] = {"engine__kv_cache_dtype": "fp8_e4m3", "engine__quantization": weights}
    with started(tmp_path, **how) as session:
        session.step()
        assert session.sync(verify=True).verified
        assert session.config.training.use_tis
        assert session.check_mismatch(session.generate()).verdict != "pass"


def test_int4_in_both_is_as_near_as_plain_weights_without_equal_bits(
    alone: None, tmp_path: Path
) -> None:
    with started(tmp_path, model__quantization="int4") as session:
        for _ in range(3):
            metrics = session.step().metrics
            assert math.isfinite(metrics["train/loss"])
            assert metrics["train/grad_norm"] > 0
        assert session.sync(verify=True).verified == len(session.debug.stack.checksums()[0])
        assert not session.debug.stack.compare_weights().different
        report = session.check_mismatch(session.generate())
        assert report.verdict == "pass", report
