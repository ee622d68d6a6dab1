"""Publishing many messages at once: a window of unanswered ones, in order for each key.

Receives messages and a live session; hands on one
:class:`~celery_jetstream.outcomes.PublishResult` for each. One try: who wants another, sends again
what is transient.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence

from nats.aio.msg import Msg

from .exceptions import NotConnectedError
from .outcomes import (
    Message,
    PublishResult,
    Verdict,
    answered,
    batch_answered,
    failed,
    takes_no_batches,
)
from .session import Session

__all__ = ("WINDOW", "send_pipelined")

WINDOW = 256
"""Messages in flight before the next is sent; more brings no more speed."""


async def send_pipelined(
    session: Session,
    messages: Sequence[Message],
    *,
    keys: Sequence[str | None] | None = None,
    batches: Sequence[str | None] | None = None,
    timeout: float,
    window: int = WINDOW,
    on_no_batches: Callable[[], object] | None = None,
) -> list[PublishResult]:
    """Sends each message once; returns what became of each, at its index.

    Messages that share a key (other than None) are sent in list order, each when the one before
    it is stored. Where one is not, the rest of its key stays behind; other keys go on. Never
    raises for the broker's sake.

    Args:
        session: the live session, of this loop.
        messages: what to send; subjects and headers are validated.
        keys: the key of each message; without it no message waits for another.
        batches: messages that share one (other than None) are one atomic batch of JetStream's,
            sent when all of them may be; where the server refuses it, each goes by itself. No
            other message of their keys may be between them.
        timeout: seconds for all of them; what is not answered then is an outage.
        window: how many may be unanswered at a time.
        on_no_batches: called where the stream takes no batches (``allow_atomic`` is off).
    """
    pipeline = _Pipeline(session, messages, keys, batches, window)
    pipeline.on_no_batches = on_no_batches
    return await pipeline.run(timeout)


class _Batch:
    """Messages that JetStream is to store all or none: their indices, in order."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-{secrets.token_hex(4)}"  # of one attempt: another may be half there
        self.places: dict[int, int] = {}
        self.waiting = 0

    def add(self, index: int) -> None:
        self.places[index] = len(self.places) + 1
        self.waiting += 1

    def ends_with(self, index: int) -> bool:
        return self.places[index] == len(self.places)

    def headers(self, index: int) -> dict[str, str]:
        headers = {"Nats-Batch-Id": self.name, "Nats-Batch-Sequence": str(self.places[index])}
        return {**headers, "Nats-Batch-Commit": "1"} if self.ends_with(index) else headers


class _Pipeline:
    """One call of :func:`send_pipelined`."""

    on_no_batches: Callable[[], object] | None = None

    def __init__(
        self,
        session: Session,
        messages: Sequence[Message],
        keys: Sequence[str | None] | None,
        batches: Sequence[str | None] | None,
        window: int,
    ) -> None:
        self._session = session
        self._messages = messages
        self._window = window
        self._results: list[PublishResult | None] = [None] * len(messages)
        self._after = {} if keys is None else _successors(keys)
        self._batches = {} if batches is None else _batches(batches)
        self._ready: deque[int] = deque()
        behind = {after for before, after in self._after.items() if self._frees(before)}
        for index in range(len(messages)):
            if index not in behind:
                self._release(index)
        self._flying: dict[str, int] = {}
        self._answers: list[tuple[str, Msg | NotConnectedError]] = []
        self._news = asyncio.Event()
        self._written: asyncio.Future[None] | None = None
        self._over: NotConnectedError | None = None

    async def run(self, timeout: float) -> list[PublishResult]:
        timer = asyncio.get_running_loop().call_later(timeout, self._stop, timeout)
        try:
            while self._send():
                await self._news.wait()
                self._news.clear()
                self._take_answers()
        finally:
            timer.cancel()
            self._session.forget(self._flying)
            if self._written is not None:
                self._written.cancel()
        return self._complete()

    def _stop(self, timeout: float) -> None:
        self._over = NotConnectedError(f"JetStream did not confirm within {timeout:g} s")
        self._news.set()

    def _send(self) -> bool:
        """Sends what may be sent now; tells whether there is anything to wait for."""
        posted = False
        try:
            while self._may_send():
                posted |= self._post(self._ready.popleft())
            if posted or (self._ready and self._session.full and self._written is None):
                self._written = self._session.flush()
                self._written.add_done_callback(self._on_written)
        except NotConnectedError as error:
            self._over = self._over or error
        return self._over is None and bool(self._ready or self._flying)

    def _may_send(self) -> bool:
        """While the last block is not written, no other: a server that hangs fills no memory."""
        return (
            bool(self._ready)
            and self._written is None
            and self._over is None
            and len(self._flying) < self._window
            and not self._session.full
        )

    def _frees(self, index: int) -> bool:
        """Whether the next of its key is one for itself, and not of the same batch."""
        if index not in self._after:
            return False
        batch = self._batches.get(index)
        return batch is None or batch is not self._batches.get(self._after[index])

    def _release(self, index: int) -> None:
        """None of its key is before it; of a batch, all are sent when that is so for all."""
        batch = self._batches.get(index)
        if batch is None:
            self._ready.append(index)
            return
        batch.waiting -= 1
        if not batch.waiting:
            self._ready.extend(batch.places)

    def _post(self, index: int) -> bool:
        message, batch = self._messages[index], self._batches.get(index)
        headers = message.headers if batch is None else {**message.headers, **batch.headers(index)}
        answered_now = batch is None or batch.ends_with(index)
        on_answer = self._on_answer if answered_now else None
        try:
            token = self._session.post(message.subject, message.body, headers, on_answer)
        except (ValueError, TypeError, AttributeError) as error:  # not text, or not to be encoded
            if batch is None:
                self._results[index] = failed(message, Verdict.REFUSED, str(error))
            else:
                self._dissolve(batch)
            return False
        if answered_now:
            self._flying[token] = index
        return True

    def _on_answer(self, token: str, answer: Msg | NotConnectedError) -> None:
        self._answers.append((token, answer))
        self._news.set()

    def _on_written(self, _: asyncio.Future[None]) -> None:
        self._written = None
        self._news.set()

    def _take_answers(self) -> None:
        for token, answer in self._answers:
            index = self._flying.pop(token)
            message = self._messages[index]
            if batch := self._batches.get(index):
                self._take_batch(batch, answer)
            elif isinstance(answer, NotConnectedError):
                self._settle(index, failed(message, answer))
            else:
                self._settle(index, answered(message, answer.data))
        self._answers.clear()

    def _take_batch(self, batch: _Batch, answer: Msg | NotConnectedError) -> None:
        messages = [self._messages[index] for index in batch.places]
        if isinstance(answer, NotConnectedError):
            results: list[PublishResult] | None = [failed(one, answer) for one in messages]
        else:
            results = batch_answered(messages, batch.name, answer.data)
            if self.on_no_batches is not None and takes_no_batches(answer.data):
                self.on_no_batches()
        if results is None:
            self._dissolve(batch)
            return
        for index, result in zip(batch.places, results, strict=True):
            self._settle(index, result)

    def _settle(self, index: int, result: PublishResult) -> None:
        self._results[index] = result
        if result.verdict is Verdict.STORED and self._frees(index):
            self._release(self._after[index])

    def _dissolve(self, batch: _Batch) -> None:
        """Has each of its messages sent by itself."""
        for index in batch.places:
            del self._batches[index]
        self._ready = deque(index for index in self._ready if index not in batch.places)
        behind = {self._after[index] for index in batch.places if index in self._after}
        self._ready.extend(index for index in batch.places if index not in behind)

    def _complete(self) -> list[PublishResult]:
        """Gives those a result that have none: they were not answered, or not sent."""
        results: list[PublishResult] = []
        behind = set[int]()
        for index, (message, result) in enumerate(zip(self._messages, self._results, strict=True)):
            if result is None and self._is_behind(index, behind):
                why = "not sent: an earlier message with the same key was not stored"
                result = failed(message, Verdict.BEHIND, why)
            elif result is None:
                result = failed(message, self._over or NotConnectedError("not answered"))
            results.append(result)
            if result.verdict is not Verdict.STORED and index in self._after:
                behind.add(self._after[index])
        return results

    def _is_behind(self, index: int, behind: set[int]) -> bool:
        batch = self._batches.get(index)
        return index in behind if batch is None else batch.waiting > 0


def _batches(names: Sequence[str | None]) -> dict[int, _Batch]:
    """For each message of a batch, the batch."""
    batches: dict[str, _Batch] = {}
    of_index = {}
    for index, name in enumerate(names):
        if name is not None:
            if name not in batches:
                batches[name] = _Batch(name)
            batches[name].add(index)
            of_index[index] = batches[name]
    return of_index


def _successors(keys: Sequence[str | None]) -> dict[int, int]:
    """For each message that another with its key follows, the index of that one."""
    last: dict[str, int] = {}
    after: dict[int, int] = {}
    for index, key in enumerate(keys):
        if key is None:
            continue
        if key in last:
            after[last[key]] = index
        last[key] = index
    return after
