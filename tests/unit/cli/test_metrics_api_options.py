"""The options of `vcpuset metrics-api`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vcpuset.cli import main as command_line
from vcpuset.cli import options
from vcpuset.metricsapi.settings import CertificateFiles, Settings

__all__: list[str] = []


class MetricsAPI:
    """Runs the command up to where it would begin to serve; `settings` are those that it then had."""

    def __init__(self) -> None:
        self.settings: Settings | None = None

    async def serve(self, settings: Settings) -> None:
        """Stand in for the server."""
        self.settings = settings

    def run(self, *arguments: str, **environment: str) -> Result:
        """The command with these arguments in this environment."""
        self.settings = None
        return CliRunner().invoke(command_line.main, ["metrics-api", *arguments], env=environment)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MetricsAPI:
    """The command, in a pod of the namespace `here`."""
    found = MetricsAPI()
    monkeypatch.setattr("vcpuset.metricsapi.server.run", found.serve)
    # The hooks of the interpreter, which belong to pytest here.
    monkeypatch.setattr(options, "configure", lambda *_: None)
    monkeypatch.setattr(options, "_OWN_NAMESPACE", tmp_path / "namespace")
    (tmp_path / "namespace").write_text("here")
    return found


def test_without_options_the_documented_defaults_hold(command: MetricsAPI) -> None:
    assert command.run().exit_code == 0
    assert command.settings == Settings(namespace="here")


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("--address", "[::]:443", "address", ("::", 443)),
        ("--health-address", "", "health_address", None),
        ("--health-address", "0.0.0.0:80", "health_address", ("0.0.0.0", 80)),  # noqa: S104 - nothing listens here
        ("--agent-namespace", "agents", "agent_namespace", "agents"),
        ("--controller-namespace", "control", "controller_namespace", "control"),
        ("--service-name", "metrics", "service", "metrics"),
        ("--service-namespace", "there", "namespace", "there"),
    ],
)
def test_an_option_can_be_given_as_a_flag_and_in_the_environment(
    command: MetricsAPI, flag: str, value: str, field: str, expected: object
) -> None:
    variable = f"VCPUSET_METRICS_API_{flag.removeprefix('--').replace('-', '_').upper()}"
    for result in (command.run(flag, value), command.run(**{variable: value})):
        assert result.exit_code == 0, result.output
        assert getattr(command.settings, field) == expected


def test_a_certificate_from_files_needs_both(command: MetricsAPI) -> None:
    assert command.run("--tls-cert-file=/tls/a", "--tls-private-key-file=/tls/b").exit_code == 0
    assert command.settings == Settings(namespace="here", files=CertificateFiles(Path("/tls/a"), Path("/tls/b")))
    for flag in ("--tls-cert-file=/tls/a", "--tls-private-key-file=/tls/b"):
        refused = command.run(flag)
        assert refused.exit_code == 2
        assert "belong together" in refused.output


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--address=", "--address must not be empty"),
        ("--address=8443", "is not HOST:PORT"),
        ("--agent-namespace=", "must not be empty"),
        ("--controller-namespace=A", "cannot be the name of a namespace"),
        ("--service-name=a.b", "cannot be the name of a Service"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(command: MetricsAPI, argument: str, words: str) -> None:
    refused = command.run(argument)
    assert refused.exit_code == 2
    assert words in refused.output
    assert command.settings is None


def test_outside_of_a_pod_the_namespace_must_be_given(command: MetricsAPI, tmp_path: Path) -> None:
    (tmp_path / "namespace").unlink()
    refused = command.run()
    assert refused.exit_code == 2
    assert "set the namespace of its Service with --service-namespace" in refused.output
    assert command.run("--service-namespace=there").exit_code == 0
