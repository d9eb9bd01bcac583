"""What continuous integration does not forgive: where ``CI`` is set, a skip for want of a package or of data fails.

They should be there. What a machine cannot have (a GPU, another platform) is said by ``skipif`` marks, which stay
skips; so do tests of data where no data is near.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

_DATA = bool(os.environ.get("OFFRAMP_DATA")) or (Path(__file__).parents[2] / "shared").is_dir()


def _forgiven(report: pytest.TestReport | pytest.CollectReport, item: pytest.Item | None) -> bool:
    """Whether a skip stays one."""
    if not os.environ.get("CI") or hasattr(report, "wasxfail"):
        return True
    marked = item is not None and any(item.iter_markers("skipif"))
    return marked or ("OFFRAMP_DATA" in str(report.longrepr) and not _DATA)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not _forgiven(report, item):
        report.outcome, report.longrepr = "failed", f"skipped where CI is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and not _forgiven(report, None):
        report.outcome, report.longrepr = "failed", f"skipped where CI is set: {report.longrepr}"
    return report
