"""What the suite costs, in processor time: `make test ARGS="-p tests.costs"` ends with the dearest files.

Seconds of all threads, and of the processes that a test has started and waited for. Unlike times on a clock they hardly
depend on what else runs. What a process spends on imports before its first test is not among them.
"""

import os
from collections import defaultdict
from collections.abc import Generator

import pytest

SHOWN = 40


def spent() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


class Costs:
    """Notes what each test took in the process that ran it, and adds up where the suite was started."""

    def __init__(self) -> None:
        self._before = spent()
        self.by_file: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = spent()
        report.user_properties.append(("processor seconds", now - self._before))
        self._before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, seconds = report.user_properties[-1]
        self.by_file[report.nodeid.split("::")[0]] += float(str(seconds))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"{sum(self.by_file.values()):.0f} processor seconds")
        for seconds, file in sorted(((each, file) for file, each in self.by_file.items()), reverse=True)[
            :SHOWN
        ]:
            terminalreporter.write_line(f"{seconds:8.1f}  {file}")


def pytest_configure(config: pytest.Config) -> None:
    """Take part, in each worker too."""
    config.pluginmanager.register(Costs())
