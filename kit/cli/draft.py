"""`kit draft`: make a model that drafts for another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kit.utils.formatting import visible

if TYPE_CHECKING:
    from kit.reports import StepReport

OFTEN = 10


def draft(
    config: Annotated[
        str, typer.Argument(help="A preset's name, a YAML file, or a model and its prompts.")
    ],
    out: Annotated[Path, typer.Argument(help="A directory for the draft.")],
    algorithm: Annotated[
        str,
        typer.Option(help="standalone: a smaller model; eagle, eagle3: a head on its states."),
    ] = "standalone",
    layers: Annotated[int, typer.Option(help="Layers of the draft; 1 for heads.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Rollouts that it learns from.", min=1)] = 100,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the draft; 1e-3, for heads 3e-3.")
    ] = None,
) -> None:
    """Make a draft from what a model writes, for engine.speculative; the model stays as it is."""
    from kit.drafts import LENGTH, RATE, make_draft

    seen = 0

    def tell(report: StepReport) -> None:
        nonlocal seen
        seen += 1
        if seen == 1 or seen % OFTEN == 0:
            m = report.metrics
            typer.echo(
                f"step {seen:4} of {steps}   tokens a pass {m.get(LENGTH, 1.0):.2f}   drafts "
                f"accepted {m.get(RATE, 0.0):.0%}   loss {m['train/draft_loss']:.3f}"
            )

    report = make_draft(
        config,
        out,
        algorithm=algorithm,  # type: ignore[arg-type]  # which it checks
        layers=layers,
        steps=steps,
        learning_rate=learning_rate,
        on_step=tell,
    )
    typer.echo(visible(str(report)))
