"""Why an address cannot be listened on, in words for an operator's user."""

from __future__ import annotations

import os

from vcpuset.domain.errors import VCPUSetError

__all__ = ["cannot_listen"]


def cannot_listen(address: tuple[str, int], option: str, remedy: str, error: OSError | UnicodeError) -> VCPUSetError:
    """The error for the address that an option has set; `error` is that of the socket or the resolver."""
    host, port = address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # asyncio adds many words to a socket's error; a resolver's has a negative number and words of its own.
    number = error.errno if isinstance(error, OSError) else None
    words = os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)
    return VCPUSetError(f"cannot listen on {option} {where}: {words}; {remedy}")
