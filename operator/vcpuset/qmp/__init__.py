"""Connections to QEMU and to the agents of its guests: the only package that imports `qemu.qmp`.

sockets     from the path in a VCPUSet to an endpoint that cannot be swapped for another one
monitors    the monitors of all sets, and the sessions that are kept between passes
session     one monitor connection: observe, plug, unplug, answers of the guest; every wait has a deadline
peer        the kernel's information about the other end of a connection
agent       one connection to a guest agent
guests      queries of the guest agents, concurrent with reconciliations
ratelimiter how often guests and agents may wake a pass
watcher     triggers a pass when a monitor's socket appears, disappears or is replaced
files       calls to file systems, which may hang
client      `qemu.qmp`'s client with what a long-running program needs
replies     replies of QEMU and of agents as domain values
translate   foreign errors as ours: the tree in `vcpuset.domain.errors`
"""
