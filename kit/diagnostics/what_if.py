"""`session.what_if`: tries updates with other settings, and undoes them.

    a snapshot, or now ──► update as configured ──► look ──► back
                      ├──► update, learning rate 1e-4 ──► look ──► back
                      └──► ...                                     back to now, bit by bit

Nothing reaches the engine, the data or the metrics. `session.keep(report, 1)` makes one of the
updates after all. `update_variants` says which settings an update can be tried with.
"""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kit.checkpoint.snapshots import SnapshotStore, load_trainers
from kit.config import SessionConfig, TrainingConfig
from kit.config.training import RATIO_STAYS_1
from kit.diagnostics import annotate
from kit.diagnostics.annotate import BEFORE, NOW
from kit.errors import ConfigError, DataError, SessionError, StackError, did_you_mean
from kit.reports import UpdateReport, status
from kit.reports.status import Snapshot
from kit.reports.what_if import Movement, Trial, WhatIf
from kit.rollout import batch as rollout_batch
from kit.samples import Batch, Rollout, Sample
from kit.utils.formatting import mean
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.checkpoint.state import TrainState
    from kit.stack.stack import Stack


BASE, PRESENT = "/base", "/present"
"""Names that no snapshot of a person's can have."""


def what_if(
    state: TrainState,
    stack: Stack,
    snapshots: SnapshotStore,
    token_text: Callable[[int], str],
    changes: Mapping[str, Any],
    batch: Batch | None,
    snapshot: str | None,
) -> WhatIf:
    """Try an update with several settings, and undo each.

    Args:
        state: the session's; it is as it was afterwards.
        stack: the session's; its trainers too.
        snapshots: those that a trial can begin with.
        token_text: a token id as text.
        changes: by name of a training setting, a value or a list of values to try; with several
            lists, every combination.
        batch: what is trained on; None takes the last one that was.
        snapshot: where each trial begins. None takes the present weights if they wrote the batch,
            else the newest snapshot of those that did, else the present ones.

    Raises:
        SessionError: there is no batch yet, or no such snapshot.
        ConfigError: a setting that an update does not read, or a value that cannot be.
    """
    begin = time.perf_counter()
    batch, which = _batch(state, batch)
    variants = update_variants(state.config, changes)
    base = _base(stack, snapshots, batch, snapshot)
    version = base.weight_version if base else stack.trainers.version
    step = base.step if base else state.step
    trials = []
    with _taken_back(state, stack):
        if base:
            stack.configure(base.training, base.rollout.get("rollout.temperature"))
            load_trainers(stack, base)
        before = annotate.annotate(stack, batch.rollout, version, token_text)
        stack.snapshot(BASE)
        for variant in variants:
            trials.append(_trial(stack, batch, before, step, variant, token_text))
            stack.restore(BASE)
    return WhatIf(
        tuple(trials),
        batch,
        before,
        step,
        version,
        base.name if base else "",
        time.perf_counter() - begin,
        (*which, *_notes(batch, step, version), *_not_felt(variants)),
    )


def keep(
    state: TrainState,
    stack: Stack,
    snapshots: SnapshotStore,
    use: Callable[[SessionConfig], None],
    report: WhatIf,
    index: int,
) -> UpdateReport:
    """Make one of the tried updates for good, and continue with its settings.

    Raises:
        SessionError: there is no such trial, it was refused, or the weights that it began with are
            no longer there.
    """
    if not isinstance(index, int) or not 0 <= index < len(report):
        raise SessionError(
            f"There is no trial {index!r}.",
            fix=f"they are numbered from 0, which is the configured one, to {len(report) - 1}.",
        )
    trial: Trial = report[index]
    if trial.update is None:
        raise SessionError(
            f"Trial {index} ({trial.label}) was refused, so there is nothing to keep.",
            why=trial.refused,
        )
    if report.snapshot:
        base = status.find(snapshots, report.snapshot)
        _same_weights(base.weight_version, report)
    else:
        _same_weights(stack.trainers.version, report)
    with held():
        if report.snapshot:
            snapshots.restore(stack, report.snapshot)
        configured = state.config
        use(configured.model_copy(update={"training": trial.training}))
        state.last_batch = report.batch
        try:
            update = rollout_batch.update(stack, _once_more(report.batch), state.step)
        except BaseException:
            use(configured)
            raise
        state.step += update.applied
        state.trained_batch = report.batch
        stack.sync(stack.trainers.version)
    return update


def _same_weights(version: int, report: WhatIf) -> None:
    if version != report.weight_version:
        raise SessionError(
            f"The trials began with weights version {report.weight_version}; these are version "
            f"{version}.",
            why="The session has trained since, or the snapshot was taken anew.",
            fix="call session.what_if again, and keep one of its trials.",
        )


def _batch(state: TrainState, given: Batch | None) -> tuple[Batch, tuple[str, ...]]:
    """(what to try, a note where it is not the last batch): one that was refused stays aside."""
    last, trained = state.last_batch, state.trained_batch
    if given is not None or trained is None or trained is last:
        return _checked(last if given is None else given), ()
    return trained, (
        "The last batch was refused, or had no samples; this is the one before it, which was "
        "trained on. To try the last one: batch=session.last_batch.",
    )


def _checked(batch: Batch | None) -> Batch:
    if batch is None:
        raise SessionError(
            "There is no batch to try.",
            fix="pass one, `session.what_if(lr=1e-4, batch=session.advantages(rollout))`, or make "
            "an update first: its batch stays there as session.last_batch.",
        )
    if not isinstance(batch, Batch):
        raise SessionError(
            f"what_if needs a batch, got {type(batch).__name__}.",
            fix="pass what `session.advantages(rollout)` returned.",
        )
    if not batch.samples:
        raise DataError(
            "The batch has no samples.",
            why="\n".join(batch.left_out[:4]),
            fix="pass one that has: `session.what_if(lr=1e-4, batch=session.advantages(rollout))`.",
        )
    return batch


# ---- where from ------------------------------------------------------------------------------


def _base(
    stack: Stack, snapshots: SnapshotStore, batch: Batch, snapshot: str | None
) -> Snapshot | None:
    """Snapshot that trials start from; None for the present weights."""
    if snapshot is not None:
        return status.find(snapshots, snapshot)
    wrote = {version for s in batch.samples for version in s.weight_versions}
    if stack.trainers.version in wrote:
        return None
    fitting = [s for s in snapshots.values() if s.weight_version == max(wrote, default=-1)]
    return fitting[-1] if fitting else None


def _notes(batch: Batch, step: int, version: int) -> tuple[str, ...]:
    wrote = {v for s in batch.samples for v in s.weight_versions}
    if not wrote or version in wrote:
        return ()
    return (
        f"Weights version {max(wrote)} wrote the batch, and the trials began with version "
        f"{version}: a further pass over old samples. To see the first one with other settings, "
        "take a snapshot before a step, and ask after it.",
    )


def _not_felt(variants: Sequence[UpdateVariant]) -> tuple[str, ...]:
    """Note on variants that compute the configured update, because its ratio stays 1."""
    (_, _, configured), *others = variants
    equal = [label for label, _, each in others if each.as_felt() == configured.as_felt()]
    return (f"{'; '.join(equal)}: no effect, because {RATIO_STAYS_1}.",) if equal else ()


@contextmanager
def _taken_back(state: TrainState, stack: Stack) -> Iterator[None]:
    """Undo trainers, settings and weight versions, whatever happens inside."""
    versions = stack.trainers.version, stack.trainers.newest_version
    taken = False
    try:
        with held():
            stack.snapshot(PRESENT)
            taken = True
        yield
    finally:
        with held():
            if taken:
                stack.configure(state.config.training, state.config.rollout.temperature)
                stack.restore(PRESENT)
                stack.trainers.version, stack.trainers.newest_version = versions
            for name in (BASE, PRESENT):
                stack.forget(name)


# ---- one trial -------------------------------------------------------------------------------


def _trial(
    stack: Stack,
    batch: Batch,
    before: Rollout,
    step: int,
    variant: UpdateVariant,
    token_text: Callable[[int], str],
) -> Trial:
    label, changed, training = variant
    stack.configure(training)
    try:
        update = rollout_batch.update(stack, _once_more(batch), step)
    except StackError as error:  # refused; if the trainer is gone, taking back says so
        return Trial(label, changed, training, None, None, None, str(error))
    after = annotate.annotate(stack, before, stack.trainers.version, token_text)
    return Trial(label, changed, training, update, movement(after), after)


def _once_more(batch: Batch) -> Batch:
    """Copy of a batch under another id, because a trainer skips a repeated one."""
    return replace(batch, id=uuid.uuid4().hex)


def movement(after: Rollout) -> Movement:
    """Measure how far log-probs moved, over the tokens that train."""
    pairs = [pair for sample in after for pair in _moved(sample)]
    changes = [change for change, _ in pairs if math.isfinite(change)]
    praised = [change for change, advantage in pairs if advantage > 0]
    blamed = [change for change, advantage in pairs if advantage < 0]
    meant = sum(change > 0 for change in praised) + sum(change < 0 for change in blamed)
    judged = sum(change != 0 for change in (*praised, *blamed))
    return Movement(
        tokens=len(changes),
        mean_abs=mean([abs(change) for change in changes]),
        largest=max(map(abs, changes), default=0.0),
        kl=mean([math.expm1(min(change, 20.0)) - change for change in changes]),
        praised=mean(praised),
        blamed=mean(blamed),
        as_meant=meant / judged if judged else math.nan,
    )


def _moved(sample: Sample) -> Iterator[tuple[float, float]]:
    """(change of the log-prob, advantage) of each token that trains."""
    values = sample.token_values
    columns = (values.get(NOW, ()), values.get(BEFORE, ()), values.get("advantage", ()))
    for new, old, advantage, trains in zip(*columns, sample.mask, strict=False):
        if trains:
            yield new - old, advantage


AS_CONFIGURED = "as configured"

MAX_VARIANTS = 12
"""Variants that are tried at once."""

UpdateVariant = tuple[str, dict[str, Any], TrainingConfig]
"""(what is different in words, the settings that are, all settings)."""

CHANGEABLE = frozenset(
    {
        "learning_rate",
        "lr_schedule",
        "warmup_steps",
        "min_learning_rate",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "weight_decay",
        "clip_grad",
        "eps_clip",
        "eps_clip_high",
        "eps_clip_c",
        "kl_loss_coef",
        "kl_loss_type",
        "entropy_coef",
        "calculate_per_token_loss",
        "use_rollout_logprobs",
        "use_tis",
        "tis_clip",
        "tis_clip_low",
        "mis",
        "opsm_delta",
        "global_batch_size",
        "epochs_per_rollout",
    }
)
"""Settings that an update reads. Others are in the batch already, or in the processes."""


def update_variants(config: SessionConfig, changes: Mapping[str, Any]) -> list[UpdateVariant]:
    """Every combination of these values; the configured one comes first, and none comes twice.

    Args:
        config: the session's.
        changes: by name of a training setting, a value or a list of values.

    Raises:
        ConfigError: a setting that an update does not read, a value that cannot be, or too many.
    """
    for name in changes:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"what_if cannot change {name!r}.",
                why="It is in the batch's advantages or in the processes already, and an update "
                "does not read it."
                if name in TrainingConfig.model_fields
                else "",
                fix=did_you_mean(name, CHANGEABLE),
            )
    values = [list(v) if isinstance(v, (list, tuple)) else [v] for v in changes.values()]
    chosen = [dict(zip(changes, each, strict=True)) for each in itertools.product(*values)]
    if not changes or not chosen:
        raise ConfigError(
            "There is nothing to try.", fix="name a setting: session.what_if(lr=[1e-5, 1e-4])."
        )
    if len(chosen) > MAX_VARIANTS:
        raise ConfigError(
            f"These lists make {len(chosen)} combinations; {MAX_VARIANTS} are the most.",
            fix="give fewer values, or call what_if several times.",
        )
    configured = config.training
    variants: list[UpdateVariant] = [(AS_CONFIGURED, {}, configured)]
    for changed in chosen:
        tree = config.model_dump(mode="json")
        tree["training"] |= changed
        training = SessionConfig(**tree).training
        there = configured.has_reference or config.model.lora is not None
        if training.kl_loss_coef and not there:
            raise ConfigError(
                "kl_loss_coef needs a reference model, and this session has none.",
                fix="start a session with training.kl_loss_coef above 0.",
            )
        if training not in (variant[2] for variant in variants):
            words = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in changed.items()}
            label = ", ".join(f"{name} {value}" for name, value in words.items())
            variants.append((label, changed, training))
    return variants
