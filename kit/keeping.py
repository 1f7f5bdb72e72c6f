"""The verbs that keep where a session stands, and bring it back: part of `RLSession`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kit import checkpoint
from kit.lifecycle import Lifecycle
from kit.turns import verb

if TYPE_CHECKING:
    from kit.rewards.runner import Reward


class Keeping(Lifecycle):
    """What a session can be taken back to."""

    @verb
    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint: weights, optimizer, data position, counters, metrics, configuration.

        Args:
            path: a new directory; None takes the run's own folder, else `checkpoints/`.

        Raises:
            CheckpointError: it cannot be written, or something else is in the way.
        """
        return checkpoint.save(self, self._running, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
    ) -> Self:
        """Start a session that continues where `save` was called.

        Args:
            path: a directory that `save` wrote.
            data: as in `start`; rows and functions that were passed there are not in the
                checkpoint.
            eval_data: as in `start`.
            reward: as in `start`.

        Raises:
            CheckpointError: it cannot be read. Never continues from other weights in silence.
        """
        folder = Path(path)
        config, state = checkpoint.read(folder)
        session = cls.start(config, data=data, eval_data=eval_data, reward=reward)
        try:
            checkpoint.restore(session, session._running, folder, state)
        except BaseException:
            session.close()
            raise
        return session
