"""The signals of celery_jetstream, in Celery's own kind (``celery.utils.dispatch.Signal``).

========================  ==================================================  =====================================
signal                    sent                                                arguments
========================  ==================================================  =====================================
before_event_publish      before an event is first sent                       event, subject, headers
after_event_publish       when JetStream confirmed that it is stored          event, result
event_publish_failed      when publishing gave up                             event, result
outbox_claimed            before a batch of the outbox's rows is published    rows
outbox_published          when the answers are there, before they are         rows, results
                          recorded
outbox_flushed            when a flush ended                                  result
message_settled           when a settlement was decided, before it is sent    delivery, settlement
message_dead_lettered     when the dead letter is stored                      delivery, reason, headers
bridge_ready              when the bridge pulls for the first time            bridge
bridge_shutting_down      when the bridge was told to stop                    bridge
========================  ==================================================  =====================================

``sender`` is the JetStream, or (message_…) its settler, or (outbox_…) its flusher. Receivers run in
the thread that caused the signal: the publish signals in the caller's thread, the outbox's in the
flush's, ``message_settled`` where the task ended, ``message_dead_lettered`` in the connection's
loop thread (do not block there). A receiver that raises is logged by Celery's dispatcher and
changes nothing.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = (
    "after_event_publish",
    "before_event_publish",
    "bridge_ready",
    "bridge_shutting_down",
    "event_publish_failed",
    "message_dead_lettered",
    "message_settled",
    "outbox_claimed",
    "outbox_flushed",
    "outbox_published",
)

before_event_publish = Signal(
    name="before_event_publish", providing_args={"event", "subject", "headers"}
)
after_event_publish = Signal(name="after_event_publish", providing_args={"event", "result"})
event_publish_failed = Signal(name="event_publish_failed", providing_args={"event", "result"})
outbox_claimed = Signal(name="outbox_claimed", providing_args={"rows"})
outbox_published = Signal(name="outbox_published", providing_args={"rows", "results"})
outbox_flushed = Signal(name="outbox_flushed", providing_args={"result"})
message_settled = Signal(name="message_settled", providing_args={"delivery", "settlement"})
message_dead_lettered = Signal(
    name="message_dead_lettered", providing_args={"delivery", "reason", "headers"}
)
bridge_ready = Signal(name="bridge_ready", providing_args={"bridge"})
bridge_shutting_down = Signal(name="bridge_shutting_down", providing_args={"bridge"})
