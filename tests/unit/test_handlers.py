"""What a handler takes over from its options, its base class and the app's annotations."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_jetstream import JetStream, jetstream_handler
from celery_jetstream.exceptions import ConfigurationError


def jetstream(**settings: Any) -> JetStream:
    app = Celery("annotated", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="a", jetstream_destination_app="b", **settings)
    return JetStream(app)


@jetstream_handler("annotated.event", name="tests.annotated")
def annotated(event: Any) -> None: ...


def limit(found: JetStream) -> int | None:
    found.app.finalize()
    return found.app.tasks["tests.annotated"].policy(found.config).limit


def test_the_limit_is_the_apps_where_none_was_given() -> None:
    assert limit(jetstream(jetstream_max_deliver=7)) == 7


def test_max_retries_of_an_annotation_is_the_limit() -> None:
    assert limit(jetstream(task_annotations={"tests.annotated": {"max_retries": 0}})) == 1


def test_acks_late_of_an_annotation_is_refused_at_start() -> None:
    found = jetstream(task_annotations={"tests.annotated": {"acks_late": True}})
    found.app.finalize()
    with pytest.raises(ConfigurationError, match=r"acks_late.*tests\.annotated"):
        found.check()
