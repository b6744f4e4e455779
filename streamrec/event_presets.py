"""Where producers of several kinds put the fields of an event: by preset, the values of settings of ``[events]``.

deploy/EVENTS.md shows an event of each, with the page that specifies it.
"""

from __future__ import annotations

from typing import Literal

Preset = Literal["plain", "segment", "cloudevents", "debezium", "snowplow", "ga4"]

_SNOWPLOW = "com_snowplowanalytics_snowplow_ecommerce"

PRESETS: dict[str, dict[str, object]] = {
    "plain": {},
    "segment": {  # track calls; "type" names the other calls, which have no event
        "user_id": "userId|anonymousId",
        "item_id": "properties.product_id|properties.products[].product_id",
        "timestamp": "timestamp",
        "type": "event|type",
        "roles": {
            "Product Clicked": "click",
            "Product Viewed": "click",
            "Product Added": "click",
            "Product Added to Wishlist": "click",
            "Order Completed": "click",
        },
    },
    "cloudevents": {  # JSON in structured mode
        "user_id": "data.user_id",
        "item_id": "data.item_id",
        "timestamp": "time",
        "type": "type",
    },
    "debezium": {  # the row after the change, with and without the envelope of JsonConverter
        "user_id": "after.user_id|payload.after.user_id",
        "item_id": "after.item_id|payload.after.item_id",
        "timestamp": "source.ts_ms|payload.source.ts_ms",
        "type": "after.event_type|payload.after.event_type",
        "ignore_null": "after|payload.after",
    },
    "snowplow": {  # enriched events as the analytics SDKs write them
        "user_id": "user_id|domain_userid",
        "item_id": f"contexts_{_SNOWPLOW}_product_1[].id",
        "timestamp": "derived_tstamp|collector_tstamp",
        "type": f"unstruct_event_{_SNOWPLOW}_snowplow_ecommerce_action_1.type|event_name",
        "roles": {"product_view": "click", "list_click": "click", "add_to_cart": "click", "transaction": "click"},
    },
    "ga4": {  # rows of the BigQuery export
        "user_id": "user_id|user_pseudo_id",
        "item_id": "items[].item_id",
        "timestamp": "event_timestamp",
        "timestamp_unit": "us",
        "type": "event_name",
        "roles": {
            "select_item": "click",
            "view_item": "click",
            "add_to_cart": "click",
            "add_to_wishlist": "click",
            "purchase": "click",
        },
    },
}
