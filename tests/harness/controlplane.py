"""A real Kubernetes API: etcd and kube-apiserver on loopback, in one temporary folder.

There is no scheduler, controller manager or kubelet: nothing starts pods, makes default service accounts or finishes
the deletion of a namespace (use a fresh one per test instead). RBAC is on, as in a cluster, so that the operator can be
run with the rights that are shipped. A `ControlPlane` is not bound to an event loop.
"""

import asyncio
import http.client
import json
import os
import shutil
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from harness.audit import AUDIT_POLICY, STATUS_IN_AUDIT, AuditEvent, audit_log_end, read_audit_log
from harness.binaries import Binaries, binaries
from harness.cache import REPOSITORY
from harness.pki import Authority
from harness.processes import Child, Completed, ReservedPort, run
from harness.runnable import Runnable
from harness.wait import until

__all__ = ["FRONT_PROXY", "KUBELET_CLIENT", "Answer", "ControlPlane"]

FRONT_PROXY: Final = "front-proxy-client"
"""The common name of the front proxy's certificate; kubeadm's."""

KUBELET_CLIENT: Final = "kube-apiserver-kubelet-client"
"""As whom the API server speaks to kubelets; kubeadm's."""

START_SECONDS: Final = 240.0
"""How long a server may take to be ready: it takes 5 s on an idle machine, and several times that on a loaded one."""

OBJECT_SECONDS: Final = 120.0
"""How long to wait for the condition or the deletion of an object."""


@dataclass(frozen=True)
class Answer:
    """What the API server answered to a plain HTTP request; `body` is parsed if it is JSON, else text."""

    status: int
    body: Any


class ControlPlane(Runnable):
    """An API server of one's own.

    async with ControlPlane() as control_plane:
        await control_plane.install_crd()
        await control_plane.kubectl("apply", "-f", "-", input=manifest)

    service_accounts  pods need an existing service account and get its token as a volume, as in a cluster; for that a
                      controller manager has to run that makes the default accounts and publishes the certificate
    status_in_audit   the audit log has what came of each status write (`AuditEvent.result`)
    compaction_seconds
                      how often etcd is made to forget what is older than that; None: as in a cluster, 5 minutes
    address           where the API server listens; one that is not loopback is published as the Service `kubernetes`
    kubelets          names of nodes with a kubelet of their own, each with the token of `kubelet_tokens`; their serving
                      certificates are to be issued by `kubelet_authority`
    """

    def __init__(
        self,
        *,
        service_accounts: bool = False,
        status_in_audit: bool = False,
        compaction_seconds: int | None = None,
        address: str = "127.0.0.1",
        kubelets: Sequence[str] = (),
    ) -> None:
        self._service_accounts = service_accounts
        self._status_in_audit = status_in_audit
        self._compaction_seconds = compaction_seconds
        self._address = address
        self.kubelet_tokens: Final = {name: token_hex(16) for name in kubelets}
        """Bearer tokens by node."""
        self.kubelet_authority: Final = Authority()
        """The CA of the kubelets and of the client certificate that the API server shows them."""
        self.directory = Path()
        """Holds everything: data, keys, logs, kubeconfigs. Removed by `stop()`."""
        self.kubeconfig = Path()
        """A kubeconfig of a user who may do everything."""
        self.url = ""
        self.token = token_hex(16)
        """The bearer token of that user."""
        self.audit_log = Path()
        self.service_account_key = Path()
        """The private key that signs service accounts' tokens."""
        self.front_proxy = Authority()
        """The CA of the client certificate that aggregated APIs are asked with."""
        self.kubectl_path = Path()
        self._binaries: Binaries | None = None
        self._ports: list[ReservedPort] = []
        self._etcd: Child | None = None
        self._apiserver: Child | None = None
        self._apiserver_argv: list[str | Path] = []
        self._tls: ssl.SSLContext | None = None
        self._connections: list[http.client.HTTPSConnection] = []
        """Those that no request uses at present."""

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start both servers and wait until the API server says that it is ready.

        Raises:
            BinariesMissing: `make setup` has not been run.
            ChildDied: a server ended; the message has the end of its log.
            TimeoutError: not ready within four minutes; the same.
        """
        self._binaries = binaries()
        self.kubectl_path = self._binaries.kubectl
        self.directory = Path(tempfile.mkdtemp(prefix="vcpuset-control-plane-"))
        self.kubeconfig = self.directory / "admin.kubeconfig"
        self.audit_log = self.directory / "audit.log"
        self.audit_log.touch()
        await self._start_etcd(self._binaries.etcd)
        await self._prepare_apiserver(self._binaries.kube_apiserver)
        await self.start_apiserver()
        self.write_kubeconfig(self.kubeconfig, self.token)

    async def stop(self) -> None:
        """End both servers and remove the folder. Safe to call again."""
        for child in (self._apiserver, self._etcd):
            if child is not None:
                await child.stop()
        self._apiserver = self._etcd = None
        while self._connections:
            self._connections.pop().close()
        for port in self._ports:
            port.release()
        self._ports.clear()
        if self.directory != Path():
            await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    async def start_apiserver(self) -> None:
        """Start the API server (again), on the port and with the data it had."""
        child = Child.start(
            self._apiserver_argv, name="kube-apiserver", log=self.directory / "kube-apiserver.log", cwd=self.directory
        )
        self._apiserver = child
        await child.until(self._is_ready, START_SECONDS)

    async def stop_apiserver(self, *, kill: bool = False) -> None:
        """End the API server, politely or with SIGKILL; clients then get "connection refused". etcd stays."""
        if self._apiserver is None:
            return
        if kill:
            self._apiserver.kill()
        else:
            await self._apiserver.stop(timeout=30)
        self._apiserver = None

    @property
    def pids(self) -> tuple[int, int]:
        """The process ids of the API server and of etcd."""
        assert self._apiserver is not None
        assert self._etcd is not None
        return self._apiserver.pid, self._etcd.pid

    async def replace_service_account_key(self) -> None:
        """Have service accounts' tokens signed by another key once the API server is started again.

        All that were made before are refused from then on, also those of a controller manager.
        """
        await run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.service_account_key])

    # --- use ------------------------------------------------------------------------------------------------------

    async def kubectl(
        self,
        *arguments: str | Path,
        input: str | None = None,  # noqa: A002 - the name that subprocess.run uses
        check: bool = True,
        timeout: float = 60,
        kubeconfig: Path | None = None,
    ) -> Completed:
        """Run kubectl, as the user who may do everything or as the one of `kubeconfig`.

        Raises:
            CommandFailed: exit status not 0, and `check` is set; the message holds all that kubectl said.
            TimeoutError: no end within `timeout` seconds.
        """
        argv = [self.kubectl_path, "--kubeconfig", kubeconfig or self.kubeconfig, *arguments]
        # The user's own kubectl settings and caches take no part.
        env = {**os.environ, "HOME": str(self.directory), "KUBECACHEDIR": str(self.directory / "kubectl-cache")}
        env.pop("KUBECONFIG", None)
        return await run(argv, input=input, env=env, check=check, timeout=timeout)

    async def apply(self, manifest: Mapping[str, Any], *arguments: str, check: bool = True) -> Completed:
        """Run `kubectl apply` for one object; see `kubectl`."""
        return await self.kubectl("apply", "--filename=-", *arguments, input=json.dumps(manifest), check=check)

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | str | None = None,
        accept: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One plain HTTP request as the user who may do everything: some milliseconds, where kubectl needs 100.

        The body of a PATCH is a merge-patch; text is sent as it is. `headers` take the place of ours, so that the
        request can be somebody else's (Authorization, Impersonate-User).

        Raises:
            OSError: no connection, or no answer within 10 s.
        """
        return await asyncio.to_thread(self._request, method, path, body, accept, headers or {})

    async def ok(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        """The body of the answer to a request that has to succeed; see `request`."""
        answer = await self.request(method, path, body)
        assert 200 <= answer.status < 300, f"{method} {path}: {answer.status}: {answer.body}"
        return answer.body

    async def until_condition(
        self, path: str, kind: str, status: str, reason: str | None = None, words: str = ""
    ) -> str:
        """Wait until an object has a condition with this status, reason and words; returns the condition's message.

        Raises:
            TimeoutError: not within two minutes; the message has the object's conditions.
        """
        last: list[Mapping[str, str]] = []

        async def found() -> list[str]:
            nonlocal last
            answer = await self.request("GET", path)
            last = answer.body.get("status", {}).get("conditions", []) if answer.status == 200 else []
            return [
                each.get("message", "")
                for each in last
                if (each["type"], each["status"]) == (kind, status)
                and reason in (None, each.get("reason"))
                and words in each.get("message", "")
            ]

        what = f"{path} to have {kind}={status} {reason or ''} {words}"
        return (await until(found, OBJECT_SECONDS, lambda: f"{what}; it had {last}"))[0]

    async def until_gone(self, path: str) -> None:
        """Wait until an object is deleted.

        Raises:
            TimeoutError: not within two minutes.
        """

        async def gone() -> bool:
            return (await self.request("GET", path)).status == http.client.NOT_FOUND

        await until(gone, OBJECT_SECONDS, f"the deletion of {path}")

    async def install_crd(self, folder: Path = REPOSITORY / "crds") -> None:
        """Apply the definitions in `folder` and wait until the API server serves them and tells kubectl so."""
        source = "--kustomize" if (folder / "kustomization.yaml").exists() else "--filename"
        applied = await self.kubectl("apply", "--server-side", "--force-conflicts", "--output=name", source, folder)
        names = applied.stdout.split()
        await self.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names, timeout=70)
        groups = {name.rpartition("/")[2].partition(".")[2] for name in names}  # such as vcpuset.dev

        async def discoverable() -> bool:
            # What kubectl looks up; it follows the condition by a moment.
            answer = await self.request(
                "GET", "/apis", accept="application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
            )
            return groups <= {item["metadata"]["name"] for item in answer.body.get("items", ())}

        await until(discoverable, 60, f"the API server to list {', '.join(sorted(groups))}")

    async def namespace(self, prefix: str = "test") -> str:
        """Create a namespace with a name that no other has, and return the name."""
        name = f"{prefix}-{token_hex(5)}"
        await self.ok("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    async def service_account_kubeconfig(self, namespace: str, name: str, pod: str | None = None) -> Path:
        """A kubeconfig that acts as an existing ServiceAccount, with a token bound to it that lasts a day.

        With `pod`, an existing one of the namespace that uses the account, the token is bound to it: it names the pod
        and its node, as the one does that the kubelet gives to the pod.
        """
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
        made = await self.kubectl("create", "token", name, "--namespace", namespace, "--duration=24h", *bound)
        path = self.directory / f"{namespace}-{name}{f'-{pod}' if pod else ''}.kubeconfig"
        self.write_kubeconfig(path, made.stdout.strip(), namespace)
        return path

    def audit_offset(self) -> int:
        """The present end of the audit log, for `audit_events(since=…)`."""
        return audit_log_end(self.audit_log)

    def audit_events(self, since: int = 0) -> list[AuditEvent]:
        """Requests recorded since an earlier `audit_offset()`.

        A record follows its response by a moment: wait for the one expected, or make a last request and wait for
        that, before counting.
        """
        return read_audit_log(self.audit_log, since)

    # --- making ---------------------------------------------------------------------------------------------------

    async def _start_etcd(self, etcd: Path) -> None:
        client, peer = self._reserve(), self._reserve()
        self._etcd_url = f"http://127.0.0.1:{client.number}"
        peer_url = f"http://127.0.0.1:{peer.number}"
        child = Child.start(
            [
                etcd,
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={self._etcd_url}",
                f"--advertise-client-urls={self._etcd_url}",
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster=default={peer_url}",
                "--socket-reuse-port=true",  # see ReservedPort
                "--unsafe-no-fsync",  # the data need not survive the machine
                "--log-level=warn",
            ],
            name="etcd",
            log=self.directory / "etcd.log",
            cwd=self.directory,
        )
        self._etcd = child

        async def listening() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", client.number)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await child.until(listening, START_SECONDS)

    async def _prepare_apiserver(self, kube_apiserver: Path) -> None:
        # In a cluster the port is known, since NetworkPolicies name it.
        port = self._reserve().number if self._address == "127.0.0.1" else 6443
        self.url = f"https://{self._address}:{port}"
        key = self.service_account_key = self.directory / "service-account.key"
        await self.replace_service_account_key()
        tokens = self.directory / "tokens.csv"
        tokens.touch(mode=0o600)
        nodes = [f"{token},system:node:{name},{name},system:nodes\n" for name, token in self.kubelet_tokens.items()]
        tokens.write_text("".join([f'{self.token},admin,admin,"system:masters"\n', *nodes]))
        self.front_proxy.client(FRONT_PROXY).write_pem(self.directory, "front-proxy")
        self.kubelet_authority.client(KUBELET_CLIENT).write_pem(self.directory, "kubelet-client")
        policy = self.directory / "audit-policy.json"
        first = [STATUS_IN_AUDIT] if self._status_in_audit else []
        policy.write_text(json.dumps({**AUDIT_POLICY, "rules": [*first, *AUDIT_POLICY["rules"]]}))
        self._apiserver_argv = [
            kube_apiserver,
            f"--etcd-servers={self._etcd_url}",
            f"--cert-dir={self.directory / 'certificates'}",  # it makes its own certificate there
            f"--bind-address={self._address}",
            f"--advertise-address={self._address}",  # else it looks for a network interface, and fails without one
            # A loopback address may not stand in Endpoints.
            *(["--endpoint-reconciler-type=none"] if self._address == "127.0.0.1" else []),
            f"--secure-port={port}",
            "--permit-port-sharing",  # see ReservedPort
            f"--token-auth-file={tokens}",
            f"--authorization-mode={'Node,RBAC' if self.kubelet_tokens else 'RBAC'}",
            f"--service-account-issuer={self.url}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/24",
            f"--requestheader-client-ca-file={self.directory / 'front-proxy.ca'}",
            f"--requestheader-allowed-names={FRONT_PROXY}",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={self.directory / 'front-proxy.crt'}",
            f"--proxy-client-key-file={self.directory / 'front-proxy.key'}",
            # Else nobody makes default service accounts.
            *([] if self._service_accounts else ["--disable-admission-plugins=ServiceAccount"]),
            *([f"--etcd-compaction-interval={self._compaction_seconds}s"] if self._compaction_seconds else []),
            *(self._kubelet_flags() if self.kubelet_tokens else []),
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=100000",  # MB: never rotate, offsets must stay valid
            "--allow-privileged",  # as in a cluster: admission decides
            "--profiling=false",
        ]

    def _kubelet_flags(self) -> list[str]:
        return [
            "--enable-admission-plugins=NodeRestriction",
            f"--kubelet-certificate-authority={self.directory / 'kubelet-client.ca'}",
            f"--kubelet-client-certificate={self.directory / 'kubelet-client.crt'}",
            f"--kubelet-client-key={self.directory / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
        ]

    def _reserve(self) -> ReservedPort:
        port = ReservedPort()
        self._ports.append(port)
        return port

    async def _is_ready(self) -> bool:
        try:
            answer = await self.request("GET", "/readyz")
        except OSError:  # nobody listens yet, the certificate is not yet there, …
            return False
        return answer.status == http.client.OK

    @property
    def certificate(self) -> Path:
        """What clients verify the API server's certificate with."""
        return self.directory / "certificates" / "apiserver.crt"

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | str | None, accept: str, more: Mapping[str, str]
    ) -> Answer:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": accept}
        headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers |= more
        data = body if body is None or isinstance(body, str) else json.dumps(body)
        while True:
            # A handshake costs more than all the rest of a request, and a test that waits makes 20 in a second.
            try:
                connection, is_kept = self._connections.pop(), True
            except IndexError:
                connection, is_kept = self._connection(), False
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                raw = response.read()
            except TimeoutError:
                connection.close()
                raise
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_kept:  # the server has closed it since
                    continue
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{method} {self.url}{path}: {error!r}") from error
            break
        if response.will_close:
            connection.close()
        else:
            self._connections.append(connection)
        is_json = "json" in response.getheader("Content-Type", "")
        return Answer(response.status, json.loads(raw) if is_json else raw.decode())

    def _connection(self) -> http.client.HTTPSConnection:
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=str(self.certificate))
        host, _, port = self.url.removeprefix("https://").partition(":")
        return http.client.HTTPSConnection(host, int(port), timeout=10, context=self._tls)

    def write_kubeconfig(self, path: Path, token: str, namespace: str = "default") -> None:
        """Write a kubeconfig of the user with this bearer token."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.certificate)}}
            ],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
