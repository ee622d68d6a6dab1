"""``celery -A app jetstream provision``: the stream and the consumers, and who may do what."""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from .commands import DRY_RUN, JSON, echo_json, jetstream_of
from .permissions import ROLES

__all__ = ("provision",)

#: With --check: something would be changed. (1 is an error, 2 a wrong command line.)
WOULD_CHANGE = 3
ADVICE = "Or let an admin do it: --creds, --nkey, --user, or --nats-url"

_FILE = click.Path(exists=True, dir_okay=False)


@click.command(cls=CeleryCommand)
@DRY_RUN
@click.option("--check", is_flag=True, help="As --dry-run; status 3 where something is to be done.")
@click.option(
    "--pair", is_flag=True, help="Also the consumers of the apps at the other end, where missing."
)
@click.option(
    "--nats-url",
    envvar="JETSTREAM_ADMIN_NATS_URL",
    help="Where to connect for this, in place of the app's. [$JETSTREAM_ADMIN_NATS_URL]",
)
@click.option(
    "--creds",
    type=_FILE,
    envvar="JETSTREAM_ADMIN_CREDS",
    help="The admin's creds file. [$JETSTREAM_ADMIN_CREDS]",
)
@click.option(
    "--nkey",
    type=_FILE,
    envvar="JETSTREAM_ADMIN_NKEY",
    help="A file with the admin's nkey seed. [$JETSTREAM_ADMIN_NKEY]",
)
@click.option(
    "--user",
    envvar="JETSTREAM_ADMIN_USER",
    help="The admin's name; the password is $JETSTREAM_ADMIN_PASSWORD, or is asked for.",
)
@click.option("--tls-ca", type=_FILE, help="Whom to trust, in place of the app's TLS settings.")
@click.option("--tls-cert", type=_FILE, help="The admin's client certificate, with its chain.")
@click.option("--tls-key", type=_FILE, help="The key of --tls-cert.")
@click.option("--inbox-prefix", help="Under which subject the admin hears answers.")
@click.option(
    "--print-permissions",
    "print_permissions",
    is_flag=True,
    help="Print the least that each NATS user needs, as users of nats-server.conf; no server.",
)
@click.option(
    "--role",
    "roles",
    type=click.Choice(ROLES),
    multiple=True,
    help="Of this user only; repeat it for two.",
)
@click.option(
    "--with-status",
    is_flag=True,
    help="The run user may also ask for the status, as /status of a bridge does.",
)
@click.option("--nsc", is_flag=True, help="With --print-permissions: as commands of nsc.")
@JSON
@click.pass_context
@handle_preload_options
def provision(
    ctx: click.Context,
    dry_run: bool,
    check: bool,
    pair: bool,
    print_permissions: bool,
    roles: tuple[str, ...],
    with_status: bool,
    nsc: bool,
    as_json: bool,
    **admin: Any,
) -> None:
    """Creates or updates the stream and the consumer; harmless to repeat.

    It says what is changed: + is made, ~ changes, = is as it must be. With credentials of an admin
    (--creds, --nkey, --user, or in --nats-url) the app's are not used.

    Exit status: 0 when all is as it must be, or has been made so; 1 when that cannot be; with
    --check 3 when something is to be done.
    """
    from .exceptions import CeleryJetStreamError, ConnectionRefusedByServer, PermissionDeniedError

    if (roles or nsc or with_status) and not print_permissions:
        raise click.UsageError("--role, --with-status and --nsc go with --print-permissions")
    jetstream = jetstream_of(ctx.obj.app)
    try:
        if print_permissions:
            asked = {"pair": pair, "status": with_status, "inbox": admin["inbox_prefix"]}
            _print_permissions(jetstream, roles, nsc, as_json, asked)
            return
        dry_run = dry_run or check
        plan = jetstream.provision(dry_run=dry_run, pair=pair, **_connection(jetstream, admin))
    except CeleryJetStreamError as error:
        text = str(error)
        if isinstance(error, PermissionDeniedError) and not any(admin.values()):
            text += f". {ADVICE}"
        elif isinstance(error, ConnectionRefusedByServer):
            text = _check_the_admins(text, admin)
        if as_json:
            echo_json({"error": text})
            sys.exit(1)
        raise click.ClickException(text) from error
    finally:
        jetstream.close()
    if as_json:
        changes = [change.as_dict() for change in plan.changes]
        echo_json({"dry_run": dry_run, "changed": plan.changed, "changes": changes})
    else:
        click.echo(str(plan))
        click.echo(plan.summary(dry_run=dry_run))
    sys.exit(WOULD_CHANGE if check and plan.changed else 0)


# ── the admin's connection ───────────────────────────────────────────────────

_CREDENTIALS = (
    *("user", "password", "token", "user_credentials"),
    *("nkeys_seed", "nkeys_seed_str", "signature_cb", "user_jwt_cb"),
)


def _connection(jetstream: Any, admin: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the app's settings; empty where nothing does."""
    config, options = jetstream.config, {}
    if admin["creds"]:
        options["user_credentials"] = admin["creds"]
    if admin["nkey"]:
        options["nkeys_seed_str"] = Path(admin["nkey"]).read_text().strip()
    if admin["user"]:
        options["user"], options["password"] = admin["user"], _password(admin["user"])
    if len([name for name in ("creds", "nkey", "user") if admin[name]]) > 1:
        raise click.UsageError("give one of --creds, --nkey and --user")
    url = admin["nats_url"]
    own = bool(options or url)
    if not own and not any(admin.values()):
        return {}
    kept = config.nats_options
    if own:
        kept = {name: value for name, value in kept.items() if name not in _CREDENTIALS}
    options = {**kept, **options, **dict(_tls(admin))}
    if admin["inbox_prefix"]:
        options["inbox_prefix"] = admin["inbox_prefix"]
    urls = url or (_without_users(config.nats_urls) if own else None)
    return {"nats_urls": urls, "nats_options": options}


def _check_the_admins(refusal: str, admin: Mapping[str, Any]) -> str:
    """A refusal tells to check the app's settings, which were not used here."""
    words = {
        "user": "--user and $JETSTREAM_ADMIN_PASSWORD",
        "creds": "the file of --creds",
        "nkey": "the file of --nkey",
        "nats_url": "what --nats-url has",
    }
    given = " and ".join(text for name, text in words.items() if admin[name])
    what, check, _ = refusal.partition("; check ")
    return f"{what}{check}{given}" if check and given else refusal


def _password(user: str) -> str:
    if (given := os.environ.get("JETSTREAM_ADMIN_PASSWORD")) is not None:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError("--user: set $JETSTREAM_ADMIN_PASSWORD to the password")
    asked: str = click.prompt(f"Password of {user}", hide_input=True, err=True)
    return asked


def _without_users(urls: Sequence[str]) -> list[str]:
    return [url[: url.index("://") + 3] + url.split("://")[1].rpartition("@")[2] for url in urls]


def _tls(admin: Mapping[str, Any]) -> Iterator[tuple[str, ssl.SSLContext]]:
    if bool(admin["tls_cert"]) != bool(admin["tls_key"]):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if not (admin["tls_ca"] or admin["tls_cert"]):
        return
    try:
        context = ssl.create_default_context(cafile=admin["tls_ca"])
        if admin["tls_cert"]:
            context.load_cert_chain(admin["tls_cert"], admin["tls_key"])
    except (OSError, ValueError) as error:
        raise click.ClickException(f"the TLS files cannot be used: {error}") from error
    yield "tls", context


# ── permissions ──────────────────────────────────────────────────────────────


def _print_permissions(
    jetstream: Any, wanted: tuple[str, ...], nsc: bool, as_json: bool, asked: dict[str, Any]
) -> None:
    from .permissions import as_conf, as_nsc
    from .provisioning import roles

    config = jetstream.config
    found = dict(zip(ROLES, roles(config, **asked), strict=True))
    chosen = {name: found[name] for name in wanted or ROLES}
    if as_json:
        echo_json(
            {
                "app": config.app_name,
                "consumer_mode": config.consumer_mode,
                "auto_provision": config.auto_provision,
                "users": {name: role.as_dict() for name, role in chosen.items()},
            }
        )
    elif nsc:
        click.echo(as_nsc(list(chosen.values())))
    else:
        click.echo(as_conf(list(chosen.values())))
