"""`RLSession`: the object that notebooks drive. Verbs only.

    session = RLSession.start("tiny")
    rollout = session.generate()
    rollout = session.score(rollout)
    batch   = session.advantages(rollout)
    report  = session.update(batch)
    session.sync()

`step()` is those five in order; `train(n)` is a loop of `step()`. Each verb returns a frozen
result that shows itself. `collect()` is the first two in one, and repeats them where `rollout` in
the configuration asks for it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from kit.checkpoint import checkpoint
from kit.checkpoint.export import Dtype, Method, export_hf
from kit.config import SessionConfig
from kit.config.training import Estimator
from kit.diagnostics import annotate, mismatch, startup, what_if
from kit.diagnostics.annotate import Annotated
from kit.diagnostics.reward_trial import try_reward
from kit.errors import SessionError, did_you_mean
from kit.lifecycle import attach, configure, forks, load, running, step, train_loop
from kit.lifecycle.lock import verb
from kit.lifecycle.start import SessionParts
from kit.lifecycle.train_loop import Callback, Hooks, Training
from kit.reports import (
    CheckReport,
    EvalReport,
    MismatchReport,
    RewardTrial,
    StepReport,
    SyncReport,
    TrainReport,
    UpdateReport,
)
from kit.reports.status import Sessions, SettingsChange, Snapshot, Snapshots
from kit.reports.training import History, Until
from kit.reports.what_if import WhatIf
from kit.rewards import score_samples
from kit.rollout import batch as rollout_batch
from kit.rollout import evaluate, replay
from kit.rollout.batch import Advantage
from kit.samples import Batch, Messages, Rollout, Sample
from kit.tracking.recorder import apply_run_settings
from kit.utils import interrupts
from kit.utils.arguments import at_least_one, expect
from kit.utils.files import in_living_folder

if TYPE_CHECKING:
    from kit.doctor import Diagnosis
    from kit.memory import MemoryPlan
    from kit.rewards.signature import Reward


class RLSession:
    """A language model in training, with its engine, trainer, prompts and reward."""

    def __init__(self, config: SessionConfig | str | Path = "tiny") -> None:
        """Make a session that is not running yet; `RLSession.start` makes one that is."""
        self._parts = SessionParts(SessionConfig.of(config))
        _sessions.add(self)

    @classmethod
    def start(
        cls,
        config: SessionConfig | str | Path = "tiny",
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        advantage: Advantage | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> Self:
        """Check everything that can be checked, start the stack, and return a running session.

        In a notebook, one that runs in this kernel already ends for it, and a line says so; ten
        minutes of training or more that were never saved are saved first. In a script or a batch
        run, it is refused.

        Args:
            config: a SessionConfig, a preset's name, the path of a YAML file, or a model: its
                directory (`./model`) or its name on the hub (`Qwen/Qwen3-0.6B`).
            data: training prompts instead of `data.source`: another source, a list of rows, a table
                of pandas, Polars or Arrow, or a `datasets.Dataset`.
            eval_data: held-out prompts in the same forms; or several sets by name,
                `{"gsm": "test.jsonl", "sums": rows}`, of which the first counts as the run's.
            reward: a function `f(sample) -> float` or `f(samples) -> list[float]`, a built-in's
                name, or several with weights, `{"math": 0.9, "short": (function, 0.1)}`, instead of
                `reward` in the configuration; docs/rewards.md has all forms.
            advantage: a function `f(rollout)` that returns a number for each sample, or a list of
                numbers for each, one a response token; instead of `advantage_estimator`.
            loss: a function `f(logp_T, old_logp_T, advantage_T)` of tensors over response tokens
                that returns the loss of each, (T), or also a mapping of metrics, (T); instead of
                the estimator's. `kit.algo.own_loss` names what else it can be given.

        Raises:
            ConfigError, DataError, ModelError, RewardError: what the message names is wrong.
            SessionError: another session runs and does not end for this one.
            StackError: a process could not start. In every case none is left behind.
        """
        session = cls(apply_run_settings(config))
        session._parts.start(
            data=data, eval_data=eval_data, reward=reward, advantage=advantage, loss=loss
        )
        return session

    @classmethod
    def attach(
        cls,
        name: str | None = None,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        advantage: Advantage | None = None,
        loss: Callable[..., Any] | None = None,
        forks: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> Self:
        """Continue a session whose kernel was restarted or killed, and its forks.

        Steps, weights, optimizer, place in the data, randomness, buffer, metrics and the last
        rollout are as they were. A step that was under way has either been completed or not begun.
        Snapshots in memory went with the kernel. One that runs in this kernel is returned as it is.

        Args:
            name: of the session; None takes the only one there is. `RLSession.sessions()` lists
                them.
            data: as in `start`; rows and functions that were passed there went with the kernel,
                and have to be passed again.
            eval_data: as in `start`.
            reward: as in `start`.
            advantage: as in `start`.
            loss: as in `start`; what the trainers were given stays.
            forks: rows and functions that forks had of their own, by the fork's name and the
                argument: `{"b": {"reward": mine}}`; None instead of them gives a fork up.

        Raises:
            SessionError: there is no such session, a living process drives it, or something has to
                be passed again.
        """
        passed = {"data": data, "eval_data": eval_data, "reward": reward}
        passed |= {"advantage": advantage, "loss": loss}
        if own := attach.own_session(name, passed | {"forks": forks or None}):
            return cls._of(own)
        found = attach.attach(name, passed, forks or {})
        for parts, unfinished in found:
            session = cls._of(parts)
            if unfinished:
                attach.complete(parts, unfinished, session.sync, session.evaluate)
        return cls._of(found[0][0])

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        advantage: Advantage | None = None,
        loss: Callable[..., Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        num_trainers: int | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Start a session that continues where `save` was called.

        Args:
            path: a directory that `save` wrote.
            data: as in `start`; rows and functions that were passed there are not in the
                checkpoint, and have to be passed again.
            eval_data: as in `start`.
            reward: as in `start`.
            advantage: as in `start`.
            loss: as in `start`.
            changes: settings that are to be others than the checkpoint's, by their full names:
                `{"training.learning_rate": 1e-5}`. Any can be given here.
            num_trainers: another number than the checkpoint was written by; None takes the same.
            trust_remote_code: run Python code that the model brings along, if the checkpoint's
                settings ask for it.

        Raises:
            CheckpointError: it cannot be read, or something has to be passed again. Never continues
                from other weights or with another reward in silence.
        """
        passed = {"data": data, "eval_data": eval_data, "reward": reward}
        passed |= {"advantage": advantage, "loss": loss}
        resized = {} if num_trainers is None else {"training.num_trainers": num_trainers}
        changed = dict(changes or {}) | resized
        with in_living_folder():
            saved = load.read(path, passed, changed, trust_remote_code=trust_remote_code)
        session = cls.start(saved.config, **saved.inputs)
        saved.restore(session._parts)
        return session

    @staticmethod
    def sessions() -> Sessions:
        """List your sessions on this machine: who drives each, and until when it waits."""
        return attach.sessions()

    @staticmethod
    def current() -> RLSession | None:
        """Return the session of this process, or None: for when its variable was lost."""
        parts = running.here()
        return RLSession._of(parts) if parts else None

    @classmethod
    def _of(cls, parts: SessionParts) -> Self:
        """The session of these parts: the same object as long as somebody holds it."""
        for session in _sessions:
            if session._parts is parts and isinstance(session, cls):
                return session
        session = cls(parts.state.config)
        session._parts = parts
        return session

    def close(self, *, keep_warm: bool = False) -> None:
        """End all processes of this session, and a running training. Safe to call again.

        Args:
            keep_warm: leave the processes to the next start with the same engine settings, which
                then takes about a second; they end by themselves after `stack.keep_warm` seconds,
                or ten minutes where that is 0. What was trained is gone: `save` it first.
        """
        self._parts.close(keep_warm=keep_warm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._parts.is_inherited:  # a forked child may leave the block too
            self.close()

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def config(self) -> SessionConfig:
        """The settings. Those that processes have read change nothing any more."""
        return self._parts.state.config

    @config.setter
    def config(self, config: SessionConfig) -> None:
        raise SessionError(
            "session.config cannot be replaced.",
            why="Its processes, prompts and memory plan were made from it; most of a new one would "
            "have no effect.",
            fix="session.configure(learning_rate=1e-5) changes what may change while it runs. For "
            "other settings start a session, or continue a saved one with them: "
            "RLSession.load(path, changes={...}).",
        )

    @property
    def name(self) -> str:
        """Name of the session; of a fork, the one that it was given."""
        return self._parts.fork_name or self.config.name

    @property
    def forks(self) -> dict[str, RLSession]:
        """Forks that share this session's stack by their names; see `fork`."""
        return {name: self._of(parts) for name, parts in self._parts.forks.items()}

    @property
    def step_count(self) -> int:
        """Number of updates applied so far."""
        return self._parts.state.step

    @property
    def history(self) -> History:
        """Metrics of all steps, one row each; `step` is the step's number. A list with
        `to_pandas()`.
        """
        return History(self._parts.state.history)

    @property
    def last_rollout(self) -> Rollout | None:
        """Rollout that was generated, scored or replayed last."""
        return self._parts.state.last_rollout

    @property
    def last_batch(self) -> Batch | None:
        """Batch that `update` was given last, even if it was refused."""
        return self._parts.state.last_batch

    @property
    def engine_version(self) -> int:
        """Version of the engine's weights; the trainer's is `weight_version`."""
        return self._parts.engine_version

    @property
    def weight_version(self) -> int:
        """The weights that the trainer holds. Each update gives them a number that no other weights
        of the session or its forks ever have: as many as there were updates, and more after an undo
        or beside forks that train.
        """
        return self._parts.weight_version

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, from Transformers."""
        return self._parts.sampler.tokenizer

    @property
    def training(self) -> Training | None:
        """Last training with a dashboard: to pause, resume or stop it from a cell."""
        return self._parts.lock.training

    @property
    def start_seconds(self) -> float:
        """Seconds that the start took."""
        return self._parts.start_seconds

    @property
    def debug(self) -> SessionParts:
        """Parts behind the session, for tests and the curious; they may change.

        `stack`, `state`, `sampler`, `collector`, `snapshots`, `reward`, `tracker`, `lock`; see
        `kit.lifecycle.start`.
        """
        return self._parts

    @verb
    def configure(
        self, /, settings: Mapping[str, Any] | None = None, **training: Any
    ) -> SettingsChange:
        """Change settings while the session runs: learning rate, sampling, sizes, intervals.

            session.configure(learning_rate=1e-5, n_samples_per_prompt=16)
            session.configure({"rollout.temperature": 0.8, "evaluation.interval": 5})

        They hold from the next verb on, are part of checkpoints, and are written into the run's
        `changes.jsonl`. An undo takes those of `training` and `rollout` back.

        Args:
            settings: by their full names.
            training: those of `training`, by name; or any other whose name is in no other section.

        Raises:
            ConfigError: a setting that cannot change while a session runs, or a value that cannot
                be. In every case nothing has changed.
        """
        parts = self._parts.running()
        changes = dict(settings or {}) | training
        return configure.configure(parts.state, parts.use, parts.tracker.recorder, changes)

    @verb
    def fork(
        self,
        /,
        name: str,
        settings: Mapping[str, Any] | None = None,
        *,
        fresh: bool = False,
        seed: int | None = None,
        data: Any = None,
        eval_data: Any = None,
        reward: Reward | None = None,
        advantage: Advantage | None = None,
        loss: Callable[..., Any] | None = None,
        **training: Any,
    ) -> Self:
        """Go on from here under another name too, in a second session on the same stack.

            warm = session.fork("warm", {"rollout.temperature": 1.2})
            fast = session.fork("fast", learning_rate=3e-3, reward=mine)

        Both share the engine and the frozen weights of the model, and take turns. The fork has an
        adapter, an optimizer, settings, data, reward, history and snapshots of its own, which
        begin as copies of this session's; nothing that one does changes the other. It ends with
        `close()`, and with the session for which the stack was started. See docs/lora.md.

        Args:
            name: of the fork; `session.forks` has all of a stack by it.
            settings: those that are to be others, by their full names, as for `configure`.
            fresh: begin with a new adapter, at the first step and the first prompt, as
                `RLSession.start` would.
            seed: another one, of what is drawn from here on, and of a fresh adapter. The order of
                the prompts stays, unless the fork is fresh or has data of its own.
            data: training prompts of its own, as in `start`.
            eval_data: held-out prompts of its own.
            reward: a reward of its own, as in `start`.
            advantage: a function that makes advantages, as in `start`.
            loss: a loss function, as in `start`.
            training: settings as for `configure`, by name.

        Raises:
            SessionError: this session trains all weights, or the name cannot be.
            ConfigError, DataError, RewardError: what the message names is wrong, or the same for
                all forks. In every case nothing has changed.
        """
        changes = dict(settings or {}) | training
        inputs = {"data": data, "eval_data": eval_data, "reward": reward}
        inputs |= {"advantage": advantage, "loss": loss}
        return self._of(forks.fork(self._parts, name, changes, seed, fresh, inputs))

    def memory_plan(self) -> MemoryPlan:
        """Memory plan of the session, beside what was measured so far."""
        stack = self._parts.stack
        return stack.plan.with_measured(stack.trainers.measured)

    def doctor(self) -> Diagnosis:
        """Check what this machine has and lacks for the session's settings; see `kit.doctor`."""
        from kit.doctor import diagnose

        return diagnose(self.config)

    def __repr__(self) -> str:
        parts = self._parts
        groups, root = len(parts.state.buffer), parts.root.state.config.name
        shared = f"fork of {root!r}, " if parts.fork_name else ""
        waiting = f", groups waiting to be continued: {groups}" if groups else ""
        return (
            f"RLSession({self.name!r}, {shared}{parts.phase}, model {self.config.model.name}, "
            f"step {self.step_count}, engine holds weights {self.engine_version}{waiting})"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return self._parts.overview()._repr_mimebundle_()

    # ---- one step, verb by verb ----------------------------------------------------------------

    @verb
    def generate(
        self,
        prompts: Sequence[str | Messages] | None = None,
        *,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
    ) -> Rollout:
        """Generate responses to the next training prompts, or to given ones.

        With `rollout.over_sampling_batch_size`, a call without arguments sends so many prompts and
        returns the first `rollout_batch_size` groups that are finished.

        Args:
            prompts: prompts of your own, instead of the next `rollout_batch_size` of the data.
            n_samples_per_prompt: responses to each; None takes the configured number.
            temperature: 0 is greedy; None takes the configured one.
            max_tokens: longest response, in tokens; None takes `rollout.max_response_len`, which is
                also the most.
            top_p: only the likeliest tokens up to this share; None takes the configured one.
        """
        collector = self._parts.running().collector
        return collector.generate(prompts, n_samples_per_prompt, temperature, max_tokens, top_p)

    @staticmethod
    def generate_together(
        sessions: Sequence[RLSession],
        prompts: Sequence[str | Messages] | None = None,
        *,
        n_samples_per_prompt: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
    ) -> list[Rollout]:
        """Generate for a session and its forks, as `generate` of each would; in their order.

            first, second = RLSession.generate_together([session, fork])

        With `engine.lora: adapter` the engine writes for all at once, each with its adapter, in
        other batches than for one alone, which may round otherwise; else for one after the other.

        Args:
            sessions: that share a stack.
            prompts: the same for all; None takes the next ones of each one's data.
            n_samples_per_prompt: as for `generate`.
            temperature: as for `generate`.
            max_tokens: as for `generate`.
            top_p: as for `generate`.

        Raises:
            SessionError: they do not share a stack, or one of them is training.
        """
        wanted = "pass sessions that share a stack: [session, fork]."
        several: Any = sessions
        if not isinstance(several, Iterable):
            expect(several, list, "generate_together", wanted)
        members = [expect(s, RLSession, "generate_together", wanted)._parts for s in several]
        unread: Any = prompts
        if isinstance(unread, Iterator):
            prompts = list(unread)  # each session reads all of them
        given = {"n_samples_per_prompt": n_samples_per_prompt, "temperature": temperature}
        given |= {"max_tokens": max_tokens, "top_p": top_p}
        with in_living_folder():
            return forks.generate_together(members, prompts=prompts, **given)

    @verb
    def score(self, rollout: Rollout, reward: Reward | None = None) -> Rollout:
        """Score a rollout. A sample whose reward fails is marked, and says why.

        Args:
            rollout: what `generate` returned.
            reward: a function or a built-in's name, instead of the session's.

        Raises:
            RewardError: a function for all samples returned the wrong number of values.
        """
        rollout = expect(rollout, Rollout, "score", "pass what `session.generate()` returned.")
        chosen = self._parts.reward if reward is None else reward
        scored = rollout.with_samples(score_samples(rollout.samples, chosen))
        self._parts.state.last_rollout = scored
        return scored

    def try_reward(
        self, fn: Reward, rollout: Rollout | None = None, against: Reward | None = None
    ) -> RewardTrial:
        """Try a reward beside another one; nothing trains, nothing changes.

        Args:
            fn: a function or a built-in's name, as for `score`.
            rollout: None takes the last one.
            against: what to compare with; None takes the session's own reward.
        """
        fix = "generate one first (`session.generate()`), or pass `rollout=`."
        rollout = self.last_rollout if rollout is None else rollout
        rollout = expect(rollout, Rollout, "try_reward", fix)
        return try_reward(rollout, fn, self._parts.reward if against is None else against)

    @verb
    def collect(self, reward: Reward | None = None) -> Rollout:
        """Generate and score the samples of a step; scoring overlaps with generation.

        With `rollout.dynamic_sampling`, groups whose rewards are all equal are left out and
        further prompts drawn until `rollout_batch_size` groups are left.

        Args:
            reward: a function or a built-in's name, instead of the session's.

        Raises:
            SessionError: dynamic sampling found no group whose rewards differ.
        """
        parts = self._parts.running()
        return parts.collector.collect(parts.reward if reward is None else reward)

    @verb
    def advantages(
        self, rollout: Rollout, advantage_estimator: Estimator | Advantage | None = None
    ) -> Batch:
        """Make a batch: rewards turned into advantages by the configured estimator.

        A group with a failed or aborted sample is left out whole: its mean would be of other
        samples than were drawn.

        Args:
            rollout: what `score` returned.
            advantage_estimator: another one than the configured, to compare, or a function as
                `start` takes it. The update still takes the configured one's loss.

        Raises:
            SessionError: the rollout has no rewards yet, or a function returned something else.
        """
        fix = "pass what `session.score(...)` returned."
        rollout = expect(rollout, Rollout, "advantages", fix)
        chosen = self._parts.advantage if advantage_estimator is None else advantage_estimator
        return rollout_batch.make_batch(rollout, self.config.training, self.log_probs, chosen)

    @verb
    def log_probs(self, samples: Sequence[Sample], of: str = "policy") -> list[list[float]]:
        """Trainer log-probs of each response token, one list per sample.

        Args:
            samples: a rollout, or some of its samples.
            of: log-probs, in nats, of the `policy` or the `reference`; or the critic's `values`.

        Raises:
            StackError: there is no reference or no critic.
        """
        if of not in (known := ("policy", "reference", "values")):
            raise SessionError(f"log_probs knows no {of!r}.", fix=did_you_mean(of, known))
        return self._parts.stack.by_token(
            [s.tokens for s in samples],
            [s.response_length for s in samples],
            of,
            rollout_batch.replayed(samples, self.config.training),
        )

    @verb
    def annotate(self, what: Annotated) -> Annotated:
        """Annotate each response token with what the present weights say of it; see `Sample.strip`.

        Log-probs and entropies; in a batch also advantages and each token's share of the loss.
        After an update, the log-probs of the annotation before are kept beside the new ones.

        Args:
            what: a rollout, a batch, or one sample.
        """
        parts = self._parts
        return annotate.annotate(parts.stack, what, self.weight_version, parts.sampler.token_text)

    @verb
    def update(self, batch: Batch) -> UpdateReport:
        """Train on a batch. Calling it again with the same batch changes nothing.

        It is a step: its metrics go into the history and to wherever those of a run go.

        Raises:
            StackError: loss or gradient is not finite; the weights are as before.
            SessionError: its samples were drawn at another temperature than the trainer's, or with
                top_p or top_k.
        """
        fix = "pass a batch: `session.update(session.advantages(rollout))`."
        batch = expect(batch, Batch, "update", fix)
        return step.update(self._parts, batch)

    @verb
    def sync(self, *, exact: bool = False, verify: bool = False) -> SyncReport:
        """Sync the trainer's weights to the engine, which drops its cache of old ones.

        After an update by hand it then evaluates and saves where the settings ask for it, as at the
        end of `step`.

        Args:
            exact: without what `engine.weight_bits` and `engine.weight_noise` do to them, until
                the next sync; to evaluate the weights themselves.
            verify: compare a checksum of each parameter on both sides afterwards.

        Raises:
            StackError: with `verify`, a parameter did not arrive.
        """
        parts = self._parts
        report = parts.stack.sync(self.weight_version, exact=exact, verify=verify)
        step.conclude(parts.state, parts.stack, parts.tracker, self.evaluate)
        return report

    @verb
    def check_mismatch(
        self, rollout: Rollout | None = None, *, deep: bool = False
    ) -> MismatchReport:
        """Recompute a rollout's log-probs in the trainer and compare, token by token.

        Where they disagree, experiments with engine and trainer look for the cause.

        Args:
            rollout: None takes the last one, if the engine's present weights wrote it; else one is
                generated.
            deep: look for causes even where they agree.
        """
        stack, sampler = self._parts.stack, self._parts.sampler
        if rollout is None:
            # A count of its own makes it one plain call, which continues nothing.
            count = self.config.training.n_samples_per_prompt
            last = mismatch.still_fits(self.last_rollout, self.engine_version)
            rollout = last or self.generate(n_samples_per_prompt=count)
        rollout = expect(rollout, Rollout, "check_mismatch", "pass a rollout, or nothing.")
        return mismatch.check(rollout, config=self.config, stack=stack, sampler=sampler, deep=deep)

    @verb
    def check(self) -> CheckReport:
        """Check the invariants of a healthy start, each with its value and bound.

        A few responses are written and an update is tried at learning rate 0. The session is as it
        was afterwards: weights, optimizer, counters, randomness, place in the data.
        """
        parts = self._parts
        return startup.check(parts.state, parts.stack, parts.sampler, self.check_mismatch)

    @verb
    def step(self) -> StepReport:
        """Take one step: collect (generate and score), advantages, update, sync."""
        begin, index, parts = time.perf_counter(), self.step_count, self._parts.running()
        rollout_batch.refuse_cut(self.config.rollout)
        if self.engine_version != self.weight_version:
            self.sync()  # after an update by hand: train only on what the present weights write
        with parts.collector.undo_draw_on_interrupt():
            rollout = self.collect()
            fresh = rollout.of_version(self.weight_version)  # without what older weights began
            due = len(fresh) and step.due(index, self.config.mismatch.interval)
            checked = self.check_mismatch(fresh) if due else None
            batch = self.advantages(rollout)
            with interrupts.held():  # or the weights would have a step that the history lacks
                update = self.update(batch)
                if not update.applied:
                    raise rollout_batch.nothing_to_train_on(update)
                done = step.hand_over(parts.state, self.sync, rollout, update, checked, begin)
        return step.finish(parts.state, parts.stack, parts.tracker, self.evaluate, done)

    @overload
    def train(
        self,
        steps: int | None = ...,
        *,
        reward: Reward | None = ...,
        until: Until | None = ...,
        callbacks: Callback | Sequence[Callback] = ...,
        show: bool = ...,
    ) -> TrainReport: ...
    @overload
    def train(
        self,
        steps: int | None = ...,
        *,
        reward: Reward | None = ...,
        until: Until | None = ...,
        callbacks: Callback | Sequence[Callback] = ...,
        dashboard: Literal[True],
    ) -> Training: ...
    def train(
        self,
        steps: int | None = None,
        *,
        reward: Reward | None = None,
        until: Until | None = None,
        callbacks: Callback | Sequence[Callback] = (),
        show: bool = True,
        dashboard: bool = False,
    ) -> TrainReport | Training:
        """A loop of `step()`, shown live. Interrupting it keeps the steps that are done.

        Args:
            steps: None takes the configured `num_rollout`.
            reward: a function or a built-in's name; it is the session's own from here on.
            until: called after each step with its `StepReport`; True ends training.
            callbacks: called after each step too; one that raises is a warning, and training goes
                on. They may call verbs: evaluate, save, configure.
            show: draw the progress while training.
            dashboard: train in the background, under curves, samples and buttons, and return a
                `Training` at once; its `wait()` gives the report. A batch run returns it finished.

        Raises:
            RewardError: the reward could not be called.
        """
        parts = self._parts.running()
        if reward is not None:
            with parts.lock.take("train"):
                parts.take_reward(reward)
        hooks = self._hooks((callbacks,) if callable(callbacks) else tuple(callbacks))
        if dashboard:
            return train_loop.train_on_dashboard(parts, self.step, steps, until, hooks)
        return train_loop.train(parts, self.step, steps, until, show, hooks)

    def _hooks(self, callbacks: Sequence[Callback] = ()) -> Hooks:
        return Hooks(callbacks, self.evaluate)

    def steps(self, steps: int | None = None) -> Iterator[int]:
        """Count the steps of a loop that is written by hand; yields the number of the next one.

            for number in session.steps(20):
                rollout = session.score(session.generate())
                session.update(session.advantages(rollout))
                session.sync()

        The loop ends when so many updates were made. In a batch run that is resumed, it goes on
        from the newest checkpoint of this very loop, as `train` does.

        Args:
            steps: None takes the configured `num_rollout`.
        """
        planned = self.config.training.num_rollout
        total = planned if steps is None else at_least_one(steps, "steps")
        return train_loop.counted(self._parts, total)

    def dashboard(self, steps: int | None = None) -> Training:
        """Show the training of this session with its buttons, or the picture that it left.

        Where there was none on a dashboard yet, buttons offer to start one.

        Args:
            steps: after a training that has ended, buttons offer so many more; None shows only what
                it left. Before the first one, None takes the configured `num_rollout`.
        """
        return train_loop.dashboard(self._parts, self.step, steps, self._hooks())

    @verb
    def evaluate(
        self, *, n_samples_per_prompt: int | None = None, temperature: float | None = None
    ) -> EvalReport:
        """Measure mean reward and pass@k on held-out prompts, with the engine's present weights.

        Where all rewards are 0 or 1, the mean is the accuracy.

        Args:
            n_samples_per_prompt: None takes `evaluation.n_samples_per_prompt`.
            temperature: 0 is greedy; None takes `evaluation.temperature`.

        Raises:
            DataError: there are no held-out prompts.
        """
        parts = self._parts
        report = evaluate.evaluate(
            parts.stack,
            parts.sampler,
            parts.reward,
            self.config,
            self.step_count,
            n_samples_per_prompt,
            temperature,
        )
        parts.state.evaluated = parts.engine_version
        parts.tracker.evaluation(report)
        return report

    # ---- back to an earlier moment --------------------------------------------------------------

    @verb
    def snapshot(self, name: str | None = None, *, on_disk: bool = False) -> Snapshot:
        """Take a snapshot for `restore`: weights, optimizer, data, metrics.

        Args:
            name: a name that is there already is given to this one; None takes `step-N`.
            on_disk: as a checkpoint under `checkpoints/` or in the run's folder, which outlives the
                trainer; else in host memory, which is faster.

        Raises:
            SessionError: there is no room in host memory; the message says what holds it.
            CheckpointError: it cannot be written.
        """
        parts = self._parts
        return parts.snapshots.take(parts.stack, name, on_disk, parts.tracker.recorder)

    @verb
    def restore(
        self, what: str | Path | Snapshot, *, changes: Mapping[str, Any] | None = None
    ) -> Snapshot:
        """Undo everything since a snapshot, bit by bit, engine included.

        The settings of `training` and those of sampling are the snapshot's afterwards; all others,
        the data and the reward stay this session's.

        Args:
            what: a snapshot or its name; or the `Path` of a checkpoint of the same model and data.
            changes: settings that are to be others from here on, as `configure` takes them.

        Raises:
            SessionError: there is none of this name; the message lists those that exist.
            CheckpointError: it cannot be read. In every case the session is as it was.
        """
        return load.restore_snapshot(self._parts, what, changes or {})

    @verb
    def replay(self, run: str | Path, step: int | None = None) -> Rollout:
        """Load a recorded rollout of a run, to repeat its step in this session.

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
        state = self._parts.running().state
        reader, model = self._parts.sampler.reader, self.config.model.name
        state.last_rollout = replay.replay(run, step, reader, model)
        return state.last_rollout

    def snapshots(self) -> Snapshots:
        """Snapshots that can be restored, the oldest first."""
        return Snapshots(tuple(self._parts.snapshots.values()), self.weight_version)

    @verb
    def forget(self, name: str) -> None:
        """Release a snapshot. Raises SessionError for an unknown name."""
        self._parts.snapshots.forget(self._parts.stack, name)

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
        """Try an update with other settings, show its effect, and undo it.

            session.what_if(lr=[1e-5, 1e-4])
            session.what_if(settings={"entropy_coef": 0.01, "eps_clip_high": [0.2, 0.4]})

        Weights, optimizer, data, metrics and engine are afterwards what they were, bit by bit.

        Args:
            lr: a learning rate, or several to try.
            eps_clip: a clip range, or several.
            settings: any others of `training` that an update reads, by name; lists are tried value
                by value, several lists in every combination.
            batch: what to train on; None takes that of the last update that was not refused.
            snapshot: where each trial begins. None takes the present weights if they wrote the
                batch, else the newest snapshot of those that did.

        Raises:
            SessionError: there is no batch yet, or no such snapshot.
            ConfigError: a setting that an update does not read, or a value that cannot be.
        """
        named = {"learning_rate": lr, "eps_clip": eps_clip}
        changes = {name: value for name, value in named.items() if value is not None}
        parts = self._parts
        return what_if.what_if(
            parts.state,
            parts.stack,
            parts.snapshots,
            parts.sampler.token_text,
            changes | dict(settings or {}),
            batch,
            snapshot,
        )

    @verb
    def keep(self, tried: WhatIf, index: int) -> UpdateReport:
        """Make one of the updates that `what_if` tried; its settings stay.

        The engine gets the new weights.

        Args:
            tried: what `what_if` returned.
            index: which one; 0 is the configured one.

        Raises:
            SessionError: the session has trained since, or there is no such trial.
        """
        tried = expect(tried, WhatIf, "keep", "pass what `session.what_if(...)` returned.")
        return step.keep(self._parts, tried, index, self.evaluate)

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
        parts = self._parts
        return checkpoint.save(parts.state, parts.stack, path, last, parts.tracker.recorder)

    @verb
    def export_hf(
        self,
        path: str | Path | None = None,
        *,
        dtype: Dtype | None = None,
        adapter: bool = False,
        quantization: Method | None = None,
        draft: bool = False,
    ) -> Path:
        """Write the model for Transformers, SGLang and the hub, tokenizer and chat template too.

        `AutoModelForCausalLM.from_pretrained(path)` loads it; so does `model.name: path`. What
        `model.lora` has trained is merged into it.

        Args:
            path: a directory; None takes the run's own folder, else one in `checkpoints/`.
            dtype: of the weights. None takes what the engine generates with, for adapters alone
                float32; `float32` keeps every bit of the trainer's.
            adapter: write the adapters of `model.lora` alone, for `PeftModel.from_pretrained`.
            quantization: write the linear layers quantised, `fp8` or `int4`, in groups as the
                session's where it has any. None writes plain weights, those that are trained.
            draft: write the draft that `training.draft` trains, for `engine.speculative`.

        Raises:
            CheckpointError: it cannot be written, or something else is in the way.
            SessionError: there is no adapter, no draft, or adapters or a draft are to be quantised.
            ModelError: the model cannot be quantised so.
        """
        state = self._parts.state
        asked = self._parts.stack, self.config, state.step, path, dtype
        return export_hf(*asked, adapter=adapter, quantization=quantization, draft=draft)


_sessions: weakref.WeakSet[RLSession] = weakref.WeakSet()
