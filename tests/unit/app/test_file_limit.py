"""The limit of open files: a Persistent set keeps one."""

import resource
import subprocess
import sys

__all__: list[str] = []

CODE = """
import resource
from vcpuset.app.operator import raise_file_limit
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_operator_takes_as_many_open_files_as_it_may_have() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limited = ["prlimit", "--nofile=256:", sys.executable, "-c", CODE]
    found = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == [str(hard)] * 2
