"""The shipped alerts, tried by Prometheus' own tester: none fires at the first failure, each fires when it should."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.promtool import promtool

__all__: list[str] = []

RULES: Final[dict[str, Any]] = yaml.safe_load(
    (REPOSITORY / "deploy" / "components" / "monitoring" / "rules.yaml").read_text()
)
ALERTS: Final[dict[str, dict[str, Any]]] = {
    rule["alert"]: rule for group in RULES["spec"]["groups"] for rule in group["rules"]
}
RUNBOOKS: Final = REPOSITORY / "docs" / "runbooks"

POD: Final = 'job="vcpuset", component="agent", pod="vcpuset-agent-x", node="node-1", instance="10.0.0.1:80"'
OTHER: Final = (
    'job="vcpuset", component="controller", pod="vcpuset-controller-y", node="node-2", instance="10.0.0.2:80"'
)
WEB: Final = f'{POD}, namespace="shop", name="web"'


@dataclass(frozen=True)
class Story:
    """What Prometheus reads once a minute, and what comes of it.

    series  by name and labels, the values in promtool's notation: "0+1x10" is 0, 1, … 10, "_" no value
    quiet   the last minute at which nothing may fire although the trouble has begun; None: it never ends in an alert
    fires   the minute at which it must
    labels  some of the alert's labels
    """

    alert: str
    series: dict[str, str]
    quiet: int
    fires: int | None
    labels: str = ""


def stays(value: float, minutes: int = 60) -> str:
    """The same value all the time."""
    return f"{value:g}+0x{minutes}"


TROUBLE: Final = [
    Story(
        "VCPUSetNotReady",
        {
            f"vcpuset_unmatched_seconds{{{WEB}}}": "0+60x60",
            f'vcpuset_state{{{WEB}, state="Reconciling", reason="MonitorUnreachable"}}': "1+0x10 _x50",
            f'vcpuset_state{{{WEB}, state="Reconciling", reason="MonitorBusy"}}': "_x10 1+0x50",
        },
        15,
        18,
        'namespace="shop", name="web", severity="warning"',
    ),
    Story(
        "VCPUSetStalled",
        {f'vcpuset_state{{{WEB}, state="Stalled", reason="UnplugRefused"}}': stays(1)},
        14,
        16,
        'namespace="shop", name="web", reason="UnplugRefused"',
    ),
    Story(
        "VCPUSetCredentialsUnavailable",
        {f'vcpuset_state{{{WEB}, state="Stalled", reason="CredentialsUnavailable"}}': stays(1)},
        9,
        11,
        'namespace="shop", name="web"',
    ),
    Story(
        "VCPUSetUnplugsTimedOut",
        {
            f'vcpuset_unplugs_total{{{POD}, result="timed_out"}}': "0+1x60",
            f'vcpuset_unplugs_total{{{POD}, result="done"}}': "0+1x60",
            f'vcpuset_unplugs_total{{{POD}, result="refused"}}': stays(0),
        },
        15,
        40,
    ),
    Story(
        "VCPUSetsManyNotReady",
        {
            f'vcpuset_sets{{{POD}, state="Ready", reason="Converged"}}': stays(10),
            f'vcpuset_sets{{{POD}, state="Reconciling", reason="MonitorUnreachable"}}': stays(6),
            f'vcpuset_sets{{{OTHER}, state="Stalled", reason="MonitorConflict"}}': stays(1),
        },
        14,
        16,
        'severity="critical"',
    ),
    Story("VCPUSetSeriesLeftOut", {f"vcpuset_set_series{{{POD}}}": stays(0)}, 14, 16, 'severity="info"'),
    Story(
        "VCPUSetOperatorAbsent",
        {f"up{{{POD}}}": stays(1), f"up{{{OTHER}}}": "1+0x5 _x55"},
        15,
        22,
        'component="controller", severity="critical"',
    ),
    Story(
        "VCPUSetOperatorDown", {f"up{{{POD}}}": "1+0x5 0+0x55", f"up{{{OTHER}}}": stays(1)}, 15, 17, 'component="agent"'
    ),
    Story(
        "VCPUSetOperatorRestarts",
        {f"process_start_time_seconds{{{POD}}}": "100+0x3 200+0x3 300+0x3 400+0x3 500+0x60"},
        16,
        23,
        'pod="vcpuset-agent-x"',
    ),
    Story(
        "VCPUSetNoLeader",
        {
            f'leader_election_master_status{{{POD}, name="lease"}}': "1+0x5 0+0x55",
            f'leader_election_master_status{{{OTHER}, name="lease"}}': stays(0),
        },
        8,
        10,
        'name="lease", severity="critical"',
    ),
    Story("VCPUSetWatchBehind", {f"vcpuset_watch_behind_seconds{{{POD}}}": "0+60x5 0+0x55"}, 3, 5),
    Story(
        "VCPUSetAPIServerUnreachable",
        # promtool's clock begins at 0, and 0 stands for "never".
        {f"vcpuset_last_list_timestamp_seconds{{{POD}}}": "1+60x5 301+0x55"},
        24,
        27,
    ),
    Story(
        "VCPUSetAPIErrors",
        {
            f'rest_client_requests_total{{{POD}, method="PATCH", code="200"}}': "0+60x60",
            f'rest_client_requests_total{{{POD}, method="PATCH", code="503"}}': "0+30x60",
            f'rest_client_requests_total{{{POD}, method="GET", code="<error>"}}': "0+1x60",
        },
        14,
        18,
    ),
    Story("VCPUSetQueueNotDrained", {f'workqueue_depth{{{POD}, name="vcpuset"}}': "0+0x5 7+0x55"}, 20, 27),
    Story("VCPUSetDefects", {f"controller_runtime_reconcile_panics_total{{{POD}}}": "0+0x5 1+0.2x55"}, 9, 30),
    Story(
        "VCPUSetLoopLags",
        {
            f'vcpuset_event_loop_lag_seconds_bucket{{{POD}, le="1.0"}}': "0+50x60",
            f'vcpuset_event_loop_lag_seconds_bucket{{{POD}, le="2.0"}}': "0+60x60",
            f'vcpuset_event_loop_lag_seconds_bucket{{{POD}, le="+Inf"}}': "0+60x60",
        },
        14,
        18,
    ),
    Story("VCPUSetEventsLost", {f"vcpuset_events_lost_total{{{POD}}}": "0+1x60"}, 15, 40),
    Story("VCPUSetEventsThrottled", {f"vcpuset_events_throttled_total{{{POD}}}": "0+10x60"}, 15, 40),
]

NO_TROUBLE: Final = [
    Story(
        "VCPUSetNotReady",
        {
            f"vcpuset_unmatched_seconds{{{WEB}}}": "0+60x60",
            f'vcpuset_state{{{WEB}, state="Held", reason="Suspended"}}': stays(1),
        },
        60,
        None,
        "a suspended set",
    ),
    Story(
        "VCPUSetNotReady",
        {
            # A set whose target moves all the time, and that is reached each time.
            f"vcpuset_unmatched_seconds{{{WEB}}}": "0+60x10 0+60x10 0+60x10 0+60x10",
            f'vcpuset_state{{{WEB}, state="Reconciling", reason="Plugging"}}': stays(1),
        },
        40,
        None,
        "a set that is reached now and then",
    ),
    Story(
        "VCPUSetStalled",
        {f'vcpuset_state{{{WEB}, state="Stalled", reason="InsufficientSlots"}}': "1+0x10 stale"},
        60,
        None,
        "a set that is mended within minutes",
    ),
    Story(
        "VCPUSetsManyNotReady",
        {
            f'vcpuset_sets{{{POD}, state="Ready", reason="Converged"}}': stays(1),
            f'vcpuset_sets{{{POD}, state="Stalled", reason="MonitorConflict"}}': stays(2),
        },
        60,
        None,
        "few sets",
    ),
    Story(
        "VCPUSetUnplugsTimedOut",
        {
            f'vcpuset_unplugs_total{{{POD}, result="timed_out"}}': "0+0x10 1+0x50",
            f'vcpuset_unplugs_total{{{POD}, result="done"}}': stays(0),
        },
        60,
        None,
        "one request",
    ),
    Story(
        "VCPUSetNoLeader",
        {
            f'leader_election_master_status{{{POD}, name="lease"}}': "1+0x5 0+0x55",
            f'leader_election_master_status{{{OTHER}, name="lease"}}': "0+0x7 1+0x53",
        },
        60,
        None,
        "a hand-over",
    ),
    Story(
        "VCPUSetAPIServerUnreachable",
        {f"vcpuset_last_list_timestamp_seconds{{{POD}}}": stays(0)},
        60,
        None,
        "a standby, which lists nothing",
    ),
    Story(
        "VCPUSetOperatorAbsent",
        {f"up{{{POD}}}": stays(1), 'up{job="vcpuset", component="agent", pod="gone"}': "1+0x5 _x55"},
        60,
        None,
        "a node that was taken away",
    ),
    Story("VCPUSetDefects", {f"controller_runtime_reconcile_panics_total{{{POD}}}": "0+0x5 1+0x55"}, 60, None, "one"),
    Story(
        "VCPUSetQueueNotDrained",
        {f'workqueue_depth{{{POD}, name="vcpuset"}}': "900+0x10 0+0x1 900+0x10 0+0x1 900+0x10"},
        35,
        None,
        "bursts",
    ),
]


def checked(folder: Path, *arguments: str) -> None:
    """Run promtool on `rules.yaml` in this folder."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    done = subprocess.run(
        [promtool(), *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def told(folder: Path, story: Story, at: dict[str, int]) -> None:
    """Have promtool tell this story: `at` says how many alerts of its name, with its labels, fire at which time."""
    labels = f", {story.labels}" if story.fires is not None and story.labels else ""
    fires = f'ALERTS{{alertname="{story.alert}", alertstate="firing"{labels}}}'
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "30s",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in story.series.items()],
                "promql_expr_test": [
                    {
                        "expr": f"count({fires}) or vector(0)",
                        "eval_time": time,
                        "exp_samples": [{"labels": "{}", "value": count}],
                    }
                    for time, count in at.items()
                ],
            }
        ],
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    checked(folder, "test", "rules", "test.yaml")


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    checked(tmp_path, "check", "rules", "rules.yaml")


@pytest.mark.parametrize("story", TROUBLE, ids=[story.alert for story in TROUBLE])
def test_an_alert_fires_after_its_time_and_not_before(story: Story, tmp_path: Path) -> None:
    assert story.fires is not None
    told(tmp_path, story, {"1m": 0, f"{story.quiet}m": 0, f"{story.fires}m": 1})


@pytest.mark.parametrize("story", NO_TROUBLE, ids=[f"{story.alert}: {story.labels}" for story in NO_TROUBLE])
def test_an_alert_does_not_fire_for(story: Story, tmp_path: Path) -> None:
    told(tmp_path, story, {f"{minute}m": 0 for minute in range(0, story.quiet + 1, 5)})


def test_each_alert_has_a_story_of_trouble() -> None:
    assert {story.alert for story in TROUBLE} == ALERTS.keys()


def test_the_words_name_the_set_and_the_time(tmp_path: Path) -> None:
    rule = ALERTS["VCPUSetNotReady"]
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in TROUBLE[0].series.items()],
                "alert_rule_test": [
                    {
                        "alertname": "VCPUSetNotReady",
                        "eval_time": "20m",
                        "exp_alerts": [
                            {
                                "exp_labels": {"namespace": "shop", "name": "web", "severity": "warning"},
                                "exp_annotations": {
                                    **rule["annotations"],
                                    "summary": "VCPUSet shop/web has not been Ready for 20m 0s",
                                },
                            }
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    checked(tmp_path, "test", "rules", "test.yaml")


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_each_alert_waits_has_a_severity_and_says_what_it_means(name: str) -> None:
    rule = ALERTS[name]
    assert re.fullmatch(r"[1-9][0-9]*m", rule["for"])
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["description"].endswith(".")
    assert rule["annotations"]["runbook_url"].endswith(f"/docs/runbooks/{name}.md")


def test_each_alert_has_its_page_and_each_page_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == ALERTS.keys()


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_a_page_has_the_four_parts(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert f"**{ALERTS[name]['labels']['severity']}**" in text
