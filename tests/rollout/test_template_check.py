"""A chat template is a program that a model brings: tried under limits before it is used."""

from __future__ import annotations

import signal

import pytest

from kit.errors import ModelError
from kit.rewards.helper_process import HelperProcess
from kit.rollout import template_check, template_worker
from kit.rollout.template_check import check_template
from kit.tiny.recipe import CHAT_TEMPLATE

PROMPTS = ["1+1=", [{"role": "system", "content": "x"}, {"role": "user", "content": "2+2="}]]


def test_a_plain_template_passes_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_template(CHAT_TEMPLATE, PROMPTS, {"enable_thinking": False}, "some/model")
    monkeypatch.setattr(template_check, "LONGEST", 0)
    check_template(CHAT_TEMPLATE, PROMPTS, {"enable_thinking": False}, "some/model")
    with pytest.raises(ModelError, match="a prompt of"):
        check_template(CHAT_TEMPLATE, ["another"], {}, "some/model")


def test_what_the_template_refuses_is_left_to_the_session() -> None:
    check_template("{{ raise_exception('no') }}", PROMPTS, {}, "some/model")
    check_template("{% if %}", PROMPTS, {}, "some/model")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' * 10**10 }}", "takes more than 1.0 GB of memory"),
        ("{% for i in range(3000) %}{{ 'a' * 10000 }}{% endfor %}", "30,000,000 characters"),
        ("{{ bos_token + 'x' }}{% generation %}{{ 'a' * 10**10 }}{% endgeneration %}", "memory"),
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "did not end within 1 seconds",
            id="loops",
        ),
    ],
)
def test_one_that_takes_all_time_or_memory_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, template: str, why: str
) -> None:
    monkeypatch.setattr(template_check, "CPU_SECONDS", 1.0)
    with pytest.raises(ModelError, match="is refused") as caught:
        check_template(template, PROMPTS, {"bos_token": "<s>"}, "some/model")
    assert why in str(caught.value)
    assert "some/model" in str(caught.value)


def test_the_kernel_ends_a_template_without_end_at_its_limit_of_processor_time() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    worker = HelperProcess(template_worker.__file__)
    with worker.lock:
        try:
            worker.send((loops, [[]], {}, 1.0, template_check.MEMORY))
            assert worker.reply(None) == {"ready": True}
            assert worker.reply(None) is None
            assert worker.exit_code == -signal.SIGXCPU
        finally:
            worker.end()
