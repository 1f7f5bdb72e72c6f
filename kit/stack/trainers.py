"""The part of `Stack` that keeps the trainers' state, and gives it back.

Calls that all ranks answer together, and what becomes of them when one rank cannot.

Ranks meet in every layer. Where one of them fails (its share of the samples did not fit into its
device's memory, say), the others would wait for it in the next layer for ever. So the ranks that
have answered leave the group, on which the others fail too; then all of them meet again, in a new
group, with the weights and the optimizer that each of them still has:

    rank 0    update ── waits for rank 1 ─────────────── fails ─┐
    rank 1    update ── fails ── leaves the group ──────────────┴── regroup: as before the update
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from kit.cluster.processes import TRAINER
from kit.config import SessionConfig, TrainingConfig
from kit.errors import KitError, StackError
from kit.stack import recovery
from kit.stack.calls import Calls, HeadDiedError, LateError, TrainerDiedError, trainer_died
from kit.stack.offload import Residency

if TYPE_CHECKING:
    from kit.stack.stack import Stack


class KeepsTrainers(ABC):
    """Calls of all trainers, each for its share."""

    config: SessionConfig
    calls: Calls
    residency: Residency
    _trainers: list[Any]
    _bare: bool

    def snapshot(self, name: str) -> int:
        """Have the trainers keep their state in host memory under this name; bytes in all."""
        return sum(self._all("snapshot", name))

    def restore(self, name: str) -> None:
        """Have the trainers go back to what they kept. Raises SessionError where one has not."""
        self._all("restore", name)

    def forget(self, name: str) -> None:
        """Have the trainers give back the memory of what they kept."""
        self._get([t.forget.remote(name) for t in self._trainers], "forget")

    def state_bytes(self) -> int:
        """Bytes of host memory that a snapshot takes now."""
        return sum(self._all("state_bytes"))

    def configure(self, training: TrainingConfig) -> None:
        """Have the trainers train with other settings from now on."""
        self._get([t.configure.remote(training) for t in self._trainers], "configure")
        # For those that may have to be started again.
        self.config = self.config.model_copy(update={"training": training})

    def export_hf(self, directory: str, dtype: str) -> None:
        """Have the trainers write the policy as models are published."""
        self._all("export_hf", directory, dtype)

    def save(self, directory: str) -> None:
        """Have the trainers write their state into a directory."""
        self._all("save", directory)

    def load(self, directory: str) -> None:
        """Have the trainers read what `save` wrote; those that have died are started again."""
        if self.calls.has_died(TRAINER, "load"):
            self._bare = True
            recovery.restart_trainers(cast("Stack", self))
        self.residency.for_trainer()
        self._get([t.load.remote(directory) for t in self._trainers], "load")
        self._bare = False

    def _all(self, what: str, *arguments: Any) -> Any:
        self.trainer_in_order()
        calls = [getattr(t, what).remote(*arguments) for t in self._trainers]
        return together(cast("Stack", self), calls, what, changes=what == "restore")

    @abstractmethod
    def trainer_in_order(self) -> None:
        """Before the trainers work; raises StackError where their weights are gone."""

    @abstractmethod
    def _get(self, calls: Any, doing: str, timeout: float | None = None) -> Any: ...


GRACE = 5.0
"""Seconds that the other ranks have to answer too, where all of them met with the same error."""


PATIENCE = 60.0
"""Seconds that the other ranks have to notice that one has left."""


CONTROL = "control"
"""Ray's concurrency group for the word that has to reach a rank while it waits."""


def together(stack: Stack, calls: list[Any], doing: str, *, changes: bool = False) -> list[Any]:
    """The answers of all ranks, in order.

    Args:
        stack: whose trainers they are.
        calls: one a rank.
        doing: what they do, for messages.
        changes: would ranks that have done it and ranks that have not differ in their weights?

    Raises:
        StackError: what a rank raised. The ranks can be used again, with the state that they had.
        TrainerDiedError: they cannot; only a checkpoint helps.
    """
    try:
        answers: list[Any] = stack._get(calls, doing)
        return answers
    except (LateError, TrainerDiedError, HeadDiedError, KeyboardInterrupt):
        raise
    except KitError as error:
        if len(calls) < 2:
            raise
        raise _after(stack, calls, doing, error, changes) from error


def _after(stack: Stack, calls: list[Any], doing: str, error: KitError, changes: bool) -> KitError:
    """Have all ranks in order again; the error to raise."""
    count = len(calls)
    ended = stack.calls.wait(calls, count, doing, GRACE)
    errors = {rank: _error(stack, call, doing) for rank, call in enumerate(calls) if call in ended}
    for found in errors.values():
        if isinstance(found, TrainerDiedError):  # of which the others' errors are consequences
            return found
    if len(ended) == count:
        failed = [rank for rank, found in errors.items() if found]
        if len(failed) == count or not changes:  # mostly they had agreed on it
            return error
        return _lost(stack, f"{doing} failed in rank {failed[0]} only, at its very end.", error)
    left = [rank for rank, call in enumerate(calls) if call not in ended]
    told = [rank for rank in range(len(calls)) if rank not in left]
    for trainer in stack._trainers:  # also those that wait: NCCL does not notice by itself
        trainer.leave_group.options(concurrency_group=CONTROL).remote()
    if len(stack.calls.wait(calls, count, doing, PATIENCE)) < count:
        return _lost(stack, f"Rank {left[0]} still waits for another that failed.", error)
    if changes and any(not _error(stack, calls[rank], doing) for rank in left):
        return _lost(stack, f"{doing} failed in rank {told[0]} only.", error)
    rendezvous = stack.placement.rendezvous(secrets.token_hex(4))
    again = [trainer.regroup.remote(rendezvous) for trainer in stack._trainers]
    try:
        stack._get(again, "regroup", stack.config.engine.start_timeout)
    except KitError as why:
        return _lost(stack, f"The ranks did not meet again after an error: {why.what}", error)
    stack.channel = None  # it went with the group
    return error


def _error(stack: Stack, call: Any, doing: str) -> KitError | None:
    try:
        stack._get(call, doing)
    except KitError as error:
        return error
    return None


def _lost(stack: Stack, what: str, error: KitError) -> StackError:
    """End all ranks: they would train on with different weights, or wait for ever."""
    stack.watch.end(TRAINER)
    told = trainer_died(f"The trainers had to be ended. {what}")
    return TrainerDiedError(told.what, why=f"{error.what} {told.why}", fix=told.fix)
