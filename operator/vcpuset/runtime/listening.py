"""HTTP servers on addresses that options set."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable

from aiohttp import web

from vcpuset.domain.errors import VCPUSetError

__all__ = ["cannot_listen", "serving"]


@contextlib.asynccontextmanager
async def serving(
    routes: Iterable[web.AbstractRouteDef], address: tuple[str, int], option: str, remedy: str
) -> AsyncIterator[None]:
    """Serve HTTP as long as the context is open. Raises VCPUSetError, with the remedy, if this is not possible."""
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, *address).start()
        except (OSError, UnicodeError) as error:
            raise cannot_listen(address, option, remedy, error) from error
        yield
    finally:
        await runner.cleanup()


def cannot_listen(address: tuple[str, int], option: str, remedy: str, error: OSError | UnicodeError) -> VCPUSetError:
    """The error for the address that an option has set; `error` is that of the socket or the resolver."""
    host, port = address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # asyncio adds many words to a socket's error; a resolver's has a negative number and words of its own.
    number = error.errno if isinstance(error, OSError) else None
    words = os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)
    return VCPUSetError(f"cannot listen on {option} {where}: {words}; {remedy}")
