"""`session.debug`: what stands behind a session, for tests and curious people. No promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from kit.data.stream import PromptStream
    from kit.lifecycle.lock import Turns
    from kit.lifecycle.start import Lifecycle
    from kit.reports.status import Snapshot
    from kit.rewards.runner import Reward
    from kit.rollout.collector import Buffer
    from kit.rollout.sampler import Prompting
    from kit.stack.stack import Stack
    from kit.tracking.loggers import Loggers
    from kit.tracking.recorder import Recorder


class Debug:
    """The parts of a session by name. They may have other names in the next version."""

    def __init__(self, session: Lifecycle) -> None:
        self._session = session

    @property
    def stack(self) -> Stack:
        """Engine and trainers. Raises SessionError where the session is not running."""
        return self._session._running

    @property
    def sampler(self) -> Prompting:
        """Prompts, tokenizer, and how a response becomes a sample."""
        return self._session._prompting

    @property
    def lock(self) -> Turns:
        """One verb at a time; holds the training that runs in a thread."""
        return self._session._turns

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """Snapshots by name, the oldest first."""
        return self._session._snapshots

    @property
    def recorder(self) -> Recorder | None:
        """Writes the run's files, in a batch run."""
        return self._session._recorder

    @property
    def reward(self) -> Reward:
        """What `score` takes where it is given none."""
        return self._session._reward

    @reward.setter
    def reward(self, reward: Reward) -> None:
        self._session._reward = reward

    @property
    def loggers(self) -> Loggers | None:
        """TensorBoard and the like."""
        return self._session._loggers

    @loggers.setter
    def loggers(self, loggers: Any) -> None:
        self._session._loggers = loggers

    @property
    def state(self) -> Self:
        """What the session is, apart from weights: `step`, `rollouts_drawn`, `stream`, ..."""
        return self

    @property
    def step(self) -> int:
        """Updates applied so far."""
        return self._session.step_count

    @step.setter
    def step(self, step: int) -> None:
        self._session.step_count = step

    @property
    def rollouts_drawn(self) -> int:
        """Draws of responses so far; each has a seed of its own."""
        return self._session._generations

    @rollouts_drawn.setter
    def rollouts_drawn(self, count: int) -> None:
        self._session._generations = count

    @property
    def stream(self) -> PromptStream:
        """The order of the training prompts, and the place in it."""
        return self._session._stream

    @stream.setter
    def stream(self, stream: PromptStream) -> None:
        self._session._stream = stream

    @property
    def buffer(self) -> Buffer:
        """Unfinished groups that wait to be continued."""
        return self._session._buffer
