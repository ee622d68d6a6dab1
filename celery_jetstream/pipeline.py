"""Publishing many messages at once: a window of unanswered ones, in order for each key.

Receives messages and a live session; hands on one
:class:`~celery_jetstream.outcomes.PublishResult` for each. One try: who wants another, sends again
what is transient.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from nats.aio.msg import Msg

from .exceptions import NotConnectedError
from .outcomes import Message, PublishResult, Verdict, answered, failed
from .session import Session

__all__ = ("WINDOW", "send_pipelined")

WINDOW = 256
"""Messages in flight before the next is sent; more brings no more speed."""


async def send_pipelined(
    session: Session,
    messages: Sequence[Message],
    *,
    keys: Sequence[str | None] | None = None,
    timeout: float,
    window: int = WINDOW,
) -> list[PublishResult]:
    """Sends each message once; returns what became of each, at its index.

    Messages that share a key (other than None) are sent in list order, each when the one before
    it is stored. Where one is not, the rest of its key stays behind; other keys go on. Never
    raises for the broker's sake.

    Args:
        session: the live session, of this loop.
        messages: what to send; subjects and headers are validated.
        keys: the key of each message; without it no message waits for another.
        timeout: seconds for all of them; what is not answered then is an outage.
        window: how many may be unanswered at a time.
    """
    return await _Pipeline(session, messages, keys, window).run(timeout)


class _Pipeline:
    """One call of :func:`send_pipelined`."""

    def __init__(
        self,
        session: Session,
        messages: Sequence[Message],
        keys: Sequence[str | None] | None,
        window: int,
    ) -> None:
        self._session = session
        self._messages = messages
        self._window = window
        self._results: list[PublishResult | None] = [None] * len(messages)
        self._after = {} if keys is None else _successors(keys)
        behind = set(self._after.values())
        self._ready = deque(index for index in range(len(messages)) if index not in behind)
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

    def _post(self, index: int) -> bool:
        message = self._messages[index]
        try:
            token = self._session.post(
                message.subject, message.body, message.headers, self._on_answer
            )
        except (ValueError, TypeError, AttributeError) as error:  # not text, or not to be encoded
            self._results[index] = failed(message, Verdict.REFUSED, str(error))
            return False
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
            if isinstance(answer, NotConnectedError):
                result = failed(message, answer)
            else:
                result = answered(message, answer.data)
            self._results[index] = result
            if result.verdict is Verdict.STORED and index in self._after:
                self._ready.append(self._after[index])
        self._answers.clear()

    def _complete(self) -> list[PublishResult]:
        """Gives those a result that have none: they were not answered, or not sent."""
        results: list[PublishResult] = []
        behind = set()
        for index, (message, result) in enumerate(zip(self._messages, self._results, strict=True)):
            if result is None and index in behind:
                why = "not sent: an earlier message with the same key was not stored"
                result = failed(message, Verdict.BEHIND, why)
            elif result is None:
                result = failed(message, self._over or NotConnectedError("not answered"))
            results.append(result)
            if result.verdict is not Verdict.STORED and index in self._after:
                behind.add(self._after[index])
        return results


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
