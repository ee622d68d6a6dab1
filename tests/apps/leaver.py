"""A program that has published and ends: ``python -m tests.apps.leaver PROGRAM``.

Configured by the environment (``LEAVER_CONF``, JSON). Says "there" when it is in the middle, and
ends when it is told to (a line on its standard input).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

if sys.argv[1] == "gevent":
    from gevent import monkey

    monkey.patch_all()

import multiprocessing
import threading
from collections.abc import Callable
from typing import NoReturn

from celery import Celery

from celery_jetstream import JetStream, signals
from celery_jetstream.exceptions import NotConnectedError

app = Celery("leaver", broker="memory://")
app.conf.update(json.loads(os.environ["LEAVER_CONF"]))
jetstream = JetStream(app)


def publish_on(timeout: float = 15) -> NoReturn:
    """For as long as the process lives; what is closed under it is no reason to stop."""
    while True:
        try:
            jetstream.publish("leaver.busy", {}, timeout=timeout)
        except Exception:
            continue


def in_the_middle(threads: int = 4) -> None:
    """Daemon threads publish without an end."""
    assert jetstream.publish("leaver.first", {}).success
    for _ in range(threads):
        threading.Thread(target=publish_on, daemon=True).start()


def there() -> None:
    print("there", flush=True)
    os.read(0, 1)


def idle() -> None:
    in_the_middle(0)
    there()


def daemon() -> None:
    in_the_middle()
    there()


def exits() -> None:
    """In mid-publish, by ``sys.exit`` from the main thread."""
    in_the_middle()
    there()
    sys.exit(0)


def threads() -> None:
    """Threads that the interpreter waits for, each in its last publish."""
    in_the_middle(0)
    left = threading.Event()

    def publish() -> None:
        while not left.is_set():
            jetstream.publish("leaver.busy", {}, timeout=1)

    for _ in range(4):
        threading.Thread(target=publish).start()
    there()
    left.set()


def in_a_fork(end: Callable[[int], object]) -> None:
    in_the_middle()
    pid = os.fork()
    if pid == 0:
        in_the_middle()
        there()
        end(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def fork_exit() -> None:
    in_a_fork(sys.exit)


def fork_underscore_exit() -> None:
    in_a_fork(os._exit)


def fork_unused() -> None:
    """The child has inherited all and used nothing."""
    in_the_middle()
    pid = os.fork()
    if pid == 0:
        there()
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def multiprocessing_child() -> None:
    in_the_middle()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=daemon)
    child.start()
    child.join()
    assert child.exitcode == 0


def gevent() -> None:
    """Greenlets publish until the connection is closed under them.

    One that opened it again after that would have a native thread when the interpreter is taken
    down, which gevent does not always survive (1 end in 64).
    """
    assert jetstream.publish("leaver.first", {}).success

    def publish() -> None:
        with contextlib.suppress(NotConnectedError):
            while jetstream.publish("leaver.busy", {}):
                pass

    for _ in range(4):
        threading.Thread(target=publish, daemon=True).start()
    there()


def flushes() -> None:
    """Threads commit without an end, so that the flush after a commit has none either."""
    in_the_middle(0)

    def write() -> NoReturn:
        while True:
            with jetstream.outbox.database.engine.begin() as connection:
                jetstream.outbox.add_many(
                    connection, [{"event_type": "leaver.row", "payload": {}} for _ in range(20)]
                )

    flushing = threading.Event()
    signals.outbox_claimed.connect(lambda **_: flushing.set(), weak=False)
    for _ in range(2):
        threading.Thread(target=write, daemon=True).start()
    flushing.wait()
    there()


PROGRAMS = {
    program.__name__: program
    for program in (
        idle,
        daemon,
        exits,
        threads,
        fork_exit,
        fork_underscore_exit,
        fork_unused,
        multiprocessing_child,
        gevent,
        flushes,
    )
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
