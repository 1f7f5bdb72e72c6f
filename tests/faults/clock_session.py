"""A session whose clock is set forward and back, and whose process is then killed.

    CLOCK_AHEAD=FILE LD_PRELOAD=clock.so python -m tests.faults.clock_session NAME

It prints, as JSON, steps and evaluations with the clock as it is, and the same ones with the clock
set by hours between them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from kit import RLSession, SessionConfig
from tests.faults.interrupts import digests
from tests.steps import responses_and_metrics

HOURS = 3600
FORWARD, BACK = 5 * HOURS, -10 * HOURS


def set_clock(seconds: int) -> None:
    """Set the clock of this process and of all that it has started."""
    Path(os.environ["CLOCK_AHEAD"]).write_text(str(seconds))


def two_steps(session: RLSession, first: int, second: int) -> list[Any]:
    """Steps and evaluations, the clock set before each step; what came of them."""
    found: list[Any] = []
    for seconds in (first, second):
        set_clock(seconds)
        found.append(responses_and_metrics([session.step()]))
        found.append(session.evaluate().mean_reward)
    return [*found, digests(session)]


def main(name: str) -> None:
    set_clock(0)
    session = RLSession.start(SessionConfig.preset("tiny").replace("name", name))
    session.snapshot("before")
    usual = two_steps(session, 0, 0)
    session.restore("before")
    begin = time.time()
    set_clock(FORWARD)
    jumped = time.time() - begin
    set_ = two_steps(session, FORWARD, BACK)
    ages = [one.age for one in RLSession.sessions() if one.name == name]
    found = {"usual": usual, "set": set_, "jumped": jumped, "ages": ages}
    print(json.dumps(found, default=str), flush=True)
    set_clock(FORWARD)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
