"""Named points in the processes of the chaos runs, at which one of them can be ended.

The driver arms a point by a file of its name in ``CHAOS_POINTS``; the first process that passes it
takes the file away, and does to itself (or to its parent) what the file says.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

__all__ = ("held", "passes", "receiver")

DIRECTORY = os.environ.get("CHAOS_POINTS", "")


def passes(point: str) -> None:
    """This process is there."""
    armed = os.path.join(DIRECTORY, point)
    taken = f"{armed}.{os.getpid()}.{os.getppid()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(armed, taken)  # by one process only
        with open(taken) as file:
            plan = json.load(file)
        who = os.getppid() if plan["parent"] else os.getpid()
        if seconds := plan.get("later"):  # while this goes on
            threading.Timer(seconds, os.kill, (who, plan["signal"])).start()
        else:
            os.kill(who, plan["signal"])


def held() -> bool:
    """Whether the driver wants no more load for now: the machine is too slow for it."""
    return os.path.exists(os.path.join(DIRECTORY, "hold"))


def receiver(point: str) -> Any:
    """For a signal, whatever it says."""

    def receive(*_: Any, **__: Any) -> None:
        passes(point)

    return receive
