"""What kopf is told: which objects to ask for, and to write nothing."""

import itertools
import re
from pathlib import Path

import pytest
from kopf._cogs.structs.references import Resource

from vcpuset.domain.errors import APIError
from vcpuset.kube.cluster import Scope
from vcpuset.kube.login import connection_info, load_configuration
from vcpuset.kube.source import watch_settings

VCPUSETS = Resource("vcpuset.dev", "v1alpha1", "vcpusets", namespaced=True)


@pytest.mark.parametrize(
    ("scope", "fields", "labels"),
    [
        pytest.param(Scope(), ["spec.nodeName="], [], id="sets without a node"),
        pytest.param(Scope(node_name="n1"), ["spec.nodeName=n1"], [], id="sets of a node"),
        pytest.param(Scope(label_selector="tier=web"), ["spec.nodeName="], ["tier=web"], id="and with a label"),
    ],
)
def test_kopf_matches_the_selectors_with_the_resource(scope: Scope, fields: list[str], labels: list[str]) -> None:
    watching = watch_settings(scope).watching
    # kopf skips a selector whose key it does not recognise, without a word.
    assert list(watching.field_selectors.collect(VCPUSETS)) == fields
    assert list(watching.label_selectors.collect(VCPUSETS)) == labels


def test_kopf_tries_again_for_ever_and_leaves_the_pauses_to_the_gate() -> None:
    backoffs = watch_settings(Scope()).networking.error_backoffs
    assert not isinstance(backoffs, (int, float))
    for _ in range(2):
        assert set(itertools.islice(backoffs, 1000)) == {0.0}


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without any way to find an API server; returns the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def kubeconfig(server: str, cluster: str = "", user: str = "") -> str:
    """A kubeconfig with more fields in its cluster and its user."""
    return f"""
apiVersion: v1
kind: Config
clusters: [{{name: a, cluster: {{server: "{server}"{cluster}}}}}]
users: [{{name: a, user: {{{user}}}}}]
contexts: [{{name: a, context: {{cluster: a, user: a}}}}]
current-context: a
"""


async def test_without_credentials_the_error_says_where_they_can_come_from(no_credentials: Path) -> None:
    with pytest.raises(APIError, match="pass --kubeconfig FILE, set KUBECONFIG, or run in a pod"):
        await load_configuration(None)


async def test_a_kubeconfig_that_is_not_there_is_named(no_credentials: Path) -> None:
    with pytest.raises(APIError, match=f"no kubeconfig {no_credentials / 'absent'}"):
        await load_configuration(no_credentials / "absent")


async def test_kubeconfig_variable_that_names_no_file_is_an_error(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/absent/one:/absent/two")
    with pytest.raises(APIError, match="KUBECONFIG names no existing file"):
        await load_configuration(None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(b"", "it is not a kubeconfig", id="empty"),
        pytest.param(b"127.0.0.1 localhost", "it is not a kubeconfig", id="a text"),
        pytest.param(b"[]", "it is not a kubeconfig", id="a list"),
        pytest.param(b"a: \xff", "it is not a kubeconfig", id="not UTF-8"),
        pytest.param(b"{", "expected the node content", id="not YAML"),
        pytest.param(b"clusters: 3", "no current context", id="no contexts"),
        pytest.param(
            kubeconfig("https://h").replace("cluster: a, user", "cluster: b, user").encode(),
            "Expected object with name b",
            id="unknown cluster",
        ),
        pytest.param(
            kubeconfig("https://h").replace("cluster: a, user: a", "cluster: a, user: b").encode(),
            "a field is missing",
            id="unknown user",
        ),
        pytest.param(kubeconfig("").encode(), "has no server", id="no server"),
    ],
)
async def test_a_broken_kubeconfig_is_named_in_the_error_without_pythons_words(
    no_credentials: Path, text: bytes, words: str
) -> None:
    file = no_credentials / "broken"
    file.write_bytes(text)
    with pytest.raises(APIError, match=f"{file}: .*{words}") as caught:
        await load_configuration(file)
    assert "object" not in str(caught.value).replace("Expected object with name b", "")


def plugin(folder: Path, script: str) -> str:
    """The user of a kubeconfig whose credentials this script prints."""
    file = folder / "plugin"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"exec: {{apiVersion: client.authentication.k8s.io/v1, command: {file}}}"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param(None, "No such file or directory: '/absent/plugin'", id="not installed"),
        pytest.param("echo log in first >&2; exit 3", "process returned 3. b'log in first'", id="it fails"),
        pytest.param("echo hello", "failed to decode process output", id="no JSON"),
        pytest.param(
            """echo '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {}}'""",
            "missing token or clientCertificateData",
            id="none",
        ),
    ],
)
async def test_a_plugin_that_gives_no_credentials_is_an_error_with_its_words(
    no_credentials: Path, caplog: pytest.LogCaptureFixture, script: str | None, words: str
) -> None:
    user = (
        "exec: {apiVersion: client.authentication.k8s.io/v1, command: /absent/plugin}"
        if script is None
        else plugin(no_credentials, script)
    )
    file = no_credentials / "config"
    file.write_text(kubeconfig("https://h", user=user))
    with pytest.raises(APIError, match=re.escape(words)):
        await connection_info(file)
    assert caplog.text == "", "the caller logs it"


async def test_a_plugins_token_is_used(no_credentials: Path) -> None:
    credential = """{"apiVersion": "client.authentication.k8s.io/v1", "kind": "", "status": {"token": "one"}}"""
    file = no_credentials / "config"
    file.write_text(kubeconfig("https://h", user=plugin(no_credentials, f"echo '{credential}'")))
    assert (await connection_info(file)).as_http_headers() == {"Authorization": "Bearer one"}


@pytest.mark.parametrize(
    "user", ["auth-provider: {name: azure}", "tokenFile: /dev/null", "username: me"], ids=lambda user: user.split()[0]
)
async def test_credentials_that_cannot_be_used_are_an_error_instead_of_an_anonymous_user(
    no_credentials: Path, user: str
) -> None:
    file = no_credentials / "config"
    file.write_text(kubeconfig("https://h", user=user))
    with pytest.raises(
        APIError, match="could not be loaded: there is no token, certificate, exec plugin, or user name"
    ):
        await connection_info(file)


async def test_secrets_of_a_broken_kubeconfig_are_not_in_the_error(no_credentials: Path) -> None:
    file = no_credentials / "config"
    provider = "{name: oidc, config: {client-secret: hush, refresh-token: hush}}"
    file.write_text(kubeconfig("https://h", user=f"auth-provider: {provider}"))
    with pytest.raises(APIError, match="Expected key client-id") as caught:
        await load_configuration(file)
    assert "hush" not in str(caught.value)


async def test_the_explicit_file_is_preferred_to_the_variable_and_that_to_the_home_folder(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: no_credentials / name for name in ("explicit", "variable")}
    files["home"] = no_credentials / ".kube" / "config"
    files["home"].parent.mkdir()
    for name, file in files.items():
        file.write_text(kubeconfig(f"https://{name}"))
    assert (await load_configuration(None)).host == "https://home"
    monkeypatch.setenv("KUBECONFIG", str(files["variable"]))
    assert (await load_configuration(None)).host == "https://variable"
    assert (await load_configuration(files["explicit"])).host == "https://explicit"


@pytest.mark.parametrize(
    ("user", "headers"),
    [
        pytest.param('token: "abc"', {"Authorization": "Bearer abc"}, id="token"),
        pytest.param("username: me, password: pw", {"Authorization": "Basic bWU6cHc="}, id="password"),
        pytest.param("", {}, id="nothing"),
    ],
)
async def test_kopf_gets_the_same_credentials(no_credentials: Path, user: str, headers: dict[str, str]) -> None:
    file = no_credentials / "config"
    file.write_text(kubeconfig("https://h:6443", cluster=", insecure-skip-tls-verify: true", user=user))
    info = await connection_info(file)
    assert (info.server, info.insecure) == ("https://h:6443", True)
    assert info.as_http_headers() == headers


async def test_a_token_file_is_read_again_at_each_login(no_credentials: Path) -> None:
    token = no_credentials / "token"
    file = no_credentials / "config"
    file.write_text(kubeconfig("http://h", user="tokenFile: token"))
    for text in ("one", "two"):
        token.write_text(text)
        assert (await connection_info(file)).as_http_headers() == {"Authorization": f"Bearer {text}"}


async def test_a_server_name_of_its_own_is_refused_rather_than_ignored(no_credentials: Path) -> None:
    file = no_credentials / "config"
    file.write_text(kubeconfig("https://h", cluster=", tls-server-name: other"))
    with pytest.raises(APIError, match="tls-server-name"):
        await load_configuration(file)
