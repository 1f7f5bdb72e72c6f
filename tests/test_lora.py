"""Adapters on the real stack: engine, checks, undo, checkpoints, exports, several trainers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.errors import CheckpointError, ConfigError, ModelError
from kit.tiny import MODEL_DIR
from tests.checkpoint.test_export import response_log_probs
from tests.conftest import Shared
from tests.faults.interrupts import digests

ROOT = Path(__file__).parents[1]
CONFIG = SessionConfig.preset("tiny-lora").replace("name", "adapters")


def with_settings(**settings: Any) -> SessionConfig:
    config = CONFIG
    for name, value in settings.items():
        config = config.replace(name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def running(shared: Shared) -> Iterator[RLSession]:
    """A session that trains adapters, on the processes of the shared one."""
    shared.at(seed=0).close(keep_warm=True)
    session = RLSession.start(CONFIG)
    session.snapshot("first")
    yield session
    session.close(keep_warm=True)


@pytest.fixture
def adapters(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    return running


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
        ({"model__name": "tiny-moe"}, r"(?s)experts get no adapters yet.*q_proj"),
    ],
)
def test_what_adapters_cannot_be_is_refused_before_anything_starts(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RLSession(with_settings(**settings)).debug.prepare()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_rank_8_solves_the_tiny_task(alone: None, seed: int) -> None:
    with RLSession.start(with_settings(seed=seed)) as session:
        assert session.evaluate().mean_reward < 0.5
        session.train(30, show=False)
        assert session.evaluate().mean_reward >= 0.9


@pytest.mark.slow
def test_a_loaded_session_goes_on_as_the_saved_one_and_no_other_does(
    alone: None, tmp_path: Path
) -> None:
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    config = with_settings(model__name=str(model), data__source="tiny:addition")
    with RLSession.start(config) as session:
        learned(session, 2)
        path = session.save(tmp_path / "saved")
        rows, there = learned(session, 2), digests(session)
        size = sum(file.stat().st_size for file in (path / "trainer").iterdir())
        assert size < 2e6
    with RLSession.load(path) as session:
        assert learned(session, 2) == rows
        assert digests(session) == there
    with pytest.raises(CheckpointError, match=r"made with model\.lora\.lora_alpha 16"):
        RLSession.load(path, changes={"model.lora.lora_alpha": 32})
    with pytest.raises(CheckpointError, match="trains adapters"):
        RLSession.load(path, changes={"model.lora": None})
    other = bytearray((model / "model.safetensors").read_bytes())
    other[-2] ^= 1
    (model / "model.safetensors").write_bytes(other)
    with pytest.raises(CheckpointError, match="adapters to other weights"):
        RLSession.load(path)


DIES = """
import json, os, signal
from kit import RLSession, SessionConfig
from tests.faults.interrupts import digests
config = SessionConfig.preset("tiny-lora").replace("name", "dying-adapters")
session = RLSession.start(config)
session.step()
session.step()
print(json.dumps(digests(session)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_kernel_leaves_adapters_that_go_on(alone: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with RLSession.attach("dying-adapters") as session:
        assert session.step_count == 2
        assert digests(session) == json.loads(done.stdout.splitlines()[-1])
        row, there = learned(session, 1), digests(session)
    with RLSession.start(CONFIG) as session:
        learned(session, 2)
        assert learned(session, 1) == row
        assert digests(session) == there


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_shared_operators_merged_weights_give_the_trainers_bits(
    alone: None, dtype: str
) -> None:
    config = with_settings(model__dtype=dtype, training__true_on_policy=True)
    with RLSession.start(config) as session:
        session.train(3, show=False)
        report = session.check_mismatch(session.generate())
        assert (report.max_abs_diff, report.exact) == (0.0, True), report


@pytest.mark.slow
def test_in_bfloat16_both_sides_agree_and_the_sync_tells_what_rounding_takes(alone: None) -> None:
    with RLSession.start(with_settings(model__dtype="bfloat16")) as session:
        assert session.sync().merge_error is None  # nothing was added yet
        session.train(10, show=False)
        errors = [row["train/merge_error"] for row in session.history]
        assert all(0 < error < 2 for error in errors)
        assert errors[-1] < errors[0]
        synced = session.sync(verify=True)
        assert f"rounding takes {synced.merge_error:.0%} of the adapters' size" in str(synced)
        assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
def test_two_trainers_train_the_adapters_of_one(alone: None, tmp_path: Path) -> None:
    with RLSession.start(CONFIG) as session:
        expected = learned(session, 3)
    with RLSession.start(with_settings(training__num_trainers=2)) as session:
        rows = learned(session, 3)
        for row, other in zip(rows, expected, strict=True):
            for name, value in other.items():
                assert row[name] == pytest.approx(value, rel=1e-3, abs=5e-5), name
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"
        path = session.save(tmp_path / "saved")
        after = session.evaluate().mean_reward
        exported = session.export_hf(tmp_path / "adapter", adapter=True)
        assert (exported / "adapter_model.safetensors").is_file()
    with RLSession.load(path, num_trainers=1) as session:
        assert session.evaluate().mean_reward == pytest.approx(after, abs=0.01)


@pytest.mark.slow
def test_a_critic_with_adapters_learns(alone: None) -> None:
    config = with_settings(training__advantage_estimator="ppo")
    config = config.replace("training.critic.learning_rate", 1e-3)
    with RLSession.start(config) as session:
        rows = learned(session, 8)
        assert rows[-1]["train/value_loss"] < rows[0]["train/value_loss"]
        assert session.check_mismatch(session.generate()).verdict == "pass"
