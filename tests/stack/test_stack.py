"""How many engines there are, and who gets what."""

import os

import pytest

from kit.cluster.placement import SMALL_MODEL, default_replicas
from kit.stack.engines import shares


@pytest.mark.parametrize(
    ("device", "size", "cores", "replicas"),
    [
        ("cpu", SMALL_MODEL, 2, 2),
        ("cpu", SMALL_MODEL, 64, 2),
        ("cpu", SMALL_MODEL, 1, 1),
        ("cpu", SMALL_MODEL + 1, 64, 1),
        ("cuda", 1, 64, 1),
    ],
)
def test_a_small_model_on_a_cpu_gets_two_engines(
    monkeypatch: pytest.MonkeyPatch, device: str, size: int, cores: int, replicas: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_replicas(device, size) == replicas


@pytest.mark.parametrize(
    ("count", "replicas", "sizes"),
    [(5, 2, [2, 3]), (1, 2, [1]), (0, 2, []), (6, 3, [2, 2, 2]), (2, 1, [2])],
)
def test_prompts_are_shared_out_in_order_and_no_engine_is_asked_for_nothing(
    count: int, replicas: int, sizes: list[int]
) -> None:
    parts = shares(count, replicas)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
