"""`Calls`: answers of actors, waited for with a look at whether the actors still live."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from kit.cluster.client import Cluster
from kit.cluster.processes import HEAD, TRAINER, Watch
from kit.config import SessionConfig
from kit.errors import KitError, StackError

SLICE = 1.0
"""Seconds of waiting between two looks at Ray's own processes, which fail no call as they die."""
LAST_BREATH = 5.0
"""Seconds for a process to be gone of which Ray says that it died."""


class LateError(StackError):
    """A call did not end within its time limit; it may still."""


class EngineDiedError(StackError):
    """A process of an engine is gone; the next call that needs the engine starts it again."""


class TrainerDiedError(StackError):
    """A trainer's process is gone, and with it the weights since the last checkpoint."""


class HeadDiedError(StackError):
    """A process of Ray is gone, and with it the whole stack."""


class Calls:
    """Waits for answers of actors, and raises their errors as if they had come up here."""

    def __init__(self, config: SessionConfig, cluster: Cluster, watch: Watch) -> None:
        self._config, self.cluster, self.watch = config, cluster, watch
        self._using = threading.RLock()
        """Held while a call into Ray waits, for a second at most."""

    def disconnect(self) -> None:
        """Disconnect from Ray, whose processes are gone: it would end this one a minute later."""
        with self._using:
            self.cluster.disconnect()

    def get(self, calls: Any, doing: str, timeout: float | None = None) -> Any:
        """Wait for the answers of calls that are `doing` something, as messages call it.

        Raises:
            KitError: what an actor raised.
            EngineDiedError, TrainerDiedError, HeadDiedError: one of them is gone.
            StackError: Ray has lost the answer.
            LateError: they were not there in time.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        limit = timeout or self._config.engine.call_timeout
        deadline = time.monotonic() + limit
        while True:
            self.refuse_without_head(doing)
            left = deadline - time.monotonic()
            try:
                with self._using:
                    return ray.get(calls, timeout=min(max(left, 0.0), SLICE))
            except RayTaskError as error:
                raise self._of_actor(error, doing) from error
            except GetTimeoutError:
                if left <= 0:
                    raise self.late(f"{doing} did not finish", limit, timeout) from None
            except RayError as error:  # an actor has died, or Ray itself, or what it kept is lost
                raise self._of_death(error, doing) from error

    def ask(self, actors: Sequence[Any], method: str, *arguments: Any, **named: Any) -> list[Any]:
        """Call a method of several actors; their answers, in order."""
        self.refuse_without_head(method)
        calls = [getattr(actor, method).remote(*arguments, **named) for actor in actors]
        answers: list[Any] = self.get(calls, method)
        return answers

    def wait(self, calls: list[Any], least: int, doing: str, seconds: float) -> list[Any]:
        """Wait until `least` calls are finished, or so many seconds; those that are."""
        import ray
        from ray.exceptions import RayError

        deadline = time.monotonic() + seconds
        while True:
            self.refuse_without_head(doing)
            left = max(deadline - time.monotonic(), 0.0)
            try:
                with self._using:
                    ready, _ = ray.wait(calls, num_returns=least, timeout=min(left, SLICE))
            except RayError as error:
                raise self._of_death(error, doing) from error
            if len(ready) >= least or not left:
                return list(ready)

    def is_ready(self, actor: Any) -> bool:
        """Whether an actor has been started: False where a kernel ended meanwhile, or it dies."""
        limit = self._config.engine.start_timeout
        try:
            return bool(self.get(actor.is_ready.remote(), "start", limit))
        except (HeadDiedError, LateError):
            raise
        except StackError:
            return False

    def refuse_without_head(self, doing: str) -> None:
        """Raise HeadDiedError if Ray is gone: to use it then ends this process."""
        self._dead(doing)

    def _dead(self, doing: str) -> set[str]:
        dead = self.watch.dead()
        if HEAD in dead:
            raise HeadDiedError(
                f"Ray's processes died before or during {doing}, and the stack with them.",
                why="Weights and optimizer since the last checkpoint are gone.",
                fix=f"continue from a checkpoint: {LOAD}.",
            )
        return dead

    def has_died(self, part: str, doing: str) -> bool:
        """Look now whether a part has died. Raises HeadDiedError if it died because Ray did."""
        return part in self._dead(doing)

    def late(self, what: str, limit: float, starting: object = None) -> LateError:
        """The error of a call that takes too long."""
        setting = "engine.start_timeout" if starting else "engine.call_timeout"
        return LateError(
            f"{what} within {limit:.0f} s.",
            why=self.cluster.log_tail(),
            fix=f"raise {setting}, or look at what keeps the machine busy.",
        )

    def _of_actor(self, error: Any, doing: str) -> KitError:
        cause = error.cause
        if isinstance(cause, StackError) and doing == "start":
            # What SGLang's processes had to say is in their log, which goes with the stack.
            why = "\n".join(part for part in (cause.why, self.cluster.log_tail()) if part)
            return StackError(cause.what, why=why, fix=cause.fix)
        if isinstance(cause, KitError):
            return cause
        last = str(error).strip().splitlines()
        return StackError(f"{doing} failed: {last[-1] if last else cause!r}")

    def _of_death(self, error: Exception, doing: str) -> StackError:
        """Error that names the part that died: Ray may tell before its process is quite gone."""
        deadline = time.monotonic() + LAST_BREATH
        while not (dead := self.watch.dead()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.refuse_without_head(doing)
        if TRAINER in dead:
            return trainer_died(
                f"A trainer's process died during {doing}.", self.cluster.killed_for_memory(TRAINER)
            )
        if not dead:  # or not yet watched: an engine that SGLang ends while it starts
            why = f"{error}\n{self.cluster.log_tail()}".strip()
            return StackError(f"Ray gave no answer to {doing}.", why=why)
        return EngineDiedError(
            f"A process of the engine died during {doing}.",
            why="\n".join(
                part
                for part in (
                    self.cluster.killed_for_memory("engine"),
                    *str(error).strip().splitlines()[:1],
                    self.cluster.log_tail(),
                )
                if part
            ),
            fix="call it again, which starts the engine anew; if it was killed for memory, lower "
            "engine.max_total_tokens or training.max_tokens_per_gpu first.",
        )


LOAD = "`session = RLSession.load(path)`, with what `session.save()` returned"


def while_starting(error: StackError, cluster: Cluster) -> StackError:
    """The error of a start in which a trainer or Ray has died, before there was anything to lose.

    Args:
        error: what the call told that found it out.
        cluster: that of the stack, whose logs may tell more.
    """
    told = cluster.killed_for_memory(TRAINER), "Nothing had been trained yet.", cluster.log_tail()
    return StackError(
        error.what,
        why="\n".join(part for part in told if part),
        fix="start it again. If it was killed for memory (`dmesg` tells of it), lower "
        "training.max_tokens_per_gpu or engine.max_total_tokens, or end other sessions first: "
        "`kit doctor` lists them.",
    )


def trainer_died(what: str, cause: str = "") -> TrainerDiedError:
    """The error of every call that needs a trainer's weights when they are gone.

    Args:
        what: how it was found out.
        cause: of its death, where that is known.
    """
    lost = (
        "The weights and the optimizer since the last checkpoint were its own, and are gone. "
        "Nothing trains on from other weights in silence."
    )
    return TrainerDiedError(
        what,
        why="\n".join(part for part in (cause, lost) if part),
        fix=f"continue from a checkpoint: {LOAD}; or take it, or a snapshot that is on disk, into "
        "this stack: `session.restore(Path(path))`. If the trainer was killed for memory, lower "
        "training.max_tokens_per_gpu first.",
    )
