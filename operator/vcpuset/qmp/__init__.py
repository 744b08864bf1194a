"""Talking to QEMU: the only room that imports `qemu.qmp`.

sockets    from what a VCPUSet names to an endpoint that cannot be swapped for another one
monitors   the monitors of all sets, and the sessions that are kept between passes
session    one monitor connection: observe, plug, unplug, what the guest answers; every wait has a deadline
client     `qemu.qmp`'s client with what a long-running program needs of it
replies    QEMU's replies as domain values
translate  foreign errors as ours: the tree in `vcpuset.domain.errors`
"""
