"""How threads wait for each other on a CPU: asleep, where we can choose; else the user is told.

OpenMP's threads spin while they wait, by default, and so take the cores from those they wait for as soon as anything else
runs: training on two cores beside one busy process took two to twelve times as long as with sleeping threads
(docs/performance.md). OpenMP reads the environment once, when torch is loaded.
"""

import os

import psutil

VARIABLE, SLEEP = "OMP_WAIT_POLICY", "PASSIVE"
BUSY = 0.5
"""Cores that other programs use, from which the user is told."""
LOOK = 0.3
"""Seconds of a look at what they use."""


def let_sleep() -> None:
    """Sets the environment, unless the user did, for processes that are started next, and this one if torch is not loaded yet."""
    os.environ.setdefault(VARIABLE, SLEEP)


def busy_hint(threads: int) -> str | None:
    """A sentence for who trains with `threads` spinning threads beside other programs; None where all is well."""
    if threads == 1 or VARIABLE in os.environ:
        return None
    cores = psutil.cpu_count() or 1
    used = psutil.cpu_percent(LOOK) / 100 * cores  # while this process sleeps
    if used < BUSY:
        return None
    return (
        f"Other programs use {used:.1f} of {cores} cores: training on the CPU can take several times as long, "
        f"as its threads spin while they wait for each other. To let them sleep, put {VARIABLE}={SLEEP} before the command."
    )
