"""The stream and the consumer that we need: planned, applied, verified.

Receives what is wanted (:class:`.StreamSpec`, :class:`.ConsumerSpec`) and one coroutine that calls
JetStream's API; hands on the :class:`.Plan`. It speaks raw JSON, since nats-py's typed
configurations drop the fields that they do not know, and an update would then undo what an
administrator set.

A stream update replaces the whole configuration and is not compare-and-swap: of ten applications
that add their subjects at once, the last to write undoes the others. So :func:`ensure` reads
again, after a jittered pause, until ours is there and still there on a second look.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NoReturn

from .exceptions import (
    NotConnectedError,
    PermissionDeniedError,
    SubjectOverlapError,
    TopologyError,
)
from .plans import Change, Ignored, Plan, compare
from .specs import Configuration, ConsumerSpec, StreamSpec, filters
from .subjects import overlap

__all__ = ("Api", "ensure", "plan")

Api = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""``await api("STREAM.INFO.orders", {})``: one request to ``$JS.API.…``, its answer decoded.

An empty mapping may be sent as an empty body or as ``{}``. An answer with an ``error`` in it is
returned, not raised; that nobody answers at all (NATS status 503) is best returned as
``{"error": {"code": 503}}``. No connection or no answer in time: ``NotConnectedError``.
"""

_LOOKS = 2  # after a change, this many looks in a row must find nothing left to do
_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds between looks, give or take half
# Another's update undoes ours for as long as theirs was read before ours was written: some round
# trips. Where these are slow we wait longer before we believe what we see.
_ROUNDS_TO_WAIT = 3
# In a cluster a stream in the making answers nobody (and 2.9 only some of those who make it), so
# one silence says little; as many in a row are an outage.
_SILENCES = 3

_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND = 10059, 10014
# Another was faster, or a cluster is electing: look again, then decide.
_LOOK_AGAIN = frozenset(
    {
        _STREAM_NOT_FOUND,  # deleted since we looked
        _CONSUMER_NOT_FOUND,
        10058,  # stream created since, with another configuration
        10065,  # a subject was taken since: the next look tells by whom
        10013,  # consumer created since
        10148,  # consumer created since, with another configuration
        10149,  # consumer deleted since
        10093,  # (2.9) filter outside the stream: another's update undid our subjects
        10008,  # JetStream system temporarily unavailable
        10009,  # not the leader
    }
)
_ATOMIC = ("stream", "allow_atomic")
_FILTER_TAKEN = frozenset({10099, 10100})
_ADVICE = {
    503: "nobody answers: JetStream is not enabled on this server; start it with -js",
    10005: "jetstream_num_replicas is more than the cluster has servers with room for the stream",
    10039: "JetStream is not enabled for this account: let the server's configuration say "
    "'jetstream: enabled' for the account that we log in to",
    10074: "jetstream_num_replicas above 1 needs a cluster",
    10076: "JetStream is not enabled on this server: start it with -js",
}


class _RefusedError(TopologyError):
    """The server answered a request with an error; ``code`` is its ``err_code``."""

    def __init__(self, operation: str, error: Mapping[str, Any], stream: str) -> None:
        self.code = int(error.get("err_code") or error.get("code") or 0)
        words = _ADVICE.get(self.code) or error.get("description") or "no reason given"
        super().__init__(f"{operation} refused: {words} (error {self.code})", stream=stream)


async def ensure(
    api: Api, stream: StreamSpec, *consumers: ConsumerSpec, deadline: float = 30.0
) -> Plan:
    """Bring stream and consumers to what is wanted; do nothing where they are.

    Safe to run in any number of processes at once. ``allow_atomic`` is asked for and not insisted
    on: a server before 2.12 ignores it, and some configurations cannot have it.

    Args:
        api: Calls JetStream's API.
        stream: The stream wanted.
        consumers: The consumers wanted; others are left alone.
        deadline: Seconds after which it gives up while others keep undoing our changes.

    Returns:
        What had to be changed, as the first look found it.

    Raises:
        SubjectOverlapError: Another stream takes one of our subjects (10065).
        DriftError: A field that cannot be changed is not as wanted.
        TopologyError: The server refused (no JetStream: 10039, 10076; the filter is another
            consumer's: 10099, 10100; …), ignored a field that it does not know, or the deadline
            passed.
        PermissionDeniedError: Our user may not; what is done stays.
        NotConnectedError: No answer three times in a row; what is done stays, run it again.
    """
    first: Plan | None = None
    ignored: Ignored = frozenset()
    quiet, silent, obstacle = 0, 0, ""
    ends, pause = time.monotonic() + deadline, _PAUSE
    while True:
        began = time.monotonic()
        try:
            current = await plan(api, stream, *consumers)
            first, silent = first or current, 0
            if current.changed:
                quiet, obstacle, before = 0, f"others undo this:\n{current}", ignored
                stream, ignored = _conceded(stream, await _apply(api, current, consumers))
                if twice := before & ignored:  # once may be another's update in between
                    await _raise_ignored(api, stream.name, current, twice)
            else:
                quiet += 1
                if current is first or quiet == _LOOKS:
                    return first
        except _RefusedError as refusal:
            if refusal.code not in _LOOK_AGAIN:
                stream = _reduced(stream, refusal)
            obstacle = str(refusal)
        except NotConnectedError as error:
            silent += 1
            if silent == _SILENCES or isinstance(error, PermissionDeniedError):
                raise
            obstacle = str(error)
        now = time.monotonic()
        if now >= ends:
            raise TopologyError(
                f"stream {stream.name!r} is not as wanted after {deadline:g} s: {obstacle}",
                stream=stream.name,
            )
        wait = min(max(pause, _ROUNDS_TO_WAIT * (now - began)), _LONGEST_PAUSE)
        await asyncio.sleep(wait * random.uniform(0.5, 1.5))
        pause *= 2


async def plan(api: Api, stream: StreamSpec, *consumers: ConsumerSpec) -> Plan:
    """Compare what is wanted with what the server has; change nothing.

    Raises:
        SubjectOverlapError: Another stream takes one of our subjects.
        DriftError: A field that cannot be changed is not as wanted.
        TopologyError: The server refused to tell (no JetStream: 10039, 10076).
        NotConnectedError: The server cannot be reached.
    """
    found = await _find(api, f"STREAM.INFO.{stream.name}", stream.name)
    wanted = stream.wanted(found)
    changes = [compare("stream", stream.name, found, wanted, stream.name)]
    await _refuse_overlap(api, stream, found)
    for consumer in consumers:
        operation = f"CONSUMER.INFO.{consumer.stream}.{consumer.durable}"
        there = await _find(api, operation, stream.name) if found else {}
        wanted = there if there and consumer.is_peers else consumer.wanted()
        changes.append(compare("consumer", consumer.durable, there, wanted, stream.name))
    return Plan(tuple(changes))


# ── plan: wanted against found ───────────────────────────────────────────────


async def _find(api: Api, operation: str, stream: str) -> Configuration:
    """The configuration of what exists; empty where nothing does."""
    try:
        config: Configuration = (await _call(api, operation, {}, stream))["config"]
    except _RefusedError as refusal:
        if refusal.code in (_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND):
            return {}
        raise
    return config


async def _refuse_overlap(api: Api, spec: StreamSpec, found: Configuration) -> None:
    taken = [
        (subject, other)
        for subject in spec.missing_subjects(found)
        async for other in _pages(api, "STREAM.NAMES", "streams", spec.name, subject=subject)
        if other != spec.name
    ]
    if not taken:
        return
    listed = ", ".join(f"{subject} by {other!r}" for subject, other in taken)
    raise SubjectOverlapError(
        f"stream {spec.name!r} cannot take its subjects, other streams do: {listed}. Two streams "
        "cannot share a subject (error 10065): set jetstream_stream_name to that stream, or take "
        "the subject from it",
        stream=spec.name,
        subject=taken[0][0],
        other_stream=taken[0][1],
    )


# ── apply ────────────────────────────────────────────────────────────────────


async def _apply(api: Api, current: Plan, consumers: Sequence[ConsumerSpec]) -> Ignored:
    """Send the changes; return the fields that the server did not take over."""
    ignored: Ignored = frozenset()
    by_name = {consumer.durable: consumer for consumer in consumers}
    for change in current.changes:
        if change.action == "none":
            continue
        if change.kind == "stream":
            operation = f"STREAM.{change.action.upper()}.{change.name}"
            answer = await _call(api, operation, change.config, change.name)
        else:
            answer = await _apply_consumer(api, change, by_name[change.name])
        ignored |= change.not_echoed(answer["config"])
    return ignored


def _conceded(stream: StreamSpec, ignored: Ignored) -> tuple[StreamSpec, Ignored]:
    """Without the atomic batches that the server does not know, and the rest of what it ignored."""
    if _ATOMIC in ignored:
        stream = replace(stream, allow_atomic=False)
    return stream, ignored - {_ATOMIC}


def _reduced(stream: StreamSpec, refusal: _RefusedError) -> StreamSpec:
    """What to ask for after a refusal: it may have been for the atomic batches; else raises it."""
    if not stream.allow_atomic:
        raise refusal
    return replace(stream, allow_atomic=False)


async def _apply_consumer(api: Api, change: Change, spec: ConsumerSpec) -> dict[str, Any]:
    subjects = ", ".join(spec.filter_subjects)
    operation = f"CONSUMER.CREATE.{spec.stream}.{spec.durable}"
    if len(spec.filter_subjects) == 1:  # what a server's permissions can tell apart
        operation += f".{subjects}"
    # 2.9 does not know `action` and overwrites; the next look puts that right.
    body = {"stream_name": spec.stream, "config": change.config, "action": change.action}
    try:
        return await _call(api, operation, body, spec.stream)
    except _RefusedError as refusal:
        if refusal.code not in _FILTER_TAKEN:
            raise
        raise TopologyError(
            f"consumer {spec.durable!r} cannot have {subjects}: a message in a work "
            f"queue has one consumer, and there is {await _rivals(api, spec)} (error "
            f"{refusal.code}). Delete that one, or use another jetstream_app_name",
            stream=spec.stream,
        ) from refusal


async def _rivals(api: Api, spec: ConsumerSpec) -> str:
    """The consumers of the stream that take messages of ours, as text."""
    rivals = []
    async for other in _pages(api, f"CONSUMER.LIST.{spec.stream}", "consumers", spec.stream):
        config = other["config"]
        ours = product(filters(config), spec.filter_subjects)
        if other["name"] != spec.durable and any(overlap(*pair) for pair in ours):
            rivals.append(f"{other['name']!r} ({', '.join(filters(config))})")
    return " and ".join(rivals) or "another"


# ── verify ───────────────────────────────────────────────────────────────────


async def _raise_ignored(api: Api, stream: str, current: Plan, ignored: Ignored) -> NoReturn:
    level = (await _call(api, "INFO", {}, stream)).get("api", {}).get("level")
    version = f"has API level {level}" if level else "has no API level, so is older than 2.11"
    raise TopologyError(
        f"the server accepted the configuration but ignored {current.described(ignored)}. "
        "A nats-server ignores what its version does not know, and this one "
        f"{version}: update nats-server",
        stream=stream,
    )


# ── small things ─────────────────────────────────────────────────────────────


async def _call(api: Api, operation: str, body: Configuration, stream: str) -> dict[str, Any]:
    answer = await api(operation, body)
    if error := answer.get("error"):
        raise _RefusedError(operation, error, stream)
    return answer


async def _pages(
    api: Api, operation: str, key: str, stream: str, **body: str
) -> AsyncIterator[Any]:
    offset, total = 0, 1
    while offset < total:
        answer = await _call(api, operation, {**body, "offset": offset}, stream)
        page = answer.get(key) or []
        for entry in page:
            yield entry
        offset, total = offset + len(page), answer.get("total", 0) if page else 0
