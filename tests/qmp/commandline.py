"""The command line on real machines: `await vcpuset("inspect", path)`."""

from __future__ import annotations

import asyncio

from click.testing import CliRunner, Result

from vcpuset.cli.main import main

__all__ = ["manifest", "vcpuset"]


async def vcpuset(*arguments: object, text: str | None = None, status: int = 0) -> Result:
    """Run `vcpuset` with these arguments, and `text` on its standard input, to the end that is expected."""
    # In a thread: the command has an event loop of its own. Deadlines are long, since the machine may be busy.
    words = [*map(str, arguments), *([] if "--timeout" in arguments else ["--timeout", "60"])]
    result = await asyncio.to_thread(CliRunner().invoke, main, words, input=text)
    assert result.exit_code == status, (result.output, result.exception)
    return result


def manifest(vcpus: int, path: str = "qmp0", *, name: str = "web", spec: str = "") -> str:
    """A VCPUSet by hand; `spec` is more of it, in YAML's flow style."""
    return (
        f"apiVersion: vcpuset.dev/v1alpha1\nkind: VCPUSet\nmetadata: {{name: {name}, namespace: team-a}}\n"
        f"spec: {{vcpus: {vcpus}, monitor: {{unix: {{path: {path}}}}}{', ' if spec else ''}{spec}}}\n"
    )
