"""The proxy in front of the API server leaves nothing behind, which a later test would be blamed for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from harness import faultproxy
from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy

__all__: list[str] = []


async def test_a_connection_in_its_tls_handshake_has_ended_with_the_proxy(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultproxy, "HANDSHAKE_SECONDS", 0.5)
    async with FaultProxy(control_plane, tmp_path) as proxy:
        where = urlsplit(proxy.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        await asyncio.sleep(0.05)  # it is accepted, and says nothing
    try:
        async with asyncio.timeout(30):
            assert await reader.read() == b""
    finally:
        writer.close()
