"""A Celery broker without a server, for the examples: files in a folder.

It is kombu's ``filesystem`` transport, with one difference: a message file gets its name when it
is complete. kombu's own can be seen, and taken, while it is still empty, and the worker then ends
with a JSON error. Fit for examples on one machine, and for nothing else: a killed worker loses the
copies it had fetched (the bridge sends them again), and idle workers poll.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps


def settings(folder: Path) -> dict[str, Any]:
    """Celery settings for a broker in ``folder``; none where ``CELERY_BROKER_URL`` names one."""
    if os.environ.get("CELERY_BROKER_URL"):
        return {}
    messages, control = folder / "messages", folder / "control"
    for part in (messages, control):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "broker_url": "filesystem://localhost",
        "broker_transport": "examples.broker:Transport",
        "broker_transport_options": {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
            "polling_interval": 0.05,
        },
    }


class Channel(filesystem.Channel):
    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        folder = Path(self.data_folder_out)
        unfinished = folder / f"{uuid.uuid4().hex}.part"
        unfinished.write_bytes(str_to_bytes(dumps(payload)))
        name = f"{round(time.monotonic() * 1000)}_{uuid.uuid4()}.{queue}.msg"
        unfinished.replace(folder / name)


class Transport(filesystem.Transport):
    Channel = Channel
