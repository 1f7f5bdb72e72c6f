"""Files of the user's that hide packages: a `ray.py` beside a notebook is what `import ray` gets.

Python looks into the folder of a script or notebook first, and Ray's actors into the working
directory of the session.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kit.errors import StackError

_ROOTS = ("sglang", "transformers", "ray", "datasets")
"""Where the search for what the kit needs begins, if the kit itself is not installed."""
_ANYBODYS = {"benchmarks", "docs", "examples", "scripts", "test", "tests", "tools", "utils"}
"""Names that packages install by mistake, and that nobody imports from them."""
_NAME = re.compile(r"[\w.-]+")
_SUFFIX = re.compile(r"\.py$|\.[\w.-]*\.so$|\.so$")


def check_hidden_packages() -> None:
    """Raise StackError where a file or folder hides a package that the kit needs."""
    found = hidden(standard_library=False)
    if found:
        raise hiding_error(found)


def hidden(*, standard_library: bool) -> dict[str, Path]:
    """What hides packages that the kit needs, by the package's name as it is imported.

    Args:
        standard_library: whether files that hide modules of Python itself are named as well. Most
            do no harm, as Python has loaded its own before.
    """
    found: dict[str, Path] = {}
    candidates: dict[str, Path] = {}
    site = Path(sysconfig.get_path("purelib"))
    for name, path in _importable():
        if name in sys.stdlib_module_names:
            if standard_library:
                found.setdefault(name, path)
        elif name not in _ANYBODYS and any(site.glob(f"{name}*")):
            candidates.setdefault(name, path)
    if candidates:
        needed, homes = _needed(), importlib.metadata.packages_distributions()
        for name, path in candidates.items():
            if needed.intersection(map(_normal, homes.get(name, ()))):
                found[name] = path
    return found


def explain_failed_import(error: Exception) -> StackError | None:
    """The error for a failed import, if a file that hides a package had a part in it."""
    told = "".join(traceback.format_exception(error))
    blamed = {}
    for name, path in hidden(standard_library=True).items():
        loaded = getattr(sys.modules.get(name), "__file__", None) or ""
        if str(path) in told or loaded.startswith(str(path)):
            blamed[name] = path
    return hiding_error(blamed) if blamed else None


def hiding_error(found: dict[str, Path]) -> StackError:
    """The error for what `hidden` found."""
    names = [f"{path} hides {name}" for name, path in found.items()]
    return StackError(
        f"{'; '.join(names)}.",
        why="Python looks into this folder first, so that `import` gets the file instead of the "
        "package, here or in the processes of the stack.",
        fix="rename it, and restart the kernel; or work in another folder.",
    )


def _importable() -> Iterator[tuple[str, Path]]:
    """(name, path) of every module in the folders that Python looks into before its packages."""
    for folder in _first_folders():
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                if (path / "__init__.py").is_file():
                    yield path.name, path
                elif _SUFFIX.search(path.name) and path.is_file():
                    yield _SUFFIX.sub("", path.name), path


def _first_folders() -> list[Path]:
    ours = Path(__file__).resolve().parents[2]
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    folders = []
    with suppress(FileNotFoundError):  # the working directory was deleted
        folders.append(Path.cwd())
    for entry in sys.path:
        with suppress(FileNotFoundError):
            folder = Path(entry or os.curdir).resolve()
            if folder in packages:
                break
            if any(folder.is_relative_to(place) for place in packages):
                continue  # what a package brings along for itself, as Ray does psutil
            if any(folder.glob("*.dist-info")):
                continue  # packages that were installed there, as by pip's --target
            if folder not in library and folder.parent not in library and folder.is_dir():
                folders.append(folder)
    return [folder for folder in dict.fromkeys(folders) if folder != ours]


def _needed() -> set[str]:
    """The kit's requirements and theirs, and so on, by normalised name."""
    found: set[str] = set()
    waiting = list(_requirements("kit") or _ROOTS)
    while waiting:
        name = _normal(waiting.pop())
        if name not in found:
            found.add(name)
            waiting += _requirements(name)
    return found


def _requirements(package: str) -> list[str]:
    """Names of what a package requires on its own, without its extras."""
    try:
        requires = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    wanted = (text for text in requires if "extra ==" not in text)
    return [match[0] for text in wanted if (match := _NAME.match(text))]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
