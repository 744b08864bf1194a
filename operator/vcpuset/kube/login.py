"""The address and credentials of the API server: one source for kopf's watch and for our own requests.

In this order: the file given with `--kubeconfig`, the files in `KUBECONFIG`, `~/.kube/config`, and in a pod the service
account. They are read again at each login, so rotated tokens and `exec` plugins work.

The client's loader logs why it could not get a user's credentials, and continues without any. Here that is an error:
nothing is sent as an anonymous user unless the kubeconfig has a user without credentials.
"""

from __future__ import annotations

import logging
import os
import re
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import kopf
import yaml
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from vcpuset.domain.errors import APIError

__all__ = ["connection_info", "load_configuration", "namespace_of_context"]

# The client's loaders have no type annotations.
_load_kube_config: Any = load_kube_config
_load_incluster_config: Any = load_incluster_config

_REMEDY: Final = "pass --kubeconfig FILE, set KUBECONFIG, or run in a pod with a service account"

_UNUSABLE: Final = (
    ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError
)  # fmt: skip
"""What the loaders raise for files that are missing or wrong."""

_errors: ContextVar[list[str] | None] = ContextVar("_errors", default=None)
"""The errors that the loader has logged in this login."""


def _keep_errors(record: logging.LogRecord) -> bool:
    errors = _errors.get()
    if errors is None or record.levelno < logging.ERROR:
        return True
    errors.append(record.getMessage())
    return False


logging.getLogger(load_kube_config.__module__).addFilter(_keep_errors)


async def load_configuration(kubeconfig: Path | None, context: str | None = None) -> Configuration:
    """The address and the credentials of the API server.

    context  of the kubeconfig; None: its current one

    Raises:
        APIError: there are none, or they cannot be used; with the remedy.
    """
    configuration = Configuration()
    files = _kubeconfig_files(kubeconfig)
    try:
        if files is not None:
            await _load_files(files, context, configuration)
        elif "KUBERNETES_SERVICE_HOST" in os.environ:
            _load_incluster_config(client_configuration=configuration)
        else:
            raise APIError(f"no Kubernetes credentials found: {_REMEDY}")
    except _UNUSABLE as error:
        source = "of the service account" if files is None else f"in {files}"
        raise APIError(f"cannot use the Kubernetes credentials {source}: {_words(error)}; {_REMEDY}") from error
    if configuration.tls_server_name:
        # kopf does not support it, and a watch on another server than the one that is written to would be worse.
        raise APIError(f"tls-server-name in {files} is not supported: use a server address that is in its certificate")
    # As kubectl does. aiohttp by itself would look for both at each request, in a thread, and use ~/.netrc too.
    configuration.proxy = configuration.proxy or _proxy_from_environment(configuration.host)
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration


async def connection_info(kubeconfig: Path | None) -> kopf.ConnectionInfo:
    """The same for kopf.

    Raises:
        APIError: see `load_configuration`.
    """
    configuration = await load_configuration(kubeconfig)
    scheme, _, token = (await configuration.get_api_key_with_prefix("BearerToken") or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme.capitalize() or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
        trust_env=False,
    )


def _proxy_from_environment(server: str) -> str | None:
    """HTTPS_PROXY, unless NO_PROXY has the server's host."""
    url = urlsplit(server)
    return None if proxy_bypass(url.netloc) else getproxies().get(url.scheme)


async def _load_files(files: str, context: str | None, configuration: Configuration) -> None:
    """Read kubeconfig files, and get the credentials that they name."""
    chosen = _context(files, context)
    errors: list[str] = []
    token = _errors.set(errors)
    try:
        # persist_config would write refreshed tokens into the user's file.
        loader = await _load_kube_config(
            config_file=files, context=chosen.name, client_configuration=configuration, persist_config=False
        )
    finally:
        _errors.reset(token)
    if not configuration.host:
        raise ConfigException("the cluster of its current context has no server")
    # The loader has no public way to the user's entry.
    if loader._user and not configuration.api_key and not configuration.cert_file:
        raise ConfigException(
            "the credentials of the user of its current context could not be loaded: "
            f"{'; '.join(errors) or 'there is no token, certificate, exec plugin, or user name with password'}"
        )


@dataclass(frozen=True)
class _Context:
    name: str
    namespace: str | None


def namespace_of_context(kubeconfig: Path | None, context: str | None) -> str | None:
    """The namespace that a context (None: the current one) of the kubeconfig names; None: it names none.

    Raises:
        APIError: there is no kubeconfig, it cannot be read, or there is no such context; with the remedy.
    """
    files = _kubeconfig_files(kubeconfig)
    if files is None:
        return None
    try:
        return _context(files, context).namespace
    except _UNUSABLE as error:
        raise APIError(f"cannot use the kubeconfig {files}: {_words(error)}; {_REMEDY}") from error


def _context(files: str, name: str | None) -> _Context:
    """A context, by default the current one: as for kubectl, the first that a file names, and the first of its name.

    The client's loader uses the last file that names a current one.
    """
    paths = [Path(file).expanduser() for file in files.split(os.pathsep) if file]
    found = [yaml.safe_load(path.read_text()) for path in paths if path.is_file()]
    documents = [each for each in found if each is not None]
    if not documents or not all(isinstance(each, dict) for each in documents):
        raise TypeError(f"{files}: expected mappings")
    chosen = name or next((each["current-context"] for each in documents if each.get("current-context")), None)
    if chosen is None:
        raise ConfigException("it has no current context: set one with `kubectl config use-context`")
    entries = [entry for each in documents for entry in each.get("contexts") or [] if entry["name"] == chosen]
    if not entries:
        raise ConfigException(f"it has no context {chosen!r}: `kubectl config get-contexts` lists them")
    return _Context(chosen, (entries[0].get("context") or {}).get("namespace"))


def _words(error: Exception) -> str:
    match error:
        case TypeError() | AttributeError() | KeyError() | UnicodeDecodeError() | RecursionError():
            # The loader does not check what it has read, and Python's error messages do not help a user.
            return "it is not a kubeconfig, or a field is missing or has the wrong type"
        case _:
            # The loader's message contains the user's entry, with tokens and passwords.
            return " ".join(re.sub(r"/\{.*\}", "", str(error), flags=re.DOTALL).split())


def _kubeconfig_files(explicit: Path | None) -> str | None:
    """One or several files, separated as in PATH; None: there is no kubeconfig."""
    if explicit is not None:
        if not explicit.is_file():
            raise APIError(f"there is no kubeconfig {explicit}: {_REMEDY}")
        return str(explicit)
    named = os.environ.get("KUBECONFIG")
    if named:
        if not any(Path(file).expanduser().is_file() for file in named.split(os.pathsep) if file):
            raise APIError(f"KUBECONFIG names no existing file ({named}): {_REMEDY}")
        return named
    default = Path("~/.kube/config").expanduser()
    return str(default) if default.is_file() else None
