"""Which consumers an app has: one for all its sources, or one for each."""

from __future__ import annotations

from typing import Any

import pytest

from celery_jetstream.config import Config
from celery_jetstream.consumers import consumer_specs, may_share, stream_spec


def read(**settings: Any) -> Config:
    return Config(**{"app_name": "api", "destination_app": "worker", **settings})


def layout(config: Config, *, shared: bool) -> dict[str, tuple[str, ...]]:
    return {spec.durable: spec.filter_subjects for spec in consumer_specs(config, shared=shared)}


SEVERAL = ["billing", "crm", "worker"]
MIXED = {"crm": {"max_ack_pending": 10}, "billing": None, "worker": {}}


@pytest.mark.parametrize(
    ("settings", "shared", "expected"),
    [
        ({}, False, {"api-workers": ["worker"]}),
        ({}, True, {"api-workers": ["worker"]}),
        ({"sources": ["crm"]}, True, {"api-workers": ["crm"]}),
        ({"sources": SEVERAL}, True, {"api-workers": SEVERAL}),
        (
            {"sources": SEVERAL},
            False,
            {
                "api-workers": ["billing"],
                "api-workers-crm": ["crm"],
                "api-workers-worker": ["worker"],
            },
        ),
        (
            {"sources": MIXED},
            True,
            {"api-workers": ["billing", "worker"], "api-workers-crm": ["crm"]},
        ),
        (
            {"sources": MIXED},
            False,
            {
                "api-workers": ["billing"],
                "api-workers-worker": ["worker"],
                "api-workers-crm": ["crm"],
            },
        ),
    ],
)
def test_which_consumer_takes_what(
    settings: dict[str, Any], shared: bool, expected: dict[str, list[str]]
) -> None:
    found = layout(read(**settings), shared=shared)
    assert found == {
        durable: tuple(f"{source}.sync.api" for source in sources)
        for durable, sources in expected.items()
    }


def test_those_with_settings_of_their_own_do_not_share() -> None:
    assert not may_share(read())
    assert may_share(read(sources=SEVERAL))
    assert not may_share(read(sources={"a": None, "b": {"batch_size": 1}}))


def test_what_is_set_for_a_source_is_its_consumers() -> None:
    config = read(sources={"a": None, "b": {"batch_size": 2, "max_ack_pending": 3}}, batch_size=9)
    first, second = consumer_specs(config)
    assert (first.batch_size, first.max_ack_pending) == (9, 10_000)
    assert (second.batch_size, second.max_ack_pending) == (2, 3)


def test_the_stream_has_both_directions_and_the_dead_letters_of_all() -> None:
    assert stream_spec(read(sources=["billing", "worker"])).subjects == (
        "api.sync.worker",
        "worker.sync.api",
        "api.sync.billing",
        "billing.sync.api",
        "api.sync.dlq",
        "worker.sync.dlq",
        "billing.sync.dlq",
    )


def test_push_consumers_deliver_to_subjects_of_their_own() -> None:
    several = {"sources": SEVERAL, "consumer_mode": "push"}
    assert [spec.deliver_subject for spec in consumer_specs(read(**several))] == [
        "worker.sync.api.worker",
        "worker.sync.api.worker.crm",
        "worker.sync.api.worker.worker",
    ]
    (shared,) = consumer_specs(read(**several, delivery_subject="to.me"), shared=True)
    assert shared.deliver_subject == "to.me"
    wanted = shared.wanted()
    assert wanted["deliver_group"] == "api-workers"
    assert wanted["flow_control"] is True
    assert wanted["filter_subject"] is None
    assert wanted["idle_heartbeat"] == 5_000_000_000


def test_pull_consumers_deliver_nowhere() -> None:
    (spec,) = consumer_specs(read())
    assert spec.deliver_subject == ""
    wanted = spec.wanted()
    assert wanted["deliver_subject"] is None
    assert (wanted["filter_subject"], wanted["filter_subjects"]) == ("worker.sync.api", None)
