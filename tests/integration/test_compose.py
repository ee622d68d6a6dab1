"""docker-compose.yml: every service's command and health check, run here without Docker.

The host names, ports and folders of the file are replaced by servers on this machine; all else is
run as it is written there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from celery import Celery
from sqlalchemy import NullPool, create_engine, text

from celery_jetstream import JetStream
from celery_jetstream.handlers import JetStreamTask
from celery_jetstream.testing import find_nats_server, free_port, wait_until
from tests.databases import Database
from tests.servers import need
from tests.stack import ROOT, CeleryProcess

FILE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = ("provision", "beat", "worker", "bridge")

pytestmark = pytest.mark.timeout(120)


class Composed:
    """The services of the file, as processes of this machine."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.database_url = database_url
        nats, redis, self.monitor = free_port(), free_port(), free_port()
        self.addresses = {"nats": f"127.0.0.1:{nats}", "redis": f"127.0.0.1:{redis}"}
        self.listen = {
            "nats": [str(find_nats_server()), "--addr", "127.0.0.1", "--port", str(nats)],
            "redis": ["--bind", "127.0.0.1", "--port", str(redis), "--dir", str(directory)],
        }
        environment = SERVICES["worker"]["environment"]
        self._replaced = {
            environment["DATABASE_URL"]: database_url,
            "--port=5432": f"--port={urlsplit(database_url).port}",
            "nats:4222": self.addresses["nats"],
            "redis:6379": self.addresses["redis"],
            "127.0.0.1:6379": self.addresses["redis"],
            "8222": str(self.monitor),
            "8080": str(free_port()),
            "/data": str(directory / "nats"),
            "/state": str(directory / "state"),
            "$$": "$",
        }
        (directory / "state").mkdir()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {
            **{name: self.here(value) for name, value in environment.items()},
            "PATH": path,
            "HOSTNAME": socket.gethostname(),
        }
        self.processes: dict[str, CeleryProcess] = {}

    def here(self, text: str) -> str:
        for there, here in self._replaced.items():
            text = text.replace(there, here)
        return text

    def up(self, name: str, ready: str = "") -> CeleryProcess:
        """Starts a service by its own command, and waits until its log has that."""
        command = [self.here(word) for word in SERVICES[name]["command"]]
        command = {
            "nats": [*self.listen["nats"], *command],
            "redis": [*command, *self.listen["redis"]],
        }.get(name, command)
        log = self.directory / f"{name}.log"
        self.processes[name] = process = CeleryProcess(log, command, self.environment)
        if ready:
            process.wait_for(ready)
        return process

    def run(self, *command: str) -> str:
        """As ``docker compose exec worker …``."""
        ended = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def check_health(self, name: str) -> None:
        """Runs a service's health check; one whose program this machine lacks is passed over."""
        kind, *command = map(self.here, SERVICES[name]["healthcheck"]["test"])
        if kind == "CMD" and shutil.which(command[0]) is None:
            return
        self.run(*(("sh", "-c", *command) if kind == "CMD-SHELL" else command))


@pytest.fixture
def composed(tmp_path: Path, postgresql: Database) -> Iterator[Composed]:
    need("nats")
    need("redis")
    services = Composed(tmp_path, postgresql.url)
    yield services
    for process in services.processes.values():
        process.end()


def test_what_is_composed_handles_an_order_once(composed: Composed) -> None:
    composed.up("nats", "Server is ready")
    composed.up("redis", "Ready to accept connections")
    for name in ("nats", "redis", "postgres"):
        composed.check_health(name)

    provision = composed.up("provision")
    assert provision.wait() == 0, provision.text()
    assert "the tables are there" in provision.text()

    beat, worker, bridge = composed.up("beat"), composed.up("worker"), composed.up("bridge")
    worker.wait_for(" ready.")
    bridge.wait_for("bridge is ready")
    beat.wait_for("Sending due task celery_jetstream.flush_outbox")
    said = composed.run("python", "-m", "examples.compose.shop", "ann@example.com")
    assert said == "order 1 is placed\n"
    worker.wait_for("to ann@example.com: thank you for order 1")
    for name in ("beat", "worker", "bridge"):
        composed.check_health(name)
    engine = create_engine(composed.database_url, poolclass=NullPool)

    def done() -> bool:
        with engine.connect() as connection:
            sent = connection.scalar(text("SELECT status FROM jetstream_outbox"))
            mails = connection.execute(text("SELECT order_id, email FROM mails")).all()
            return sent == "sent" and mails == [(1, "ann@example.com")]

    wait_until(done, 20, "the event to be sent, and the mail to be written")

    found = doctor(composed)
    assert found["error"].keys() <= {"durability"}, "the tests' PostgreSQL has no fsync"
    assert found["warning"].keys() == {"sync-interval"}
    fine = found["ok"]
    assert f"celery@{socket.gethostname()}: 2 at once (prefork), queues: celery" in fine["workers"]
    for code in ("handler-queues", "handler-tasks", "flush-queue", "takers", "clock-skew"):
        assert code in fine
    look_for_lost_handlers(composed)

    for names in (("bridge", "beat", "worker"), ("redis", "nats")):
        for name in names:
            composed.processes[name].send(signal.SIGTERM)
        for name in names:
            process = composed.processes[name]
            assert process.wait(45) == 0, process.text()[-2000:]


def doctor(composed: Composed) -> dict[str, dict[str, str]]:
    """Severity to code to what is found, as ``docker compose exec worker`` has it."""
    command = ["celery", "-A", "examples.compose.app", "jetstream", "doctor", "--json"]
    ended = subprocess.run(
        [*command, "--monitor", f"http://127.0.0.1:{composed.monitor}"],
        env={**os.environ, **composed.environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    report = json.loads(ended.stdout)
    assert ended.returncode == (0 if report["healthy"] else 1), ended.stderr
    found: dict[str, dict[str, str]] = {"error": {}, "warning": {}, "ok": {}, "skipped": {}}
    for finding in report["findings"]:
        found[finding["severity"]][finding["code"]] = finding["found"]
    return found


def look_for_lost_handlers(composed: Composed) -> None:
    """What the doctor says of an app whose handlers the running worker does not run."""
    app = Celery("mailer", broker=composed.environment["CELERY_BROKER_URL"], set_as_current=False)
    app.conf.update(
        jetstream_nats_urls=composed.environment["NATS_URL"],
        jetstream_app_name="mailer",
        jetstream_destination_app="shop",
        jetstream_database_url=composed.database_url,
        jetstream_outbox_queue="nobodys",
        task_routes={"compose.lost": "nowhere"},
    )
    jetstream = JetStream(app)

    def handle(event: Any) -> None: ...

    for name in ("compose.lost", "compose.unknown"):
        # in this app only: jetstream_handler would give it to the apps of other tests, too
        options = {"base": JetStreamTask, "event_types": (name,), "acks_late": False}
        app.task(name=name, shared=False, **options)(handle)

    report = jetstream.doctor()
    jetstream.close()
    found = {finding.code: finding.found for finding in report.errors}
    assert found["handler-queues"].startswith("compose.lost goes to the queue nowhere")
    assert found["handler-tasks"].endswith("does not know compose.unknown")
    assert "goes to the queue nobodys" in found["flush-queue"]


# -- the file --------------------------------------------------------------------------------------


def test_all_that_there_must_be_is_there() -> None:
    assert set(SERVICES) == {"nats", "redis", "postgres", *OURS}


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "provision"])
def test_a_service_comes_again_and_ends_in_its_time(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    assert "healthcheck" in service


@pytest.mark.parametrize("name", ["beat", "worker", "bridge"])
def test_nothing_starts_before_it_is_provisioned(name: str) -> None:
    before = SERVICES[name]["depends_on"]
    assert before["provision"] == {"condition": "service_completed_successfully"}
    assert SERVICES["provision"]["restart"].startswith("on-failure"), "else it begins again"
    for server in ("nats", "redis", "postgres"):
        assert before[server] == {"condition": "service_healthy"}


def test_what_is_kept_is_in_volumes() -> None:
    mounted = [v for service in SERVICES.values() for v in service.get("volumes", ())]
    assert {volume.partition(":")[0] for volume in mounted} == set(FILE["volumes"])


def test_what_the_image_copies_is_there() -> None:
    lines = FILE["x-celery"]["build"]["dockerfile_inline"].splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert "celery_jetstream" in copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
