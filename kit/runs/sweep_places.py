"""Where the members of a sweep run: one session a GPU, or a share of the cores each."""

from __future__ import annotations

import ctypes
import os
import secrets
from dataclasses import dataclass, field

from kit.errors import RunError
from kit.runs.record import GROUP_VARIABLE, RUN_DIR_VARIABLE
from kit.stack.processes import CORES_VARIABLE, cores

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Place:
    """Room for one member at a time. Those that follow each other here share a warm stack."""

    words: str
    """`GPU 0`, or `2 cores`."""
    settings: dict[str, str]
    """What a member finds in its environment."""
    group: str = field(default_factory=lambda: secrets.token_hex(8))

    def environment(self) -> dict[str, str]:
        """The whole environment of a member."""
        inherited = {k: v for k, v in os.environ.items() if k != RUN_DIR_VARIABLE}
        return inherited | self.settings | {GROUP_VARIABLE: self.group}


def places(parallel: int | None = None) -> list[Place]:
    """As many places as members run at once.

    Args:
        parallel: how many; None takes one a GPU, or one for every two cores where there is none.

    Raises:
        RunError: there are not so many GPUs, or cores.
    """
    if parallel is not None and parallel < 1:
        raise RunError(f"--parallel is {parallel}.", fix="give a number of 1 or more.")
    cards = gpus()
    if cards:
        wanted = parallel or len(cards)
        if wanted > len(cards):
            raise RunError(
                f"--parallel is {wanted}, and there {_are(len(cards), 'GPU')}: a GPU has one "
                "session at a time.",
                fix=f"give {len(cards)} or less; `{VISIBLE}= kit sweep ...` runs on the CPU.",
            )
        return [Place(f"GPU {card}", {VISIBLE: card}) for card in cards[:wanted]]
    wanted = parallel or max(1, cores() // 2)
    if wanted > cores():
        raise RunError(
            f"--parallel is {wanted}, and there {_are(cores(), 'core')}: a session on the CPU "
            "keeps at least one busy.",
            fix=f"give {cores()} or less.",
        )
    share = cores() // wanted
    words = "1 core" if share == 1 else f"{share} cores"
    return [Place(words, {CORES_VARIABLE: str(share)}) for _ in range(wanted)]


def gpus() -> list[str]:
    """The GPUs that a session may take, as CUDA_VISIBLE_DEVICES names them; asks no library that
    takes seconds to load.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in ("", "-1")]
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    number = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return []
    return [str(card) for card in range(number.value)]


def _are(number: int, what: str) -> str:
    return f"is 1 {what}" if number == 1 else f"are {number} {what}s"
