"""`load_prompts`: every notation of `data.source`, down to one validated set.

    prompts.jsonl, .json, .csv, .parquet     a file; also .ndjson, .tsv, and packed: .jsonl.gz
    some/directory                           saved by `datasets`, or a folder of such files
    tiny:addition                            a task of the model that ships with the kit
    reasoning_gym:gsm_symbolic               a task that reasoning-gym generates
    openai/gsm8k:main                        a dataset of the Hugging Face hub, its configuration

After any of them, `@[0:1000]` takes only these rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from kit.config import SHIPPED, TINY, DataConfig
from kit.data import readers
from kit.data.prompts import PromptSet, Record, check_rows
from kit.data.reasoning_gym import GymRows
from kit.errors import DataError, did_you_mean
from kit.tiny import tasks

if TYPE_CHECKING:
    from datasets import Dataset


Split = Literal["train", "eval"]
Override = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""A source in the notation of the settings, or rows in memory."""

_TASK = re.compile(r"(\w+):(.*)", re.DOTALL)
_SLICE = re.compile(r"\s*(-?\d[\d_]*)?\s*:\s*(-?\d[\d_]*)?\s*")
_KINDS = ("tiny", "reasoning_gym")


@overload
def load_prompts(
    config: DataConfig,
    *,
    split: Literal["train"],
    model_name: str = TINY,
    seed: int = 0,
    override: Override | Dataset | None = None,
) -> PromptSet: ...


@overload
def load_prompts(
    config: DataConfig,
    *,
    split: Split,
    model_name: str = TINY,
    seed: int = 0,
    override: Override | Dataset | None = None,
) -> PromptSet | None: ...


def load_prompts(
    config: DataConfig,
    *,
    split: Split,
    model_name: str = TINY,
    seed: int = 0,
    override: Override | Dataset | None = None,
) -> PromptSet | None:
    """Load the training prompts, or the held-out ones (None if the settings have none).

    Args:
        config: sources, and which fields of a row hold what.
        split: `train` takes `config.source`, `eval` takes `config.eval_source`.
        model_name: what an empty `config.source` goes by: the tiny model gets tiny:addition,
            any other reasoning_gym:gsm_symbolic.
        seed: of the rows that reasoning-gym generates for training.
        override: takes the place of the configured source: another source in the same notation,
            a list of rows, a table of pandas, Polars or Arrow, or a `datasets.Dataset`.

    Raises DataError for a source that is not there, and for the first row that is malformed.
    """
    if override is not None and not isinstance(override, (str, os.PathLike)):
        return _in_memory(override, split, config)
    source = str(override) if override is not None else _configured(config, split, model_name)
    if source is None:
        return None
    name, window = _split_slice(source)
    prompts = _load(name, window, config, split, seed, source)
    if not prompts:
        if window == slice(None):
            raise DataError(f"{source} has no rows.", fix="point data.source at one that has.")
        raise DataError(
            f"The slice of {source!r} is empty.",
            fix="ends count rows from 0, and negative ones from the end; try @[0:100].",
        )
    return prompts


def load_held_out(
    config: DataConfig,
    *,
    model_name: str = TINY,
    seed: int = 0,
    override: Any = None,
) -> tuple[PromptSet, ...]:
    """Load the held-out sets: one, several under the names that they are given, or none.

    Args:
        config: sources, and which fields of a row hold what.
        model_name: as for `load_prompts`.
        seed: as for `load_prompts`.
        override: takes the place of `config.eval_source`: what `load_prompts` takes, or a mapping
            from names to that.

    Raises DataError as `load_prompts` does, with the set's name where there are several.
    """
    named = config.eval_source if override is None else _by_name(override, config)
    if not isinstance(named, Mapping):
        one = load_prompts(
            config, split="eval", model_name=model_name, seed=seed, override=override
        )
        return () if one is None else (one,)
    sets = []
    for name, source in named.items():
        try:
            prompts = load_prompts(
                config, split="eval", model_name=model_name, seed=seed, override=source
            )
        except DataError as error:
            raise DataError(f"{name}: {error.what}", why=error.why, fix=error.fix) from None
        assert prompts is not None  # a source was given
        sets.append(replace(prompts, name=name))
    return tuple(sets)


def _by_name(data: Any, config: DataConfig) -> Mapping[str, Any] | None:
    """Data as several sets by name, if that is what it is: no columns, no splits of one dataset."""
    if not isinstance(data, Mapping) or config.input_key in data or not data:
        return None
    return None if set(data) <= {"train", *readers.EVAL_SPLITS} else data


def eval_sources(config: DataConfig) -> dict[str, DataConfig]:
    """Settings of each held-out set by its name, each with that one source; a single one is ''."""
    sources = config.eval_source
    if not isinstance(sources, Mapping):
        return {"": config}
    one = {name: {"eval_source": source} for name, source in sources.items()}
    return {name: config.model_copy(update=update) for name, update in one.items()}


def hub_source(config: DataConfig, *, split: Split, model_name: str = TINY) -> str | None:
    """`owner/name:configuration` if the settings name a dataset of the hub, else None."""
    name, _ = _split_slice(_configured(config, split, model_name) or "")
    here = Path(name).expanduser().exists()
    return name if not here and readers.looks_like_hub_name(name) else None


def _configured(config: DataConfig, split: str, model_name: str) -> str | None:
    """The source that the settings name for a split; None for no evaluation."""
    source = config.source
    if not source:
        source = "tiny:addition" if model_name in SHIPPED else "reasoning_gym:gsm_symbolic"
    if split == "train":
        return source
    if isinstance(config.eval_source, Mapping):  # `load_held_out` reads them all
        return next(iter(config.eval_source.values()))
    if config.eval_source:
        return config.eval_source
    name, _ = _split_slice(source)
    return name if name.startswith(tuple(f"{kind}:" for kind in _KINDS)) else None


def _split_slice(source: str) -> tuple[str, slice]:
    """Split `train.jsonl@[0:10]` into path and slice."""
    name, mark, inside = source.rpartition("@[")
    if not mark:
        return source, slice(None)
    ends = _SLICE.fullmatch(inside[:-1]) if inside.endswith("]") else None
    if ends is None:
        raise DataError(
            f"The slice at the end of {source!r} cannot be read.",
            fix="write @[first:end] with whole numbers, either of which may be left out: "
            "@[0:1000], @[:100], @[-50:].",
        )
    first, end = (None if text is None else int(text) for text in ends.groups())
    return name, slice(first, end)


def _load(
    name: str, window: slice, config: DataConfig, split: Split, seed: int, source: str
) -> PromptSet:
    task = _TASK.fullmatch(name)
    if task and task[1] == "tiny":
        return _tiny(task[2], window, split, source)
    if task and task[1] == "reasoning_gym":
        size = config.size if split == "train" else config.eval_size
        rows = GymRows(task[2], split, size, seed, window)
        return PromptSet(task[2], rows, source, "reasoning_gym", None, rows.fingerprint)
    path = Path(name).expanduser()
    if not path.exists():
        _explain_unknown(name, task)
    if not path.exists() and readers.looks_like_hub_name(name):
        records = readers.read_hub(name, split, window)
        short_name = name.partition(":")[0].rpartition("/")[2]
    else:
        records = readers.read_path(path, split, window)
        short_name = path.resolve().stem if path.is_file() else path.resolve().name
    return _checked(records, config, short_name, source)


def _tiny(task: str, window: slice, split: Split, source: str) -> PromptSet:
    if task not in tasks.TASKS:
        raise DataError(f"There is no tiny task {task!r}.", fix=did_you_mean(task, tasks.TASKS))
    raw = tasks.rows(task, "train" if split == "train" else "held_out")
    numbered = list(enumerate(raw, start=1))[window]
    records = [Record(f"{source}, row {n}", n, row) for n, row in numbered]
    facts = tasks.TASKS[task]
    rows = check_rows(records, DataConfig())
    return PromptSet(task, rows, source, facts.reward, facts.max_response_tokens)


def _in_memory(rows: Any, split: Split, config: DataConfig) -> PromptSet:
    """Prompts from a list of mappings, a table, a `datasets.Dataset`, or a `DatasetDict`."""
    if isinstance(rows, Mapping) and config.input_key in rows:
        rows = _rows_of_columns(rows)
    elif isinstance(rows, Mapping):
        rows = readers.pick_split(rows, split, "The dataset")
    if (table := readers.table_rows(rows)) is not None:
        records = readers.read_rows(table, slice(None))
    elif hasattr(rows, "with_format") and hasattr(rows, "select") and hasattr(rows, "__len__"):
        records = readers.read_dataset(rows, "the dataset", slice(None))
    elif hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        records = readers.read_rows([rows[i] for i in range(len(rows))], slice(None))
    else:
        raise DataError(
            f"Prompts cannot be read from a {type(rows).__name__}.",
            fix="give a list of mappings, a table of pandas, Polars or Arrow, a datasets.Dataset, "
            "or a source such as 'prompts.jsonl'; of what has no end, take the first: "
            "list(itertools.islice(rows, 1000)).",
        )
    if not records:
        raise DataError("The list of prompts is empty.", fix="give at least one row.")
    return _checked(records, config, "in_memory", "")


def _rows_of_columns(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of a mapping from each field to all its values, as `table.to_dict("list")` gives it."""
    lengths = {str(name): len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"The columns of the data have different lengths: {lengths}.",
            fix="give each field one value a row.",
        )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _checked(records: Sequence[Record], config: DataConfig, name: str, source: str) -> PromptSet:
    rows = check_rows(records, config)
    # Labels of GSM8K are whole solutions, which end in `#### N`.
    solutions = bool(rows) and all("####" in str(row.label) for row in rows)
    return PromptSet(name, rows, source, "gsm8k" if solutions else "exact")


def _explain_unknown(name: str, task: re.Match[str] | None) -> None:
    """Raise DataError for a source that looks like a task but is not written as one."""
    if task:
        raise DataError(
            f"There is no kind of source {task[1]!r} (in {name!r}).",
            fix=f"{did_you_mean(task[1], _KINDS)} Files are given by their path alone.",
        )
    if name in tasks.TASKS:
        raise DataError(
            f"There is no file or directory {str(Path(name).resolve())!r}.",
            fix=f"did you mean the task 'tiny:{name}'?",
        )
