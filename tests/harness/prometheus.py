"""Prometheus: its server, and `promtool`, which tests rules; out of Debian's packages into the cache folder.

The packages are downloaded and unpacked, not installed: that would start a Prometheus on the machine. A build from
source, as of the control plane, would take as long as that does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from harness.build.guest.packages import Apt, PackageError, files
from harness.cache import cache_dir
from harness.processes import Child, free_port
from harness.runnable import Runnable

__all__ = ["PROGRAMS", "PrometheusMissing", "PrometheusServer", "QueryFailed", "fetch", "program"]

PROGRAMS: Final = ("prometheus", "promtool")

SECONDS: Final = 30.0
"""The deadline of a request to the server."""


class PrometheusMissing(Exception):
    """A program is not there; the message says what to do."""


def program(name: str) -> Path:
    """One of `PROGRAMS`: that in PATH, else that in the cache folder.

    Raises:
        PrometheusMissing: there is none.
    """
    installed = shutil.which(name)
    if installed is not None:
        return Path(installed)
    kept = _kept() / name
    if os.access(kept, os.X_OK):
        return kept
    raise PrometheusMissing(f"{name} is neither in PATH nor at {kept}: run `make setup`")


def fetch(report: Callable[[str], None]) -> None:
    """Put the programs into the cache folder.

    Raises:
        PackageError: they are not available; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="vcpuset-prometheus-") as work:
        apt = Apt(Path(work), report)
        try:
            found = _download(apt)
        except PackageError:  # unless the package lists are the cause, the second try fails, too
            apt.use_fresh_lists()
            found = _download(apt)
    _kept().mkdir(exist_ok=True)
    for name, contents in found.items():
        partial = _kept() / f"{name}.partial"
        partial.write_bytes(contents)
        partial.chmod(0o755)
        partial.rename(_kept() / name)


def _download(apt: Apt) -> dict[str, bytes]:
    """The programs. Debian 12 and Ubuntu 24.04 have both in one package, Debian 13 has two."""
    found = _programs(apt, "prometheus")
    if "promtool" not in found:
        found |= _programs(apt, "promtool")
    if missing := set(PROGRAMS) - found.keys():
        raise PackageError(
            f"the packages of Prometheus hold no {' and no '.join(sorted(missing))}: put that of Prometheus 2.40 or "
            "later in PATH"
        )
    return found


def _programs(apt: Apt, package: str) -> dict[str, bytes]:
    paths = {f"/usr/bin/{name}": name for name in PROGRAMS}
    (file,) = apt.download([package]).values()
    return {paths[path]: text for path, text in files(file, paths.__contains__) if isinstance(text, bytes)}


def _kept() -> Path:
    return cache_dir() / "prometheus"


class QueryFailed(Exception):
    """The server rejected a query; the message is the server's."""


class PrometheusServer(Runnable):
    """A server in a folder of its own.

    configuration  what prometheus.yml contains
    rules          what the file `rules.yml` beside it contains, if the configuration names it
    """

    def __init__(self, configuration: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
        self._configuration, self._rules = configuration, rules
        self._folder = Path(tempfile.mkdtemp(prefix="vcpuset-prometheus-"))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._child: Child | None = None

    async def start(self) -> None:
        """Start it and wait until it answers queries."""
        # JSON is YAML.
        (self._folder / "prometheus.yml").write_text(json.dumps(self._configuration))
        (self._folder / "rules.yml").write_text(json.dumps(self._rules))
        self._child = Child.start(
            [
                program("prometheus"),
                f"--config.file={self._folder}/prometheus.yml",
                f"--storage.tsdb.path={self._folder}/data",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            name="prometheus",
            log=self._folder / "log",
        )
        await self._child.until(lambda: asyncio.to_thread(self._is_ready), 60)

    async def stop(self) -> None:
        """End it, and remove its data. Safe to call again."""
        if self._child is not None:
            await self._child.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tail(self) -> str:
        """The end of the log, for messages."""
        return "" if self._child is None else self._child.log_tail()

    async def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        """The `data` of an answer of the HTTP API, for example of `query` or `query_range`.

        Raises:
            QueryFailed: the server rejected it.
        """
        return await asyncio.to_thread(self._ask, f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")

    @staticmethod
    def _ask(url: str) -> Any:  # noqa: ANN401 - JSON
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 - our own URL
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryFailed(error.read().decode()) from error

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=SECONDS) as answer:  # noqa: S310 - our own URL
                return bool(answer.status == 200)
        except OSError:
            return False
