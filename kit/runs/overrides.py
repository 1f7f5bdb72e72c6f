"""`--seed` and `--preset`: how they reach a notebook that may have no parameter for them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from kit.config.presets import PRESETS
from kit.errors import RunError, did_you_mean
from kit.reports.runs import RunSettings
from kit.runs.parameters import Parameter, open_notebook

SEED, PRESET = "seed", "preset"


def for_notebook(
    path: Path, known: Mapping[str, Parameter], given: Mapping[str, object], settings: RunSettings
) -> tuple[dict[str, object], RunSettings]:
    """The parameters that a notebook is given, and the settings that its sessions are told.

    A seed or preset goes to the notebook's parameter of that name. Where it has none, sessions are
    told: each takes the seed instead of its own, and one that is started with a preset's name takes
    the other preset.

    Raises:
        RunError: it is given twice, it would have no effect, or there is no such preset.
    """
    values = dict(given)
    if settings.preset is not None and settings.preset not in PRESETS:
        raise RunError(
            f"There is no preset {settings.preset!r}.", fix=did_you_mean(settings.preset, PRESETS)
        )
    for name in (SEED, PRESET):
        value = getattr(settings, name)
        if value is None:
            continue
        if name in values:
            raise RunError(
                f"The {name} is given twice: --{name} {value} and -p {name} {values[name]}.",
                fix="leave one of them out.",
            )
        if name in known:
            values[name] = str(value)
            settings = settings.model_copy(update={name: None})
        else:
            _refuse_without_effect(path, name, value)
    return values, settings


def _refuse_without_effect(path: Path, name: str, value: object) -> None:
    starts = list(_starts(path))
    if any(name == SEED or _is_by_preset(call) for call in starts):
        return
    what = "starts its session by other settings" if starts else "starts no session"
    example = "seed: int = 0  # the same seed gives the same run"
    if name == PRESET:
        example = 'preset: str = "tiny"  # or another preset'
    raise RunError(
        f"--{name} {value} would have no effect: {path} has no parameter {name!r} and {what}.",
        fix=f"write `{example}` into its parameters cell and use it in the notebook.",
    )


def _starts(path: Path) -> Iterator[ast.Call]:
    """The calls in a notebook that start a session."""
    for cell in open_notebook(path).cells:
        if cell.cell_type != "code":
            continue
        lines = (line for line in cell.source.splitlines() if not line.lstrip().startswith("%"))
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("RLSession.start"):
                yield node


def _is_by_preset(call: ast.Call) -> bool:
    """Whether a call starts a session by a preset's name, or with no configuration."""
    named = [word.value for word in call.keywords if word.arg == "config"]
    config = (call.args or named or [ast.Constant("tiny")])[0]
    return isinstance(config, ast.Constant) and config.value in PRESETS
