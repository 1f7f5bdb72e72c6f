"""Quantised weights in sessions of their own: learned, loaded, by two trainers, one side alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit import RLSession, SessionConfig
from kit.tiny import MODEL_DIR
from tests.config.test_quantization import WHOLE_BLOCKS
from tests.faults.interrupts import digests
from tests.processes import SCHEDULER, kill, of_engine
from tests.small_models import make_model
from tests.steps import responses_and_metrics
from tests.test_low_precision import INT4, quantized


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["fp8", INT4], ids=["fp8", "int4"])
def test_the_tiny_task_is_solved(alone: None, how: Any, seed: int) -> None:
    with RLSession.start(quantized(how, seed=seed)) as session:
        assert session.evaluate().mean_reward < 0.6
        assert session.check_mismatch(session.generate()).verdict == "pass"
        session.train(30, show=False)
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"
        assert session.evaluate().mean_reward >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fp8", INT4], ids=["fp8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_trainers_and_two_engines_agree_to_the_bit(alone: None, how: Any, dtype: str) -> None:
    config = quantized(how, model__dtype=dtype, training__true_on_policy=True, engine__replicas=2)
    with RLSession.start(config.replace("training.num_trainers", 2)) as session:
        session.train(2, show=False)
        assert session.sync(verify=True).verified
        report = session.check_mismatch(session.generate())
        assert (report.max_abs_diff, report.exact) == (0.0, True), report


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fp8", INT4], ids=["fp8", "int4"])
def test_a_loaded_session_goes_on_as_the_saved_one(alone: None, how: Any, tmp_path: Path) -> None:
    with RLSession.start(quantized(how)) as session:
        session.train(2, show=False)
        path, there = session.save(tmp_path / "saved"), digests(session)
        rows = responses_and_metrics([session.step()])
    with RLSession.load(path) as session:
        assert digests(session) == there
        assert responses_and_metrics([session.step()]) == rows


@pytest.mark.slow
def test_an_engine_that_died_gets_codes_of_the_present_weights(alone: None) -> None:
    with RLSession.start(quantized(INT4)) as session:
        session.train(2, show=False)
        before = session.debug.stack.checksums()
        kill(of_engine(session, SCHEDULER))
        assert session.check_mismatch(session.generate()).verdict == "pass"
        assert session.debug.stack.checksums() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fp8", INT4], ids=["fp8", "int4"])
def test_an_engine_that_is_quantised_alone_is_named_with_its_numbers(alone: None, how: Any) -> None:
    method = how if isinstance(how, str) else how["method"]
    with RLSession.start(quantized(how, side="engine")) as session:
        assert session.config.training.use_tis
        rollout = session.generate()
        report = session.check_mismatch(rollout)
        assert report.verdict != "pass"
        assert report.cause_kind == "precision"
        assert "what the trainer does not, as engine.quantization asks" in report.cause
        assert f"with weights in {method} it goes to" in report.cause
        assert ("with activations in fp8 too it goes to" in report.cause) == (method == "fp8")
        session.step()
        assert session.sync(verify=True).verified


@pytest.mark.slow
def test_in_bfloat16_what_rounding_leaves_is_compared_with_bfloat16s_own(
    alone: None, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "Qwen3", **WHOLE_BLOCKS)
    named = {"model__name": str(model), "model__dtype": "bfloat16"}
    with RLSession.start(quantized("fp8", side="engine", **named)) as session:
        report = session.check_mismatch(session.generate())
    assert report.cause_kind == "precision", report
    assert "where bfloat16 alone makes" in report.cause


def uneven(folder: Path) -> Path:
    """The tiny model with channels of other sizes, which computes the same to the bit.

    What a channel's first weight is multiplied by, up to 16, its last one is divided by. In a group
    of numbers whose largest is 16 times as large as others, INT4 has no codes left for these.
    """
    random = torch.Generator().manual_seed(0)
    weights = load_file(shutil.copytree(MODEL_DIR, folder) / "model.safetensors")
    for layer in range(4):
        place = f"model.layers.{layer}"
        size = 2.0 ** torch.randint(0, 5, (448,), generator=random)
        weights[f"{place}.mlp.up_proj.weight"] *= size[:, None]
        weights[f"{place}.mlp.down_proj.weight"] /= size
        size = 2.0 ** torch.randint(0, 5, (64,), generator=random)
        weights[f"{place}.self_attn.v_proj.weight"] *= size[:, None]
        # Two query heads share a key head.
        weights[f"{place}.self_attn.o_proj.weight"] /= (
            size.view(2, 1, 32).expand(2, 2, 32).flatten()
        )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_training_through_int4_keeps_what_rounding_afterwards_loses(
    alone: None, tmp_path: Path
) -> None:
    def accuracy(config: SessionConfig, steps: int, out: Path | None = None) -> float:
        with RLSession.start(config) as session:
            session.train(steps, show=False)
            found = session.evaluate().mean_reward
            if out:
                session.export_hf(out, dtype="float32")
        assert found is not None
        return found

    task = {"data__source": "tiny:addition"}
    model = str(uneven(tmp_path / "uneven"))
    plain = SessionConfig.preset("tiny").replace("model.name", model)
    trained = accuracy(plain.replace("data.source", "tiny:addition"), 60, tmp_path / "plain")
    rounded = quantized(INT4, side="engine", model__name=str(tmp_path / "plain"), **task)
    aware = quantized(INT4, model__name=model, **task)
    with RLSession.start(rounded) as session:
        assert session.evaluate().mean_reward < trained - 0.1
    assert accuracy(aware, 60) > trained - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "fp8"])
def test_a_cache_in_fp8_is_what_the_check_says_it_is(alone: None, weights: Any) -> None:
    """The start compares the engine with a Transformers whose keys and values are rounded."""
    config = quantized(weights).replace("engine.kv_cache_dtype", "fp8_e4m3")
    with RLSession.start(config) as session:
        session.train(2, show=False)
        report = session.check_mismatch(session.generate())
        assert report.verdict in ("warn", "fail"), report
        assert report.cause_kind == "precision", report
        assert "with keys and values in fp8_e4m3 it goes to" in report.cause
        assert "engine.kv_cache_dtype asks" in report.cause
        assert session.sync(verify=True).verified
