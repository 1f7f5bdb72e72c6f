"""A notebook that trains for two steps on the tiny model, for sweeps."""

from __future__ import annotations

from pathlib import Path

from tests.runs.conftest import write_notebook

PARAMETERS = """\
lr: float = 1e-4  # learning rate
advantage_estimator: str = "grpo"  # or any other
seed: int = 0  # the same seed gives the same run
steps: int = 2  # training steps
trouble: str = ""  # a file that says which member fails, and which one is killed
"""
TRAINS = """\
from kit import RLSession, SessionConfig

config = (
    SessionConfig.preset("tiny")
    .replace("seed", seed)
    .replace("training.learning_rate", lr)
    .replace("training.advantage_estimator", advantage_estimator)
    .replace("training.rollout_batch_size", 4)
    .replace("training.n_samples_per_prompt", 4)
    .replace("training.global_batch_size", 16)
    .replace("training.num_rollout", steps)
    .replace("evaluation.max_prompts", 8)
)
session = RLSession.start(config)
"""
TROUBLE = """\
import json, os, pathlib, signal

mine = [lr, advantage_estimator, seed]
told = json.loads(pathlib.Path(trouble).read_text()) if os.path.exists(trouble) else {}
if told.get("fails") == mine:
    raise ValueError("boom")
if told.get("is killed") == mine:
    os.kill(os.getppid(), signal.SIGKILL)
"""
ENDS = """\
session.train(steps, show=False)
session.evaluate()
session.close()
"""


def training_notebook(folder: Path) -> Path:
    """A notebook that trains; a file can have one member of a sweep fail and another killed."""
    return write_notebook(
        folder, TRAINS, TROUBLE, ENDS, parameters=PARAMETERS, name="two_steps.ipynb"
    )
