"""The proxy on the way to the API server."""

from pathlib import Path

import pytest
import yaml

from vcpuset.kube.login import connection_info, load_configuration


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def kubeconfig(folder: Path, **cluster: str) -> Path:
    file = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://api.example:6443", **cluster}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("environment", "cluster", "proxy"),
    [
        ({}, {}, None),
        ({"HTTPS_PROXY": "http://user:word@proxy:3128"}, {}, "http://user:word@proxy:3128"),
        ({"https_proxy": "http://proxy:3128"}, {}, "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, {}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".example"}, {}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "api.example:6443"}, {}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "other.example"}, {}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, {"proxy-url": "http://own:3128"}, "http://own:3128"),
    ],
    ids=str,
)
async def test_requests_and_the_watch_go_through_the_proxy_that_kubectl_uses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    cluster: dict[str, str],
    proxy: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = kubeconfig(tmp_path, **cluster)
    assert (await load_configuration(file)).proxy == proxy
    assert (await connection_info(file)).proxy_url == proxy
