"""What each built-in reward gives to a response."""

import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kit.rewards
from kit.config import DataConfig, RewardConfig
from kit.data import load_prompts
from kit.errors import ConfigError, RewardError
from kit.rewards import BUILT_IN, build, check, grade
from kit.rewards.grader_process import Apart
from kit.rewards.verifiers import last_boxed, last_number
from kit.samples import Sample
from kit.tiny import TASKS, rows


def test_exact_forgives_only_white_space_around() -> None:
    assert grade("exact", " 82\n", "82") == 1.0
    assert grade("exact", "8 2", "82") == 0.0
    assert grade("exact", "The answer is 82", "82") == 0.0
    assert grade("exact", "", "82") == 0.0
    assert grade(
        "exact", "cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    )
    assert grade("exact", "cafe", "caf\N{LATIN SMALL LETTER E WITH ACUTE}") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("so it is 42.", 42),
        ("1, 2, 3", 3),
        ("1,234,567.5 m", Fraction("1234567.5")),
        ("-7", -7),
        ("x=-7", -7),
        ("x is -7", -7),
        ("5-3", 3),
        ("from 10 - 3", 3),
        ("+4", 4),
        ("\N{MINUS SIGN}2", -2),
        (".5", Fraction(1, 2)),
        ("-$1,000", -1000),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("2e3", 2000),
        ("1.5E-2", Fraction("0.015")),
        ("1{,}000", 1000),
        ("1\N{THIN SPACE}234\N{THIN SPACE}567", 1234567),
        ("1\N{NARROW NO-BREAK SPACE}000,50 and 1\N{NO-BREAK SPACE}000.5", Fraction("1000.5")),
        ("12\N{NO-BREAK SPACE}34", 34),
        ("½", Fraction(1, 2)),
        ("2½", Fraction(5, 2)),
        ("-2 ¾ m", Fraction(-11, 4)),
        ("1\N{FRACTION SLASH}3", Fraction(1, 3)),
        ("1 1/2", Fraction(3, 2)),
        ("7 5/4", Fraction(5, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"\frac12", Fraction(1, 2)),
        ("it is \N{EN DASH}5", -5),
        ("pages 3\N{EN DASH}5", 5),
        ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", 42),
        (r"50\%", 50),
        ("1\\,000", 1000),
        ("3>1>6>8=8", 8),
        ("no number", None),
        ("", None),
        ("1/0", None),
        ("007", 7),
        ("1,23", 23),
        ("9" * 5000, None),
        ("1e999999999", 999999999),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, value: Fraction | None) -> None:
    assert last_number(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_any_decimal_is_read_back_exactly(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    sign, whole = ("-" if digits < 0 else ""), f"{abs(digits):0{places + 1}d}"
    integer, decimals = whole[: len(whole) - places], whole[len(whole) - places :]
    text = f"{sign}{int(integer):,}" + (f".{decimals}" if decimals else "")
    assert last_number(f"First 3, then {text}.") == value


@given(st.text(max_size=60))
def test_no_response_breaks_a_verifier_of_text(response: str) -> None:
    for name in ("exact", "number", "gsm8k"):
        assert grade(name, response, "42") in (0.0, 1.0)


def test_number_compares_values_and_not_spellings() -> None:
    assert grade("number", "It costs $1,234.50", "1234.5") == 1.0
    assert grade("number", "half, that is 1/2", "0.5") == 1.0
    assert grade("number", "first 42, then 43", "42") == 0.0
    assert grade("number", "none", "42") == 0.0
    assert grade("number", "72%", "72") == grade("number", "72", "72 %") == 1.0
    assert grade("number", "72%", "0.72") == grade("number", "0.72", "72%") == 1.0
    assert grade("number", "72%", "0.72%") == grade("number", "7200", "72%") == 0.0
    with pytest.raises(RewardError, match="'north' holds no number"):
        grade("number", "42", "north")


def test_gsm8k_takes_the_marked_answer_before_any_other_number() -> None:
    solution = "She has 40 and finds 2.\n#### 42"
    assert grade("gsm8k", "40+2=42\n#### 42", solution) == 1.0
    assert grade("gsm8k", "#### 42 apples (of 50)", "42") == 1.0
    assert grade("gsm8k", "#### $1,042", "#### 1042") == 1.0
    assert grade("gsm8k", "42\n#### 41", solution) == 0.0
    assert grade("gsm8k", r"so \boxed{42}, as 40 + 2", solution) == 1.0
    assert grade("gsm8k", "The answer is 42.", solution) == 1.0
    assert grade("gsm8k", "42 is right\n####", solution) == 0.0


def test_a_box_is_read_with_its_inner_braces() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"\boxed{0.5}", "1/2", 1),
        (r"\boxed{\frac12}", r"\frac{1}{2}", 1),
        (r"\boxed{1+x^2}", "x^2+1", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{(2, 1)}", "(1,2)", 0),
        (r"\boxed{1,234}", "1234", 1),
        (r"It is $\sqrt{8}$.", r"2\sqrt{2}", 1),
        ("The answer is 42.", "42", 1),
        (r"first \boxed{41}, no: \boxed{42}", "42", 1),
        (r"\boxed{41}", "42", 0),
        (r"\boxed{5}", "So $x=5$", 1),
        (r"\boxed{north}", r"\text{north}", 1),
        ("hello", "hello", 1),
        ("", "42", 0),
        (r"\boxed{", "42", 0),
        (r"\boxed{}", "42", 0),
        ("\N{MINUS SIGN}5", "-5", 1),
        (r"\fbox{42}", "42", 1),
        (r"\boxed{½}", "0.5", 1),
        ("2½", "2.5", 1),
        (r"\boxed{café}", "cafe\N{COMBINING ACUTE ACCENT}", 1),
    ],
)
def test_math_compares_expressions(response: str, label: str, reward: float) -> None:
    assert grade("math", response, label) == reward


def test_math_works_in_any_thread() -> None:
    grades: list[float] = []
    threads = [
        threading.Thread(target=lambda: grades.append(grade("math", r"\boxed{2/4}", "1/2")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == [1.0] * 4


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_is_graded() -> None:
    apart = Apart(cpu_seconds=0.5)
    try:
        for endless in ("9^{9^{9^{9}}}", "1000000000!", "(" * 3000 + "1" + ")" * 3000):
            response = f"\\boxed{{{endless}}}"
            assert apart.grade("math", response=response, label="2") == 0.0
        assert countdown(apart, "9**9**9") == 0.0
        assert apart.grade("format", response="a" * 60 + "b", pattern="(a+)+$") == 0.0
        assert countdown(apart, "1 + 2") == 1.0
        assert apart.grade("math", response="2", label="2") == 1.0
    finally:
        apart.close()


def test_a_helper_that_ended_is_started_again() -> None:
    apart = Apart()
    try:
        assert apart.grade("math", response="2", label="2") == 1.0
        apart.close()
        assert apart.grade("math", response="2", label="2") == 1.0
    finally:
        apart.close()


def test_what_does_not_listen_to_the_timer_is_killed() -> None:
    code = (
        "import signal, grader_worker\n"
        "with grader_worker.cpu_time(0.1):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGVTALRM})\n"
        "    while True: pass\n"
    )
    folder = str(Path(kit.rewards.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({folder!r})\n{code}"], check=False
    )
    assert done.returncode == -signal.SIGXCPU


def countdown(apart: Apart, answer: str) -> float:
    entry = {"question": "", "answer": "1 + 2", "metadata": {"numbers": [1, 2], "target": 3}}
    return apart.grade("reasoning_gym", answer=answer, dataset="countdown", entry=entry)


def test_format_looks_for_the_pattern_over_several_lines() -> None:
    pattern = r"^<think>.*</think>\s*\d+$"
    assert grade("format", "<think>a\nb</think>\n7", None, pattern=pattern) == 1.0
    assert grade("format", "7", None, pattern=pattern) == 0.0
    assert grade("format", "a7", None, {"format_pattern": r"\d"}) == 1.0
    with pytest.raises(RewardError, match=r"reward\.format_pattern"):
        grade("format", "7", None)


def test_reasoning_gym_grades_its_own_rows() -> None:
    config = DataConfig(source="reasoning_gym:gsm_symbolic", size=10)
    row = load_prompts(config, split="train")[0]
    label = row.label or ""

    def reward(response: str) -> float:
        return grade("reasoning_gym", response, row.label, row.metadata)

    assert reward(label) == 1.0
    assert reward(f"<answer>\n{label}\n</answer> 3") == 1.0
    assert reward(rf"3, so \boxed{{{label}}}") == 1.0
    assert reward(f"It starts with 3 and ends with {label}.") == 1.0
    assert reward(f"It is {label}; no, it is {int(label) + 1}.") < 0.1
    assert reward("I do not know") == 0.0


@pytest.mark.parametrize(
    "task", ["leg_counting", "word_sorting", "countdown", "propositional_logic"]
)
def test_reasoning_gym_gives_full_marks_to_a_right_answer_of_every_kind(task: str) -> None:
    row = load_prompts(DataConfig(source=f"reasoning_gym:{task}", size=10), split="train")[1]
    right = row.label or str(row.metadata["entry"]["metadata"].get("example_answer"))
    assert grade("reasoning_gym", f"<answer>{right}</answer>", row.label, row.metadata) == 1.0
    assert grade("reasoning_gym", "<answer>(((</answer>", row.label, row.metadata) < 0.1


def test_reasoning_gym_takes_rows_as_reasoning_gym_gives_them() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("leg_counting", size=1, seed=1)[0]
    assert grade("reasoning_gym", entry["answer"], entry["answer"], entry) == 1.0
    assert grade("reasoning_gym", entry["answer"], entry["answer"], entry["metadata"]) == 1.0
    with pytest.raises(RewardError, match=r"lacks it. It has: level"):
        grade("reasoning_gym", "4", "4", {"level": 1})


def test_tiny_tasks_give_full_marks_to_right_answers() -> None:
    for name, task in TASKS.items():
        for row in rows(name, "held_out")[:50]:
            assert grade(task.reward, row["label"], row["label"], row["metadata"]) == 1.0
            wrong = str(int(row["label"]) + 1)
            assert grade(task.reward, wrong, row["label"], row["metadata"]) == 0.0


def test_a_row_without_a_label_says_which_setting_names_it() -> None:
    for name in ("exact", "number", "math", "gsm8k"):
        with pytest.raises(RewardError, match=r"data\.label_key"):
            grade(name, "42", None)


def test_an_unknown_reward_gets_a_suggestion() -> None:
    with pytest.raises(RewardError, match=r"'mathh'.*\n.*Did you mean 'math'"):
        grade("mathh", "42", "42")
    assert set(BUILT_IN) == {"exact", "number", "math", "gsm8k", "format", "reasoning_gym"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "exakt"}, "Did you mean 'exact'"),
        ({"weights": {"math": 1.0, "formt": 0.1}}, "Did you mean 'format'"),
        ({"name": "format"}, "no pattern"),
        ({"weights": {"exact": 1.0, "format": 0.1}}, "no pattern"),
        ({"name": "format", "format_pattern": "(a"}, "no regular expression"),
        ({"name": "exact", "format_pattern": "a"}, "does not look at it"),
        ({"weights": {"exact": 0.0}}, "all 0"),
    ],
)
def test_settings_that_cannot_grade_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((RewardError, ConfigError), match=words):
        check(RewardConfig(**settings))
    with pytest.raises((RewardError, ConfigError), match=words):
        build(RewardConfig(**settings), default="exact")


def test_settings_become_one_reward_or_a_weighted_sum() -> None:
    right, wrong = Sample(response="#42", label="#42"), Sample(response="42", label="#42")
    assert build(RewardConfig(), default="exact").name == "exact"
    assert build(RewardConfig(name="number"), default="exact")(wrong) == 1.0
    both = build(
        RewardConfig(weights={"exact": 0.75, "format": 0.5}, format_pattern=r"\d"), default="math"
    )
    assert both.name == "0.75*exact + 0.5*format"
    assert [both(right), both(wrong)] == [1.25, 0.5]
    assert both.parts(wrong) == {"exact": 0.0, "format": 1.0}
