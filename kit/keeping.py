"""The verbs that keep where a session stands, and bring it back: part of `RLSession`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from kit import checkpoint, snapshots
from kit.arguments import at_least_one
from kit.errors import SessionError, did_you_mean
from kit.exporting import Dtype, export_hf
from kit.lifecycle import Lifecycle
from kit.snapshots import Snapshot, Snapshots
from kit.turns import verb

if TYPE_CHECKING:
    from kit.rewards.runner import Reward


class Keeping(Lifecycle):
    """What a session can be taken back to."""

    @verb
    def snapshot(self, name: str | None = None, *, on_disk: bool = False) -> Snapshot:
        """Keep this moment, to come back to it with `restore`: weights, optimizer, data, metrics.

        Args:
            name: a name that is there already is given to this one; None takes `step-N`.
            on_disk: as a checkpoint under `checkpoints/` or in the run's folder, which outlives the
                trainer; else in host memory, which is faster.

        Raises:
            SessionError: there is no room in host memory; the message says what holds it.
            CheckpointError: it cannot be written.
        """
        return snapshots.snapshot(self, self._running, name, on_disk)

    @verb
    def restore(self, what: str | Path | Snapshot) -> Snapshot:
        """Undo everything since a snapshot, bit by bit. The engine gets the weights of then.

        Args:
            what: a snapshot or its name; or the `Path` of a checkpoint of the same model and data.

        Raises:
            SessionError: there is none of this name; the message lists those that exist.
            CheckpointError: it cannot be read. In every case the session is as it was.
        """
        return snapshots.restore(self, self._running, what)

    def snapshots(self) -> Snapshots:
        """Those that can be restored, the oldest first."""
        return Snapshots(tuple(self._snapshots.values()), self.weight_version)

    @verb
    def forget(self, name: str) -> None:
        """Give back what a snapshot holds. Raises SessionError where there is none of this name."""
        snapshots.forget(self, self._running, name)

    @verb
    def save(self, path: str | Path | None = None, *, keep_last: int | None = None) -> Path:
        """Write a checkpoint: weights, optimizer, data position, counters, metrics, configuration.

        What was at the same place before is there until the new one is complete.

        Args:
            path: a directory; None takes the run's own folder, else one in `checkpoints/` that is
                numbered by step.
            keep_last: of the numbered ones so many stay, the newest; None takes
                `checkpoint.keep_last`.

        Raises:
            CheckpointError: it cannot be written, or something else is in the way.
        """
        last = self.config.checkpoint.keep_last
        last = last if keep_last is None else at_least_one(keep_last, "keep_last")
        return checkpoint.save(self, self._running, path, last)

    @verb
    def export_hf(self, path: str | Path | None = None, *, dtype: Dtype | None = None) -> Path:
        """Write the model for Transformers, SGLang and the hub, tokenizer and chat template too.

        `AutoModelForCausalLM.from_pretrained(path)` loads it; so does `model.name: path`.

        Args:
            path: a directory; None takes the run's own folder, else one in `checkpoints/`.
            dtype: of the weights. None takes what the engine generates with; `float32` keeps every
                bit of the trainer's.

        Raises:
            CheckpointError: it cannot be written, or something else is in the way.
        """
        if dtype is not None and dtype not in (known := get_args(Dtype)):
            raise SessionError(f"There is no dtype {dtype!r}.", fix=did_you_mean(dtype, known))
        return export_hf(self, self._running, path, dtype)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        num_trainers: int | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Start a session that continues where `save` was called.

        Args:
            path: a directory that `save` wrote.
            data: as in `start`; rows and functions that were passed there are not in the
                checkpoint.
            eval_data: as in `start`.
            reward: as in `start`.
            num_trainers: another number than the checkpoint was written by; None takes the same.
            trust_remote_code: run Python code that the model brings along, if the checkpoint's
                settings ask for it.

        Raises:
            CheckpointError: it cannot be read. Never continues from other weights in silence.
        """
        folder = Path(path)
        config, state = checkpoint.read(folder)
        if not trust_remote_code:
            checkpoint.refuse_code(config, folder)
        if num_trainers is not None:
            config = config.replace("training.num_trainers", num_trainers)
        session = cls.start(config, data=data, eval_data=eval_data, reward=reward)
        try:
            checkpoint.restore(session, session._running, folder, state)
        except BaseException:
            session.close()
            raise
        return session
