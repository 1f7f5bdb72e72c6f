"""What `make lab` opens: the lessons in their order, at a port of choice, without questions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert '--ServerApp.root_dir="notebooks"' in plain


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_of_the_set_up_works_with_copies_in_a_folder_of_their_own(
    tmp_path: Path,
) -> None:
    shared, home = tmp_path / "shared", tmp_path / "home"
    ready = shared / ".venv" / "bin"
    ready.mkdir(parents=True)
    (ready / "python").write_text("#!/bin/sh\n")  # runs whatever it is given, to no effect
    (ready / "python").chmod(0o755)
    for name in ("Makefile", "config.yaml", "notebooks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, shared / name)
    home.mkdir()
    os.chown(home, 65534, 65534)
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)

    def make(target: str) -> str:
        somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        made = subprocess.run(
            [*somebody, "make", "--no-print-directory", target],
            cwd=shared,
            env={"PATH": os.environ["PATH"], "HOME": str(home)},
            capture_output=True,
            text=True,
        )
        return made.stdout + made.stderr

    assert "have its owner run `make demo` once" in make("lab")
    (shared / ".venv" / ".kit").touch()
    said = make("lab")
    assert f"Your copies of the lessons are in {home}/kit-lessons/notebooks" in said
    mine = home / "kit-lessons" / "notebooks"
    assert {p.name for p in mine.iterdir()} >= {p.name for p in NOTEBOOKS.glob("*.ipynb")}
    assert (home / "kit-lessons" / "config.yaml").is_file()
    (mine / "START.md").write_text("mine")
    make("lab")
    assert (mine / "START.md").read_text() == "mine"
    (ready / "python").chmod(0o700)
    assert "may not read the packages" in make("lab")


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
