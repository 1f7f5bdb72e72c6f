"""`kit sweep`: a notebook with many parameter values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kit.cli.runs import RUNS
from kit.errors import RunError

Notebook = Annotated[Path | None, typer.Argument(help="An .ipynb file.")]

ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        metavar="NAME VALUES",
        help="Values for one of the notebook's parameters, separated by commas: `-p lr "
        "1e-5,1e-4`. Commas inside of brackets and quotes do not separate: `-p sizes "
        "'[1, 2],[4]'`, `-p name '\"a, b\",c'`. May be given several times.",
    ),
]

SeedsOption = Annotated[
    str, typer.Option(metavar="N", help="Run each with the seeds 0 to N - 1; or the seeds: 1,5,7.")
]

ParallelOption = Annotated[
    int | None,
    typer.Option(
        help="Members at a time: at most one a GPU, or one a core where there is none.",
        show_default="one a GPU, or one for every two cores",
    ),
]

StopBelowOption = Annotated[
    str | None,
    typer.Option(
        metavar="REWARD@STEP", help="End a member whose reward at this step is below: 0.3@20."
    ),
]

StopMedianOption = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        help="From this step on, end a member whose mean reward so far is below the median of "
        "the others' at the same step.",
    ),
]

ResumeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Go on with this sweep: run what is not completed, failed and killed members "
        "included.",
    ),
]

OutOption = Annotated[Path, typer.Option(help="The folder that the sweep's own is made in.")]


def sweep(
    notebook: Notebook = None,
    parameter: ParameterOption = None,
    seeds: SeedsOption = "",
    parallel: ParallelOption = None,
    stop_below: StopBelowOption = None,
    stop_median: StopMedianOption = None,
    resume: ResumeOption = None,
    out: OutOption = RUNS,
) -> None:
    """Run a notebook with every combination of parameter values, several at a time.

    Each member is a run with a folder of its own inside of the sweep's. One that fails does not
    stop the others. Exit codes: 0 all members completed or were stopped early, 1 some failed,
    2 a wrong call, 130 interrupted.
    """
    from kit.cli.run import INTERRUPTED, NOTEBOOK_FAILED, end_on_sigterm, pairs
    from kit.cli.runs import table_console
    from kit.runs.sweep.run import resume_sweep, run_sweep
    from kit.runs.sweep.state import DONE

    if resume and (notebook or parameter or seeds or stop_below or stop_median is not None):
        raise RunError(
            "--resume goes on with a sweep as it was planned.",
            fix="leave out the notebook and all options but --parallel.",
        )
    if not resume and notebook is None:
        raise RunError("No notebook is given.", fix="write `kit sweep NOTEBOOK -p NAME VALUES`.")
    end_on_sigterm()
    try:
        if resume:
            _, record = resume_sweep(resume, parallel=parallel, console=table_console())
        else:
            assert notebook
            _, record = run_sweep(
                notebook,
                pairs(parameter or [], "VALUES"),
                seeds=_seeds(seeds),
                parallel=parallel,
                stop_below=stop_below,
                stop_median=stop_median,
                out_root=out,
                console=table_console(),
            )
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if any(member.state not in DONE for member in record.members):
        raise typer.Exit(NOTEBOOK_FAILED)


def _seeds(text: str) -> int | list[int]:
    """Parse `--seeds`: `3` is a number of seeds, `1,5` are seeds, "" keeps the notebook's own."""
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise RunError(
            f"--seeds is {text!r}.", fix="give a number of seeds, or seeds with commas: 1,5,7."
        ) from None
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers
