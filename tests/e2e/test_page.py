"""What the status page of a real operator shows of a real machine, whose guest is played by hand."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp

from harness.acpi import Acpi, Status
from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import raw
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT = 90.0


class Page:
    """One set's page, and its stream of events."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self._client, self._url = client, url
        self.body = ""
        self.events = ""

    def slots(self, kind: str) -> str | None:
        """The slots of this kind, in the legend of the page as last loaded."""
        found = re.search(rf'<use href="#{kind}"/></svg>[^<]+</th><td class="number">\d+</td><td>(.*?)</td>', self.body)
        return None if found is None else found[1]

    async def until(self, what: str, **kinds: str) -> None:
        """Load the page until its slots are these."""

        async def holds() -> bool:
            async with self._client.get(self._url) as answer:
                self.body = await answer.text()
            return answer.status == 200 and all(self.slots(kind) == which for kind, which in kinds.items())

        await until(holds, WAIT, lambda: f"{what} in\n{self.body}")

    async def listen(self, opened: asyncio.Event) -> None:
        """Collect the page's events until the server ends the stream."""
        async with self._client.get(f"{self._url}/events") as answer:
            opened.set()
            async for line in answer.content:
                self.events += line.decode()


async def test_a_machines_slots_refusal_and_transitions_are_on_its_page_and_its_stream_ends_with_the_operator(
    control_plane: ControlPlane, folder: Path, socket_root: Path, user: User
) -> None:
    flags = (f"--namespace={user.namespace}", "--resync-seconds=3600")
    async with (
        Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20) as http,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        page = Page(http, f"{operator.url}/sets/{user.namespace}/vm")
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await page.until("a plugged machine", boot="0\N{EN DASH}1", plugged="2\N{EN DASH}3", free="4\N{EN DASH}63")
        assert "Without a node" in await (await http.get(operator.url)).text()

        opened = asyncio.Event()
        listening = asyncio.create_task(page.listen(opened), name="events")
        await opened.wait()
        for slot in (2, 3):
            await acpi.insert(slot)
        await user.change("vm", vcpus=3, unplug={"bootVCPUs": "Keep"})

        async def removing(slot: int) -> bool:
            return (await acpi.flags(slot)).removing

        await until(lambda: removing(3), WAIT, "a request for slot 3")
        await page.until("a pending unplug", pending="3", plugged="2")
        await acpi.refuse(3, Status.BUSY)
        await until(lambda: removing(2), WAIT, "a request for slot 2")
        await page.until("a refused unplug", refused="3", pending="2")
        assert "device busy (_OST 0x82)" in page.body
        await acpi.eject(2)
        await user.wait_ready("vm")
        await page.until("an unplugged machine", plugged="3", free="2, 4\N{EN DASH}63")
        reasons = re.findall(r'<td class="words"><b>(\w+)</b>', page.body)
        assert reasons[0] == "Converged"
        assert "Unplugging" in reasons
        await until(lambda: '<td class="words"><b>Unplugging</b>' in page.events, WAIT, "its event")

        assert not listening.done()
        assert await operator.stop() == 0
        await asyncio.wait_for(listening, WAIT)
        assert "Traceback" not in operator.text()
