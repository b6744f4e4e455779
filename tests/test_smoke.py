from collections.abc import Callable

from harness import Daemon, eventually, produce_clicks

from streamrec.inspection import published
from streamrec.keys import Keys
from streamrec.redis_client import RedisClient
from streamrec.settings import Settings


async def test_a_click_becomes_a_published_list(
    start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], redis: RedisClient
) -> None:
    settings = make_settings()
    daemon = start_daemon()
    await daemon.wait_ready()
    await produce_clicks(settings, [("ann", "i1"), ("ann", "i2"), ("bob", "i3")])

    async def both() -> dict[str, int]:
        found = {u: v.n async for u, v in published(redis, Keys(settings.redis_key_prefix), ["ann", "bob"]) if v}
        return found if found == {"ann": 2, "bob": 1} else {}

    await eventually(both)
