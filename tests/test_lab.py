"""What `make lab` opens: the lessons in their order, at a port of choice, without questions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SCHEMAS = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"


def recipe(*variables: str) -> str:
    """The command of `make lab`, as one line."""
    made = ["make", "--dry-run", "--always-make", "lab", *variables]
    said = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said[said.index("JUPYTER_CONFIG_PATH") :].replace("\\\n", " ")


def test_port_and_browser_are_options_of_make_lab() -> None:
    plain, asked = recipe(), recipe("PORT=8890", "BROWSER=none")
    assert "--port" not in plain
    assert "--no-browser" not in plain
    assert "--port=8890" in asked
    assert "--no-browser" in asked
    assert "--ip=127.0.0.1" in plain
    assert "default_url=/lab/tree/START.md" in plain


def test_the_first_page_links_every_notebook_and_the_lessons_in_their_order() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (NOTEBOOKS / "START.md").read_text())
    assert all((NOTEBOOKS / link).exists() for link in links)
    notebooks = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert sorted(link for link in links if link.endswith(".ipynb")) == notebooks
    lessons = [link for link in links if link.startswith("0")]
    assert lessons == sorted(lessons)


def test_the_settings_of_the_lab_are_settings_that_jupyterlab_has() -> None:
    file = NOTEBOOKS / ".jupyter" / "labconfig" / "default_setting_overrides.json"
    for plugin, settings in json.loads(file.read_text()).items():
        package, _, name = plugin.partition(":")
        schema = SCHEMAS / package / f"{name}.json"
        assert schema.is_file(), f"{sys.prefix} has no JupyterLab, which requirements.lock names"
        assert settings.keys() <= json.loads(schema.read_text())["properties"].keys()
