"""Drivers and cards, as they could be and as they are here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kit.config import SessionConfig
from kit.doctor import Finding, device, files
from kit.utils.hardware import Card, Driver, GpuProcess
from tests.small_models import hollow

GIB = 1 << 30
H100 = Card("NVIDIA H100 80GB HBM3", 80 * GIB, capability=(9, 0), bus="0000:1E:00.0", free=79 * GIB)


def look(found: Driver, wanted: str = "auto", size: int | None = 1_500_000_000) -> list[Finding]:
    return list(device.findings(found, wanted, "Qwen/Qwen3-0.6B", size))


def test_a_machine_without_a_driver_is_a_problem_for_a_large_model_only() -> None:
    nothing = Driver("the driver's library libcuda.so.1 is not here")
    (large,) = look(nothing)
    assert large.level == "problem"
    assert "hours a step" in large.found
    assert look(nothing, size=4_000_000)[0].level == "ok"
    assert look(nothing, wanted="cpu")[0].level == "note"
    assert look(nothing, wanted="cuda", size=4_000_000)[0].level == "problem"
    assert device.would_take("auto", nothing) == "cpu"


def test_a_card_on_the_bus_without_a_driver_says_that_the_driver_is_missing() -> None:
    (found,) = look(Driver("the driver's library libcuda.so.1 is not here", installed=1))
    assert "1 NVIDIA card sits on this machine's bus" in found.fix
    assert "--gpus all" in found.fix


def test_a_driver_whose_cards_do_not_answer_is_not_taken_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (found,) = look(Driver("the driver shows no card to this process", (13, 0), installed=1))
    assert "CUDA_VISIBLE_DEVICES is '7': unset it" in found.fix
    assert "restart the machine" in found.fix


def test_a_driver_too_old_for_torch_is_a_problem_and_a_slightly_older_one_a_note() -> None:
    needs = device.torch_cuda()
    assert needs is not None
    levels = {
        version: look(Driver("", version, (H100,), "570.86"))[1].level
        for version in [(needs[0] - 1, 8), needs, (needs[0], needs[1] + 1)]
    }
    assert list(levels.values()) == ["problem", "ok", "ok"]
    assert device.driver_finding(Driver("", (12, 4), (H100,)), (12, 8)).level == "note"
    old = look(Driver("", (needs[0] - 1, 8), (H100,), "570.86"))[1]
    assert f"CUDA {needs[0]}.{needs[1]}" in old.found
    assert "570.86" in old.found


def test_a_card_says_who_else_holds_its_memory() -> None:
    others = (
        GpuProcess(4711, "python3.11", 9 * GIB),
        GpuProcess(12, "not visible from here", None),
    )
    busy = replace(H100, free=70 * GIB, processes=others)
    _, _, first, second = look(Driver("", (99, 0), (busy, H100)))
    assert first.level == "note"
    assert "process 4711 (python3.11, 9.0 GiB), process 12 (not visible from here)" in first.found
    assert "CUDA_VISIBLE_DEVICES" in first.fix
    assert second.level == "ok"
    assert "leaves it alone" in second.found


def test_a_card_without_bfloat16_is_a_problem() -> None:
    card = Card("Tesla T4", 15 * GIB, capability=(7, 5), free=15 * GIB)
    assert look(Driver("", (99, 0), (card,)))[2].level == "problem"


def test_what_a_session_would_hold_is_compared_with_what_is_free() -> None:
    config = SessionConfig.preset("tiny")
    source = files.source(config.model)
    assert source is not None
    assert device.memory(config, source, H100).level == "ok"
    full = replace(H100, free=GIB // 2)
    found = device.memory(config, source, full)
    assert found.level == "problem"
    assert "memory.device_gib: 0.5" in found.fix
    small = replace(H100, name="small", total=GIB, free=GIB)
    assert device.memory(config, source, small).level == "problem"


def test_the_memory_that_adapters_need_is_compared_not_that_of_all_weights(tmp_path: Path) -> None:
    model = hollow(tmp_path / "model", 1024, 3072, 28, 16)
    whole = SessionConfig(model={"name": str(model)})
    adapters = whole.replace("model.lora", {"r": 16})
    source = files.source(whole.model)
    assert source is not None
    small = replace(H100, total=11 * GIB, free=11 * GIB)
    levels = [device.memory(config, source, small).level for config in (whole, adapters)]
    assert levels == ["problem", "ok"]
    found, _ = files.adapters(adapters.model, source)
    assert "10,092,544 parameters in 196 layers, 121.1 MB with their optimizer" in found.found


def test_the_driver_of_this_machine_answers_or_says_why_not() -> None:
    found = Driver.inspect()
    assert bool(found.cards) != bool(found.trouble)
    for card in found.cards:
        assert card.name
        assert 0 < (card.free or card.total) <= card.total
