"""How a run is to be done, beside its parameters: told to its kernel, and kept in `result.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from kit.config import SessionConfig

SETTINGS_VARIABLE = "KIT_RUN_SETTINGS"
"""Tells the notebook's kernel the settings of its run, as JSON; `kit run` sets it."""


class RunSettings(BaseModel):
    """What `kit run` was asked for. A session in the run's kernel does as it says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int | None = Field(default=None, ge=0)
    """Takes the place of every session's own; None where the notebook has a parameter for it, or
    none was given."""
    preset: str | None = None
    """Takes the place of a preset's name that a notebook starts a session with."""
    samples_every: int = Field(default=10, ge=0)
    """Keep the rollout of every so many steps in `samples.jsonl`; 0 keeps none."""
    checkpoint_every: int | None = Field(default=None, ge=0)
    """Save after every so many steps, where `checkpoint.interval` says nothing; 0 never. None: in
    the first step that ends five minutes after the last save, and of each training the newest."""
    keep_warm: float = Field(default=0.0, ge=0)
    """Minutes that the stack waits for the next run."""
    attempt: int = Field(default=1, ge=1)
    """1, and one more each time that the run is resumed."""
    folder: str = ""
    """The run's."""

    @classmethod
    def here(cls) -> RunSettings:
        """Those of the run that this process belongs to."""
        text = os.environ.get(SETTINGS_VARIABLE)
        return cls.model_validate_json(text) if text else cls()


def as_the_run_says(config: SessionConfig | str | Path) -> SessionConfig | str | Path:
    """What a session is to start with, when a notebook of a run starts it with `config`."""
    from kit.config import SessionConfig
    from kit.presets import PRESETS

    settings = RunSettings.here()
    if settings.preset and isinstance(config, str) and config in PRESETS:
        config = settings.preset
    if settings.seed is not None:
        config = SessionConfig.of(config).replace("seed", settings.seed)
    return config
