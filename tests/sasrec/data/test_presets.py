"""Read files in the published layouts of public data sets: with the preset's name, and not without."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas as pd
import pytest

from sasrec.data.datasets import InteractionsDataset, read_interactions
from sasrec.data.formats import Columns, DataFileError
from sasrec.data.presets import PRESETS
from sasrec.data.readers import read_events

from support.interactions import write, write_parquet

Rows = list[tuple[str, str, int, str | None]]
REVIEW_2014 = (
    '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J. McDonald", "helpful": [2, 3], '
    '"reviewText": "I bought this", "overall": 5.0, "summary": "Heavenly", "unixReviewTime": 1252800000, '
    '"reviewTime": "09 13, 2009"}\n'
)
REVIEW_2023 = (
    '{"rating": 5.0, "title": "Such a lovely scent", "text": "It is", "images": [], "asin": "B00YQ6X8EO", '
    '"parent_asin": "B00YQ6X8EP", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923, '
    '"helpful_vote": 0, "verified_purchase": true}\n'
)
OTTO = (
    '{"session": 42, "events": [{"aid": 0, "ts": 1661200010000, "type": "clicks"}, '
    '{"aid": 1, "ts": 1661200020000, "type": "carts"}]}\n{"session": 43, "events": []}\n'
)
STEAM = (
    "{u'username': u'Chaos Syren', u'hours': 0.1, u'products': 41, u'product_id': u'725280', u'page_order': 0, "
    "u'date': u'2017-12-17', u'text': u\"That's it\", u'early_access': False, u'page': 1}\n"
    "{u'found_funny': 1, u'username': u'\\u0416', u'product_id': u'328100', u'date': u'2017-08-02'}\n"
)
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
    "0,3784,20220411,1800,1649671200000,1,0,0,0,0,0,1,12000,11000,0,0,0,0,1\n"
    "0,512,20220411,1800,1649671209000,0,0,0,0,0,0,0,0,11000,0,0,0,0,1\n"
)
MIND = (
    "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0\n"
    "2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0 N39317-1\n"
)
# preset, name of the file, its content, and the events in it
FILES: dict[str, tuple[str, str, str, Rows]] = {
    "u.data": ("movielens", "u.data", "196\t242\t3\t881250949\n", [("196", "242", 881250949000, None)]),
    "ratings.dat": ("movielens", "ratings.dat", "1::1193::5::978300760\n", [("1", "1193", 978300760000, None)]),
    "ratings.csv": (
        "movielens",
        "ratings.csv",
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n",
        [("1", "296", 1147880044000, None)],
    ),
    ".inter": (
        "recbole",
        "ml-100k.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
        [("196", "242", 881250949000, None)],
    ),
    "clicks": (
        "yoochoose",
        "yoochoose-clicks.dat",
        "1,2014-04-07T10:51:09.277Z,214536502,0\n",
        [("1", "214536502", 1396867869277, None)],
    ),
    "buys": (
        "yoochoose",
        "yoochoose-buys.dat",
        "420374,2014-04-06T18:44:58.314Z,214537888,12462,1\n",
        [("420374", "214537888", 1396809898314, None)],
    ),
    "item views": (
        "diginetica",
        "train-item-views.csv",
        "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n1;NA;31331;1031018;2016-05-09\n",
        [("1", "81766", 1462752526309, None), ("1", "31331", 1462753031018, None)],
    ),
    "events": (
        "retailrocket",
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433222276276,599528,transaction,356475,4000\n",
        [("257597", "355908", 1433221332117, "view"), ("599528", "356475", 1433222276276, "transaction")],
    ),
    "sessions": (
        "otto",
        "otto-recsys-train.jsonl",
        OTTO,
        [("42", "0", 1661200010000, "clicks"), ("42", "1", 1661200020000, "carts")],
    ),
    "flat sessions": (
        "otto",
        "train.csv",
        "session,aid,ts,type\n0,1517085,1659304800025,0\n",
        [("0", "1517085", 1659304800025, "0")],
    ),
    "reviews 2014": ("amazon", "Beauty_5.json", REVIEW_2014, [("A2SUAM1J3GNN3B", "0000013714", 1252800000000, None)]),
    "reviews 2023": (
        "amazon",
        "All_Beauty.jsonl",
        REVIEW_2023,
        [("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EP", 1588687728923, None)],
    ),
    "ratings 2014": (
        "amazon",
        "ratings_Beauty.csv",
        "A39HTATAQ9V7YF,0205616461,5.0,1369699200\n",
        [("A39HTATAQ9V7YF", "0205616461", 1369699200000, None)],
    ),
    "ratings 2018": (
        "amazon",
        "All_Beauty.csv",
        "0143026860,A1V6B6TNIC10QE,1.0,1424304000\n",
        [("A1V6B6TNIC10QE", "0143026860", 1424304000000, None)],
    ),
    "ratings 2023": (
        "amazon",
        "All_Beauty.csv",
        "user_id,parent_asin,rating,timestamp\nAGKHLEW2SOWH,B00YQ6X8EO,5.0,1588687728923\n",
        [("AGKHLEW2SOWH", "B00YQ6X8EO", 1588687728923, None)],
    ),
    "listens": (
        "lastfm",
        "userid-timestamp-artid-artname-traid-traname.tsv",
        'user_000001\t2009-05-04T23:08:57Z\t\t"Deep" Dish\t\tFlashdance\n',
        [("user_000001", '"Deep" Dish', 1241478537000, None)],
    ),
    "tags": (
        "lastfm",
        "user_taggedartists-timestamps.dat",
        "userID\tartistID\ttagID\ttimestamp\n2\t52\t13\t1238536800000\n",
        [("2", "52", 1238536800000, None)],
    ),
    "check-ins": (
        "gowalla",
        "loc-gowalla_totalCheckins.txt",
        "0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847\n",
        [("0", "22847", 1287532527000, None)],
    ),
    "impressions": (
        "mind",
        "behaviors.tsv",
        MIND,
        [("U13740", "N55689", 1573463158000, "1"), ("U91836", "N39317", 1573582290000, "1")],
    ),
    "dicts": (
        "steam",
        "steam_reviews.json",
        STEAM,
        [("Chaos Syren", "725280", 1513468800000, None), ("Ж", "328100", 1501632000000, None)],
    ),
    "behaviour": (
        "taobao",
        "UserBehavior.csv",
        "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n",
        [("1", "2268318", 1511544070000, "pv"), ("1", "2333346", 1511561733000, "buy")],
    ),
    "log": ("kuairand", "log_standard_4_08_to_4_21_pure.csv", KUAIRAND, [("0", "3784", 1649671200000, "1")]),
    "transactions": (
        "hm",
        "transactions_train.csv",
        "t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,000058a12d5b,0663713001,0.0508,2\n",
        [("000058a12d5b", "0663713001", 1537401600000, None)],
    ),
    "flat listens": (
        "yambda",
        "listens.parquet",
        "uid,timestamp,item_id,is_organic\n10,15929455,6928395,1\n",
        [("10", "6928395", 15929455000, None)],
    ),
    "events of several types": (
        "yambda",
        "multi_event.parquet",
        "uid,timestamp,item_id,is_organic,event_type\n10,39420,8326270,0,listen\n10,39421,1,0,dislike\n10,39430,2,0,like\n",
        [("10", "8326270", 39420000, "listen"), ("10", "2", 39430000, "like")],
    ),
}
published = pytest.mark.parametrize(("preset", "name", "content", "events"), FILES.values(), ids=FILES)


def written(folder: Path, name: str, content: str) -> Path:
    if not name.endswith(".parquet"):
        return write(folder, content, name)
    return write_parquet(folder, pd.read_csv(io.StringIO(content)).to_dict("list"), name)


def test_every_preset_is_tried() -> None:
    assert {preset for preset, *_ in FILES.values()} == set(PRESETS)
    assert len(FILES) == sum(map(len, PRESETS.values())) + 2


@published
def test_the_published_files_are_read_by_name(
    tmp_path: Path, preset: str, name: str, content: str, events: Rows
) -> None:
    path, columns = written(tmp_path, name, content), Columns(format=preset)
    found = [(e.user_id, e.item_id, e.timestamp_ms, e.event_type) for e in read_events(path, columns)]
    assert found == events
    rows = read_interactions(InteractionsDataset(path, columns=columns))
    assert rows.timestamps is not None
    assert list(zip(rows.user_ids, rows.item_ids, rows.timestamps.tolist(), strict=True)) == [e[:3] for e in events]


@published
def test_the_published_files_are_suggested_by_name(
    tmp_path: Path, preset: str, name: str, content: str, events: Rows
) -> None:
    name = "clicks" + Path(name).suffix.replace(".data", "").replace(".inter", "")
    path = written(tmp_path, name, content)
    for read in (lambda: list(read_events(path)), lambda: read_interactions(path)):
        try:
            read()
        except DataFileError as error:
            assert f"--format {preset}" in str(error)
            assert "\n" not in str(error)
        else:
            automatic = [known.name for known in PRESETS[preset] if known.automatic == ".*"]
            assert automatic, "read without its name"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_of_another_layout_is_refused(tmp_path: Path, preset: str) -> None:
    path = write(tmp_path, "session,sku,at\n1,2,3\n")
    with pytest.raises(DataFileError, match=re.escape(f"{path}:1: ")) as raised:
        list(read_events(path, Columns(format=preset)))
    assert preset in str(raised.value) or "Python dict" in str(raised.value)
    for frame in ({"session": [1], "sku": [2]}, pd.DataFrame({"session": [1], "sku": [2]})):
        with pytest.raises(DataFileError, match=f"the frame: 'session', 'sku' is no layout of {preset}"):
            read_interactions(InteractionsDataset(frame, columns=Columns(format=preset)))


def test_a_frame_may_be_of_a_preset() -> None:
    frame = pd.read_csv(io.StringIO(FILES["events"][2]))
    rows = read_interactions(InteractionsDataset(frame, columns=Columns(format="retailrocket", event_types=("view",))))
    assert (rows.user_ids, rows.item_ids) == (["257597"], ["355908"])


def test_given_names_and_units_come_before_those_of_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, FILES["listens"][2])
    tracks = Columns(format="lastfm", item="track_name")
    assert [event.item_id for event in read_events(path, tracks)] == ["Flashdance"]
    path = write(tmp_path, FILES["behaviour"][2])
    bought = Columns(format="taobao", event_types=("buy",))
    assert [event.item_id for event in read_events(path, bought)] == ["2333346"]


HEADERLESS = "7\t9\t4\t1700000000\n8\t9\t5\t1700000001\n"


def test_four_fields_behind_tabs_are_not_taken_for_movielens(tmp_path: Path) -> None:
    path = write(tmp_path, HEADERLESS, "events.tsv")
    for read in (lambda: list(read_events(path)), lambda: read_interactions(path)):
        with pytest.raises(
            DataFileError, match=r"events.tsv:1: no known format in .*--no-header.*looks like movielens"
        ):
            read()
    by_number = Columns(header=False, user="2", item="1", timestamp="4", timestamp_unit="s")
    expected = [("9", "7", 1_700_000_000_000), ("9", "8", 1_700_000_001_000)]
    assert [event[:3] for event in read_events(path, by_number)] == expected
    by_name = Columns(fields=("item_id", "USER_ID", "n", "timestamp"), timestamp_unit="s")
    assert [event[:3] for event in read_events(path, by_name)] == expected
    with pytest.raises(DataFileError, match=r":1: 4 fields between '\\t', but 3 names; correct --fields"):
        list(read_events(path, Columns(fields=("a", "b", "c"))))
    with pytest.raises(
        DataFileError, match=r":1: column USER_ID is missing; the columns are '1', '2', '3', '4'; if one"
    ):
        list(read_events(path, Columns(header=False)))


def test_milliseconds_in_an_inter_file_are_not_multiplied(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    for time in ("1700000000000", "1700000000000.0", "1.7e12"):
        path = write(tmp_path, f"{header}u\ti\t{time}\n", "x.inter")
        for read in (lambda: list(read_events(path)), lambda: read_interactions(path)):  # noqa: B023
            with pytest.raises(
                DataFileError, match=r"x.inter:2: timestamp 1700000000000 looks like milliseconds.*unit ms"
            ):
                read()
    path = write(tmp_path, f"{header}u\ti\t1700000000000\n", "x.inter")
    assert [event.timestamp_ms for event in read_events(path, Columns(timestamp_unit="ms"))] == [1_700_000_000_000]
