"""Who needs what: one line here for each permission, so that none comes unseen."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from celery_jetstream.config import Config
from celery_jetstream.exceptions import PermissionDeniedError
from celery_jetstream.permissions import Role, as_conf, as_nsc, to_allow
from celery_jetstream.provisioning import peers, roles


def config(**settings: Any) -> Config:
    given = {"auto_provision": False, "stream_name": "S", **settings}
    return Config(app_name="shop", destination_app="billing", **given)


def run(**settings: Any) -> Role:
    return roles(config(**settings))[0]


PULLS = (
    "shop.sync.billing",
    "$JS.API.CONSUMER.MSG.NEXT.S.shop-workers",
    "$JS.ACK.S.shop-workers.>",
    "shop.sync.dlq",
    "$JS.API.STREAM.MSG.GET.S",
)
HEARS = (
    "_INBOX.>",
    "$JS.ACK.S.shop-workers.>",
    "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.S.shop-workers",
)


def test_pull_mode() -> None:
    assert (run().publish, run().subscribe) == (PULLS, HEARS)


def test_metrics_and_status_have_jobs_of_their_own() -> None:
    """Each no more than it asks: metrics nothing of the server."""
    consumer, stream = "$JS.API.CONSUMER.INFO.S.shop-workers", "$JS.API.STREAM.INFO.S"
    assert run(metrics=True).publish == (*PULLS, stream, consumer)
    no_letters = {"use_dlq": False, "no_dlq_action": "log_and_term"}
    assert run(metrics=True, **no_letters).publish == (*PULLS[:3], consumer)
    asking = roles(config(), status=True)[0]
    assert asking.publish == (*PULLS, "$JS.API.INFO", stream, consumer)
    assert [need.name for need in run(metrics=True).needs][-1] == "metrics"
    assert [need.name for need in asking.needs][-1] == "status"


def test_push_mode_hears_as_one_of_a_group_and_asks_for_nothing() -> None:
    role = run(consumer_mode="push")
    assert set(role.publish) ^ set(PULLS) == {PULLS[1], "$JS.FC.S.shop-workers.>"}
    assert set(role.subscribe) ^ set(HEARS) == {"billing.sync.shop.worker shop-workers"}


def test_without_dead_letters_nothing_of_them() -> None:
    role = run(use_dlq=False, no_dlq_action="log_and_term")
    assert role.publish == PULLS[:3]


def test_an_inbox_prefix_and_what_each_user_hears() -> None:
    of = config(nats_options={"inbox_prefix": "_INBOX_shop"})
    for role in roles(of):
        assert [s for s in role.subscribe if "INBOX" in s] == ["_INBOX_shop.>"]
    assert roles(of, inbox="_ADMIN")[1].subscribe == ("_ADMIN.>",)


def test_several_sources_have_what_any_server_may_make_of_them() -> None:
    of = config(sources={"billing": None, "crm": None, "erp": {"batch_size": 5}})
    role, admin, _ = roles(of)
    next_ = "$JS.API.CONSUMER.MSG.NEXT.S.shop-workers"
    assert [s for s in role.publish if "NEXT" in s] == [next_, f"{next_}-erp", f"{next_}-crm"]
    assert {"shop.sync.billing", "shop.sync.crm", "shop.sync.erp"} <= set(role.publish)
    create = "$JS.API.CONSUMER.CREATE.S.shop-workers"
    assert {create, f"{create}.billing.sync.shop", f"{create}-crm.crm.sync.shop"} <= set(
        admin.publish
    )


def test_who_provisions_by_itself_may_do_what_the_admin_does() -> None:
    role, admin, _ = roles(config(auto_provision=True))
    assert set(admin.publish) < set(role.publish)
    assert set(role.publish) - set(PULLS) == set(admin.publish)
    assert admin.publish == (
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.S",
        "$JS.API.STREAM.CREATE.S",
        "$JS.API.STREAM.UPDATE.S",
        "$JS.API.STREAM.NAMES",
        "$JS.API.CONSUMER.INFO.S.shop-workers",
        "$JS.API.CONSUMER.CREATE.S.shop-workers.billing.sync.shop",
        "$JS.API.CONSUMER.LIST.S",
    )


def test_one_admin_for_a_pair() -> None:
    admin = roles(config(sources=["billing", "crm"]), pair=True)[1]
    for app in ("billing", "crm"):
        create = f"$JS.API.CONSUMER.CREATE.S.{app}-workers"
        assert {f"{create}.shop.sync.{app}", f"{create}-shop.shop.sync.{app}"} <= set(admin.publish)


def test_the_operators_jobs_can_be_told_apart() -> None:
    operator = roles(config())[2]
    assert [need.name for need in operator.needs] == [
        *("answers", "status", "reading", "redriving", "purging")
    ]
    status = operator.needs[1]
    assert not [subject for subject in status.publish if "MSG" in subject or "sync" in subject]


def test_peers_have_no_settings_of_ours_but_the_streams() -> None:
    (peer,) = peers(config(consumer_mode="push", delivery_subject="a.b", max_age=60))
    assert (peer.app_name, peer.destination_app, peer.max_age) == ("billing", "shop", 60)
    assert (peer.consumer_mode, peer.delivery_subject) == ("pull", None)


@pytest.mark.parametrize(
    ("subject", "allowed"),
    [
        ("$JS.ACK.S.c.1.2.3.4.5", "$JS.ACK.S.c.>"),
        ("$JS.ACK.S.c.>", "$JS.ACK.S.c.>"),
        ("$JS.FC.S.c.xyz", "$JS.FC.S.c.>"),
        ("_IN.abc.*", "_IN.>"),
        ("$JS.API.CONSUMER.MSG.NEXT.S.c", "$JS.API.CONSUMER.MSG.NEXT.S.c"),
        ("shop.sync.dlq", "shop.sync.dlq"),
    ],
)
def test_what_is_to_be_allowed_so_that_a_subject_goes(subject: str, allowed: str) -> None:
    assert to_allow(subject, "_IN") == allowed


def test_texts_for_a_server_and_for_nsc() -> None:
    role = run()
    text = as_conf([role])
    assert 'user: "shop", password: $NATS_SHOP_PASSWORD' in text
    assert text.count("{") == text.count("}")
    for subject in (*role.publish, *role.subscribe):
        assert f'"{subject}"' in text
    for need in role.needs:
        assert f"# {need.name}: {need.why}" in text
    assert f"--allow-sub '{','.join(HEARS)}'" in as_nsc([role])


def test_a_name_with_quotation_marks_does_not_end_the_text() -> None:
    role = run(stream_name="a\"b'c")
    assert '"$JS.API.STREAM.MSG.GET.a\\"b\'c"' in as_conf([role])
    words = shlex.split(as_nsc([role]).replace("\\\n", ""))
    assert words[words.index("--allow-pub") + 1] == ",".join(role.publish)


def test_a_denial_says_what_to_have_allowed() -> None:
    error = PermissionDeniedError("publish to", "a.b")
    assert (error.operation, error.subject) == ("publish to", "a.b")
    assert str(error).startswith("the NATS user may not publish to a.b: have that allowed")
    assert "--print-permissions" in str(error)
