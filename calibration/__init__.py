"""When rows and tokens should leave: thresholds that keep a bundle's quality, and what they save (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp._lazy import names_of

if TYPE_CHECKING:
    from offramp.calibration.calibrator import Calibration, calibrate
    from offramp.calibration.reporting import Report, report

__all__ = ["Calibration", "Report", "calibrate", "report"]

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, {"calibrator": ("Calibration", "calibrate"), "reporting": ("Report", "report")})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
