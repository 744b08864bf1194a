"""`kubectl vcpuset`, as kubectl finds it in PATH, beside a real operator and a real guest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import pytest
import pytest_asyncio
import yaml
from click.testing import CliRunner, Result

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.operator import OperatorProcess
from harness.processes import Child, Completed, run
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User
from vcpuset.cli.commands import inspect, plan
from vcpuset.cli.kubectl.main import complete, main

__all__: list[str] = []

WAIT = 90.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator of all namespaces."""
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running


class Shell:
    """A user's shell with kubectl and the plugin."""

    def __init__(self, control_plane: ControlPlane, folder: Path, namespace: str) -> None:
        programs = folder / "bin"
        programs.mkdir()
        for name, function in (("kubectl-vcpuset", "run"), ("kubectl_complete-vcpuset", "complete")):
            program = programs / name
            program.write_text(
                f"#!/bin/sh\nexec {sys.executable} -c "
                f"'from vcpuset.cli.kubectl.main import {function}; {function}()' \"$@\"\n"
            )
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.kubectl_path = control_plane.kubectl_path
        self._kubeconfig = folder / "kubeconfig"
        self.config: dict[str, Any] = yaml.safe_load(control_plane.kubeconfig.read_text())
        self.config["contexts"][0]["context"]["namespace"] = namespace
        self._kubeconfig.write_text(yaml.safe_dump(self.config))
        self.environment: dict[str, str] = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "KUBECONFIG": str(self._kubeconfig),
        }

    async def kubectl(self, *arguments: str, status: int = 0) -> Completed:
        """kubectl with these arguments, to the end that is expected."""
        done = await run([self.kubectl_path, *arguments], env=self.environment, check=False, timeout=300)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    async def plugin(self, *arguments: str, status: int = 0, kubeconfig: str | None = None) -> Result:
        """The plugin alone, in this process: kubectl does not change anything for it, and takes longer."""
        environment = {"KUBECONFIG": kubeconfig or self.environment["KUBECONFIG"]}
        result = await asyncio.to_thread(CliRunner(env=environment).invoke, main, arguments)
        assert result.exit_code == status, (result.exit_code, result.output, result.exception)
        return result

    def start(self, log: Path, *arguments: str) -> Child:
        """The same, to be ended by the test."""
        argv: list[str | Path] = [self.kubectl_path, "vcpuset", *arguments]
        return Child.start(argv, name="kubectl vcpuset", log=log, env=self.environment)


@pytest.fixture
def shell(control_plane: ControlPlane, tmp_path: Path, namespace: str) -> Shell:
    return Shell(control_plane, tmp_path, namespace)


async def test_a_machine_is_resized_watched_and_explained(
    operator: OperatorProcess, user: User, folder: Path, shell: Shell, tmp_path: Path
) -> None:
    async with saved_guest(smp="2,maxcpus=64", socket_dir=folder) as guest:
        await user.create("web", 2, "qmp0", unplug={"timeoutSeconds": 1, "retrySeconds": 3600})
        await user.wait_ready("web")
        log = tmp_path / "watch"
        watch = shell.start(log, "status", "--watch")
        try:
            await until(lambda: "Converged" in watch.log_tail(), WAIT, "the first table")

            done = await shell.kubectl("vcpuset", "set", "web", "4", "--wait")
            first, *_, last = done.stdout.splitlines()
            assert first == f"VCPUSet {user.namespace}/web: declared: 4 vCPUs"
            assert last == f"VCPUSet {user.namespace}/web: Converged: QEMU has 4 vCPUs, as declared."
            await guest.wait_online(4)
            await until(lambda: "  4        4  " in watch.log_tail(), WAIT, "the new count")
        finally:
            watch.signal(signal.SIGINT)
            await watch.wait(WAIT)
        assert "\x1b" not in watch.log_tail()
        assert "Traceback" not in watch.log_tail()

        await guest.hold_cpus(1, 2, 3)
        failed = await shell.kubectl("vcpuset", "set", "web", "1", "--wait", "--timeout=300", status=1)
        assert failed.stdout.splitlines()[-1].startswith(f"VCPUSet {user.namespace}/web: UnplugRefused: ")
        assert "UnplugRefused. Stop what uses the CPUs in the guest" in failed.stderr

        explained = (await shell.plugin("explain", "web")).stdout
        for words in (
            "Current:     4 (1 to 64 possible; 60 free",
            "UnplugRefused (Stalled=True, for ",
            "Remedy: Stop what uses the CPUs in the guest",
            "See docs/reasons.md#unplugrefused",
            "device busy (_OST 0x82)",
        ):
            assert words in explained

        async def events() -> bool:
            printed = await shell.plugin("explain", "web", "-o", "json")
            return any(each["reason"] == "UnplugRefused" for each in json.loads(printed.stdout)["events"])

        await until(events, WAIT, "the Event")
        await guest.release_cpus()
        await shell.plugin("set", "web", "4", "--wait")

        (found,) = json.loads((await shell.plugin("status", "-o", "json")).stdout)["items"]
        assert (found["name"], found["desiredVCPUs"], found["vcpus"], found["ready"]) == ("web", 4, 4, "True")
        wide = (await shell.plugin("status", "-A", "-o", "wide")).stdout.splitlines()
        assert wide[0].split()[:3] == ["NAMESPACE", "NAME", "DESIRED"]
        assert any(line.startswith(user.namespace) and line.endswith("QEMU has 4 vCPUs, as declared.") for line in wide)


async def test_a_suspended_set_is_left_alone_and_its_count_cannot_be_waited_for(
    operator: OperatorProcess, user: User, folder: Path, shell: Shell
) -> None:
    async with saved_guest(smp="2,maxcpus=64", socket_dir=folder):
        await user.create("web", 2, "qmp0")
        await user.wait_ready("web")
        await shell.plugin("suspend", "web")
        failed = await shell.plugin("set", "web", "3", "--wait", status=1)
        assert "Suspended. Set spec.suspend to false." in failed.stderr
        assert (await user.get("web")).vcpus == 2
        await shell.plugin("resume", "web")
        assert (await user.wait_ready("web")).vcpus == 3


async def test_a_set_that_nobody_manages_is_not_ready_in_time_and_another_count_ends_the_wait(
    user: User, shell: Shell, tmp_path: Path
) -> None:
    await user.create("web", 2, nodeName="nowhere")
    late = await shell.plugin("set", "web", "3", "--wait", "--timeout=0.5", status=3)
    assert "not Ready within 0.5 s: Unreported. Wait. If this stays: check that an operator runs" in late.stderr
    waiting = shell.start(tmp_path / "log", "set", "web", "4", "--wait")
    try:

        async def declared() -> bool:
            return bool((await user.get("web")).body["spec"]["vcpus"] == 4)

        await until(declared, WAIT, "the count")
        await user.scale("web", 5)
        assert await waiting.wait(WAIT) == 1
        assert "another client (an autoscaler?) has declared 5 vCPUs meanwhile" in waiting.log_tail()
    finally:
        waiting.kill()


async def test_what_the_api_server_refuses_is_told_with_the_right_that_is_missing(
    control_plane: ControlPlane, user: User, shell: Shell, tmp_path: Path
) -> None:
    await user.create("web", 2, maxVCPUs=4)
    refused = await shell.plugin("set", "web", "5", status=1)
    assert "vcpus must be at most maxVCPUs" in refused.stderr
    missing = await shell.plugin("explain", "nobody", status=1)
    assert f"There is no VCPUSet {user.namespace}/nobody" in missing.stderr
    assert "kubectl vcpuset status -n" in missing.stderr

    account = f"/api/v1/namespaces/{user.namespace}/serviceaccounts"
    assert (await control_plane.request("POST", account, {"metadata": {"name": "reader"}})).status == 201
    reader = str(await control_plane.service_account_kubeconfig(user.namespace, "reader"))
    for arguments, role in (
        (("status",), "vcpuset-view"),
        (("explain", "web"), "vcpuset-view"),
        (("set", "web", "3"), "vcpuset-edit"),
        (("suspend", "web"), "vcpuset-edit"),
        (("status", "--watch"), "vcpuset-view"),
    ):
        denied = await shell.plugin(*arguments, "--kubeconfig", reader, status=1)
        assert "HTTP 403" in denied.stderr
        assert f"binding of the ClusterRole {role}" in denied.stderr


async def test_contexts_and_several_kubeconfigs_mean_what_they_mean_for_kubectl(
    control_plane: ControlPlane, user: User, shell: Shell, tmp_path: Path
) -> None:
    await user.create("web", 2)
    own, other = shell.environment["KUBECONFIG"], str(tmp_path / "other")
    (context,) = shell.config["contexts"]
    elsewhere = {"name": "elsewhere", "context": {**context["context"], "namespace": "kube-system"}}
    config = {"apiVersion": "v1", "kind": "Config", "contexts": [elsewhere], "current-context": "elsewhere"}
    (tmp_path / "other").write_text(yaml.safe_dump(config))
    for files, arguments, found in (
        ([own, other], [], True),
        ([other, own], [], False),  # the first file that names a context counts
        ([own, other], ["--context", "elsewhere"], False),
        ([own, other], ["-n", "kube-system"], False),
        ([other, own], ["-n", user.namespace], True),
    ):
        kubeconfig = os.pathsep.join(files)
        for words in (["status", *arguments], [*arguments, "status"]):
            done = await shell.plugin(*words, kubeconfig=kubeconfig)
            assert ("web" in done.output) == found, (files, words)
            assert ("No VCPUSets found in namespace kube-system.\n" in done.stderr) != found
        argv: list[str | Path] = [shell.kubectl_path, "get", "vcpusets", "-o", "name", *arguments]
        got = await run(argv, env={**shell.environment, "KUBECONFIG": kubeconfig})
        assert ("web" in got.stdout) == found, "kubectl itself"
    unknown = await shell.plugin("status", "--context", "nope", status=1)
    assert "it has no context 'nope': `kubectl config get-contexts` lists them" in unknown.stderr


async def test_kubectl_completes_the_plugin_s_commands_options_and_names(
    user: User, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await user.create("web-1", 2)
    await user.create("db-1", 2)

    monkeypatch.setenv("KUBECONFIG", shell.environment["KUBECONFIG"])

    async def completed(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["kubectl_complete-vcpuset", *words])
        result = await asyncio.to_thread(CliRunner().invoke, click.command()(complete))
        return [line.partition("\t")[0] for line in result.stdout.splitlines()]

    by_kubectl = (await shell.kubectl("__complete", "vcpuset", "s")).stdout.splitlines()
    assert [line.partition("\t")[0] for line in by_kubectl] == ["set", "status", "suspend", ":4"]
    assert all(line.partition("\t")[2] for line in by_kubectl[:-1]), "each has a description"
    assert await completed("status", "--wat") == ["--watch", ":4"]
    assert await completed("explain", "we") == ["web-1", ":4"]
    assert await completed("suspend", "db-1", "") == ["db-1", "web-1", ":4"]
    assert await completed("-n", "kube-system", "explain", "") == [":4"]
    assert await completed("status", "--kubeconfig", "") == [":0"], "a file"
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    assert await completed("explain", "") == [":4"], "what fails here is told by the command itself"


async def test_the_commands_for_a_monitor_are_those_of_vcpuset(shell: Shell) -> None:
    assert (main.commands["plan"], main.commands["inspect"]) == (plan, inspect)
    nothing = await shell.plugin("inspect", "/nowhere/qmp.sock", status=1)
    assert "There is no /nowhere/qmp.sock" in nothing.stderr


async def test_the_page_shows_what_the_commands_print(
    operator: OperatorProcess, user: User, folder: Path, shell: Shell
) -> None:
    page = Page(REPOSITORY / "docs" / "kubectl.md")

    def alike(text: str) -> str:
        """Without what differs from one run to the next: the namespace, times, and a plug that takes long."""
        text = re.sub(r"^.*: Plugging: .*\n", "", text.replace(f"{user.namespace}/", "default/"), flags=re.MULTILINE)
        return re.sub(r"\b(\d+[smh]){1,2}(?=$|\))", "…", text, flags=re.MULTILINE)

    async with saved_guest(smp="2,maxcpus=64", socket_dir=folder):
        await user.create("web", 2, "qmp0")
        await user.wait_ready("web")
        examples = [each for block in page.blocks("console", "example") for each in block.commands()]
        assert len(examples) == 3
        for command, expected in examples:
            kubectl, plugin, *arguments = command.split()
            assert (kubectl, plugin) == ("kubectl", "vcpuset")
            assert alike((await shell.plugin(*arguments)).output) == alike(expected), command


async def test_the_page_names_every_field_of_the_documents_and_every_command(user: User, shell: Shell) -> None:
    text = (REPOSITORY / "docs" / "kubectl.md").read_text()
    await user.create("web", 2)
    for command in (["status"], ["explain", "web"]):
        found = json.loads((await shell.plugin(*command, "-o", "json")).stdout)
        for name in (*found, *(field for item in found.get("items", ()) for field in item)):
            assert f"`{name}`" in text, name
    for name in main.commands:
        assert re.search(rf"`{name}\b", text), name
