"""Settings: flags win over environment (STREAMREC_*) over a TOML file over defaults.

Each setting is listed once, here; flags, help texts, `streamrec check --show` and the README's table come
from this class. A secret may also stand in a file, whose path STREAMREC_NAME_FILE holds.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from streamrec.errors import SettingsError
from streamrec.secret_files import secrets_in_files

ENV_PREFIX = "STREAMREC_"
MASK = "********"
DAY_S = 86_400
LONGEST_S = 100 * 365 * DAY_S  # longer ones would overflow somewhere


class Settings(BaseSettings):
    """What is in force. Frozen: a changed setting needs a restart."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, allow_inf_nan=False
    )

    kafka_bootstrap_servers: str = Field("localhost:9092", description="Kafka brokers, host:port[,host:port...]")
    kafka_topic: str = Field("clicks", min_length=1, description="topic of the click events")
    kafka_group: str = Field(
        "streamrec", min_length=1, description="consumer group; daemons of one group share the partitions"
    )
    kafka_group_instance_id: str | None = Field(None, description="static membership: a name of this daemon's own")
    kafka_dead_letter_topic: str = Field("", description="topic for records that are no events [TOPIC-dead-letter]")
    kafka_partitions: int = Field(4, ge=1, description="partitions of topics that have to be created")
    kafka_replication_factor: int = Field(1, ge=1, description="replicas of created topics; 3 is usual on a cluster")
    kafka_topic_epoch: int = Field(
        0, ge=0, le=2**31, description="raise it by one when the topic was deleted and created again"
    )
    kafka_auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where a new group begins to read"
    )
    kafka_session_timeout_s: float = Field(10, ge=1, description="Kafka drops a silent member after so long")
    kafka_rebalance_timeout_s: float = Field(60, ge=2, description="how long a rebalance waits for the batch in hand")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="SASL mechanism"
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user")
    kafka_sasl_password: SecretStr | None = Field(None, description="SASL password")
    kafka_tls_ca_file: Path | None = Field(None, description="CA certificates that sign the brokers' [the system's]")
    kafka_tls_cert_file: Path | None = Field(None, description="client certificate")
    kafka_tls_key_file: Path | None = Field(None, description="client key")

    redis_url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"), description="redis[s]://[USER:PASSWORD@]HOST:PORT/DB, or unix://PATH"
    )
    redis_username: str | None = Field(None, description="Redis user, where the URL names none")
    redis_password: SecretStr | None = Field(
        None, description="Redis password, as it is; in a URL it is percent-encoded"
    )
    redis_tls_ca_file: Path | None = Field(
        None, description="CA certificates that sign the Redis server's [the system's]"
    )
    redis_tls_cert_file: Path | None = Field(None, description="client certificate")
    redis_tls_key_file: Path | None = Field(None, description="client key")
    redis_timeout_s: float = Field(1.0, gt=0, description="a Redis command may take so long before it is tried again")
    redis_cluster: bool = Field(False, description="the server is a Redis Cluster; redis_url names any of its nodes")
    redis_wait_replicas: int = Field(
        0, ge=0, description="so many replicas must have a batch's writes before its offsets are committed"
    )
    redis_key_prefix: str = Field("streamrec", description="first part of every Redis key")

    model_dir: Path | None = Field(None, description="the model directory to serve")
    registry_dir: Path | None = Field(
        None, description="folder of model versions; instead of model_dir, its champion is served"
    )
    registry_poll_s: float = Field(5, gt=0, description="how often the registry is asked for a new champion")
    rescore_users: int = Field(10_000, ge=0, description="users who clicked last and get new lists after a swap")
    rescore_users_per_s: float = Field(200, gt=0, description="how many of them a second")
    shadow_share: float = Field(0.1, ge=0, le=1, description="share of the users whom a shadow scores, if there is one")
    archive_dir: Path | None = Field(None, description="folder of the event archive, from which models are trained")
    archive_flush_s: float = Field(10, gt=0, description="a segment of the archive is written at least so often")
    retrain_mode: Literal["incremental", "full"] = Field(
        "incremental", description="incremental trains the champion on, full begins from scratch"
    )
    retrain_full_every: int = Field(10, ge=1, description="every so many-th round begins from scratch all the same")
    retrain_every_s: float = Field(3600, gt=0, description="a round of retraining begins so long after the last one")
    retrain_min_new_events: int = Field(1, ge=0, description="but only once so many clicks are new")
    train_days: float = Field(90, gt=0, description="models are trained on the clicks of so many days")
    train_epochs: int = Field(50, ge=1, description="most epochs of a training")
    train_update_epochs: int = Field(10, ge=1, description="most epochs of an incremental round")
    train_update_learning_rate: float = Field(
        3e-4, gt=0, description="of incremental rounds: a little that is new must not undo what was learned"
    )
    train_replay: float = Field(
        2.0, ge=0, description="incremental rounds: windows of old clicks for each window with new ones"
    )
    train_batch_size: int = Field(64, ge=1, description="windows in a batch of a training")
    train_learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    train_patience: int = Field(
        4, ge=0, description="a training stops after so many epochs without a better NDCG@10; 0: never"
    )
    holdout_share: float = Field(
        0.1, gt=0, lt=1, description="share of the newest clicks that judges models and trains none"
    )
    gate_tolerance: float = Field(
        0.02, ge=0, lt=1, description="a new model may be worse than the champion by this share"
    )
    keep_versions: int = Field(5, ge=1, description="versions that stay in the registry, besides champions")
    model_max_len: int = Field(50, ge=1, le=10_000, description="tokens in a window of trained models")
    model_hidden_units: int = Field(64, ge=2, description="width of trained models")
    model_num_blocks: int = Field(2, ge=1, description="transformer blocks of trained models")
    model_num_heads: int = Field(1, ge=1, description="attention heads of trained models")
    model_dropout_rate: float = Field(0.2, ge=0, lt=1, description="dropout of trained models")
    model_reminder: float = Field(
        0.0,
        allow_inf_nan=False,
        description="added to the scores of the items of the user's window, where filter_seen=false",
    )
    max_len: int | None = Field(None, ge=1, le=10_000, description="items kept of a user [the model's max_len]")
    top_k: int = Field(20, ge=1, le=1_000, description="items in a published list")
    top_k_index: Literal["auto", "exact", "approximate"] = Field(
        "auto", description="which items a list is chosen from: all, or, in a large catalogue, what an index names"
    )
    filter_seen: bool = Field(True, description="leave the items of the user's stored sequence out of his list")
    session_gap_s: float = Field(0, ge=0, description="a longer pause starts a new sequence; 0: never")
    sequence_ttl_s: int = Field(
        90 * DAY_S, ge=1, le=LONGEST_S, description="a user's sequence is forgotten after so long a silence"
    )
    recs_ttl_s: int = Field(7 * DAY_S, ge=1, le=LONGEST_S, description="a published list expires after so long")
    popular_half_life_s: float = Field(7 * DAY_S, gt=0, description="a click counts half as popular after so long")
    refresh_s: float = Field(2.0, gt=0, description="how often popular list and blocklist are refreshed")

    user_id_field: str = Field("user_id", min_length=1, description="name of the event field with the user")
    item_id_field: str = Field("item_id", min_length=1, description="name of the event field with the item")
    timestamp_field: str = Field("timestamp", min_length=1, description="name of the event field with the time in ms")
    event_type_field: str = Field("event_type", min_length=1, description="name of the event field with the type")
    event_types: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="accepted event types, comma-separated; events without a type are always accepted [all]"
    )
    max_future_s: float = Field(DAY_S, ge=0, description="a timestamp further ahead of now is a bad record")

    max_batch: int = Field(256, ge=1, le=10_000, description="most records handled as one batch")
    poll_timeout_ms: int = Field(200, ge=1, description="how long a poll waits for records")
    cache_bytes: int = Field(512 * 2**20, ge=0, description="memory for cached keys and values; 0: no cache")
    cache_half: bool = Field(False, description="keep them as float16: twice the users in the same memory")
    inference_threads: int = Field(1, ge=1, description="processor threads of the model")
    shutdown_timeout_s: float = Field(20, gt=0, description="how long SIGTERM waits for the batch in hand")

    http_host: str = Field("127.0.0.1", description="address of the live page, /metrics, /livez and /readyz")
    http_port: int = Field(9464, ge=0, le=65_535, description="their port; 0: any free one")
    http_token: SecretStr | None = Field(
        None, min_length=16, description="all of these but /livez and /readyz ask for it [nobody is asked]"
    )
    items: Path | None = Field(
        None, description="titles for the page: CSV, TSV or Parquet with item_id and title, or MovieLens items"
    )
    retrain_http_port: int = Field(9465, ge=0, le=65_535, description="port of the /metrics of streamrec retrain")
    liveness_timeout_s: float = Field(60, gt=0, description="/livez turns red after so long without progress")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least severity logged")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for machines")

    @field_validator("event_types", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("log_level", "kafka_security_protocol", "kafka_sasl_mechanism", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _addresses(cls, value: str) -> str:
        for address in value.split(","):
            found = re.fullmatch(r"\s*(?:[^\s:]+|\[[0-9a-fA-F:]+\]):(\d{1,5})\s*", address)
            if not found or not 1 <= int(found[1]) <= 65_535:
                raise ValueError(f"{address!r} is no host:port")
        return value.replace(" ", "")

    @field_validator("kafka_topic", "kafka_dead_letter_topic")
    @classmethod
    def _topic(cls, value: str) -> str:
        if value and not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", value):
            raise ValueError("a topic name is 1 to 249 letters, digits, '.', '_' and '-'")
        return value

    @field_validator("user_id_field", "item_id_field", "timestamp_field", "event_type_field")
    @classmethod
    def _field_name(cls, value: str) -> str:
        if re.search(r'[\x00-\x1f"\\]', value):
            raise ValueError("a field name holds no quotes, backslashes or control characters")
        return value

    @field_validator("http_token")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("a token is ASCII without spaces: it travels in an HTTP header")
        return value

    @field_validator("redis_key_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"[a-zA-Z0-9._:-]+", value):
            raise ValueError("a prefix is letters, digits, '.', '_', ':' and '-': braces would move keys between nodes")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr) -> SecretStr:
        # the value is never repeated: it may hold a password
        try:
            parts = urlsplit(value.get_secret_value())
            _ = parts.port  # raises where it is no number
            usable = bool(parts.hostname) or (parts.scheme == "unix" and bool(parts.path))
        except ValueError:
            raise ValueError("not a URL; write redis[s]://[USER:PASSWORD@]HOST:PORT/DB or unix://PATH") from None
        if parts.scheme not in ("redis", "rediss", "unix") or not usable:
            raise ValueError("write redis[s]://[USER:PASSWORD@]HOST:PORT/DB or unix://PATH")
        if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
            # else a part of the password would be taken for the host, and shown
            raise ValueError("write '/', '?', '#' and '@' in user and password as %2F, %3F, %23 and %40")
        if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d+/?", parts.path):
            raise ValueError("the database after HOST:PORT/ is a number")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        names = (self.user_id_field, self.item_id_field, self.timestamp_field, self.event_type_field)
        if len(set(names)) < len(names):
            raise ValueError(f"event fields must have four different names, not {', '.join(names)}")
        if self.kafka_dead_letters == self.kafka_topic:
            raise ValueError(
                "kafka_dead_letter_topic must differ from kafka_topic, or dead letters would be read again"
            )
        if self.kafka_security_protocol.startswith("SASL") and not (
            self.kafka_sasl_username and self.kafka_sasl_password
        ):
            raise ValueError(f"{self.kafka_security_protocol} needs kafka_sasl_username and kafka_sasl_password")
        if self.redis_cluster and not _fits_cluster(self.redis_url.get_secret_value()):
            raise ValueError("redis_cluster needs a redis_url with host and port, and no database but 0")
        if (self.redis_username or self.redis_password) and _has_credentials(self.redis_url.get_secret_value()):
            raise ValueError(
                "redis_url names a user or password, and redis_username or redis_password too: name them once"
            )
        if self.model_dir and self.registry_dir:
            raise ValueError("model_dir and registry_dir are both set: set the one from which the model is to come")
        self._tls_fits("kafka", self.kafka_security_protocol.endswith("SSL"), "kafka_security_protocol SSL or SASL_SSL")
        self._tls_fits("redis", self.redis_uses_tls, "a redis_url that begins with rediss://")
        return self

    def _tls_fits(self, server: str, used: bool, need: str) -> None:
        given = [name for part in ("ca", "cert", "key") if getattr(self, name := f"{server}_tls_{part}_file")]
        if given and not used:  # else what was meant to be encrypted would not be
            raise ValueError(f"{given[0]} needs {need}")
        cert, key = f"{server}_tls_cert_file", f"{server}_tls_key_file"
        if cert in given and key not in given:
            raise ValueError(f"{cert} needs {key}")

    @property
    def kafka_dead_letters(self) -> str:
        """The dead-letter topic in force."""
        return self.kafka_dead_letter_topic or f"{self.kafka_topic}-dead-letter"

    @property
    def redis_uses_tls(self) -> bool:
        """Whether the connection to Redis is encrypted."""
        return self.redis_url.get_secret_value().lower().startswith("rediss:")

    @property
    def redis_address(self) -> str:
        """The Redis URL without its password, fit to be logged."""
        return _mask_url(self.redis_url.get_secret_value())

    def shown(self) -> dict[str, object]:
        """Every setting as it is in force, secrets masked."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values = {name: MASK if isinstance(value, SecretStr) else value for name, value in values.items()}
        return values | {"redis_url": self.redis_address, "kafka_dead_letter_topic": self.kafka_dead_letters}


def load_settings(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from flags, environment and a TOML file.

    Raises:
        SettingsError: a file cannot be read, a name is unknown, or a value is wrong.
    """
    names = secret_variables()
    secrets = {names[variable]: value for variable, value in secrets_in_files(names).items()}
    if config is not None and not config.is_file():
        raise SettingsError(f"there is no settings file at {config}")

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            files = InitSettingsSource(settings_cls, init_kwargs=secrets)
            return init_settings, env_settings, files, TomlConfigSettingsSource(settings_cls, config)

    try:
        return FileSettings(**{name: value for name, value in (flags or {}).items() if value is not None})
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None
    except (ValueError, OSError) as error:  # TOML syntax
        raise SettingsError(f"cannot read {config}: {error}") from None


def secret_variables() -> dict[str, str]:
    """The settings that are never shown, and may stand in files: name by variable."""
    secret = (name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation))
    return {ENV_PREFIX + name.upper(): name for name in secret}


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A warning for each STREAMREC_* variable that looks like a misspelt setting.

    Only near misses: orchestrators put variables of their own under a service's name.
    """
    names = [ENV_PREFIX + name.upper() for name in Settings.model_fields]
    names += [f"{variable}_FILE" for variable in secret_variables()]
    warnings = []
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in names:
            near = difflib.get_close_matches(variable, names, n=1, cutoff=0.8)
            warnings += [f"{variable} is not a setting; did you mean {near[0]}?"] if near else []
    return warnings


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors(include_url=False):
        name = ".".join(map(str, detail["loc"]))
        message = str(detail["msg"]).removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name.lower().removeprefix(ENV_PREFIX.lower()), Settings.model_fields, n=1)
            lines.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif not name:
            lines.append(message)
        else:
            secret = name in secret_variables().values()
            lines.append(f"{name}{'' if secret else '=' + repr(detail['input'])}: {message}")
    return "; ".join(lines)


def _fits_cluster(url: str) -> bool:
    parts = urlsplit(url)
    databases = {parts.path.strip("/"), *parse_qs(parts.query).get("db", [])}
    return parts.scheme != "unix" and databases <= {"", "0"}


def _has_credentials(url: str) -> bool:
    parts = urlsplit(url)
    return "@" in parts.netloc or not {"username", "password"}.isdisjoint(parse_qs(parts.query))


def _mask_url(url: str) -> str:
    parts = urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc:
        credentials, host = netloc.rsplit("@", 1)
        user, _, password = credentials.partition(":")
        netloc = f"{user + ':' if password else ''}{MASK}@{host}"  # what stands alone may be a misplaced password
    query = re.sub(r"(password=)[^&]*", rf"\1{MASK}", parts.query)
    shown = urlunsplit((parts.scheme, netloc, parts.path, query, ""))
    return shown.replace("unix:/", "unix:///", 1) if not netloc else shown
