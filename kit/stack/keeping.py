"""The part of `Stack` that keeps the trainers' state, and gives it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from kit.config import SessionConfig, TrainingConfig
from kit.stack import repair
from kit.stack.calls import Calls
from kit.stack.residency import Residency
from kit.stack.together import together
from kit.stack.watch import TRAINER

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
            repair.restart_trainers(cast("Stack", self))
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
