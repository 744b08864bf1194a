"""docs/status-page.md: a user opens the page of the controller through the API server and the kubelet."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import aiohttp
import pytest

from harness.cache import REPOSITORY
from harness.docpage import Page, Reader
from harness.node import Cluster
from harness.wait import until

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PAGE: Final = Page(REPOSITORY / "docs" / "status-page.md")


async def test_the_status_page_opens_at_the_forwarded_port(installed: Cluster, tmp_path: Path) -> None:
    plane = installed.control_plane
    path = os.pathsep.join([str(plane.kubectl_path.parent), os.environ["PATH"]])
    (url,) = re.findall(r"open <(http://localhost\S+)>", PAGE.text)
    with Reader(tmp_path, PATH=path, KUBECONFIG=str(plane.kubeconfig)) as reader:
        forwarding = reader.start(PAGE.block("sh"), "kubectl port-forward")

        async def opens() -> str | None:
            forwarding.require_running()
            try:
                async with aiohttp.ClientSession() as session, session.get(url) as answer:
                    return await answer.text() if answer.status == 200 else None
            except aiohttp.ClientError:
                return None

        page = await until(opens, 60, lambda: f"the page; kubectl said {forwarding.log_tail()}")
    assert "VCPUSet" in page
