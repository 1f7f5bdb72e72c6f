"""Several notebooks, one after the other, over one stack: the second starts in about a second."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from kit.errors import RunError, did_you_mean
from kit.runs.launch import RUNS, RunResult, run_notebook
from kit.runs.parameters import check_parameters, read_parameters
from kit.runs.record import GROUP_VARIABLE


def run_notebooks(
    paths: Sequence[str | Path],
    parameters: Mapping[str, object] | None = None,
    *,
    out_root: str | Path = RUNS,
    console: Console | None = None,
) -> list[RunResult]:
    """Execute notebooks one after the other, each into a folder of its own; see `run_notebook`.

    A notebook whose engine settings are those of the one before begins its stack anew instead of
    starting processes. One that fails does not keep the others from running. At the end nothing is
    left, whatever happens.

    Args:
        paths: the notebooks.
        parameters: new values; each notebook is given those that it takes.
        out_root: the folder that runs are kept in.
        console: where progress and summaries are shown; None takes standard output.

    Raises:
        RunError: before anything starts: no such notebook, a parameter that none of them takes, or
            a wrong value.
    """
    sources = [Path(path) for path in paths]
    shares = _shares(sources, parameters or {})
    with _one_stack(len(sources)):
        return [
            run_notebook(source, share, out_root=out_root, console=console)
            for source, share in zip(sources, shares, strict=True)
        ]


def _shares(sources: Sequence[Path], parameters: Mapping[str, object]) -> list[dict[str, object]]:
    """What each notebook is given. All of it is checked here, before the first one runs."""
    known = [read_parameters(source) for source in sources]
    names = {name for each in known for name in each}
    unknown = [name for name in parameters if name not in names]
    if unknown and len(sources) > 1:
        raise RunError(
            f"None of the notebooks has a parameter {unknown[0]!r}.",
            fix=did_you_mean(unknown[0], names) if names else f"leave {unknown[0]!r} out.",
        )
    shares = []
    for source, each in zip(sources, known, strict=True):
        share = {n: value for n, value in parameters.items() if n in each or len(sources) == 1}
        check_parameters(source, each, share)
        shares.append(share)
    return shares


@contextmanager
def _one_stack(notebooks: int) -> Iterator[None]:
    """Sessions of the kernels that start meanwhile leave their stack to the next one."""
    from kit.stack import ending, registry

    if notebooks < 2:
        yield
        return
    group = os.environ[GROUP_VARIABLE] = secrets.token_hex(8)
    try:
        yield
    finally:
        del os.environ[GROUP_VARIABLE]
        for entry in registry.living():
            if entry.group == group:
                ending.end(entry)
