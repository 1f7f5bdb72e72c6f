"""Quantised weights on the real stack: both sides agree, what arrives, what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kit import RLSession, SessionConfig
from kit.errors import SessionError
from kit.models.low_precision import is_quantized
from kit.operators.low_precision import Scheme
from kit.weight_sync.verify import BROKEN

INT4 = {"method": "int4", "group_size": 64}


def quantized(how: Any = "fp8", side: str = "model", **changes: Any) -> SessionConfig:
    config = SessionConfig.preset("tiny").replace(f"{side}.quantization", how)
    for name, value in changes.items():
        config = config.replace(name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def exact(alone: None) -> Iterator[RLSession]:
    """FP8 in trainer and engine, with the same operators: nothing may differ."""
    with RLSession.start(quantized(training__true_on_policy=True)) as session:
        yield session


def test_trainer_and_engine_agree_to_the_bit_before_and_after_an_update(exact: RLSession) -> None:
    for _ in range(2):
        report = exact.check_mismatch(exact.generate())
        assert (report.verdict, report.max_abs_diff, report.exact) == ("pass", 0.0, True), report
        exact.step()


def test_a_verified_sync_counts_codes_and_scales(exact: RLSession) -> None:
    exact.step()
    report = exact.sync(verify=True)
    names = exact.debug.stack.checksums()[0]
    linear = 4 * 4  # fused: qkv, o, gate and up, down of each layer
    assert report.verified == len(names)
    assert sum(name.endswith(".weight_scale") for name in names) == linear
    # Codes take a byte, so what travels is far less than 4 bytes a number.
    assert report.bytes < 1.1e6


def test_an_update_that_was_not_sent_shows_in_codes_and_scales(exact: RLSession) -> None:
    exact.update(exact.advantages(exact.score(exact.generate())))
    different = exact.debug.stack.compare_weights().different
    assert any(name.endswith("qkv_proj.weight_scale") for name in different)
    assert any(name.endswith("down_proj.weight") for name in different)
    exact.sync(verify=True)
    assert not exact.debug.stack.compare_weights().different


def test_what_is_erased_and_not_sent_is_seen(exact: RLSession) -> None:
    stack = exact.debug.stack
    assert not stack.lost_weights()
    assert not any(BROKEN in value for value in stack.checksums()[0].values())


def test_an_export_is_what_was_trained(exact: RLSession, tmp_path: Path) -> None:
    path = exact.export_hf(tmp_path / "fp8", quantization="fp8")
    plain = load_file(exact.export_hf(tmp_path / "plain", dtype="float32") / "model.safetensors")
    there = load_file(path / "model.safetensors")
    for name, value in plain.items():
        if not is_quantized(name):
            assert torch.equal(there[name], value)
            continue
        codes, scales = Scheme("fp8").quantize(value)
        assert torch.equal(there[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(there[f"{name}_scale_inv"], scales)
    with pytest.raises(SessionError, match="no quantization 'fp4'"):
        exact.export_hf(tmp_path / "other", quantization="fp4")  # type: ignore[arg-type]


def test_a_deep_check_says_that_the_engine_holds_codes(exact: RLSession) -> None:
    report = exact.check_mismatch(deep=True)
    assert report.verdict == "pass", report
    words = "the trainer computes in float32, the engine's weights are fp8 codes with scales"
    assert any(words in line for line in report.evidence)
