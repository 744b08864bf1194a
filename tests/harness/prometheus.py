"""A Prometheus that scrapes operators every second.

async with Prometheus(["127.0.0.1:10017"]) as prometheus:
    await until(lambda: prometheus.query('vcpuset_sets{state="Ready"} > 0'), 60, "a set that is Ready")
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from harness.processes import Child, free_port
from harness.promtool import program
from harness.wait import until

__all__ = ["Prometheus"]

START_SECONDS: Final = 60.0


class Prometheus:
    """A server on loopback; its address is `url`.

    targets  host and port of each operator
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        self._directory = Path()
        self._child: Child | None = None
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._flags = [f"--web.listen-address={address}", "--log.level=warn"]

    async def query(self, query: str) -> list[Any]:
        """The series that a query finds now."""
        path = f"/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        found: list[Any] = json.loads(await asyncio.to_thread(self._get, path))["data"]["result"]
        return found

    async def stop(self) -> None:
        """End it, and remove its data. Safe to call again."""
        if self._child is not None:
            await self._child.stop()
            self._child = None
            shutil.rmtree(self._directory)

    async def __aenter__(self) -> Self:
        argv: list[str | Path] = [program("prometheus"), *self._flags]
        self._directory = Path(tempfile.mkdtemp(prefix="vcpuset-prometheus-"))
        # As the shipped PodMonitor: `namespace` is the set's.
        job = {"job_name": "vcpuset", "honor_labels": True, "static_configs": [{"targets": list(self._targets)}]}
        configuration = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}
        file = self._directory / "prometheus.yml"
        file.write_text(json.dumps(configuration))  # JSON is YAML
        argv += [f"--config.file={file}", f"--storage.tsdb.path={self._directory / 'data'}"]
        child = self._child = Child.start(argv, name="prometheus", log=self._directory / "log", cwd=self._directory)

        async def ready() -> bool:
            child.require_running()
            try:
                await asyncio.to_thread(self._get, "/-/ready")
            except OSError:
                return False
            return True

        try:
            await until(ready, START_SECONDS, lambda: f"Prometheus; its log ends with:\n{child.log_tail()}\n")
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:  # noqa: S310 - our own URL
            text: bytes = answer.read()
            return text
