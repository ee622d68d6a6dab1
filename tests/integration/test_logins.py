"""Every way to log in, by a whole errand: provisioned, published, bridged and settled."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nkeys
import pytest
import trustme

from celery_jetstream import JetStream
from celery_jetstream.config import Config
from celery_jetstream.exceptions import ConnectionRefusedByServer, NotConnectedError
from celery_jetstream.provisioning import roles
from tests.conftest import Names
from tests.connections import SECRET
from tests.errands import Errand
from tests.operators import Operator
from tests.servers import NatsServer, need


@pytest.fixture
def run_errand(names: Names) -> Iterator[Callable[..., JetStream]]:
    made: list[Errand] = []

    def run(urls: Any, options: dict[str, Any], **settings: Any) -> JetStream:
        errand = Errand(urls, names, nats_options=options, **settings)
        made.append(errand)
        errand.run()
        return errand.desk

    yield run
    for errand in made:
        errand.close()


def test_user_and_password_and_a_token(run_errand: Callable[..., JetStream]) -> None:
    need("nats")
    with NatsServer(config=f'authorization {{ user: us, password: "{SECRET}" }}') as server:
        run_errand(server.url, {"user": "us", "password": SECRET})
        server.config = f'authorization {{ token: "{SECRET}" }}'
        server.restart()
        run_errand(server.url, {"token": lambda: SECRET})


def test_an_nkey(run_errand: Callable[..., JetStream], tmp_path: Path) -> None:
    need("nats")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    (tmp_path / "seed.nk").write_bytes(seed)
    with NatsServer(config=f"authorization {{ users: [{{nkey: {public}}}] }}") as server:
        run_errand(server.url, {"nkeys_seed": str(tmp_path / "seed.nk")})
        run_errand(server.url, {"nkeys_seed_str": seed.decode()})


def test_a_creds_file_with_the_permissions_that_are_printed(
    run_errand: Callable[..., JetStream], names: Names, tmp_path: Path
) -> None:
    """By the JWT of a user of an operator's account; for both ends, and its own inbox."""
    need("nats")
    prefix = f"_INBOX_{names.app_name}"
    config = Config(
        app_name=names.app_name,
        destination_app=names.destination_app,
        stream_name=names.stream_name,
        nats_options={"inbox_prefix": prefix},
        auto_provision=False,
    )
    operator = Operator(tmp_path / "user.creds")
    run, admin, _ = roles(config)
    options = {"user_credentials": str(operator.creds), "inbox_prefix": prefix}
    with NatsServer(config=operator.config) as server:
        errand = Errand(server.url, names, nats_options=options, auto_provision=False)
        try:
            operator.renew(600, run)
            with pytest.raises(NotConnectedError, match=r"may not publish to \$JS\.API\.STREAM"):
                errand.desk.provision()
            errand.desk.close()
            operator.renew(600, admin)
            errand.make().provision()
            operator.renew(600)
            assert errand.hub.publish("parcel.sent", {})
            operator.renew(600, run)
            errand.run()
        finally:
            errand.close()


def test_tls_with_certificates_on_both_sides(
    run_errand: Callable[..., JetStream],
    names: Names,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``verify_and_map``: the certificate's name is the user's."""
    need("nats")
    authority = trustme.CA()
    served = authority.issue_cert("127.0.0.1")
    served.private_key_pem.write_to_path(tmp_path / "key.pem")
    served.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    config = (
        f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem"\n'
        f'ca_file: "{tmp_path}/ca.pem", verify_and_map: true }}\n'
        "authorization { users: [{user: shop@example.org}] }"
    )

    def trusting(*names: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if names:
            authority.issue_cert(*names).configure_cert(context)
        return context

    with NatsServer(config=config) as server:
        url = server.url.replace("nats://", "tls://")
        run_errand(url, {"tls": trusting("shop@example.org")}).close()
        assert "eof_received" not in caplog.text
        # without one the server hangs up, and its reason is not always heard
        tried = {NotConnectedError: trusting(), ConnectionRefusedByServer: trusting("x@y.org")}
        for error, context in tried.items():
            options = {"tls": context, "connect_timeout": 2}
            with pytest.raises(error):
                Errand(url, names, nats_options=options, connect_retry_delay=0.1).desk.connect()
