"""Call `kit doctor` as a person would, on a machine whose Hugging Face cache is empty."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.config import SessionConfig


@dataclass(frozen=True)
class Said:
    """One call of `kit doctor`."""

    code: int
    text: str

    @property
    def words(self) -> str:
        """On one line, however the terminal wrapped it."""
        return " ".join(self.text.split())

    def level(self, name: str) -> str:
        (found,) = re.findall(rf"^. (ok|note|problem) +{re.escape(name)}  ", self.text, re.M)
        return str(found)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HF_HOME."""
    return tmp_path / "home"


@pytest.fixture
def kit_doctor(tmp_path: Path, home: Path) -> Any:
    """Calls the command with settings, in a folder and with a Hugging Face home of its own."""

    def call(config: str | dict[str, Any] = "tiny", **env: str) -> Said:
        if isinstance(config, dict):
            config = str(SessionConfig(**config).dump(tmp_path / "config.yaml"))
        done = subprocess.run(
            [sys.executable, "-m", "kit", "doctor", config],
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
            | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Said(done.returncode, done.stdout + done.stderr)

    return call
