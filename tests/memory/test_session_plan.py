"""The plan of a session that runs, and of one that nobody has started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import kit
from kit import RLSession, SessionConfig
from kit.errors import ConfigError, ModelError, SessionError
from kit.tiny import MODEL_DIR


def test_a_card_that_is_not_here_can_be_planned_for() -> None:
    plan = kit.memory_plan("tiny", device_gib=24)
    assert plan.card.is_gpu
    assert plan.card.name == "a card of 24 GiB"
    assert plan.limit == 24 * 2**30
    assert plan.rollout_tokens == 128 * 512


def test_without_a_card_it_is_the_memory_of_this_machine() -> None:
    plan = kit.memory_plan(SessionConfig(device="cpu"))
    assert not plan.card.is_gpu
    assert not plan.compile


def test_dtype_and_response_length_are_the_session_s_own(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    long = json.dumps({**config, "max_position_embeddings": 4096})
    (folder / "config.json").write_text(long)
    settings = {"name": str(folder)}
    data = {"source": "tiny:addition"}
    half, whole = (
        kit.memory_plan(SessionConfig(model={**settings, "dtype": dtype}, data=data), device_gib=24)
        for dtype in ("auto", "float32")
    )
    assert whole.phase("generate").of("engine") > half.phase("generate").of("engine")
    longer = SessionConfig(model=settings, data=data, rollout={"max_response_len": 2048})
    assert kit.memory_plan(longer, device_gib=24).sample_tokens == 512 + 2048


def test_a_model_that_is_not_here_is_the_usual_error() -> None:
    with pytest.raises(ModelError, match="/no/such/model"):
        kit.memory_plan(SessionConfig(model={"name": "/no/such/model"}), device_gib=24)


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_a_card_without_memory_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="device_gib"):
        kit.memory_plan("tiny", device_gib=size)


def test_a_session_that_does_not_run_has_no_plan() -> None:
    with pytest.raises(SessionError, match=r"RLSession\.start"):
        RLSession("tiny").memory_plan()


def test_a_running_session_shows_the_plan_that_it_was_started_with(session: RLSession) -> None:
    plan = session.memory_plan()
    if not plan.card.is_gpu:
        assert "nothing sleeps" in str(plan)
        assert plan.phases == kit.memory_plan(session.config).phases
