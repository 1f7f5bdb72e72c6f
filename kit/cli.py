"""The `kit` command: run notebooks, see what they take, and what a machine lacks for them.

Exit codes: 0 all well, 1 the notebook failed or the doctor found a problem, 2 the call was wrong,
130 interrupted.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kit.errors import KitError, RunError

NOTEBOOK_FAILED = 1
NOT_READY = 1
WRONG_CALL = 2
INTERRUPTED = 130


class _Commands(TyperGroup):
    """Prints the kit's own errors as their message: a traceback would bury the way out."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KitError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(WRONG_CALL) from None


class _Pairs(TyperCommand):
    """Reads `-p NAME VALUE`, as papermill does, which Typer has no repeated option for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            if word not in ("-p", "--parameter") or not rest:
                continue
            name = rest.pop(0)
            joined.append(name if "=" in name or not rest else f"{name}={rest.pop(0)}")
        return super().parse_args(ctx, joined)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RL post-training of language models on one device, from a notebook.",
)

Notebook = Annotated[Path, typer.Argument(help="An .ipynb file.", show_default=False)]
Notebooks = Annotated[
    list[Path],
    typer.Argument(help="An .ipynb file, or several that share one stack.", show_default=False),
]


@app.command(cls=_Pairs)
def run(
    notebooks: Notebooks,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="NAME VALUE",
            help="A new value for one of the notebook's parameters; may be given several times. Of "
            "several notebooks, each is given those that it has.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder that runs are kept in, each in a folder of its own.")
    ] = Path("papermill_runs"),
) -> None:
    """Execute notebooks from top to bottom and keep everything they did."""
    from kit.runs import run_notebooks

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        results = run_notebooks(notebooks, _pairs(parameter or []), out_root=out)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if any(result.status != "completed" for result in results):
        raise typer.Exit(NOTEBOOK_FAILED)


@app.command()
def params(notebook: Notebook) -> None:
    """List the parameters that a notebook takes, with their types and values."""
    from kit.runs import read_parameters

    found = read_parameters(notebook)
    for parameter in found.values():
        typer.echo(str(parameter))
    if not found:
        typer.echo(f"{notebook} takes no parameters: none of its cells is tagged `parameters`.")


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")] = "tiny",
    stop: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="End this session of yours, by its name or id; or `leftovers`: what is left of "
            "sessions that were killed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a session needs, what of it is here, and how to get the rest; or end a session."""
    if stop is not None:
        from kit.doctor import stacks

        typer.echo(stacks.stop(stop))
        return
    from kit.doctor import diagnose

    colours = {"✗": typer.colors.RED, "!": typer.colors.YELLOW, "✓": typer.colors.GREEN}
    diagnosis = diagnose(config)
    for line in str(diagnosis).splitlines():
        sign = line[:1] if line[:1] in colours else ""
        typer.echo(typer.style(sign, fg=colours.get(sign), bold=True) + line[len(sign) :])
    if not diagnosis.ready:
        raise typer.Exit(NOT_READY)


@app.command()
def version() -> None:
    """Say which kit this is, and which stack it runs on."""
    from kit.runs.outcome import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number or 'not installed'}")


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise RunError(f"Parameter {name!r} has no value.", fix=f"write `-p {name} VALUE`.")
        pairs[name] = value
    return pairs


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM, which schedulers and CI send, as on Ctrl-C: kernel first, files kept."""
    raise KeyboardInterrupt
