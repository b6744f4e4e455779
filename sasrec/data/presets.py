r"""The formats that files may have: one entry of PRESETS for each public data set that people bring.

A caller names one with ``--format NAME`` or ``Columns(format=NAME)``. An entry has a Format for each layout in which
the data set is published. The first whose pattern fits the first line, or whose signature is among the names of the
columns, is taken. A file that looks like an entry, but was read without its name, is refused with a hint, except where
``automatic`` says that nothing else can be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sasrec.data.formats import EVENT_TYPE, ITEM_ID, RATING, TIME_OFFSET, TIMESTAMP, USER_ID, Format, plain_name

ANY = ".*"
ISO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
SECONDS = r"\d{9,10}"
ASIN, REVIEWER = "[0-9A-Z]{10}", "A[0-9A-Z]{10,}"  # an article has 10 characters, a reviewer more
RATINGS = ("user_id", "item_id", "rating", "timestamp")
INTER = r"[^:\t]+:(token|float)(_seq)?"

PRESETS: Mapping[str, tuple[Format, ...]] = {
    "movielens": (
        Format(
            "MovieLens ratings.dat",
            "s",
            pattern=r"[^:]+::[^:]+::[\d.]+::\d+",
            fields=RATINGS,
            separator="::",
            quoted=False,
            automatic=ANY,
        ),
        Format(
            "MovieLens u.data",
            "s",
            pattern=r"\d+\t\d+\t[0-5]\t\d+",
            fields=RATINGS,
            separator="\t",
            quoted=False,
            automatic=r"u\.data|u[1-5ab]\.(base|test)",
        ),
        Format(
            "MovieLens ratings.csv",
            "s",
            {USER_ID: "userid", ITEM_ID: "movieid"},
            frozenset({"userid", "movieid"}),
            automatic=ANY,
        ),
    ),
    "recbole": (Format("RecBole .inter", "s", pattern=rf"{INTER}(\t{INTER})*", automatic=ANY),),
    "yoochoose": (
        Format(
            "YooChoose clicks",
            pattern=rf"\d+,{ISO},\d+,\w+",
            fields=("user_id", "timestamp", "item_id", "category"),
            separator=",",
            quoted=False,
        ),
        Format(
            "YooChoose buys",
            pattern=rf"\d+,{ISO},\d+,\d+,\d+",
            fields=("user_id", "timestamp", "item_id", "price", "quantity"),
            separator=",",
            quoted=False,
        ),
    ),
    "diginetica": (  # the day of an event, and its milliseconds since its session began
        Format(
            "Diginetica",
            names={USER_ID: "sessionid", ITEM_ID: "itemid", TIMESTAMP: "eventdate", TIME_OFFSET: "timeframe"},
            signature=frozenset({"sessionid", "itemid", "timeframe", "eventdate"}),
        ),
    ),
    "retailrocket": (
        Format(
            "Retailrocket",
            names={USER_ID: "visitorid", ITEM_ID: "itemid", EVENT_TYPE: "event"},
            signature=frozenset({"timestamp", "visitorid", "event", "itemid"}),
        ),
    ),
    "otto": (
        Format(
            "OTTO sessions",
            names={
                USER_ID: "session",
                ITEM_ID: "events[].aid",
                TIMESTAMP: "events[].ts",
                EVENT_TYPE: "events[].type",
            },
            signature=frozenset({"session", "events"}),
        ),
        Format(
            "OTTO events",
            names={USER_ID: "session", ITEM_ID: "aid", TIMESTAMP: "ts", EVENT_TYPE: "type"},
            signature=frozenset({"session", "aid", "ts", "type"}),
        ),
    ),
    "amazon": (
        Format(
            "Amazon reviews of 2014 and 2018",
            "s",
            {USER_ID: "reviewerid", ITEM_ID: "asin", TIMESTAMP: "unixreviewtime", RATING: "overall"},
            frozenset({"reviewerid", "asin", "unixreviewtime"}),
        ),
        Format(
            "Amazon reviews of 2023", "ms", {ITEM_ID: "parent_asin"}, frozenset({"user_id", "parent_asin", "timestamp"})
        ),
        Format(
            "Amazon ratings of 2014",
            "s",
            pattern=rf"{REVIEWER},{ASIN},\d(\.\d)?,{SECONDS}",
            fields=RATINGS,
            separator=",",
            quoted=False,
        ),
        Format(
            "Amazon ratings of 2018",
            "s",
            pattern=rf"{ASIN},{REVIEWER},\d(\.\d)?,{SECONDS}",
            fields=("item_id", "user_id", "rating", "timestamp"),
            separator=",",
            quoted=False,
        ),
    ),
    "lastfm": (  # many artists and tracks have no MusicBrainz id: their names are the ids
        Format(
            "Last.fm 1K",
            pattern=rf"user_\d+\t{ISO}(\t[^\t]*){{4}}",
            fields=("user_id", "timestamp", "artist_id", "artist_name", "track_id", "track_name"),
            names={ITEM_ID: "artist_name"},
            separator="\t",
            quoted=False,
        ),
        Format("Last.fm 2K", "ms", {USER_ID: "userid", ITEM_ID: "artistid"}, frozenset({"userid", "artistid"})),
    ),
    "gowalla": (
        Format(
            "Gowalla check-ins",
            pattern=rf"\d+\t{ISO}\t-?[\d.]+\t-?[\d.]+\t\w+",
            fields=("user_id", "timestamp", "latitude", "longitude", "item_id"),
            separator="\t",
            quoted=False,
        ),
    ),
    "mind": (  # the news that a user clicked before have no times: they are not read
        Format(
            "MIND behaviors.tsv",
            pattern=r"\w+\t\w+\t\d+/\d+/\d{4} \d+:\d\d:\d\d [AP]M\t[^\t]*\t\S+-[01]( \S+-[01])*",
            fields=("impression_id", "user_id", "timestamp", "history", "impressions"),
            names={ITEM_ID: "impressions", EVENT_TYPE: "impressions"},
            separator="\t",
            quoted=False,
            pairs=True,
            time_format="%m/%d/%Y %I:%M:%S %p",
            event_types=("1",),
        ),
    ),
    "steam": (
        Format(
            "Steam reviews",
            names={USER_ID: "username", ITEM_ID: "product_id", TIMESTAMP: "date"},
            pattern=r"\{(?=.*['\"]username['\"]: )(?=.*['\"]product_id['\"]: ).*(u'|u\"|: ').*",
            literals=True,
        ),
    ),
    "taobao": (
        Format(
            "Taobao UserBehavior.csv",
            "s",
            pattern=rf"\d+,\d+,\d+,(pv|buy|cart|fav),{SECONDS}",
            fields=("user_id", "item_id", "category_id", "event_type", "timestamp"),
            separator=",",
            quoted=False,
        ),
    ),
    "kuairand": (  # a row is a video that was shown
        Format(
            "KuaiRand log",
            names={ITEM_ID: "video_id", TIMESTAMP: "time_ms", EVENT_TYPE: "is_click"},
            signature=frozenset({"user_id", "video_id", "time_ms", "is_click"}),
            event_types=("1",),
        ),
    ),
    "hm": (
        Format(
            "H&M transactions",
            names={USER_ID: "customer_id", ITEM_ID: "article_id", TIMESTAMP: "t_dat"},
            signature=frozenset({"t_dat", "customer_id", "article_id"}),
        ),
    ),
    "yambda": (  # seconds since a moment that is not published, in steps of 5
        Format(
            "Yambda events",
            "s",
            {USER_ID: "uid"},
            frozenset({"uid", "item_id", "timestamp", "is_organic"}),
            event_types=("listen", "like"),
        ),
    ),
}
TABLE = Format("CSV or TSV")
OBJECTS = Format("JSON")


def layouts_of(name: str | None) -> list[tuple[str, Format]]:
    """Return the layouts of a preset, or of all, each with its preset's name.

    Raises:
        ValueError: there is no such preset.
    """
    if name is not None and name not in PRESETS:
        raise ValueError(f"format={name!r}: must be one of {', '.join(PRESETS)}")
    return [(preset, known) for preset in ([name] if name else PRESETS) for known in PRESETS[preset]]


def fits(known: Format, line: str, names: Iterable[str]) -> bool:
    """Return whether a first line, and the names of columns in it, are those of a format."""
    if known.pattern:
        return bool(re.fullmatch(known.pattern, line.strip()))
    return known.signature <= {plain_name(name).lower() for name in names}


def suggestion(line: str, names: Sequence[str]) -> str:
    """Return the hint to a preset that a source looks like, to append to an error; empty: it looks like none."""
    found = [preset for preset, known in layouts_of(None) if fits(known, line, names)]
    return f"; it looks like {found[0]}: give --format {found[0]} or Columns(format={found[0]!r})" if found else ""
