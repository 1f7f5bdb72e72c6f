"""Generated files through every reader: an error of the kit's own, no end missing, no change."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.checkpoint import checkpoint, manifest
from kit.cluster.registry import Entry, find_orphans
from kit.config import SessionConfig
from kit.config.sections import DataConfig, ModelConfig
from kit.data import load_prompts
from kit.errors import KitError
from kit.lifecycle import journal
from kit.miles import import_script
from kit.models import source
from kit.reports.runs import read_record
from kit.runs.compare import compare_runs
from kit.runs.index import find_runs, sort_runs
from kit.runs.parameters import read_parameters
from kit.runs.sweep.state import read_sweep
from kit.samples import Batch, Rollout
from kit.samples.serialization import read_arrays, read_batch, read_marks, write_arrays, write_batch
from tests.cases import WHICH
from tests.runs.run_folders import make_run

EVERYTHING = WHICH == "all"
EXAMPLES = 1000 if EVERYTHING else 12
generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not EVERYTHING,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, 2**63, -1, "9" * 400, "\x1b[31m", "\ud800", "../../x", "/dev/zero"]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
raw = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"[" * 5000, b'{"a":' * 5000, b"a: &a [*a]", b"9" * 5000, b"\xff\xfe", b"\x00", b"[1, 2]",
         b'{"step": 1e999}', b"- " * 3000, b"? " * 3000, b"{" * 3000, b'"' + b"\\" * 9001]
    ),
)  # fmt: skip
kinds = st.sampled_from(["file"] * 6 + ["device", "pipe", "folder", "holes", "nowhere"])


def mutated(good: Any, data: st.DataObject) -> Any:
    """A copy of JSON with another value somewhere in it."""
    place = good = json.loads(json.dumps(good))
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None:
            return data.draw(values)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            place = inner
            continue
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(values)
        return good


def hostile(good: list[Any], data: st.DataObject) -> bytes:
    """Lines of which some are good JSON, some nearly, and some nothing of the sort."""
    lines = []
    for row in good:
        what = data.draw(st.sampled_from(["good", "mutated", "mutated", "value", "raw"]))
        if what == "raw":
            lines.append(data.draw(raw))
        else:
            changed = {"good": lambda row=row: row, "mutated": lambda row=row: mutated(row, data),
                       "value": lambda: data.draw(values)}[what]()  # fmt: skip
            lines.append(json.dumps(changed).encode())
    return b"\n".join(lines)


def put(file: Path, good: list[Any], data: st.DataObject) -> None:
    """Put something in a file's place."""
    kind = data.draw(kinds)
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        file.write_bytes(hostile(good, data))
    elif kind == "holes":
        with file.open("wb") as opened:
            opened.truncate(2**34)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def read(reader: Callable[[], object], folder: Path, *allowed: type[Exception]) -> None:
    """Read, and see that nothing else comes of it than a result or an error of the kit's own."""
    before = tree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader()
        except KitError as error:
            told = str(error)
        except allowed:
            told = ""
        else:
            told = ""
    assert len(told) < 40_000
    assert tree(folder) == before


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


FILES = ("result.json", "params.yaml", "config.yaml", "metrics.jsonl", "evaluations.jsonl",
         "samples.jsonl", "sweep.json")  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two good runs to be copied, with settings that are read in a millisecond."""
    root = tmp_path_factory.mktemp("runs")
    runs = make_run(root, 1, steps=2), make_run(root, 2, 1e-3, steps=2)
    for run in runs:
        rate = SessionConfig.load(run / "config.yaml").training.learning_rate
        (run / "config.yaml").write_text(f"training:\n  learning_rate: {rate}\n")
    return runs


@generated
@given(data=st.data())
def test_generated_run_folders_break_no_reader(
    two_runs: tuple[Path, Path], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        good, bad = (shutil.copytree(run, root / run.name) for run in two_runs)
        for name in data.draw(st.sets(st.sampled_from(FILES), min_size=1, max_size=3)):
            there = bad / name
            if name.endswith("jsonl"):
                rows = lines_of(there)[:3]
            elif name == "result.json":
                rows = [json.loads(there.read_text())]
            elif name == "sweep.json":
                rows = [{"notebook": "a.ipynb", "members": [{"number": 1, "parameters": {}}]}]
            else:
                rows = [{"seed": 1, "training": {"learning_rate": 0.1}}]
            put(there, rows, data)

        def everything() -> None:
            found = find_runs(root)
            assert good in [run.folder for run in found]
            assert bad in [run.folder for run in found] or (bad / "sweep.json").exists()
            for by in ("when", "reward", "seed", "duration", "notebook"):
                sort_runs(found, by)
            json.dumps([run.to_json() for run in found])
            compared = compare_runs([good, bad], n=2)
            str(compared).encode()

        read(everything, root)
        for reader in (read_record, read_sweep):
            read(lambda reader=reader: reader(bad), root)


@generated
@given(data=st.data())
def test_generated_samples_batches_marks_and_arrays_break_no_reader(
    two_runs: tuple[Path, Path], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, (run, _) = Path(place), two_runs
        rows = [
            {k: v for k, v in row.items() if k != "step"} for row in lines_of(run / "samples.jsonl")
        ]
        own = {"rollout": {"step": 1, "seconds": 0.5, "metrics": {"a": 1.0}, "notes": ["x"]}}
        put(root / "rollout.jsonl", [own | rows[0], rows[1]], data)
        read(lambda: str(Rollout.load(root / "rollout.jsonl")), root, FileNotFoundError)
        (root / "good.jsonl").write_text(json.dumps(rows[0]))
        samples = Rollout.load(root / "good.jsonl").samples
        write_batch(Batch(samples, (0.5,)), root / "good.json")
        put(root / "batch.json", [json.loads((root / "good.json").read_text())], data)
        read(lambda: read_batch(root / "batch.json"), root, FileNotFoundError)
        put(root / "marks", [{"label": "good", "step": 1, "prompt": "a", "reward": 0.5}], data)
        read(lambda: read_marks(root / "marks"), root, FileNotFoundError)
        write_arrays(root / "arrays", samples, {"step": 1})
        whole = (root / "arrays").read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        (root / "arrays").write_bytes(
            whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + 1 :]
        )
        read(lambda: read_arrays(root / "arrays"), root)


@generated
@given(data=st.data())
def test_generated_settings_break_no_reader(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "config.yaml")
        put(file, [SessionConfig.preset("tiny").model_dump(mode="json")], data)
        read(lambda: SessionConfig.load(file), Path(place))


@generated
@given(data=st.data())
def test_generated_notebooks_break_no_reader(data: st.DataObject) -> None:
    source = data.draw(
        st.sampled_from(["a: int = 5  # x", "a = [1,", "x: Literal[1, 2] = 1", "=" * 9, "a=\x00"])
        | st.text(max_size=40)
    )
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "a.ipynb")
        put(file, [json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))], data)

        def reader() -> None:
            for parameter in read_parameters(file).values():
                str(parameter).encode("utf-8", "surrogatepass")
                for given_ in ("1", "[" * 5000, data.draw(leaves)):
                    read(lambda p=parameter, g=given_: p.convert(g), Path(place))

        read(reader, Path(place))


SETTINGS = SessionConfig.preset("tiny").to_yaml()
STATE = {
    "step_count": 1, "weight_version": 1, "newest_version": 1, "generations": 1, "evaluated": None,
    "stream": {"epoch": 0, "position": 0, "fingerprint": "a", "name": "x", "rows": 1, "seed": 0,
               "shuffle": True},
    "inputs": {}, "changes": [], "buffer": [], "history": [{"step": 0, "a": 0.5}],
}  # fmt: skip


@generated
@given(data=st.data())
def test_generated_checkpoints_break_no_reader(data: st.DataObject) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "checkpoint")
        (folder / "trainer").mkdir(parents=True)
        number = data.draw(st.floats(width=32))
        save_file({"policy/w": np.array([number], "f4")}, folder / "trainer" / "a.safetensors")
        (folder / "trainer" / "trainer.json").write_text('{"optimizer_steps": 1, "updates": 1}')
        (folder / "config.yaml").write_text(SETTINGS)
        (folder / "state.json").write_text(json.dumps(STATE))
        name = data.draw(
            st.sampled_from(["state.json", "config.yaml", "trainer/trainer.json", "run.json",
                             "trainer/a.safetensors", "last_rollout.jsonl", "last_batch.json"])
        )  # fmt: skip
        (folder / name).unlink(missing_ok=True)
        good = {"state.json": STATE, "trainer/trainer.json": {"optimizer_steps": 1, "updates": 1}}
        (folder / name).write_bytes(hostile([good.get(name, {"a": [1]})], data))
        manifest.seal(folder, "checkpoint", {"session": "a", "step": 1})
        if data.draw(st.booleans()):
            there = folder / data.draw(st.sampled_from(["manifest.json", name]))
            put(there, [json.loads((folder / "manifest.json").read_text())], data)
        read(lambda: checkpoint.read(folder), folder)
        read(lambda: checkpoint.run_note(folder), folder)
        read(lambda: manifest.peek(folder), folder)


@generated
@given(data=st.data())
def test_generated_models_and_prompts_break_no_reader(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, model = Path(place), Path(place, "model")
        model.mkdir()
        config = json.loads((source.TINY_DIRECTORY / "config.json").read_text())
        name = data.draw(st.sampled_from(["config.json", "generation_config.json", source.INDEX,
                                          "model.safetensors"]))  # fmt: skip
        (model / "config.json").write_text(json.dumps(config))
        put(model / name, [config], data)
        read(lambda: source.find(ModelConfig(name=str(model))), root)
        read(lambda: source.ModelShape.read(model), root)
        file = root / f"rows.{data.draw(st.sampled_from(['jsonl', 'json', 'csv', 'tsv']))}"
        put(file, [{"prompt": "1+1=", "label": "2", "metadata": {"a": 1}}] * 2, data)
        read(lambda: load_prompts(DataConfig(source=str(file)), split="train", model_name="tiny",
                                  seed=0), root)  # fmt: skip


@generated
@given(data=st.data())
def test_generated_journals_registries_and_scripts_break_no_reader(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in ("start.json", "state.json"):
            put(root / "session" / name, [{"format": 1, "now": {}}], data)
        read(lambda: journal.started_with(root), root)
        read(lambda: journal.noted(root), root)
        row = {"stack": "a", "name": "b", "head": 1, "head_started": "x", "host": "h",
               "directory": "/tmp", "token": "t", "device": "cpu", "created": 1.0}  # fmt: skip
        put(root / "a.json", [row], data)
        read(lambda: Entry.read(root / "a.json"), root)
        put(root / "identity.json", [["kit-no-such-stack", 2**30, "x"]], data)
        read(lambda: find_orphans(root), root)
        put(root / "script.sh", [], data)
        if (root / "script.sh").is_file():
            script = data.draw(
                st.sampled_from([b"python3 train.py --lr 1", b"source $X", b"$(", b"'"])
            )
            (root / "script.sh").write_bytes(script + data.draw(raw))
        read(lambda: import_script(root / "script.sh"), root)


def test_what_is_generated_reaches_the_readers() -> None:
    """The good files that the others change are read without any error."""
    with tempfile.TemporaryDirectory() as place:
        make_run(Path(place), 1, steps=2)
        assert not find_runs(place)[0].faults
        with pytest.raises(KitError):
            SessionConfig.load(place)
