"""`kit export miles` and `kit import miles`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from kit.errors import RunError
from kit.utils.formatting import visible

export = typer.Typer(no_args_is_help=True, help="Write settings for other trainers.")
take_over = typer.Typer(no_args_is_help=True, help="Read what other trainers wrote.")

Out = Annotated[Path | None, typer.Option("--out", "-o", help="A file; else it is printed.")]


@export.command("miles")
def export_miles(
    config: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")],
    out: Out = None,
    train_backend: Annotated[
        Literal["fsdp", "megatron"] | None,
        typer.Option(help="Which of Miles' trainers; fsdp; megatron for ppo and adapters."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Write the prompts into this folder as the JSONL files that Miles reads, and name "
            "them in the script."
        ),
    ] = None,
) -> None:
    """Write the launch script that trains the same in Miles."""
    from kit.config import SessionConfig
    from kit.miles import export_script

    settings = SessionConfig.of(config)
    if data:
        from kit.miles.export_script import write_rows

        settings = write_rows(settings, data)
    exported = export_script(settings, train_backend)
    _give(exported.script, out)
    if out:
        out.chmod(0o755)
    for setting, why in exported.notes.items():
        typer.secho(visible(f"{setting}: {why}"), fg=typer.colors.YELLOW, err=True)


@take_over.command("miles")
def import_miles(
    script: Annotated[Path, typer.Argument(help="A bash script that starts Miles' train.py.")],
    out: Out = None,
) -> None:
    """Read a launch script of Miles as settings; it is never run."""
    from kit.miles import import_script
    from kit.miles.import_script import changed

    imported = import_script(script)
    _give(changed(imported.config), out)
    if report := imported.report():
        typer.secho(visible(report), fg=typer.colors.YELLOW, err=True)


def _give(text: str, out: Path | None) -> None:
    if out is None:
        # A file gets it as it is; a terminal would obey what is in it.
        typer.echo(visible(text) if sys.stdout.isatty() else text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{out} cannot be written.", why=str(error), fix="choose another place with -o."
        ) from None
    typer.echo(f"Written: {out}", err=True)
