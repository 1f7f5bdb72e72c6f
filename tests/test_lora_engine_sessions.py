"""Adapters of the engine's own in sessions of their own: other layers, dtypes, numbers, models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.tiny import MOE_DIR
from tests.test_lora_engine import greedy, with_settings


@pytest.mark.slow
def test_it_writes_what_an_engine_with_merged_weights_writes(alone: None) -> None:
    written = []
    for way in ("merged", "adapter"):
        with RLSession.start(with_settings(engine__lora=way, name=way)) as session:
            session.train(2, show=False)
            written.append([sample.tokens for sample in session.generate()])
    same = sum(one == other for one, other in zip(*written, strict=True))
    assert same >= 0.9 * len(written[0])  # sums in another order may turn a draw over


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"model__lora__target_modules": ["v_proj", "up_proj"], "model__lora__use_rslora": True},
        {"model__lora__target_modules": ["layers.1.self_attn.o_proj", "down_proj"]},
        {"model__dtype": "bfloat16"},
        {"training__num_trainers": 2},
        {"engine__replicas": 2},
        {"model__name": str(MOE_DIR), "model__lora__target_modules": ["q_proj", "o_proj"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_other_layers_forms_and_numbers_of_processes_agree_too(
    alone: None, settings: dict[str, Any]
) -> None:
    with RLSession.start(with_settings(**settings, name="others")) as session:
        session.train(2, show=False)
        report = session.check_mismatch(session.generate())
        assert report.verdict == "pass", report
        assert session.sync(verify=True).verified


@pytest.mark.slow
def test_a_checkpoint_brings_the_adapter_into_another_engine(alone: None, tmp_path: Path) -> None:
    with RLSession.start(with_settings(name="left")) as session:
        session.train(2, show=False)
        expected = greedy(session)
        path = session.save(tmp_path / "saved")
    with RLSession.load(path) as session:
        assert greedy(session) == expected
        assert session.check_mismatch(session.generate()).verdict == "pass"
