"""Ports for servers that cannot share one that is reserved."""

import os
import sys
from pathlib import Path

from harness.cache import REPOSITORY
from harness.processes import BLOCKS, FIRST_PORT, PORTS, free_port, run

ENV = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}


async def test_no_two_processes_are_given_one_port_though_no_server_listens_yet() -> None:
    mine = {free_port() for _ in range(20)}
    script = f"import harness.processes as p; print(*[p.free_port() for _ in range({PORTS})])"
    theirs = {int(each) for each in (await run([sys.executable, "-c", script], env=ENV)).stdout.split()}
    assert mine
    assert mine.isdisjoint(theirs)
    assert all(FIRST_PORT <= port < FIRST_PORT + BLOCKS * PORTS for port in mine | theirs)


def test_ports_are_below_those_that_the_kernel_hands_out() -> None:

    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert int(first) >= FIRST_PORT + BLOCKS * PORTS
