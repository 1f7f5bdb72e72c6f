"""A start that is interrupted at one moment after another, and then one that is not.

`python -m tests.faults.interrupted_starts` prints what was left after each, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable

from kit import RLSession
from kit.cluster import progress, registry
from kit.cluster.registry import Entry
from tests.cases import some
from tests.processes import alive

OTHERS = {entry.stack for entry in registry.living()}
"""Stacks that are none of this process's."""


def _own() -> list[Entry]:
    return [entry for entry in registry.living() if entry.stack not in OTHERS]


def _has_begun(who: str) -> bool:
    return any(who in progress.read(entry.folder) for entry in _own())


MOMENTS: dict[str, Callable[[], bool]] = {
    "weights are loaded": lambda: _has_begun("trainer"),
    **some(
        {},
        {
            "the head is there": lambda: bool(_own()),
            "Ray can be joined": lambda: any((one.folder / "address").exists() for one in _own()),
            "SGLang is imported": lambda: _has_begun("engine"),
        },
    ),
}


def interrupted(come: Callable[[], bool]) -> list[str]:
    """Start a session, press Ctrl-C at this moment; what is left of it."""
    stacks: list[tuple[int, str]] = []

    def press() -> None:
        while not come():
            time.sleep(0.005)
        stacks.extend((entry.head, str(entry.folder)) for entry in _own())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        RLSession.start("tiny")
    except KeyboardInterrupt:
        left = [name for stack in stacks for name in alive(*stack)]
        return [*left, *(entry.name for entry in _own())]
    return ["it started"]


if __name__ == "__main__":
    left = {name: interrupted(come) for name, come in MOMENTS.items()}
    with RLSession.start("tiny") as session:
        session.step()
        print(json.dumps([left, session.step_count]))
