"""The child process of `conftest.py`: imports SGLang, then runs one test for each line it reads."""

import json
import os
import sys
from typing import Any

import pytest

from kit.cluster.lean_imports import leave_out


class Reports:
    """Collects what pytest reports of a test, in a form that can be sent."""

    def __init__(self) -> None:
        self.config: Any = None
        self.sent: list[dict[str, Any]] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        self.sent.append(hook.pytest_report_to_serializable(config=self.config, report=report))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not stand between the answers
    import scipy.stats  # noqa: F401, which tests need and a stack does not

    leave_out()
    import kit.engine.cpu.attention
    import kit.engine.sampling  # noqa: F401

    for line in sys.stdin:
        reports = Reports()
        code = pytest.main(["-q", "-p", "no:cacheprovider", line.strip()], plugins=[reports])
        if not reports.sent:
            raise SystemExit(f"{line.strip()} did not run: {code!r}")
        print(json.dumps(reports.sent), file=answers, flush=True)


if __name__ == "__main__":
    main()
