"""The catalogue of metrics against the code, the docs and the alert rules; and how they count."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from celery import Celery
from prometheus_client import REGISTRY

from celery_jetstream import Ack, DeadLetter, Delivery, JetStream, Nak, meters, signals
from celery_jetstream.catalogue import LOOKED_UP, METRICS, OTHER, REASONS
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


def test_reasons_are_there_before_they_are_given(counted: Any) -> None:
    values = [
        REGISTRY.get_sample_value("celery_jetstream_dead_letters_total", {"reason": reason})
        for reason in REASONS
    ]
    assert None not in values


def test_labels_are_bounded(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "MOST_VALUES", 3)
    for number in range(10):
        signals.message_dead_lettered.send(
            None, delivery=DELIVERY, reason=f"user {number}", headers={}, handler=""
        )
    assert counted("dead_letters_total", reason=OTHER) >= 7


def test_a_receiver_that_fails_disturbs_nobody(counted: Any) -> None:
    """As Celery has it: logged. A row of an old reader has no times."""
    signals.outbox_published.send(
        None, rows=[object()], results=[result(Verdict.STORED)], seconds=0.0, since_read=0.0
    )
    assert counted("events_published_total", via="outbox", outcome="stored") == 1


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
