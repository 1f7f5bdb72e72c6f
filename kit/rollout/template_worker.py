"""Renders chat templates in a process of its own, which a template without end cannot outlive.

A script: `kit/rollout/template_check.py` starts it. One request of (template, conversations,
variables, CPU seconds, bytes of memory) gives two lines: that it is ready, and what came of it.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """The tag that some templates put around an answer; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Parse the tag and what is in it."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What Transformers renders a chat template in, whose import would take seconds."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def main() -> None:
    """Serve requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    while True:
        try:
            template, conversations, variables, seconds, memory = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reply({"ready": True})
        _bound(seconds, memory)
        try:
            made = environment().from_string(template)
            lengths = (len(made.render(messages=talk, **variables)) for talk in conversations)
            reply({"longest": max(lengths)})
        except MemoryError:
            reply({"memory": True})
        except Exception:  # the session renders it itself, and says what is wrong
            reply({"longest": 0})


def _bound(seconds: float, memory: int) -> None:
    """Have the kernel end this process after so much more time on a core, and refuse memory."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
