"""The ready pods of this project: readiness is what Kubernetes itself keeps true, also for a node that has died."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from vcpuset.kube.cluster import Cluster, understood

__all__ = ["ReadyPod", "ready_pods"]


@dataclass(frozen=True)
class ReadyPod:
    """A pod whose condition Ready is True.

    address  its IP address; empty: none
    ports    by name, those of its containers that have one
    """

    name: str
    node_name: str
    address: str
    ports: Mapping[str, int]


class _Metadata(msgspec.Struct):
    name: str


class _Port(msgspec.Struct, rename="camel"):
    container_port: int
    name: str = ""


class _Container(msgspec.Struct):
    ports: list[_Port] = []


class _Spec(msgspec.Struct, rename="camel"):
    containers: list[_Container]
    node_name: str = ""


class _Condition(msgspec.Struct):
    type: str
    status: str


class _Status(msgspec.Struct, rename="camel"):
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] = []


class _Pod(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec
    status: _Status


async def ready_pods(
    cluster: Cluster, namespace: str, label_selector: str, node_name: str | None = None
) -> list[ReadyPod]:
    """The ready pods of a namespace with these labels, on a node or anywhere.

    Raises:
        APIError: as `Cluster.list_pods`.
    """
    bodies = await cluster.list_pods(namespace, label_selector, node_name)
    pods = [understood(f"pods of {namespace}", body, _Pod) for body in bodies]
    return [
        ReadyPod(
            pod.metadata.name,
            pod.spec.node_name,
            pod.status.pod_ip,
            {port.name: port.container_port for container in pod.spec.containers for port in container.ports},
        )
        for pod in pods
        if any((each.type, each.status) == ("Ready", "True") for each in pod.status.conditions)
    ]
