"""An operator of NATS: accounts and users as signed JWTs, as ``nsc`` makes them."""

from __future__ import annotations

import base64
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import nkeys

from celery_jetstream.permissions import Role

__all__ = ("Key", "Operator")


class Key:
    """An nkey, which signs claims for others."""

    def __init__(self, prefix: int) -> None:
        self.seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public: str = self._pair.public_key.decode()

    def sign(self, subject: Key, kind: str, expires: float = 0, **claims: Any) -> str:
        """The JWT that says so of ``subject``."""
        body = {
            "jti": uuid.uuid4().hex,
            "iat": int(time.time()),
            "iss": self.public,
            "sub": subject.public,
            "nats": {"version": 2, "type": kind, **claims},
        }
        if expires:
            body["exp"] = int(expires)
        parts = ({"typ": "JWT", "alg": "ed25519-nkey"}, body)
        signed = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_base64(self._pair.sign(signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Operator:
    """A server's trust in JWTs, and the creds file of our one user."""

    def __init__(self, creds: Path) -> None:
        self.creds = creds
        operator = Key(nkeys.PREFIX_BYTE_OPERATOR)
        system = Key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._account = Key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._user = Key(nkeys.PREFIX_BYTE_USER)
        limits: dict[str, Any] = dict.fromkeys(
            ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1
        )
        limits["wildcards"] = True
        stored = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        accounts = {self._account: {**limits, **stored}, system: limits}
        resolved = "\n".join(
            f"{account.public}: {operator.sign(account, 'account', limits=its)}"
            for account, its in accounts.items()
        )
        trusted = operator.sign(operator, "operator", system_account=system.public)
        self.config = (
            f"operator: {trusted}\nresolver: MEMORY\nresolver_preload: {{\n{resolved}\n}}\n"
        )

    def renew(self, seconds: float, role: Role | None = None) -> None:
        """Writes the creds file anew, as one that expires in so many seconds.

        With a role, of a user who may do what that needs, and no more.
        """
        may = [] if role is None else [("pub", role.publish), ("sub", role.subscribe)]
        allowed = {verb: {"allow": list(subjects)} for verb, subjects in may}
        limits = {"subs": -1, "data": -1, "payload": -1}
        numbers: dict[str, Any] = {**limits, "pub": {}, "sub": {}, **allowed}
        jwt = self._account.sign(self._user, "user", time.time() + seconds, **numbers)
        fresh = self.creds.with_suffix(".new")
        fresh.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "-----BEGIN USER NKEY SEED-----\n"
            f"{self._user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
        fresh.replace(self.creds)
