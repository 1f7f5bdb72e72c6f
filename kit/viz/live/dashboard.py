"""`TrainingStatus`: a training at one moment, in parts that can each be drawn again.

head      state in words, progress, time left, what to look at
curves    reward, length, entropy, KL, mismatch, gradient norm; where a step's time goes
samples   the newest step's responses, a few
"""

from __future__ import annotations

import math
from dataclasses import replace

from markupsafe import Markup

from kit.reports import REWARD, StepReport, TrainingStatus
from kit.utils.formatting import both_ends, count, duration, mean, number, shorten
from kit.viz.curves import Curve, numbered, run_curves
from kit.viz.html import Child, Column, badge, join, note, number_bar, table, tag, title
from kit.viz.render import register
from kit.viz.reports.training import phase_bar, phases, step_concerns
from kit.viz.reports.update import concern_list
from kit.viz.samples.rollout import STATUS_SIGNS, reward_scale
from kit.viz.svg import caption, panels

MEASURES = (
    REWARD,
    "rollout/response_len/mean",
    "train/entropy_loss",
    "train/update_kl",
    "train/train_rollout_logprob_abs_diff",
    "train/grad_norm",
)
WITH_REFERENCE = tuple("train/kl_loss" if m == "train/update_kl" else m for m in MEASURES)
"""Where there is a reference model, the distance from it says more."""
SPEED = "perf/tokens_per_gpu_per_sec"
SHOWN_SAMPLES = 6
RECENT = 20
"""Steps whose times are averaged: those of a single one jump."""
_WORDS = {
    "ready": ("○ Not begun", "plain"),
    "running": ("▶ Running", "good"),
    "paused": ("‖ Paused", "warn"),
    "stopped": ("■ Stopped", "warn"),
    "finished": ("✓ Finished", "good"),
    "failed": ("✗ Failed", "bad"),
}
_ASKED = {
    "run": "▶ Goes on when the session is free",
    "pause": "‖ Pausing after this step",
    "stop": "■ Stopping after this step",
}


def _state_words(status: TrainingStatus) -> tuple[str, str]:
    """The state in a few words, and the kind of badge that goes with it."""
    return (_ASKED[status.asked], "warn") if status.asked else _WORDS[status.state]


def dashboard_html(status: TrainingStatus) -> Markup:
    """All parts, as they are kept in a saved notebook."""
    return join(head_html(status), curves_html(status), samples_html(status.last))


def head_html(status: TrainingStatus) -> Markup:
    """State, progress, and what went wrong."""
    return join(
        title("Training ", badge(*_state_words(status))),
        _progress(status),
        tag("div", _progress_words(status), class_="kv-muted"),
        *(tag("div", line) for line in _reasons(status)),
    )


def _reasons(status: TrainingStatus) -> list[str]:
    """Why it ended, line by line, cut where they are many or long."""
    lines = [*status.stopped.splitlines()[:12], *status.error.splitlines()[:12]]
    return [shorten(line, 400) for line in lines if line.strip()]


def _progress(status: TrainingStatus) -> Markup:
    share = 100 * status.done / max(status.total, 1)
    return tag(
        "div",
        tag("i", style=f"width:{share:.4g}%"),
        class_="kv-progress",
        role="progressbar",
        aria_label="training steps done",
        aria_valuemin="0",
        aria_valuemax=str(status.total),
        aria_valuenow=str(status.done),
    )


def _progress_words(status: TrainingStatus) -> str:
    """`37 of 100 steps · 0.26 s a step · 16 s left`."""
    parts = [f"{status.done:,} of {count(status.total, 'step')}"]
    if math.isfinite(status.step_seconds):
        parts.append(f"{duration(status.step_seconds)} a step")
        if not status.ended:
            parts.append(f"about {duration(status.seconds_left)} left")
    recent = [row[SPEED] for row in status.history[-RECENT:] if SPEED in row]
    if recent:
        parts.append(f"{mean(recent):,.0f} tokens/s")
    if status.step > status.done:
        parts.append(f"{count(status.step, 'step')} since the session began")
    return " · ".join(parts)


def measures(status: TrainingStatus) -> list[Curve]:
    """The curves of the session so far."""
    rows = status.history
    names = WITH_REFERENCE if rows and "train/kl_loss" in rows[-1] else MEASURES
    return run_curves(numbered(rows, status.step - 1), names, {})


def curves_html(status: TrainingStatus) -> Markup:
    """The measures, and where the time of the last steps went."""
    drawn = measures(status)
    off = concern_list(step_concerns(status.last)) if status.last else None
    return join(panels(drawn), caption(drawn), off, _times(status))


def _times(status: TrainingStatus) -> Markup | None:
    if status.last is None:
        return None
    recent = status.history[-min(RECENT, status.done) :]
    names = [name for name in status.last.metrics if name.startswith("perf/")]
    means = {name: mean([row[name] for row in recent if name in row]) for name in names}
    bar = phase_bar(phases(replace(status.last, metrics=means)))
    if bar is None:
        return None
    span = f"mean of the last {len(recent)} steps" if len(recent) > 1 else "the last step"
    words = f"Where a step's time goes ({span})"
    return tag("div", tag("div", words, class_="kv-muted"), bar, class_="kv-section")


def samples_html(step: StepReport | None) -> Markup | None:
    """The first response to each of a few prompts of the newest step."""
    if step is None:
        return None
    groups = step.rollout.groups()
    chosen = [group[0] for group in groups[:: max(len(groups) // SHOWN_SAMPLES, 1)]]
    scale = reward_scale([s.reward for s in chosen if s.reward is not None])
    heads = [Column("reward", "num"), Column("prompt"), Column("response")]
    heads += [Column("answer", "fit"), Column("", "fit")]
    rows: list[list[Child]] = [
        [
            number_bar(sample.reward, *scale),
            tag("span", both_ends(sample.prompt_text, 200), class_="kv-text"),
            tag("span", both_ends(sample.response, 300) or "∅", class_="kv-text"),
            shorten(sample.label_text or "–", 30),
            STATUS_SIGNS[sample.status],
        ]
        for sample in chosen[:SHOWN_SAMPLES]
    ]
    return tag(
        "div",
        title(f"Newest samples, of step {step.step}"),
        table(heads, rows),
        note("session.last_rollout shows all samples of its step."),
        class_="kv-section",
    )


def dashboard_plain(status: TrainingStatus) -> str:
    """State, progress and the newest numbers, for a terminal."""
    lines = [f"Training: {_state_words(status)[0]}", f"  {_progress_words(status)}"]
    lines += [f"  {line}" for line in _reasons(status)]
    rows = {c.name: c.points[-1][1] for c in measures(status) if c.points}
    lines += [f"  {name}  {number(value)}" for name, value in rows.items()]
    return "\n".join(lines)


register(TrainingStatus, dashboard_html, dashboard_plain)
