"""`Journal`: state that a session writes after every verb, so that another process can continue it.

Weights and optimizer live in the trainers. What the notebook's own process knows (counters, place
in the data, buffer, metrics, last rollout, settings, its half of snapshots) is noted in the stack's
folder, in one move, and is gone with it. An update changes both sides, and a kernel can be killed
between the two; so before one, it is also written down what will hold once the trainers have made
it:

    generate, score ── note ──►  now
    update ── before ─────────►  now, then (if the trainers have made update X)
    the update is made; its driver may be killed here
    ── note ──────────────────►  now

Whoever attaches asks the trainers which update was their last, and knows which of both holds. A
step counts as one verb: killed before its update, it has not begun; killed after, it is completed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import SessionError
from kit.samples import Rollout, serialization
from kit.utils.files import replace_file
from kit.utils.reading import parse_json, read_lines, read_object

if TYPE_CHECKING:
    from kit.checkpoint.snapshots import SnapshotStore
    from kit.checkpoint.state import TrainState, WeightVersions
    from kit.reports.status import Snapshot
    from kit.samples import Batch


FOLDER = "session"
FORKS = "forks"
STATE = "state.json"
START = "start.json"
SNAPSHOT = "snapshot"
FORMAT = 1


class Journal:
    """Journal of one session, in a folder of its own. It never stops the session."""

    def __init__(
        self,
        directory: Path,
        state: TrainState,
        versions: WeightVersions,
        snapshots: SnapshotStore,
    ) -> None:
        self._state, self._versions, self._snapshots = state, versions, snapshots
        self.folder = directory / FOLDER
        self.folder.mkdir(exist_ok=True, parents=True)
        self._now: dict[str, Any] = {}
        self._kept: dict[str, tuple[Any, str]] = {}
        """By kind: what was written last, and into which file."""
        self._files = max(map(_number, self.folder.iterdir()), default=0)
        self._rows: list[Any] = []
        """The rows of metrics that are in the file."""
        self._failed = False

    def start(self, what: dict[str, Any]) -> None:
        """Write what does not change, in JSON's types."""
        self._guarded(lambda: replace_file(self.folder / START, json.dumps(what)))

    def note(self) -> None:
        """Write the state of the session, between two verbs."""

        def write() -> None:
            self._now = self._row()
            self._put({"format": FORMAT, "now": self._now})

        self._guarded(write)

    def before_update(self, batch: Batch, *, in_step: bool) -> None:
        """Write the state that the session will have once this update is made."""

        def write() -> None:
            row = self._row()
            newest = row["newest_version"] + 1
            after = {"step_count": row["step_count"] + 1, "weight_version": newest}
            then = {
                "update": batch.id,
                "in_step": in_step,
                "state": row | after | {"newest_version": newest},
                "samples": len(batch),
                "tokens": sum(len(sample.tokens) for sample in batch.samples),
                "left_out": list(batch.left_out),
            }
            self._put({"format": FORMAT, "now": self._now or row, "then": then})

        self._guarded(write)

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, TypeError, ValueError) as error:
            # Older notes would let a session be attached at a step that is past. What was being
            # written may be half a file, so everything is written anew the next time.
            (self.folder / STATE).unlink(missing_ok=True)
            self._now, self._kept = {}, {}
            if not self._failed:
                warnings.warn(
                    f"Where the session stands cannot be noted ({error}). It goes on; but if this "
                    "process is killed, RLSession.attach cannot find it. session.save() keeps it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._failed = True

    def _row(self) -> dict[str, Any]:
        state = self._state
        return {
            **state.counters(self._versions),
            "history": self._history(state.history),
            "config": self._file("config", state.config, _write_config),
            "rollout": self._file("rollout", state.last_rollout, _write_rollout),
            "buffer": self._file("buffer", tuple(state.buffer) or None, _write_groups),
            "snapshots": self._snapshot_files(),
        }

    def _snapshot_files(self) -> list[str | None]:
        """Names of the files that hold the session's half of each snapshot."""
        mine = {f"{SNAPSHOT} {name}": kept for name, kept in self._snapshots.items()}
        for key in [k for k in self._kept if k.startswith(f"{SNAPSHOT} ") and k not in mine]:
            del self._kept[key]
        return [self._file(SNAPSHOT, kept, _write_snapshot, key) for key, kept in mine.items()]

    def _file(
        self, kind: str, what: Any, write: Callable[[Path, Any], None], key: str = ""
    ) -> str | None:
        """Name of the file that holds a value, written anew where it is not what was written last.

        `key` tells those of one kind apart.
        """
        if what is None:
            return None
        last, name = self._kept.get(key or kind, (None, ""))
        if last is what or (kind == "buffer" and last == what):
            return name
        name = self._new(kind)
        write(self.folder / name, what)
        self._kept[key or kind] = (what, name)
        return name

    def _history(self, history: list[Any]) -> list[Any]:
        """Write the history: [file, number of rows]; appends unless steps were undone."""
        known = len(self._rows)
        _, name = self._kept.get("history", (None, ""))
        grown = known <= len(history) and all(
            a is b for a, b in zip(self._rows[-1:], history[known - 1 : known], strict=False)
        )
        if not (name and grown):
            name, known = self._new("history"), 0
        if fresh := history[known:]:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in fresh))
        self._kept["history"], self._rows = (None, name), list(history)
        return [name, len(history)]

    def _new(self, kind: str) -> str:
        self._files += 1
        return f"{kind}-{self._files}"

    def _put(self, notes: dict[str, Any]) -> None:
        replace_file(self.folder / STATE, json.dumps(notes))
        states = [notes["now"], *([notes["then"]["state"]] if "then" in notes else [])]
        used = {STATE, START} | {name for _, name in self._kept.values()}
        used |= {s[kind] for s in states for kind in ("config", "rollout", "buffer")}
        used |= {state["history"][0] for state in states}
        used |= {name for state in states for name in state["snapshots"]}
        for file in self.folder.iterdir():
            if file.name not in used:
                file.unlink(missing_ok=True)


def of_fork(directory: Path, name: str) -> Path:
    """Where a fork's journal has its folder, in the folder of its stack."""
    return directory / FORKS / name


def forks(directory: Path) -> list[str]:
    """Names of the forks that have a journal in the folder of a stack."""
    with suppress(FileNotFoundError):
        found = sorted((directory / FORKS).iterdir())
        return [each.name for each in found if (each / FOLDER / STATE).is_file()]
    return []


def forget_fork(directory: Path, name: str) -> None:
    """Remove a fork's journal."""
    shutil.rmtree(of_fork(directory, name), ignore_errors=True)


def _number(file: Path) -> int:
    """Number in the name of a file that `_new` has named, perhaps in another process."""
    number = file.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _write_config(file: Path, config: Any) -> None:
    file.write_text(config.model_dump_json(), encoding="utf-8")


def _write_rollout(file: Path, rollout: Rollout) -> None:
    serialization.write_arrays(file, rollout.samples, _of_rollout(rollout))


def _of_rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        "step": rollout.step,
        "seconds": rollout.seconds,
        "metrics": rollout.metrics,
        "notes": list(rollout.notes),
    }


def _write_snapshot(file: Path, kept: Snapshot) -> None:
    rollout = kept.last_rollout
    own = {
        "snapshot": {name: getattr(kept, name) for name in KEPT_AS_IT_IS},
        "folder": str(kept.folder) if kept.folder else None,
        "training": kept.training.model_dump(mode="json"),
        "sampling": dict(kept.rollout),
        "state": dict(kept.state),
        "rollout": rollout and _of_rollout(rollout),
    }
    serialization.write_arrays(file, rollout.samples if rollout else (), own)


KEPT_AS_IT_IS = ("name", "step", "weight_version", "reward", "bytes", "made")


def _read_snapshot(file: Path) -> Snapshot:
    from kit.config import TrainingConfig
    from kit.reports.status import Snapshot

    samples, own = serialization.read_arrays(file)
    return Snapshot(
        **own["snapshot"],
        folder=Path(own["folder"]) if own["folder"] else None,
        training=TrainingConfig(**own["training"]),
        rollout=own.get("sampling", {}),
        state=own["state"],
        last_rollout=Rollout(samples, **own["rollout"]) if own["rollout"] else None,
    )


def _write_groups(file: Path, groups: tuple[Any, ...]) -> None:
    samples = [sample for group in groups for sample in group]
    serialization.write_arrays(file, samples, {"sizes": [len(group) for group in groups]})


def started_with(directory: Path) -> dict[str, Any]:
    """Read what `Journal.start` wrote. Raises SessionError if it is missing."""
    return _read(directory / FOLDER / START)


def noted(directory: Path) -> dict[str, Any]:
    """Read the last state: `now`, and `then` if an update was running. Raises SessionError."""
    return _read(directory / FOLDER / STATE)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise SessionError(
            "Where the session stood was not noted, so nobody can go on with it.",
            why=str(error),
            fix="end it with `kit doctor --stop`, and load the last checkpoint: "
            "`RLSession.load(path)`.",
        ) from None


def restore(
    directory: Path,
    row: dict[str, Any],
    state: TrainState,
    versions: WeightVersions,
    snapshots: SnapshotStore,
    held: Collection[str],
) -> None:
    """Restore a session from its journal. Raises DataError if its prompts differ.

    `held` are the names of the snapshots that the trainers have in memory.
    """
    folder = directory / FOLDER
    name, rows = row["history"]
    lines = islice(read_lines(folder / name), rows) if rows else ()
    history = [parse_json(line) for _, line in lines]
    state.load_json({**row, "history": history, "buffer": []}, versions)
    if row["rollout"]:
        samples, own = serialization.read_arrays(folder / row["rollout"])
        state.last_rollout = Rollout(samples, **own)
    if row["buffer"]:
        samples, own = serialization.read_arrays(folder / row["buffer"])
        rest = iter(samples)
        state.buffer.put(tuple(next(rest) for _ in range(size)) for size in own["sizes"])
    for kept in (_read_snapshot(folder / name) for name in row["snapshots"]):
        if kept.folder.is_dir() if kept.folder else kept.name in held:
            snapshots.put(kept)


def settings(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Configuration in the journal, as a tree."""
    return _read(directory / FOLDER / state["config"])
