"""What to change where a plan does not fit. Each way out is tried before it is offered."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from kit.config import SessionConfig
from kit.memory.card import GIB


class DoesNotFitError(Exception):
    """A plan cannot be made; becomes a ConfigError once the ways out are known.

    Args:
        what: what does not fit, with numbers.
        why: what takes the room.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what)
        self.what, self.why = what, why


Fit = Callable[[SessionConfig, int, int], object]
"""(settings, tokens of a response, bytes that may be taken) -> a plan; raises DoesNotFitError."""


def ways_out(fit: Fit, config: SessionConfig, response: int, limit: int, total: int) -> str:
    """The settings of which each alone makes it fit; else of all of them together.

    Args:
        fit: makes a plan, or raises DoesNotFitError.
        config: the settings that do not fit.
        response: tokens of the longest response.
        limit: bytes that the session may take.
        total: bytes of the device.
    """

    def fits(changed: SessionConfig, response: int, limit: int = limit) -> bool:
        try:
            fit(changed, response, limit)
        except DoesNotFitError:
            return False
        return True

    loosened = list(_loosened(config))
    found = [words for words, changed in loosened if fits(changed, response)]
    if tokens := _most(lambda length: fits(config, length), response):
        found.append(f"set rollout.max_response_len: {tokens}")
    cache = config.engine.max_total_tokens or 0
    if tokens := _most(
        lambda n: fits(_with(config, "engine.max_total_tokens", n), response), cache
    ):
        found.append(f"set engine.max_total_tokens: {tokens}")
    sizes = range(-(-limit // GIB), total // GIB + 1)
    place = bisect_left(sizes, True, key=lambda size: fits(config, response, size * GIB))
    if config.memory.device_gib and place < len(sizes):
        found.append(f"set memory.device_gib: {sizes[place]}")
    if not found and (together := _together(fits, config, response)):
        found.append(together)
    return ", or ".join([*found, "take a smaller model (model.name) or a larger device"]) + "."


def _together(fits: Callable[[SessionConfig, int], bool], config: SessionConfig, most: int) -> str:
    """All that can be loosened, and the longest response that fits then; empty where none does."""
    done = []
    while step := next(_loosened(config), None):
        done.append(step[0])
        config = step[1]
    tokens = _most(lambda length: fits(config, length), most + 1)
    if tokens and tokens < most:
        done.append(f"set rollout.max_response_len: {tokens}")
    return ", and ".join(done) if tokens else ""


def _loosened(config: SessionConfig) -> Iterator[tuple[str, SessionConfig]]:
    """Settings that ask for memory, one by one, and the configuration without each."""
    training = config.training
    if config.memory.sleep == "never":
        yield "set memory.sleep: auto", _with(config, "memory.sleep", "auto")
    if training.max_tokens_per_gpu is not None:
        yield (
            "leave training.max_tokens_per_gpu open",
            _with(config, "training.max_tokens_per_gpu", None),
        )
    if config.model.gradient_checkpointing not in (None, True):
        yield (
            "set model.gradient_checkpointing: true",
            _with(config, "model.gradient_checkpointing", True),
        )
    if training.optimizer_cpu_offload is False:
        yield (
            "set training.optimizer_cpu_offload: true",
            _with(config, "training.optimizer_cpu_offload", True),
        )
    for name in ("kl_loss_coef", "kl_coef"):
        if getattr(training, name):
            key = f"training.{name}"
            yield f"set {key}: 0 (no reference model)", _with(config, key, 0.0)


def _with(config: SessionConfig, key: str, value: Any) -> SessionConfig:
    """A changed copy that is not validated: it only serves to be planned for."""
    section, name = key.split(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _most(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, in round steps of 64; 0 where none does."""
    most = bisect_left(range(1, below), True, key=lambda n: not fits(n))
    return most // 64 * 64 or most
