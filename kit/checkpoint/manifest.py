"""Manifests: the files of a checkpoint and their checksums, checked before anything is read.

`manifest.json` is written last: a folder that has one is complete. Its checksums find damage, not
malice: whoever can write the folder can write a manifest to go with it. That is why nothing in a
checkpoint is ever run or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from kit.errors import CheckpointError
from kit.utils.files import replacing_directory, sync_directory
from kit.utils.reading import read_json
from kit.utils.versions import versions

FORMAT = 2
"""Format 1 had one safetensors file for all weights, and no manifest."""
MANIFEST = "manifest.json"
Kind = Literal["checkpoint", "export"]

PACKAGES = ("kit", "torch", "ray", "sglang", "transformers", "peft", "safetensors")


@contextmanager
def new_folder(target: Path, kind: Kind) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` atomically at the end, or leaves nothing.

    Raises:
        CheckpointError: it cannot be written, or something else is in the way.
    """
    refuse_others(target, kind)
    try:
        with replacing_directory(target) as partial:
            yield partial
    except OSError as error:
        raise CheckpointError(
            f"The {kind} {target} cannot be written.",
            why=str(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from error


def refuse_others(target: Path, kind: Kind) -> None:
    """Raise CheckpointError where something else is in the place of a folder of this kind."""
    if target.exists() and peek(target).get("kind") != kind:
        raise CheckpointError(
            f"{target} is there already and is no {kind}.",
            fix="name a directory that does not exist yet.",
        )


def seal(folder: Path, kind: Kind, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, and flush every byte to disk.

    Args:
        folder: what it holds is complete.
        kind: what it is for.
        facts: what else the manifest says.
    """
    names = _files(folder)
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(names, pool.map(lambda name: _sealed(folder / name), names), strict=True))
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
        "versions": _versions(),
        "files": sums,
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for directory in {folder, *((folder / name).parent for name in names)}:
        sync_directory(directory)


@cache
def _versions() -> dict[str, str]:
    """Versions with which this process began; one that is installed later does not compute here."""
    return {name: version or "not installed" for name, version in versions(PACKAGES).items()}


def read(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest, after comparing every file with it.

    Raises:
        CheckpointError: it is no checkpoint, of another format, or not as it was written.
    """
    manifest = _manifest(folder)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder.absolute()} has the checkpoint format {manifest.get('format')!r}; this "
            f"version reads {FORMAT}.",
            fix="load it with the version of the kit that wrote it.",
        )
    if manifest.get("kind") == "export":
        raise CheckpointError(
            f"{folder.absolute()} is a model for Transformers: it has weights, but no optimizer "
            "and no data position to go on with.",
            fix="start a session with it (model.name: its path), or load what session.save() "
            "returned.",
        )
    if faults := _faults(folder, manifest.get("files")):
        raise CheckpointError(
            f"The checkpoint {folder.absolute()} is damaged: {'; '.join(faults[:4])}.",
            why="It is not as it was when it was written; nothing of it was read.",
            fix="copy it again, or load another one.",
        )
    return manifest


def peek(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest without checking anything; empty where there is none."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        old = (folder / "state.json").is_file()
        raise CheckpointError(
            f"{folder.absolute()} is no checkpoint: it has no {MANIFEST}.",
            why="It was written by an older version of the kit." if old else "",
            fix="load it with the version of the kit that wrote it."
            if old
            else "give the directory that session.save() returned.",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is damaged: it holds no mapping.")
    return manifest


def _faults(folder: Path, listed: Any) -> list[str]:
    """Describe differences from the manifest."""
    if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
        return [f"{MANIFEST} lists no files"]
    there = set(_files(folder))
    faults = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    faults += [f"{name} is not of it" for name in sorted(there - listed.keys())]
    known = sorted(listed.keys() & there)
    short = [n for n in known if (folder / n).stat().st_size != listed[n].get("bytes")]
    faults += [f"{name} is of another length" for name in short]
    if not faults:
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda name: _sha256(folder / name), known)
            pairs = zip(known, sums, strict=True)
            faults = [f"{n} has changed" for n, found in pairs if found != listed[n].get("sha256")]
    return faults


def _files(folder: Path) -> list[str]:
    """Every file below a folder but the manifest; links count as they are, and are not followed."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(str(path.relative_to(folder)) for path in found if _plain(path))
    return [name for name in names if name != MANIFEST]


def _plain(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{path} is no plain file.",
            why="A checkpoint holds files only, so that all of it is in its folder.",
            fix="remove it, or load another checkpoint.",
        )
    return True


def _sealed(file: Path) -> dict[str, Any]:
    """Manifest entry of a file, which is flushed to disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
