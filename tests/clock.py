"""Time that tests may bound: the processor's, whatever else the machine does."""

from __future__ import annotations

import resource


def of_children() -> float:
    """Seconds of the processor's time that ended subprocesses took: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
