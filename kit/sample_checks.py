"""What has to hold of a sample and of a batch, checked when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.errors import DataError

if TYPE_CHECKING:
    from kit.samples import Batch, Sample


def check_sample(sample: Sample) -> None:
    """Refuse spans and values that do not fit the response. Raises DataError."""
    lengths = sample.version_lengths
    if lengths and (
        len(lengths) != len(sample.weight_versions)
        or min(lengths) < 1
        or sum(lengths) != sample.response_length
    ):
        raise DataError(
            f"version_lengths {lengths} does not part {sample.response_length} response tokens "
            f"among the weight_versions {sample.weight_versions}.",
            fix="give one length of 1 or more for each version, together response_length; or "
            "leave version_lengths empty where one version wrote all.",
        )
    for name, values in sample.token_values.items():
        if len(values) != sample.response_length:
            raise DataError(
                f"token_values[{name!r}] has {len(values)} numbers for {sample.response_length} "
                "response tokens.",
                fix="give one number for each response token.",
            )
    if len(sample.annotated_versions) > 2:
        raise DataError(
            f"annotated_versions holds more than two weight versions: {sample.annotated_versions}.",
            fix="give those of trainer_log_prob_before and trainer_log_prob, or fewer.",
        )


def check_batch(batch: Batch) -> None:
    """Refuse numbers that are not one a sample, or one a token. Raises DataError."""
    if len(batch.samples) != len(batch.advantages):
        raise DataError(
            f"A batch needs one advantage per sample: got {len(batch.samples)} samples and "
            f"{len(batch.advantages)} advantages."
        )
    for name in ("token_advantages", "values", "returns"):
        rows = getattr(batch, name)
        lengths = [s.response_length for s in batch.samples]
        if rows is not None and [len(row) for row in rows] != lengths:
            raise DataError(
                f"{name} needs one number for each response token of each sample: got "
                f"{[len(row) for row in rows][:8]}, the responses have {lengths[:8]} tokens."
            )
