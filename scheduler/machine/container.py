"""What the container that this process runs in lets it have: control groups (cgroups) of version 2 and version 1.

A group's limits hold for everything below it, so the process' own group counts and all that are above it, as far
as they can be seen from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """How many processors' time this process may use, 1.5 for example; None: as much as there is."""
    quotas = []
    for group in _groups("cpu", mount, membership):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:  # else it is max, or -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process may still take; None: as many as there are. What caches files counts as free: it is
    given back when it is needed."""
    free = []
    for group in _groups("memory", mount, membership):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal():  # else it is max
            free.append(max(0, int(limit) - max(0, int(used) - _reclaimable(group))))
    return min(free, default=None)


def _reclaimable(group: Path) -> int:
    """Bytes of the pages that cache files. Shared memory is not among them: nothing on disk stands behind it."""
    lines = (line.partition(" ") for line in _read(group / "memory.stat").splitlines())
    statistics = {name: int(value) for name, _, value in lines if value.isdecimal()}
    # Version 1 has the figures of the group alone under the plain names, and those of all below it under these.
    total = "total_" if "total_inactive_file" in statistics else ""
    return statistics.get(f"{total}inactive_file", 0) + statistics.get(f"{total}active_file", 0)


def _groups(controller: str, mount: Path, membership: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, each followed by those above it."""
    for line in _read(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2 has one hierarchy for all controllers
            hierarchies = [mount]
        elif controller in controllers.split(","):
            hierarchies = [mount / controllers, mount / controller]
        else:
            continue
        for hierarchy in hierarchies:
            # A container sees its own group at the top, whatever path the membership tells of it.
            group = hierarchy / path.lstrip("/")
            yield group
            while group != hierarchy:
                group = group.parent
                yield group


def _read(file: Path) -> str:
    """What a file says; nothing where it is not there."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
