"""The desk's app in a process whose clock is ahead: ``-A tests.crash.clock_ahead``.

``DESK_CLOCK_AHEAD`` seconds. Shifted is all that says what is too late: Celery's own look at a
copy's ``expires``, the library's, and ``time.time`` with everything that reads it by that name.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import celery.worker.request

import celery_jetstream.request
from tests.apps.desk import app

__all__ = ("app",)

AHEAD = float(os.environ["DESK_CLOCK_AHEAD"])
real_time = time.time


class AheadDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> AheadDatetime:
        return super().now(tz) + datetime.timedelta(seconds=AHEAD)


def ahead_time() -> float:
    return real_time() + AHEAD


time.time = ahead_time
celery.worker.request.time = ahead_time
celery.worker.request.datetime = AheadDatetime
celery_jetstream.request.datetime = AheadDatetime
