"""`kit doctor`: everything that can be wrong before a session starts, explained.

    kit doctor                       the tiny model
    kit doctor qwen3-0.6b            a preset
    kit doctor config.yaml           settings of your own

    from kit.doctor import diagnose
    diagnose("qwen3-0.6b")           the same in a notebook; `session.doctor()` for a session's own

It looks and tells. Nothing is started, downloaded, changed or ended, and no network is needed.

    kit doctor --stop tiny           end a session, by its name or id
    kit doctor --stop leftovers      remove what killed sessions have left

    machine.py    Python and packages, memory, /dev/shm, disks
    device.py     the driver and its cards, and which device a session would take
    files.py      the model's weights and the prompts
    stacks.py     other stacks of the kit on this machine, what dead ones left, and their end
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from kit.config import TINY, SessionConfig
from kit.doctor import device, files, machine, stacks
from kit.reports.diagnostics import Diagnosis, Finding, Level
from kit.utils.hardware import Driver

__all__ = ["Diagnosis", "Finding", "Level", "diagnose"]


def diagnose(config: SessionConfig | str | Path = TINY) -> Diagnosis:
    """Look at everything that a session with these settings needs here. Takes a few seconds.

    Args:
        config: as for `RLSession.start`: a preset's name, the path of a YAML file, or settings.

    Raises:
        ConfigError: there is no such preset, or the settings themselves are wrong.
    """
    begin = time.perf_counter()
    settings = SessionConfig.of(config)
    findings = tuple(_look(settings))
    seconds = time.perf_counter() - begin
    return Diagnosis(settings.name, settings.model.name, findings, seconds)


def _look(config: SessionConfig) -> Iterator[Finding]:
    yield machine.python()
    yield machine.packages(adapters=config.model.lora is not None)
    driver = Driver.inspect()
    size = files.expected_bytes(config.model)
    yield from device.findings(driver, config.device, config.model.name, size)
    takes = device.would_take(config.device, driver)
    yield from files.model(config)
    yield from files.data(config)
    alive = stacks.living()
    running = any(stack.client == os.getpid() for stack in alive)
    source = files.source(config.model)
    if takes == "cuda" and source is not None and not running:  # else it holds its memory now
        yield device.memory(config, source, driver.cards[0])
    if source is not None:
        yield from files.family(config, source, takes)
    if config.quantization and source is not None:
        yield files.quantization(config, source, takes)
    if config.engine.speculative and source is not None:
        yield files.draft(config, source)
    adapters = None
    if config.model.lora and source is not None:
        found, adapters = files.adapters(config.model, source)
        yield found
    yield from machine.room(takes, size, adapters, adapts=config.model.lora is not None)
    yield from stacks.findings(alive, stacks.others(driver.cards))
