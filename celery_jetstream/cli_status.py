"""``celery -A app jetstream status``: the health of the app, as this process finds it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import JSON, age_text, echo_json, jetstream_of

__all__ = ("status",)


@click.command(cls=CeleryCommand)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Seconds to wait for answers, all together.",
)
@JSON
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool, **_: Any) -> None:
    """Says how NATS, the stream, the consumers, outbox, inbox and dead letters are.

    It changes nothing. What is not as it should be is named, with what to do about it. How a bridge
    or a worker is, they say themselves: a bridge's /status, celery inspect jetstream.

    Exit status: 0 when it is healthy or degraded; 1 when it is unhealthy: no server answers in
    --timeout, the stream or a consumer is not there or not as it must be, messages are stuck, a
    setting asks for what there is not, a database is away, or the settings are wrong.
    """
    from .exceptions import CeleryJetStreamError

    jetstream = jetstream_of(ctx.obj.app)
    try:
        found = jetstream.health_check(fresh=True, timeout=timeout)
    except CeleryJetStreamError as error:  # the settings
        if as_json:
            echo_json({"status": "unhealthy", "healthy": False, "problems": [str(error)]})
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    finally:
        jetstream.close(timeout=1.0)
    if as_json:
        echo_json(found)
    else:
        for line in _lines(found):
            click.echo(line)
    sys.exit(0 if found["healthy"] else 1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield from _of_nats(found)
    yield from _of_databases(found)
    yield from (f"unknown: {text}" for text in found["unknown"])
    for state in found["states"]:
        yield f"{state['severity']}: {state['text']} [{state['code']}]"
        yield f"            {state['remedy']}"
    yield found["status"]


def _of_nats(found: dict[str, Any]) -> Iterator[str]:
    connection, server, stream = found["connection"], found["server"], found["stream"]
    if connection["connected"]:
        yield f"connection  {connection['url']}{_text(', answers in {} ms', connection['rtt_ms'])}"
    else:
        yield f"connection  none: {', '.join(connection['urls'])}"
    if server["version"]:
        level = _text(", API level {}", server["api_level"])  # older than 2.11: none
        yield f"server      {server['name']}, nats-server {server['version']}{level}"
        for lack in server["lacks"]:
            yield f"            no {lack['feature']} (from {lack['since']} on): {lack['instead']}"
    if stream["exists"]:
        yield (
            f"stream      {stream['name']}: {stream['messages']} messages, "
            f"{stream['bytes']} bytes, {stream['replicas']} replicas"
        )
        yield f"            {', '.join(stream['subjects'])}"
    for consumer in found["consumers"]:
        if consumer["exists"]:
            yield (
                f"consumer    {consumer['name']}: {consumer['pending']} pending, "
                f"{consumer['ack_pending']} delivered and not settled, "
                f"{consumer['redelivered']} redelivered{_text(', {} stuck', consumer['stuck'])}"
            )
    dead = found["dead_letters"]
    if dead["count"] is not None:
        age = f", the oldest for {age_text(dead['oldest'])}" if dead["count"] else ""
        yield f"dead        {dead['count']} letters on {dead['subject']}{age}"


def _of_databases(found: dict[str, Any]) -> Iterator[str]:
    for name in ("outbox", "inbox"):
        part = found[name]
        if part is not None and "counts" in part:
            counts = ", ".join(f"{count} {state}" for state, count in part["counts"].items())
            due = age_text(part["oldest_due"]) if name == "outbox" else "-"
            yield f"{name:10}  {counts}{'' if due == '-' else f'; due for {due}'}"


def _text(form: str, value: Any) -> str:
    return "" if value is None else form.format(value)
