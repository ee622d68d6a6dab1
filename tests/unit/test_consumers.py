"""Which consumers an app has: one for all its sources, or one for each."""

from __future__ import annotations

from typing import Any

import pytest

from celery_jetstream.config import Config
from celery_jetstream.consumers import consumer_specs, stream_spec


def read(**settings: Any) -> Config:
    return Config(**{"app_name": "api", "destination_app": "worker", **settings})


SEVERAL = ["billing", "crm", "worker"]
MIXED = {"crm": {"max_ack_pending": 10}, "billing": None, "worker": {}}
EACH = {"": ["billing"], "-crm": ["crm"], "-worker": ["worker"]}
OF_CRM = {"": ["crm"], "-billing": ["billing"], "-worker": ["worker"]}


@pytest.mark.parametrize(
    ("sources", "can_share", "found", "expected"),
    [
        (None, False, None, {"": ["worker"]}),
        (None, True, None, {"": ["worker"]}),
        (["crm"], True, None, {"": ["crm"]}),
        (SEVERAL, True, None, {"": SEVERAL}),
        (SEVERAL, False, None, EACH),
        (MIXED, True, None, {"": ["billing", "worker"], "-crm": ["crm"]}),
        (MIXED, False, None, EACH),
        # what is there stays, and gets no further subject
        (SEVERAL, True, ["billing"], EACH),
        (SEVERAL, True, ["crm"], OF_CRM),
        (SEVERAL, True, ["crm", "billing"], {"": ["billing", "crm"], "-worker": ["worker"]}),
        (SEVERAL, True, SEVERAL, {"": SEVERAL}),
        (SEVERAL, True, ["*"], {"": SEVERAL}),
        (["crm", "worker"], True, SEVERAL, {"": ["crm", "worker"]}),
        (MIXED, True, SEVERAL, {"": ["billing", "worker"], "-crm": ["crm"]}),
        (MIXED, True, ["crm"], OF_CRM),
        # of no source of ours: that is an error, where the server is asked
        (SEVERAL, True, ["gone"], EACH),
    ],
)
def test_which_consumer_takes_what(
    sources: Any, can_share: bool, found: list[str] | None, expected: dict[str, list[str]]
) -> None:
    there = None if found is None else [f"{name}.sync.api" for name in found]
    specs = consumer_specs(read(sources=sources), can_share=can_share, found=there)
    assert {spec.durable: set(spec.filter_subjects) for spec in specs} == {
        f"api-workers{end}": {f"{source}.sync.api" for source in names}
        for end, names in expected.items()
    }


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
    (shared,) = consumer_specs(read(**several, delivery_subject="to.me"), can_share=True)
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
