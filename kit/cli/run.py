"""`kit run` and `kit params`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from kit.cli.runs import RUNS
from kit.errors import RunError
from kit.utils.formatting import visible

if TYPE_CHECKING:
    from rich.console import Console

    from kit.reports.runs import RunSettings
    from kit.runs import RunResult


NOTEBOOK_FAILED = 1
INTERRUPTED = 130
KEEP_WARM_MINUTES = 10.0


class Pairs(TyperCommand):
    """Command that reads `-p NAME VALUE`, as papermill does; Typer has no such repeated option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Click does, with `-p NAME VALUE` joined to `-p NAME=VALUE`."""
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


Notebooks = Annotated[
    list[Path] | None, typer.Argument(help="An .ipynb file, or several that share one stack.")
]

ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        metavar="NAME VALUE",
        help="A new value for one of the notebook's parameters; may be given several times. Of "
        "several notebooks, each is given those that it has.",
    ),
]

FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        help="A YAML file of parameters by name, such as a run's params.yaml; -p goes first.",
    ),
]

SeedOption = Annotated[
    int | None,
    typer.Option(
        help="The seed: the notebook's parameter of that name, or else that of its sessions.", min=0
    ),
]

PresetOption = Annotated[
    str | None,
    typer.Option(
        help="tiny, tiny-chain, qwen3-0.6b, ...: the notebook's parameter of that name, or "
        "else in place of the preset that it starts its session with."
    ),
]

ResumeOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Take a run that was killed, interrupted or failed to its end: its folder, its "
        "name, or `last`.",
    ),
]

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="With --resume: a setting to continue with, such as training.learning_rate=1e-5; may "
        "be given several times.",
        show_default=False,
    ),
]

SamplesEveryOption = Annotated[
    int, typer.Option(help="Keep the rollout of every so many steps; 0 keeps none.", min=0)
]

CheckpointEveryOption = Annotated[
    int | None,
    typer.Option(
        help="Save after every so many steps, to resume from; 0 never. Without it, about every "
        "five minutes. `checkpoint.interval` in the notebook's settings goes first.",
        min=0,
    ),
]

KeepWarmOption = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        help="How long the stack waits for the next run, which then starts in a second. It "
        "ends by itself, or by `kit doctor --stop`; 0 ends it with the run.",
        min=0,
    ),
]

QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Plain lines, as they are written into a log.")
]

OutOption = Annotated[
    Path, typer.Option(help="The folder that runs are kept in, each in a folder of its own.")
]


def run(
    notebooks: Notebooks = None,
    parameter: ParameterOption = None,
    file: FileOption = None,
    seed: SeedOption = None,
    preset: PresetOption = None,
    resume: ResumeOption = None,
    changes: SetOption = None,
    samples_every: SamplesEveryOption = 10,
    checkpoint_every: CheckpointEveryOption = None,
    keep_warm: KeepWarmOption = KEEP_WARM_MINUTES,
    quiet: QuietOption = False,
    out: OutOption = RUNS,
) -> None:
    """Execute notebooks from top to bottom and keep everything they did.

    Exit codes: 0 all completed, 1 a notebook failed, 2 the call was wrong, 130 interrupted.
    """
    from kit.reports.runs import RunSettings

    end_on_sigterm()
    settings = RunSettings(
        seed=seed,
        preset=preset,
        samples_every=samples_every,
        checkpoint_every=checkpoint_every,
        keep_warm=keep_warm,
    )
    given = _from_file(file) | dict(pairs(parameter or []))
    new = bool(notebooks or given or preset) or seed is not None or checkpoint_every is not None
    if resume and new:
        raise RunError(
            "--resume goes on with a run as it was begun.",
            fix="leave notebook, parameters, --seed, --preset and --checkpoint-every out; or start "
            "a new run.",
        )
    if not resume and not notebooks:
        raise RunError(
            "There is nothing to run.", fix="name a notebook, or a run to --resume; see --help."
        )
    if changes and not resume:
        raise RunError(
            "--set goes with --resume.",
            fix="give a new run its values by -p, for the parameters of its notebook.",
        )
    settings = settings.model_copy(update={"changes": _settings(changes or [])})
    try:
        results = _results(notebooks or [], given, resume, settings, out, _console(quiet))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if any(result.status != "completed" for result in results):
        raise typer.Exit(NOTEBOOK_FAILED)


def _results(
    notebooks: list[Path],
    given: dict[str, object],
    resume: str | None,
    settings: RunSettings,
    out: Path,
    console: Console,
) -> list[RunResult]:
    from kit.runs import run_notebooks

    if resume is None:
        return run_notebooks(notebooks, given, out_root=out, console=console, settings=settings)
    from kit.runs.execute import one_stack
    from kit.runs.resume import resume_notebook

    with one_stack(settings.keep_warm, console):
        warm, changes = settings.keep_warm, settings.changes
        done = resume_notebook(
            resume, out_root=out, console=console, keep_warm=warm, changes=changes
        )
        return [done]


def params(notebook: Annotated[Path, typer.Argument(help="An .ipynb file.")]) -> None:
    """List the parameters that a notebook takes, with their types and values."""
    from kit.runs import read_parameters
    from kit.runs.parameters import HOW_TO_TAG

    found = read_parameters(notebook)
    for parameter in found.values():
        typer.echo(visible(str(parameter)))
    if not found:
        words = f"{notebook} takes no parameters: none of its cells is tagged `parameters`."
        typer.echo(visible(words))
        typer.echo(f"To give a cell of assignments its tag: {HOW_TO_TAG}.")


def pairs(words: list[str], value: str = "VALUE") -> list[tuple[str, str]]:
    """Split `name=value` words. Raises RunError for one without a value, called `value` there."""
    found = []
    for name, equals, text in (word.partition("=") for word in words):
        if not equals:
            raise RunError(f"Parameter {name!r} has no value.", fix=f"write `-p {name} {value}`.")
        found.append((name, text))
    return found


def _settings(words: list[str]) -> dict[str, Any]:
    """Settings as `--set` has them, their values read as in a YAML file."""
    from kit.config.changes import full_names

    for word in words:
        if "=" not in word:
            raise RunError(f"--set {word} has no value.", fix=f"write `--set {word}=VALUE`.")
    split = (word.partition("=") for word in words)
    return full_names({name: _value(name, text) for name, _, text in split})


def _value(name: str, text: str) -> Any:
    import yaml

    from kit.utils.strict_yaml import explained, from_yaml

    try:
        return from_yaml(text)
    except yaml.YAMLError as error:
        raise RunError(f"The value of --set {name} is no YAML: {explained(error)}.") from None


def _from_file(file: Path | None) -> dict[str, object]:
    if file is None:
        return {}
    from kit.utils.strict_yaml import read_yaml

    try:
        found = read_yaml(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read as YAML.", why=str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise RunError(f"{file} holds no parameters.", fix="write one a line, such as `steps: 30`.")
    return found


def _console(quiet: bool) -> Console:
    """Console for the output; with control characters only on a terminal."""
    from rich.console import Console

    if quiet or not sys.stdout.isatty():
        return Console(force_terminal=False, color_system=None)
    return Console()


def end_on_sigterm() -> None:
    """Treat SIGTERM, which schedulers and CI send, as Ctrl-C: kernel first, files kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
