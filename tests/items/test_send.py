"""`streamrec items send`, and the live page that shows what the table has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from streamrec.kafka.topics import ensure_topics
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import published
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, read_topic
from support.preloaded import run_command
from support.waiting import eventually
from support.workload import Record, click

MakeSettings = Callable[..., Settings]


def test_it_needs_a_topic(make_settings: MakeSettings, tmp_path: Path) -> None:
    done = run_command(make_settings(), "items", "send", str(tmp_path / "items.jsonl"))
    assert (done.returncode, done.stderr) == (
        1,
        "streamrec: no topic of items: set STREAMREC_ITEMS_TOPIC or --items-topic\n",
    )


async def test_a_file_is_sent_up_to_a_bad_line(make_settings: MakeSettings, tmp_path: Path) -> None:
    topic, path = f"{make_settings().kafka.topic}-items", tmp_path / "items.csv"
    settings = make_settings(items_topic=topic)
    path.write_text("item_id,title,available\na,A,\nb,B,false\n")
    done = run_command(settings, "items", "send", str(path))
    assert (done.returncode, done.stdout) == (0, f"2 items to topic {topic}\n")
    path.write_text("item_id,title,available\nc,C,\nd,D,perhaps\ne,E,\n")
    done = run_command(settings, "items", "send", str(path))
    assert (
        done.returncode == 1 and "line 3: not an item" in done.stderr and "(1 items before it were sent)" in done.stderr
    )
    found = {record.key: json.loads(record.value) for record in await read_topic(settings, topic)}
    assert found == {b"a": {"title": "A"}, b"b": {"title": "B", "available": False}, b"c": {"title": "C"}}


async def test_a_rebuild_publishes_available_items_only(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path, redis: RedisClient
) -> None:
    path, clicks = tmp_path / "items.jsonl", tmp_path / "clicks.csv"
    path.write_text("".join(f'{{"item_id": "i{n}"}}\n' for n in range(25)))
    clicks.write_text(f"user_id,item_id,timestamp\nann,i1,{time.time_ns() // 1_000_000}\n")
    settings = make_settings(items_file=path, model_dir=model_dir, archive_dir=tmp_path / "archive")
    await ensure_topics(settings.kafka, (settings.kafka.topic,))
    for command in (("archive", "import", str(clicks)), ("rebuild",)):
        done = run_command(settings, *command)
        assert not done.returncode, done.stderr
    (found,) = [shown async for _, shown in published(redis, ["ann"])]
    assert found is not None and len(found.items) == 20 and set(found.items) < {f"i{n}" for n in range(25)}


async def test_the_page_shows_titles_and_categories_of_the_table(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    path, titles = tmp_path / "items.jsonl", tmp_path / "titles.csv"
    rows = [{"item_id": f"i{n}", "title": f"T{n}", "categories": ["books", "new"]} for n in range(1, 49)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"item_id": "i49", "categories": "one"}]))
    titles.write_text("item_id,title\ni49,from the file\ni1,not shown\n")
    settings = make_settings(items_file=path, http_titles=titles, lists_top_k=50, lists_filter_seen=False)
    daemon = start_daemon(**settings.given, model_dir=model_dir)
    await daemon.wait_ready()
    await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
    await daemon.wait_handled(1)

    async def shown() -> list[dict[str, object]] | None:
        _, text = await daemon.get("/api/user?id=ann")
        found = json.loads(text)["list"]
        return found and found["items"]

    items = {str(item["id"]): item for item in await eventually(shown) or ()}
    assert len(items) == 49
    assert (items["i1"]["title"], items["i1"]["categories"]) == ("T1", ["books", "new"])
    assert (items["i49"]["title"], items["i49"]["categories"]) == ("from the file", ["one"])
