"""Reports of health, and the states that they amount to."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream.config import Config
from celery_jetstream.diagnosis import diagnose
from celery_jetstream.states import CODES, DEGRADED, HEALTHY, UNHEALTHY, overall
from celery_jetstream.status import nothing_known

PAGE = Path(__file__).parents[2] / "docs/reference/health.md"
CONFIG = Config(
    app_name="desk", destination_app="hub", nats_urls=("nats://u:seCret@a:1",), outbox_atomic=True
)


def well() -> dict[str, Any]:
    """All is known, and all is well."""
    report = {
        **nothing_known(CONFIG, ["desk-workers"]),
        "config": CONFIG.summary(),
        "connection": {
            "state": "connected",
            "urls": ["nats://***@a:1"],
            "error": None,
            "refused": False,
            "loop_silent": 0.0,
        },
        "bridge": {
            "phase": "running",
            "trouble": None,
            "broker": {"up": True, "error": None, "silent": 0.0},
            "queues": {"slow": {"unclaimed": 250, "oldest": 60.0, "waiting": 7}},
            "crowded": [],
            "paused_handlers": [],
            "turned": {"main": 1.0, "dispatcher": 0.0},
        },
        "direct": {
            "trouble": None,
            "restarts": 0,
            "restarted_ago": None,
            "error": None,
            "full": False,
            "waiting": 3,
            "paused_handlers": [],
        },
        "relay": {"trouble": None, "turned": 0.1},
        "too_big": 0,
        "not_kept": None,
        "breaker": {"outage": None, "subjects": {}},
        "outbox": {
            "needed": True,
            "error": None,
            "differences": [],
            "counts": {"pending": 3, "failed": 0, "exception": 0},
            "oldest_due": 1.0,
            "parked_keys": 0,
        },
        "inbox": {"needed": True, "error": None, "differences": [], "counts": {"failed": 9}},
    }
    report["server"] |= {"name": "n1", "version": "2.15.1"}
    report["stream"] |= {
        "exists": True,
        "messages": 3,
        "bytes": 100,
        "retention": "workqueue",
        "atomic": True,
    }
    report["consumers"][0] |= {
        "exists": True,
        "pending": 3,
        "ack_pending": 0,
        "max_ack_pending": 1000,
        "stuck": 0,
        "taken": True,
    }
    report["dead_letters"]["count"] = 0
    return report


NONE = {"error": None, "needed": True}

#: What is wrong (where in the report, and what is there), and the state's code.
CASES: list[tuple[str, Any, str, str]] = [
    ("connection.state", "reconnecting", "not_connected", "no connection"),
    ("connection.state", "connecting", "not_connected", "no connection"),
    ("connection", {"refused": True, "error": "no entry"}, "refused", "no entry"),
    ("connection.loop_silent", 10.1, "loop_hangs", "10 s"),
    ("bridge.phase", "starting", "not_pulling", "starting"),
    ("bridge.trouble", "it is missing", "not_pulling", "it is missing"),
    ("bridge.broker", {"up": False, "error": "refused"}, "broker_away", "refused"),
    ("bridge.broker.silent", 5.1, "broker_away", "5 s"),
    ("bridge.turned.dispatcher", 11.0, "bridge_hangs", "dispatcher"),
    ("bridge.crowded", ["slow"], "queue_crowded", "slow has 250 copies .* 7 more"),
    ("bridge.crowded", ["left"], "queue_crowded", "left has 0"),
    ("bridge.paused_handlers", ["desk.order"], "handlers_paused", "desk.order"),
    ("direct.trouble", "ended", "not_pulling", "ended"),
    ("direct", {"restarted_ago": 599.0, "restarts": 2, "error": "X"}, "pull_restarted", "2 .* X"),
    ("direct.full", True, "worker_full", "3 messages"),
    ("direct.paused_handlers", ["desk.order"], "handlers_paused", "desk.order"),
    ("relay.trouble", "database away", "relay_waits", "database away"),
    ("relay.turned", 10.1, "relay_waits", "10 s"),
    ("unanswered", "not in 5 s", "no_answer", "5 s"),
    ("server", {"error": "nobody", "error_code": 503}, "no_jetstream", "nobody"),
    ("server", {"error": "slow", "error_code": None}, "no_answer", "slow"),
    ("stream", {"exists": False, "error": "not found"}, "stream_missing", "not found"),
    ("stream", {"exists": None, "error": "no leader"}, "no_answer", "no leader"),
    ("stream.missing_subjects", ["a.sync.b"], "stream_subjects", "a.sync.b"),
    ("stream.retention", "limits", "stream_retention", "limits"),
    ("stream.atomic", False, "feature_missing", "allow_atomic"),
    ("stream.max_bytes", 111, "stream_nearly_full", "100 of 111 bytes"),
    ("stream.max_messages", 3, "stream_nearly_full", "3 of 3 messages"),
    ("stream.replicas_offline", ["n2"], "replicas_missing", "n2"),
    ("consumer", {"exists": False, "error": "not found"}, "consumer_missing", "desk-workers"),
    ("consumer", {"exists": None, "error": "no leader"}, "no_answer", "no leader"),
    ("consumer.stuck", 2, "stuck_messages", "2 messages"),
    ("consumer.max_deliver", 7, "consumer_gives_up", "max_deliver=7"),
    ("consumer.ack_pending", 1000, "ack_pending_full", "1000 .* 3 others"),
    ("consumer.taken", False, "nobody_pulls", "3 messages"),
    ("dead_letters", {"count": 2, "oldest": 7.0}, "dead_letters", "2 dead .* 7 s"),
    ("too_big", 2, "dead_letter_too_big", "2 messages"),
    ("not_kept", "may not", "dead_letter_waits", "stored: may not"),
    ("outbox", {"error": "away"}, "database_away", "away"),
    ("inbox", {"error": "away"}, "database_away", "away"),
    ("outbox.counts", None, "tables_missing", "outbox"),
    ("inbox.differences", ["no index"], "tables_differ", "inbox's tables: no index"),
    ("outbox.oldest_due", 61.0, "outbox_late", "61 s"),
    ("outbox.counts.failed", 4, "outbox_given_up", "4 failed"),
    ("breaker.outage", "no answer", "breaker_open", "no answer"),
    ("breaker.subjects", {"a.sync.b": "no stream"}, "breaker_open", "a.sync.b alone: no stream"),
]


def changed(where: str, value: Any) -> dict[str, Any]:
    report = copy.deepcopy(well())
    report["consumer"] = report["consumers"][0]  # the same, to be named by a path
    *path, last = where.split(".")
    place = report
    for name in path:
        place = place[name]
    if value is None:
        del place[last]
    elif isinstance(value, dict) and isinstance(place[last], dict):
        place[last] |= value
    else:
        place[last] = value
    return report


def test_all_is_well() -> None:
    assert diagnose(well()) == []
    assert overall([]) == HEALTHY


def test_what_is_not_known_is_no_state() -> None:
    report = well() | nothing_known(CONFIG, ["desk-workers"])
    report |= dict.fromkeys(("outbox", "inbox", "bridge", "direct", "relay", "breaker"))
    report["connection"]["state"] = "disconnected"  # nobody has needed it yet
    assert diagnose(report) == []


@pytest.mark.parametrize(("where", "value", "code", "text"), CASES)
def test_what_is_wrong_has_a_name(where: str, value: Any, code: str, text: str) -> None:
    (state,) = diagnose(changed(where, value))
    assert state.code == code
    assert re.search(text, state.text)
    assert overall([state]) == CODES[code].severity
    assert "seCret" not in str(state)


def test_a_pull_that_began_anew_long_ago_is_well() -> None:
    assert diagnose(changed("direct.restarted_ago", 601.0)) == []


def test_tables_that_nobody_needs_may_be_missing() -> None:
    report = well()
    for name in ("outbox", "inbox"):
        report[name] = {"needed": False, "error": None, "differences": ["table x is missing"]}
    assert diagnose(report) == []


def test_a_feature_that_the_server_lacks_is_said_once() -> None:
    lack = {
        "feature": "atomic batches",
        "since": "2.12.0",
        "instead": "one by one",
        "setting": "jetstream_outbox_atomic",
        "asked_for": True,
    }
    report = changed("stream.atomic", False)
    report["server"]["lacks"] = [lack]
    (state,) = diagnose(report)
    assert state.code == "feature_missing"
    assert "nats-server 2.15.1 has no atomic batches" in state.text
    lack["asked_for"] = False
    assert diagnose(report) == []


def test_messages_that_are_being_handled_are_no_sign_that_nobody_pulls() -> None:
    report = changed("consumer.taken", False)
    report["consumer"]["ack_pending"] = 1
    assert diagnose(report) == []


def test_the_worst_comes_first() -> None:
    report = changed("dead_letters.count", 1)
    report["stream"]["retention"] = "limits"
    states = diagnose(report)
    assert [state.code for state in states] == ["stream_retention", "dead_letters"]
    assert overall(states) == UNHEALTHY
    assert overall(states[1:]) == DEGRADED


def test_only_what_a_new_start_helps_is_not_alive() -> None:
    """Else an outage has every bridge killed again and again."""
    assert {code for code, kind in CODES.items() if not kind.alive} == {
        "loop_hangs",
        "bridge_hangs",
    }


def test_every_code_is_found_by_a_case() -> None:
    assert {code for _, _, code, _ in CASES} == set(CODES)


def test_every_code_is_documented_with_its_severity_and_remedy() -> None:
    row = re.compile(r"^\| `(\w+)` \| ((?:un|de)\w+)(.*?) \| .+ \| (.+) \|$", re.MULTILINE)
    found = {
        code: (severity, "not ready" not in marks, "not alive" not in marks, remedy)
        for code, severity, marks, remedy in row.findall(PAGE.read_text("utf-8"))
    }
    assert found == {
        code: (kind.severity, kind.ready, kind.alive, kind.remedy) for code, kind in CODES.items()
    }
