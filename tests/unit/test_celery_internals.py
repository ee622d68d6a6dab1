"""What is used of Celery and is not public: where a release changes it, this says so first."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import celery
import pytest
from celery.app.task import Task
from celery.concurrency.base import BasePool
from celery.worker.consumer.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from celery.worker.strategy import default

ARCHITECTURE = Path(__file__).parents[2] / "docs/explanation/architecture.md"
NAMED = re.findall(r"^\| `((?:celery|kombu)\.[\w.]+)` \|", ARCHITECTURE.read_text("utf-8"), re.M)
CHANGED = f"Celery {celery.__version__} has changed it: see docs/explanation/architecture.md"
#: Set by ``Consumer.__init__``.
OF_INSTANCES = {"on_task_message", "initial_prefetch_count", "timer"}


def test_the_table_is_there() -> None:
    assert len(NAMED) == 17


@pytest.mark.parametrize("path", NAMED)
def test_it_is_where_it_was(path: str) -> None:
    *above, name = path.split(".")
    if name in OF_INSTANCES:
        assert f"self.{name} = " in inspect.getsource(Consumer.__init__), CHANGED
        return
    found: Any = import_module(above[0])
    for number, part in enumerate(above[1:], 2):
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            found = import_module(".".join(above[:number]))
    assert hasattr(found, name), CHANGED


def test_a_strategy_takes_a_message_and_what_acknowledges_it() -> None:
    (handler,) = (
        constant
        for constant in default.__code__.co_consts
        if getattr(constant, "co_name", "") == "task_message_handler"
    )
    taken = handler.co_varnames[: handler.co_argcount]
    assert taken[:5] == ("message", "body", "ack", "reject", "callbacks"), CHANGED


def test_a_request_is_made_of_what_a_message_of_ours_has() -> None:
    source = inspect.getsource(Request.__init__)
    used = set(re.findall(r"\bmessage\.(\w+)", source))
    ours = {"headers", "body", "payload", "properties", "delivery_info"}
    assert used <= ours | {"content_type", "content_encoding"}, CHANGED


def test_a_requests_result_is_a_weak_reference() -> None:
    source = inspect.getsource(create_request_cls)
    assert "self._apply_result = maybe(ref, result)" in source, CHANGED
    assert "def on_success(self, failed__retval__runtime, **kwargs)" in source, CHANGED


def test_a_task_names_its_request() -> None:
    assert Task.Request == "celery.worker.request:Request", CHANGED


def test_strategies_are_by_task() -> None:
    assert "self.strategies[name] = " in inspect.getsource(Consumer.update_strategies), CHANGED


def test_a_pool_says_whether_it_is_of_greenlets() -> None:
    assert BasePool.is_green is False, CHANGED
