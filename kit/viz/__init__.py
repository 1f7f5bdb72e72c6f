"""Every picture of the kit: results in, displayables out.

Results call these from `_repr_mimebundle_` and get HTML and plain text. Nothing here runs a
script, loads anything or trusts the text it shows. matplotlib and plotext are imported by the
functions that draw with them.

    html.py        tags, tables, bars that hostile text cannot break
    text.py        characters made visible, numbers in plain units
    theme.py       colours, light and dark
    metrics.py     what each metric means, should be, and when it is off
    scales.py, strips.py, tokens.py                   tokens, coloured by what is known of them
    rollouts.py, batches.py, compare.py, moved.py     samples and their groups, before and after
    updates.py, checks.py, mismatch.py, health.py,    reports and settings
    training.py, settings.py, sessions.py, trials.py,
    diagnosis.py, memory.py, snapshots.py, what_if.py,
    living.py
    browser.py, browser_widgets.py, selection.py,     samples one at a time, with widgets
    quantities.py
    lasting.py, frontend.py                           widgets, and what stays of them in a file
    bars.py, histogram.py                             bars and distributions
    history.py, plots.py, panels.py, terminal.py      curves: to keep, to draw often, in a terminal
    dashboard.py, live.py, progress.py, starting.py   a training under way, a session's start
    compared_runs.py, compared_page.py, bands.py      runs side by side
"""

from kit.utils.display import Picture
from kit.viz.plots import curves, save_curve, terminal_curve
from kit.viz.render import show_report
from kit.viz.reports.settings import show_config
from kit.viz.samples.batch import show_batch
from kit.viz.samples.compare import compare_samples
from kit.viz.samples.rollout import show_rollout
from kit.viz.samples.sample import show_sample

__all__ = [
    "Picture",
    "compare_samples",
    "curves",
    "save_curve",
    "show_batch",
    "show_config",
    "show_report",
    "show_rollout",
    "show_sample",
    "terminal_curve",
]
