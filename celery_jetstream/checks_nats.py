"""The doctor's checks of NATS: the server, our user, the consumers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .capabilities import OLDEST, lacking, parse
from .facts import Facts, Unknown, known, seconds_of, span
from .findings import Check, Result, check, error, ok, warning
from .specs import Configuration

__all__ = ("CHECKS",)

#: Seconds of ack_wait below which a stall of a process looks like its death; above which a dead
#: process's messages are missed.
SHORT_ACK_WAIT, LONG_ACK_WAIT = 5.0, 600.0
#: Of an account's room, how much may be taken before that is said.
FULL = 0.8
#: Seconds.
LAST_DAY, LAST_WEEKS = 86400.0, 14 * 86400.0
PROVISION = "run 'celery -A … jetstream provision'"


@check(
    "reachable", "Of what does not answer nothing is known: the checks that need it are skipped."
)
def reachable(facts: Facts) -> Iterator[Result]:
    asked: dict[str, object] = {"NATS": facts.server}
    if facts.config.has_database:
        asked["the database"] = facts.database
    for what, answer in asked.items():
        if isinstance(answer, Unknown):
            yield error(
                f"{what}: {answer}",
                "have it come back, or correct the settings; then call the doctor again",
            )
        else:
            yield ok(f"{what} answers")


@check("server-version", "A server ignores what its version does not know, and says nothing.")
def server_version(facts: Facts) -> Iterator[Result]:
    version = known(facts.server).version
    found = parse(version)
    oldest = ".".join(map(str, OLDEST))
    if found is None or found < OLDEST:
        yield error(f"nats-server {version or 'of no known version'}", f"update it to {oldest}")
        return
    for feature in lacking(version):
        setting = feature.setting.removeprefix("jetstream_")
        if setting and getattr(facts.config, setting):
            yield error(
                f"{feature.setting} is on, and nats-server {version} has no {feature}: "
                f"{feature.instead}",
                f"update nats-server, or turn {feature.setting} off",
            )
            return
    lacks = "; ".join(f"no {feature}: {feature.instead}" for feature in lacking(version))
    yield ok(f"nats-server {version}{' (' + lacks + ')' if lacks else ''}")


@check(
    "permissions",
    "A denied operation is not answered: it looks like a server that hangs, and messages that "
    "were stored, delivered or acked come again.",
)
def permissions(facts: Facts) -> Iterator[Result]:
    tried = known(facts.permissions)
    denied = [one for one in tried if one.error is not None]
    print_them = f"'celery -A … jetstream provision --print-permissions --role {facts.role}'"
    for one in denied:
        yield error(
            f"{one.error}: {one.what}",
            f"have an administrator of NATS allow it: {print_them} has all that this user needs. "
            "Where it is another user of the app's, give the doctor its --role",
        )
    if not denied:
        yield ok(f"{len(tried)} operations of the role {facts.role} tried, none refused")


@check("expiry", "From that moment on no process gets in that connects anew.")
def expiry(facts: Facts) -> Iterator[Result]:
    expiries = known(facts.server).expiries
    for what, left in expiries.items():
        shown, remedy = f"{what} expires in {span(left)}", "renew it, and have its renewal watched"
        if left < LAST_DAY:
            yield error(shown, remedy)
        else:
            yield warning(shown, remedy) if left < LAST_WEEKS else ok(shown)
    if not expiries:
        yield ok("nothing that we are let in by expires, as far as we see")


@check(
    "payload-limit", "An event that was accepted here is refused there, and its key waits for it."
)
def payload_limit(facts: Facts) -> Iterator[Result]:
    ours = facts.config.max_payload
    limits = {"the server's max_payload": known(facts.server).max_payload}
    if not isinstance(facts.stream, Unknown):
        limits["the stream's max_msg_size"] = facts.made.get("max_msg_size", -1)
    less = {name: limit for name, limit in limits.items() if 0 < limit < ours}
    for name, limit in less.items():
        yield warning(
            f"{name} is {limit} bytes, jetstream_max_payload {ours} bytes",
            f"set jetstream_max_payload to {limit}, or raise {name}",
        )
    if not less:
        yield ok(f"jetstream_max_payload is {ours} bytes, and no limit is below it")


@check("account-room", "Where there is no room, nothing more is published.")
def account_room(facts: Facts) -> Iterator[Result]:
    account = known(facts.account)
    limits = account.get("limits") or {}
    most, used = limits.get("max_storage", -1), account.get("storage", 0)
    if most > 0 and used >= FULL * most:
        yield warning(
            f"the account uses {used} of {most} bytes of storage",
            "raise the account's limit, or see what lies in its streams",
        )
    else:
        yield ok(f"{used} bytes used, {f'of {most}' if most > 0 else 'without a limit'}")


# -- the consumers ---------------------------------------------------------------------------------


def _consumers(facts: Facts) -> Iterator[tuple[str, Configuration]]:
    """Name and account of each; the first that is not known ends it."""
    for name, consumer in known(facts.consumers).items():
        yield name, known(consumer)


@check(
    "ack-wait",
    "Messages are kept in progress every jetstream_ack_wait / 3; where the server waits for less, "
    "they are delivered again while they run.",
)
def ack_wait(facts: Facts) -> Iterator[Result]:
    ours = facts.config.ack_wait
    for name, consumer in _consumers(facts):
        theirs = seconds_of(consumer["config"].get("ack_wait"))
        shown = f"{name}: the server's ack_wait is {span(theirs)}, jetstream_ack_wait {span(ours)}"
        if theirs < ours * 2 / 3:
            yield error(shown, f"{PROVISION}, or set jetstream_ack_wait to {theirs:g}")
        elif ours < SHORT_ACK_WAIT:
            yield warning(shown, "set it to 30: a stall of seconds is no death of a worker")
        elif ours > LONG_ACK_WAIT:
            yield warning(
                shown,
                "set it to 30: a running task is kept in progress whatever its length, and this is "
                "how long messages of a killed worker wait",
            )
        else:
            yield ok(shown)


@check(
    "consumer-settings",
    "Each of these makes messages wait, or be given up, without a word in any log.",
)
def consumer_settings(facts: Facts) -> Iterator[Result]:
    for name, consumer in _consumers(facts):
        made = consumer["config"]
        wrong = False
        for is_wrong, what, remedy in (
            (bool(consumer.get("paused")), "is paused", "nats consumer resume"),
            (
                made.get("max_deliver", -1) > 0,
                f"gives messages up by itself after {made.get('max_deliver')} deliveries",
                "set max_deliver to -1: " + PROVISION,
            ),
            (
                bool(made.get("inactive_threshold")),
                f"is deleted when unused for {span(seconds_of(made.get('inactive_threshold')))}",
                "set inactive_threshold to 0: nats consumer edit",
            ),
            (
                bool(made.get("backoff")),
                "has a backoff list, which overrides ack_wait and adds to every delay",
                "take it off: " + PROVISION,
            ),
        ):
            if is_wrong:
                wrong = True
                yield warning(f"{name} {what}", remedy)
        if not wrong:
            yield ok(f"{name}: never paused, deleted or gives up by itself")


@check(
    "max-ack-pending",
    "No more messages than that are delivered and unsettled at once: workers beyond it are idle.",
)
def max_ack_pending(facts: Facts) -> Iterator[Result]:
    queues = {handler.queue for handler in known(facts.handlers)}
    counts = [
        worker.concurrency
        for worker in known(facts.workers)
        if worker.is_direct or "" in queues or not queues.isdisjoint(worker.queues)
    ]
    concurrency = sum(filter(None, counts))
    for name, consumer in _consumers(facts):
        most = consumer["config"].get("max_ack_pending", 0)
        shown = f"{name}: max_ack_pending {most}, {concurrency} processes or threads of workers"
        if 0 < most < concurrency:
            yield error(shown, f"set jetstream_max_ack_pending to {4 * concurrency} or more")
        elif 0 < most < 2 * concurrency:
            yield warning(shown, f"set jetstream_max_ack_pending to {4 * concurrency} or more")
        else:
            yield ok(shown)


@check("takers", "Messages wait in the stream until a bridge or a direct worker asks for them.")
def takers(facts: Facts) -> Iterator[Result]:
    for name, consumer in _consumers(facts):
        waiting, pending = consumer.get("num_waiting", 0), consumer["num_pending"]
        asked = bool(waiting) or bool(consumer.get("push_bound"))
        if pending and not asked and not consumer["num_ack_pending"]:
            yield error(
                f"{name}: {pending} messages wait, and nobody asks for them",
                "start a bridge ('celery -A … jetstream bridge') or a direct worker ('jetstream "
                "worker')",
            )
        else:
            yield ok(f"{name}: {pending} messages wait, {waiting} requests for them")


CHECKS: tuple[Check, ...] = (
    reachable,
    server_version,
    permissions,
    expiry,
    payload_limit,
    account_room,
    ack_wait,
    consumer_settings,
    max_ack_pending,
    takers,
)
