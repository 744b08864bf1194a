"""A program whose times are other ones in one process only."""

import os
import sys

import pytest

from harness.cache import REPOSITORY
from harness.hurried import main
from harness.processes import run

ENV = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
TOLD = (
    "from vcpuset.kube.transport import ANSWER_SECONDS, BACKOFF, LONGEST_SECONDS; "
    "print(ANSWER_SECONDS, BACKOFF.base_seconds, LONGEST_SECONDS)"
)


async def test_constants_of_modules_and_their_fields_are_set_before_the_program_begins() -> None:
    script = (
        "import sys; from unittest.mock import patch; from harness.hurried import main\n"
        f"with patch('vcpuset.cli.main.main', lambda args, prog_name: exec({TOLD!r})): main(sys.argv[1:])\n"
    )
    times = ("vcpuset.kube.transport.ANSWER_SECONDS=1.5", "vcpuset.kube.transport.BACKOFF.base_seconds=0.25")
    said = await run([sys.executable, "-c", script, *times, "--", "run"], env=ENV)
    assert said.stdout.split() == ["1.5", "0.25", "30.0"]


def test_a_constant_that_there_is_not_is_an_error() -> None:
    with pytest.raises(AttributeError, match="NO_SUCH_SECONDS"):
        main(["vcpuset.kube.transport.NO_SUCH_SECONDS=1", "--", "--version"])
