"""Celery and NATS JetStream, joined: events become tasks, and a task's end is a settlement.

What is public here is loaded, all of it, when one of it is first used: Celery and nats-py cost
half a second, which who only has this package installed (every pytest run, for its plugin) need
not pay.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # else any name would do

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            return _module(name)
        from . import delivery, events, exceptions, extension, handlers, settlement, tasks, upcasts

        for home in (delivery, events, exceptions, extension, handlers, settlement, tasks, upcasts):
            globals().update({each: vars(home)[each] for each in __all__ if each in home.__all__})
        return globals()[name]

    def _module(name: str) -> Any:
        """``celery_jetstream.signals``, without an import of its own."""
        from importlib import import_module, util

        full = f"{__name__}.{name}"
        if name.startswith("_") or util.find_spec(full) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(full)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
