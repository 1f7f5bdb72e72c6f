"""Make `docs/screenshots/`: every display of the kit, all of one real run of the tiny model.

    make screenshots                                        the run, then a picture of each display
    .venv/bin/python docs/make_screenshots.py --pictures    only the pictures, of the run before

The run takes some minutes on a CPU; pictures need a chromium. What shows something gone wrong is
shown because it went wrong: a training is interrupted, responses are cut short, a reward raises. A
plan for a card needs no card. `README.md` beside the pictures has the same displays in words.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "docs" / "screenshots"
PAGE = SCREENSHOTS / "README.md"
LESSON = ROOT / "notebooks" / "02_train_to_solve.ipynb"
KEPT = ROOT / "outputs" / "screenshots.json"
"""What the last run displayed, for `--pictures`; git ignores it."""

SEED = 0
TRAINED = 30
"""Steps that are trained at once, before the next one is taken verb by verb."""
LOOKED = 15
"""After so many of them, the progress is looked at."""
RATES = (1e-5, 1e-3, 1e-2)
"""Learning rates that the what-if tries beside the configured one."""
TOO_HIGH = 0.01
"""The learning rate of the training that is interrupted."""
ODD = {"temperature": 2.0, "max_tokens": 3}
"""How the odd rollout is written."""
CHAT = [
    {"role": "system", "content": "You add numbers. Answer with the sum."},
    {"role": "user", "content": "17+25="},
]
CARD_GIB = 24
PARAMETERS = 596_049_920
"""Of Qwen3-0.6B."""
SWEPT = {"learning_rate": [1e-4, 1e-3], "steps": 8, "eval_every": 4, "save": False}
"""Parameters of the runs that are compared, two seeds each."""

WIDTH = 920
"""Pixels of a picture."""
TALLEST = 1_000
"""Pixels of a display that its picture shows, to the end of a row; the rest is more of the same."""
COLOURS = 64
WORDS = 28
"""Lines of a display in words that the page has."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One display of the run."""

    name: str
    caption: str
    html: str
    plain: str


class Album:
    """The displays of a run, in order."""

    def __init__(self) -> None:
        self.shots: list[Shot] = []
        self.facts: dict[str, str] = {}
        """About the run: machine, model, versions, times."""

    def add(self, name: str, result: Any, caption: str) -> Any:
        """Keep what a notebook stores of a result; returns the result."""
        data = result if isinstance(result, dict) else result._repr_mimebundle_()
        shot = Shot(name, caption, _anywhere(data["text/html"]), _anywhere(data["text/plain"]))
        self.shots.append(shot)
        print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
        self.save()
        return result

    def save(self) -> None:
        """For `--pictures`."""
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps([self.facts, [asdict(shot) for shot in self.shots]]))

    @classmethod
    def load(cls) -> Album:
        """Read what the last run displayed."""
        album = cls()
        album.facts, shots = json.loads(KEPT.read_text())
        album.shots = [Shot(**shot) for shot in shots]
        return album


def _anywhere(text: str) -> str:
    """Text without the places of the machine that made it."""
    for place, name in ((str(ROOT), "/opt/kit"), (str(Path.home()), "~")):
        text = text.replace(place, name)
    return text


# ---- the run -------------------------------------------------------------------------------------


def run() -> Album:
    """Go through everything that a session shows; takes some minutes."""
    from kit import RLSession, SessionConfig

    album = Album()
    config = SessionConfig.preset("tiny").replace("seed", SEED)
    config = config.replace("training.num_rollout", 60).replace("evaluation.interval", 10)
    album.add("settings", config, "The settings: the preset `tiny`, evaluated every ten steps.")
    with _watched_start() as line:
        session = RLSession.start(config)
    album.add("starting", line(), "What engine and trainer do while a session starts.")
    album.add(
        "session-started",
        session,
        "A session that has just started, with its first prompt as the model gets it.",
    )
    album.facts = _facts(session)
    album.add("check", session.check(), "`session.check()`: the invariants of a healthy start.")
    before = session.evaluate()
    _train(album, session)
    _by_verbs(album, session)
    _whole_step(album, session)
    after = session.evaluate()
    _closer(album, session, before, after)
    _interrupted(album, session)
    album.add("sessions", RLSession.sessions(), "`RLSession.sessions()`: those that are alive.")
    session.close()
    _without_session(album)
    album.save()
    return album


def _train(album: Album, session: Any) -> None:
    from kit.lifecycle.train_loop import Hooks, Training
    from kit.viz import curves
    from kit.viz.live.progress import Progress

    line = Progress(TRAINED, enabled=False)

    def look(step: Any) -> None:
        line.update(step)
        if step.step == LOOKED - 1:
            album.add("progress", line.picture(), f"The line that moves during `train({TRAINED})`.")
            album.add(
                "dashboard",
                training.status,
                f"`session.train({TRAINED}, dashboard=True)` after {LOOKED} steps; in a live "
                "notebook it has buttons to pause, step and stop.",
            )

    training = Training(
        session.debug, session.step, TRAINED, hooks=Hooks((look,), session.evaluate)
    )
    report = training.run()
    album.add("training", report, f"What `session.train({TRAINED})` returns.")
    names = ["rollout/response_len/mean", "perf/step_time"]
    album.add("curves", curves(report, names), "`curves(report, names)`: any metric of it.")


def _by_verbs(album: Album, session: Any) -> None:
    """The step after the training, verb by verb."""
    import kit

    session.snapshot("before")
    rollout = session.score(session.generate())
    mixed = next(g for g in rollout.groups() if 0 < sum(s.reward for s in g) < len(g))
    wrong = next(sample for sample in mixed if sample.reward == 0)
    album.add("rollout", rollout, "`session.score(session.generate())`: responses and rewards.")
    album.add("sample", wrong, "One of its samples, token by token.")
    batch = session.annotate(session.advantages(rollout))
    album.add("batch", batch, "`session.advantages(rollout)`: each response beside its group.")
    album.add("update", session.update(batch), "`session.update(batch)`.")
    stale = session.check_mismatch(rollout)
    album.add(
        "mismatch", stale, "`session.check_mismatch(rollout)` right after the update: it is stale."
    )
    album.add("sync", session.sync(), "`session.sync()`.")
    agreed = session.check_mismatch(session.generate())
    album.add("mismatch-pass", agreed, "`session.check_mismatch(...)` of a fresh rollout.")
    after = session.annotate(batch)
    moved = max(after.samples, key=lambda s: max(map(abs, _change(s)), default=0.0))
    album.add("moved", kit.compare(batch, after), "`kit.compare(batch, after)`: what it moved.")
    album.add("strip-change", moved.strip("change"), "The sample that the update moved most.")
    album.add("strip-entropy", moved.strip("entropy"), "The same tokens, by entropy.")
    tried = session.what_if(lr=RATES)
    album.add("what-if", tried, "`session.what_if(lr=...)`: the same update in other ways.")


def _change(sample: Any) -> list[float]:
    values = sample.token_values
    old, new = values["trainer_log_prob_before"], values["trainer_log_prob"]
    return [y - x for x, y in zip(old, new, strict=True)]


def _whole_step(album: Album, session: Any) -> None:
    session.configure({"evaluation.interval": 1, "mismatch.interval": 1})
    album.add("step", session.step(), "`session.step()`, with an evaluation and a check.")
    session.snapshot("later")
    album.add("snapshots", session.snapshots(), "`session.snapshots()`.")
    album.add("session", session, "The same session after its steps.")
    album.add(
        "memory-cpu", session.memory_plan(), "`session.memory_plan()`, with what was measured."
    )


def _closer(album: Album, session: Any, before: Any, after: Any) -> None:
    """Evaluations, comparisons, and samples that are odd."""
    from kit.viz import compare_samples

    several = session.evaluate(n_samples_per_prompt=4, temperature=1.0)
    album.add("evaluation", after, "`session.evaluate()`: greedy, on held-out prompts.")
    album.add("evaluation-pass-at-k", several, "The same with four responses each.")
    album.add(
        "comparison",
        compare_samples(before.rollout, after.rollout),
        "The held-out prompts before the first step and after the last.",
    )
    odd = session.score(session.generate(**ODD), reward=last_digit)
    album.add(
        "rollout-odd",
        odd,
        "A rollout gone wrong: drawn too hot, cut too early, scored by a function that raises.",
    )
    trial = session.try_reward(last_digit, odd)
    album.add("reward-trial", trial, "`session.try_reward(last_digit)` on it.")
    album.add(
        "sample-chat",
        session.score(session.generate([CHAT], n_samples_per_prompt=1), reward=last_digit)[0],
        "A sample of a chat.",
    )


def last_digit(sample: Any) -> float:
    """A reward with a hole: right if the last digit is, and no thought of other signs."""
    label = sample.label or "42"
    return float(int(sample.response[-1]) == int(label[-1]))


def _interrupted(album: Album, session: Any) -> None:
    session.configure(learning_rate=TOO_HIGH)

    def soon(step: Any) -> None:
        if step.step % 10 == 9:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    report = session.train(20, callbacks=soon, show=False)
    album.add(
        "training-stopped",
        report,
        f"A training at learning rate {TOO_HIGH:g}, interrupted. `session.restore` undoes it.",
    )
    session.restore("later")


def _without_session(album: Album) -> None:
    """Runs that are compared, and what needs no session."""
    import kit
    from kit.doctor import diagnose
    from kit.runs.sweep.run import run_sweep

    with tempfile.TemporaryDirectory() as scratch:
        model = _write_shape(Path(scratch) / "Qwen3-0.6B")
        config = kit.SessionConfig.preset("qwen3-0.6b").replace("model.name", str(model))
        plan = kit.memory_plan(config, device_gib=CARD_GIB)
        album.add("memory", plan, f"`kit.memory_plan('qwen3-0.6b', device_gib={CARD_GIB})`.")
        words = "`kit doctor qwen3-0.6b` on a machine without a GPU."
        album.add("diagnosis", diagnose("qwen3-0.6b"), words)
        quiet = Console(file=io.StringIO())
        folder, _ = run_sweep(
            LESSON, SWEPT, seeds=2, parallel=1, out_root=Path("papermill_runs"), console=quiet
        )
        album.add(
            "runs-compared",
            kit.compare(folder),
            "`kit.compare`: a sweep of two learning rates, two seeds each.",
        )


def _write_shape(folder: Path) -> Path:
    """A directory that tells the shape of Qwen3-0.6B, its weights a hole in a file."""
    from benchmarks.gpu_parts.workload import QWEN3_06B

    folder.mkdir()
    named = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(QWEN3_06B | named))
    size = 2 * PARAMETERS
    tensor = {"dtype": "BF16", "shape": [PARAMETERS], "data_offsets": [0, size]}
    header = json.dumps({"weights": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


@contextmanager
def _watched_start() -> Iterator[Callable[[], dict[str, str]]]:
    """Watch a session start; what the block gets tells the stages, as far as they were known."""
    from kit.cluster import progress, registry
    from kit.viz.live.progress import shown, under_way

    begin, ended, lines = time.time(), threading.Event(), [""]

    def follow() -> None:
        while not ended.wait(0.5):
            for entry in registry.living():
                stages = progress.read(entry.directory)
                if len(stages) == 2 and not any(stage.ready for stage in stages.values()):
                    lines.append(under_way(begin, stages, time.time(), ray=True))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield lambda: dict(shown(lines[-1]))
    finally:
        ended.set()
        thread.join()


def _facts(session: Any) -> dict[str, str]:
    """What the page says of the run: model, data, machine."""
    from kit.runs.result import machine
    from kit.utils.versions import versions

    config, here = session.config, machine()
    packages = ", ".join(f"{k} {v}" for k, v in versions().items() if v and k != "kit")
    return {
        "model": f"the tiny Qwen3 that ships with the kit ({config.model.name}), seed {SEED}",
        "data": f"{config.data.source}: sums of two numbers; held-out ones for evaluations",
        "training": (
            f"GRPO, learning rate {config.training.learning_rate:g}, "
            f"{config.training.rollout_batch_size} prompts x "
            f"{config.training.n_samples_per_prompt} samples a step"
        ),
        "machine": (
            f"{here['cores']} CPU cores, {here['memory_gib']:.0f} GiB, no GPU; load of the machine "
            f"at the start {os.getloadavg()[0]:.0f}"
        ),
        "versions": packages,
        "day": time.strftime("%Y-%m-%d"),
    }


# ---- the pictures --------------------------------------------------------------------------------

_AROUND = (
    '<!DOCTYPE html><meta charset="utf-8"><style>:root{{color-scheme:light dark}}'
    "body{{margin:0;font:14px system-ui,sans-serif;background:{bg};color:{fg}}}"
    "body>:not(.kit-viz){{padding:10px 12px}}</style><body>{html}"
)
_END = """tallest => {
    // Where to cut a display that is too tall: at the end of a row, not within.
    const height = document.body.getBoundingClientRect().height;
    if (height <= tallest) return Math.ceil(height);
    const ends = [...document.querySelectorAll('tr, svg, .kv-group, .kv-note, details, li')]
        .map(node => node.getBoundingClientRect().bottom).filter(end => end <= tallest);
    return Math.ceil(Math.max(...ends, 200));
}"""


def take_pictures(album: Album) -> None:
    """A PNG of each display, light and dark; those of displays that are no more are removed."""
    from playwright.sync_api import sync_playwright

    from tests.browser.lab import CHROMIUM_FLAGS

    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        sys.exit("Pictures need a chromium, and there is none (Debian: apt-get install chromium).")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    names = {f"{shot.name}-{theme}.png" for shot in album.shots for theme in ("light", "dark")}
    for old in SCREENSHOTS.glob("*.png"):
        if old.name not in names:
            old.unlink()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, headless=True, args=list(CHROMIUM_FLAGS)
        )
        for theme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": WIDTH, "height": TALLEST + 300}, color_scheme=theme
            )
            for shot in album.shots:
                _picture(page, shot, theme)
        browser.close()


def _picture(page: Any, shot: Shot, theme: str) -> None:
    from kit.viz.theme import DARK, LIGHT

    ink = LIGHT if theme == "light" else DARK
    page.set_content(_AROUND.format(html=shot.html, bg=ink["bg"], fg=ink["fg"]))
    area = {"x": 0, "y": 0, "width": WIDTH, "height": page.evaluate(_END, TALLEST)}
    image = Image.open(io.BytesIO(page.screenshot(clip=area))).convert("RGB")
    few = image.quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(SCREENSHOTS / f"{shot.name}-{theme}.png", optimize=True)


def write_page(album: Album) -> None:
    """The page beside the pictures: the run, and each display as a picture and in words."""
    lines = [
        "# Displays",
        "",
        "All of one run, which `make screenshots` makes again: the numbers of a picture are those "
        "of the others, and of the words below them.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {words} |" for name, words in album.facts.items()),
        "",
    ]
    for shot in album.shots:
        words = shot.plain.splitlines()
        cut = [f"… {len(words) - WORDS} more lines"] if len(words) > WORDS else []
        lines += [
            f"## {shot.name}",
            "",
            shot.caption,
            "",
            picture(shot.name, shot.caption),
            "",
            "<details><summary>in words</summary>",
            "",
            "```text",
            *(line.rstrip()[:160].replace("```", "~~~") for line in words[:WORDS]),
            *cut,
            "```",
            "",
            "</details>",
            "",
        ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def picture(name: str, words: str, folder: str = "") -> str:
    """A picture that follows the reader's theme, as GitHub shows it."""
    said = words.replace("`", "").replace('"', "'")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}{name}-dark.png">'
        f'<img src="{folder}{name}-light.png" alt="{said}" width="{WIDTH}"></picture>'
    )


def main() -> int:
    """Run, take the pictures, write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", action="store_true", help="only of the run before")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not arguments.pictures:
        with tempfile.TemporaryDirectory(prefix="kit-") as work:
            os.chdir(work)
            os.environ["XDG_STATE_HOME"] = work  # other sessions of this machine are none of its
            run()
            os.chdir(ROOT)
    album = Album.load()
    take_pictures(album)
    write_page(album)
    return 0


if __name__ == "__main__":
    sys.exit(main())
