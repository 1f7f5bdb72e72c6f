"""Findings on the device that a session would take."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kit.config import SessionConfig
from kit.doctor.machine import program
from kit.errors import ConfigError, ModelError
from kit.memory.plan import plan_for
from kit.memory.sizes import DEFAULT_RESPONSE_LENGTH
from kit.models.source import ModelSource
from kit.reports.diagnostics import Finding
from kit.utils.formatting import count, in_gib
from kit.utils.hardware import GIB, Card, Driver

NEEDS_CAPABILITY = (8, 0)
"""The oldest cards that compute in bfloat16."""
SMALL_MODEL = 256 << 20
"""Bytes of weights. What is larger learns on a CPU too, but in hours a step."""
OTHERS_MAY_HOLD = 1 << 30
"""Bytes of a card that nobody misses: a desktop takes as much."""


def would_take(wanted: str, driver: Driver) -> str:
    """Device that a session with this `device` would use: `cpu` or `cuda`."""
    return "cpu" if wanted == "cpu" or not driver.cards else "cuda"


def findings(driver: Driver, wanted: str, model: str, size: int | None) -> Iterator[Finding]:
    """The device that a session would take, then the driver and each card.

    Args:
        driver: what `Driver.inspect` returned.
        wanted: the setting `device`.
        model: its name, for messages.
        size: bytes of its weights; None where nothing tells.
    """
    if would_take(wanted, driver) == "cpu":
        yield _on_the_cpu(driver, wanted, model, size)
        return
    yield Finding("device", "ok", f"the GPU: {driver.cards[0].name}")
    yield driver_finding(driver, torch_cuda())
    for index, card in enumerate(driver.cards):
        yield _card(index, card, several=len(driver.cards) > 1)


def memory(config: SessionConfig, model: ModelSource, card: Card) -> Finding:
    """Compare the session's planned device memory with what is free."""
    name = "card's memory"
    try:
        default = min(DEFAULT_RESPONSE_LENGTH, model.context_length // 2)
        response = config.rollout.max_response_len or default
        plan = plan_for(config, model, "cuda", response, card)
    except (ConfigError, ModelError) as error:
        return Finding.of_error(name, error)
    peak = max(phase.total for phase in plan.phases)
    found = f"the session would hold up to {in_gib(peak)} of {in_gib(card.total)}"
    if card.free is None or peak <= card.free:
        return Finding(name, "ok", found)
    room = math.floor(10 * card.free / GIB) / 10
    return Finding(
        name,
        "problem",
        f"{found}, and {in_gib(card.free)} are free.",
        f"End what holds the rest, or let the session take less: set memory.device_gib: {room}.",
    )


def torch_cuda() -> tuple[int, int] | None:
    """CUDA version that the installed torch is built for, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def _on_the_cpu(driver: Driver, wanted: str, model: str, size: int | None) -> Finding:
    small = size is not None and size <= SMALL_MODEL
    if wanted == "cpu":
        slow = "" if small else f" {model} is large for it: expect hours a step."
        return Finding("device", "ok" if small else "note", f"the CPU, as device: cpu asks.{slow}")
    why = f"No GPU can be used: {driver.trouble}."
    if small and wanted == "auto":
        return Finding("device", "ok", f"the CPU, which is enough for {model}. {why}")
    if wanted == "cuda":
        why += " The settings ask for one (device: cuda)."
    else:
        why += f" On the CPU, which is left, a model as large as {model} needs hours a step."
    tiny = " Without a GPU, take the tiny model: the same notebooks run on it."
    commands = (*_LOOK, f"{program('kit')} doctor tiny")
    return Finding("device", "problem", why, _mend(driver) + tiny, commands)


_LOOK = ("nvidia-smi",)


def _mend(driver: Driver) -> str:
    if driver.cuda:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        set_to = f" CUDA_VISIBLE_DEVICES is {hidden!r}: unset it." if hidden is not None else ""
        return (
            "The driver's library is here, but no card answers it. After an update of the driver, "
            "restart the machine; in a container, start it anew, so that its libraries are those "
            f"of the host; and see whether nvidia-smi lists the card.{set_to}"
        )
    if driver.installed:
        return (
            f"{count(driver.installed, 'NVIDIA card')} sits on this machine's bus, so the driver "
            "is what is missing. In a container, start it with all GPUs (docker run --gpus all); "
            "otherwise install the driver, and see whether nvidia-smi lists the card."
        )
    return (
        "Go to a machine with an NVIDIA GPU. If this is one, start the container with its GPUs "
        "(docker run --gpus all), and see whether nvidia-smi lists them."
    )


def driver_finding(driver: Driver, needs: tuple[int, int] | None) -> Finding:
    """Whether the driver is new enough for the CUDA version that torch needs."""
    has = driver.cuda or (0, 0)
    number = f" {driver.version}" if driver.version else ""
    found = f"NVIDIA driver{number}, for CUDA up to {_dotted(has)}"
    if needs is None:
        return Finding("driver", "ok", f"{found}.")
    found += f"; the installed torch is made for CUDA {_dotted(needs)}"
    if has[0] < needs[0]:
        return Finding(
            "driver",
            "problem",
            f"{found}, which this driver is too old for.",
            f"Install a driver that runs CUDA {_dotted(needs)} (in a container: on its host). "
            "nvidia-smi shows both numbers in its first line.",
            _LOOK,
        )
    if has < needs:
        return Finding(
            "driver",
            "note",
            f"{found}. That runs, but kernels that are compiled on the spot may not.",
            "If a start fails with `PTX` in its message, install a newer driver.",
        )
    return Finding("driver", "ok", f"{found}.")


def _card(index: int, card: Card, several: bool) -> Finding:
    name = f"card {index}"
    free = "unknown" if card.free is None else in_gib(card.free)
    found = (
        f"{card.name}, compute capability {_dotted(card.capability)}, "
        f"{in_gib(card.total)}, {free} of it free."
    )
    if index:  # engine and trainer share the first card
        return Finding(name, "ok", f"{found} A session leaves it alone: it takes card 0.")
    if card.capability < NEEDS_CAPABILITY:
        return Finding(
            name,
            "problem",
            f"{found} It cannot compute in bfloat16.",
            f"Take a card of compute capability {_dotted(NEEDS_CAPABILITY)} or more (Ampere or "
            "later)" + (", by CUDA_VISIBLE_DEVICES." if several else "."),
        )
    if card.free is None or card.total - card.free <= OTHERS_MAY_HOLD:
        return Finding(name, "ok", found)
    held = f"{found} {in_gib(card.total - card.free)} of it are taken: {_holders(card)}."
    other = "take another card with CUDA_VISIBLE_DEVICES, or " if several else ""
    fix = f"If memory gets short, {other}end what is not needed there."
    return Finding(name, "note", held, fix)


def _holders(card: Card) -> str:
    if not card.processes:
        return "the driver does not say by whom"
    return "by " + ", ".join(
        f"process {process.pid} ({process.name}"
        + (f", {in_gib(process.memory)})" if process.memory else ")")
        for process in card.processes
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
