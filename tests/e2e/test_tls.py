"""Monitors on TLS, with everything real: QEMU, API server, and an operator with the controller's shipped rights.

What goes wrong and the words for it stand in a table of docs/monitors.md; each row is caused here, seen in the status,
and mended without a hand on the set or the operator.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from e2e.tlsworld import ACCOUNT, SECRET, Connection, Web, serving
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.expect import RECONCILING, STALLED, history
from harness.faultproxy import FaultProxy
from harness.operator import OperatorProcess
from harness.pki import Authority, certificate_for_rsa
from harness.qmp import count
from harness.wait import until
from harness.world import User

PAGE: Final = Page(REPOSITORY / "docs" / "monitors.md")
FLAGS: Final = ("--resync-seconds=2", "--allow-tcp=127.0.0.0/8")

BOTH: Final[tuple[Connection, ...]] = ("OnDemand", "Persistent")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, account: Path) -> AsyncIterator[OperatorProcess]:
    """A controller that looks at every machine every two seconds."""
    async with OperatorProcess(control_plane, *FLAGS, kubeconfig=account) as running:
        yield running


@pytest.fixture
async def web(user: User, tmp_path: Path) -> AsyncIterator[Web]:
    async with serving(user, tmp_path / "tls") as made:
        yield made


@pytest.mark.parametrize("connection", BOTH)
async def test_a_guest_is_given_cpus_and_gives_them_back_through_a_monitor_on_tls(
    operator: OperatorProcess, user: User, tmp_path: Path, connection: Connection
) -> None:
    async with serving(user, tmp_path / "tls", linux=True) as web:
        await web.declare(connection, 5)
        for vcpus in (5, 1, 3):
            await user.change("web", vcpus=vcpus)
            await web.ready(vcpus)
            await web.guest.wait_online(vcpus)


async def test_both_versions_of_tls_are_spoken_and_the_server_s_name_is_the_set_s_to_say(
    operator: OperatorProcess, user: User, web: Web
) -> None:
    await web.serve(web.ours.server("web.vm.example"), priority="NORMAL:-VERS-ALL:+VERS-TLS1.2")
    await web.declare(vcpus=3, serverName="web.vm.example")
    await web.ready(3)
    await web.serve(web.ours.server("web.vm.example"), priority="NORMAL:-VERS-ALL:+VERS-TLS1.3")
    await user.change("web", vcpus=4)
    await web.ready(4)


@pytest.mark.parametrize("connection", BOTH)
async def test_a_renewed_client_certificate_is_picked_up_and_a_new_ca_on_both_sides_too(
    operator: OperatorProcess, user: User, web: Web, connection: Connection
) -> None:
    await web.declare(connection)
    await web.ready(2)

    # Renewal by the same CA. That it is used shows when QEMU allows this one only.
    renewed = web.ours.client("vcpuset-renewed")
    await web.put(renewed)
    await web.serve(allow=renewed.name)
    await user.change("web", vcpus=3)
    await web.ready(3)

    # Another CA, the Secret first: nobody trusts anybody until QEMU is started again.
    web.ours = Authority()
    web.client = web.ours.client("vcpuset")
    await web.put()
    await web.serve()
    await user.change("web", vcpus=4)
    await web.ready(4)

    # And the other way round.
    web.ours = Authority()
    web.client = web.ours.client("vcpuset")
    await web.serve()
    await web.says("CredentialsUnavailable", "is not signed by ca.crt")
    await web.put()
    await web.ready(4)


async def test_a_ca_is_exchanged_without_a_gap_while_both_ends_trust_the_old_and_the_new_one(
    operator: OperatorProcess, user: User, web: Web
) -> None:
    await web.declare()
    await web.ready(2)
    begin = await user.get("web")
    new = Authority()
    both = web.ours.certificate + new.certificate
    await web.put(replace(web.client, ca=both))
    await web.read()
    await web.serve(replace(new.server(), ca=both))
    await user.change("web", vcpus=3)
    await web.ready(3)
    web.ours, web.client = new, new.client("vcpuset")
    await web.put()
    await web.read()
    await web.serve()
    await user.change("web", vcpus=4)
    await web.ready(4)
    seen = await history(user, begin)
    assert not [each.message for each in seen if each.reason == "CredentialsUnavailable"]


Fault = Callable[[Web], Awaitable[None]]

GARBAGE: Final = b"-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n"


async def _plain_text(web: Web) -> None:
    web.guest.tls = None
    await web.guest.restart()


FAULTS: Final[dict[str, tuple[Fault, str]]] = {
    "server-of-another-ca": (lambda web: web.serve(Authority().server()), "is not signed by ca.crt"),
    "server-with-another-name": (lambda web: web.serve(web.ours.server("vm.example")), "is not for 127.0.0.1"),
    "server-expired": (lambda web: web.serve(web.ours.server(expired=True), check=False), "has expired"),
    "client-expired": (lambda web: web.put(web.ours.client(expired=True)), "The operator's certificate"),
    "client-not-allowed": (lambda web: web.serve(allow="CN=somebody else"), "rejects the operator's certificate"),
    "client-of-another-ca": (
        lambda web: web.put(Authority().client("vcpuset").trusting(web.ours)),
        "rejects the operator's certificate",
    ),
    "plain-text": (_plain_text, "does not speak TLS"),
    "tls-1.1": (
        lambda web: web.serve(priority="NORMAL:-VERS-ALL:+VERS-TLS1.1"),
        "closed the connection during the TLS handshake",
    ),
    "no-secret": (lambda web: web.take_away(), "There is no Secret"),
    "no-key": (lambda web: web.put(tls_key=None), "has no tls.key"),
    "no-ca": (lambda web: web.put(ca_crt=None), "has no ca.crt"),
    "too-much": (lambda web: web.put(ca_crt=web.ours.certificate.encode() * 100), "is too large"),
    "garbage-ca": (lambda web: web.put(ca_crt=GARBAGE), "contains no readable PEM certificate"),
    "garbage-certificate": (lambda web: web.put(tls_crt=b"hello"), "contains no readable PEM certificate"),
    "garbage-key": (lambda web: web.put(tls_key=b"hello"), "cannot be used"),
    "key-of-another-certificate": (
        lambda web: web.put(web.client.with_key_of(web.ours.client())),
        "is not the key of its tls.crt",
    ),
    "long-key": (lambda web: web.put(tls_crt=certificate_for_rsa(8192)), "has a key of more than 4096 bits"),
    "p-521-only": (
        lambda web: web.serve(priority="NORMAL:-GROUP-ALL:+GROUP-SECP521R1"),
        "closed the connection during the TLS handshake",
    ),
    "not-allowed-to-read": (lambda web: web.forbid(), "may not be read by this operator"),
}
"""What goes wrong, and what the message says of it: the words in which docs/monitors.md has it too."""

WAITS_FOR_TLS: Final = "does not greet"
QUEUE_IS_FULL: Final = "did not accept the connection"
"""Caused in tests/qmp."""

OTHER_REASONS: Final = {
    "plain-text": "InvalidMonitor", "tls-1.1": "MonitorUnreachable", "p-521-only": "MonitorUnreachable",
}  # fmt: skip
"""Nothing is wrong with the credentials, or nothing can be told."""


async def test_each_failure_is_told_in_its_own_words_and_passes_when_its_cause_does(
    control_plane: ControlPlane, operator: OperatorProcess, tmp_path: Path
) -> None:
    """All at once, since most of the time passes between one try of the operator and the next."""
    users = {name: User(control_plane, await control_plane.namespace(name.replace(".", "-"))) for name in FAULTS}
    results = await asyncio.gather(
        *(_fails_and_recovers(user, tmp_path / name, name) for name, user in users.items()), return_exceptions=True
    )
    for user in users.values():
        await user.delete("web")
    failed = {name: result for name, result in zip(users, results, strict=True) if result is not None}
    assert not failed


async def _fails_and_recovers(user: User, folder: Path, name: str) -> None:
    fault, words = FAULTS[name]
    async with serving(user, folder) as web:
        await web.declare()
        await web.ready(2)
        await fault(web)
        reason = OTHER_REASONS.get(name, "CredentialsUnavailable")
        seen = await web.says(reason, words)
        assert seen.states == (RECONCILING if reason == "MonitorUnreachable" else STALLED)
        assert seen.vcpus == 2, "what was seen last"
        assert "PRIVATE KEY" not in str(seen.body)

        if name == "not-allowed-to-read":
            await web.allow()
        await web.put()
        await web.serve()
        await web.ready(2)
        await user.change("web", vcpus=3)
        await web.ready(3)


def test_the_page_tells_what_to_do_about_each_failure() -> None:
    table = PAGE.text.partition("| the message says |")[2].partition("\n\n")[0]
    told = set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))
    assert told == {words for _, words in FAULTS.values()} | {WAITS_FOR_TLS, QUEUE_IS_FULL}


async def test_a_set_that_is_insecure_waits_in_front_of_tls_until_it_names_credentials(
    operator: OperatorProcess, user: User, web: Web
) -> None:
    host, port = web.guest.tcp_address
    await user.create("web", 3, (host, port))
    seen = await web.says("MonitorBusy", WAITS_FOR_TLS, "TLS")
    assert seen.states == RECONCILING
    await user.change("web", monitor={"tcp": {"insecure": None, "tls": {"secretName": SECRET}}})
    await web.ready(3)


async def test_secrets_are_read_one_by_one_by_name_and_in_the_set_s_own_namespace_only(
    control_plane: ControlPlane, operator: OperatorProcess, user: User, web: Web
) -> None:
    since = control_plane.audit_offset()
    await web.declare()
    await web.ready(2)
    await web.take_away()
    await web.says("CredentialsUnavailable", "There is no Secret")

    await until(lambda: {each.code for each in web.reads(since)} == {200, 404}, 60, "the requests in the audit log")
    everything = [each for each in control_plane.audit_events() if each.user == ACCOUNT and each.resource == "secrets"]
    assert {each.verb for each in everything} == {"get"}
    assert all(each.namespace and each.name for each in everything)
    assert {each.namespace for each in web.reads(since)} == {user.namespace}


async def test_a_connection_that_is_kept_goes_on_when_what_it_was_made_with_is_no_more(
    operator: OperatorProcess, user: User, web: Web
) -> None:
    await web.declare("Persistent")
    await web.ready(2)
    await web.take_away()
    await user.change("web", vcpus=3)
    await web.ready(3)
    await user.change("web", monitor={"connection": "OnDemand"})
    await web.says("CredentialsUnavailable", "There is no Secret")


async def test_a_machine_keeps_its_count_while_the_api_server_is_away_and_the_secret_cannot_be_read(
    control_plane: ControlPlane, account: Path, user: User, tmp_path: Path
) -> None:
    async with (
        serving(user, tmp_path / "tls") as web,
        FaultProxy(control_plane, tmp_path) as proxy,
        OperatorProcess(
            control_plane, *FLAGS, f"--namespace={user.namespace}", kubeconfig=proxy.kubeconfig(account)
        ) as running,
    ):
        await web.declare(vcpus=4)
        await web.ready(4)
        proxy.block()
        # Somebody restarts the machine, with the two CPUs of its boot.
        await web.guest.restart()

        async def repaired() -> bool:
            running.require_running()
            return await count(web.guest.control) == 4

        await until(repaired, 120, "the machine to have its count again")
        proxy.unblock()
        await web.ready(4)


async def test_a_set_does_not_reach_the_secret_of_that_name_in_another_namespace(
    control_plane: ControlPlane, operator: OperatorProcess, user: User, web: Web
) -> None:
    other = User(control_plane, await control_plane.namespace("other"))
    thief = Web(other, web.guest, web.ours, web.client)
    since = control_plane.audit_offset()
    await thief.declare(vcpus=9)
    await thief.says("CredentialsUnavailable", f"Secret {other.namespace}/{SECRET} may not be read by this operator")
    await thief.allow()
    await thief.says("CredentialsUnavailable", f"There is no Secret {other.namespace}/{SECRET}")
    assert await count(web.guest.control) == 2
    assert {each.namespace for each in thief.reads(since)} == {other.namespace}
    await other.delete("web")
