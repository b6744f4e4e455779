"""Keys of users: all keys of a user are in one slot, and each id has keys of its own."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.local.cluster import EmbeddedCluster
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation
from streamrec.serving.inspection import published, stored
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.redis_access import batch, event
from support.redis_cluster import cluster_settings, node, running
from support.redis_sentinels import watched

MakeSettings = Callable[..., Settings]

# ids that end a hash tag, look like one, or look encoded
AWKWARD = [
    *("}x", "}", "}{", "}}", "{}", "a}b{c", "{x}y", "{", "{{", "{}{}", "a{", "{a", "{a}", "a}:LIST", "}:seq:{"),
    *(
        "%7D",
        "%",
        "%%",
        "%25",
        "%7d",
        "%257D",
        "}%",
        "%}",
        "%7D}",
        "7D",
        " ",
        "\t",
        "\u200b",
        "\ufeff",
        "é}",
        "popular",
    ),
]
NAMES = st.text(
    st.one_of(st.sampled_from("{}%257Dd:a *?[]\\\u200b"), st.characters(exclude_categories=["Cs"])), min_size=1
)


def slot_of(key: str) -> int:
    """Return the slot as the Redis Cluster Specification words the rule, apart from the package's code."""
    hashed = key.encode()
    opening = hashed.find(b"{")
    closing = hashed.find(b"}", opening + 1)
    if opening >= 0 and closing > opening + 1:
        hashed = hashed[opening + 1 : closing]
    return binascii.crc_hqx(hashed, 0) % 16_384


@given(user=st.one_of(st.sampled_from(AWKWARD), NAMES))
def test_all_keys_of_a_user_are_in_one_slot_and_name_the_user(user: str) -> None:
    keys = Keys("app:1")
    names = [keys.sequence(user), keys.recommendation(user)]
    assert len({slot_of(name) for name in names}) == 1, names
    assert [keys.user_of(name) for name in names] == [user, user]


@given(one=NAMES, other=NAMES)
def test_two_users_share_no_key(one: str, other: str) -> None:
    keys = Keys()
    if one != other:
        found = {keys.sequence(one), keys.recommendation(one), keys.sequence(other), keys.recommendation(other)}
        assert len(found) == 4


def test_the_keys_of_usual_ids_are_as_the_contract_says() -> None:
    assert Keys().recommendation("me") == "streamrec:recs:{me}"
    assert Keys().sequence("a}b%") == "streamrec:seq:{a%7Db%25}"


@pytest.mark.parametrize(
    "key",
    [
        *("streamrec:recs:popular", "streamrec:recs:{}", "streamrec:recs:{a}b}", "streamrec:recs:{a}:LIST", "other"),
        *("streamrec:recs:{%}", "streamrec:recs:{%7d}", "streamrec:recs:{a", "x:recs:{a}", "streamrec:other:{a}"),
    ],
)
def test_keys_that_no_user_has_name_no_user(key: str) -> None:
    assert Keys().user_of(key) is None


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with running(replicas=0) as found:
        yield found


async def test_a_cluster_agrees_on_the_slots(cluster: EmbeddedCluster) -> None:
    keys = Keys()
    async with node(cluster.nodes[0]) as client:
        for user in AWKWARD:
            for name in (keys.sequence(user), keys.recommendation(user)):
                assert await client.execute_command("CLUSTER KEYSLOT", name) == slot_of(name)


async def assert_served(settings: Settings) -> None:
    """Append, publish and list every awkward id."""
    async with RedisClient(settings.redis) as redis:
        store = SequenceStore(redis, settings.sequences, 0, 8, Metrics())
        publisher = Publisher(redis, 60, Metrics())
        sequences = await store.append(batch(*(event(user, f"of {user}", 0) for user in AWKWARD)))
        assert [(s.user_id, s.items) for s in sequences] == [(user, [f"of {user}"]) for user in AWKWARD]
        lists = [Recommendation(s.user_id, s.items, [1.0], "m", 1, s.n) for s in sequences]
        assert await publisher.publish(lists) == [None] * len(AWKWARD)
        for users in (None, AWKWARD):
            assert {u: s.items async for u, s in stored(redis, users) if s} == {u: [f"of {u}"] for u in AWKWARD}
            assert {u: s.items async for u, s in published(redis, users) if s} == {u: [f"of {u}"] for u in AWKWARD}


async def test_every_id_is_served_by_a_cluster(make_settings: MakeSettings, cluster: EmbeddedCluster) -> None:
    await assert_served(make_settings(**cluster_settings(cluster)))


async def test_every_id_is_served_behind_sentinels(make_settings: MakeSettings) -> None:
    async with watched(replicas=0) as servers:
        await assert_served(make_settings(redis_url=servers.redis_url))


async def test_every_id_is_served_by_one_server(make_settings: MakeSettings) -> None:
    await assert_served(make_settings())
