"""What is there at the end of a run, and what must not be: the invariants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.crash.chaos.kinds import AROUND, DEAD, PLAIN, WITHIN

__all__ = ("DeadLetter", "Found", "going_on", "unquiet", "violations")


class DeadLetter(NamedTuple):
    event_id: str
    reason: str
    sequence: int


@dataclass
class Found:
    """All that the servers have.

    Attributes:
        orders: the kind of each event that was committed.
        outbox: the status of each of its rows.
        effects: how many each event had.
        inbox: the status of each event's row.
        passed_on: the events that ``passed.on`` wrote to the bank's outbox.
        dead: the bank's dead letters.
        leases: buckets of the outbox that are leased.
        holds: keys of the outbox that are held.
        stored: messages for the bank that the stream has.
        consumer: the server's account of it.
        queues: what Redis's queues hold, where they are not empty.
    """

    orders: dict[str, str] = field(default_factory=dict)
    outbox: dict[str, str] = field(default_factory=dict)
    effects: Counter[str] = field(default_factory=Counter)
    inbox: dict[str, str] = field(default_factory=dict)
    passed_on: set[str] = field(default_factory=set)
    dead: list[DeadLetter] = field(default_factory=list)
    leases: int = 0
    holds: int = 0
    stored: int = 0
    consumer: dict[str, int] = field(default_factory=dict)
    queues: dict[str, int] = field(default_factory=dict)

    def of(self, *kinds: str) -> set[str]:
        """The committed events of these kinds."""
        return {event_id for event_id, kind in self.orders.items() if kind in kinds}

    @property
    def lost(self) -> set[str]:
        """Committed, and neither handled nor a dead letter."""
        handled = self.effects.keys() | {letter.event_id for letter in self.dead}
        return self.orders.keys() - handled

    @property
    def doubled(self) -> set[str]:
        """Those that had more than one effect, of the kinds that may have one only."""
        return {event_id for event_id in self.of(*WITHIN) if self.effects[event_id] > 1}

    @property
    def stuck(self) -> set[str]:
        """Those that something is still to be done for."""
        unsent = {event_id for event_id, status in self.outbox.items() if status != "sent"}
        open_rows = {e for e, status in self.inbox.items() if status in ("received", "processing")}
        return unsent | open_rows


def unquiet(found: Found) -> list[str]:
    """What is still going on, or is stuck, in words."""
    return [f"{count} {what}" for what, count in going_on(found).items() if count]


def going_on(found: Found) -> dict[str, int]:
    """How much of each is still to be done."""
    rows = Counter(found.outbox.values())
    open_rows = Counter(found.inbox.values())
    return {
        "outbox rows that are not sent": rows.total() - rows["sent"],
        "leases of the outbox": found.leases,
        "keys held in the outbox": found.holds,
        "inbox rows that are open": open_rows["received"] + open_rows["processing"],
        "messages for the bank in the stream": found.stored,
        **{f"{name} of the consumer": found.consumer.get(name, -1) for name in _OF_CONSUMER},
        **{f"messages in Redis's {name}": count for name, count in found.queues.items()},
    }


_OF_CONSUMER = ("num_pending", "num_ack_pending")


def violations(found: Found) -> list[str]:
    """Each invariant that does not hold, as a sentence."""
    committed, dead = found.orders.keys(), [letter.event_id for letter in found.dead]
    handled = found.effects.keys()
    reasons = {(letter.event_id, letter.reason) for letter in found.dead}
    wanted = {(e, DEAD[kind]) for e, kind in found.orders.items() if kind in DEAD}
    once, inboxed = found.of(*WITHIN), found.of(*WITHIN, *AROUND)
    processed = {e for e, status in found.inbox.items() if status == "processed"}
    failed = {e for e, status in found.inbox.items() if status == "failed"}
    copies = Counter((letter.event_id, letter.sequence) for letter in found.dead)
    wrong = {
        "committed, and not in the outbox": committed - found.outbox.keys(),
        "in the outbox, and never committed": found.outbox.keys() - committed,
        "lost: committed, no effect and no dead letter": found.lost,
        "an effect of an event that was never committed": handled - committed,
        "no effect": found.of(*WITHIN, *AROUND, *PLAIN) - handled,
        "more than one effect": found.doubled,
        "an effect of an event that failed": found.of(*DEAD) & handled,
        "passed on, and not handled": found.passed_on - handled,
        "handled, and not passed on": (found.of("passed.on") & handled) - found.passed_on,
        "a dead letter of a good event, or with a wrong reason": reasons - wanted,
        "no dead letter of a bad event": wanted - reasons,
        "two dead letters of one message": {one for one, count in copies.items() if count > 1},
        "an inbox row of an event that was never committed": found.inbox.keys() - committed,
        "handled, and not processed by the inbox": (once & handled) - processed,
        "processed by the inbox, and no effect": (processed & once) - handled,
        "an inbox row that says failed": failed & inboxed,
        "a dead letter, and its inbox row does not say failed": (
            (found.of("poison.value", "poison.rejected") & set(dead)) - failed
        ),
    }
    return [
        f"{len(events)} × {what}: {_some(events)}" for what, events in wrong.items() if events
    ] + unquiet(found)


def _some(events: Iterable[object]) -> str:
    return ", ".join(map(str, sorted(events, key=str)[:5]))
