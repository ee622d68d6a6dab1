"""How things are on the NATS side: the connection, the server, the stream and the consumers.

:func:`look` asks and changes nothing; it tells of everything that it could not find out. Runs in
the connection's loop thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .capabilities import ATOMIC_BATCHES, Feature, lacking
from .config import Config
from .connection import Connection
from .exceptions import NoResponders, NotConnectedError
from .session import Session
from .subjects import matches

__all__ = ("look",)

#: Seconds that one question may take, within those of the whole look.
ASK_TIMEOUT = 2.0
#: Messages come and go while they are counted; what is stuck is there each time.
STUCK_LOOKS, STUCK_PAUSE = 3, 0.2

NO_JETSTREAM = "nobody answers: JetStream is not enabled on this server; start it with -js"


async def look(
    connection: Connection, config: Config, consumers: Sequence[str], timeout: float
) -> dict[str, Any]:
    """The state of what this app needs of NATS, as plain values; never raises for NATS's sake.

    The keys are those of ``celery -A app jetstream status --json``.

    Args:
        connection: the process's.
        config: the settings.
        consumers: the durables that bring this app's messages.
        timeout: seconds for all of it.
    """
    ends = time.monotonic() + timeout
    found = _nothing_known(config, consumers)
    try:
        session = await connection.session(timeout)
        found["connection"]["connected"] = True
        found["connection"]["url"] = session.safe_url
        await asyncio.wait_for(_look(session, config, found), max(0.01, ends - time.monotonic()))
    except asyncio.TimeoutError:
        found["problems"].append(f"not all was answered in {timeout:g} s")
    except NotConnectedError as error:
        found["connection"]["error"] = str(error)
        found["problems"].append(str(error))
    found["healthy"] = not found["problems"]
    return found


async def _look(session: Session, config: Config, found: dict[str, Any]) -> None:
    info = await _ask(session, "INFO")  # the first takes JetStream longer
    asked = time.monotonic()
    await _ask(session, "INFO")
    found["connection"]["rtt_ms"] = round((time.monotonic() - asked) * 1000, 2)
    _tell_server(session, config, info, found)
    if "error" in info:
        found["problems"].append(f"JetStream: {info['error']}")
        return
    await _tell_stream(session, config, found)
    for consumer in found["consumers"]:
        await _tell_consumer(session, config, consumer, found)


def _nothing_known(config: Config, consumers: Sequence[str]) -> dict[str, Any]:
    return {
        "healthy": False,
        "problems": [],
        "warnings": [],
        "connection": {
            "connected": False,
            "url": None,
            "urls": list(config.safe_urls),
            "rtt_ms": None,
            "error": None,
        },
        "server": {
            "name": None,
            "version": None,
            "api_level": None,
            "cluster": None,
            "lacks": [],
        },
        "stream": {
            "name": config.stream_name,
            "exists": None,
            "messages": None,
            "bytes": None,
            "subjects": [],
            "retention": None,
            "replicas": None,
        },
        "consumers": [
            {
                "name": name,
                "exists": None,
                "filter_subjects": [],
                "pending": None,
                "ack_pending": None,
                "redelivered": None,
                "stuck": None,
                "max_deliver": None,
            }
            for name in consumers
        ],
    }


# -- server ----------------------------------------------------------------------------------------


def _tell_server(
    session: Session, config: Config, info: Mapping[str, Any], found: dict[str, Any]
) -> None:
    server = found["server"]
    server["name"], server["version"] = session.server_name, session.server_version
    server["cluster"] = session.cluster_name or None
    server["api_level"] = info.get("api", {}).get("level")  # from 2.11 on
    for feature in lacking(session.server_version):
        wanted = _is_asked_for(feature, config)
        server["lacks"].append(
            {
                "feature": feature.name,
                "since": ".".join(map(str, feature.since)),
                "instead": feature.instead,
                "setting": feature.setting or None,
                "asked_for": wanted,
            }
        )
        if wanted:
            found["problems"].append(
                f"{feature.setting} is on, and nats-server {session.server_version} has no "
                f"{feature}: {feature.instead}"
            )


def _is_asked_for(feature: Feature, config: Config) -> bool:
    name = feature.setting.removeprefix("jetstream_")
    return bool(name and getattr(config, name))


# -- stream ----------------------------------------------------------------------------------------


async def _tell_stream(session: Session, config: Config, found: dict[str, Any]) -> None:
    name, stream, problems = config.stream_name, found["stream"], found["problems"]
    info = await _ask(session, f"STREAM.INFO.{name}")
    if "error" in info:
        stream["exists"] = _exists(info)
        problems.append(f"stream {name}: {info['error']}")
        return
    made, state = info["config"], info["state"]
    stream.update(
        exists=True,
        messages=state["messages"],
        bytes=state["bytes"],
        subjects=list(made.get("subjects") or ()),
        retention=made["retention"],
        replicas=made.get("num_replicas", 1),
    )
    problems += [
        f"stream {name} does not take {subject}: run 'celery -A … jetstream provision'"
        for subject in config.subjects
        if not any(matches(pattern, subject) for pattern in stream["subjects"])
    ]
    if made["retention"] != "workqueue":
        problems.append(
            f"stream {name} is no work queue, but keeps messages by {made['retention']}"
        )
    lacks = {entry["feature"] for entry in found["server"]["lacks"]}
    if config.outbox_atomic and not made.get("allow_atomic") and ATOMIC_BATCHES.name not in lacks:
        problems.append(
            f"jetstream_outbox_atomic is on, and stream {name} takes no atomic batches "
            f"(allow_atomic): {ATOMIC_BATCHES.instead}"
        )


# -- consumers -------------------------------------------------------------------------------------


async def _tell_consumer(
    session: Session, config: Config, consumer: dict[str, Any], found: dict[str, Any]
) -> None:
    name, problems = consumer["name"], found["problems"]
    info = await _ask(session, f"CONSUMER.INFO.{config.stream_name}.{name}")
    if "error" in info:
        consumer["exists"] = _exists(info)
        problems.append(f"consumer {name}: {info['error']}")
        return
    made = info["config"]
    limit = made.get("max_deliver", -1)
    consumer.update(
        exists=True,
        filter_subjects=list(
            made.get("filter_subjects") or filter(None, [made.get("filter_subject")])
        ),
        pending=info["num_pending"],
        ack_pending=info["num_ack_pending"],
        redelivered=info["num_redelivered"],
        max_deliver=limit if limit > 0 else None,
    )
    if limit > 0:
        found["warnings"].append(
            f"consumer {name} has max_deliver={limit}: it gives messages up by itself, and leaves "
            "them in the stream until a bridge makes dead letters of them; set it to -1"
        )
    if found["stream"]["retention"] == "workqueue":
        consumer["stuck"] = await _stuck(session, config.stream_name, consumer)
    if consumer["stuck"]:
        problems.append(
            f"consumer {name}: {consumer['stuck']} messages are stuck: stored, and never delivered "
            "again"
        )


async def _stuck(session: Session, stream: str, consumer: Mapping[str, Any]) -> int | None:
    """How many messages the stream has for a consumer that it will not deliver (again)."""
    least = None
    for number in range(STUCK_LOOKS):
        if number:
            await asyncio.sleep(STUCK_PAUSE)
        stored = 0
        for subject in consumer["filter_subjects"] or [">"]:
            info = await _ask(session, f"STREAM.INFO.{stream}", subjects_filter=subject)
            if "error" in info:
                return least
            stored += sum((info["state"].get("subjects") or {}).values())
        info = await _ask(session, f"CONSUMER.INFO.{stream}.{consumer['name']}")
        if "error" in info:
            return least
        left = max(0, stored - info["num_pending"] - info["num_ack_pending"])
        least = left if least is None else min(least, left)
        if not least:
            break
    return least


# -- asking ----------------------------------------------------------------------------------------


async def _ask(session: Session, operation: str, **request: Any) -> dict[str, Any]:
    """JetStream's answer; ``error`` in it is text."""
    subject = f"$JS.API.{operation}"
    body = json.dumps(request).encode() if request else b""
    try:
        message = await session.ask(subject, body, timeout=ASK_TIMEOUT)
    except NoResponders:
        return {"error": NO_JETSTREAM}
    except NotConnectedError as error:
        if session.lost.is_set():
            raise
        return {"error": str(error)}
    answer: dict[str, Any] = json.loads(message.data)
    if refusal := answer.get("error"):
        return {"error": refusal.get("description", str(refusal)), "code": refusal.get("code")}
    return answer


def _exists(answer: Mapping[str, Any]) -> bool | None:
    return False if answer.get("code") == 404 else None
