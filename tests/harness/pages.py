"""The parts of the documentation that are made from the code: written by `make docs`, verified by `make check`.

    <!-- generated: reasons -->
    …
    <!-- end of generated: reasons -->

What stands between two such lines is replaced; the prose around them is written by hand and left as it is.
"""

from __future__ import annotations

import argparse
import functools
import html
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import yaml
from prometheus_client.core import Metric
from rich.console import Console

from harness import reference
from harness.cache import REPOSITORY
from harness.examples import NOW, examples
from harness.gitops import Verdicts, verdicts
from unit.domain.builders import a_set
from vcpuset.app.collectors import Snapshot
from vcpuset.app.history import History
from vcpuset.app.metrics import QMP_COMMANDS, Metrics
from vcpuset.cli.kubectl import explain
from vcpuset.cli.render import Facts, Heading, Lines, renderable
from vcpuset.domain.guest import AgentReason
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import UNREPORTED
from vcpuset.domain.resource import UID, Spec, Status, UnixMonitor, VCPUSet
from vcpuset.kube.freshness import Freshness
from vcpuset.runtime.workqueue import QueueStatistics

__all__ = [
    "PAGES",
    "OutOfPlace",
    "agent",
    "alerts",
    "answers",
    "health",
    "main",
    "process_metrics",
    "reason_in_words",
    "reasons",
    "renewed",
    "set_metrics",
    "unreported",
]

DOCS: Final = REPOSITORY / "docs"
PAGES: Final = (
    *(DOCS / f"{name}.md" for name in ("conditions", "reasons", "gitops", "operations", "api")),
    reference.CHART / "README.md",
)

RULES: Final = REPOSITORY / "deploy" / "components" / "monitoring" / "rules.yaml"

EXPLAIN_COLUMNS: Final = 90
"""The width of the terminal on which `kubectl vcpuset explain` is shown."""

_PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end of generated: \2 -->\n)", re.DOTALL)
_MARK = re.compile(r"<!-- (?:end of )?generated: ")


class OutOfPlace(ValueError):
    """The marks of a page do not come in pairs, or name a part that nobody makes."""


def reasons() -> str:
    """The reasons of Ready, Reconciling and Stalled, in the order of the list."""
    rows = [
        (f"[`{reason}`](reasons.md#{reason.lower()})", _true_condition(reason), reason.meaning, reason.remedy)
        for reason in Reason
    ]
    return _table(("reason", "true condition", "meaning", "remedy"), rows)


def health() -> str:
    """What GitOps controllers make of the reasons."""

    groups: dict[Verdicts, list[str]] = {}
    for reason in Reason:
        for state in reason.states:
            groups.setdefault(verdicts(reason, state), []).append(f"`{reason}`")
    rows = [(", ".join(found), group.kstatus, group.expressions, group.argocd) for group, found in groups.items()]
    return _table(("reasons", "Flux", "Flux, with the expressions", "Argo CD, with the script"), rows)


def reason_in_words(reason: Reason) -> str:
    """What the section of a reason begins with."""
    condition = _true_condition(reason)
    states = "All three conditions are False" if condition == "none" else f"True condition: {condition}"
    remedy = "Nothing." if reason is Reason.CONVERGED else reason.remedy
    example = examples()[reason, reason.states[-1]]
    return f"{states}. {reason.meaning}\n\n{_explained(example)}\n\n**What to do:** {remedy}"


def unreported() -> str:
    """What the section of a VCPUSet without a report begins with."""
    return _explained(a_set())


def _explained(vcpuset: VCPUSet) -> str:
    """What `kubectl vcpuset explain` prints two seconds after the report, without what says nothing of the reason."""
    console = Console(file=io.StringIO(), width=EXPLAIN_COLUMNS, highlight=False, markup=False, emoji=False)
    for block in explain.page(explain.Explanation(vcpuset, None, None, NOW + timedelta(seconds=2))):
        match block:
            case Heading():
                continue
            case Facts(rows):
                shown = Facts([(name, value) for name, value in rows if name not in {"Monitor", "Managed by"}])
                console.print(renderable(shown))
            case Lines(lines, indent) if indent:  # the message; then the remedy, and the address of this section
                console.print(renderable(replace(block, lines=lines[:1])))
            case _:
                console.print(renderable(block))
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    return f"`kubectl vcpuset explain` prints:\n\n```text\n{text}\n```"


def agent() -> str:
    """The reasons of GuestAgentConnected."""
    rows = [(f"`{reason}`", reason.status, reason.meaning) for reason in AgentReason]
    return _table(("reason", "GuestAgentConnected", "meaning"), rows)


def answers() -> str:
    """What a guest can answer to an unplug request."""
    rows = [(f"`{answer.value}`", answer.words, "yes" if answer.refused else "no") for answer in Answer]
    return _table(("answer", "meaning", "a refusal"), rows)


def process_metrics() -> str:
    """What a process shows of itself and of what it does."""
    metrics = Metrics(workers=1)
    History(metrics.registry)
    metrics.watch_queue(_no_statistics)
    metrics.watch_freshness(Freshness())
    metrics.watch_events(int, int)
    metrics.watch_leadership("vcpuset-controller", bool)
    metrics.watch_agents(int)
    # Labels are seen in samples only, and these families have none before something has failed.
    metrics.commanded(QMP_COMMANDS[0], 0.0, "timeout")
    return _metrics(metrics.registry.collect())


def set_metrics() -> str:
    """What is shown of the sets."""
    spec = Spec(2, UnixMonitor("web.sock"))
    status = Status(1, vcpus=2, online_vcpus=2)
    web = VCPUSet(UID("1"), "default", "web", 1, "1", datetime(2026, 1, 1, tzinfo=UTC), spec, status)
    return _metrics(Snapshot([web], {}, 1, web.created_at, {web.uid: (1.0, 1.0)}).collect())


def alerts() -> str:
    """The shipped alerts."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["spec"]["groups"] for rule in group["rules"]]
    rows = [
        (f"[{name}](runbooks/{name}.md)", rule["labels"]["severity"], _bare(rule["annotations"]["summary"]))
        for rule in rules
        for name in [rule["alert"]]
    ]
    return _table(("alert", "severity", "summary"), rows)


def _metrics(families: Iterable[Metric]) -> str:
    suffixes = {"counter": "_total", "info": "_info"}
    rows = []
    for family in families:
        labels = dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
        rows.append(
            (
                f"`{family.name}{suffixes.get(family.type, '')}`",
                "gauge" if family.type == "info" else family.type,
                ", ".join(f"`{name}`" for name in labels),
                html.escape(family.documentation, quote=False),
            )
        )
    return _table(("metric", "type", "labels", "meaning"), rows)


def _bare(text: str) -> str:
    """A text of an alert without Prometheus' templates."""
    return re.sub(r"\{\{[^}]*\}\}", "…", text)


def _no_statistics() -> QueueStatistics:
    return QueueStatistics(0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def _true_condition(reason: Reason) -> str:
    words = {State.HELD: "none", State.UNKNOWN: "none (Ready is Unknown)"}
    return ", then ".join(words.get(state, state.value) for state in reason.states)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "reasons": reasons,
    "health": health,
    "agent": agent,
    "answers": answers,
    "process_metrics": process_metrics,
    "set_metrics": set_metrics,
    "alerts": alerts,
    "api": reference.api,
    "values": reference.values,
    UNREPORTED: unreported,
    **{str(reason): functools.partial(reason_in_words, reason) for reason in Reason},
}


def renewed(text: str) -> str:
    """A page with its generated parts as they should be. OutOfPlace: its marks are wrong."""

    def part(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name not in _PARTS:
            raise OutOfPlace(f"nothing is generated under the name {name!r}, only {', '.join(_PARTS)}")
        return f"{begin}\n{_PARTS[name]()}\n\n{end}"

    made, parts = _PART.subn(part, text)
    if not parts or len(_MARK.findall(text)) != 2 * parts:
        raise OutOfPlace("each `<!-- generated: NAME -->` needs a line `<!-- end of generated: NAME -->`")
    return made


def main(arguments: Sequence[str] | None = None, pages: Sequence[Path] = PAGES) -> int:
    """Write the pages; with --check, only say which are not up to date (status 1)."""
    parser = argparse.ArgumentParser(prog="python -m harness.pages", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not up to date")
    check = parser.parse_args(arguments).check
    stale = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        try:
            made = renewed(text)
        except OutOfPlace as error:
            sys.stderr.write(f"{page}: {error}\n")
            return 2
        if made != text:
            stale.append(page)
            if not check:
                page.write_text(made, encoding="utf-8")
    for page in stale:
        sys.stderr.write(f"{page}: {'is not up to date: run `make docs`' if check else 'written'}\n")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
