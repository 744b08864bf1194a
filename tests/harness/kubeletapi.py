"""What the API server asks a kubelet: the logs of its containers, for `kubectl logs`."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from harness.processes import run

__all__ = ["KubeletAPI"]

LOOPBACK: Final = "127.0.0.1"


class KubeletAPI:
    """The HTTPS endpoint of all nodes of a test; runs in the event loop that started it.

    directory  existing folder for its key
    log_of     the log file of a pod, by namespace and name; None: there is no such pod
    """

    def __init__(self, directory: Path, log_of: Callable[[str, str], Path | None]) -> None:
        self.host: Final = LOOPBACK
        self.port = 0
        self._directory = directory
        self._log_of = log_of
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Serve; `port` is known then. The API server does not verify a kubelet's certificate, unless told to."""
        key, certificate = self._directory / "kubelet.key", self._directory / "kubelet.crt"
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        await run(["openssl", "req", *kind, "-subj", "/CN=kubelet", "-keyout", key, "-out", certificate])
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate, key)
        application = web.Application()
        application.add_routes([web.get("/containerLogs/{namespace}/{pod}/{container}", self._logs)])
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, 0, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop serving. Safe to call again."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _logs(self, request: web.Request) -> web.Response:
        log = self._log_of(request.match_info["namespace"], request.match_info["pod"])
        if log is None or not log.exists():
            raise web.HTTPNotFound
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        last = request.query.get("tailLines")
        return web.Response(text="".join(lines[-int(last) :] if last else lines))
