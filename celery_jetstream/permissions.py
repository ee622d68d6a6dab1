"""The least that each NATS user needs: for running the app, provisioning, and looking after it.

Receives the settings and the consumers; hands on a :class:`Role` for each user, made of
:class:`Need`, each with its reason, and their text for a server's configuration or for ``nsc``.
Pure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Config
from .specs import ConsumerSpec

__all__ = (
    *(
        "ROLES",
        "Need",
        "Role",
        "admin",
        "as_conf",
        "as_nsc",
        "by_role",
        "operator",
        "run_time",
        "to_allow",
    ),
)

#: The words of ``--role``.
ROLES = ("run", "admin", "operator")
_INBOX = "_INBOX"  # nats-py's default
#: What the server makes a subject of that is another one for each message.
_PER_MESSAGE = re.compile(r"(\$JS\.(?:ACK|FC)\.[^.]+\.[^.]+)\..+")


@dataclass(frozen=True)
class Need:
    """What one job takes.

    Attributes:
        name: of the job, in two words at the most.
        why: what does not go without it.
        publish: the subjects to be allowed for publishing.
        subscribe: those for subscribing; one with a space has a queue group behind that.
    """

    name: str
    why: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


@dataclass(frozen=True)
class Role:
    """One NATS user.

    Attributes:
        name: what it may be called.
        what: who uses it.
        needs: what it needs, by job; a job that a process does not do may be left out.
    """

    name: str
    what: str
    needs: tuple[Need, ...]

    @property
    def publish(self) -> tuple[str, ...]:
        """All that it publishes to, each once."""
        return _each_once(need.publish for need in self.needs)

    @property
    def subscribe(self) -> tuple[str, ...]:
        """All that it subscribes to, each once."""
        return _each_once(need.subscribe for need in self.needs)

    def why(self, subject: str) -> str:
        """What does not go without it."""
        return next(n.why for n in self.needs if subject in (*n.publish, *n.subscribe))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "what": self.what,
            "publish": list(self.publish),
            "subscribe": list(self.subscribe),
            "needs": [
                {**vars(need), "publish": list(need.publish), "subscribe": list(need.subscribe)}
                for need in self.needs
            ],
        }


# ── who needs what ───────────────────────────────────────────────────────────


def run_time(config: Config, consumers: Sequence[ConsumerSpec], *, status: bool = False) -> Role:
    """The user of the app's own processes: workers, bridges, beat, web servers.

    Args:
        config: the settings.
        consumers: those that the app takes its messages from.
        status: it may also ask what health tells of JetStream.
    """
    needs = [
        _answers(config),
        Need("events", "publishing, also what the outbox has", publish=_published(config)),
        *_taking(consumers),
        Need(
            "settling",
            "settling messages, claiming them and keeping them in progress",
            publish=tuple(f"{_ack(consumer)}.>" for consumer in consumers),
        ),
        Need(
            "claims",
            "bridge: hearing which messages workers have",
            subscribe=tuple(f"{_ack(consumer)}.>" for consumer in consumers),
        ),
    ]
    if config.use_dlq:
        read = f"$JS.API.STREAM.MSG.GET.{config.stream_name}"
        subjects = (config.dead_letter_subject, read)
        needs.append(Need("dead letters", "keeping what is given up, as it was", subjects))
    advisories = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
    needs.append(
        Need(
            "given up",
            "hearing what a consumer with a finite max_deliver gives up by itself",
            subscribe=tuple(f"{advisories}.{one.stream}.{one.durable}" for one in consumers),
        )
    )
    if config.metrics:
        seen = _seen(config, consumers)[0 if config.use_dlq else 1 :]
        needs.append(Need("metrics", "/metrics: what waits for the app, and dead letters", seen))
    if status:
        needs.append(_status(config, consumers, "/status of a bridge, relay or direct worker"))
    if config.auto_provision:
        needs.append(_provisioning([config], consumers))
    return Role(config.app_name, "the app: workers, bridges, beat, web servers", tuple(needs))


def admin(
    configs: Sequence[Config], consumers: Sequence[ConsumerSpec], inbox: str | None = None
) -> Role:
    """The user of ``jetstream provision``: it makes the stream and these consumers, no more.

    Args:
        configs: the app's, and of those that are provisioned with it.
        consumers: all of theirs.
        inbox: its inbox prefix; None for the app's.
    """
    first = configs[0]
    needs = (_answers(first, inbox), _provisioning(configs, consumers))
    return Role(f"{first.app_name}-admin", "jetstream provision, at each deploy", needs)


def operator(config: Config, consumers: Sequence[ConsumerSpec]) -> Role:
    """The user of those who look after the app: status, and dead letters."""
    stream = config.stream_name
    needs = (
        _answers(config),
        _status(config, consumers, "jetstream status, and jetstream doctor --role operator"),
        Need(
            "reading",
            "jetstream dlq: list, show, export, count",
            (f"$JS.API.STREAM.INFO.{stream}", f"$JS.API.STREAM.MSG.GET.{stream}"),
        ),
        Need(
            "redriving",
            "jetstream dlq redrive: sends dead letters again, and removes them",
            (*config.consume_subjects, f"$JS.API.STREAM.MSG.DELETE.{stream}"),
        ),
        Need(
            "purging",
            "jetstream dlq purge: removes dead letters (it could remove any message)",
            (f"$JS.API.STREAM.MSG.DELETE.{stream}",),
        ),
    )
    return Role(f"{config.app_name}-operator", "whoever looks after the app", needs)


def by_role(config: Config, consumers: Sequence[ConsumerSpec]) -> dict[str, Role]:
    """An app's three users by the word that ``--role`` has for each; who may least comes first."""
    return {
        "run": run_time(config, consumers),
        "operator": operator(config, consumers),
        "admin": admin([config], consumers),
    }


def to_allow(subject: str, inbox: str = "") -> str:
    """The subject to allow so that this one goes: with a wildcard where there are many like it."""
    if inbox and subject.startswith(f"{inbox}."):
        return f"{inbox}.>"
    return _PER_MESSAGE.sub(r"\1.>", subject)


def _answers(config: Config, inbox: str | None = None) -> Need:
    prefix = inbox or config.nats_options.get("inbox_prefix") or _INBOX
    return Need("answers", "all that is asked or confirmed", subscribe=(f"{prefix}.>",))


def _seen(config: Config, consumers: Sequence[ConsumerSpec]) -> tuple[str, ...]:
    """How to ask what there is in the stream, and at each consumer."""
    stream = config.stream_name
    each = (f"$JS.API.CONSUMER.INFO.{stream}.{consumer.durable}" for consumer in consumers)
    return (f"$JS.API.STREAM.INFO.{stream}", *each)


def _status(config: Config, consumers: Sequence[ConsumerSpec], why: str) -> Need:
    return Need("status", why, ("$JS.API.INFO", *_seen(config, consumers)))


def _published(config: Config) -> tuple[str, ...]:
    start = f"{config.app_name}."
    ours = (s for s in config.subjects if s.startswith(start) and s != config.dead_letter_subject)
    return tuple(ours)


def _taking(consumers: Sequence[ConsumerSpec]) -> Iterable[Need]:
    pushed = [consumer for consumer in consumers if consumer.deliver_subject]
    if pushed:
        yield Need(
            "receiving",
            "push mode, the bridge: what the server sends, and the answers to its flow control",
            publish=tuple(f"$JS.FC.{one.stream}.{one.durable}.>" for one in pushed),
            subscribe=tuple(f"{one.deliver_subject} {one.deliver_group}" for one in pushed),
        )
        return
    subjects = (f"$JS.API.CONSUMER.MSG.NEXT.{one.stream}.{one.durable}" for one in consumers)
    yield Need("pulling", "bridges and direct workers: asking for messages", tuple(subjects))


def _provisioning(configs: Sequence[Config], consumers: Sequence[ConsumerSpec]) -> Need:
    stream = configs[0].stream_name
    each = [
        subject
        for one in consumers
        for subject in (
            f"$JS.API.CONSUMER.INFO.{stream}.{one.durable}",
            f"$JS.API.CONSUMER.CREATE.{stream}.{one.durable}{_filter(one)}",
        )
    ]
    return Need(
        "provisioning",
        "making the stream and the consumers, and looking whether they are as they must be",
        (
            "$JS.API.INFO",
            *(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("INFO", "CREATE", "UPDATE")),
            "$JS.API.STREAM.NAMES",
            *each,
            f"$JS.API.CONSUMER.LIST.{stream}",
        ),
    )


def _filter(consumer: ConsumerSpec) -> str:
    """Where it is one subject, the request names it (see :mod:`~celery_jetstream.topology`)."""
    subjects = consumer.filter_subjects
    return f".{subjects[0]}" if len(subjects) == 1 else ""


def _ack(consumer: ConsumerSpec) -> str:
    return f"$JS.ACK.{consumer.stream}.{consumer.durable}"


def _each_once(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(subject for group in groups for subject in group))


# ── as text ──────────────────────────────────────────────────────────────────


def as_conf(roles: Sequence[Role]) -> str:
    """The ``users`` of a ``nats-server.conf``; passwords are read from the server's environment."""
    lines = []
    for role in roles:
        variable = re.sub(r"\W", "_", f"NATS_{role.name}_PASSWORD").upper()
        lines += [
            f"# {role.what}",
            "{",
            f'  user: "{role.name}", password: ${variable}',
            "  permissions: {",
            *_block("publish", [(need, need.publish) for need in role.needs]),
            *_block("subscribe", [(need, need.subscribe) for need in role.needs]),
            "  }",
            "}",
        ]
    return "\n".join(lines)


def _block(verb: str, needs: Sequence[tuple[Need, tuple[str, ...]]]) -> list[str]:
    lines, said = [f"    {verb}: {{ allow: ["], set[str]()
    for need, subjects in needs:
        fresh = [subject for subject in subjects if subject not in said]
        said.update(fresh)
        if fresh:
            lines.append(f"      # {need.name}: {need.why}")
            lines += [f"      {_quoted(subject)}" for subject in fresh]
    return [*lines, "    ] }"]


def _quoted(subject: str) -> str:
    """A stream's name may have quotation marks, which must not end the text here."""
    return '"' + subject.replace("\\", "\\\\").replace('"', '\\"') + '"'


def as_nsc(roles: Sequence[Role]) -> str:
    """The same, as commands of ``nsc``."""
    return "\n".join(
        f"nsc add user --name {role.name} \\\n"
        f"  --allow-pub {shlex.quote(','.join(role.publish))} \\\n"
        f"  --allow-sub {shlex.quote(','.join(role.subscribe))}"
        for role in roles
    )
