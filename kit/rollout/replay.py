"""`session.replay`: loads a recorded rollout into a running session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.errors import DataError
from kit.rollout.response import ResponseReader
from kit.samples import Rollout, Sample
from kit.tracking.run_files import SAMPLES, RunFiles, told
from kit.tracking.run_folder import find_run
from kit.utils.formatting import shorten


def replay(run: str | Path, step: int | None, reader: ResponseReader, model_name: str) -> Rollout:
    """Load the rollout of a recorded step, with its rewards.

    Raises:
        RunError: there is no such run.
        DataError: the run kept no samples, not those of this step, or another tokenizer wrote them.
    """
    folder = find_run(run)
    rows, step = _rows(folder, step)
    samples = [_sample(row, folder, step) for row in rows]
    _check_tokens(samples, folder, reader, model_name)
    # Versions count the updates of one session; to this one they would mean other weights.
    samples = [replace(s, weight_versions=[], version_lengths=[]) for s in samples]
    return Rollout(samples, step, notes=(f"recorded in step {step} of the run {folder.name}",))


def _rows(folder: Path, step: int | None) -> tuple[list[dict[str, Any]], int]:
    file = folder / SAMPLES
    by_step: dict[int, list[dict[str, Any]]] = {}
    files = RunFiles(folder)
    for of, row in files.samples():
        by_step.setdefault(of, []).append(row)
    if not by_step:
        raise DataError(
            f"The run {folder.name} has kept no samples"
            + (" that can be read." if files.faults else "."),
            why=f"{told(files.faults)}." if files.faults else f"There is nothing in {file}.",
            fix="run it again with `kit run --samples-every 10`, or a smaller number.",
        )
    step = max(by_step) if step is None else step
    if step not in by_step:
        kept = [str(number) for number in sorted(by_step)]
        listed = kept if len(kept) <= 20 else [*kept[:10], "...", kept[-1]]
        raise DataError(
            f"The run {folder.name} has kept no samples of step {step}.",
            why=f"It kept those of the steps {', '.join(listed)}.",
            fix="name one of these; `kit run --samples-every N` says how many are kept.",
        )
    return by_step[step], step


def _sample(row: dict[str, Any], folder: Path, step: int) -> Sample:
    try:
        sample = Sample.from_dict(row)
        if not sample.response_length <= len(sample.tokens):
            raise DataError("A response has more tokens than there are.")
        return sample
    except DataError as error:
        raise DataError(
            f"The samples of step {step} in {folder.name} cannot be read: {error}",
            fix="they were changed, or written by another version of the kit.",
        ) from error


def _check_tokens(
    samples: list[Sample], folder: Path, reader: ResponseReader, model_name: str
) -> None:
    """Raise DataError if the samples were generated with another tokenizer."""
    size = reader.vocabulary
    strange = next((token for s in samples for token in s.tokens if not 0 <= token < size), None)
    why = ""
    if strange is not None:
        why = f"It holds token {strange}; this session's model has {size} tokens."
    else:
        for sample in samples:
            if not reader.could_read(sample.response_tokens, sample.response):
                text = reader.tokenizer.decode(sample.response_tokens)
                why = f"It reads {text[:40]!r} where {sample.response[:40]!r} was written."
                break
    if not why:
        return
    model = _model(folder)
    raise DataError(
        f"The rollout of {folder.name} was written with another tokenizer than this session's.",
        why=f"{why} The run's model is {model}, the session's {model_name}.",
        fix=f"start a session with model.name: {model}.",
    )


def _model(folder: Path) -> str:
    try:
        return shorten(str(RunFiles(folder).settings()["model"]["name"]), 200)
    except (KeyError, TypeError):
        return "unknown"
