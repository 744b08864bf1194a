"""What kopf is told: which objects to ask for, and to write nothing."""

import itertools
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
    with pytest.raises(APIError, match="give --kubeconfig FILE, set KUBECONFIG, or run in a pod"):
        await load_configuration(None)


async def test_a_kubeconfig_that_is_not_there_is_named(no_credentials: Path) -> None:
    with pytest.raises(APIError, match=f"no kubeconfig {no_credentials / 'absent'}"):
        await load_configuration(no_credentials / "absent")


async def test_kubeconfig_variable_that_names_no_file_is_an_error(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/absent/one:/absent/two")
    with pytest.raises(APIError, match="KUBECONFIG names no file that exists"):
        await load_configuration(None)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "clusters: 3", kubeconfig("https://h").replace("cluster: a, user", "cluster: b, user")],
    ids=["empty", "not YAML", "a list", "no contexts", "unknown cluster"],
)
async def test_a_broken_kubeconfig_is_named_in_the_error(no_credentials: Path, text: str) -> None:
    file = no_credentials / "broken"
    file.write_text(text)
    with pytest.raises(APIError, match=str(file)):
        await load_configuration(file)


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


async def test_a_token_file_is_read_anew_at_each_login(no_credentials: Path) -> None:
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
