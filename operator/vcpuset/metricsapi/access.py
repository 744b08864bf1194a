"""Whether a user may read a metric, asked of the API server.

It has authorised the same request already. This second check protects the values if something else gets hold of the
front proxy's certificate, or proxies requests of its own.
"""

from __future__ import annotations

import asyncio
from typing import Final

from vcpuset.kube.aggregation import AggregatedAPI
from vcpuset.metricsapi.frontproxy import User

__all__ = ["KEPT_SECONDS", "Access"]

KEPT_SECONDS: Final = 10.0
"""How long an answer is used."""

MOST_KEPT: Final = 4096

_Question = tuple[User, tuple[tuple[str, str], ...]]


class Access:
    """Asks, and keeps each answer for some seconds."""

    def __init__(self, cluster: AggregatedAPI) -> None:
        self._cluster = cluster
        self._answers: dict[_Question, tuple[float, bool]] = {}
        """Each with the loop time until which it is used, the oldest first."""

    async def allowed(self, user: User, **attributes: str) -> bool:
        """Whether the user may do it.

        attributes  `spec.resourceAttributes` of a SubjectAccessReview

        Raises:
            APIError: the API server does not answer.
        """
        question = (user, tuple(sorted(attributes.items())))
        now = asyncio.get_running_loop().time()
        until, answer = self._answers.get(question, (now, False))
        if until > now:
            return answer
        answer = await self._cluster.may(user.spec(), attributes)
        self._answers.pop(question, None)
        self._answers[question] = (now + KEPT_SECONDS, answer)
        while len(self._answers) > MOST_KEPT:
            del self._answers[next(iter(self._answers))]
        return answer
