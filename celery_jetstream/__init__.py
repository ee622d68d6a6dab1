"""Celery and NATS JetStream, joined: events become tasks, and a task's end is a settlement."""

from .delivery import Delivery
from .events import Event
from .exceptions import CeleryJetStreamError
from .extension import JetStream
from .handlers import JetStreamTask, jetstream_handler
from .settlement import Ack, DeadLetter, Nak
from .tasks import publish_event, publish_on
from .upcasts import upcast

__version__ = "0.1.0"

__all__ = (
    "Ack",
    "CeleryJetStreamError",
    "DeadLetter",
    "Delivery",
    "Event",
    "JetStream",
    "JetStreamTask",
    "Nak",
    "__version__",
    "jetstream_handler",
    "publish_event",
    "publish_on",
    "upcast",
)
