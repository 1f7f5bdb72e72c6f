"""The section `engine` reaches SGLang whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kit.config import EngineConfig
from kit.engine.server_args import HANDLED_ELSEWHERE, EngineSettings, server_arguments


class Watched:
    """A section that notes which of its settings are read."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self.read = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._config, name)


def settings(config: Any, device: str = "cpu") -> EngineSettings:
    return EngineSettings(config, "model", device, "float32", 512, 64, seed=0)


def test_every_engine_setting_reaches_sglang_or_is_known_to_be_used_elsewhere() -> None:
    read = set()
    for device in ("cpu", "cuda"):
        watched = Watched(EngineConfig(tensor_parallel=2, data_parallel=2))
        server_arguments(settings(watched, device))
        read |= watched.read
    assert read | set(HANDLED_ELSEWHERE) == set(EngineConfig.model_fields)
    assert not read & set(HANDLED_ELSEWHERE)


def test_further_arguments_of_sglang_have_the_last_word() -> None:
    config = EngineConfig(extra={"attention_backend": "flashinfer", "watchdog_timeout": 9})
    arguments = server_arguments(settings(config, "cuda"))
    assert (arguments["attention_backend"], arguments["watchdog_timeout"]) == ("flashinfer", 9)


@pytest.mark.parametrize(
    ("change", "fixed"),
    [
        ({"weight_noise": 0.1}, False),
        ({"call_timeout": 5.0}, False),
        ({"attention_backend": "flashinfer"}, True),
        ({"extra": {"watchdog_timeout": 9}}, True),
    ],
)
def test_only_what_sglang_was_started_with_needs_another_engine(
    change: dict[str, Any], fixed: bool
) -> None:
    one = settings(EngineConfig())
    assert (one.identity != settings(EngineConfig(**change)).identity) is fixed
    assert one.identity == replace(one, seed=1).identity
