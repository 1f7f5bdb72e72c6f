"""Files, directories and hub names to records, before any row is checked.

JSONL, JSON and CSV are read as they are written: a typed table would turn the label "007" into 7
and fill every row's metadata with the keys of all others. Parquet and saved datasets are typed
already and go through `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.data.plain import without_gaps
from kit.data.prompts import Record
from kit.errors import DataError
from kit.utils.formatting import data_size
from kit.utils.reading import LINES, UnreadableError, open_regular, parse_json, read_bytes

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


EVAL_SPLITS = ("eval", "test", "validation", "valid", "val", "dev", "held_out", "heldout")
"""Names under which held-out rows are kept, the first one that exists is taken."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def looks_like_hub_name(source: str) -> bool:
    """Whether `owner/name` or `owner/name:config` could be meant, and no local file."""
    return (
        _HUB_NAME.fullmatch(source) is not None
        and not kind_of(Path(source))
        and not Path(source).parent.is_dir()
    )


def read_path(path: Path, split: str, window: slice) -> list[Record]:
    """The records of a file or directory. Raises DataError if it is missing or unreadable."""
    if path.is_dir():
        return _read_directory(path, split, window)
    if not path.exists():
        raise _missing(path)
    return _reader(path)([path], window)


def read_dataset(dataset: Dataset, origin: str, window: slice) -> list[Record]:
    """The records of a `datasets.Dataset`; rows outside the window are not touched.

    Its format (NumPy, torch) is left aside: rows are Python's own values.
    """
    wanted = range(len(dataset))[window]
    rows = dataset.with_format(None).select(wanted)
    return [
        Record(f"{origin}, row {number}", number, row)
        for number, row in zip((n + 1 for n in wanted), rows, strict=True)
    ]


def table_rows(table: Any) -> list[dict[str, Any]] | None:
    """Rows of a table in memory: of pandas, Polars or Arrow; None for anything else.

    Empty cells are left out: pandas fills them with NaN.
    """
    if hasattr(table, "to_pylist"):  # Arrow
        rows = table.to_pylist(maps_as_pydicts="lossy")
    elif hasattr(table, "to_dicts"):  # Polars
        rows = table.to_dicts()
    elif hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas
        rows = table.to_dict("records")
    else:
        return None
    return [without_gaps(row) for row in rows]


def read_rows(rows: Sequence[Any], window: slice) -> list[Record]:
    """The records of a list in memory, numbered from 0."""
    return [
        Record(f"row {number} (index {number - 1})", number, _not_text(row))
        for number, row in list(enumerate(rows, start=1))[window]
    ]


def pick_split(splits: DatasetDict | Mapping[str, Dataset], split: str, origin: str) -> Dataset:
    """The training rows, or the held-out ones, of a dataset with several splits."""
    wanted = _names_of(split)
    for name in wanted:
        if name in splits:
            return splits[name]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(
        f"{origin} has no {split} split. Its splits: {', '.join(map(str, splits))}.",
        fix=f"name one of {', '.join(wanted)}, or point at the folder of a single split.",
    )


def _names_of(split: str) -> tuple[str, ...]:
    return ("train",) if split == "train" else EVAL_SPLITS


def read_hub(name: str, split: str, window: slice) -> list[Record]:
    """The records of a dataset on the Hugging Face hub, or in its local cache."""
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    folder = repository.rpartition("/")[2]
    try:
        splits = load_dataset(repository, config or None)
    except Exception as error:  # every layer below the hub raises kinds of its own
        raise DataError(
            f"The dataset {name!r} cannot be loaded from the Hugging Face hub.",
            why=f"{type(error).__name__}: {_first_line(error)} (There is no local file or "
            f"directory {str(Path(repository).resolve())!r} either.)",
            fix="check the name (a configuration follows a colon: openai/gsm8k:main) and the "
            "network; or, where there is a network, run `hf download --repo-type dataset "
            f"{repository} --local-dir {folder}` and set data.source to "
            f"{f'{folder}/{config}, or to where its files are' if config else folder}.",
        ) from error
    return read_dataset(pick_split(splits, split, name), name, window)


def _read_directory(path: Path, split: str, window: slice) -> list[Record]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path, split, window)
    files = sorted(f for f in path.rglob("*") if kind_of(f) and f.is_file())
    # JSON beside another kind is a description, not data.
    files = [f for f in files if kind_of(f) != ".json"] or files
    if not files:
        raise DataError(
            f"The directory {str(path.resolve())!r} holds no dataset.",
            why=f"It was not saved by `datasets`, and has no file of {_supported()}.",
            fix="point data.source at the directory that has them, or at one file.",
        )
    files = _files_of_split(files, split)
    kinds = sorted({kind_of(f) for f in files})
    if len(kinds) > 1:
        raise DataError(
            f"The directory {str(path.resolve())!r} mixes {' and '.join(kinds)} files.",
            fix="point data.source at one of the files, or keep one kind in the directory.",
        )
    return _reader(files[0])(files, window)


def _read_saved(path: Path, split: str, window: slice) -> list[Record]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # a damaged directory fails in Arrow, JSON or file errors alike
        raise DataError(
            f"The saved dataset {str(path.resolve())!r} cannot be read.",
            why=f"{type(error).__name__}: {_first_line(error)}",
            fix="save it again with `dataset.save_to_disk(...)`.",
        ) from error
    if isinstance(saved, DatasetDict):
        saved = pick_split(saved, split, str(path))
    return read_dataset(saved, str(path), window)


def _files_of_split(files: list[Path], split: str) -> list[Path]:
    """Files whose names begin with the split's; all of them where none does."""
    names = _names_of(split)
    return [f for f in files if f.stem.lower().startswith(names)] or files


def _read_jsonl(files: Sequence[Path], window: slice) -> list[Record]:
    lines: list[Record] = []
    for file in files:
        for number, line in enumerate(_text(file).split("\n"), start=1):
            if line.strip():
                lines.append(Record(f"{file}, line {number}", number, line))
    return lines[window]


def _read_json(files: Sequence[Path], window: slice) -> list[Record]:
    records: list[Record] = []
    for file in files:
        text = _text(file)
        try:
            rows = parse_json(text)
        except ValueError as error:
            if text.lstrip().startswith("{") and "Extra data" in str(error):
                records += _read_jsonl([file], slice(None))  # one object a line
                continue
            raise DataError(
                f"{file} cannot be read: {error}.",
                fix="write a list of objects, or one object a line.",
            ) from None
        inside = list(rows.values()) if isinstance(rows, dict) else []
        if len(inside) == 1 and isinstance(inside[0], list):
            rows = inside[0]  # {"data": [...]}
        if not isinstance(rows, list):
            raise DataError(
                f"{file} holds a {type(rows).__name__}, not a list of rows.",
                fix='write [{"prompt": "...", "label": "..."}, ...].',
            )
        records += [
            Record(f"{file}, row {number}", number, _not_text(row))
            for number, row in enumerate(rows, start=1)
        ]
    return records[window]


def _read_csv(files: Sequence[Path], window: slice) -> list[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    records: list[Record] = []
    for file in files:
        mark = "\t" if kind_of(file) == ".tsv" else ","
        reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=mark)
        try:
            _check_header(file, reader.fieldnames or ())
            for number, row in enumerate(reader, start=1):
                cells = {key: cell for key, cell in row.items() if key is not None and cell}
                records.append(Record(f"{file}, row {number}", number, cells))
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not CSV: {error}.") from None
    return records[window]


_LONGEST_CELL = 1 << 30
"""Characters; Python's own limit is 131,072, fewer than a long prompt has."""


def _check_header(file: Path, names: Sequence[str]) -> None:
    """Raise DataError for a header that names a field twice, or is separated by something else."""
    if len(names) == 1 and (mark := next((m for m in ";\t|" if m in names[0]), "")):
        raise DataError(
            f"{file}: the fields of its header are separated by {mark!r}: {names[0]!r}.",
            fix="separate them by commas, or by tabs in a file that ends in .tsv.",
        )
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise DataError(
            f"{file}: its header has the field {twice[0]!r} more than once.",
            fix="give each column a name of its own.",
        )


def _read_parquet(files: Sequence[Path], window: slice) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{str(file.resolve())!r} cannot be read as Parquet.",
                why=_first_line(error),
                fix="check that the file is whole; `pandas.read_parquet(...)` reads what is.",
            ) from error
    origin = str(files[0] if len(files) == 1 else files[0].parent)
    table = pa.concat_tables(tables, promote_options="permissive")
    wanted = range(len(table))[window]
    rows = table.take(list(wanted)).to_pylist(maps_as_pydicts="lossy")
    return [
        Record(f"{origin}, row {number + 1}", number + 1, row)
        for number, row in zip(wanted, rows, strict=True)
    ]


_READERS: dict[str, Callable[[Sequence[Path], slice], list[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
_PACKED = ".gz"


def kind_of(path: Path) -> str:
    """Ending of a file that says how to read it, in small letters, without `.gz`; "" if none."""
    names = [suffix.lower() for suffix in path.suffixes[-2:]]
    if names and names[-1] == _PACKED:
        names.pop()
    return names[-1] if names and names[-1] in _READERS else ""


def _reader(path: Path) -> Callable[[Sequence[Path], slice], list[Record]]:
    if kind := kind_of(path):
        return _READERS[kind]
    raise DataError(
        f"{str(path.resolve())!r} is of a kind that cannot be read: "
        f"{path.suffix or 'no extension'}.",
        fix=f"convert it to one of {_supported()}, or save it with `datasets`.",
    )


def _supported() -> str:
    return f"{', '.join(_READERS)} (packed, too: {_PACKED})"


def _missing(path: Path) -> DataError:
    folder = path.resolve().parent
    if not folder.is_dir():
        fix = f"the folder {str(folder)!r} does not exist either: check the path."
    else:
        items = sorted(folder.iterdir())
        data = [item.name for item in items if kind_of(item)]
        folders = [item.name for item in items if item.is_dir()]
        near = difflib.get_close_matches(path.name, data + folders, n=3, cutoff=0.6)
        if near:
            fix = f"did you mean {' or '.join(repr(name) for name in near)}?"
        elif data:
            fix = f"that folder has: {', '.join(data[:5])}."
        else:
            fix = "check data.source; that folder has no data files at all."
    return DataError(f"There is no file or directory {str(path.resolve())!r}.", fix=fix)


def _text(file: Path) -> str:
    try:
        packed = file.suffix.lower() == _PACKED
        data = _unpacked(file) if packed else read_bytes(file, LINES)
    except (OSError, EOFError, zlib.error, UnreadableError) as error:
        raise DataError(f"{file} cannot be read.", why=str(error)) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: byte {error.start} is {data[error.start]:#x}.",
            fix="save it as UTF-8.",
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unpacked(file: Path) -> bytes:
    """Bytes of a packed file, at most as many as are read of one that is not packed."""
    with open_regular(file) as packed, gzip.open(packed) as opened:
        data = opened.read(LINES + 1)
    if len(data) > LINES:
        raise UnreadableError(f"unpacked it has more than {data_size(LINES)}")
    return data


def _not_text(row: Any) -> Any:
    """Wrap a bare string of a list, so that it is not parsed like a line of a JSONL file."""
    return [row] if isinstance(row, str) else row


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no further words"])[0]
