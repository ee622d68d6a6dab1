"""The shop's app in a process whose clock is ahead, by ``SHOP_CLOCK_AHEAD`` seconds.

Shifted are Celery's own look at a task's ``expires``, and ``time.time`` and ``datetime.now`` with
everything that reads them by these names.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import celery.worker.request

AHEAD = float(os.environ["SHOP_CLOCK_AHEAD"])
real_time, real_datetime = time.time, datetime.datetime


class AheadDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return real_datetime.now(tz) + datetime.timedelta(seconds=AHEAD)


def ahead_time() -> float:
    return real_time() + AHEAD


if AHEAD:
    time.time = ahead_time
    celery.worker.request.time = ahead_time
    celery.worker.request.datetime = AheadDatetime
    datetime.datetime = AheadDatetime  # type: ignore[misc]

from tests.apps.shop import app  # noqa: E402

__all__ = ("app",)
