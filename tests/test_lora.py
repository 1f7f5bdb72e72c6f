"""Adapters on the real stack: engine, checks, undo, the reference, exports, refusals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.errors import ConfigError, ModelError
from kit.tiny import MODEL_DIR
from tests.cases import slow
from tests.checkpoint.test_export import response_log_probs
from tests.conftest import Shared
from tests.faults.interrupts import digests

CONFIG = SessionConfig.preset("tiny-lora").replace("name", "adapters")


def with_settings(**settings: Any) -> SessionConfig:
    config = CONFIG
    for name, value in settings.items():
        config = config.replace(name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def running(shared: Shared) -> Iterator[list[RLSession]]:
    """Sessions that train adapters, on the processes of the shared one; the last may run."""
    shared.at(seed=0).close(keep_warm=True)
    sessions: list[RLSession] = []
    yield sessions
    if sessions:
        sessions[-1].close(keep_warm=True)


@pytest.fixture
def adapters(running: list[RLSession]) -> RLSession:
    """The running one in its first moment, or another where a test has closed it."""
    if not running or RLSession.current() is not running[-1]:
        running.append(RLSession.start(CONFIG))
        running[-1].snapshot("first")
    running[-1].restore("first")
    return running[-1]


def learned(session: RLSession, steps: int) -> list[dict[str, float]]:
    """Metrics of so many steps, without times."""
    rows = [session.step().metrics for _ in range(steps)]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_a_session_with_adapters_begins_in_health_and_says_what_it_trains(
    adapters: RLSession,
) -> None:
    report = adapters.check()
    assert report.healthy, report
    assert "0 of 83,968" in str(report)
    shown = adapters._repr_mimebundle_()
    for text in (shown["text/plain"], shown["text/html"]):
        assert "LoRA, rank 8" in text
        assert "adapters in all linear layers" in text
        assert "84 k (9.3%)" in text


def test_the_engine_has_what_the_adapters_make_and_an_undo_takes_them_back(
    adapters: RLSession,
) -> None:
    before, start = digests(adapters), adapters.snapshot("before")
    assert start.bytes < 2e6  # no weights but theirs
    adapters.train(3, show=False)
    assert adapters.sync(verify=True).verified
    report = adapters.check_mismatch(adapters.generate(), deep=True)
    assert report.verdict == "pass", report
    assert report.mean_abs_diff < 1e-5
    there = digests(adapters)
    tried = adapters.what_if(lr=[1e-4], settings={"kl_loss_coef": [0.0, 0.1]})
    assert len(tried) == 3
    assert digests(adapters) == there != before
    adapters.restore("before")
    assert digests(adapters) == before
    assert adapters.check_mismatch(adapters.generate()).verdict == "pass"


def test_a_reference_is_there_without_having_been_asked_for(adapters: RLSession) -> None:
    first = adapters.generate()
    start = adapters.log_probs(first)
    adapters.configure(kl_loss_coef=0.05)
    rows = learned(adapters, 2)
    assert rows[0]["train/kl_loss"] == 0.0 < rows[1]["train/kl_loss"]
    assert adapters.log_probs(first, of="reference") == start != adapters.log_probs(first)


def test_a_checkpoint_with_a_reference_is_restored_where_none_was_asked_for(
    adapters: RLSession, tmp_path: Path
) -> None:
    adapters.configure(kl_loss_coef=0.05)
    learned(adapters, 1)
    path, there = adapters.save(tmp_path / "saved"), digests(adapters)
    adapters.restore("first")
    assert adapters.config.training.kl_loss_coef == 0.0
    adapters.restore(path)
    assert digests(adapters) == there
    assert adapters.config.training.kl_loss_coef == 0.05


def test_both_exports_give_the_trainers_log_probs(adapters: RLSession, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapters.train(3, show=False)
    merged = AutoModelForCausalLM.from_pretrained(adapters.export_hf(tmp_path / "merged"))
    path = adapters.export_hf(tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, path)
    samples = [s for s in adapters.generate() if s.response_length][:8]
    for sample, expected in zip(samples, adapters.log_probs(samples), strict=True):
        for model in (merged, tuned):
            found = response_log_probs(model, sample.tokens, sample.response_length)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        tokens = torch.tensor([sample.tokens])
        torch.testing.assert_close(
            tuned(tokens).logits, merged(tokens).logits, rtol=1e-5, atol=1e-5
        )
    assert AutoTokenizer.from_pretrained(path).chat_template == adapters.tokenizer.chat_template
    assert not (path / "model.safetensors").exists()
    with pytest.raises(ModelError, match=r"(?s)adapter of PEFT.*merge_and_unload"):
        RLSession(with_settings(model__name=str(path))).debug.prepare()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model__lora__target_modules": ["q_prj"]}, r"(?s)'q_prj'.*Did you mean 'q_proj'"),
        ({"model__lora__target_modules": ["lm_head"]}, r"(?s)'lm_head'.*output layer.*v_proj"),
        ({"model__lora__target_modules": "q_proj"}, r"give a list of names, \[q_proj\]"),
        ({"model__lora__target_modules": []}, "nothing would be trained"),
        ({"model__lora__modules_to_save": ["lm_head"]}, "shares between its first and its last"),
        ({"model__lora__modules_to_save": ["nrom"]}, r"(?s)'nrom'.*Did you mean 'norm'"),
        ({"model__lora__lora_dropout": 0.1}, "drops something at random"),
        ({"model__lora__init_lora_weights": "pissa"}, "true and gaussian are known"),
        ({"model__lora__rank": 8}, r"model\.lora\.rank'(?s:.*)use_rslora"),
        ({"training__kl_coef": 0.1, "training__ref_update_interval": 2}, "does not move"),
        (
            {"model__lora__load_in_4bit": True, "training__optimizer_cpu_offload": True},
            "4 bits stay on the device",
        ),
        (
            {"model__lora__load_in_4bit": True, "model__lora__modules_to_save": ["v_proj"]},
            r"(?s)modules_to_save has 'v_proj'.*other numbers than the reference",
        ),
        (
            {
                "model__name": "tiny-moe",
                "model__lora__target_modules": ["q_proj"],
                "model__lora__load_in_4bit": True,
            },
            "is a mixture of experts",
        ),
        ({"model__name": "tiny-moe"}, r"(?s)experts get no adapters yet.*q_proj"),
    ],
)
def test_what_adapters_cannot_be_is_refused_before_anything_starts(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RLSession(with_settings(**settings)).debug.prepare()


def test_a_session_goes_on_from_an_exported_adapter(adapters: RLSession, tmp_path: Path) -> None:
    adapters.train(2, show=False)
    samples = [s for s in adapters.generate() if s.response_length][:8]
    expected, reference = adapters.log_probs(samples), adapters.log_probs(samples, of="reference")
    path = adapters.export_hf(tmp_path / "adapter", adapter=True)
    adapters.close(keep_warm=True)
    session = RLSession.start(with_settings(model__lora__adapter_path=str(path)))
    assert session.log_probs(samples) == expected
    assert session.log_probs(samples, of="reference") == reference
    report = session.check()  # the engine has the adapter too
    assert report.healthy, report
    session.close(keep_warm=True)


@pytest.mark.parametrize("way", ["merged", *slow("adapter")])
def test_a_base_in_4_bits_is_the_engines_and_the_references_too(
    adapters: RLSession, tmp_path: Path, way: str
) -> None:
    samples = [s for s in adapters.generate() if s.response_length][:8]
    of_the_files = adapters.log_probs(samples)
    adapters.close(keep_warm=True)
    session = RLSession.start(with_settings(model__lora__load_in_4bit=True, engine__lora=way))
    start = session.log_probs(samples)
    assert start == session.log_probs(samples, of="reference") != of_the_files
    report = session.check()  # with Transformers, which has the rounded weights
    assert report.healthy, report
    shown = session._repr_mimebundle_()["text/plain"]
    assert "adapters in all linear layers, beside weights in 4 bits" in shown
    assert "84 k (9.3%)" in shown
    session.train(2, show=False)
    assert session.sync(verify=True).verified
    mismatch = session.check_mismatch(session.generate(), deep=True)
    assert mismatch.verdict == "pass", mismatch
    assert session.log_probs(samples, of="reference") == start
    if way == "adapter":  # an engine that starts again has read the files' weights
        os.kill(session.debug.stack.engines.ask("processes")[0][1], signal.SIGKILL)
        assert session.check_mismatch(session.generate()).verdict == "pass"
    path = session.export_hf(tmp_path / "adapter", adapter=True)
    with pytest.warns(UserWarning, match="was trained beside weights in 4 bits"):
        RLSession(with_settings(model__lora__adapter_path=str(path))).debug.prepare()
    session.close(keep_warm=True)
