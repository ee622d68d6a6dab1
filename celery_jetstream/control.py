"""``celery -A app inspect jetstream``: what each worker's main process knows of itself.

Runs in the thread in which Celery hears its remote control, so it asks nobody and does not wait.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

from .exceptions import CeleryJetStreamError

__all__ = ("jetstream",)


@inspect_command()
def jetstream(state: Any, **_: Any) -> dict[str, Any]:
    """How its connection to NATS is, and what it holds of JetStream's messages."""
    found = getattr(state.app, "jetstream", None)
    if found is None:
        return {"error": "this app has no JetStream"}
    try:
        report: dict[str, Any] = found.health.now()
        report["worker"] = {
            "held": len(found.keeper.held()),
            "handlers": {task.name: list(task.event_types) for task in found.check().tasks},
        }
    except CeleryJetStreamError as error:
        return {"error": str(error)}
    return report
