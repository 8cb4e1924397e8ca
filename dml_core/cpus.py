"""How many processors this process may use."""

import os


def usable_cpus() -> int:
    """Return on how many CPUs this process may run: those that it is bound to, where the system tells, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
