"""Runs what tests compare in Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def interpreted(module: str, *arguments: str) -> list[list[str]]:
    """What a module of the tests prints in Triton's interpreter, word by word.

    It is chosen before anything is imported. Where there is a GPU, the kernels themselves are
    compared on it.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{module}", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    return [line.split() for line in run.stdout.splitlines()]
