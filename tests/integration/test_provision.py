"""``jetstream provision`` for an admin: checked, for both ends, with credentials of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from celery_jetstream import JetStream
from celery_jetstream.bridge import Bridge
from celery_jetstream.capabilities import FILTER_SUBJECTS
from celery_jetstream.cli_provision import provision
from celery_jetstream.exceptions import DriftError
from tests.conftest import Names
from tests.connections import SECRET
from tests.errands import Errand
from tests.servers import NatsServer, need


def run(jetstream: JetStream, *arguments: str, status: int = 0, **environment: str) -> Result:
    """The command in this process, as Celery runs it."""
    context = SimpleNamespace(app=jetstream.app, style=lambda text, **_: text)
    result = CliRunner().invoke(provision, arguments, obj=context, env=environment)
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture
def make_errand(names: Names) -> Iterator[Callable[..., Errand]]:
    made: list[Errand] = []

    def make(url: str, **settings: Any) -> Errand:
        made.append(Errand(url, names, **settings))
        return made[-1]

    yield make
    for errand in made:
        errand.close()


def consumers(errand: Errand) -> dict[str, dict[str, Any]]:
    """Those of the stream, by name."""
    app = errand.make()
    answer = app.connection.run(app._api, f"CONSUMER.LIST.{app.config.stream_name}", {})
    return {entry["name"]: entry["config"] for entry in answer["consumers"]}


# ── checked ──────────────────────────────────────────────────────────────────


def test_check_changes_nothing_and_tells_by_its_status(
    nats_server: NatsServer, make_errand: Callable[..., Errand], names: Names
) -> None:
    errand = make_errand(nats_server.url, auto_provision=False)
    said = run(errand.desk, "--check", status=3).output
    assert f"+ stream {names.stream_name}: create\n" in said
    assert f"\n  + subjects: {names.app_name}.sync.{names.destination_app}\n" in said
    assert said.endswith("2 to be made or changed\n")
    assert run(errand.desk, "--dry-run").output == said
    run(errand.desk, "--check", status=3)
    assert run(errand.desk).output.endswith("2 made or changed\n")
    assert run(errand.desk, "--check").output.splitlines() == [
        f"= stream {names.stream_name}: as wanted",
        f"= consumer {names.app_name}-workers: as wanted",
        "nothing to do: all is as wanted",
    ]


def test_a_change_is_shown_as_it_is_and_as_it_will_be(
    nats_server: NatsServer, make_errand: Callable[..., Errand], names: Names
) -> None:
    errand = make_errand(nats_server.url)
    errand.desk.provision()
    later = errand.make(ack_wait=60, max_age="7d")
    assert run(later, "--check", status=3).output.splitlines() == [
        f"~ stream {names.stream_name}: update",
        "  ~ max_age: 0 s -> 604800 s",
        f"~ consumer {names.app_name}-workers: update",
        "  ~ ack_wait: 30 s -> 60 s",
        "2 to be made or changed",
    ]
    found = json.loads(run(later, "--check", "--json", status=3).output)
    assert (found["dry_run"], found["changed"]) == (True, True)
    assert found["changes"][1]["differences"] == [
        {"field": "ack_wait", "found": 30.0, "wanted": 60.0}
    ]


def test_what_cannot_be_is_an_error_and_no_change(
    nats_server: NatsServer, make_errand: Callable[..., Errand]
) -> None:
    make_errand(nats_server.url).desk.provision()
    pushes = make_errand(nats_server.url, consumer_mode="push").desk
    assert "deliver_subject must be" in run(pushes, "--check", status=1).output
    assert (
        "deliver_subject" in json.loads(run(pushes, "--check", "--json", status=1).output)["error"]
    )
    with pytest.raises(DriftError):
        pushes.provision(dry_run=True)


# ── both ends ────────────────────────────────────────────────────────────────


def test_a_pair_is_provisioned_at_once_and_then_needs_nothing(
    nats_server: NatsServer, make_errand: Callable[..., Errand], names: Names
) -> None:
    errand = make_errand(nats_server.url)
    assert len(errand.desk.provision(pair=True).changes) == 3
    assert not errand.hub.provision(dry_run=True).changed
    ours, theirs = f"{names.app_name}-workers", f"{names.destination_app}-workers"
    subject = f"{names.app_name}.sync.{names.destination_app}"
    assert consumers(errand).keys() == {ours, theirs}
    assert consumers(errand)[theirs]["filter_subject"] == subject
    assert "= consumer " + theirs in run(errand.desk, "--check", "--pair").output


def test_the_other_end_is_left_as_it_is(
    nats_server: NatsServer, make_errand: Callable[..., Errand], names: Names
) -> None:
    """Its consumer may push, or be there for other sources only."""
    errand = make_errand(nats_server.url, hub={"consumer_mode": "push", "ack_wait": 77})
    errand.hub.provision()
    assert [c.action for c in errand.desk.provision(pair=True).changes] == [
        *("none", "create", "none")
    ]
    theirs = consumers(errand)[f"{names.destination_app}-workers"]
    assert theirs["ack_wait"] == 77e9
    assert theirs["deliver_subject"]


def test_the_other_end_takes_others_events_already(
    nats_server: NatsServer, make_errand: Callable[..., Errand], names: Names
) -> None:
    errand = make_errand(nats_server.url, hub={"sources": ["third"]})
    errand.hub.provision()
    errand.desk.provision(pair=True)
    own = f"{names.destination_app}-workers-{names.app_name}"
    assert own in consumers(errand)
    assert not errand.desk.provision(dry_run=True, pair=True).changed


# ── several sources, and nobody to ask ───────────────────────────────────────


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_source_that_came_later_is_found_without_asking(
    request: pytest.FixtureRequest,
    make_errand: Callable[..., Errand],
    names: Names,
    old: bool,
) -> None:
    server: NatsServer = request.getfixturevalue("old_nats_server" if old else "nats_server")
    errand = make_errand(server.url, auto_provision=False)
    first, second = names.destination_app, f"later-{names.app_name}"
    errand.desk.provision()  # for the first source only
    later = errand.make(sources=[first, second])
    later.provision()
    possible = later.connection.run(later.consumers)
    assert {one.durable for one in possible} == set(consumers(errand))
    errand.desk = later
    errand.hub = errand.make(app_name=second, destination_app=names.app_name)
    errand.run(2)


@pytest.mark.needs_nats(FILTER_SUBJECTS)
def test_consumers_that_may_be_missing_are_not_missed(
    nats_server: NatsServer,
    make_errand: Callable[..., Errand],
    names: Names,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All sources share one: the others, which there might be, are looked for in silence."""
    sources = [names.destination_app, f"later-{names.app_name}"]
    errand = make_errand(nats_server.url, auto_provision=False)
    errand.desk = errand.make(sources=sources)
    errand.desk.provision()
    assert len(consumers(errand)) == 1
    Bridge(errand.desk, once=True).run()
    errand.run(2)
    assert errand.desk.health_check()["problems"] == []
    assert "is not there" not in caplog.text
    assert "cannot pull" not in caplog.text


# ── credentials of its own ───────────────────────────────────────────────────


@pytest.fixture
def two_users() -> Iterator[NatsServer]:
    """``us`` may not do much, ``admin`` may all."""
    need("nats")
    limits = 'permissions: {publish: {deny: ["$JS.API.>"]}}'
    config = (
        f'authorization {{ users: [{{user: us, password: "{SECRET}-us", {limits}}}\n'
        f'{{user: admin, password: "{SECRET}"}}] }}'
    )
    with NatsServer(config=config) as server:
        yield server


def test_an_admin_has_credentials_of_its_own(
    two_users: NatsServer,
    make_errand: Callable[..., Errand],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    desk = make_errand(
        f"nats://us:{SECRET}-us@127.0.0.1:{two_users.port}",
        auto_provision=False,
        connect_retry_delay=0.1,
    ).desk
    denied = run(desk, status=1)
    assert "Error: the NATS user may not publish to $JS.API.STREAM.INFO." in denied.output
    assert "let an admin do it: --creds" in denied.output
    said = [run(desk, "--check", "--user", "admin", status=3, JETSTREAM_ADMIN_PASSWORD=SECRET)]
    url = f"nats://admin:{SECRET}@127.0.0.1:{two_users.port}"
    said += [run(desk, JETSTREAM_ADMIN_NATS_URL=url), run(desk, "--check", "--nats-url", url)]
    said += [run(desk, "--user", "admin", status=1, JETSTREAM_ADMIN_PASSWORD=f"{SECRET}-not")]
    assert "refused the credentials" in said[-1].output
    assert "; check --user and $JETSTREAM_ADMIN_PASSWORD\n" in said[-1].output
    said += [run(desk, "--user", "admin", status=2)]
    assert "JETSTREAM_ADMIN_PASSWORD" in said[-1].output
    (tmp_path / "file").write_text("x")
    file = str(tmp_path / "file")
    said += [run(desk, "--creds", file, "--nkey", file, status=2)]
    said += [run(desk, "--creds", file, status=1), run(desk, "--tls-ca", file, status=1)]
    assert "TLS files cannot be used" in said[-1].output
    assert SECRET not in caplog.text + "".join(result.output for result in said)
    assert not desk.connected, "the app's own connection was not needed"


# ── permissions as text ──────────────────────────────────────────────────────


def test_permissions_are_printed_without_a_server(
    make_errand: Callable[..., Errand], names: Names
) -> None:
    desk = make_errand("nats://127.0.0.1:1", auto_provision=False).desk
    said = run(desk, "--print-permissions").output
    assert [line for line in said.splitlines() if "user:" in line] == [
        f'  user: "{names.app_name}{end}", password: $NATS_{name}_PASSWORD'
        for end in ("", "-admin", "-operator")
        for name in [f"{names.app_name}{end}".upper().replace("-", "_")]
    ]
    assert "# status: " not in run(desk, "--print-permissions", "--role", "run").output
    asking = run(desk, "--print-permissions", "--role", "run", "--with-status").output
    assert "# status: " in asking
    found = json.loads(run(desk, "--print-permissions", "--json", "--role", "run").output)
    assert found["users"].keys() == {"run"}
    assert found["consumer_mode"] == "pull"
    subject = f"{names.app_name}.sync.{names.destination_app}"
    assert subject in found["users"]["run"]["publish"]
    nsc = run(desk, "--print-permissions", "--nsc", "--role", "admin").output
    assert nsc.startswith(f"nsc add user --name {names.app_name}-admin \\\n  --allow-pub '$JS.API")
    assert run(desk, "--role", "run", status=2)
    theirs = f"{names.destination_app}-workers"
    assert theirs not in said
    assert theirs in run(desk, "--print-permissions", "--pair", "--role", "admin").output
