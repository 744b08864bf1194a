"""Chromium without a window, by its DevTools protocol: only aiohttp is needed, and the versions need not match."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from harness.processes import Child
from harness.wait import until

__all__ = ["Tab", "browser"]

ANSWER_SECONDS: Final = 30.0

_KEYS: Final = {"Tab": 9, "Enter": 13}
"""Keys that are no text, and their virtual key codes."""


class Tab:
    """One page. `problems` has what it wrote to the console, its errors, and what its policy has blocked."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._session: Mapping[str, str] = {}

    async def open(self) -> None:
        """Create the page."""
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")

    async def listen(self) -> None:
        """Receive answers and events until the connection ends."""
        async for message in self._socket:
            received = json.loads(message.data)
            if (answer := self._answers.pop(received.get("id"), None)) is not None and not answer.done():
                answer.set_result(received)
            if received.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
                self.problems.append(json.dumps(received["params"]))

    async def go(self, url: str) -> None:
        """Load a page, and wait until its script has run."""
        await self._call("Page.navigate", url=url)
        await until(lambda: self.value("document.readyState == 'complete'"), ANSWER_SECONDS, f"{url} to be loaded")

    async def value(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """The value of a JavaScript expression."""
        found = await self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def emulate(self, width: int, *, dark: bool = False, still: bool = False) -> None:
        """Set the width of the window, in CSS pixels, and the user's preferences: dark colors, reduced motion."""
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        await self._call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )

    async def press(self, key: str) -> None:
        """Press and release a key: "Tab", "Enter", or a character."""
        known = {"key": key, "windowsVirtualKeyCode": _KEYS.get(key, 0)}
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        await self._call("Input.dispatchKeyEvent", type="keyDown", **known, **({"text": text} if text else {}))
        await self._call("Input.dispatchKeyEvent", type="keyUp", **known)

    async def _call(self, method: str, **params: object) -> Any:  # noqa: ANN401 - JSON
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(ANSWER_SECONDS):
            await self._socket.send_json({"id": number, "method": method, "params": params, **self._session})
            answer = await self._answers[number]
        assert "result" in answer, f"{method}: {answer.get('error')}"
        return answer["result"]


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Tab]:
    """A page of a browser of its own, with nothing of any other one."""
    profile = Path(tempfile.mkdtemp(prefix="vcpuset-browser-"))
    flags = [
        "--headless=new",
        "--no-sandbox",  # it does not run as root otherwise
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    ]
    child = Child.start(["chromium", *flags, "about:blank"], name="chromium", log=profile / "log")
    try:
        port, path = await child.until(lambda: _address(profile), 60)
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0) as socket,
        ):
            tab = Tab(socket)
            listening = asyncio.create_task(tab.listen(), name="browser")
            try:
                await tab.open()
                yield tab
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    finally:
        # With all its processes at once: any that is left would still write there.
        child.kill()
        await until(lambda: _removed(profile), 30, f"{profile} to be removed")


async def _address(profile: Path) -> list[str]:
    """Port and path of its socket, once it has written them."""
    found = profile / "DevToolsActivePort"
    lines = found.read_text().splitlines() if found.exists() else []
    return lines if len(lines) == 2 else []


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()
