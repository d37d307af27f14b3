"""What /proc (Linux) tells about processes: who descends from whom, and how much CPU time they took."""

import contextlib
import itertools
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Of a process; those that it has waited for are left out."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # gone meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> list[str]:
    """Empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def option(arguments: list[str], name: str) -> str | None:
    """The word after ``name`` on a command line."""
    return dict(itertools.pairwise(arguments)).get(name)


def cpu_ns(pid: int) -> int:
    """CPU time of a process's living threads, by the scheduler's own count. 0 for a process that is gone."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total
