"""How often Secrets are read, on virtual time: once for all sets that share one, and again when it may have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from vcpuset.domain.credentials import Credentials
from vcpuset.domain.errors import APIError, CredentialsUnavailable, Forbidden, ObjectGone
from vcpuset.domain.resource import UID
from vcpuset.kube.credentials import DOUBTED_SECONDS, FRESH_SECONDS, PATIENT_SECONDS, Secrets

pytestmark = pytest.mark.looptime

SECRET = ("team-a", "monitor")


class Server:
    """The API server.

    seconds   how long it takes for an answer
    contents  what each Secret holds, or what it raises instead
    reads     what was read, in order
    """

    def __init__(self) -> None:
        self.contents: dict[tuple[str, str], str | APIError] = {SECRET: "one"}
        self.reads: list[tuple[str, str]] = []
        self.seconds = 1.0

    async def read_secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """As `Cluster.read_secret`."""
        self.reads.append((namespace, name))
        await asyncio.sleep(self.seconds)
        found = self.contents.get((namespace, name), ObjectGone("HTTP 404"))
        if isinstance(found, APIError):
            raise found
        return {"ca.crt": b"ca", "tls.crt": found.encode(), "tls.key": b"key"}


class Reader:
    """One process' Secrets."""

    def __init__(self) -> None:
        self.server = Server()
        self.secrets = Secrets(self.server)

    async def get(self, uid: str = "a", secret: tuple[str, str] = SECRET, doubted: Credentials | None = None) -> str:
        """What a set gets, told apart by its certificate."""
        return (await self.fetch(uid, secret, doubted)).certificate.decode()

    async def fetch(
        self, uid: str = "a", secret: tuple[str, str] = SECRET, doubted: Credentials | None = None
    ) -> Credentials:
        """What a set gets."""
        return await self.secrets.fetch(UID(uid), *secret, doubted)

    async def why_not(self, uid: str = "a", secret: tuple[str, str] = SECRET) -> str:
        """Why a set gets nothing."""
        with pytest.raises(CredentialsUnavailable) as caught:
            await self.fetch(uid, secret)
        return str(caught.value)


@pytest.fixture
def reader() -> Reader:
    return Reader()


async def test_a_thousand_sets_that_share_a_secret_make_one_read(reader: Reader) -> None:
    found = await asyncio.gather(*(reader.fetch(str(number)) for number in range(1000)))
    assert len(reader.server.reads) == 1
    assert all(each is found[0] for each in found)


async def test_a_thousand_sets_whose_secret_is_missing_make_one_read(reader: Reader) -> None:
    missing = ("team-a", "missing")
    found = await asyncio.gather(*(reader.why_not(str(number), missing) for number in range(1000)))
    assert len(reader.server.reads) == 1
    assert set(found) == {"there is no Secret team-a/missing: create it, with ca.crt, tls.crt and tls.key"}


async def test_a_copy_is_used_for_some_seconds_and_then_read_again(reader: Reader) -> None:
    assert await reader.get() == "one"
    reader.server.contents[SECRET] = "two"
    await asyncio.sleep(FRESH_SECONDS - 0.5)
    assert await reader.get() == "one"
    await asyncio.sleep(0.5)
    assert await reader.get() == "two"


async def test_what_has_not_changed_stays_the_same_object(reader: Reader) -> None:
    before = await reader.fetch()
    await asyncio.sleep(FRESH_SECONDS)
    assert await reader.fetch() is before
    assert len(reader.server.reads) == 2


async def test_a_copy_that_has_failed_is_read_again_soon_and_once_for_all(reader: Reader) -> None:
    before = await reader.fetch()
    reader.server.contents[SECRET] = "two"
    assert await reader.get(doubted=before) == "one", "all sets that share it fail at once, and it was just read"
    await asyncio.sleep(DOUBTED_SECONDS)
    found = await asyncio.gather(*(reader.get(str(number), doubted=before) for number in range(1000)))
    assert set(found) == {"two"}
    assert len(reader.server.reads) == 2
    assert await reader.get(doubted=before) == "two", "who doubts an older copy is given the newer one"
    assert len(reader.server.reads) == 2


@pytest.mark.parametrize("outage", [APIError("no answer"), APIError("HTTP 500"), APIError("HTTP 429")])
async def test_while_the_api_server_is_away_the_last_copy_goes_on_being_used(reader: Reader, outage: APIError) -> None:
    before = await reader.fetch()
    reader.server.contents[SECRET] = outage
    for _ in range(10):
        await asyncio.sleep(FRESH_SECONDS)
        assert await reader.fetch() is before
        assert await reader.fetch(doubted=before) is before
    assert len(reader.server.reads) == 11
    reader.server.contents[SECRET] = "two"
    await asyncio.sleep(FRESH_SECONDS)
    assert await reader.get() == "two"


async def test_an_api_server_that_never_answers_costs_many_secrets_next_to_no_time(reader: Reader) -> None:
    clock = asyncio.get_running_loop().time
    many = [(f"team-{number}", "monitor") for number in range(100)]
    reader.server.contents |= dict.fromkeys(many, "one")
    await asyncio.gather(*(reader.get(each[0], each) for each in many))
    reader.server.seconds = 3600.0
    await asyncio.sleep(FRESH_SECONDS)
    before = clock()
    for each in many * 5:
        assert await reader.get(each[0], each) == "one"
        await asyncio.sleep(0.1)
    waited = clock() - before - 50
    assert waited <= PATIENT_SECONDS * 6, "one wait, and then none for ten seconds"
    reader.server.seconds = 1.0
    reader.server.contents |= dict.fromkeys(many, "two")
    await asyncio.sleep(FRESH_SECONDS)
    assert {await reader.get(each[0], each) for each in many} == {"two"}


async def test_who_doubts_a_copy_asks_an_api_server_that_is_away_and_waits_no_longer_than_others(
    reader: Reader,
) -> None:
    clock = asyncio.get_running_loop().time
    before = await reader.fetch()
    reader.server.contents[SECRET] = "two"
    reader.server.seconds = 3600.0
    await asyncio.sleep(FRESH_SECONDS)
    assert await reader.fetch() is before
    await asyncio.sleep(DOUBTED_SECONDS)
    since = clock()
    assert await reader.fetch(doubted=before) is before
    assert clock() - since <= PATIENT_SECONDS, "it is a worker that waits"
    reader.server.seconds = 1.0
    await asyncio.sleep(DOUBTED_SECONDS)
    assert await reader.get(doubted=before) == "two", "an API server that is back is asked at once"


async def test_without_a_copy_an_outage_is_told_and_the_secret_tried_again(reader: Reader) -> None:
    reader.server.contents[SECRET] = APIError("GET …: HTTP 500: cannot decrypt")
    assert await reader.why_not() == "Secret team-a/monitor cannot be read: GET …: HTTP 500: cannot decrypt"
    reader.server.contents[SECRET] = "one"
    await asyncio.sleep(FRESH_SECONDS)
    assert await reader.get() == "one"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (ObjectGone("HTTP 404"), "there is no Secret team-a/monitor"),
        (Forbidden("HTTP 403: no"), "must bind the ClusterRole vcpuset-monitor-credentials to its service account"),
    ],
)
async def test_a_secret_that_is_gone_or_forbidden_is_used_no_longer(
    reader: Reader, refusal: APIError, words: str
) -> None:
    await reader.fetch()
    reader.server.contents[SECRET] = refusal
    await asyncio.sleep(FRESH_SECONDS)
    assert words in await reader.why_not()
    reader.server.contents[SECRET] = APIError("no answer")
    await asyncio.sleep(FRESH_SECONDS)
    assert words in await reader.why_not(), "an outage does not bring back what was taken away"


@pytest.mark.parametrize("name", ["../../team-b/secrets/monitor", "..", "a/b", "A", "a%2fb", "a?b", "a\n", ""])
async def test_a_name_that_leads_elsewhere_is_never_asked_for(reader: Reader, name: str) -> None:
    assert "is not a valid Secret name" in await reader.why_not(secret=("team-a", name))
    assert reader.server.reads == []


async def test_a_secret_is_forgotten_with_the_last_set_that_names_it(reader: Reader) -> None:
    other = ("team-a", "other")
    reader.server.contents[other] = "three"
    await reader.get("a")
    await reader.get("b")
    assert await reader.get("b", other) == "three"
    assert reader.secrets.held == 2
    reader.secrets.forget(UID("a"))
    assert reader.secrets.held == 1, "b names another one by now"
    reader.secrets.forget(UID("b"))
    reader.secrets.forget(UID("b"))
    assert reader.secrets.held == 0


async def test_a_set_that_is_forgotten_while_its_secret_is_read_leaves_nothing_behind(reader: Reader) -> None:
    reading = asyncio.create_task(reader.get())
    await asyncio.sleep(0.5)
    reader.secrets.forget(UID("a"))
    assert await reading == "one"
    assert reader.secrets.held == 0


async def test_a_reader_that_is_cancelled_holds_up_nobody(reader: Reader) -> None:
    first = asyncio.create_task(reader.get("a"))
    second = asyncio.create_task(reader.get("b"))
    await asyncio.sleep(0.5)
    first.cancel()
    assert await second == "one"
    assert len(reader.server.reads) == 2
