"""The verbs that keep where a session stands, and bring it back: part of `RLSession`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from kit.checkpoint import checkpoint, snapshots
from kit.checkpoint.export import Dtype, export_hf
from kit.diagnostics.what_if import keep, what_if
from kit.errors import SessionError, did_you_mean
from kit.lifecycle.lock import verb
from kit.lifecycle.start import Lifecycle
from kit.reports import UpdateReport
from kit.reports.status import Snapshot, Snapshots
from kit.reports.what_if import WhatIf
from kit.rollout import replay
from kit.samples import Batch, Rollout
from kit.utils.arguments import at_least_one, expect

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
        taken = snapshots.restore(self, self._running, what)
        if self._recorder:
            self._recorder.stand_at(len(self.history))
        return taken

    @verb
    def replay(self, run: str | Path, step: int | None = None) -> Rollout:
        """A rollout that a run has recorded, to go through its step again with this session.

            rollout = session.replay("last", step=10)
            batch = session.advantages(session.score(rollout, reward=mine))
            session.update(batch)

        Nothing of the session changes but its `last_rollout`. The log-probs are those of the engine
        that wrote it; `session.log_probs(rollout)` are those of the present weights.

        Args:
            run: its folder; or, in `papermill_runs`, its name, the last signs of it, or `last`.
            step: which one; None takes the newest that was kept.

        Raises:
            RunError: there is no such run.
            DataError: the step was not kept, or another tokenizer wrote it.
        """
        return replay.replay(self, run, step)

    def snapshots(self) -> Snapshots:
        """Those that can be restored, the oldest first."""
        return Snapshots(tuple(self._snapshots.values()), self.weight_version)

    @verb
    def forget(self, name: str) -> None:
        """Give back what a snapshot holds. Raises SessionError where there is none of this name."""
        snapshots.forget(self, self._running, name)

    # ---- what would have been ------------------------------------------------------------------

    @verb
    def what_if(
        self,
        lr: float | Sequence[float] | None = None,
        eps_clip: float | Sequence[float] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        batch: Batch | None = None,
        snapshot: str | None = None,
    ) -> WhatIf:
        """Make an update with other settings, show what it would have done, and take it back.

            session.what_if(lr=[1e-5, 1e-4])
            session.what_if(settings={"entropy_coef": 0.01, "eps_clip_high": [0.2, 0.4]})

        Weights, optimizer, data, metrics and engine are afterwards what they were, bit by bit.

        Args:
            lr: a learning rate, or several to try.
            eps_clip: a clip range, or several.
            settings: any others of `training` that an update reads, by name; lists are tried value
                by value, several lists in every combination.
            batch: what to train on; None takes `last_batch`, that of the last update.
            snapshot: where each trial begins. None takes the present weights if they wrote the
                batch, else the newest snapshot of those that did.

        Raises:
            SessionError: there is no batch yet, or no such snapshot.
            ConfigError: a setting that an update does not read, or a value that cannot be.
        """
        named = {"learning_rate": lr, "eps_clip": eps_clip}
        changes = {name: value for name, value in named.items() if value is not None}
        return what_if(self, self._running, changes | dict(settings or {}), batch, snapshot)

    @verb
    def keep(self, tried: WhatIf, index: int) -> UpdateReport:
        """Make one of the updates that `what_if` tried; its settings stay for those that follow.

        The engine gets the new weights.

        Args:
            tried: what `what_if` returned.
            index: which one; 0 is the configured one.

        Raises:
            SessionError: the session has trained since, or there is no such trial.
        """
        tried = expect(tried, WhatIf, "keep", "pass what `session.what_if(...)` returned.")
        return keep(self, self._running, tried, index)

    # ---- on disk -------------------------------------------------------------------------------

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
