"""What Prometheus reads while something goes wrong, or only seems to, for `test_alerts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["NO_TROUBLE", "TROUBLE", "Story"]

AGENT: Final = 'job="vcpuset", component="agent", pod="vcpuset-agent-x", node="node-1", instance="10.0.0.1:80"'
POD: Final = f'{AGENT}, namespace="vcpuset-agent"'
OTHER: Final = (
    'job="vcpuset", component="controller", pod="vcpuset-controller-y", node="node-2", instance="10.0.0.2:80", '
    'namespace="vcpuset-system"'
)
WEB: Final = f'{AGENT}, namespace="shop", name="web"'


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
            f"vcpuset_not_ready_seconds{{{WEB}}}": "0+60x60",
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
    Story(
        "VCPUSetAgentUnavailable",
        {f"vcpuset_sets_without_agent{{{OTHER}}}": "0+0x5 3+0x55"},
        9,
        12,
        'severity="warning"',
    ),
    Story("VCPUSetStatusOutdated", {f"up{{{POD}}}": "1+0x5 0+0x55"}, 15, 17, 'node="node-1"'),
    # The pod went with its node.
    Story("VCPUSetStatusOutdated", {f"up{{{POD}}}": "1+0x5 _x55"}, 15, 22, 'node="node-1"'),
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
        {
            # promtool's clock begins at 0, and 0 stands for "never".
            f"vcpuset_last_list_timestamp_seconds{{{POD}}}": "1+60x5 301+0x55",
            f"vcpuset_list_errors_total{{{POD}}}": "0+0x9 1+2x50",
            f"process_start_time_seconds{{{POD}}}": stays(0),
        },
        24,
        27,
    ),
    Story(
        "VCPUSetAPIServerUnreachable",
        {
            # A controller that may renew its lease, and whose very first list is refused: its other requests are well.
            f"vcpuset_last_list_timestamp_seconds{{{OTHER}}}": stays(0),
            f"vcpuset_list_errors_total{{{OTHER}}}": "0+2x60",
            f"process_start_time_seconds{{{OTHER}}}": stays(0),
            f'rest_client_requests_total{{{OTHER}, method="GET", code="200"}}': "0+30x60",
            f'rest_client_requests_total{{{OTHER}, method="GET", code="404"}}': "0+2x60",
        },
        19,
        22,
        'component="controller"',
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
    Story(
        "VCPUSetAPIErrors",
        {f'rest_client_requests_total{{{POD}, method="GET", code="401"}}': "0+2x60"},
        14,
        18,
    ),
    Story("VCPUSetQueueNotDrained", {f'workqueue_depth{{{POD}, name="vcpuset"}}': "0+0x5 7+0x55"}, 20, 27),
    Story("VCPUSetReconcilePanics", {f"controller_runtime_reconcile_panics_total{{{POD}}}": "0+0x5 1+0.2x55"}, 9, 30),
    Story(
        "VCPUSetEventLoopLag",
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
        "VCPUSetStatusOutdated",
        {f"up{{{POD}}}": "1+0x5 0+0x55", f"vcpuset_sets_without_agent{{{OTHER}}}": "0+0x9 3+0x50"},
        60,
        None,
        "with a controller",
    ),
    Story(
        "VCPUSetNotReady",
        {
            f"vcpuset_not_ready_seconds{{{WEB}}}": "0+60x60",
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
            f"vcpuset_not_ready_seconds{{{WEB}}}": "0+60x10 0+60x10 0+60x10 0+60x10",
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
        {
            f"vcpuset_last_list_timestamp_seconds{{{POD}}}": stays(0),
            f"vcpuset_list_errors_total{{{POD}}}": stays(0),
            f"process_start_time_seconds{{{POD}}}": stays(0),
        },
        60,
        None,
        "a standby, which lists nothing",
    ),
    Story(
        "VCPUSetAPIServerUnreachable",
        {
            # --sweep-seconds=1800, and each of the lists fails once.
            f"vcpuset_last_list_timestamp_seconds{{{POD}}}": "1+0x29 1801+0x30",
            f"vcpuset_list_errors_total{{{POD}}}": "0+0x29 1+0x29 2",
            f"process_start_time_seconds{{{POD}}}": stays(0),
        },
        60,
        None,
        "lists that are far apart",
    ),
    Story(
        "VCPUSetAPIErrors",
        {
            f'rest_client_requests_total{{{POD}, method="PATCH", code="200"}}': "0+60x60",
            f'rest_client_requests_total{{{POD}, method="PATCH", code="409"}}': "0+30x60",
            f'rest_client_requests_total{{{POD}, method="GET", code="404"}}': "0+30x60",
        },
        60,
        None,
        "conflicts, and Secrets that are not there",
    ),
    Story(
        "VCPUSetOperatorAbsent",
        {f"up{{{POD}}}": stays(1), 'up{job="vcpuset", component="agent", pod="gone"}': "1+0x5 _x55"},
        60,
        None,
        "a node that was taken away",
    ),
    Story(
        "VCPUSetReconcilePanics",
        {f"controller_runtime_reconcile_panics_total{{{POD}}}": "0+0x5 1+0x55"},
        60,
        None,
        "one",
    ),
    Story(
        "VCPUSetQueueNotDrained",
        {f'workqueue_depth{{{POD}, name="vcpuset"}}': "900+0x10 0+0x1 900+0x10 0+0x1 900+0x10"},
        35,
        None,
        "bursts",
    ),
]
