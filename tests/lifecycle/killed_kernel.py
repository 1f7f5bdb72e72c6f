"""A notebook's kernel that is killed at a chosen moment.

    python -m tests.lifecycle.killed_kernel MOMENT [NAME]

It starts a session, or attaches to the one of this name, and trains until that moment, at which it
kills itself as `kill -9` does: without a word to anybody. At the moment `never` it trains a step
and prints what the session is then, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import ray

from kit import RLSession, SessionConfig
from kit.lifecycle import step
from kit.samples import Sample
from kit.stack import engines
from tests.cases import some
from tests.processes import SCHEDULER, kill, of_engine

SEED = 5
KEPT = "after the first step"
"""The snapshot that the first kernel takes, before it dies."""


def die(*_: Any, **__: Any) -> Any:
    """As a kernel dies for which memory ran out."""
    os.kill(os.getpid(), signal.SIGKILL)


def reward(sample: Sample) -> float:
    """Exact match, and death where it is due."""
    if moment == "score" and armed:
        die()
    return float(sample.response == sample.label)


def arm(session: RLSession) -> None:
    """From now on it dies at its moment."""
    global armed
    armed = True
    stack = session.debug.stack
    if moment == "update":
        update = stack.update

        def dying_update(*arguments: Any) -> Any:
            threading.Timer(0.02, die).start()
            return update(*arguments)

        stack.update = dying_update  # type: ignore[method-assign]
    if moment == "sync":
        step.finish = die
    if moment == "by hand":
        step.record = die
    if moment == "generate":
        threading.Timer(0.05, die).start()
    if moment == "engine":  # both of them, a whole engine and a scheduler
        doomed = [of_engine(session, 0), of_engine(session, 1, SCHEDULER)]
        session.debug.stack.watch.close()
        for process in doomed:
            kill(process)
        die()
    if moment == "restart":  # of two dead engines, when the first actor is made and not started
        for index in range(2):
            kill(of_engine(session, index))
        make = engines.make_engine

        def dying_make(*arguments: Any) -> Any:
            engine = make(*arguments)
            ray.get(engine.is_ready.remote())
            die()

        engines.make_engine = dying_make


def configuration() -> SessionConfig:
    """Few samples, a moving reference: more of the state than weights and optimizer has to stay."""
    config = SessionConfig.preset("tiny").replace("seed", SEED).replace("name", "dying")
    config = config.replace("training.rollout_batch_size", 8)
    config = config.replace("training.kl_loss_coef", 0.01)
    config = config.replace("mismatch.on_start", "skip")
    config = config.replace("engine.replicas", some(1, 2))
    return config.replace("training.ref_update_interval", 2)


def told(session: RLSession) -> dict[str, Any]:
    """All that must be as if nobody had died, save for times."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in session.history
    ]
    last = session.last_rollout
    return {
        "step": session.step_count,
        "synced": session.engine_version == session.weight_version,
        "history": rows,
        "weights": session.debug.stack.probe("checksums"),
        "data": session.debug.state.stream.state(),
        "last": [sample.response for sample in last or ()],
    }


def undone(session: RLSession) -> dict[str, Any]:
    """The same after going back to the first kernel's snapshot."""
    session.restore(KEPT)
    return told(session)


if __name__ == "__main__":
    moment, armed = sys.argv[1], False
    if len(sys.argv) > 2:
        session = RLSession.attach(sys.argv[2], reward=reward)
    else:
        session = RLSession.start(configuration(), reward=reward)
    if moment != "never":
        session.step()
        if moment == "score":
            session.snapshot(KEPT)
        if moment == "sync":  # the numbers of weights are no count of updates after this
            session.snapshot("before")
            session.step()
            session.restore("before")
        arm(session)
        while moment == "by hand":
            session.update(session.advantages(session.score(session.generate())))
        session.train(show=False)
    session.step()
    print(json.dumps([told(session), undone(session)]))
    session.close()
