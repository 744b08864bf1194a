"""Generic asyncio parts of the operator: they know neither Kubernetes nor QEMU.

    workqueue   which key needs work, when, and that no key is worked on twice at once
    workers     tasks that serve a work queue, and the one place that turns an outcome into queue calls
    claims      which claimant owns a thing that several name
    tasks       background tasks whose owner always notices their end
    logcontext  fields for every log line of a piece of work

Only the standard library is imported here, and only the event loop's clock is read, so every timer
can be tested on virtual time.
"""

__all__ = ["claims", "logcontext", "tasks", "workers", "workqueue"]
