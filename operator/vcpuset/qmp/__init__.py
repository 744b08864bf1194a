"""Talking to QEMU and to the agents of its guests: the only package that imports `qemu.qmp`.

sockets     from what a VCPUSet names to an endpoint that cannot be swapped for another one
monitors    the monitors of all sets, and the sessions that are kept between passes
session     one monitor connection: observe, plug, unplug, what the guest answers; every wait has a deadline
peer        what the kernel tells of the other end of a connection
agent       one conversation with a guest agent
guests      what the guests of all sets say, asked for beside the passes
ratelimiter how often guests and agents may wake a pass
watcher     a monitor's socket that comes, goes or is replaced
files       calls to file systems, which may hang
client      `qemu.qmp`'s client with what a long-running program needs of it
replies     replies of QEMU and of agents as domain values
translate   foreign errors as ours: the tree in `vcpuset.domain.errors`
"""
