"""The server's socket and loop."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import Any

import uvicorn  # pyright: ignore[reportMissingImports] - an extra

from flap_fast.checks import ConfigError, in_one_line


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str) -> frozenset[str] | None:
    """Return the names that a request's Host may have, None for any: see `gate.gated`."""
    own = f"[{host}]" if ":" in host else host
    return frozenset({"localhost", "127.0.0.1", "[::1]", own}) if is_loopback(host) else None


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises `ConfigError`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        why = in_one_line(error) + ("; --port 0 takes a free one" if taken else "")
        rule = "be an address of this machine and a free port"
        raise ConfigError(f"--host and --port must {rule}, got {host}:{port}: {why}") from None


class _Server(uvicorn.Server):
    """Ends at a signal: uvicorn waits for what threads compute, and nothing is left to write."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        os._exit(128 + sig)


def serve(app: Any, listener: socket.socket) -> None:
    """Serve until Ctrl-C, which ends the process at once with status 130."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=128
    )
    _Server(config).run([listener])
