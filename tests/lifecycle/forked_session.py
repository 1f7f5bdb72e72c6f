"""A script that forks while its session runs, and that loses the session's variable.

    python -m tests.lifecycle.forked_session

It prints what came of that, as JSON, and ends without closing the session.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from kit import RLSession, SessionConfig
from kit.errors import KitError

PATIENCE = 300.0
"""Far more than a child needs; one that hangs does so for ever."""
VERBS = ("generate", "step", "train", "evaluate", "snapshot", "save", "close")


def in_child(work: Callable[[], object]) -> Any:
    """Fork, and let the child do something and exit; its exit code, or what it is stuck in."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "it hung"


def said(call: Callable[[], object]) -> str:
    try:
        return f"it returned {call()!r}"
    except KitError as error:
        return str(error)


def refusals(session: RLSession, path: str) -> Callable[[], None]:
    """What a child is told that calls the session's verbs, written into a file."""

    def work() -> None:
        told = {verb: said(getattr(session, verb)) for verb in VERBS}
        told |= {"start": said(RLSession.start), "attach": said(RLSession.attach)}
        told |= {"current": said(RLSession.current)}
        with session:  # as where the fork was made inside of a `with`
            pass
        with open(path, "w", encoding="utf-8") as file:
            json.dump(told, file)

    return work


def fail() -> None:
    raise RuntimeError("the child's own mistake")


def length(text: str) -> int:
    return len(text)


def main(folder: str) -> None:
    config = SessionConfig.preset("tiny").replace("logging.use_tensorboard", True)
    config = config.replace("logging.dir", folder)
    session = RLSession.start(config)
    found: dict[str, Any] = {"exit": in_child(lambda: None), "failure": in_child(fail)}
    told = os.path.join(folder, "told.json")
    found["verbs"] = in_child(refusals(session, told))
    with open(told, encoding="utf-8") as file:
        found["told"] = json.load(file)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(2) as pool:
        found["pool"] = pool.map(length, ["a", "bc", "def"])
    stack = session.debug.stack.cluster.stack
    mine = next(one for one in RLSession.sessions() if one.id == stack)
    found["driver"] = mine.driver == os.getpid()
    found["step"] = session.step().step
    parts, name = session.debug, session.config.name
    found["stack"] = [str(parts.stack.cluster.directory), parts.stack.cluster.entry.head]
    sleeper = fork.Process(target=time.sleep, args=(PATIENCE,), daemon=True)
    sleeper.start()  # it holds what it inherited while the session ends
    del session
    gc.collect()
    again, attached = RLSession.current(), RLSession.attach(name)
    found["given back"] = again is attached and attached.debug is parts
    found["passed"] = said(lambda: RLSession.attach(reward=length))
    found["step after"] = attached.step().step
    found["sleeper"] = sleeper.pid
    del again, attached
    gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
