"""Skips where everything should be there are failures."""

from __future__ import annotations

import pytest
import skips

TESTS = """
import pytest

def test_package(): pytest.importorskip("no_such_package")
def test_data(): pytest.skip("no data: OFFRAMP_DATA names it")
@pytest.mark.skipif(True, reason="no GPU")
def test_machine(): pass
@pytest.mark.xfail(strict=True)
def test_limit(): raise AssertionError
"""


@pytest.mark.parametrize(
    ("set_", "near", "failed", "skipped"), [(False, True, 0, 3), (True, True, 2, 1), (True, False, 1, 2)]
)
def test_what_is_skipped_fails_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, set_: bool, near: bool, failed: int, skipped: int
) -> None:
    monkeypatch.setenv("CI", "true" if set_ else "")
    monkeypatch.setattr(skips, "_DATA", near)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "skips", "-p", "no:xdist")
    result.assert_outcomes(failed=failed, skipped=skipped, xfailed=1)


def test_a_module_that_skips_fails_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile('import pytest\npytest.importorskip("no_such_package")')
    assert pytester.runpytest_inprocess("-p", "skips", "-p", "no:xdist").ret == pytest.ExitCode.INTERRUPTED
