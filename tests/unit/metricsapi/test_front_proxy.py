"""Whom a request is from, by the ConfigMap and the headers."""

from __future__ import annotations

import json

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from vcpuset.metricsapi.frontproxy import FrontProxy, InvalidFrontProxy, User, common_names

__all__: list[str] = []

ENTRIES = {
    "client-ca-file": "another CA",
    "requestheader-client-ca-file": "PEM",
    "requestheader-allowed-names": '["front-proxy-client"]',
    "requestheader-username-headers": '["X-Remote-User", "X-User"]',
    "requestheader-uid-headers": '["X-Remote-Uid"]',
    "requestheader-group-headers": '["X-Remote-Group"]',
    "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
}


def user(*headers: tuple[str, str], names: tuple[str, ...] = ("front-proxy-client",), **entries: str) -> User | None:
    """The user of a request with these headers from a client with these common names."""
    changed = {f"requestheader-{key.replace('_', '-')}": value for key, value in entries.items()}
    return FrontProxy.of({**ENTRIES, **changed}).user(names, CIMultiDictProxy(CIMultiDict(headers)))


def test_the_front_proxy_names_a_user_with_groups_uid_and_extra_fields() -> None:
    found = user(
        ("x-remote-user", "jo"),
        ("X-Remote-Uid", "7"),
        ("X-Remote-Group", "a"),
        ("X-REMOTE-GROUP", "b"),
        ("X-Remote-Extra-Example.com%2fScopes", "read"),
        ("X-Remote-Extra-Example.com%2fScopes", "write"),
        ("X-Other", "ignored"),
    )
    assert found == User("jo", "7", ("a", "b"), (("example.com/scopes", ("read", "write")),))
    assert found is not None
    assert found.spec() == {
        "user": "jo", "uid": "7", "groups": ["a", "b"], "extra": {"example.com/scopes": ["read", "write"]},
    }  # fmt: skip


def test_the_first_header_with_a_value_names_the_user() -> None:
    assert user(("X-User", "jo")) == User("jo", "", (), ())
    assert user(("X-Remote-User", ""), ("X-User", "jo")) == User("jo", "", (), ())


def test_a_client_with_another_name_is_not_the_front_proxy() -> None:
    assert user(("X-Remote-User", "jo"), names=("kubelet",)) is None
    assert user(("X-Remote-User", "jo"), names=()) is None


@pytest.mark.parametrize("names", ["[]", None])
def test_without_allowed_names_each_certificate_of_the_ca_is_the_front_proxys(names: str | None) -> None:
    entries = {key: value for key, value in ENTRIES.items() if key != "requestheader-allowed-names"}
    if names is not None:
        entries["requestheader-allowed-names"] = names
    headers = CIMultiDictProxy(CIMultiDict({"X-Remote-User": "jo"}))
    assert FrontProxy.of(entries).user(["any"], headers) == User("jo", "", (), ())


def test_without_a_user_header_nobody_is_named() -> None:
    assert user(("X-Remote-Group", "system:masters")) is None
    assert user(("X-Remote-User", "jo"), username_headers="[]") is None


@pytest.mark.parametrize("ca", [{}, {"requestheader-client-ca-file": "  \n"}])
def test_a_cluster_without_a_front_proxy_is_refused_with_the_remedy(ca: dict[str, str]) -> None:
    entries = {key: value for key, value in ENTRIES.items() if key != "requestheader-client-ca-file"}
    with pytest.raises(InvalidFrontProxy, match="has no requestheader-client-ca-file: start kube-apiserver with"):
        FrontProxy.of({**entries, **ca})


@pytest.mark.parametrize("value", ["", "front-proxy-client", '{"a": 1}', json.dumps([1])])
def test_a_list_that_is_none_is_refused_by_its_name(value: str) -> None:
    """Taken for an empty one, it would let everyone in."""
    with pytest.raises(InvalidFrontProxy, match="requestheader-allowed-names of ConfigMap kube-system/"):
        user(allowed_names=value)


def test_the_common_names_of_a_certificate() -> None:
    subject = ((("organizationName", "x"),), (("commonName", "a"),), (("commonName", "b"),))
    assert common_names({"subject": subject}) == ["a", "b"]
    assert common_names({}) == []
    assert common_names(None) == []
