"""Causes of a mismatch that a session is started with: settings of one side, faults of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.diagnostics.mismatch.probes import RAW_LOG_PROBS
from kit.reports import MismatchReport
from kit.tiny import MODEL_DIR
from tests.small_models import mixture_of_experts


@contextmanager
def started(
    engine: dict[str, Any] | None = None, weight_noise: float = 0.0, **settings: Any
) -> Iterator[RLSession]:
    """A session of its own, with one engine and few samples."""
    if other := RLSession.current():
        other.close(keep_warm=True)
    config = {
        "model": {"name": "tiny"},
        "data": {"source": "tiny:addition"},
        "training": {"rollout_batch_size": 8, "learning_rate": 1e-3},
        "engine": {"replicas": 1, "weight_noise": weight_noise, "extra": engine or {}},
        "mismatch": {"on_start": "skip"},  # what a start would refuse is to be found afterwards
    }
    with RLSession.start(SessionConfig(**config | settings)) as session:
        yield session


def evidence(report: MismatchReport) -> str:
    return "\n".join(report.evidence)


@pytest.mark.slow
def test_a_prefix_cache_of_old_weights_is_found_by_going_around_it() -> None:
    with started({"disable_radix_cache": False}) as session:
        prompts = ["12+34=", "58+67=", "23+49="]
        session.generate(prompts, n_samples_per_prompt=8)
        for _ in range(3):
            session.step()
            session.generate(prompts, n_samples_per_prompt=8)
        assert session.check_mismatch().verdict == "pass"  # each sync flushes the cache
        session.update(session.advantages(session.score(session.generate())))
        session.generate(prompts, n_samples_per_prompt=8)
        session.debug.stack.sync(session.step_count, flush_cache=False)
        report = session.check_mismatch(session.generate(prompts, n_samples_per_prompt=8))
        assert (report.verdict, report.cause_kind) == ("fail", "stale_prefix_cache")
        assert "checksums of 34 parameters: 0 differ" in evidence(report)
        session.sync()
        fresh = session.generate(prompts, n_samples_per_prompt=8)
        assert session.check_mismatch(fresh).verdict == "pass"


@pytest.mark.slow
def test_log_probs_before_temperature_are_told_from_another_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(RAW_LOG_PROBS, "1")
    with started(rollout={"temperature": 0.7}) as session:
        report = session.check_mismatch()
        assert (report.verdict, report.cause_kind) == ("fail", "processed_log_probs")
        assert "fit temperature 1 " in report.cause
        assert RAW_LOG_PROBS in report.cause


@pytest.mark.slow
def test_an_engine_in_another_dtype_is_found_by_its_weights_and_the_size_of_rounding() -> None:
    with started({"dtype": "bfloat16"}) as session:
        report = session.check_mismatch()
        assert (report.verdict, report.cause_kind) == ("fail", "precision")
        assert "the trainer computes in float32, the engine in bfloat16" in report.cause


FAULTY = """
import pathlib

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

FAULT = pathlib.Path({fault!r})


class FaultyModel(Qwen3Model):
    def forward(self, input_ids=None, position_ids=None, **more):
        fault = FAULT.read_text()
        if fault == "positions":  # counts along the row, whatever the caller says
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **more)
        if fault == "dropout":  # forgets to ask whether it is being trained
            output.last_hidden_state = torch.nn.functional.dropout(output.last_hidden_state, 0.1)
        return output


class FaultyQwen3(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = FaultyModel(config)
        self.post_init()
"""


@pytest.mark.slow
def test_faults_of_a_models_own_code_are_told_apart(tmp_path: Path) -> None:
    """SGLang runs its own Qwen3; the trainer runs what the directory brings along."""
    from transformers import AutoModelForCausalLM

    folder, fault = tmp_path / "model", tmp_path / "fault"
    shutil.copytree(MODEL_DIR, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "faulty.FaultyQwen3"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "faulty.py").write_text(FAULTY.format(fault=str(fault)))
    fault.write_text("")
    with started(model={"name": str(folder), "trust_remote_code": True}) as session:
        assert session.check_mismatch().verdict == "pass"
        fault.write_text("positions")
        report = session.check_mismatch(session.generate())
        assert (report.verdict, report.cause_kind) == ("fail", "packing")
        assert "position_ids" in report.cause
        fault.write_text("dropout")
        report = session.check_mismatch(session.generate())
        assert (report.verdict, report.cause_kind) == ("fail", "dropout")
        assert "the same pass twice" in report.cause
        health = {i.name: i.holds for i in session.check().invariants}
        assert health["ppo_kl at the first step"] is False
        assert health["weights changed by learning rate 0"] is True
        fault.write_text("")
        assert session.check().healthy
        exported = session.export_hf(tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(loaded).__name__ == "FaultyQwen3"


@pytest.mark.slow
def test_weights_disturbed_on_purpose_are_named_until_they_are_handed_over_exactly() -> None:
    with started(weight_noise=0.3) as session:
        report = session.check_mismatch()
        assert (report.verdict, report.cause_kind) == ("fail", "precision")
        assert "with noise of 0.3 of their size" in report.cause
        assert "checksums of 34 parameters: 0 differ" in evidence(report)
        session.sync(exact=True)
        assert session.check_mismatch(session.generate()).verdict == "pass"
        session.sync()
        assert session.check_mismatch(session.generate()).cause_kind == "precision"


@pytest.mark.slow
def test_experts_chosen_differently_are_found_by_taking_the_engines_choice(tmp_path: Path) -> None:
    folder = mixture_of_experts(tmp_path / "moe")
    one_expert = json.dumps({"num_experts_per_tok": 1})
    engine = {"enable_return_routed_experts": True, "json_model_override_args": one_expert}
    own = {"model": {"name": str(folder)}, "rollout": {"max_response_len": 12}}
    with started(engine, **own) as session:
        report = session.check_mismatch()
        assert (report.verdict, report.cause_kind) == ("fail", "expert_routing")
        assert "engine sends a token to 1 experts of a layer, the trainer to 2" in report.cause
        before = session.debug.stack.checksums()[0]
        session.update(session.advantages(session.score(session.generate(), _by_length)))
        session.sync()
        after = session.debug.stack.checksums()[0]
        experts = [name for name in after if ".experts." in name]
        assert len(experts) == 4
        assert all(before[name] != after[name] for name in experts)  # the hand-over reaches them
        again = session.check_mismatch(session.generate())
        assert again.cause_kind == "expert_routing"
        assert ": 0 differ" in evidence(again)


def _by_length(sample: Any) -> float:
    return float(sample.tokens[-1] % 7)
