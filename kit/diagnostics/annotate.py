"""`session.annotate`: the trainer's numbers for each token, put into the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from kit.errors import SessionError
from kit.rollout.batch import replayed, train_batch
from kit.samples import Batch, Rollout, Sample

if TYPE_CHECKING:
    from kit.config import TrainingConfig
    from kit.stack.stack import Stack


Annotated = TypeVar("Annotated", Sample, Rollout, Batch)
NOW, BEFORE = "trainer_log_prob", "trainer_log_prob_before"


def annotate(
    stack: Stack, what: Annotated, version: int, token_text: Callable[[int], str]
) -> Annotated:
    """Add what the present weights say of each token to a sample, rollout or batch.

    Args:
        stack: of a running session.
        what: samples without a response are left as they are.
        version: of the weights that the trainer holds.
        token_text: a token id as text.

    Raises:
        SessionError: it is none of the three.
    """

    def filled(samples: Sequence[Sample], values: Mapping[str, Any]) -> list[Sample]:
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        pairs = zip(samples, rows, strict=True)
        return [_filled(sample, row, version, token_text) for sample, row in pairs]

    training = stack.settings.config.training
    if isinstance(what, Batch):
        if not what.samples:
            return what
        values = stack.probe("annotate_batch", train_batch(what, training), what.id)
        return replace(what, samples=tuple(filled(what.rollout.samples, values)))
    if not isinstance(what, (Sample, Rollout)):
        raise SessionError(
            f"annotate needs a rollout, a batch or a sample, got {type(what).__name__}.",
            fix="pass what `session.generate()` or `session.advantages(...)` returned.",
        )
    samples = [what] if isinstance(what, Sample) else what.samples
    written = [s for s in samples if s.response_length]
    if not written:
        return what
    values = stack.probe("annotate_samples", as_compared(written, training))
    answers = iter(filled(written, values))
    done = [next(answers) if s.response_length else s for s in samples]
    return done[0] if isinstance(what, Sample) else what.with_samples(done)


def as_scored(samples: Sequence[Sample], training: TrainingConfig) -> Any:
    """Samples as the trainer computes them: their tokens, and the experts that it replays."""
    from kit.trainer.probes import Samples

    tokens, lengths = [s.tokens for s in samples], [s.response_length for s in samples]
    return Samples(tokens, lengths, replayed(samples, training))


def as_compared(samples: Sequence[Sample], training: TrainingConfig) -> Any:
    """Samples with the records that there are, followed or not as the settings say."""
    from kit.samples.experts import records

    follows = training.use_rollout_routing_replay
    return replace(as_scored(samples, training), experts=records(samples), followed=follows)


def _filled(
    sample: Sample, values: dict[str, list[float]], version: int, token_text: Callable[[int], str]
) -> Sample:
    """Add values to a sample; log-probs of earlier weights are kept as the ones before."""
    kept, versions = dict(sample.token_values), sample.annotated_versions
    if versions and versions[-1] != version and NOW in kept:
        kept[BEFORE] = kept[NOW]
        versions = [versions[-1], version]
    elif not versions:
        versions = [version]
    metadata = sample.metadata
    if metadata.get("token_texts") is None:
        metadata = metadata | {"token_texts": [*map(token_text, sample.response_tokens)]}
    return replace(
        sample, token_values=kept | values, annotated_versions=versions, metadata=metadata
    )
