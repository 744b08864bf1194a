"""`vcpuset metrics-api`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import click

from vcpuset.cli.options import (
    Address,
    EmptyCounts,
    configure_logs,
    kubeconfig_option,
    log_options,
    not_empty,
    own_namespace,
)
from vcpuset.cli.values import NAMESPACE, SERVICE
from vcpuset.domain.errors import VCPUSetError
from vcpuset.metricsapi.settings import CertificateFiles, Settings

__all__ = ["metrics_api"]


@click.command("metrics-api")
@click.option(
    "--address",
    type=Address(),
    default="0.0.0.0:8443",
    show_default=True,
    envvar="VCPUSET_METRICS_API_ADDRESS",
    show_envvar=True,
    help="Address of the API, with TLS.",
)
@click.option(
    "--health-address",
    cls=EmptyCounts,
    type=Address(),
    default="127.0.0.1:8080",
    show_default=True,
    envvar="VCPUSET_METRICS_API_HEALTH_ADDRESS",
    show_envvar=True,
    help="Address of /healthz and /readyz. Empty: disabled.",
)
@click.option(
    "--agent-namespace",
    type=NAMESPACE,
    default=Settings.agent_namespace,
    show_default=True,
    envvar="VCPUSET_METRICS_API_AGENT_NAMESPACE",
    show_envvar=True,
    callback=not_empty,
    help="Namespace of the node agents.",
)
@click.option(
    "--controller-namespace",
    type=NAMESPACE,
    default=Settings.controller_namespace,
    show_default=True,
    envvar="VCPUSET_METRICS_API_CONTROLLER_NAMESPACE",
    show_envvar=True,
    callback=not_empty,
    help="Namespace of the central controllers.",
)
@click.option(
    "--service-name",
    type=SERVICE,
    default=Settings.service,
    show_default=True,
    envvar="VCPUSET_METRICS_API_SERVICE_NAME",
    show_envvar=True,
    callback=not_empty,
    help="Name of the Service that the APIService names, and of the Secret with the certificate.",
)
@click.option(
    "--service-namespace",
    type=NAMESPACE,
    envvar="VCPUSET_METRICS_API_SERVICE_NAMESPACE",
    show_envvar=True,
    help="Namespace of both. Default: the namespace of the pod.",
)
@click.option(
    "--tls-cert-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="VCPUSET_METRICS_API_TLS_CERT_FILE",
    show_envvar=True,
    help="File with the serving certificate, read again when it changes. Without it, a certificate is made and renewed "
    "in the Secret.",
)
@click.option(
    "--tls-private-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="VCPUSET_METRICS_API_TLS_PRIVATE_KEY_FILE",
    show_envvar=True,
    help="File with the key of --tls-cert-file.",
)
@log_options
@kubeconfig_option
def metrics_api(
    address: tuple[str, int] | None,
    health_address: tuple[str, int] | None,
    agent_namespace: str,
    controller_namespace: str,
    service_name: str,
    service_namespace: str | None,
    tls_cert_file: Path | None,
    tls_private_key_file: Path | None,
    log_format: str,
    log_level: str,
    kubeconfig: Path | None,
) -> None:
    """Serve custom.metrics.k8s.io for VCPUSets until SIGTERM or SIGINT.

    HorizontalPodAutoscalers read the metrics busy_vcpus and demand_vcpus there. Each request is passed on to the
    process that manages the VCPUSet. See docs/metrics-api.md.
    """
    if address is None:
        raise click.UsageError("--address must not be empty: it is where the API is served")
    files: CertificateFiles | None = None
    if tls_cert_file is not None and tls_private_key_file is not None:
        files = CertificateFiles(tls_cert_file, tls_private_key_file)
    elif tls_cert_file is not None or tls_private_key_file is not None:
        raise click.UsageError("--tls-cert-file and --tls-private-key-file belong together: set both, or neither")
    namespace = service_namespace or own_namespace("metrics-api", "its Service", "--service-namespace")
    configure_logs(log_format, log_level)
    settings = Settings(
        namespace=namespace,
        service=service_name,
        agent_namespace=agent_namespace,
        controller_namespace=controller_namespace,
        address=address,
        health_address=health_address,
        files=files,
        kubeconfig=kubeconfig,
    )
    from vcpuset.metricsapi import server  # noqa: PLC0415 - imports aiohttp and kubernetes: every other command would start 0.5 s later

    try:
        asyncio.run(server.run(settings))
    except VCPUSetError as error:
        # Not as click would print it: the last message belongs in the log too, in its format.
        logging.getLogger("vcpuset").critical("%s", error)
        raise SystemExit(1) from error
