"""Import hooks that leave out what SGLang imports but a text model on a CPU never calls.

Half of the time that `import sglang` takes goes into packages for images, other chips' kernels and
file formats. `leave_out()` keeps them out of this process: what SGLang treats as optional is not
found, and what it imports without asking is a placeholder that raises where it is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

OPTIONAL = frozenset(
    {
        "cutlass",
        "deep_gemm",
        "flash_attn",
        "flashinfer",
        "helion",
        "librosa",
        "matplotlib",
        "mistral_common",
        "quack",
        "rfc3987_syntax",
        "scipy",
        "soundfile",
        "tensorflow",
        "tilelang",
        "torchao",
        "torchaudio",
        "torchcodec",
        "wcwidth",
    }
)
"""Not found in this process."""
_FOUND_AGAIN: set[str] = set()
"""Packages among them that this process has asked for by name."""

PLACEHOLDERS = frozenset({"gguf", "torchvision"})
"""Imported without asking; every name in them is a class that raises when it is called."""


class _Unavailable(type):
    """Stand-in for anything in a package that is left out."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{cls.__name__} is left out of the kit's CPU processes.")


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unavailable(f"{self.__name__}.{name}", (), {})


class _PlaceholderLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class LeanFinder:
    """Python's path finder without the packages above."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find as Python does, unless the package is left out."""
        package = name.partition(".")[0]
        if package in OPTIONAL - _FOUND_AGAIN:
            return None
        if package in PLACEHOLDERS:
            return importlib.machinery.ModuleSpec(name, _PlaceholderLoader(), is_package=True)
        return importlib.machinery.PathFinder.find_spec(name, path, target)

    @staticmethod
    def invalidate_caches() -> None:
        """Invalidate caches as Python does."""
        importlib.machinery.PathFinder.invalidate_caches()

    @staticmethod
    def find_distributions(*args: Any, **kwargs: Any) -> Any:
        """Find installed distributions as Python does: only importing is filtered."""
        from importlib.metadata import MetadataPathFinder

        return MetadataPathFinder.find_distributions(*args, **kwargs)


def leave_out() -> None:
    """Hide the packages above from further imports of this process. Safe to call again."""
    if LeanFinder not in sys.meta_path:
        sys.meta_path[:] = [
            LeanFinder if finder is importlib.machinery.PathFinder else finder
            for finder in sys.meta_path
        ]


def bring_back(package: str) -> None:
    """Let this process find a package again, for a part of the kit that needs it."""
    _FOUND_AGAIN.add(package)
