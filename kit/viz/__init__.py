"""Every picture of the kit: results in, displayables out.

    render.py    `render`: the display of a result, which each display registers with
    html.py      tags, tables, bars that hostile text cannot break
    theme.py     colours, light and dark
    svg.py       charts drawn by hand: bars, histograms, curves, bands over runs
    curves.py    curves as numbers, from the rows of a run
    plots.py     curves to keep, drawn with matplotlib, and in a terminal with plotext
    samples/     samples, rollouts and batches; token strips; comparisons; the sample browser
    reports/     the results of the verbs, settings, sessions, runs
    live/        what changes while it is shown: the dashboard, lines of progress

Results reach this through `kit.utils.display`, the only module below that knows it. Nothing here
runs a script, loads anything or trusts the text it shows. matplotlib, plotext and ipywidgets are
imported by the functions that draw with them.
"""

from kit.utils.display import Picture
from kit.viz import live, reports
from kit.viz.plots import curves, save_curve, terminal_curve
from kit.viz.render import render
from kit.viz.reports.runs import comparison_page
from kit.viz.reports.settings import show_config
from kit.viz.samples.batch import show_batch
from kit.viz.samples.compare import compare_samples
from kit.viz.samples.experts import show_experts
from kit.viz.samples.rollout import browse, show_rollout
from kit.viz.samples.sample import show_sample
from kit.viz.samples.strip import show_strip

show_report = render
"""The name that `render` had before it drew every kind of result."""
__all__ = [
    "Picture",
    "browse",
    "compare_samples",
    "comparison_page",
    "curves",
    "live",
    "render",
    "reports",
    "save_curve",
    "show_batch",
    "show_config",
    "show_experts",
    "show_report",
    "show_rollout",
    "show_sample",
    "show_strip",
    "terminal_curve",
]
