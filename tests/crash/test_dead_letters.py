"""A redrive that is killed, and repeated, sends every dead letter once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_jetstream.testing import NatsServer, wait_until
from tests.burials import Desk
from tests.stack import Stack


@pytest.mark.timeout(120)
def test_a_redrive_that_is_killed_is_repeated_and_sends_every_event_once(
    make_stack: Callable[..., Stack], nats_server: NatsServer, rounds: int
) -> None:
    """kill -9 between any two of read, send and delete; told by the stream's own event ids."""
    stack = make_stack()
    desk = Desk(nats_server.url, stack.names)
    count = 600 if rounds == 1 else 2000
    try:
        for _ in range(rounds):
            before = desk.event_ids()
            desk.bury(count=count)
            event_ids = [letter.event_id for letter in desk.letters.list(limit=count)]
            arguments = ("jetstream", "dlq", "redrive", "--all", "--rate", f"{count}/s")
            for kill_at in (0.4,) if rounds == 1 else (0.3, 0.6, 0.9):
                process = stack.celery(*arguments)
                wait_until(
                    lambda at=kill_at: desk.count() < count * (1 - at),  # type: ignore[misc]
                    30,
                    "the redrive to be in its middle",
                )
                process.kill()
            assert 0 < desk.count() < count
            assert stack.celery(*arguments[:-2]).wait() == 0
            assert desk.count() == 0
            assert desk.event_ids() == [*before, *event_ids]
    finally:
        desk.close()
