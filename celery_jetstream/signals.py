"""The signals of celery_jetstream, in Celery's own kind (``celery.utils.dispatch.Signal``).

========================  ==================================================  =====================================
signal                    sent                                                arguments
========================  ==================================================  =====================================
event_built               when an event was made, before it is sent or        event, subject, headers
                          becomes a row; receivers may add to ``headers``
before_event_publish      before an event is first sent                       event, subject, headers
after_event_publish       when JetStream confirmed that it is stored          event, result, headers, seconds
event_publish_failed      when publishing gave up                             event, result, headers, seconds
outbox_claimed            before a batch of the outbox's rows is published    rows
outbox_published          when the answers are there, before they are         rows, results, seconds, since_read
                          recorded
outbox_flushed            when a flush ended                                  result
message_received          when JetStream delivered a message to this process  delivery
handler_started           when an attempt begins, in the process that runs    event, delivery
                          it
handler_ended             when it ended; ``error`` is what it raised, or      event, delivery, seconds, error
                          None
duplicate_skipped         when the inbox passes over an event that is done    event_id, handler, delivery
message_settled           when a settlement was decided, before it is sent    delivery, settlement, handler
message_dead_lettered     when the dead letter is stored                      delivery, reason, headers, handler
connection_opened         when a server has accepted a connection             url
connection_lost           when it is of no more use, and when the first       error
                          attempt at one failed
bridge_ready              when the bridge pulls for the first time            bridge
bridge_shutting_down      when the bridge was told to stop                    bridge
========================  ==================================================  =====================================

``seconds`` are how long it took: publishing until the answer was there (``outbox_published``: of the
whole batch; ``since_read``: since its rows were read); the attempt. ``handler`` is the task's name, ""
where there is none. ``handler_started`` and ``handler_ended`` are for tasks that a message is behind.

``sender`` is the JetStream, or (``event_built``) its publisher, (``message_settled``,
``message_dead_lettered``) its settler, (outbox_…) its flusher, (``message_received``) the bridge or
the worker's intake, (handler_…) the task, (``duplicate_skipped``) the inbox, (connection_…) the
connection. Receivers run in the thread that caused the signal: ``event_built`` and the publish
signals in the caller's thread, the outbox's in the flush's, handler_… and ``message_settled`` where
the task runs, ``message_received``, ``message_dead_lettered`` and connection_… in the connection's
loop thread (do not block there). A receiver that raises is logged by Celery's dispatcher and
changes nothing; a header that ``event_built`` was given and that may not be sent is an
``EventError`` for whoever publishes.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = (
    "after_event_publish",
    "before_event_publish",
    "bridge_ready",
    "bridge_shutting_down",
    "connection_lost",
    "connection_opened",
    "duplicate_skipped",
    "event_built",
    "event_publish_failed",
    "handler_ended",
    "handler_started",
    "message_dead_lettered",
    "message_received",
    "message_settled",
    "outbox_claimed",
    "outbox_flushed",
    "outbox_published",
)

event_built = Signal(name="event_built", providing_args={"event", "subject", "headers"})
before_event_publish = Signal(
    name="before_event_publish", providing_args={"event", "subject", "headers"}
)
after_event_publish = Signal(
    name="after_event_publish", providing_args={"event", "result", "headers", "seconds"}
)
event_publish_failed = Signal(
    name="event_publish_failed", providing_args={"event", "result", "headers", "seconds"}
)
outbox_claimed = Signal(name="outbox_claimed", providing_args={"rows"})
outbox_published = Signal(
    name="outbox_published", providing_args={"rows", "results", "seconds", "since_read"}
)
outbox_flushed = Signal(name="outbox_flushed", providing_args={"result"})
message_received = Signal(name="message_received", providing_args={"delivery"})
handler_started = Signal(name="handler_started", providing_args={"event", "delivery"})
handler_ended = Signal(
    name="handler_ended", providing_args={"event", "delivery", "seconds", "error"}
)
duplicate_skipped = Signal(
    name="duplicate_skipped", providing_args={"event_id", "handler", "delivery"}
)
message_settled = Signal(
    name="message_settled", providing_args={"delivery", "settlement", "handler"}
)
message_dead_lettered = Signal(
    name="message_dead_lettered", providing_args={"delivery", "reason", "headers", "handler"}
)
connection_opened = Signal(name="connection_opened", providing_args={"url"})
connection_lost = Signal(name="connection_lost", providing_args={"error"})
bridge_ready = Signal(name="bridge_ready", providing_args={"bridge"})
bridge_shutting_down = Signal(name="bridge_shutting_down", providing_args={"bridge"})
