"""``celery -A … jetstream dlq …``: what it prints, does, and ends with."""

from __future__ import annotations

import io
import json
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celery_jetstream import commands
from celery_jetstream.cli_dlq import rate
from celery_jetstream.redrive import who
from celery_jetstream.settlement import DeadLetter
from celery_jetstream.testing import NatsServer, wait_until
from tests.burials import GEM_BODY, Desk, gem_headers
from tests.stack import Stack


@pytest.fixture(autouse=True)
def _signals_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in this process: its handlers of signals stay."""
    monkeypatch.setattr("celery_jetstream.cli_dlq.stop_on_signals", lambda running: None)


def test_looking(desk: Desk) -> None:
    assert desk.run("list").stdout == "no dead letters\n"
    assert desk.run("count").stdout == "0 dead letters\n"
    assert desk.json("list") == []
    end = DeadLetter("rejected", "LongError", "line one\nline two " * 30, "shop.tasks.on_order")
    event_ids = desk.bury("order.placed", 2, end, headers={"authorization": "secret"})
    desk.put(GEM_BODY, gem_headers())
    lines = desk.run("list").stdout.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100
    assert "LongError: line one line" in lines[1]
    assert "max_deliver_exceed…" in lines[3]
    assert [one["event_id"] for one in desk.json("list", "--reason", "rejected")] == event_ids
    assert len(desk.json("list", "--error", "LINE TWO", "--limit", "1")) == 1
    assert desk.json("list", "--older-than", "1h", "--source", "nobody") == []
    assert len(desk.json("list", "--id", event_ids[0], "--id", event_ids[1])) == 2
    assert len(desk.json("list", "--handler", "shop.tasks.on_order", "--newer-than", "1h")) == 2
    assert "--type" in desk.run("list", "--type", "a..b", status=2).output
    assert "--after" in desk.run("list", "--limit", "1").output

    shown = desk.run("show", event_ids[0])
    assert "handler            shop.tasks.on_order" in shown.stdout
    assert "error_message\nline one\nline two" in shown.stdout
    assert '"event_type": "order.placed"' in shown.stdout
    assert "authorization" in shown.stdout
    assert "secret" not in shown.output
    as_json = desk.json("show", event_ids[0])
    assert as_json["body"]["payload"] == {"id": 0}
    assert "no dead letter nobody" in desk.run("show", "nobody", status=1).output
    assert "no dead letter" in desk.json("show", "1", status=1)["error"]

    counted = desk.run("count").stdout
    assert counted.startswith("3 dead letters, ")
    assert "reason\n       2  rejected\n       1  max_deliver_exceeded\n" in counted
    assert desk.json("count", "--type", "order.*")["by_handler"] == {"shop.tasks.on_order": 2}


def test_what_others_wrote_gives_a_terminal_no_orders(desk: Desk) -> None:
    evil = "\x1b[2J\x9b31m\u202e"
    end = DeadLetter("rejected", f"E{evil}", f"line one\nline two{evil}", f"h{evil}")
    desk.bury("order.placed", 1, end, resource_id="\x7f\x9b")
    desk.put(b"\x1b]0;x", {"x-dlq-context": json.dumps({"event_id": evil, "error_class": evil})})
    first, second = (str(one["sequence"]) for one in desk.json("list"))
    texts = [
        desk.run(*words).stdout
        for words in (["list"], ["count"], ["show", first], ["show", second])
    ]
    texts.append(desk.run("redrive", second, status=1).stdout)
    for text in texts:
        assert all(one.isprintable() or one == "\n" for one in text), text
    assert "line one\nline two\\x1b[2J" in texts[2]
    assert json.loads(desk.run("list", "--json").stdout)[0]["error_class"] == f"E{evil}"
    desk.put(b'{"payload": "\\ud800"}', {})
    third = str(desk.json("list")[-1]["sequence"])
    assert "\\ud800" in desk.run("show", third).stdout
    assert desk.json("show", third)["body"] == {"payload": "\ud800"}


def test_export(desk: Desk, tmp_path: Path) -> None:
    event_ids = desk.bury(count=2)
    lines = desk.run("export").stdout.splitlines()
    assert [json.loads(line)["event_id"] for line in lines] == event_ids
    assert len(desk.run("export", "--all").stdout.splitlines()) == 2
    assert "or --all" in desk.run("export", "--all", "--reason", "odd", status=2).output
    file = tmp_path / "letters.jsonl"
    assert desk.run("export", "--output", str(file)).stdout.startswith("2 dead letters written")
    assert file.read_text().splitlines()[0].startswith('{"schema": 1, "sequence": ')
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "File exists" in desk.run("export", "--output", str(file), status=1).output
    assert desk.count() == 2


def test_purge_asks_and_needs_a_filter(desk: Desk) -> None:
    desk.bury("order.placed", 2)
    desk.bury("user.created", 2)
    for arguments in ((), ("--yes",), ("--all", "--reason", "odd")):
        assert "give ids or a filter" in desk.run("purge", *arguments, status=2).output
    no = desk.run("purge", "--all", status=1, answer="n\n")
    assert "delete 4 dead letters for ever?" in no.output
    assert desk.count() == 4
    assert desk.run("purge", "--all", "--dry-run").stdout == "4 dead letters would be deleted\n"
    yes = desk.run("purge", "--type", "order.*", answer="y\n")
    assert yes.stdout.endswith("2 dead letters deleted\n")
    found = desk.json("purge", "--all", "--yes")
    assert found == {
        "dry_run": False,
        "purged": 2,
        "last_sequence": 8,
        "error": None,
        "denied": False,
    }


def test_redrive(desk: Desk) -> None:
    event_ids = desk.bury("order.placed", 6)
    assert "give ids or a filter" in desk.run("redrive", status=2).output
    assert "must be a rate" in desk.run("redrive", "--all", "--rate", "fast", status=2).output
    assert desk.run("redrive", "--all", "--dry-run").stdout == "6 events would be sent again\n"
    assert desk.run("redrive", event_ids[0], event_ids[1]).stdout == "2 events sent again\n"
    found = desk.json("redrive", "--all", "--limit", "2", "--rate", "1000/s", "--by", "ada")
    assert (found["dry_run"], found["redriven"], found["error"]) == (False, 2, None)
    skipped = desk.run("redrive", "--all", "--max-redrives", "0", status=1).stdout
    assert "0 events sent again\n2 dead letters skipped, and kept:\n" in skipped
    assert "--force" in skipped
    assert desk.run("redrive", "--all", "--max-redrives", "0", "--force").exit_code == 0
    assert desk.event_ids() == event_ids
    assert desk.take(3)[2].headers["x-redriven-by"] == "ada"


def test_of_another_app(desk: Desk) -> None:
    desk.put(GEM_BODY, gem_headers(), app_name=desk.names.destination_app)
    assert desk.json("list") == []
    assert len(desk.json("list", "--of", desk.names.destination_app)) == 1
    assert "dlq" in desk.json("list", "--of", "dlq", status=1)["error"]


def test_another_payload_out_of_a_file(desk: Desk, tmp_path: Path) -> None:
    (event_id,) = desk.bury()
    file = tmp_path / "payload.json"
    file.write_text("{nope")
    told = desk.run("redrive", event_id, "--payload", str(file), status=1).output
    assert "--payload is not JSON" in told
    assert "for one id" in desk.run("redrive", "--all", "--payload", str(file), status=2).output
    both = ("--edit", "--payload", str(file))
    assert "give one of" in desk.run("redrive", event_id, *both, status=2).output
    file.write_text('{"id": 7}')
    assert desk.json("redrive", event_id, "--payload", str(file), "--dry-run")["redriven"] == 1
    assert desk.json("redrive", event_id, "--payload", str(file))["redriven"] == 1
    (message,) = desk.take(1)
    assert json.loads(message.data)["payload"] == {"id": 7}
    desk.put(b"{broken", {"Nats-Msg-Id": "dlq-x"})
    (letter,) = desk.letters.list()
    file.write_text('{"event_id":"e","event_type":"a.b","payload":{}}')
    found = desk.json(
        "redrive", str(letter.sequence), "--envelope", str(file), "--subject", desk.subject
    )
    assert found["redriven"] == 1
    assert "e" in desk.event_ids()


def test_an_event_is_edited(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First it breaks the JSON, then it mends it: what was typed is not lost in between."""
    (event_id,) = desk.bury()
    editor = tmp_path / "editor.py"
    editor.write_text(
        "import pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "text = file.read_text()\n"
        "old, new = ('0', '7 broken') if 'broken' not in text else (' broken', '')\n"
        "file.write_text(text.replace('\"id\": ' + old, '\"id\": ' + new)"
        " if old == '0' else text.replace(old, new))\n"
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} {editor}")
    monkeypatch.delenv("VISUAL", raising=False)
    result = desk.run("redrive", event_id, "--edit", answer="y\n")
    assert "not sent: the body is not JSON" in result.output
    assert result.stdout.endswith("1 events sent again\n")
    (message,) = desk.take(1)
    assert json.loads(message.data)["payload"] == {"id": 7}
    (event_id,) = desk.bury()
    monkeypatch.setenv("EDITOR", "true")
    assert "nothing was changed" in desk.run("redrive", event_id, "--edit", status=1).output
    assert desk.count() == 1


def test_nats_that_is_away_is_said_in_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_jetstream.deadletter_store.PATIENCE", 0.0)
    monkeypatch.setattr("celery_jetstream.deadletter_store.ASK_TIMEOUT", 0.3)
    desk.close()
    desk.jetstream._forget()
    desk.jetstream.__dict__.pop("config")
    desk.app.conf.jetstream_nats_urls = "nats://127.0.0.1:1"
    assert "no connection to NATS" in desk.run("list", status=1).output
    assert "no connection to NATS" in desk.json("redrive", "--all", status=1)["error"]


def test_an_interrupt_ends_a_redrive_with_its_counts(
    make_stack: Callable[..., Stack], nats_server: NatsServer, tmp_path: Path
) -> None:
    """As a process of its own, with SIGINT in the middle; and its log says who and what."""
    stack = make_stack()
    desk = Desk(nats_server.url, stack.names)
    try:
        event_ids = desk.bury(count=60)
        log = tmp_path / "redrive.log"
        arguments = ("--all", "--rate", "20/s", "--json", "--logfile", str(log))
        process = stack.celery("jetstream", "dlq", "redrive", *arguments)
        wait_until(lambda: 0 < len(desk.event_ids()) < 60, 20, "the redrive to have begun")
        process.send(signal.SIGINT)
        assert process.wait() == 1
        found: dict[str, Any] = json.loads(process.text().splitlines()[-1])
        assert found["error"] == "stopped"
        assert desk.event_ids() == event_ids[: found["redriven"]]
        assert desk.count() == 60 - found["redriven"]
        assert log.read_text().count("is redriven to") == found["redriven"]
        assert f"by {who()}" in log.read_text()
    finally:
        desk.close()


def test_a_terminal_sees_letters_and_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with commands.progress_of("redrive") as show:
        assert show is not None
        clock[0] = 60.0  # for which they were counted
        show(0, 1000)
        for second in range(1, 6):
            clock[0] += 1
            show(200 * second, 1000)
            assert f" {200 * second}/1000 " in terminal.getvalue()
    seen = terminal.getvalue()
    assert "200/1000   20%  00:00:04" in seen
    assert "800/1000   80%  00:00:01" in seen
    assert "00:00:00" not in seen


def test_rates() -> None:
    assert (rate("200"), rate("200/s"), rate("30/m")) == (200.0, 200.0, 0.5)
    assert commands.duration("5m") == 300
