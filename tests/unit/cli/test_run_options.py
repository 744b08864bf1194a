"""The options of `vcpuset run`: flag, environment variable, default, and what is said about a bad value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harness import selectors
from vcpuset.app.settings import LeaderElection, Settings
from vcpuset.cli import main as command_line
from vcpuset.cli import options
from vcpuset.domain.networks import Networks, network

__all__: list[str] = []


class Vcpuset:
    """Runs `vcpuset run` up to where the operator would begin.

    settings  what the operator was started with; None: it was not
    """

    def __init__(self) -> None:
        self.settings: Settings | None = None

    async def operator(self, settings: Settings) -> None:
        """Stand in for the operator."""
        self.settings = settings

    def run(self, *arguments: str, **environment: str) -> Result:
        """`vcpuset run` with these arguments in this environment."""
        self.settings = None
        return CliRunner().invoke(command_line.main, ["run", *arguments], env=environment)

    def settings_of(self, *arguments: str, **environment: str) -> Settings:
        """What the operator is started with."""
        result = self.run(*arguments, **environment)
        assert result.exit_code == 0, result.output
        assert self.settings is not None
        return self.settings


@pytest.fixture
def vcpuset(monkeypatch: pytest.MonkeyPatch) -> Vcpuset:
    """The command, in an environment without any of its variables."""
    for flag in FLAGS:
        monkeypatch.delenv(_variable(flag), raising=False)
    found = Vcpuset()
    monkeypatch.setattr("vcpuset.app.operator.run", found.operator)
    # The hooks of the interpreter, which belong to pytest here.
    monkeypatch.setattr(options, "configure", lambda *_: None)
    return found


FLAGS = (
    "--node-name",
    "--namespace",
    "--label-selector",
    "--socket-root",
    "--allow-tcp",
    "--workers",
    "--resync-seconds",
    "--sweep-seconds",
    "--http-address",
    "--metrics-set-limit",
    "--agent-namespace",
    "--agent-grace-seconds",
    "--leader-elect",
    "--leader-elect-namespace",
    "--leader-elect-name",
    "--leader-elect-lease-duration",
    "--leader-elect-renew-deadline",
    "--leader-elect-retry-period",
    "--log-format",
    "--log-level",
    "--kubeconfig",
)


def _variable(flag: str) -> str:
    return "VCPUSET_" + flag.removeprefix("--").replace("-", "_").upper()


def test_without_options_the_documented_defaults_hold(vcpuset: Vcpuset) -> None:
    settings = vcpuset.settings_of()

    assert settings == Settings()
    assert settings.resync_seconds == 60
    assert settings.sweep_seconds == 300
    assert settings.http_address == ("127.0.0.1", 8080)
    assert settings.node_name is None
    assert settings.label_selector is None
    assert settings.socket_root is None
    assert settings.kubeconfig is None
    assert settings.namespaces == ()
    assert settings.networks == Networks()
    assert settings.leader_election is None
    assert settings.agent_namespace is None
    assert settings.agent_grace_seconds == 60


def test_an_agent_does_not_look_after_the_sets_of_other_nodes(vcpuset: Vcpuset) -> None:
    result = vcpuset.run("--node-name=node-1", "--agent-namespace=vcpuset-agent")
    assert result.exit_code == 2
    assert "--agent-namespace cannot be combined with --node-name" in result.output
    assert "Leave out --agent-namespace" in result.output


CHOICES: list[tuple[str, str, str, Any]] = [
    ("--node-name", "node-7", "node_name", "node-7"),
    ("--namespace", "team-a", "namespaces", ("team-a",)),
    ("--label-selector", "tier in (web, db)", "label_selector", "tier in (web, db)"),
    ("--socket-root", "/run/vcpuset", "socket_root", Path("/run/vcpuset")),
    ("--workers", "3", "workers", 3),
    ("--resync-seconds", "7", "resync_seconds", 7),
    ("--sweep-seconds", "8", "sweep_seconds", 8),
    ("--http-address", "0.0.0.0:9090", "http_address", ("0.0.0.0", 9090)),  # noqa: S104 - nothing listens here
    ("--metrics-set-limit", "0", "metrics_set_limit", 0),
    ("--agent-namespace", "agents", "agent_namespace", "agents"),
    ("--agent-grace-seconds", "90", "agent_grace_seconds", 90),
    ("--kubeconfig", __file__, "kubeconfig", Path(__file__)),
]


@pytest.mark.parametrize(("flag", "value", "field", "expected"), CHOICES, ids=[choice[0] for choice in CHOICES])
def test_an_option_can_be_given_as_a_flag_and_in_the_environment(
    vcpuset: Vcpuset, flag: str, value: str, field: str, expected: object
) -> None:
    assert getattr(vcpuset.settings_of(flag, value), field) == expected
    assert getattr(vcpuset.settings_of(**{_variable(flag): value}), field) == expected


def test_a_flag_goes_before_the_environment(vcpuset: Vcpuset) -> None:
    assert vcpuset.settings_of("--workers", "3", VCPUSET_WORKERS="5").workers == 3


def test_several_namespaces_are_repeated_flags_or_words_in_the_environment(vcpuset: Vcpuset) -> None:
    assert vcpuset.settings_of("--namespace", "a", "--namespace", "b").namespaces == ("a", "b")
    assert vcpuset.settings_of(VCPUSET_NAMESPACE="a b").namespaces == ("a", "b")


def test_several_networks_are_repeated_flags_or_words_in_the_environment(vcpuset: Vcpuset) -> None:
    both = Networks((network("10.0.0.0/8"), network("2001:db8::/32")))
    assert vcpuset.settings_of("--allow-tcp", "10.0.0.0/8", "--allow-tcp=2001:db8::/32").networks == both
    assert vcpuset.settings_of(VCPUSET_ALLOW_TCP="10.0.0.0/8 2001:db8::/32").networks == both
    assert vcpuset.settings_of(VCPUSET_ALLOW_TCP="").networks == Networks()


def test_what_is_no_network_is_refused_with_the_remedy(vcpuset: Vcpuset) -> None:
    result = vcpuset.run("--allow-tcp", "10.0.0.1/8")

    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert "Invalid value for '--allow-tcp'" in words
    assert "'10.0.0.1/8' has host bits set" in words
    assert "use 10.0.0.0/8" in words
    assert vcpuset.settings is None


@pytest.mark.parametrize("selector", selectors.TAKEN)
def test_what_an_api_server_takes_as_a_label_selector_is_taken(vcpuset: Vcpuset, selector: str) -> None:
    assert vcpuset.settings_of("--label-selector", selector).label_selector == selector


@pytest.mark.parametrize("selector", selectors.REFUSED)
def test_what_an_api_server_refuses_as_a_label_selector_is_refused_at_the_start(
    vcpuset: Vcpuset, selector: str
) -> None:
    result = vcpuset.run("--label-selector", selector)

    assert result.exit_code == 2
    assert "is not a label selector" in " ".join(result.output.split())
    assert vcpuset.settings is None


@pytest.mark.parametrize("flag", ["--node-name", "--label-selector"])
def test_an_empty_name_is_none(vcpuset: Vcpuset, flag: str) -> None:
    field = flag.removeprefix("--").replace("-", "_")

    assert getattr(vcpuset.settings_of(flag, ""), field) is None
    assert getattr(vcpuset.settings_of(**{_variable(flag): ""}), field) is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        pytest.param("", None, id="off"),
        pytest.param("localhost:0", ("localhost", 0), id="any port"),
        pytest.param("[::1]:8080", ("::1", 8080), id="IPv6"),
        pytest.param("[::]:65535", ("::", 65535), id="IPv6, all addresses, the last port"),
    ],
)
def test_the_http_address_is_host_and_port(vcpuset: Vcpuset, text: str, address: tuple[str, int] | None) -> None:
    assert vcpuset.settings_of("--http-address", text).http_address == address


@pytest.mark.parametrize("text", ["8080", "localhost", ":8080", "localhost:", "localhost:http", "localhost:65536"])
def test_what_is_no_http_address_is_refused(vcpuset: Vcpuset, text: str) -> None:
    result = vcpuset.run("--http-address", text)

    assert result.exit_code == 2
    assert "Invalid value for '--http-address'" in result.output
    assert f"{text!r} is not HOST:PORT (or empty, for off)" in result.output
    assert vcpuset.settings is None


def test_an_empty_http_address_in_the_environment_is_off(vcpuset: Vcpuset) -> None:
    assert vcpuset.settings_of(VCPUSET_HTTP_ADDRESS="").http_address is None


@pytest.mark.parametrize("text", ["[::1:8080", "::1:8080"])
def test_an_ipv6_address_needs_its_brackets(vcpuset: Vcpuset, text: str) -> None:
    assert vcpuset.run("--http-address", text).exit_code == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--workers", "0"),
        ("--workers", "1025"),
        ("--workers", "many"),
        ("--resync-seconds", "0.5"),
        ("--resync-seconds", "86401"),
        ("--resync-seconds", "a minute"),
        ("--resync-seconds", "inf"),
        ("--resync-seconds", "nan"),
        ("--log-format", "xml"),
        ("--log-level", "loud"),
        ("--kubeconfig", "/nowhere/kubeconfig"),
        ("--kubeconfig", "/"),
        ("--leader-elect", "maybe"),
        ("--leader-elect-lease-duration", "15m"),
        ("--leader-elect-renew-deadline", "0.5s"),
        ("--leader-elect-retry-period", "-2"),
        ("--socket-root", __file__),
    ],
)
def test_a_bad_value_is_refused_with_the_name_of_its_flag(vcpuset: Vcpuset, flag: str, value: str) -> None:
    given = (f"{flag}={value}",) if flag != "--leader-elect" else ()  # which takes no value
    for result in (*map(vcpuset.run, given), vcpuset.run(**{_variable(flag): value})):
        assert result.exit_code == 2
        assert f"Invalid value for '{flag}'" in result.output
        assert vcpuset.settings is None


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--namespace", "Default", "'Default' cannot be the name of a namespace: use up to 63 lower-case letters"),
        ("--namespace", "a.b", "cannot be the name of a namespace"),
        ("--namespace", "a" * 64, "cannot be the name of a namespace"),
        ("--namespace", "a,b", "Repeat --namespace for each (in the environment: separate them by spaces)"),
        ("--allow-tcp", "10.0.0.0/8,192.0.2.0/24", "Repeat --allow-tcp for each (in the environment: separate them"),
        ("--node-name", "Node_1", "'Node_1' cannot be the name of a node: use up to 253 lower-case letters"),
        ("--node-name", "node-1,node-2", "cannot be the name of a node"),
        ("--node-name", "a." * 127, "cannot be the name of a node"),
        ("--leader-elect-namespace", "kube_system", "cannot be the name of a namespace"),
        ("--leader-elect-name", "Mine", "cannot be the name of a Lease"),
    ],
)
def test_what_kubernetes_could_never_accept_is_refused_at_the_start(
    vcpuset: Vcpuset, flag: str, value: str, words: str
) -> None:
    for result in (vcpuset.run(f"{flag}={value}"), vcpuset.run(**{_variable(flag): value})):
        assert result.exit_code == 2
        assert f"Invalid value for '{flag}'" in result.output
        assert words in " ".join(result.output.replace("│", " ").split())
        assert vcpuset.settings is None


@pytest.mark.parametrize("name", ["node-1.example.com", "7", "a" * 63, f"{'a' * 63}.{'b' * 63}"])
def test_a_node_may_have_any_name_that_kubernetes_accepts(vcpuset: Vcpuset, name: str) -> None:
    assert vcpuset.settings_of("--node-name", name).node_name == name


@pytest.mark.parametrize("flag", ["--socket-root", "--namespace"])
def test_an_empty_value_does_not_widen_what_is_served(vcpuset: Vcpuset, flag: str) -> None:
    assert vcpuset.run(flag, "").exit_code == 2


def test_the_help_lists_every_option() -> None:
    text = CliRunner().invoke(command_line.main, ["run", "--help"]).output

    for flag in FLAGS:
        assert flag in text
        assert _variable(flag) in text
    assert "127.0.0.1:8080" in text
    assert "60" in text


def test_an_unknown_option_and_an_unknown_command_are_refused() -> None:
    assert "No such option" in CliRunner().invoke(command_line.main, ["run", "--nodename", "x"]).output
    assert "No such command" in CliRunner().invoke(command_line.main, ["walk"]).output


def test_the_command_tells_its_version() -> None:
    result = CliRunner().invoke(command_line.main, ["--version"])

    assert result.exit_code == 0
    assert "version" in result.output


def test_leader_election_has_the_times_of_client_go(vcpuset: Vcpuset) -> None:
    expected = LeaderElection(
        namespace="system", name="vcpuset-controller", lease_seconds=15, renew_seconds=10, retry_seconds=2
    )

    given = vcpuset.settings_of("--leader-elect", "--leader-elect-namespace", "system").leader_election
    assert given == expected
    environment = {"VCPUSET_LEADER_ELECT": "true", "VCPUSET_LEADER_ELECT_NAMESPACE": "system"}
    assert vcpuset.settings_of(**environment).leader_election == expected
    assert vcpuset.settings_of("--no-leader-elect", **environment).leader_election is None


def test_the_times_of_leader_election_may_have_their_unit(vcpuset: Vcpuset) -> None:
    settings = vcpuset.settings_of(
        "--leader-elect",
        "--leader-elect-namespace=system",
        "--leader-elect-name=mine",
        "--leader-elect-lease-duration=60s",
        "--leader-elect-renew-deadline=40",
        "--leader-elect-retry-period=2.5s",
    )

    assert settings.leader_election == LeaderElection(
        namespace="system", name="mine", lease_seconds=60, renew_seconds=40, retry_seconds=2.5
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--leader-elect-lease-duration=10s"], "must be longer than --leader-elect-renew-deadline (10 s)"),
        pytest.param(["--leader-elect-retry-period=9"], "longer than 1.2 times --leader-elect-retry-period (9 s)"),
        pytest.param(["--leader-elect-lease-duration=15.5s"], "only supports whole seconds"),
        pytest.param(["--node-name=n1"], "--leader-elect cannot be combined with --node-name"),
        pytest.param(["--leader-elect-name="], "must not be empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_leader_election_cannot_work_with_is_refused(vcpuset: Vcpuset, arguments: list[str], words: str) -> None:
    result = vcpuset.run("--leader-elect", "--leader-elect-namespace=system", *arguments)

    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert vcpuset.settings is None


def test_the_lease_is_in_the_pods_own_namespace_if_nothing_else_is_said(
    vcpuset: Vcpuset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(options, "_OWN_NAMESPACE", tmp_path / "namespace")
    refused = vcpuset.run("--leader-elect")
    assert refused.exit_code == 2
    assert "set the namespace of the Lease with --leader-elect-namespace" in refused.output
    (tmp_path / "namespace").write_text("vcpuset-system")

    election = vcpuset.settings_of("--leader-elect").leader_election

    assert election is not None
    assert election.namespace == "vcpuset-system"
