"""Rolling deploys: two versions of an app on one consumer, side by side.

What each knows differs: a handler is changed, one is added, one is removed. Nothing is lost: an
event is handled once, or it is kept as a dead letter that says ``no_handler``.
"""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest

from tests.crash import faults
from tests.stack import CeleryProcess, Stack, handled_once, in_both_modes_soak

pytestmark = pytest.mark.timeout(240)

APP = "tests.apps.rolling"


def start(stack: Stack, version: int) -> list[CeleryProcess]:
    """A worker of that version, and its bridge where there is one; not waited for."""
    environment = {"app": APP, "ROLLING_VERSION": str(version)}
    started = [stack.start_worker(**environment)]
    if not stack.direct:
        started.append(stack.celery("jetstream", "bridge", **environment))
    return started


def wait_ready(processes: list[CeleryProcess]) -> None:
    for process, words in zip(processes, ("ready.", "bridge is ready"), strict=False):
        process.wait_for(words)


def dead(stack: Stack) -> dict[str, str]:
    """The reason of each dead letter, by event_id; the event is whole in each."""
    letters = stack.dead_letters()
    assert all(letter["context"]["event_id"].encode() in letter["body"] for letter in letters)
    return {letter["context"]["event_id"]: letter["reason"] for letter in letters}


def versions(stack: Stack, event_ids: list[str]) -> Counter[int]:
    """By which version so many of these events were handled."""
    asked = set(event_ids)
    return Counter(line["version"] for line in stack.ledger("handled") if line["event_id"] in asked)


def account(stack: Stack, what: str, event_ids: list[str]) -> Counter[str]:
    """What became of each: handled by a version, or dead; never both, never neither."""
    letters = {
        event_id: reason for event_id, reason in dead(stack).items() if event_id in event_ids
    }
    handled = [event_id for event_id in event_ids if event_id not in letters]
    by = versions(stack, event_ids)
    assert sum(by.values()) == len(handled), f"{what}: {by}, {len(letters)} dead"
    assert set(letters.values()) <= {"no_handler"}, letters
    ends = Counter({f"version {number}": count for number, count in sorted(by.items())})
    ends.update(letters.values())
    print(f"{what}: {dict(ends)}")
    return ends


@in_both_modes_soak
def test_old_and_new_side_by_side(make_stack: Any, direct: bool) -> None:
    """The new one starts, both run, the old one ends: with messages wherever they can be."""
    # longer than Celery's 32 s: a copy that the old worker's broker client has fetched and its
    # consumer never saw is requeued only when that worker has ended
    stack = make_stack(direct=direct, jetstream_ack_wait=60)
    old = start(stack, 1)
    wait_ready(old)
    removed = stack.publish("removed.running", 2, seconds=2)
    stack.wait_ledger(lambda: len(stack.ledger("begun")) >= 2, 30, "the old one to be at work")
    removed += stack.publish("removed.waiting", 100, seconds=0.05)
    changed = stack.publish("changed.early", 100, seconds=0.01)
    new = start(stack, 2)
    wait_ready(new)
    changed += stack.publish("changed.meanwhile", 300, seconds=0.01)
    added = stack.publish("added.early", 100)
    faults.in_the_middle(stack, 50)
    for process in old:
        process.send(signal.SIGTERM)
    for process in old:
        assert process.wait(45) == 0, process.text()[-3000:]
    stack.wait_settled(faults.PATIENCE)
    assert account(stack, "changed", changed).keys() == {"version 1", "version 2"}
    assert "version 1" not in account(stack, "added while the old one runs", added)
    assert "version 2" not in account(stack, "removed", removed)
    running = [line for line in stack.ledger("handled") if line["type"] == "removed.running"]
    assert len(running) == 2, "what ran was not finished"

    added = stack.publish("added.late", 100)
    stack.wait_settled(faults.PATIENCE)
    assert account(stack, "added when the old one is gone", added) == {"version 2": 100}
    handled_once(stack, changed)


@pytest.mark.soak
def test_a_new_bridge_before_its_workers(make_stack: Any) -> None:
    """Copies that no worker knows come again and again, and are no dead letters: then one does."""
    stack = make_stack(jetstream_ack_wait=10, jetstream_max_deliver=2)
    worker, bridge = start(stack, 1)
    wait_ready([worker, bridge])
    assert bridge.stop(10) == 0
    stack.bridge(app=APP, ROLLING_VERSION="2")
    added = stack.publish("added.early", 20)
    stack.wait_ledger(
        lambda: worker.text().count("is handed back") > 20 * 4, faults.PATIENCE, "four rounds"
    )
    assert stack.dead_count() == 0
    new = stack.worker(app=APP, ROLLING_VERSION="2")
    assert worker.stop() == 0
    stack.wait_settled(faults.PATIENCE)
    assert account(stack, "added, bridge first", added) == {"version 2": 20}
    assert new.poll() is None
