"""Notebooks one after the other over one stack, which may stay warm for those of a later call."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from kit.errors import RunError, did_you_mean
from kit.runs.asked import for_notebook
from kit.runs.finding import RUNS
from kit.runs.launch import RunResult, run_notebook
from kit.runs.parameters import check_parameters, read_parameters
from kit.runs.record import GROUP_VARIABLE, current_group
from kit.runs.settings import RunSettings


def run_notebooks(
    paths: Sequence[str | Path],
    parameters: Mapping[str, object] | None = None,
    *,
    out_root: str | Path = RUNS,
    console: Console | None = None,
    settings: RunSettings | None = None,
) -> list[RunResult]:
    """Execute notebooks one after the other, each into a folder of its own; see `run_notebook`.

    A notebook whose engine settings are those of the one before begins its stack anew instead of
    starting processes. One that fails does not keep the others from running. At the end nothing is
    left, whatever happens, but for a stack that `settings.keep_warm` leaves for some minutes.

    Args:
        paths: the notebooks.
        parameters: new values; each notebook is given those that it takes.
        out_root: the folder that runs are kept in.
        console: where progress and summaries are shown; None takes standard output.
        settings: seed, preset, and what is kept; None takes the defaults.

    Raises:
        RunError: before anything starts: no such notebook, a parameter that none of them takes, or
            a wrong value.
    """
    sources, settings = [Path(path) for path in paths], settings or RunSettings()
    console = console or Console()
    shares = _shares(sources, parameters or {}, settings)
    with one_stack(settings.keep_warm, console, alone=len(sources) < 2):
        return [
            run_notebook(source, share, out_root=out_root, console=console, settings=settings)
            for source, share in zip(sources, shares, strict=True)
        ]


def _shares(
    sources: Sequence[Path], parameters: Mapping[str, object], settings: RunSettings
) -> list[dict[str, object]]:
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
        check_parameters(source, each, for_notebook(source, each, share, settings)[0])
        shares.append(share)
    return shares


@contextmanager
def one_stack(keep_warm: float, console: Console, *, alone: bool = True) -> Iterator[None]:
    """Sessions of the kernels that start meanwhile leave their stack to the next one.

    Args:
        keep_warm: minutes that the last one waits for a later call. An interrupt ends it at once.
        console: where it is told that it waits.
        alone: only one notebook runs.
    """
    from kit.stack import ending, registry

    if current_group() or (alone and not keep_warm):  # a group's stacks are its maker's to end
        yield
        return
    group = os.environ[GROUP_VARIABLE] = secrets.token_hex(8)
    leave = False
    try:
        yield
        leave = keep_warm > 0
    finally:
        del os.environ[GROUP_VARIABLE]
        for entry in registry.living():
            if entry.group == group and not leave:
                ending.end(entry)
            elif entry.group == group:
                text = (
                    f"Its stack stays warm for {keep_warm:g} minutes, for the next run; "
                    f"end it sooner: kit doctor --stop {entry.name}"
                )
                console.print(text, markup=False, highlight=False, soft_wrap=True)
