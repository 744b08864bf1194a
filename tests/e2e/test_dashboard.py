"""The Grafana dashboard: Grafana's own types know each of its fields, and each of its queries has an answer.

The queries are run on a real Prometheus with the shipped rules. As the PodMonitor does, it scrapes an agent, a
controller, and a shard of two replicas. There is no Grafana here: the test replaces the variables.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.faulty import Error, FaultyMonitor, Refuse, Silent
from harness.operator import OperatorProcess
from harness.prometheus import PrometheusServer
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User

__all__: list[str] = []

Json = dict[str, Any]
WAIT: Final = 90.0
MONITORING: Final = REPOSITORY / "deploy" / "components" / "monitoring"
RULES: Final[Json] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
POD_MONITOR: Final[Json] = yaml.safe_load((MONITORING / "pod-monitor.yaml").read_text())["spec"]
DASHBOARD: Final[Json] = json.loads((MONITORING / "dashboard" / "vcpuset.json").read_text())
PANELS: Final[list[Json]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES: Final[dict[str, Json]] = {each["name"]: each for each in DASHBOARD["templating"]["list"]}

OF_PROMETHEUS: Final = {"up", "ALERTS"}
"""What Prometheus itself makes."""


@dataclass(frozen=True)
class Query:
    """A query of a panel.

    expression  with Grafana's variables
    legend      with labels in {{}}; "": none
    instant     for one moment, and not for a time range
    """

    panel: str
    expression: str
    legend: str
    instant: bool


QUERIES: Final = [
    Query(panel["title"], target["expr"], target.get("legendFormat", ""), target.get("instant", False))
    for panel in PANELS
    for target in panel["targets"]
]


# --- the file -----------------------------------------------------------------------------------------------------


def lost(before: object, after: object, path: str = "") -> Iterator[str]:
    """The paths of what is in `before` and not, or not so, in `after`."""
    match before, after:
        case dict(), dict():
            for key, value in before.items():
                yield from lost(value, after[key], f"{path}.{key}") if key in after else [f"{path}.{key}"]
        case list(), list() if len(before) == len(after):
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                yield from lost(old, new, f"{path}[{index}]")
        case _ if before != after:
            yield path


def test_grafanas_own_types_know_each_field_of_the_dashboard() -> None:
    register_default_plugins()  # the types of the panels' options and of the data source's queries
    read = Dashboard.from_json(DASHBOARD)
    assert list(lost(DASHBOARD, json.loads(JSONEncoder().encode(read)))) == []


def test_each_panel_has_a_title_a_description_and_the_data_source_that_the_user_chooses() -> None:
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert all(titles)
    for panel in PANELS:
        assert re.search(r"\S", panel["description"]), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    assert set(re.findall(r'"uid": "([^"]+)"', json.dumps(DASHBOARD["panels"]))) == {"${datasource}"}
    assert VARIABLES["datasource"]["type"] == "datasource"


def test_each_panel_with_an_axis_or_a_number_has_a_unit_and_each_line_a_name() -> None:
    for panel in PANELS:
        if panel["type"] in {"timeseries", "stat"}:
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        if panel["type"] in {"timeseries", "state-timeline"}:
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)

    def area(panel: Json) -> tuple[range, range]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        return range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])

    for one, other in combinations(DASHBOARD["panels"], 2):
        (left, upper), (right, lower) = area(one), area(other)
        apart = not set(left) & set(right) or not set(upper) & set(lower)
        assert apart, (one["title"], other["title"])


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics in a query: all of its selectors have labels in braces."""
    return set(re.findall(r"\b([a-zA-Z_:]+)\{", expression))


def test_each_metric_of_the_dashboard_is_documented_and_limited_to_the_operators_jobs() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "docs" / "operations.md").read_text(), re.MULTILINE))
    used = {name for query in QUERIES for name in metrics_in(query.expression)}
    assert {re.sub(r"_bucket$", "", name) for name in used} - OF_PROMETHEUS <= documented
    for query in QUERIES:
        selectors = re.findall(r"\{([^}]*)\}", query.expression)
        assert selectors, query
        assert all('job=~"$job"' in each or 'alertname=~"VCPUSet.+"' in each for each in selectors), query


# --- the queries --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A Prometheus that scrapes operators which manage some sets."""

    prometheus: PrometheusServer
    namespace: str

    def filled_in(self, text: str) -> str:
        """A query as Grafana sends it when the set `web` is shown."""
        variables = {"job": "vcpuset", "namespace": self.namespace, "name": "web", "__rate_interval": "1m"}
        for name, value in variables.items():
            text = re.sub(rf"\${name}\b", value, text)
        assert "$" not in text, text
        return text

    async def answer(self, query: Query) -> list[Json]:
        """The series of a query that have a value."""
        expression, now = self.filled_in(query.expression), time.time()
        if query.instant:
            found = (await self.prometheus.ask("query", query=expression))["result"]
        else:
            times = {"start": str(now - 60), "end": str(now), "step": "1"}
            found = (await self.prometheus.ask("query_range", query=expression, **times))["result"]
        return [series for series in found if any(not math.isnan(float(value)) for _, value in values(series))]


def values(series: Json) -> Sequence[tuple[float, str]]:
    """Times and values."""
    found: Sequence[tuple[float, str]] = series["values"] if "values" in series else [series["value"]]
    return found


def scrape_configuration(operators: Mapping[str, OperatorProcess]) -> Json:
    """What Prometheus reads. The labels are those that the PodMonitor makes; operators by the name of their pod."""
    (endpoint,) = POD_MONITOR["podMetricsEndpoints"]
    assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"component", "node"}
    targets = [
        {
            "targets": [operator.url.removeprefix("http://")],
            "labels": {
                "component": pod.rpartition("-")[0],
                "namespace": "vcpuset-system",
                "node": "node-1",
                "pod": pod,
            },
        }
        for pod, operator in operators.items()
    ]
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": "vcpuset", "honor_labels": endpoint["honorLabels"], "static_configs": targets},
        ],
    }


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[World]:
    """Sets of each state, managed by an agent, a controller and a shard; one on a node without an agent."""
    namespace = await control_plane.namespace()
    folder = socket_root / namespace
    folder.mkdir()
    user = User(control_plane, namespace)

    def operator(*flags: str) -> OperatorProcess:
        scope = (f"--namespace={namespace}", "--resync-seconds=1")
        return OperatorProcess(control_plane, *scope, *flags, socket_root=socket_root)

    def controller(lease: str, selector: str, *flags: str) -> OperatorProcess:
        election = ("--leader-elect", f"--leader-elect-namespace={namespace}", f"--leader-elect-name={lease}")
        return operator(*election, f"--label-selector={selector}", *flags)

    # Without pods in this namespace, there is no agent on any node.
    of_b = ("vcpuset-controller-b", "vcpuset.dev/shard=b", f"--agent-namespace={namespace}", "--agent-grace-seconds=1")
    operators = {
        "agent-1": operator("--node-name=node-1"),
        "controller-1": controller("vcpuset-controller", "vcpuset.dev/shard notin (b)"),
        "controller-b-1": controller(*of_b),
        "controller-b-2": controller(*of_b),
    }
    async with AsyncExitStack() as stack:
        refusing = await stack.enter_async_context(FaultyMonitor(folder / "refusing.sock"))
        refusing.faults["device_add"] = Error("GenericError", "no")
        refusing.cpus.unplug[1] = Refuse()
        silent = await stack.enter_async_context(FaultyMonitor(folder / "silent.sock"))
        silent.cpus.unplug[1] = Silent()
        await stack.enter_async_context(
            saved_guest(
                smp="2,maxcpus=64", monitor_paths=[folder / "web.sock"], agent=True, agent_path=folder / "ga.sock"
            )
        )
        await asyncio.gather(*map(stack.enter_async_context, operators.values()))
        prometheus = await stack.enter_async_context(PrometheusServer(scrape_configuration(operators), RULES))

        async def scraped() -> bool:
            up = await prometheus.ask("query", query='count(up{job="vcpuset"} == 1)')
            return bool(up["result"]) and float(up["result"][0]["value"][1]) == len(operators)

        # A counter has a rate if it was scraped before it counts.
        await until(scraped, WAIT, lambda: f"a scrape of each operator; {prometheus.tail()}")

        b = {"vcpuset.dev/shard": "b"}
        await user.create("web", 2, guestAgent={"unix": {"path": "ga.sock"}, "bringOnline": True}, nodeName="node-1")
        await user.create("refusing", 3, nodeName="node-1")
        await user.create("silent", 1, unplug={"timeoutSeconds": 1})
        await user.create("away", 2, labels=b)
        await user.create("orphan", 2, labels=b, nodeName="node-2")
        await user.wait_ready("web")
        await user.change("web", vcpus=3)
        await user.wait_ready("web")
        await user.wait_reason("silent", "UnplugTimedOut", stalled=True)
        yield World(prometheus, namespace)
    await control_plane.request("DELETE", f"/apis/vcpuset.dev/v1alpha1/namespaces/{namespace}/vcpusets")


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("query", QUERIES, ids=[f"{each.panel}: {each.legend or each.expression}" for each in QUERIES])
async def test_a_query_has_an_answer_with_the_labels_of_its_legend(world: World, query: Query) -> None:
    found = await until(lambda: world.answer(query), WAIT, f"a series of {world.filled_in(query.expression)}")
    for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
        assert all(series["metric"].get(label) for series in found), (label, found)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("job", {"vcpuset"}), ("namespace", None), ("name", {"web", "refusing", "silent", "away"})],
    ids=["job", "namespace", "name"],
)
async def test_a_variable_offers_what_there_is(world: World, name: str, expected: set[str] | None) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", world.filled_in(VARIABLES[name]["query"]["query"]))
    assert found is not None
    selector, label = found.groups()
    series = await world.prometheus.ask("series", **{"match[]": selector})
    assert {each[label] for each in series} == (expected or {world.namespace})
