"""What a person says of samples: good, bad, odd, and a note. Plain records, kept as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.errors import DataError
from kit.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One sample's mark. It carries what was marked, so that it means something by itself."""

    label: str = ""
    """`good`, `bad`, `odd`; empty where there is only a note."""
    note: str = ""
    step: int = 0
    """The training step whose weights wrote the sample."""
    group_index: int = 0
    index: int = 0
    """The sample's place in its rollout."""
    prompt: str = ""
    response: str = ""
    reward: float | None = None

    @classmethod
    def of(cls, sample: Sample, step: int, label: str = "", note: str = "") -> Mark:
        """A mark of this sample."""
        return cls(
            label=label,
            note=note,
            step=step,
            group_index=sample.group_index,
            index=sample.index,
            prompt=sample.prompt_text,
            response=sample.response,
            reward=sample.reward,
        )

    def fits(self, sample: Sample) -> bool:
        """Is it a mark of this sample? The reward may be another by now, the words may not."""
        return (self.group_index, self.index, self.prompt, self.response) == (
            sample.group_index,
            sample.index,
            sample.prompt_text,
            sample.response,
        )


def write_marks(marks: Iterable[Mark], path: str | Path) -> Path:
    """Write one JSON line a mark."""
    target = Path(path)
    lines = (json.dumps(asdict(mark)) + "\n" for mark in marks)
    target.write_text("".join(lines), encoding="utf-8")
    return target


def read_marks(path: str | Path) -> list[Mark]:
    """Read what `write_marks` wrote. Raises DataError with the number of a line that is broken."""
    marks = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                marks.append(Mark(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not a mark: {error}") from error
    return marks


def marks_table(marks: Iterable[Mark]) -> Any:
    """One row a mark, as a pandas table."""
    import pandas as pd

    names = list(Mark.__dataclass_fields__)
    # As objects, because pandas' own text has no place for the half of a surrogate pair.
    table = pd.DataFrame([asdict(mark) for mark in marks], columns=names, dtype=object)
    return table.astype({"step": int, "group_index": int, "index": int, "reward": float})
