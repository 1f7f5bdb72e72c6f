"""`plt.style.use("kit.viz.notebook")`: plots that can be read on a light page and on a dark one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
USED = 'plt.style.use("kit.viz.notebook")'
PAGES = {"white": 1.0, "JupyterLab, dark": 17 / 255, "VS Code, dark": 31 / 255}
PLOT = f"""
import base64, io, json, os
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
with capture_output() as seen:
    shell.run_cell('''import matplotlib.pyplot as plt
{USED}
figure, axes = plt.subplots(figsize=(4, 3))
axes.plot([1, 2], label="one")
axes.legend();''')
(shown,) = seen.outputs
picture = shell.user_ns['plt'].imread(io.BytesIO(base64.b64decode(shown.data["image/png"])))
print(json.dumps([shown.metadata, float(picture[0, 0, 3]), float(picture[..., 3].max())]))
"""


def light(colour: str) -> float:
    """Relative luminance of a colour, after WCAG 2."""
    from matplotlib.colors import to_rgb

    red, green, blue = (
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_stands_out_from_a_light_page_and_from_a_dark_one() -> None:
    import matplotlib.style

    with matplotlib.style.context("kit.viz.notebook"):
        settings = matplotlib.rcParams
        inks = {name: settings[name] for name in ("text.color", "axes.edgecolor", "xtick.color")}
        inks |= {name: settings[name] for name in ("xtick.labelcolor", "ytick.labelcolor")}
        inks |= {f"C{i}": each["color"] for i, each in enumerate(settings["axes.prop_cycle"])}
        grounds = [
            settings[f"{what}.facecolor"] for what in ("figure", "axes", "savefig", "legend")
        ]
    assert grounds == ["none"] * 4
    assert len(inks) == 12
    for name, ink in inks.items():
        for page, grey in PAGES.items():
            low, high = sorted((light(ink), light(str(grey))))
            assert (high + 0.05) / (low + 0.05) > 3.5, (name, page)


def test_nothing_is_painted_behind_a_plot_and_no_front_end_is_asked_to() -> None:
    done = subprocess.run([sys.executable, "-c", PLOT], capture_output=True, text=True, check=True)
    metadata, corner, ink = json.loads(done.stdout.splitlines()[-1])
    assert "needs_background" not in str(metadata)
    assert (corner, ink) == (0.0, 1.0)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_that_plots_uses_the_style_before_its_first_plot(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    if "pyplot" in code:
        assert USED in code
        assert code.index(USED) < code.index("plt.subplots")
    for painted in ('"white"', '"black"', '"k"', '"w"'):
        assert f"color={painted}" not in code or path.stem.startswith("05"), painted
