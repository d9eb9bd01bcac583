"""How many physical cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def physical_cores() -> int:
    """Physical cores within this process's affinity and its control group's quota; at least 1.

    Where the system does not tell (other than Linux), the number of logical cores.
    """
    try:
        logical = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in logical}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Cores' worth of time that the control group grants (version 2, then 1), rounded up."""
    for read in (_quota_v2, _quota_v1):
        try:
            return max(1, math.ceil(read()))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return os.cpu_count() or 1


def _quota_v2() -> float:
    group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::/")[2]
    folders = [_CGROUP / group, *(_CGROUP / group).parents]
    quotas = [
        int(quota) / int(period)
        for folder in folders
        if (folder / "cpu.max").is_file()
        for quota, period in [(folder / "cpu.max").read_text(encoding="ascii").split()]
        if quota != "max"
    ]
    return min(quotas)


def _quota_v1() -> float:
    folder = _CGROUP / "cpu"
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
    if quota <= 0:
        raise ValueError("no quota")
    return quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
