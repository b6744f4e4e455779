"""Declare the settings in groups; each part of the program takes its own group.

A setting is declared once: here, or in ``SASRecConfig`` and ``TrainConfig`` of the model library. Flags, help texts,
`streamrec check --show` and deploy/SETTINGS.md are made from these declarations.
Over 300 lines: the file is one table of declarations, and little else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sasrec.data.times import EARLIEST_MS, LATEST_MS, TimeBounds
from streamrec.event_paths import Field as PathField
from streamrec.event_paths import parse, reader_of
from streamrec.event_presets import PRESETS, Preset
from streamrec.event_roles import Roles, outcomes_of, roles_of
from streamrec.redis_urls import (
    SENTINEL_FORM,
    SentinelUrl,
    check_url,
    fits_cluster,
    has_credentials,
    masked,
    sentinel_url,
)
from streamrec.store_urls import check_place

DAY_S = 86_400
LONGEST_S = 100 * 365 * DAY_S  # longer times overflow in Redis
ADVANCED: dict[str, JsonValue] = {"advanced": True}


def topic_name(value: str) -> str:
    """Return a topic name, or an empty text.

    Raises:
        ValueError: it is neither.
    """
    if value and not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", value):
        raise ValueError("a topic name is 1 to 249 letters, digits, '.', '_' and '-'")
    return value


class Group(BaseModel):
    """Settings that belong together. Frozen: a changed setting needs a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TlsSettings(Group):
    """The files of a TLS connection."""

    ca_file: Path | None = Field(None, description="CA certificates that sign the server's [the system's]")
    cert_file: Path | None = Field(None, description="client certificate")
    key_file: Path | None = Field(None, description="client key, unencrypted")

    def check(self, prefix: str, used: bool, need: str) -> None:
        """Check that the files fit the connection.

        Raises:
            ValueError: a file is set though the connection is not encrypted, or a certificate has no key.
        """
        files = {"ca_file": self.ca_file, "cert_file": self.cert_file, "key_file": self.key_file}
        given = [name for name, path in files.items() if path]
        if given and not used:
            raise ValueError(f"{prefix}_{given[0]} needs {need}")
        if self.cert_file and not self.key_file:
            raise ValueError(f"{prefix}_cert_file needs {prefix}_key_file")


class OAuthSettings(Group):
    """The token endpoint of an identity provider, for OAUTHBEARER with OIDC client credentials."""

    token_url: str | None = Field(None, description="token endpoint of the identity provider, for OAUTHBEARER")
    client_id: str | None = Field(None, description="client id at the token endpoint")
    client_secret: SecretStr | None = Field(None, description="client secret at the token endpoint")
    scope: str | None = Field(None, description="scope of the tokens, if the provider requires one")
    tls_ca_file: Path | None = Field(None, description="CA certificates that sign the token endpoint's [the system's]")

    @field_validator("token_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        parts = urlsplit(value) if value else None
        if parts and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError("a token endpoint is https://HOST[:PORT]/PATH, without user and password")
        return value


class KafkaSettings(Group):
    """Brokers, topics and the consumer group."""

    bootstrap_servers: str = Field("localhost:9092", description="Kafka brokers, host:port[,host:port...]")
    topic: str = Field("clicks", min_length=1, description="topic of the click events")
    group: str = Field("streamrec", min_length=1, description="consumer group; its daemons share the partitions")
    group_instance_id: str | None = Field(
        None, description="static membership: a name unique to this daemon", json_schema_extra=ADVANCED
    )
    dead_letter_topic: str = Field("", description="topic for records that are not click events [TOPIC-dead-letter]")
    partitions: int = Field(4, ge=1, description="partitions of topics that streamrec creates")
    replication_factor: int = Field(1, ge=1, description="replicas of topics that streamrec creates; usually 3")
    topic_epoch: int = Field(0, ge=0, le=2**31, description="raise by one when the topic was deleted and created again")
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where a group without any commit begins"
    )
    session_timeout_s: float = Field(
        10, ge=1, description="Kafka removes a member after this time without a heartbeat", json_schema_extra=ADVANCED
    )
    rebalance_timeout_s: float = Field(
        60, ge=2, description="longest time a rebalance waits for the current batch", json_schema_extra=ADVANCED
    )
    max_batch: int = Field(256, ge=1, le=10_000, description="most records in a batch", json_schema_extra=ADVANCED)
    poll_timeout_ms: int = Field(
        200, ge=1, description="longest time a poll waits for records", json_schema_extra=ADVANCED
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="protocol of the connection to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM"] = Field(
        "PLAIN", description="SASL mechanism"
    )
    sasl_username: str | None = Field(None, description="SASL user, for PLAIN and SCRAM")
    sasl_password: SecretStr | None = Field(None, description="SASL password, for PLAIN and SCRAM")
    oauth: OAuthSettings = OAuthSettings()
    aws_region: str | None = Field(
        None, description="region of the MSK cluster, for AWS_MSK_IAM [AWS_REGION or AWS_DEFAULT_REGION]"
    )
    tls: TlsSettings = TlsSettings()

    @field_validator("security_protocol", "sasl_mechanism", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("bootstrap_servers")
    @classmethod
    def _addresses(cls, value: str) -> str:
        for address in value.split(","):
            found = re.fullmatch(r"\s*(?:[^\s:]+|\[[0-9a-fA-F:]+\]):(\d{1,5})\s*", address)
            if not found or not 1 <= int(found[1]) <= 65_535:
                raise ValueError(f"{address!r} is not host:port")
        return value.replace(" ", "")

    _topics = field_validator("topic", "dead_letter_topic")(topic_name)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.dead_letters == self.topic:
            raise ValueError(
                "kafka_dead_letter_topic must differ from kafka_topic, or dead letters would be read again"
            )
        self._check_login()
        self.tls.check("kafka_tls", self.uses_tls, "kafka_security_protocol SSL or SASL_SSL")
        return self

    def _check_login(self) -> None:
        """Check that the login has what its mechanism needs.

        Raises:
            ValueError: something is missing.
        """
        oauth, mechanism = self.oauth, self.sasl_mechanism if self.uses_sasl else ""
        if mechanism == "OAUTHBEARER":
            if not (oauth.token_url and oauth.client_id and oauth.client_secret):
                raise ValueError(
                    "OAUTHBEARER needs kafka_oauth_token_url, kafka_oauth_client_id and kafka_oauth_client_secret"
                )
        elif mechanism == "AWS_MSK_IAM":
            if not self.uses_tls:
                raise ValueError("AWS_MSK_IAM needs kafka_security_protocol SASL_SSL")
        elif mechanism and not (self.sasl_username and self.sasl_password):
            raise ValueError(f"{self.security_protocol} needs kafka_sasl_username and kafka_sasl_password")

    @property
    def dead_letters(self) -> str:
        """The dead-letter topic in force."""
        return self.dead_letter_topic or f"{self.topic}-dead-letter"

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.security_protocol.endswith("SSL")

    @property
    def uses_sasl(self) -> bool:
        """Whether the connection begins with a login."""
        return self.security_protocol.startswith("SASL")


class RedisSettings(Group):
    """The Redis server or cluster."""

    url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        description=f"redis[s]://[USER:PASSWORD@]HOST:PORT/DB, unix://PATH, or {SENTINEL_FORM}",
    )
    username: str | None = Field(None, description="Redis user, if the URL names none")
    password: SecretStr | None = Field(None, description="Redis password as it is; in a URL it is percent-encoded")
    sentinel_username: str | None = Field(None, description="user at the sentinels, if they have users")
    sentinel_password: SecretStr | None = Field(None, description="password of the sentinels, if they have one")
    cluster: bool = Field(False, description="the server is a Redis Cluster; the URL names any of its nodes")
    wait_replicas: int = Field(
        0, ge=0, description="replicas that must have a batch's writes before its offsets are committed"
    )
    key_prefix: str = Field("streamrec", description="first part of every Redis key")
    timeout_s: float = Field(
        1.0, gt=0, description="time after which a Redis command is retried", json_schema_extra=ADVANCED
    )
    tls: TlsSettings = TlsSettings()

    @field_validator("key_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"[a-zA-Z0-9._:-]+", value):
            raise ValueError("a prefix is letters, digits, '.', '_', ':' and '-': braces would move keys between nodes")
        return value

    @field_validator("url")
    @classmethod
    def _url(cls, value: SecretStr) -> SecretStr:
        check_url(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        url = self.url.get_secret_value()
        if self.cluster and not fits_cluster(url):
            raise ValueError("redis_cluster needs a redis_url with host and port, no sentinels, and no database but 0")
        if (self.username or self.password) and has_credentials(url):
            raise ValueError(
                "redis_url names a user or password, and redis_username or redis_password too: name them once"
            )
        if (self.sentinel_username or self.sentinel_password) and sentinel_url(url) is None:
            raise ValueError(
                "redis_sentinel_username and redis_sentinel_password need a redis_url that names sentinels"
            )
        self.tls.check("redis_tls", self.uses_tls, "a redis_url that begins with rediss:// or rediss+sentinel://")
        return self

    @property
    def sentinels(self) -> SentinelUrl | None:
        """The sentinels that the URL names."""
        return sentinel_url(self.url.get_secret_value())

    @property
    def server_url(self) -> str:
        """The URL as for one server; with sentinels the host is that of the first one."""
        return self.sentinels.server_url if self.sentinels else self.url.get_secret_value()

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.get_secret_value().lower().startswith(("rediss:", "rediss+"))

    @property
    def address(self) -> str:
        """The URL without its password, for logs."""
        return masked(self.url.get_secret_value())


class SchemaRegistrySettings(Group):
    """The registry that has the schemas of Avro events."""

    url: str = Field("", description="schema registry; with it, events are Avro in Confluent's wire format [JSON]")
    username: str | None = Field(None, description="user at the schema registry")
    password: SecretStr | None = Field(None, description="password at the schema registry")
    tls_ca_file: Path | None = Field(None, description="CA certificates that sign the registry's [the system's]")

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        for url in filter(None, value.split(",")):
            parts = urlsplit(url.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
                raise ValueError(
                    "a schema registry is http[s]://HOST[:PORT], without user and password; commas between several"
                )
        return value.replace(" ", "")


class EventSettings(Group):
    """Where a JSON event has its fields, and what its type does (deploy/EVENTS.md)."""

    preset: Preset = Field(
        "plain", description="producer of the events; sets the paths, which single settings override"
    )
    user_id: str = Field("user_id", description="path to the user in an event")
    item_id: str = Field("item_id", description="path to the item; through a list, an event has a click for each")
    timestamp: str = Field("timestamp", description="path to the time: a number, or RFC 3339 text")
    timestamp_unit: Literal["s", "ms", "us", "ns"] = Field("ms", description="unit of times that are numbers")
    type: str = Field("event_type", description="path to the event type")
    roles: dict[str, str] = Field(
        {}, description="what events of each type do; others are ignored, * names the rest [all are clicks]"
    )
    outcomes: dict[str, float] = Field(
        {}, description="how good clicks of each type are for training, 0 to 1; * names the rest [1]"
    )
    ignore_null: str = Field(
        "",
        description="path; events with null there are ignored, and so are records without a value [none]",
        json_schema_extra=ADVANCED,
    )
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    min_timestamp_ms: int = Field(
        EARLIEST_MS,
        ge=0,
        le=LATEST_MS,
        description="an earlier timestamp makes a record a dead letter; the default refuses seconds, 0 refuses nothing",
        json_schema_extra=ADVANCED,
    )
    max_future_s: float = Field(
        DAY_S,
        ge=0,
        description="a timestamp further ahead of the clock and of the record's own makes a record a dead letter",
        json_schema_extra=ADVANCED,
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: dict[str, object]) -> dict[str, object]:
        return PRESETS.get(str(values.get("preset", "plain")), {}) | values

    @field_validator("roles", mode="before")
    @classmethod
    def _roles(cls, value: object) -> dict[str, str]:
        return roles_of(value)

    @field_validator("outcomes", mode="before")
    @classmethod
    def _outcomes(cls, value: object) -> dict[str, float]:
        return outcomes_of(value)

    @field_validator("user_id", "item_id", "timestamp", "type", "ignore_null")
    @classmethod
    def _path(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "ignore_null" and not value:
            return value
        through_list = any(step.many for path in parse(value) for step in path)
        if through_list and info.field_name != "item_id":
            raise ValueError("only events_item_id may go through a list: an event has one user, time and type")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        fields = {"user_id": self.user_id, "item_id": self.item_id, "timestamp": self.timestamp, "type": self.type}
        reader_of({f"events_{name}": PathField(text, str) for name, text in fields.items()})
        Roles(self.roles, self.outcomes)
        return self

    def bounds(self, now_ms: float) -> TimeBounds:
        """Return the earliest and the latest timestamp that is accepted at this time."""
        return TimeBounds(self.min_timestamp_ms, min(now_ms + self.max_future_s * 1000, LATEST_MS))


class SequenceSettings(Group):
    """The sequence of items that Redis stores for each user."""

    max_len: int | None = Field(None, ge=1, le=10_000, description="items stored per user [the model's max_len]")
    session_gap_s: float = Field(0, ge=0, description="a longer pause starts a new sequence; 0: never")
    ttl_s: int = Field(90 * DAY_S, ge=1, le=LONGEST_S, description="a sequence expires after this time without a click")


class ListSettings(Group):
    """The published lists."""

    top_k: int = Field(20, ge=1, le=1_000, description="items in a published list")
    filter_seen: bool = Field(True, description="do not recommend items in the user's stored sequence")
    ttl_s: int = Field(7 * DAY_S, ge=1, le=LONGEST_S, description="a published list expires after this time")
    exclude_ttl_s: int = Field(
        30 * DAY_S,
        ge=1,
        le=LONGEST_S,
        description="an item that an event excludes is out of the user's lists this long",
    )
    popular_half_life_s: float = Field(
        7 * DAY_S, gt=0, description="a click counts half as much for popularity after this time"
    )
    refresh_s: float = Field(
        2.0, gt=0, description="how often the popular list and the blocklist are refreshed", json_schema_extra=ADVANCED
    )


class ItemSettings(Group):
    """The table of items: availability, titles, categories."""

    topic: str = Field("", description="compacted topic with the table of items: key item id, value JSON [no table]")
    file: Path | None = Field(
        None, description="file with the table of items, read again when it changes: JSON lines, CSV or TSV"
    )
    unknown: Literal["refuse", "allow"] = Field(
        "refuse", description="whether lists may contain items that the table does not have"
    )

    _topic = field_validator("topic")(topic_name)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.topic and self.file:
            raise ValueError("items_topic and items_file are both set: set the one that holds the table of items")
        return self

    @property
    def has_table(self) -> bool:
        """Whether there is a table of items."""
        return bool(self.topic or self.file)


class InferenceSettings(Group):
    """How the model is run for serving."""

    threads: int = Field(1, ge=1, description="processor threads of the model")
    cache_bytes: int = Field(512 * 2**20, ge=0, description="memory for cached keys and values; 0: no cache")
    cache_half: bool = Field(
        False, description="cache keys and values as float16, for twice the users in a given memory"
    )
    index: Literal["auto", "exact", "approximate"] = Field(
        "auto", description="choose list items from the whole catalogue (exact) or from an index; auto: by its size"
    )


class ServingSettings(Group):
    """The life of the daemon and its model swaps."""

    rescore_users: int = Field(10_000, ge=0, description="most recent users who get new lists after a model swap")
    rescore_users_per_s: float = Field(
        200, gt=0, description="users re-scored per second after a model swap", json_schema_extra=ADVANCED
    )
    shadow_share: float = Field(0.1, ge=0, le=1, description="share of users that a shadow model scores")
    shutdown_timeout_s: float = Field(
        20, gt=0, description="longest time SIGTERM waits for the current batch", json_schema_extra=ADVANCED
    )
    liveness_timeout_s: float = Field(
        60, gt=0, description="/livez fails after this time without progress", json_schema_extra=ADVANCED
    )


class ModelSettings(Group):
    """The model directory to serve."""

    dir: Path | None = Field(None, description="model directory to serve")


class RegistrySettings(Group):
    """The model versions."""

    dir: Path | str | None = Field(
        None, description="folder of model versions, or its s3://, gs:// or abfs:// URL; its champion is served"
    )
    poll_s: float = Field(
        5, gt=0, description="how often the registry is checked for a new champion", json_schema_extra=ADVANCED
    )
    keep_versions: int = Field(5, ge=1, description="newest versions that pruning leaves, besides champion and shadow")

    _dir = field_validator("dir", mode="before")(check_place)


class ArchiveSettings(Group):
    """The event archive."""

    dir: Path | str | None = Field(
        None, description="folder of the event archive, or its s3://, gs:// or abfs:// URL; models are trained from it"
    )
    flush_s: float = Field(10, gt=0, description="longest time between two segments", json_schema_extra=ADVANCED)

    _dir = field_validator("dir", mode="before")(check_place)


class RetrainSettings(Group):
    """When retraining runs, on which clicks, and which models it promotes."""

    mode: Literal["incremental", "full"] = Field(
        "incremental", description="incremental trains the champion further, full trains from scratch"
    )
    every_s: float = Field(3600, gt=0, description="time between the starts of two rounds")
    min_new_events: int = Field(1, ge=0, description="new clicks that a round needs to start")
    full_every: int = Field(10, ge=1, description="train from scratch every N rounds")
    days: float = Field(90, gt=0, description="train on the clicks of the last N days")
    update_epochs: int = Field(10, ge=1, description="most epochs of an incremental round")
    update_learning_rate: float = Field(
        3e-4, gt=0, description="learning rate of incremental rounds", json_schema_extra=ADVANCED
    )
    holdout_share: float = Field(
        0.1, gt=0, lt=1, description="share of clicks, the newest, that models are compared on and none is trained on"
    )
    gate_tolerance: float = Field(
        0.02, ge=0, lt=1, description="share by which a promoted model may be worse than the champion"
    )
    http_port: int = Field(9465, ge=0, le=65_535, description="port of /metrics of streamrec retrain")


class HttpSettings(Group):
    """The HTTP port of the daemon."""

    host: str = Field("127.0.0.1", description="address of the live page, /metrics, /livez and /readyz")
    port: int = Field(9464, ge=0, le=65_535, description="port of the live page; 0: any free port")
    token: SecretStr | None = Field(
        None, min_length=16, description="bearer token for the page and /metrics [no token: open]"
    )
    titles: Path | None = Field(
        None, description="item titles for the page: CSV, TSV or Parquet with item_id and title, or MovieLens items"
    )

    @field_validator("token")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("a token is ASCII without spaces: it is sent in an HTTP header")
        return value


class CommandSettings(Group):
    """Commands other than `serve`, which waits without a limit."""

    wait_s: float = Field(30, ge=0, description="longest time that a command waits for a Kafka or Redis that starts")


class LogSettings(Group):
    """Log lines on stderr."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest severity that is logged")
    format: Literal["text", "json"] = Field("text", description="log lines for people or for machines")

    @field_validator("level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value
