"""What a bridge has taken from JetStream and no worker has claimed yet: pure bookkeeping.

A message is *waiting* (not sent to the Celery broker yet) or *dispatched* (a copy lies in a
queue). It leaves when a worker claims or settles it. The rules that keep a copy from being lost,
and a queue without workers from stopping the others, are here; the doing is the bridge's.
Times are seconds of any steady clock. Not thread-safe: the bridge holds a lock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import events
from .delivery import Delivery
from .exceptions import DecodeError
from .settlement import DeadLetter

__all__ = ("Flight", "InFlight")


@dataclass(eq=False, slots=True)
class Flight:
    """One message on its way from JetStream to a worker.

    Attributes:
        delivery: the newest delivery of the message.
        subject: where it was published.
        body: as it came.
        task: the handler, once that is found; ``envelope`` is its argument.
        event_id: the event's; "" where it has none.
        options: how the copy is sent.
        queue: the Celery queue's name.
        dispatched_at: when its last copy was sent; None while it waits.
        copies: how many copies were sent.
        unended: hand-overs of which no end was heard; a message that takes its worker down each
            time has nothing else to be known by.
        admitted: whether it has a place in its queue's share.
        expires: whether its copy expires with the lease. One sent because the last was lost is
            alone, and need not (a worker whose clock is ahead finds every other copy expired).
    """

    delivery: Delivery
    subject: str
    body: bytes
    task: Any = None
    event_id: str = ""
    envelope: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    queue: str = ""
    dispatched_at: float | None = None
    copies: int = 0
    admitted: bool = False
    expires: bool = True
    unended: int = 0

    @property
    def handler(self) -> str:
        """The handler's name; "" while there is none."""
        return "" if self.task is None else str(self.task.name)

    @property
    def log_fields(self) -> dict[str, Any]:
        """What a line about it has in its ``extra``."""
        envelope = self.envelope if isinstance(self.envelope, dict) else {}
        return self.delivery.log_fields | {
            "event_id": self.event_id or None,
            "event_type": envelope.get("event_type"),
            "subject": self.subject,
            "handler": self.handler or None,
        }

    def identify(self, find: Callable[[str], Any]) -> DeadLetter | None:
        """Reads the event and finds its handler.

        Args:
            find: gives the task for an event type; None where there is none.

        Returns:
            The dead letter of a message that can never begin: not JSON, not an envelope, or no
            handler.
        """
        try:
            event = events.decode(self.body)
        except DecodeError as error:
            return DeadLetter(error.reason, type(error).__name__, str(error))
        self.event_id, self.envelope = event.event_id, event.envelope
        self.task = find(event.event_type)
        if self.task is None:
            text = f"no handler for the event type {event.event_type!r}"
            return DeadLetter("no_handler", "", text)
        return None


class InFlight:
    """The flights of one bridge.

    Args:
        capacity: the consumer's ``max_ack_pending``.
        lease: seconds that a copy may lie unclaimed before another one is sent.
        grace: seconds that a worker's claim may need to arrive (a claim comes within
            ``ack_wait / 3``).
    """

    def __init__(self, *, capacity: int, lease: float, grace: float) -> None:
        self.capacity = capacity
        self.share = max(1, capacity // 4)
        self._block = max(1, self.share // 2)
        self._lease = lease + grace
        self._flights: dict[int, Flight] = {}
        self._ready: deque[Flight] = deque()
        self._held_back: dict[str, deque[Flight]] = defaultdict(deque)
        self._paused: deque[Flight] = deque()
        self._dispatched: dict[str, int] = defaultdict(int)
        self._empty_at: dict[str, float] = {}
        self._departed: dict[str, int] = defaultdict(int)
        self._looked: dict[str, int] = {}
        self._unended: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def room(self) -> int:
        """How many more messages may be taken."""
        return self.capacity - len(self._flights)

    @property
    def ready(self) -> bool:
        """Whether something is to be dispatched."""
        return bool(self._ready)

    @property
    def replies(self) -> list[str]:
        """The ack subjects of all that must be kept in progress."""
        return [flight.delivery.reply for flight in self._flights.values()]

    @property
    def crowded(self) -> dict[str, int]:
        """Queues whose share is used up, and how many of their messages wait for that."""
        return {queue: len(waiting) for queue, waiting in self._held_back.items() if waiting}

    def queues(self, now: float) -> dict[str, dict[str, Any]]:
        """What of each queue is here, as plain values.

        How many copies are ``unclaimed``, how old the ``oldest`` is (seconds), and how many
        messages are ``waiting`` for room in the queue.
        """
        found: dict[str, dict[str, Any]] = {}
        for flight in self._flights.values():
            if flight.dispatched_at is not None:
                here = found.setdefault(flight.queue, {"unclaimed": 0, "oldest": 0.0, "waiting": 0})
                here["unclaimed"] += 1
                here["oldest"] = max(here["oldest"], round(now - flight.dispatched_at, 1))
        for queue, waiting in self.crowded.items():
            here = found.setdefault(queue, {"unclaimed": 0, "oldest": 0.0, "waiting": 0})
            here["waiting"] = waiting
        return found

    def stalled(self) -> set[str]:
        """Queues whose share was used up at this look and the last, and nothing has left."""
        now = {queue: self._departed[queue] for queue in self.crowded}
        before, self._looked = self._looked, now
        return {queue for queue, departed in now.items() if before.get(queue) == departed}

    # -- arriving and leaving --------------------------------------------------------------------

    def arrive(self, delivery: Delivery, subject: str, body: bytes) -> None:
        """A message came. Again? Then its copy is still out there: only the reply is newer."""
        sequence = delivery.sequence
        flight = self._flights.get(sequence)
        if flight is not None and flight.delivery.timestamp != delivery.timestamp:
            self.leave(sequence)  # another message: the stream was made anew and counts from 1
            self._unended.pop(sequence, None)
            flight = None
        self._unended[sequence] = self._unended.pop(sequence, 0) + 1
        if len(self._unended) > 10 * self.capacity:  # the oldest is long settled elsewhere
            del self._unended[next(iter(self._unended))]
        if flight is not None:
            flight.delivery, flight.unended = delivery, self._unended[sequence]
            return
        flight = Flight(delivery, subject, body, unended=self._unended[sequence])
        self._flights[delivery.sequence] = flight
        self._ready.append(flight)

    def take(self, most: int) -> list[Flight]:
        """What is ready to be dispatched, oldest first; skips what was settled meanwhile."""
        taken: list[Flight] = []
        while self._ready and len(taken) < most:
            flight = self._ready.popleft()
            if self._flights.get(flight.delivery.sequence) is flight:
                taken.append(flight)
        return taken

    def pause(self, flights: Iterable[Flight]) -> None:
        """Their handlers pause; they wait for :meth:`resume`."""
        self._paused.extend(flights)

    def resume(self) -> None:
        """All that was paused may be asked about again."""
        self._ready.extend(self._paused)
        self._paused.clear()

    def put_back(self, flights: Iterable[Flight]) -> None:
        """They could not be dispatched (the broker is away); they stay first in line."""
        back = [f for f in flights if self._flights.get(f.delivery.sequence) is f]
        for flight in back:
            flight.dispatched_at = None
            flight.copies -= 1  # --max-messages counts first copies
        self._ready.extendleft(reversed(back))

    def dispatch(self, flights: Iterable[Flight], now: float) -> list[Flight]:
        """Those whose queue has room, noted as dispatched; the others wait until one leaves.

        Noted before they are sent, for a worker may be faster than we are.
        """
        admitted = []
        for flight in flights:
            if self._flights.get(flight.delivery.sequence) is not flight:
                continue  # settled, or handed back, since it was taken
            if not flight.admitted and self._dispatched[flight.queue] >= self.share:
                self._held_back[flight.queue].append(flight)
                continue
            self._admit(flight)
            flight.dispatched_at = now
            flight.copies += 1
            admitted.append(flight)
        return admitted

    def leave(self, sequence: int) -> bool:
        """A worker claimed or settled it, or the bridge itself did."""
        flight = self._flights.pop(sequence, None)
        if flight is None:
            return False
        if flight.admitted:
            self._dispatched[flight.queue] -= 1
            self._departed[flight.queue] += 1
            self._admit_next(flight.queue)
        return True

    def _admit(self, flight: Flight) -> None:
        if not flight.admitted:
            flight.admitted = True
            self._dispatched[flight.queue] += 1

    def _admit_next(self, queue: str) -> None:
        """Fills the queue's share again, a block at a time: one by one costs a send each."""
        if self.share - self._dispatched[queue] < self._block:
            return
        waiting = self._held_back.get(queue)
        while waiting and self._dispatched[queue] < self.share:
            flight = waiting.popleft()
            if self._flights.get(flight.delivery.sequence) is flight:
                self._admit(flight)
                self._ready.append(flight)

    def handed_back(self, sequence: int, num_delivered: int) -> bool:
        """A worker asked for redelivery of that delivery.

        Where a newer delivery has come already, it is dispatched now; it was held back because
        the older copy was still out there.
        """
        flight = self._flights.get(sequence)
        if flight is None or flight.dispatched_at is None:
            return False
        if flight.delivery.num_delivered > num_delivered:
            self._ready.append(flight)
            return True
        return self.leave(sequence)

    def leave_waiting(self) -> list[Flight]:
        """Takes out everything that is not dispatched (the bridge stops)."""
        waiting = [f for f in self._flights.values() if f.dispatched_at is None]
        for flight in waiting:
            del self._flights[flight.delivery.sequence]
        self._ready.clear()
        self._paused.clear()
        self._held_back.clear()
        return waiting

    # -- lost copies -----------------------------------------------------------------------------

    def overdue(self, now: float) -> list[Flight]:
        """Dispatched longer ago than the lease and still unclaimed.

        A copy that does not expire has ten leases, for it would be run beside the next one.
        """
        overdue = [
            flight
            for flight in self._flights.values()
            if flight.dispatched_at is not None
            and now - flight.dispatched_at > self._lease * (1 if flight.expires else 10)
        ]
        for flight in overdue:
            flight.expires = True
        return overdue

    def queues_to_check(self) -> list[str]:
        """The queues that have unclaimed copies."""
        for queue in [q for q in self._empty_at if not self._dispatched.get(q)]:
            del self._empty_at[queue]
        return [queue for queue, count in self._dispatched.items() if queue and count > 0]

    def found(self, queue: str, depth: int, now: float) -> list[Flight]:
        """Notes a queue's depth; returns the copies that are lost.

        A copy is lost when its queue was empty at two checks in a row, both later than its
        dispatch, and nobody has claimed it in between.
        """
        if depth > 0:
            self._empty_at.pop(queue, None)
            return []
        before = self._empty_at.get(queue)
        self._empty_at[queue] = now
        if before is None:
            return []
        lost = [
            flight
            for flight in self._flights.values()
            if flight.queue == queue
            and flight.dispatched_at is not None
            and flight.dispatched_at < before
        ]
        for flight in lost:
            flight.expires = False
        return lost

    def ended(self, sequence: int) -> None:
        """An attempt came to an end of its own (any settlement, not a claim)."""
        self._unended.pop(sequence, None)

    def again(self, flights: Iterable[Flight], now: float) -> None:
        """They are to be dispatched again, the same delivery."""
        for flight in flights:
            if self._flights.get(flight.delivery.sequence) is flight:
                if not flight.expires:  # its copy was lost: what had it may have died of it
                    flight.unended += 1
                    self._unended[flight.delivery.sequence] = flight.unended
                flight.dispatched_at = now  # not to be found lost twice while it is in line
                self._ready.append(flight)
