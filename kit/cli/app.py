"""The `kit` command: run notebooks, read what came of them, see what a machine lacks for them.

Exit codes: 0 all well, 1 the notebook failed or the doctor found a problem, 2 the call was wrong,
130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from kit.cli import miles
from kit.cli.draft import draft
from kit.cli.nanochat import import_nanochat
from kit.cli.run import Pairs, params, run
from kit.cli.runs import compare, runs
from kit.cli.sweep import sweep
from kit.errors import KitError
from kit.utils.files import in_living_folder
from kit.utils.formatting import visible

NOT_READY = 1
WRONG_CALL = 2


class _Commands(TyperGroup):
    """Command group that prints the kit's own errors as their message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with in_living_folder():
                return super().invoke(ctx)
        except KitError as error:
            typer.secho(visible(str(error)), fg=typer.colors.RED, err=True)
            raise typer.Exit(WRONG_CALL) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RL post-training of language models on one device, from a notebook.",
)


app.command(cls=Pairs)(run)
app.command()(params)
app.command(cls=Pairs)(sweep)
app.command()(runs)
app.command()(compare)
app.command()(draft)
app.add_typer(miles.export, name="export")
miles.take_over.command("nanochat")(import_nanochat)
app.add_typer(miles.take_over, name="import")


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")] = "tiny",
    stop: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="End this session of yours, by its name or id; or `leftovers`: what is left of "
            "sessions that were killed.",
        ),
    ] = None,
) -> None:
    """Say what a session needs, what of it is here, and how to get the rest; or end a session."""
    if stop is not None:
        from kit.doctor import stacks

        typer.echo(visible(stacks.stop(stop)))
        return
    from kit.doctor import diagnose

    colours = {"✗": typer.colors.RED, "!": typer.colors.YELLOW, "✓": typer.colors.GREEN}
    diagnosis = diagnose(config)
    for line in str(diagnosis).splitlines():
        sign = line[:1] if line[:1] in colours else ""
        typer.echo(typer.style(sign, fg=colours.get(sign), bold=True) + visible(line[len(sign) :]))
    if not diagnosis.ready:
        raise typer.Exit(NOT_READY)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A model's directory, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    to: Annotated[Literal["fp8", "int4"], typer.Option(help="How linear layers are quantised.")],
    group_size: Annotated[
        int | None, typer.Option(help="Numbers of a row that share a scale (int4); 128.")
    ] = None,
) -> None:
    """Write a model with its linear layers in FP8 or INT4, as quantised engines load it."""
    from kit.checkpoint.quantize import quantize
    from kit.config import SessionConfig

    wanted = {"method": to, "group_size": group_size}
    config = SessionConfig(engine={"quantization": wanted}).quantization
    assert config
    typer.echo(visible(str(quantize(model, out, config))))


@app.command()
def version() -> None:
    """Say which kit this is, and which stack it runs on."""
    from kit.utils.versions import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number or 'not installed'}")
