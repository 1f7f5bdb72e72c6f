"""Findings on Python, packages, memory and disks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kit.cluster.folder import stacks_root, unsuitable
from kit.errors import StackError
from kit.models.adapters import AdapterShape
from kit.reports.diagnostics import Finding
from kit.utils.files import working_folder
from kit.utils.formatting import data_size
from kit.utils.hardware import free_memory
from kit.utils.shadowing import hidden, hiding_error
from kit.utils.versions import installed_version

STACK = ("sglang", "torch", "transformers", "ray")
"""What has to be at one version, because the kit reaches into it."""
ADAPTERS = "peft"
"""What puts adapters into a model, likewise."""
PYTHON = ">=3.11,<3.13"
"""What the kit takes where it cannot be asked, because it is not installed."""
SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE = 512 << 20
"""Bytes that Ray wants of it."""
TEMPORARY = 2 << 30
"""Bytes of logs and sockets, generously."""
FULLEST = 0.95
"""Ray writes nothing to a disk that is fuller."""

HOST_MEMORY = {"cpu": 3 << 30, "cuda": 10 << 30}
"""Bytes that the processes of a stack take for themselves, before the model."""
TRAINED = 8
"""The trainer's float32 weights, gradients and two moments, as a multiple of bfloat16 weights."""
FROZEN = 2
"""Weights in float32 alone, likewise."""
SAVED = 6
"""A checkpoint's float32 weights and moments, likewise."""


def program(name: str) -> str:
    """How to call a program of this Python's environment, which need not be on the path."""
    beside = Path(sys.executable).parent / name
    if not beside.exists() or shutil.which(name) == str(beside):
        return name
    return shlex.quote(str(beside))


def python() -> Finding:
    """The interpreter and the platform."""
    try:
        takes = importlib.metadata.metadata("kit")["Requires-Python"] or PYTHON
    except importlib.metadata.PackageNotFoundError:
        takes = PYTHON
    version, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    found = f"{version} on {system} ({sys.executable})"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Finding("Python", "problem", f"{found}.", "SGLang runs on Linux on x86-64 only.")
    if version not in SpecifierSet(takes):
        fix = "Make the environment again with Python 3.11 or 3.12."
        return Finding(
            "Python", "problem", f"{found}; the kit takes {takes}.", fix, ("make clean-all lab",)
        )
    return Finding("Python", "ok", found)


def packages(*, adapters: bool = False) -> Finding:
    """The stack, installed and at the versions that the kit names; for adapters PEFT too."""
    if hides := hidden(standard_library=False):
        return Finding.of_error("packages", hiding_error(hides))
    needed = (*STACK, ADAPTERS) if adapters else STACK
    installed = {name: installed_version(name) for name in needed}
    return compare_versions(installed, pins())


def compare_versions(installed: dict[str, str | None], pins: dict[str, str]) -> Finding:
    """Installed versions beside those that the kit is made for.

    Args:
        installed: by package; None for one that is missing.
        pins: the one version that will do, by package; empty where unknown.
    """
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items())
    missing = [name for name, version in installed.items() if version is None]
    # A local version, such as 2.11.0+cu130, says where it was built.
    others = [
        f"{name} has to be {pins[name]}"
        for name, version in installed.items()
        if version and name in pins and version.partition("+")[0] != pins[name]
    ]
    if missing or others:
        fix = "Install the locked versions, in the environment of this Python."
        why = "; ".join([*(f"{name} is not installed" for name in missing), *others])
        commands = (f"{program('python')} -m pip install -r requirements.lock",)
        return Finding("packages", "problem", f"{found}: {why}.", fix, commands)
    if not pins:
        return Finding(
            "packages",
            "note",
            f"{found}. The kit itself is not installed, so nothing says which they should be.",
            "Install it beside them.",
            (f"{program('python')} -m pip install --no-deps -e .",),
        )
    return Finding("packages", "ok", f"{found}, as pinned")


def pins() -> dict[str, str]:
    """Versions that the kit pins, by package."""
    try:
        named = [Requirement(text) for text in importlib.metadata.requires("kit") or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    pinned = re.compile(r"==([^*,]+)")
    known = (*STACK, ADAPTERS)
    found = {r.name: pinned.fullmatch(str(r.specifier)) for r in named if r.name in known}
    return {name: match[1] for name, match in found.items() if match}


def room(
    device: str,
    model_bytes: int | None,
    adapters: AdapterShape | None = None,
    *,
    adapts: bool = False,
) -> Iterator[Finding]:
    """Compare memory and disks with what a session of this model takes.

    Args:
        device: `cpu` or `cuda`.
        model_bytes: of its weights; None where nothing tells.
        adapters: what is trained in place of them; None also where the model is not here to tell.
        adapts: whether adapters are trained.
    """
    weights = model_bytes or 0
    trained, saved = TRAINED * weights, SAVED * weights
    if adapts:
        saved = 12 * adapters.parameters if adapters else 0  # in float32, with two moments
        trained = FROZEN * weights + saved
    need = HOST_MEMORY[device] + (trained if device == "cpu" else 2 * weights)
    yield host_memory(free_memory(), need)
    if SHARED_MEMORY.is_dir():
        # On a CPU the trainer hands its weights over through shared memory, as float32.
        handed = 2 * weights if device == "cpu" else 0
        yield shared_memory(shutil.disk_usage(SHARED_MEMORY).free, OBJECT_STORE, handed)
    yield temporary_files()
    if saved:
        try:
            here = os.environ.get("KIT_RUN_DIR") or working_folder()  # as `session.save()` has it
        except StackError as error:
            yield Finding.of_error("working directory", error)
            return
        target = Path(here).resolve()
        yield checkpoints(str(target), shutil.disk_usage(target).free, saved)


def host_memory(free: int, need: int) -> Finding:
    """The host's memory, in bytes."""
    found = f"{data_size(free)} free, about {data_size(need)} wanted"
    if free < need // 2:
        fix = "End what is not needed, or take a machine with more memory."
        return Finding("host memory", "problem", f"{found}: too little.", fix)
    if free < need:
        fix = "If a process of the stack is killed, end what is not needed."
        return Finding("host memory", "note", f"{found}: it may get short.", fix)
    return Finding("host memory", "ok", found)


def shared_memory(free: int, store: int, handed: int) -> Finding:
    """Memory that processes share, in bytes: free, for Ray, and for weights on their way."""
    need = store + handed
    found = f"{data_size(free)} free, {data_size(need)} wanted"
    if free >= need:
        return Finding("/dev/shm", "ok", found)
    fix = f"In a container, start it with --shm-size={-(-2 * need // (1 << 30))}g."
    if free < handed:
        return Finding("/dev/shm", "problem", f"{found}: weights do not fit through it.", fix)
    return Finding("/dev/shm", "note", f"{found}: Ray takes the disk instead, slower.", fix)


def temporary_files() -> Finding:
    """The folder for logs and sockets, and whether it is the temporary one."""
    try:
        folder = stacks_root()
    except StackError as error:
        return Finding.of_error("temporary files", error)
    usage = shutil.disk_usage(folder)
    return temporary(str(folder), usage.free, usage.used / usage.total, tempfile.gettempdir())


def temporary(folder: str, free: int, full: float, wanted: str = "") -> Finding:
    """The folder for logs and sockets: its path, free bytes, and share of its disk in use.

    Args:
        folder: where they go.
        free: bytes.
        full: between 0 and 1.
        wanted: the temporary folder, if that is another one.
    """
    found = f"{folder}: {data_size(free)} free"
    if wanted not in ("", folder):
        found += f" (not {wanted}: {unsuitable(wanted) or 'it cannot be written to'})"
    another = "Name another folder, on another disk, with the variable TMPDIR."
    if free < TEMPORARY // 4:
        return Finding("temporary files", "problem", f"{found}: too little.", another)
    if free < TEMPORARY or full > FULLEST:
        words = f"{found}, its disk is {full:.0%} full: from {FULLEST:.0%} on Ray refuses to write."
        return Finding("temporary files", "note", words, another)
    return Finding("temporary files", "ok", found)


def checkpoints(folder: str, free: int, need: int) -> Finding:
    """The disk that checkpoints go to, in bytes."""
    found = f"{folder}: {data_size(free)} free; a checkpoint takes about {data_size(need)}"
    if free < need:
        fix = "Free some, or save elsewhere: session.save(path), kit run --out FOLDER."
        return Finding("checkpoints", "note", f"{found}: it does not fit.", fix)
    return Finding("checkpoints", "ok", found)
