"""`check_template`: a model's chat template, tried under limits before the session renders with it.

A chat template is a program that comes with a model. It can touch no files, but nothing bounds
what it computes: `{{ 'a' * 10**9 }}` takes all memory of the notebook's process, a loop in a loop
all its time. So a template that is not the kit's own is first rendered in a process that is ended
when it takes too much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.errors import ModelError
from kit.rewards.helper_process import HelperProcess
from kit.samples import Messages
from kit.utils.formatting import data_size

CPU_SECONDS = 10.0
MEMORY = 10**9
"""Bytes beyond those that the process has before it renders."""
LONGEST = 10**7
"""Characters of a prompt; a context of a million tokens has about half of them."""
_LOAD_SECONDS = 300.0
_WALL_SECONDS = 120.0
"""Last resort; the limit of CPU time holds on a busy machine too."""

_worker = HelperProcess(str(Path(__file__).with_name("template_worker.py")))
_passed: set[int] = set()


def check_template(
    template: str, prompts: Sequence[str | Messages], variables: Mapping[str, Any], model: str
) -> None:
    """Render a template with some prompts, under limits.

    Args:
        template: as the tokenizer has it.
        prompts: texts, each one user message, or conversations.
        variables: what else the template gets: special tokens, and the settings' own.
        model: names it in errors.

    Raises:
        ModelError: it takes too much time or memory, or makes a prompt of absurd length.
    """
    talks = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    if not talks or (key := hash((template, repr(talks), repr(variables)))) in _passed:
        return
    given = {"add_generation_prompt": True, "tools": None, "documents": None, **variables}
    with _worker.lock:
        try:
            why = _tried((template, talks, given, CPU_SECONDS, MEMORY))
        finally:
            _worker.end()  # its limits hold for one request
    if why:
        raise ModelError(
            f"The chat template of {model} is refused: {why}.",
            why=f"It was rendered once with {len(talks)} of the session's prompts.",
            fix="take a model from a source that you trust, give its tokenizer another "
            "chat_template, or set data.apply_chat_template: false.",
        )
    _passed.add(key)


def _tried(request: tuple[Any, ...]) -> str:
    """What is wrong with the template of a request; "" if nothing."""
    _worker.send(request)
    if _worker.reply(_LOAD_SECONDS) is None:
        return ""  # this Python cannot start it; the session itself will say what is missing
    reply = _worker.reply(_WALL_SECONDS)
    if reply is None:
        return f"it did not end within {CPU_SECONDS:.0f} seconds on a core, or ended its process"
    if "memory" in reply:
        return f"it takes more than {data_size(MEMORY)} of memory"
    if reply["longest"] > LONGEST:
        return f"it makes a prompt of {reply['longest']:,} characters"
    return ""
