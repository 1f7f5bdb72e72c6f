"""Make `docs/course/`: the lessons, executed, as pages for people who only want to read.

    make docs                              all lessons (about ten minutes)
    .venv/bin/python docs/make_course.py 04 06    only these, and the index
    .venv/bin/python docs/make_course.py --style  only the style of the pages that are there

The pages need no scripts and no network, and follow the reader's light or dark theme. They share
one style sheet, that of the displays included. The lessons run as batch runs, with their own
parameters; what a run leaves beside its notebook is thrown away.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat

from kit.runs import run_notebook
from kit.runs.page import POLICY, write_page
from kit.viz.html import tag
from kit.viz.theme import style_sheet

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
COURSE = ROOT / "docs" / "course"
SHEET = "jupyterlab.css"
_HEAD_STYLE = re.compile(
    r'<style(?: media="([^"]*)")?(?: type="text/css")?>(.*?)</style>\n?', re.DOTALL
)
_DISPLAY_STYLE = re.compile(r"<style>\.kit-viz\{.*?</style>", re.DOTALL)
_BODY = re.compile(r"<body[^>]*>")


@dataclass(frozen=True)
class Lesson:
    """One line of the course."""

    stem: str
    title: str
    read: int
    """Minutes to read the page."""
    do: int
    """Minutes to go through the notebook in a workshop, exercises included."""
    words: str


LESSONS = (
    Lesson(
        "01_one_step",
        "One step, verb by verb",
        6,
        15,
        "The whole loop of reinforcement learning, taken once and slowly: sample answers, score "
        "them, compare each with its siblings, update the weights, hand them back. After it you "
        "know what passes from each part to the next, and have looked at all of it.",
    ),
    Lesson(
        "02_train_to_solve",
        "Train until it is solved",
        5,
        10,
        "The same loop, sixty times: a tiny model goes from forgetting every carry to adding "
        "reliably, on questions it has never seen. What to watch meanwhile, and how sure a "
        "measured accuracy is.",
    ),
    Lesson(
        "03_why_log_probs_differ",
        "Why log-probs differ",
        7,
        15,
        "Engine and trainer compute the same number twice, and must agree. Here their agreement is "
        "broken in five ways, on purpose, and a report finds the cause of each. The one failure "
        "that no error message ever tells.",
    ),
    Lesson(
        "04_samples_and_rewards",
        "Samples and rewards",
        7,
        20,
        "Read samples, grade them, write a reward of your own, and watch it being gamed: the "
        "reward climbs to the end while the true accuracy rises and then falls. Then mend the "
        "reward and train again.",
    ),
    Lesson(
        "05_estimators",
        "Every estimator, side by side",
        7,
        15,
        "One and the same batch through GRPO, Dr. GRPO, RLOO, GSPO, CISPO, REINFORCE++ and PPO: "
        "what each makes of a reward, where their losses are flat, and how they train.",
    ),
    Lesson(
        "06_reading_runs",
        "Reading runs",
        6,
        15,
        "One healthy run and four sick ones, side by side: learning rate too high and too low, a "
        "penalty that holds the model back, responses cut short. Which number tells first, and "
        "where to look next.",
    ),
    Lesson(
        "07_what_if",
        "What if?",
        5,
        15,
        "Take a step, look at it, undo it, bit by bit. Then make the same update with five "
        "learning rates, see what each moves and which goes too far, and keep the better one.",
    ),
    Lesson(
        "08_exactly_zero",
        "Exactly zero",
        8,
        20,
        "Equal weights, unequal numbers: where the last digits come from, what they do to a "
        "training, and how engine and trainer are made equal to the bit. Then a mixture of "
        "experts, where a last digit chooses the network.",
    ),
    Lesson(
        "09_lora",
        "Adapters",
        8,
        20,
        "Two narrow matrices beside each weight instead of all weights: what is trained and kept, "
        "how narrow they may be, and why. Then two students on one base and one engine, each with "
        "a reward, a learning rate and a history of its own, who come to do opposite things.",
    ),
    Lesson(
        "13_speculative",
        "Drafts",
        7,
        20,
        "Something small guesses the next tokens, and the model reads them all at once: the same "
        "answers in fewer passes. How often guesses are right, how long they should be, and what "
        "becomes of them when the model learns: a frozen draft, and one that learns along.",
    ),
    Lesson(
        "14_low_precision",
        "Fewer bits",
        8,
        20,
        "Weights in 8 and in 4 bits: what rounding does to a weight, to a policy and to a "
        "training. The engine alone with few bits, or both sides; a model that rounds badly, and "
        "the training that takes this into account.",
    ),
)


def main(chosen: list[str]) -> int:
    """Make the pages of the chosen lessons, or all; returns the exit code."""
    COURSE.mkdir(parents=True, exist_ok=True)
    if chosen == ["--style"]:
        restyle()
        return 0
    for number, lesson in enumerate(LESSONS):
        if (not chosen or lesson.stem[:2] in chosen) and not make_lesson(number):
            return 1
    make_solutions()
    make_index()
    return 0


def make_lesson(number: int) -> bool:
    """Run one lesson and write its page; says whether the lesson ran to its end."""
    stem = LESSONS[number].stem
    with tempfile.TemporaryDirectory() as scratch:
        result = run_notebook(NOTEBOOKS / f"{stem}.ipynb", out_root=scratch)
        if result.error:
            return False
        notebook = nbformat.read(result.notebook, as_version=4)
        top, bottom = (nbformat.v4.new_markdown_cell(_way(number)) for _ in range(2))
        notebook.cells = [top, *notebook.cells, bottom]
        html = _page(notebook, Path(scratch) / f"{stem}.ipynb")
        # Where it ran says nothing to a reader; where a run of theirs will be does.
        html = html.replace(str(result.folder), f"papermill_runs/{stem}")
        (COURSE / f"{stem}.html").write_text(html, encoding="utf-8")
    return True


def make_solutions() -> None:
    """One page with all solutions, their code as cells."""
    cells = [nbformat.v4.new_markdown_cell("[Course](index.html)")]
    for lesson in LESSONS:
        text = (NOTEBOOKS / "solutions" / f"{lesson.stem}.md").read_text("utf-8")
        text = text.replace(f"../{lesson.stem}.ipynb", f"{lesson.stem}.html")
        for number, part in enumerate(re.split(r"```(?:python)?\n", text)):
            kind = nbformat.v4.new_code_cell if number % 2 else nbformat.v4.new_markdown_cell
            cells.append(kind(part.strip()))
    notebook = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as scratch:
        html = _page(notebook, Path(scratch) / "solutions.ipynb")
    (COURSE / "solutions.html").write_text(html, encoding="utf-8")


def make_index() -> None:
    """The page to begin with."""
    total = sum(lesson.do for lesson in LESSONS)
    parts = [
        tag("h1", "Reinforcement learning of language models, from inside"),
        tag(
            "p",
            f"Eleven lessons of {total} minutes together, as a workshop would take them, on a "
            "laptop without a GPU. Each is a notebook that trains a real, tiny model; here they "
            "are as pages, with everything that their cells showed.",
        ),
        tag("p", "To run them yourself:"),
        tag("pre", "make lab"),
    ]
    for lesson in LESSONS:
        link = tag("a", f"{lesson.stem[:2]}  {lesson.title}", href=f"{lesson.stem}.html")
        times = f"{lesson.read} minutes to read, {lesson.do} to do"
        parts += [tag("h2", link), tag("p", lesson.words), tag("p", times, class_="quiet")]
    parts += [
        tag("h2", tag("a", "Solutions of the exercises", href="solutions.html")),
        tag("p", "Each lesson ends with three exercises that check your answer. Try them first."),
    ]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<title>The course</title><link rel="stylesheet" href="index.css"></head>'
    )
    body = tag("body", *parts)
    (COURSE / "index.html").write_text(f"{head}{body}</html>\n", encoding="utf-8")


def _page(notebook: nbformat.NotebookNode, path: Path) -> str:
    nbformat.write(notebook, path)
    page = write_page(path).read_text("utf-8")
    return share_style(page.replace(POLICY, "", 1))  # which would not let it load the style sheet


def share_style(page: str) -> str:
    """The page with all style moved to one file: JupyterLab's 7,000 lines, and the displays'."""
    head, end, body = page.partition("</head>")
    sheets = [f"@media {m}{{{css}}}" if m else css for m, css in _HEAD_STYLE.findall(head)]
    sheets.append(style_sheet())
    (COURSE / SHEET).write_text("\n".join(sheets), encoding="utf-8")
    link = f'<link rel="stylesheet" href="{SHEET}">\n'
    return _HEAD_STYLE.sub("", head) + link + end + _DISPLAY_STYLE.sub("", body)


def restyle() -> None:
    """Give the pages that are there the present style, without running their lessons."""
    make_solutions()  # which writes the style sheet
    for path in sorted(COURSE.glob("[0-9]*.html")):
        head, end, body = path.read_text("utf-8").partition("</head>")
        body = _DISPLAY_STYLE.sub("", _BODY.sub('<body class="jp-Notebook">', body, count=1))
        path.write_text(head + end + body, encoding="utf-8")
    make_index()


def _way(number: int) -> str:
    """Where to go from a lesson: the index, and its neighbours."""
    links = ["[Course](index.html)"]
    if number > 0:
        links.append(f"[← {LESSONS[number - 1].title}]({LESSONS[number - 1].stem}.html)")
    if number + 1 < len(LESSONS):
        links.append(f"[{LESSONS[number + 1].title} →]({LESSONS[number + 1].stem}.html)")
    return " · ".join(links)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
