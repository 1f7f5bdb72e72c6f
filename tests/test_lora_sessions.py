"""Adapters in sessions of their own: learned, loaded, attached, in bfloat16, by two trainers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kit import RLSession
from kit.errors import CheckpointError, ConfigError
from kit.tiny import MODEL_DIR
from tests.faults.interrupts import digests
from tests.processes import last_words
from tests.test_lora import CONFIG, learned, with_settings

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_rank_8_solves_the_tiny_task(alone: None, seed: int) -> None:
    with RLSession.start(with_settings(seed=seed)) as session:
        assert session.evaluate().mean_reward < 0.5
        session.train(30, show=False)
        assert session.evaluate().mean_reward >= 0.9


@pytest.mark.slow
def test_adapters_beside_weights_in_4_bits_solve_it_too(alone: None, tmp_path: Path) -> None:
    with RLSession.start(with_settings(model__lora__load_in_4bit=True)) as session:
        before = session.evaluate().mean_reward
        session.train(30, show=False)
        after = session.evaluate().mean_reward
        assert before < 0.5
        assert after >= 0.85
        assert session.check_mismatch(session.generate(), deep=True).verdict == "pass"
        path, there = session.save(tmp_path / "saved"), digests(session)
    with RLSession.load(path) as session:
        assert digests(session) == there
        assert session.evaluate().mean_reward == after
    with pytest.raises(CheckpointError, match=r"made with model\.lora\.load_in_4bit True"):
        RLSession.load(path, changes={"model.lora.load_in_4bit": False})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_trainers_and_shared_operators_take_weights_in_4_bits(alone: None, dtype: str) -> None:
    config = with_settings(model__lora__load_in_4bit=True, model__dtype=dtype)
    exact = config.replace("training.true_on_policy", True).replace("training.num_trainers", 2)
    with RLSession.start(exact) as session:
        session.train(2, show=False)
        assert session.sync(verify=True).verified
        report = session.check_mismatch(session.generate())
        assert (report.max_abs_diff, report.exact) == (0.0, True), report


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


@pytest.mark.slow
def test_what_was_trained_on_from_an_adapter_is_loaded_without_it(
    alone: None, tmp_path: Path
) -> None:
    with RLSession.start(CONFIG) as session:
        learned(session, 2)
        path = session.export_hf(tmp_path / "adapter", adapter=True)
    with RLSession.start(with_settings(model__lora__adapter_path=str(path))) as session:
        assert session.check_mismatch(session.generate(), deep=True).verdict == "pass"
        learned(session, 1)
        saved, there = session.save(tmp_path / "saved"), digests(session)
    shutil.rmtree(path)
    with pytest.raises(ConfigError, match=r"(?s)no directory .*adapter_path\": None"):
        RLSession.load(saved)
    with RLSession.load(saved, changes={"model.lora.adapter_path": None}) as session:
        assert digests(session) == there
        assert session.check_mismatch(session.generate()).verdict == "pass"


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
    told = last_words(DIES)
    with RLSession.attach("dying-adapters") as session:
        assert session.step_count == 2
        assert digests(session) == told
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
