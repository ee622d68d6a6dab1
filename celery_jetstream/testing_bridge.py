"""A bridge in the test's process, and a worker that is the test's own thread.

The bridge is the one that ``celery -A app jetstream bridge`` runs, with its threads and a
connection of its own; only what it would send to the Celery broker comes out of a queue instead.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from . import signals
from .bridge import Bridge
from .delivery import Delivery
from .dispatcher import Dispatcher
from .extension import JetStream
from .inflight import Flight
from .settlement import Nak, Settlement
from .testing_handlers import Run, Settling, run_handler

__all__ = ("InProcess",)

#: Seconds between two looks at what has come.
_LOOK = 0.005
#: Seconds that the bridge may take to end.
_END_TIMEOUT = 10.0


class _HandOver(Dispatcher):
    """In the place of the Celery broker: what a bridge would send comes out of a queue."""

    def __init__(self, jetstream: JetStream) -> None:
        super().__init__(jetstream.app, jetstream.config, jetstream.check())
        self.queue: SimpleQueue[tuple[Flight, Settlement | None]] = SimpleQueue()

    def prepare(self, flight: Flight) -> Settlement | None:
        refused = super().prepare(flight)
        if refused is not None:
            self.queue.put((replace(flight), refused))
        return refused

    def send(self, flights: Sequence[Flight]) -> None:
        for flight in flights:
            self.queue.put((replace(flight), None))  # the bridge goes on changing its own

    def depth(self, queue: str) -> int:
        return 1


class _Confirmed(Settling):
    """Sends it, too; what shall come again comes at once where its delay is not waited for."""

    def __init__(self, jetstream: JetStream, at_once: bool) -> None:
        self._settler = jetstream.settler
        self._at_once = at_once

    def settle(self, delivery: Delivery, settlement: Settlement, *, handler: str = "") -> None:
        super().settle(delivery, settlement, handler=handler)
        again = isinstance(settlement, Nak) and self._at_once
        self._settler.settle(delivery, Nak(0.0) if again else settlement, handler=handler)


class InProcess:
    """A bridge of its own, and a worker that is this thread."""

    def __init__(self, jetstream: JetStream, retries: bool, timeout: float) -> None:
        self.runs: list[Run] = []
        self.dead_letters: dict[int, Mapping[str, str]] = {}
        self._jetstream = jetstream
        self._retries = retries
        self._patience = timeout
        self._beside = copy.copy(jetstream)  # as another process would be, with its own connection
        self._beside._begin_anew()
        self._arrived = _HandOver(jetstream)
        self._bridge = Bridge(self._beside, dispatcher=self._arrived)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jetstream-testing", daemon=True)
        self._waiting_before = 0

    def __enter__(self) -> InProcess:
        lock = vars(self._jetstream).setdefault("_in_process", threading.Lock())
        if not lock.acquire(timeout=self._patience):
            raise TimeoutError(
                "another deliver() or drain() of this app goes on, in another thread or around "
                "this one (in a handler?): a message goes to one of them only"
            )
        try:
            self._begin()
        except BaseException:
            lock.release()
            raise
        return self

    def _begin(self) -> None:
        self._waiting_before = self._consumers()[1]
        signals.message_dead_lettered.connect(self._note_dead_letter)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._bridge.stop()
        self._thread.join(_END_TIMEOUT)
        signals.message_dead_lettered.disconnect(self._note_dead_letter)
        vars(self._jetstream)["_in_process"].release()

    def _run(self) -> None:
        try:
            self._bridge.run()
        except BaseException as error:
            self._failure = error

    def _note_dead_letter(self, delivery: Any = None, headers: Any = None, **_: Any) -> None:
        if delivery.stream == self._jetstream.config.stream_name:
            self.dead_letters[delivery.sequence] = dict(headers)

    # -- handling ----------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Handles what arrives until the condition holds; handlers' own time does not count."""
        left = timeout
        while True:
            began = time.monotonic()
            try:
                flight, refused = self._arrived.queue.get(timeout=_LOOK)
            except Empty:
                if condition():
                    return
                self._check()
                left -= time.monotonic() - began
                if left < 0:
                    raise TimeoutError(self._stuck(timeout, what)) from None
            else:
                self.runs.append(self._handled(flight, refused))

    def _handled(self, flight: Flight, refused: Settlement | None) -> Run:
        if refused is None:
            return run_handler(flight, _Confirmed(self._jetstream, self._retries))
        delivery = flight.delivery
        number, sequence = delivery.num_delivered, delivery.sequence
        return Run(refused, num_delivered=number, sequence=sequence)

    def has_settled(self, sequence: int) -> bool:
        """Whether a message has been handled, and (with retries) is not to come again."""
        its = [run.settlement for run in self.runs if run.sequence == sequence]
        return bool(its) and not (self._retries and isinstance(its[-1], Nak))

    def nothing_left(self) -> bool:
        """Whether every message is settled, or waits for a delay that it was given."""
        if self._bridge.busy or self._jetstream.settler.pending or self._beside.settler.pending:
            return False
        pending, held = self._consumers()
        again = {run.sequence for run in self.runs if isinstance(run.settlement, Nak)}
        waiting = 0 if self._retries else self._waiting_before + len(again)
        return pending == 0 and held <= waiting and self._arrived.queue.empty()

    def confirm(self, timeout: float) -> None:
        """Waits until the server has confirmed all settlements.

        Raises:
            TimeoutError: it has not in time.
        """
        for settler in (self._jetstream.settler, self._beside.settler):
            if settler.pending and (missing := settler.drain(timeout)):
                raise TimeoutError(
                    f"the server has not confirmed {missing} settlements in {timeout:g} s"
                )

    # -- what is the matter ------------------------------------------------------------------------

    def _check(self) -> None:
        if not self._thread.is_alive():
            raise self._failure or RuntimeError("the bridge has ended")

    def _consumers(self) -> tuple[int, int]:
        """Messages that the consumers have still to hand over, and that wait for a settlement."""
        return self._jetstream.connection.run(_counts, self._jetstream, timeout=10)

    def _stuck(self, timeout: float, what: str) -> str:
        pending, held = self._consumers()
        last = f"; last settlement: {self.runs[-1].settlement}" if self.runs else ""
        return (
            f"waited {timeout:g} s for {what}: {len(self.runs)} deliveries were handled, the "
            f"consumer has {pending} messages to hand over and {held} that are not settled "
            f"(running elsewhere, or waiting for the delay of a Nak), the bridge "
            f"{'holds some' if self._bridge.busy else 'holds none'}{last}"
        )


async def _counts(jetstream: JetStream) -> tuple[int, int]:
    pending = held = 0
    for consumer in await jetstream.consumers():
        info = await jetstream._api(f"CONSUMER.INFO.{consumer.stream}.{consumer.durable}", {})
        pending += info.get("num_pending", 0)
        held += info.get("num_ack_pending", 0)
    return pending, held
