"""The shipped alerts, tried by Prometheus' own tester: none fires at the first failure, each fires when it should."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.prometheus import program
from unit.alertstories import NO_TROUBLE, TROUBLE, Story

__all__: list[str] = []

RULES: Final[dict[str, Any]] = yaml.safe_load(
    (REPOSITORY / "deploy" / "components" / "monitoring" / "rules.yaml").read_text()
)
ALERTS: Final[dict[str, dict[str, Any]]] = {
    rule["alert"]: rule for group in RULES["spec"]["groups"] for rule in group["rules"]
}
RUNBOOKS: Final = REPOSITORY / "docs" / "runbooks"


def checked(folder: Path, *arguments: str) -> None:
    """Run promtool on `rules.yaml` in this folder."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
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


def of_a_pod(alert: str) -> bool:
    """Whether the alert's page has its reader put labels of the alert into commands about a pod."""
    page = (RUNBOOKS / f"{alert}.md").read_text()
    return "`NAMESPACE` and `POD` are the operator's, from the labels of the alert" in page


ABOUT_PODS: Final = [story for story in TROUBLE if of_a_pod(story.alert)]


@pytest.mark.parametrize("story", ABOUT_PODS, ids=[story.alert for story in ABOUT_PODS])
def test_an_alert_has_the_labels_that_its_page_has_put_into_commands(story: Story, tmp_path: Path) -> None:
    words = set(re.findall(r"\b(?:NAMESPACE|POD|NODE)\b", (RUNBOOKS / f"{story.alert}.md").read_text()))
    shown = next(name for name in story.series if "pod=" in name)
    expected = [f'{word.lower()}="{label(shown, word.lower())}"' for word in sorted(words)]
    told(tmp_path, replace(story, labels=", ".join(expected)), {f"{story.fires}m": 1})


def label(series: str, name: str) -> str:
    """A label's value in promtool's notation of a series."""
    (value,) = re.findall(rf'\b{name}="([^"]*)"', series)
    return str(value)


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
    # A link to the runbook is only there if somebody has said where the runbooks are (monitoring.runbookURL).
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["annotations"]["description"].endswith(".")


def test_each_alert_has_its_page_and_each_page_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == ALERTS.keys()


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_a_page_has_the_four_parts(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert f"**{ALERTS[name]['labels']['severity']}**" in text
