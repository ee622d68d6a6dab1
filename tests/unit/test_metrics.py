"""The catalogue of metrics against the code, the docs and the alert rules; and how they count."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from celery import Celery
from prometheus_client import REGISTRY

from celery_jetstream import Ack, DeadLetter, Delivery, JetStream, Nak, meters, metrics, signals
from celery_jetstream.catalogue import LOOKED_UP, METRICS, OTHER, OUTCOMES, REASONS
from celery_jetstream.config import Config
from celery_jetstream.exceptions import ConfigurationError
from celery_jetstream.metrics import exposition
from celery_jetstream.outcomes import PublishResult, Verdict

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docs/production/alerts.yml"
MONITORING = ROOT / "docs/production/monitoring.md"
BY_NAME = {metric.full_name: metric for metric in METRICS}
RULES = [
    rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]
]
DELIVERY = Delivery.from_reply("$JS.ACK.s.c.2.1.1.1.0")


# -- the catalogue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_wants_them(metric: Any) -> None:
    assert re.fullmatch(r"celery_jetstream_[a-z_]+", metric.full_name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert bool(metric.processes) == (metric.kind == "gauge")
    assert list(metric.buckets) == sorted(metric.buckets)
    if metric.kind == "histogram":
        assert metric.name.endswith(("_seconds", "_events"))


def test_the_page_has_every_metric_as_it_is() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(celery_jetstream_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", page, re.M)
    documented = {name: (kind, labels.replace("`", ""), text) for name, kind, labels, text in rows}
    assert documented == {
        name: (metric.kind, ", ".join(metric.labels), metric.help)
        for name, metric in BY_NAME.items()
    }


def test_every_label_is_explained() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text("utf-8").partition("## Labels")[2]
    for label in {label for metric in METRICS for label in metric.labels}:
        assert re.search(rf"^\| `{label}`", page, re.M), label


def test_the_reasons_are_those_that_are_given() -> None:
    code = "".join(path.read_text("utf-8") for path in (ROOT / "celery_jetstream").glob("*.py"))
    given = re.findall(r'(?:DeadLetter|_dead)\(\s*"(\w+)"|reason="(\w+)"', code)
    assert {a or b for a, b in given} - {"reason"} == set(REASONS)


def test_the_outcomes_are_those_that_there_are() -> None:
    assert {*OUTCOMES, "queued"} == {"duplicate", *(verdict.value for verdict in Verdict)}


# -- the alert rules -------------------------------------------------------------------------------


def base(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_names_metrics_and_labels_that_there_are(rule: dict[str, Any]) -> None:
    expression = rule["expr"]
    used = re.findall(r"\b(celery_jetstream_\w+|up)\b(?:\{([^}]*)\})?", expression)
    assert used
    labels = {"job", "instance", "le"}
    for name, selector in used:
        if name == "up":
            continue
        metric = BY_NAME[base(name)]
        assert (base(name) != name) == (metric.kind == "histogram")
        named = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)
        assert set(named) <= {*metric.labels, "job", "instance"}, name
        labels |= set(metric.labels)
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels
    shown = re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))
    assert set(shown) <= labels
    assert expression.count("(") == expression.count(")")
    for counter in re.findall(r"celery_jetstream_\w+_total", expression):
        assert re.search(rf"(rate|increase)\({counter}(\{{[^}}]*\}})?\[", expression), counter


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_what_a_rule_counts_is_there_from_the_beginning(rule: dict[str, Any]) -> None:
    """Prometheus sees no increase in the first value of a series: one error would not ring."""
    found = re.findall(r"increase\((celery_jetstream_\w+)(?:\{(.*?)\})?\[", rule["expr"])
    for name, selector in found:
        metric = BY_NAME[name]
        assert metric.known or not metric.labels, name
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            place = metric.labels.index(label)
            assert set(values.split("|")) <= {known[place] for known in metric.known}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text("utf-8"), re.M)
    assert anchor in {heading.lower() for heading in headings}
    assert rule["alert"] in headings
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_page_explains_no_other_alert() -> None:
    explained = re.findall(r"^### (JetStream\w+)$", MONITORING.read_text("utf-8"), re.M)
    assert sorted(explained) == sorted(rule["alert"] for rule in RULES)


def test_what_the_pages_ask_for_is_there() -> None:
    for page in (MONITORING, ROOT / "docs/reference/metrics.md"):
        for name in re.findall(r"celery_jetstream_\w+", page.read_text("utf-8")):
            assert base(name) in BY_NAME or name.endswith("_jetstream_"), name


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool here")
def test_prometheus_takes_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", str(ALERTS)], check=True)


# -- counting --------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> Iterator[Any]:
    """How much a metric has grown since the test began."""
    meters.start()
    before = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
    }

    def grown(name: str, **labels: str) -> float:
        name = f"celery_jetstream_{name}"
        now = REGISTRY.get_sample_value(name, labels) or 0.0
        return now - before.get((name, tuple(sorted(labels.items()))), 0.0)

    yield grown
    meters.stop()


def result(verdict: Verdict, **more: Any) -> PublishResult:
    return PublishResult(verdict is Verdict.STORED, "e", "s", verdict=verdict, **more)


def test_what_is_published_counts_by_outcome(counted: Any) -> None:
    stored, refused = result(Verdict.STORED), result(Verdict.REFUSED)
    signals.after_event_publish.send(None, event=None, result=stored, headers={}, seconds=0.2)
    signals.event_publish_failed.send(None, event=None, result=refused, headers={}, seconds=0.2)
    again = result(Verdict.STORED, duplicate=True)
    row = SimpleNamespace(written_at=None)
    signals.outbox_published.send(
        None, rows=[row, row, row], results=[stored, stored, again], seconds=1.0, since_read=1.0
    )
    assert counted("events_published_total", via="publish", outcome="stored") == 1
    assert counted("events_published_total", via="publish", outcome="refused") == 1
    assert counted("events_published_total", via="outbox", outcome="stored") == 2
    assert counted("events_published_total", via="outbox", outcome="duplicate") == 1
    assert counted("publish_seconds_count") == 2
    assert counted("publish_seconds_sum") == pytest.approx(0.4)
    assert counted("outbox_batch_events_sum") == 3
    assert counted("outbox_commit_to_ack_seconds_count") == 0  # a delay, or metrics were off


def test_messages_count_by_handler_and_outcome(counted: Any) -> None:
    signals.message_received.send(None, delivery=DELIVERY)
    for settlement in (Ack(), Nak(1.0), DeadLetter("rejected")):
        signals.message_settled.send(
            None, delivery=DELIVERY, settlement=settlement, handler="shop.pay"
        )
    signals.message_settled.send(None, delivery=DELIVERY, settlement=Nak(), handler="")
    assert counted("messages_received_total") == 1
    assert counted("messages_redelivered_total") == 1
    for outcome in ("ack", "nak", "dead_letter"):
        assert counted("messages_settled_total", handler="shop.pay", outcome=outcome) == 1
    assert counted("messages_settled_total", handler="none", outcome="nak") == 1


def test_what_is_known_is_there_before_it_is_counted(counted: Any) -> None:
    for metric in METRICS:
        for values in metric.known:
            labels = dict(zip(metric.labels, values, strict=True))
            assert REGISTRY.get_sample_value(metric.full_name, labels) is not None, values


def test_labels_are_bounded(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["a body" * 1000, *(f"user {number}" for number in range(10))]
    monkeypatch.setattr(meters, "MOST_VALUES", 3)
    for reason in reasons:
        signals.message_dead_lettered.send(
            None, delivery=DELIVERY, reason=reason, headers={}, handler=""
        )
    assert counted("dead_letters_total", reason=OTHER) >= 8
    assert counted("dead_letters_total", reason=reasons[0]) == 0


def test_a_receiver_that_fails_disturbs_nobody(counted: Any) -> None:
    """As Celery has it: logged. A row of an old reader has no times."""
    signals.outbox_published.send(
        None, rows=[object()], results=[result(Verdict.STORED)], seconds=0.0, since_read=0.0
    )
    assert counted("events_published_total", via="outbox", outcome="stored") == 1


# -- threads ---------------------------------------------------------------------------------------


def run(code: str) -> None:
    """In a process of its own, which ends by itself if it hangs."""
    begin = "import faulthandler; faulthandler.dump_traceback_later(20, exit=True)\n"
    subprocess.run([sys.executable, "-c", begin + textwrap.dedent(code)], check=True, cwd=ROOT)


def test_threads_that_begin_at_once_share_the_metrics() -> None:
    """The first requests of a web process."""
    run(
        """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier
        from celery_jetstream import meters

        sys.setswitchinterval(1e-5)
        barrier = Barrier(8)

        def start(_):
            barrier.wait()
            return meters.start()

        with ThreadPoolExecutor(8) as threads:
            assert len(set(threads.map(start, range(8)))) == 1
        """
    )


def test_under_gevent_a_greenlet_that_waits_for_a_metric_stops_no_other() -> None:
    """A page of metrics is made in a thread of its own, which has the metric's lock meanwhile."""
    pytest.importorskip("gevent")
    run(
        """
        from gevent import monkey; monkey.patch_all()
        import gevent, time
        from celery_jetstream import meters
        from celery_jetstream.threads import in_native_thread

        started = meters.start()
        lock = started._metrics["messages_received_total"]._value._lock
        sleep = monkey.get_original("time", "sleep")

        def collect():
            with lock:
                held.append(True)
                sleep(0.3)

        held = []
        collecting = in_native_thread(collect)
        while not held:
            gevent.sleep(0.01)
        counting = [gevent.spawn(started._inc, "messages_received_total") for _ in range(3)]
        assert len(gevent.joinall(counting, timeout=10)) == 3
        """
    )


def test_a_scrape_waits_for_no_other_ones_look(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(
        config=SimpleNamespace(has_database=False),
        health=SimpleNamespace(now=lambda: {"ready": True}),
        running={},
        keeper=SimpleNamespace(held=list),
    )
    looks, asked, released = metrics._Looks(here), threading.Event(), threading.Event()

    def ask(found: dict[str, Any]) -> bool:
        asked.set()
        released.wait(10)
        found["dead_letters_stored"] = {(): 7.0}
        return True

    monkeypatch.setattr(looks, "_ask_nats", ask)
    first = threading.Thread(target=looks.found)
    first.start()
    assert asked.wait(10)
    began = time.monotonic()
    assert looks.found() == {"ready": {(): 1.0}, "messages_in_flight": {(): 0}}
    assert time.monotonic() - began < 2
    released.set()
    first.join()
    assert looks.found()["dead_letters_stored"] == {(): 7.0}


def test_a_child_that_is_forked_while_metrics_are_collected_counts() -> None:
    run(
        """
        import os, threading, time
        from celery import Celery
        from prometheus_client import REGISTRY
        from celery_jetstream import JetStream, meters
        from celery_jetstream.metrics import _Registry

        app = Celery("a", broker="memory://")
        app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
        started, held = meters.start(), threading.Event()

        class Slow:
            def collect(self):
                with started._metrics["messages_received_total"]._value._lock:
                    held.set()
                    time.sleep(0.3)
                return ()

        REGISTRY.register(Slow())
        held.clear()
        page = iter(_Registry(JetStream(app)).collect())
        threading.Thread(target=next, args=(page,)).start()
        held.wait()
        if not (child := os.fork()):
            started._inc("messages_received_total")
            os._exit(0)
        ends = time.monotonic() + 5
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ends:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(child, 9)
        raise SystemExit(ended != (child, 0))
        """
    )


# -- on, and off -----------------------------------------------------------------------------------


def test_off_nothing_is_imported_or_counted() -> None:
    code = (
        "import sys, celery, celery_jetstream\n"
        "from celery_jetstream import signals\n"
        "app = celery.Celery('a', broker='memory://')\n"
        "app.conf.update(jetstream_app_name='a', jetstream_destination_app='b')\n"
        "celery_jetstream.JetStream(app).config\n"
        "assert not signals.message_settled.receivers\n"
        "sys.exit('prometheus_client' in sys.modules or 'opentelemetry' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_off_the_endpoint_says_what_to_set() -> None:
    app = Celery("off", broker="memory://", set_as_current=False)
    app.conf.update(jetstream_app_name="a", jetstream_destination_app="b")
    with pytest.raises(ConfigurationError, match="set jetstream_metrics=True"):
        exposition(JetStream(app))


def test_an_address_turns_them_on() -> None:
    assert Config(app_name="a", destination_app="b", metrics_address=9464).metrics


def test_without_prometheus_client_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(meters, "_meters", None)
    with pytest.raises(ConfigurationError, match=r'pip install "celery-jetstream\[prometheus\]"'):
        meters.start()


def test_what_is_looked_up_is_not_counted() -> None:
    counted = {metric.name for metric in METRICS if metric.processes != LOOKED_UP}
    assert set(meters.start()._metrics) == counted
    meters.stop()
