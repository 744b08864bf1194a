"""Secrets of monitors on TLS on a real API server: read by name, with the shipped right, and no other way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy
from harness.pki import Authority
from harness.wait import until
from vcpuset.domain.errors import CredentialsUnavailable
from vcpuset.domain.resource import UID
from vcpuset.kube import cluster as cluster_module
from vcpuset.kube import credentials as credentials_module
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.credentials import ROLE, Secrets

ONE = UID("one")
RULE = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}


@pytest.fixture
async def account(control_plane: ControlPlane, namespace: str) -> Path:
    """The kubeconfig of a service account that may do nothing yet."""
    await control_plane.kubectl("create", "serviceaccount", "operator", "-n", namespace)
    return await control_plane.service_account_kubeconfig(namespace, "operator")


@pytest.fixture
async def cluster(account: Path) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(account) as connected:
        yield connected


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look is a read."""
    monkeypatch.setattr(credentials_module, "FRESH_SECONDS", 0.0)


async def allow(control_plane: ControlPlane, namespace: str) -> None:
    """What an administrator does for a namespace with monitors on TLS."""
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": ROLE}, "rules": [RULE]}
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    assert (await control_plane.request("POST", f"{path}/roles", role)).status == 201
    binding = ("rolebinding", ROLE, f"--role={ROLE}", f"--serviceaccount={namespace}:operator", "-n", namespace)
    await control_plane.kubectl("create", *binding)


async def put(control_plane: ControlPlane, namespace: str, authority: Authority, **changed: bytes | None) -> None:
    """Write the Secret `monitor`."""
    path = f"/api/v1/namespaces/{namespace}/secrets"
    await control_plane.request("DELETE", f"{path}/monitor")
    answer = await control_plane.request("POST", path, authority.client().secret("monitor", **changed))
    assert answer.status == 201, answer


async def why_not(secrets: Secrets, namespace: str) -> str:
    """Why nothing is found."""
    with pytest.raises(CredentialsUnavailable) as caught:
        await secrets.fetch(ONE, namespace, "monitor")
    return str(caught.value)


async def test_a_secret_is_read_by_name_once_it_is_there_and_allowed(
    control_plane: ControlPlane, namespace: str, cluster: Cluster
) -> None:
    begin = control_plane.audit_offset()
    secrets = Secrets(cluster)
    words = await why_not(secrets, namespace)
    assert f"Secret {namespace}/monitor may not be read by this operator" in words
    assert (
        "bind the ClusterRole vcpuset-monitor-credentials to its service account, with a RoleBinding in the namespace "
        f"{namespace} " in words
    )
    assert f"system:serviceaccount:{namespace}:operator" in words, "the account is named"
    await allow(control_plane, namespace)

    async def allowed() -> bool:
        return "there is no Secret" in await why_not(secrets, namespace)

    await until(allowed, 60, "the right to take effect")
    authority = Authority()
    await put(control_plane, namespace, authority, tls_key=None)
    assert f"Secret {namespace}/monitor has no tls.key" in await why_not(secrets, namespace)
    await put(control_plane, namespace, authority)
    found = await secrets.fetch(ONE, namespace, "monitor")
    assert found.ca.decode() == authority.certificate
    assert found.source == f"Secret {namespace}/monitor"
    await put(control_plane, namespace, Authority())
    assert (await secrets.fetch(ONE, namespace, "monitor")).ca != found.ca

    def seen() -> set[str]:
        events = control_plane.audit_events(begin)
        return {each.verb for each in events if each.resource == "secrets" and each.user.endswith(":operator")}

    await until(lambda: seen() == {"get"}, 60, "the audit log")


async def test_the_last_copy_is_used_while_nothing_comes_through_to_the_api_server(
    control_plane: ControlPlane, namespace: str, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await allow(control_plane, namespace)
    await put(control_plane, namespace, Authority())
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        await Cluster.connect(proxy.kubeconfig(account)) as cluster,
    ):
        secrets = Secrets(cluster)

        async def read() -> bool:
            try:
                return bool(await secrets.fetch(ONE, namespace, "monitor"))
            except CredentialsUnavailable:
                return False

        await until(read, 60, "the right to take effect")
        found = await secrets.fetch(ONE, namespace, "monitor")
        proxy.block()
        monkeypatch.setattr(cluster_module, "REQUEST_SECONDS", 0.3)
        assert await secrets.fetch(ONE, namespace, "monitor") is found
        proxy.unblock()
        monkeypatch.setattr(cluster_module, "REQUEST_SECONDS", 60.0)
        await put(control_plane, namespace, Authority())
        assert (await secrets.fetch(ONE, namespace, "monitor")).ca != found.ca
