"""Fixtures for tests that need a Kubernetes API. Nothing is started for a test that does not ask for one."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp.client_proto import ResponseHandler
from hypothesis import HealthCheck, settings
from xdist.remote import Producer

from harness.controlplane import ControlPlane
from harness.effort import SEED
from harness.schedule import SlowestFirst
from harness.timeline import TIME_LINE
from harness.world import User

__all__ = ["control_plane", "folder", "namespace", "socket_root", "user"]


def pytest_configure() -> None:
    """Have no event loop but the tests' own, no connection outlive it, and let no busy host fail a property.

    Scripts start jobs in the background with SIGINT ignored, and so would be all programs that tests start.
    looptime would otherwise make a loop before a first test that needs none. It would never be closed: an error here.
    aiohttp closes the connection of a cancelled request by a TLS shutdown, and does not wait for the server's part.
    This may come after the end of a test's loop, and the connection would never be closed either.
    """
    ResponseHandler.close = ResponseHandler.abort  # type: ignore[method-assign]
    asyncio.set_event_loop(None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("busy host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy host")


def pytest_report_header() -> str:
    """Say what repeats the run's own random choices."""
    return f"VCPUSET_TEST_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the time lines that tests have recorded, and say it again where a long run ends."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == TIME_LINE:
                terminalreporter.section(report.nodeid, "-")
                terminalreporter.write_line(str(text))
    terminalreporter.write_line(f"VCPUSET_TEST_SEED={SEED}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SlowestFirst:
    """Say which process of `make test` runs what."""
    return SlowestFirst(config, log)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def control_plane() -> AsyncIterator[ControlPlane]:
    """One API server for each test process, with the project's CRD. Each test uses a namespace of its own.

    A test that stops the API server or changes something cluster-wide starts a `ControlPlane` of its own.
    """
    async with ControlPlane() as running:
        await running.install_crd()
        yield running


@pytest.fixture
async def namespace(control_plane: ControlPlane) -> AsyncIterator[str]:
    """The name of a fresh namespace. Afterwards it is emptied of VCPUSets, so that no later operator serves them.

    The namespace itself stays: there is no controller here that could finish its deletion.
    """
    name = await control_plane.namespace()
    yield name
    await control_plane.request("DELETE", f"/apis/vcpuset.dev/v1alpha1/namespaces/{name}/vcpusets")


@pytest.fixture
def user(control_plane: ControlPlane, namespace: str) -> User:
    """Somebody who works in the test's namespace."""
    return User(control_plane, namespace)


@pytest.fixture(scope="module")
def socket_root() -> Iterator[Path]:
    """The folder that an operator looks for monitors in; its path is short, for QEMU's sake."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-root-"))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def folder(socket_root: Path, namespace: str) -> Path:
    """Where the monitors of the test's namespace are."""
    path = socket_root / namespace
    path.mkdir()
    return path
