"""HTTP servers on addresses that options set."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from vcpuset.domain.errors import VCPUSetError

__all__ = ["SERVER_LOG", "cannot_listen", "serving"]


class _ServerLog(logging.LoggerAdapter[logging.Logger]):
    """As aiohttp's, but a request that is not HTTP is a line of the level DEBUG, and no traceback.

    Any client can send many of them.
    """

    def exception(self, msg: object, *args: object, exc_info: Any = True, **options: Any) -> None:  # noqa: ANN401 - as that of logging.LoggerAdapter
        """A handler has failed, or a request cannot be parsed."""
        if isinstance(exc_info, HttpProcessingError):
            self.debug(f"{msg}: %s", *args, " ".join(str(exc_info).split()))
        else:
            super().exception(msg, *args, exc_info=exc_info, **options)


SERVER_LOG: Final = _ServerLog(server_logger)
"""The `logger` of a server."""


@contextlib.asynccontextmanager
async def serving(
    routes: Iterable[web.AbstractRouteDef], address: tuple[str, int], option: str, remedy: str
) -> AsyncIterator[None]:
    """Serve HTTP as long as the context is open. Raises VCPUSetError, with the remedy, if this is not possible."""
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None, logger=SERVER_LOG)
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
