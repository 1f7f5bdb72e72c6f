"""`kit import nanochat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kit.utils.formatting import visible


def import_nanochat(
    directory: Annotated[
        Path, typer.Argument(help="A folder with nanochat's model_*.pt and meta_*.json.")
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    step: Annotated[int | None, typer.Option(help="Which of several steps; the last one.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The folder with tokenizer.pkl; looked for nearby.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the weights that are written; float32 keeps every number."),
    ] = "float32",
) -> None:
    """Write a checkpoint of nanochat as a model's directory; nothing in its pickles is run."""
    from kit.checkpoint.nanochat import import_nanochat

    imported = import_nanochat(directory, out, step=step, tokenizer=tokenizer, dtype=dtype)
    typer.echo(visible(str(imported)))
