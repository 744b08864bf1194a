"""Rate and back-off of kopf's requests: they pass through here on their way to the API server.

kopf watches well and retries badly. It resumes an interrupted watch without a pause, permanently; after an expired one
it restarts ten times a second; it resets its pauses each minute, and does not know our own lists. So its own pauses are
disabled, and each of its requests waits here until it is due: after a failure twice as long as after the one before, up
to half a minute (to ten seconds while the API server does not run, or starts), with jitter; a watch that ends soon
after its start is a failure too. Each failure is logged, because kopf's own lines contain neither the status nor a
remedy.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Final

import aiohttp
import kopf

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.errors import APIError, Forbidden, Unavailable
from vcpuset.kube.cluster import NO_ANSWER, USER_AGENT, refusal, unanswered
from vcpuset.kube.codec import PLURAL

__all__ = ["LONGEST_SECONDS", "STEADY_SECONDS", "RetryBackoff", "ThrottledTransport", "remedy"]

LONGEST_SECONDS: Final = 30.0
"""No pause between two attempts to reach the API server is longer."""

BACKOFF: Final = ExponentialBackoff(base_seconds=1, cap_seconds=LONGEST_SECONDS)

STEADY_SECONDS: Final = 5.0
"""A watch that lasted so long was a success. One that a proxy closes every 15 s is resumed at once."""

UNTRIED_SECONDS: Final = 180.0
"""A path that has failed and was not retried for so long is no longer in use: the pauses of a watch and of the requests
before it, and their deadlines, are shorter together."""

ANSWER_SECONDS: Final = 30.0
"""Deadline of a request: for a watch to its first byte, for all others to the last byte of the response."""

_log = logging.getLogger(__name__)


class RetryBackoff:
    """When something that can fail, or end too soon, may be tried again. Times are the loop's."""

    def __init__(self) -> None:
        self._failures = 0
        self._unavailable = False
        self._due = -math.inf
        self._failed_at = -math.inf
        self._began: float | None = None

    def is_failing(self) -> bool:
        """Whether the last attempts have failed, and it is retried. What has begun is a success once it has lasted."""
        now = asyncio.get_running_loop().time()
        if self._began is not None and now - self._began >= STEADY_SECONDS:
            return False
        return self._failures > 0 and now - self._failed_at < UNTRIED_SECONDS

    def wait_seconds(self) -> float:
        """How long to wait before the next attempt."""
        return max(0.0, self._due - asyncio.get_running_loop().time())

    def began(self) -> None:
        """Something that should last has begun."""
        self._began = asyncio.get_running_loop().time()

    def ended(self) -> bool:
        """If something had begun, it is over. Returns whether it ended too soon, which counts as a failure."""
        if self._began is None:
            return False
        lasted, self._began = asyncio.get_running_loop().time() - self._began, None
        if lasted >= STEADY_SECONDS:
            self._failures = 0
            return False
        self.failed()
        return True

    def succeeded(self) -> None:
        """An attempt has succeeded, of something that need not last."""
        self._failures = 0

    def failed(self, error: APIError | None = None) -> float:
        """An attempt has failed; returns how many seconds the next one waits: at least the server's Retry-After."""
        if self._unavailable and (error is None or isinstance(error, Forbidden)):
            # It runs again, but is not ready: one that starts forbids everything, and ends its first watches.
            self._failures = 0
        self._unavailable = isinstance(error, Unavailable)
        self._failures += 1
        pause = BACKOFF.delay(self._failures)
        if error is not None:
            pause = max(BACKOFF.delay(self._failures, error.longest_pause), error.retry_after)
        self._failed_at = asyncio.get_running_loop().time()
        self._due = self._failed_at + pause
        return pause


class ThrottledTransport:
    """Makes kopf's HTTP sessions, whose requests all pass through here: a back-off for each path, one list at a time.

    lists      held during each list; the operator's own lists hold it too
    listed     called with the path after each list
    requested  called after each request, as by `Cluster.count`
    """

    def __init__(
        self, lists: asyncio.Lock, listed: Callable[[str], None], requested: Callable[[str, str], None]
    ) -> None:
        self._lists = lists
        self._listed = listed
        self._requested = requested
        self._paces: dict[str, RetryBackoff] = {}
        self._sessions: list[aiohttp.ClientSession] = []

    def session(self, info: kopf.ConnectionInfo) -> aiohttp.ClientSession:
        """A session with these credentials."""

        async def middleware(
            request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
        ) -> aiohttp.ClientResponse:
            return await self._pass(session, request, handler)

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers={**info.as_http_headers(), "User-Agent": USER_AGENT},
            proxy=info.proxy_url,
            trust_env=info.trust_env,
            middlewares=(middleware,),
        )
        # Each login makes one, and while credentials are refused these are thousands in a day.
        self._sessions = [each for each in self._sessions if not each.closed] + [session]
        return session

    def is_failing(self, namespace: str) -> bool:
        """Whether the watch on a namespace fails at present, or kopf's requests before it; and is retried."""
        return any(
            pace.is_failing()
            for path, pace in self._paces.items()
            if "/namespaces/" not in path or f"/namespaces/{namespace}/" in path
        )

    async def close(self) -> None:
        """Close the sessions. kopf closes only those that it has used."""
        while self._sessions:
            await self._sessions.pop().close()

    async def _pass(
        self, session: aiohttp.ClientSession, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Send a request when it is due. Errors are raised, or returned, unchanged."""
        path = request.url.path
        # A list and the watch that follows it share one: both must succeed.
        pace = self._paces.setdefault(path, RetryBackoff())
        if pace.ended():
            _log.warning(
                "watch %s: ended in less than %g s; resuming in %.1f s", path, STEADY_SECONDS, pace.wait_seconds()
            )
        if (seconds := pace.wait_seconds()) > 0:
            await asyncio.sleep(seconds)
        if session.closed:
            # Another request has found meanwhile that these credentials are not accepted. aiohttp raises this too, and
            # kopf then uses the new ones.
            raise RuntimeError("Session is closed")
        if request.url.query.get("watch") == "true":
            response = await self._send(request, handler, pace, watch=True)
        elif path.endswith(f"/{PLURAL}"):
            async with self._lists:
                response = await self._send(request, handler, pace)
            if response.ok:
                self._listed(path)
        else:
            response = await self._send(request, handler, pace)
            if response.ok:
                pace.succeeded()
        return response

    async def _send(
        self,
        request: aiohttp.ClientRequest,
        handler: aiohttp.ClientHandlerType,
        pace: RetryBackoff,
        *,
        watch: bool = False,
    ) -> aiohttp.ClientResponse:
        what = f"{'watch' if watch else request.method} {request.url.path}"
        code = NO_ANSWER
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await handler(request)
                code = str(response.status)
                if watch and response.ok:
                    pace.began()
                    return response
                raw = await response.read()  # the response keeps it for its other readers
        except TimeoutError:
            self._failed(pace, APIError(f"{what}: no answer from {request.url.authority} within {ANSWER_SECONDS:g} s"))
            raise
        except (aiohttp.ClientError, OSError) as error:
            self._failed(pace, unanswered(what, error))
            raise
        finally:
            self._requested(request.method, code)
        if not response.ok:
            self._failed(pace, refusal(what, response.status, response.headers, raw))
        return response

    def _failed(self, pace: RetryBackoff, error: APIError) -> None:
        pause = pace.failed(error)
        _log.warning("%s%s; retrying in %.1f s", error, remedy(error), pause)


def remedy(error: APIError) -> str:
    """The remedy, in brackets, if the kind of the error has one."""
    return " (the roles in deploy/ grant the required permissions)" if isinstance(error, Forbidden) else ""
