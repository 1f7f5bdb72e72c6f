"""`kit runs` and `kit compare`: list runs, and show how they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kit.utils.files import runs_here
from kit.utils.formatting import visible

if TYPE_CHECKING:
    from rich.console import Console


RUNS = runs_here()


def table_console() -> Console:
    """Console for tables: as wide as the terminal, or in a file as wide as they need."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=400)


def runs(
    folder: Annotated[
        Path, typer.Argument(help="The folder that runs are kept in, or a sweep's.")
    ] = RUNS,
    conditions: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="NAME=VALUE,...",
            help="Only runs of which all of this is true: status=completed,lr=1e-4. Names are "
            "those of the columns, and of parameters.",
        ),
    ] = "",
    sort: Annotated[
        str,
        typer.Option(
            help="By what: when, reward, held_out, accuracy, steps, duration, notebook, status, or "
            "a parameter. The highest and the newest come first; last with a - before the name."
        ),
    ] = "when",
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything that is known, as JSON.")
    ] = False,
) -> None:
    """List the runs of a folder, those of its sweeps included."""
    from kit.runs.index import choose, find_runs, show_runs, sort_runs

    found = find_runs(folder)
    chosen = sort_runs(choose(found, conditions), sort) if found else []
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in chosen], indent=2, default=str))
    else:
        show_runs(chosen, table_console(), str(folder))


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, or a sweep: a folder, the unique beginning of a name, the six signs at its "
            "end, `last`, or `last~1` for the one before it. `last` alone may be a sweep.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html",
            help="Write a page that needs no network: curves, differences, samples.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric to draw beside the reward; may be given several times."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts to show side by side.")] = 8,
    folder: Annotated[Path, typer.Option("--in", help="The folder that runs are kept in.")] = RUNS,
) -> None:
    """Lay runs side by side: curves, parameters, versions, samples. Runs that differ only in their
    seed are one curve.
    """
    from kit.runs.compare import compare_runs

    compared = compare_runs(names, root=folder, metrics=metric, n=samples)
    typer.echo(visible(str(compared)))
    if out is not None:
        typer.echo(visible(f"The page: {compared.save(out).resolve()}"))
