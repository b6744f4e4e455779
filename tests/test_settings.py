"""Settings: their sources, the errors of wrong values, and secrets that are never shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from streamrec.errors import SettingsError
from streamrec.local.daemon import environment
from streamrec.redis.client import RedisClient
from streamrec.redis_urls import MASK
from streamrec.settings import ENV_PREFIX, all_settings
from streamrec.settings_sources import load_settings, secret_variables, unknown_variables

under_any_load = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Two values of every setting, the first not its default.
VALUES: dict[str, tuple[Any, Any]] = {
    "kafka_bootstrap_servers": ("a:1,b:2", "[::1]:9093"),
    "kafka_topic": ("views", "Clicks_2.x-y"),
    "kafka_group": ("shop", "streamrec"),
    "kafka_group_instance_id": ("daemon-1", "daemon-2"),
    "kafka_dead_letter_topic": ("graveyard", "bad"),
    "kafka_partitions": (12, 1),
    "kafka_replication_factor": (3, 1),
    "kafka_topic_epoch": (2, 1),
    "kafka_auto_offset_reset": ("latest", "earliest"),
    "kafka_session_timeout_s": (30.0, 6.5),
    "kafka_rebalance_timeout_s": (90.0, 2.0),
    "kafka_security_protocol": ("SSL", "PLAINTEXT"),
    "kafka_sasl_mechanism": ("SCRAM-SHA-512", "SCRAM-SHA-256"),
    "kafka_sasl_username": ("ann", "bob"),
    "kafka_sasl_password": ("s3cr3t", "0ther"),
    "kafka_oauth_token_url": ("https://idp.example/token", "http://[::1]:80/t"),
    "kafka_oauth_client_id": ("ann", "bob"),
    "kafka_oauth_client_secret": ("s3cr3t", "0ther:@/%"),
    "kafka_oauth_scope": ("kafka", "api://x/.default"),
    "events_schema_registry_url": ("https://registry.example:8081", "http://a:1,http://b:2/path"),
    "events_schema_registry_username": ("ann", "bob"),
    "events_schema_registry_password": ("s3cr3t", "0ther:@/%"),
    "events_schema_registry_tls_ca_file": ("/registry.pem", "/registry2.pem"),
    "kafka_oauth_tls_ca_file": ("/idp.pem", "/idp2.pem"),
    "kafka_aws_region": ("eu-central-1", "us-east-1"),
    "kafka_tls_ca_file": ("/ca.pem", "/ca2.pem"),
    "kafka_tls_cert_file": ("/cert.pem", "/cert2.pem"),
    "kafka_tls_key_file": ("/key.pem", "/key2.pem"),
    "redis_url": ("rediss://u:p@h:1/2", "unix:///run/redis.sock"),
    "redis_username": ("ann", "bob"),
    "redis_password": ("s3cr3t", "0ther@/%"),
    "redis_sentinel_username": ("ann", "bob"),
    "redis_sentinel_password": ("s3cr3t", "0ther@/%"),
    "redis_tls_ca_file": ("/redis.pem", "/redis2.pem"),
    "redis_tls_cert_file": ("/redis-cert.pem", "/redis-cert2.pem"),
    "redis_tls_key_file": ("/redis-key.pem", "/redis-key2.pem"),
    "redis_timeout_s": (0.25, 5.0),
    "redis_cluster": (True, False),
    "redis_wait_replicas": (1, 2),
    "redis_key_prefix": ("shop:v2", "a.b_c-d"),
    "model_dir": ("/models/a", "/models/b"),
    "registry_dir": ("/registry/a", "s3://models/registry?region=eu-west-1"),
    "registry_poll_s": (1.0, 60.0),
    "retrain_mode": ("full", "incremental"),
    "retrain_full_every": (3, 1),
    "retrain_every_s": (60.0, 86_400.0),
    "retrain_min_new_events": (100, 0),
    "retrain_days": (7.0, 30.0),
    "retrain_update_epochs": (2, 20),
    "retrain_update_learning_rate": (0.01, 0.0001),
    "train_replay": (0.0, 2.5),
    "train_epochs": (1, 5),
    "train_batch_size": (16, 128),
    "train_learning_rate": (0.01, 0.0001),
    "train_patience": (0, 9),
    "retrain_holdout_share": (0.2, 0.5),
    "retrain_gate_tolerance": (0.0, 0.1),
    "registry_keep_versions": (1, 9),
    "model_max_len": (20, 200),
    "model_hidden_units": (16, 128),
    "model_num_blocks": (1, 3),
    "model_num_heads": (2, 4),
    "model_dropout_rate": (0.0, 0.5),
    "model_reminder": (3.0, 4.5),
    "serving_shadow_share": (0.5, 1.0),
    "archive_dir": ("gs://clicks", "/archive/b"),
    "archive_flush_s": (1.0, 60.0),
    "serving_rescore_users": (0, 100),
    "serving_rescore_users_per_s": (1.0, 1000.0),
    "sequences_max_len": (50, 200),
    "lists_top_k": (5, 100),
    "items_topic": ("items", "catalogue.v2"),
    "items_file": ("/items.jsonl", "/items.csv"),
    "items_unknown": ("allow", "refuse"),
    "inference_index": ("exact", "approximate"),
    "lists_filter_seen": (False, True),
    "sequences_session_gap_s": (1800.0, 0.5),
    "sequences_ttl_s": (60, 61),
    "lists_ttl_s": (60, 61),
    "lists_exclude_ttl_s": (60, 61),
    "lists_popular_half_life_s": (3600.0, 1.0),
    "lists_refresh_s": (0.5, 9.0),
    "events_preset": ("segment", "ga4"),
    "events_ignore_null": ("after", "payload.after"),
    "events_user_id": ("visitor", "payload.user.id"),
    "events_item_id": ("sku", "products[].id|sku"),
    "events_timestamp": ("at", "time"),
    "events_timestamp_unit": ("us", "s"),
    "events_type": ("kind", "type"),
    "events_roles": ({"view": "click", "add to cart": "click", "*": "ignore"}, {"buy": "click"}),
    "events_outcomes": ({"view": 0.2, "*": 1.0}, {"buy": 0.5}),
    "events_max_future_s": (0.0, 5.0),
    "events_min_timestamp_ms": (0, 10**12),
    "kafka_max_batch": (1, 10_000),
    "kafka_poll_timeout_ms": (1, 50),
    "inference_cache_bytes": (0, 2**40),
    "inference_cache_half": (True, False),
    "inference_threads": (2, 8),
    "serving_shutdown_timeout_s": (1.0, 2.0),
    "http_host": ("0.0.0.0", "::"),
    "http_port": (0, 65_535),
    "retrain_http_port": (0, 65_535),
    "http_token": ("s3cr3t-of-16-or-more", "0ther-s3cr3t-0ther"),
    "http_titles": ("/items.csv", "/movies.dat"),
    "serving_liveness_timeout_s": (5.0, 6.0),
    "commands_wait_s": (5.0, 60.0),
    "log_level": ("DEBUG", "WARNING"),
    "model_item_dropout_rate": (0.1, 0.2),
    "model_position": ("learned", "rope"),
    "model_scale_embeddings": (False, True),
    "train_weight_decay": (0.1, 0.2),
    "train_ema_decay": (0.9, 0.99),
    "train_schedule": ("cosine", "constant"),
    "train_warmup_steps": (10, 20),
    "train_loss": ("gbce", "info_nce"),
    "train_num_negatives": (3, 7),
    "train_skip_seen": (True, False),
    "train_windows": ("newest", "all"),
    "train_restore_best": (False, True),
    "train_autocast": (True, False),
    "train_seed": (1, 2),
    "log_format": ("json", "text"),
}
# Other settings that a setting needs.
COMPANIONS = {
    "kafka_tls_ca_file": {"kafka_security_protocol": "SSL"},
    "kafka_tls_cert_file": {"kafka_security_protocol": "SSL", "kafka_tls_key_file": "/key.pem"},
    "kafka_tls_key_file": {"kafka_security_protocol": "SSL"},
    "redis_tls_ca_file": {"redis_url": "rediss://h:1"},
    "redis_sentinel_username": {"redis_url": "redis+sentinel://h:1/m"},
    "redis_sentinel_password": {"redis_url": "redis+sentinel://h:1/m"},
    "redis_cluster": {"redis_url": "redis://h:1/0"},
    "redis_tls_key_file": {"redis_url": "rediss://h:1"},
    "redis_tls_cert_file": {"redis_url": "rediss://h:1", "redis_tls_key_file": "/key.pem"},
}
EVERY = sorted(VALUES)


def plain(value: object) -> object:
    """Return the value of a setting in the form of VALUES."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value


def as_text(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{kind}={text}" for kind, text in value.items())
    return str(value)


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(kind)} = {json.dumps(text)}" for kind, text in value.items()) + "}"
    return json.dumps(value)


class Layers:
    """Sets one setting in the file, in the environment and by flag."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._file = folder / "streamrec.toml"
        self._file.write_text("")
        self._monkeypatch = monkeypatch
        self._name = name
        self._flags: dict[str, Any] = dict(COMPANIONS.get(name, {}))

    def in_file(self, value: object) -> None:
        setting = all_settings()[self._name]
        self._file.write_text(f"[{setting.group}]\n{setting.key} = {as_toml(value)}\n")

    def in_environment(self, value: object) -> None:
        self._monkeypatch.setenv(ENV_PREFIX + self._name.upper(), as_text(value))

    def by_flag(self, value: object) -> None:
        self._flags[self._name] = as_text(value)

    @property
    def in_force(self) -> object:
        settings = load_settings(self._file, self._flags)
        return plain(settings.value(all_settings()[self._name]))


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Layers:
    return Layers(tmp_path, monkeypatch, name)


def test_every_setting_is_tried_here() -> None:
    assert set(VALUES) == set(all_settings())


@pytest.mark.parametrize("name", EVERY)
def test_flags_win_over_environment_over_file_over_default(layers: Layers, name: str) -> None:
    one, other = VALUES[name]
    assert layers.in_force == plain(all_settings()[name].default) != one
    layers.in_file(one)
    assert layers.in_force == one
    layers.in_environment(other)
    assert layers.in_force == other
    layers.by_flag(one)
    assert layers.in_force == one


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_variable_counts_as_not_set(layers: Layers, name: str) -> None:
    layers.in_file(VALUES[name][0])
    layers.in_environment("")
    assert layers.in_force == VALUES[name][0]


@pytest.mark.parametrize("name", EVERY)
def test_every_setting_is_explained(name: str) -> None:
    assert all_settings()[name].help


def test_a_flag_that_was_not_given_leaves_the_environment_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_LISTS_TOP_K", "7")
    assert load_settings(flags={"lists_top_k": None}).lists.top_k == 7


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.lists.top_k = 5
    with pytest.raises(FrozenInstanceError):
        settings.lists = settings.lists


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("view=click", {"view": "click"}),
        (" view = click , add to cart=ignore,", {"view": "click", "add to cart": "ignore"}),
        ("a=b=click", {"a=b": "click"}),
        ('{"a, b": "click"}', {"a, b": "click"}),
        (",", {}),
    ],
)
def test_roles_are_pairs_or_json(text: str, roles: dict[str, str]) -> None:
    assert load_settings(flags={"events_roles": text}).events.roles == roles


def test_roles_may_be_a_table_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "streamrec.toml"
    path.write_text('[events]\nuser_id = "visitor"\n[events.roles]\nview = "click"\n"*" = "ignore"\n')
    events = load_settings(path).events
    assert (events.user_id, events.roles) == ("visitor", {"view": "click", "*": "ignore"})


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on"])
def test_yes_and_no_have_many_spellings(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("STREAMREC_LISTS_FILTER_SEEN", text)
    assert load_settings().lists.filter_seen is True


def test_levels_and_protocols_may_be_lower_case() -> None:
    settings = load_settings(flags={"log_level": "debug", "kafka_security_protocol": "ssl"})
    assert (settings.log.level, settings.kafka.security_protocol) == ("DEBUG", "SSL")


def test_the_dead_letter_topic_follows_the_topic() -> None:
    assert load_settings(flags={"kafka_topic": "views"}).kafka.dead_letters == "views-dead-letter"
    assert load_settings(flags={"kafka_dead_letter_topic": "bad"}).kafka.dead_letters == "bad"


NO_PATHS = [
    ("user_id", ""),
    ("user_id", 'a"b'),
    ("item_id", "a\nb"),
    ("timestamp", "a\\b"),
    ("user_id", "a..b"),
    ("user_id", ".a"),
    ("user_id", "a."),
    ("user_id", "a|"),
    ("user_id", "|"),
    ("type", "a\\"),
    ("item_id", "[]"),
    ("item_id", "a[0].b"),
    ("item_id", "a[].[]"),
    ("item_id", "a[][]"),
    ("item_id", "a]b"),
    ("item_id", "a[]b"),
]

WRONG: list[tuple[str, Any, str]] = [
    ("kafka_bootstrap_servers", "localhost", "'localhost' is not host:port"),
    ("kafka_bootstrap_servers", "a:1,,b:2", "'' is not host:port"),
    ("kafka_bootstrap_servers", "kafka://a:1", "'kafka://a:1' is not host:port"),
    ("kafka_bootstrap_servers", "a:port", "'a:port' is not host:port"),
    ("kafka_bootstrap_servers", "a:65536", "'a:65536' is not host:port"),
    ("kafka_bootstrap_servers", "a:0", "'a:0' is not host:port"),
    ("kafka_bootstrap_servers", "", "is not host:port"),
    ("kafka_topic", "my clicks", "1 to 249 letters, digits"),
    ("kafka_topic", "", "at least 1 character"),
    ("kafka_topic", "x" * 250, "1 to 249 letters, digits"),
    ("kafka_group", "", "at least 1 character"),
    ("kafka_dead_letter_topic", "a/b", "1 to 249 letters, digits"),
    ("kafka_partitions", 0, "greater than or equal to 1"),
    ("kafka_topic_epoch", -1, "greater than or equal to 0"),
    ("kafka_auto_offset_reset", "newest", "'earliest' or 'latest'"),
    ("kafka_session_timeout_s", "inf", "finite number"),
    ("kafka_session_timeout_s", 0, "greater than or equal to 1"),
    ("kafka_security_protocol", "TLS", "'PLAINTEXT', 'SSL', 'SASL_PLAINTEXT' or 'SASL_SSL'"),
    ("kafka_sasl_mechanism", "GSSAPI", "'PLAIN', 'SCRAM-SHA-256', 'SCRAM-SHA-512', 'OAUTHBEARER' or 'AWS_MSK_IAM'"),
    ("kafka_oauth_token_url", "idp.example/token", "a token endpoint is https://HOST"),
    ("kafka_oauth_token_url", "https://", "a token endpoint is https://HOST"),
    ("events_schema_registry_url", "registry:8081", "a schema registry is http"),
    ("events_schema_registry_url", "https://a:1,ftp://b", "a schema registry is http"),
    ("redis_timeout_s", 0, "greater than 0"),
    ("redis_key_prefix", "{a}", "braces would move keys between nodes"),
    ("redis_key_prefix", "", "a prefix is letters"),
    ("redis_key_prefix", "a b", "a prefix is letters"),
    ("sequences_max_len", 0, "greater than or equal to 1"),
    ("sequences_max_len", "all", "valid integer"),
    ("lists_top_k", "ten", "valid integer"),
    ("lists_top_k", 2.5, "valid integer"),
    ("lists_top_k", 1_001, "less than or equal to 1000"),
    ("lists_filter_seen", "maybe", "valid boolean"),
    ("sequences_session_gap_s", "inf", "finite number"),
    ("sequences_session_gap_s", "nan", "finite number"),
    ("sequences_session_gap_s", "30min", "valid number"),
    ("sequences_ttl_s", 10**18, "less than or equal to"),
    ("lists_ttl_s", 0, "greater than or equal to 1"),
    ("lists_popular_half_life_s", 0, "greater than 0"),
    *(
        (f"events_{name}", text, "a path is names joined by dots, [] behind the name of a list")
        for name, text in NO_PATHS
    ),
    ("events_user_id", "users[].id", "only events_item_id may go through a list"),
    ("events_ignore_null", "rows[]", "only events_item_id may go through a list"),
    ("events_preset", "rudderstack", "'plain', 'segment', 'cloudevents', 'debezium', 'snowplow' or 'ga4'"),
    *(
        ("events_roles", text, "write view=click,purchase=")
        for text in ("view", "=click", "view,cart=click", "[1]", '{"a": {}}')
    ),
    ("events_roles", "view=clik", "'clik' of 'view' is no role: roles are click, exclude, click+exclude, ignore"),
    ("events_roles", {"view": True}, "'True' of 'view' is no role"),
    *(("events_outcomes", text, "write view=0.2,purchase=1, or JSON, with") for text in ("a", "a=b", "a=2", "a=nan")),
    ("events_timestamp_unit", "min", "'s', 'ms', 'us' or 'ns'"),
    ("events_min_timestamp_ms", -1, "greater than or equal to 0"),
    ("events_min_timestamp_ms", 10**14 + 1, "less than or equal to"),
    ("kafka_max_batch", 10_001, "less than or equal to 10000"),
    ("http_port", 65_536, "less than or equal to 65535"),
    ("log_level", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ("log_format", "xml", "'text' or 'json'"),
]


@pytest.mark.parametrize(("name", "value", "right"), WRONG, ids=lambda part: str(part)[:24])
def test_a_wrong_value_is_refused_by_name_with_what_is_right(name: str, value: object, right: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags={name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}: ")
    assert right in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kafka_oauth_token_url", "https://me:s3cret@idp.example/token"),
        ("events_schema_registry_url", "https://me:s3cret@registry.example"),
        ("archive_dir", "s3:/me:s3cret@bucket"),
        ("registry_dir", "swift://bucket?secret_key=s3cret"),
    ],
)
def test_a_wrong_url_that_may_hold_a_password_is_not_repeated(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags={name: value})
    assert str(caught.value).startswith(f"{name}: ")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "s3cr3t", "s3cr3t with spaces in", "s3cr3t-é-non-ascii", 1234567890123456])
def test_a_short_or_unsendable_token_is_refused_and_not_repeated(token: object) -> None:
    with pytest.raises(SettingsError, match=r"^http_token: ") as caught:
        load_settings(flags={"http_token": token})
    assert "s3cr3t" not in str(caught.value)
    assert "123456789" not in str(caught.value)


def test_every_wrong_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_LISTS_TOP_K", "ten")
    monkeypatch.setenv("STREAMREC_SEQUENCES_MAX_LEN", "-1")
    with pytest.raises(SettingsError, match=r"sequences_max_len='-1': .*; lists_top_k='ten': "):
        load_settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"events_user_id": "id", "events_item_id": "id"},
            "events_item_id and events_user_id name one place of an event",
        ),
        (
            {"events_user_id": "a.b", "events_item_id": "c|a.b.c"},
            "events_item_id and events_user_id name one place of an event, or one within the other",
        ),
        (
            {"events_user_id": "a.b", "events_timestamp": "a"},
            "events_timestamp and events_user_id name one place of an event, or one within the other",
        ),
        (
            {"events_user_id": "a.b", "events_item_id": "a[].b"},
            "events_item_id and events_user_id disagree whether a is a list",
        ),
        (
            {"events_roles": "view=click,dislike=exclude", "events_outcomes": "view=0.2,dislike=1"},
            "events_outcomes names 'dislike', and events_roles makes no click of its events",
        ),
        ({"kafka_topic": "a", "kafka_dead_letter_topic": "a"}, "kafka_dead_letter_topic must differ from kafka_topic"),
        ({"kafka_security_protocol": "SASL_SSL"}, "SASL_SSL needs kafka_sasl_username and kafka_sasl_password"),
        (
            {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_username": "u"},
            "SASL_PLAINTEXT needs kafka_sasl_username and kafka_sasl_password",
        ),
        (
            {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_mechanism": "OAUTHBEARER"},
            "OAUTHBEARER needs kafka_oauth_token_url, kafka_oauth_client_id and kafka_oauth_client_secret",
        ),
        (
            {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "AWS_MSK_IAM"},
            "AWS_MSK_IAM needs kafka_security_protocol SASL_SSL",
        ),
        (
            {"kafka_tls_cert_file": "c.pem", "kafka_security_protocol": "SSL"},
            "kafka_tls_cert_file needs kafka_tls_key_file",
        ),
        ({"kafka_tls_ca_file": "c.pem"}, "kafka_tls_ca_file needs kafka_security_protocol SSL or SASL_SSL"),
        ({"redis_tls_ca_file": "ca.pem"}, "redis_tls_ca_file needs a redis_url that begins with rediss://"),
        ({"redis_tls_key_file": "k.pem"}, "redis_tls_key_file needs a redis_url that begins with rediss://"),
        (
            {"redis_tls_cert_file": "c.pem", "redis_url": "rediss://h"},
            "redis_tls_cert_file needs redis_tls_key_file",
        ),
        (
            {"redis_sentinel_password": "pw"},
            "redis_sentinel_username and redis_sentinel_password need a redis_url that",
        ),
        ({"redis_url": "redis+sentinel://h:1/m", "redis_cluster": True}, "redis_cluster needs a redis_url with"),
        ({"redis_url": "redis+sentinel://h:1/m", "redis_tls_ca_file": "ca.pem"}, "redis_tls_ca_file needs a redis_url"),
        ({"redis_url": "redis://:pw@h", "redis_password": "pw"}, "redis_url names a user or password, and redis_"),
        ({"redis_url": "redis://ann@h", "redis_username": "ann"}, "redis_url names a user or password, and redis_"),
        ({"redis_url": "redis://h?password=pw", "redis_password": "pw"}, "redis_url names a user or password"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, dict) else None,
)
def test_settings_that_do_not_fit_together_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags=flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lists]\ntopk = 5", "{file}: lists_topk is not a setting; did you mean top_k in [lists]?"),
        ("topk = 5", "{file}: topk is not a setting"),
        ("[kafka]\nbootstrap = 'a:1'", "kafka_bootstrap is not a setting; did you mean bootstrap_servers in [kafka]?"),
        ("[redis]\npasword = 's3cr3t'", "redis_pasword is not a setting; did you mean password in [redis]?"),
        ("STREAMREC_LISTS_TOP_K = 5", "STREAMREC_LISTS_TOP_K is not a setting; did you mean top_k in [lists]?"),
        ("zzz = 1", "{file}: zzz is not a setting"),
        ("[lists]\ntop_k = [5]", "lists_top_k=[5]: Input should be a valid integer"),
        ("[lists]\ntop_k = 'ten'", "lists_top_k='ten': Input should be a valid integer"),
        ("[lists.top_k]\nten = 10", "lists_top_k_ten is not a setting; did you mean top_k in [lists]?"),
        ("[train]\nepochs = 'ten'", "train_epochs='ten': Input should be a valid integer"),
        ("[train]\nepochs = 0", "train_epochs=0: must be at least 1"),
        ("[model]\nhidden_units = 7\nnum_heads = 2", "model_hidden_units=7 is not a multiple of num_heads=2"),
        ("[events]\nroles = 5", "events_roles=5: write view=click"),
        ("[kafka]\nsasl_password = 5", "kafka_sasl_password: Input should be a valid string"),
        ("top_k 5", "cannot read {file}: "),
        ("[lists]\ntop_k = 5\ntop_k = 6", "cannot read {file}: "),
        ("\xff", "cannot read {file}: "),
    ],
)
def test_a_wrong_settings_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "streamrec.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert message.format(file=path) in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_missing_settings_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="there is no settings file at"):
        load_settings(tmp_path / name)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("STREAMREC_LISTS_TOPK", "STREAMREC_LISTS_TOP_K"),
        ("STREAMREC_KAFKA_TOPICS", "STREAMREC_KAFKA_TOPIC"),
        ("STREAMREC_REDIS_URI", "STREAMREC_REDIS_URL"),
    ],
)
def test_a_misspelt_variable_gives_a_warning(variable: str, meant: str) -> None:
    assert unknown_variables({variable: "s3cr3t"}) == [f"{variable} is not a setting; did you mean {meant}?"]


def test_variables_that_are_no_near_miss_are_ignored() -> None:
    orchestrators = {"STREAMREC_SERVICE_HOST": "1", "STREAMREC_PORT_9464_TCP_ADDR": "2", "PATH": "3"}
    assert unknown_variables(orchestrators | {f"STREAMREC_{name.upper()}": "x" for name in VALUES}) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://:6379",
        "redis://h:port",
        "redis://h:99999",
        "redis://[::1",
        "unix://",
        "redis://h/zero",
        "redis://h/-1",
        "redis://u:a/b@h",
        "redis://u:12?b@h",
        "redis://u:12#b@h/0",
        "redis+sentinel://",
        "redis+sentinel://h:1",
        "redis+sentinel://h:1/",
        "redis+sentinel://h:1/0/m",
        "redis+sentinel://h/m/0",
        "redis+sentinel://h:1,h/m",
        "redis+sentinel://h:1,/m",
        "redis+sentinel://h:0/m",
        "redis+sentinel://h:1,[::1]:2/m",
        "redis+sentinel:/h:1/m",
        "redis+sentinel://u:a/b@h:1/m",
        "redis+sentinel://u:1/b?@h:1/m",
        "redis+sentinel://u:1/b/#@h:1/m",
        "redis+sentinel://u:a@b@h:1/m",
        "unix+sentinel://h:1/m",
    ],
)
def test_a_wrong_redis_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags={"redis_url": url})
    message = str(caught.value)
    assert message.startswith("redis_url: ")
    assert not url or url not in message.replace("unix://PATH", "")


@pytest.mark.parametrize("option", ["foo=1", "db=abc", "socket_timeout=soon", "protocol=9", "ssl_keyfile=x"])
def test_an_unknown_option_of_a_redis_url_is_refused(option: str) -> None:
    settings = load_settings(flags={"redis_url": f"redis://u:s3cr3t@localhost:1/0?{option}"})
    with pytest.raises(SettingsError, match="redis_url: an option after the") as caught:
        RedisClient(settings.redis)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "redis://localhost"),
        ("redis://u:s3cr3t@h:1/2", f"redis://u:{MASK}@h:1/2"),
        ("rediss://:s3cr3t@[::1]:1/2?db=3", f"rediss://:{MASK}@[::1]:1/2?db=3"),
        ("redis://s3cr3t@h", f"redis://{MASK}@h"),
        ("redis://h/0?username=u&password=s3cr3t&db=1", f"redis://h/0?username=u&password={MASK}&db=1"),
        ("unix://u:s3cr3t@/run/r.sock?db=1", f"unix://u:{MASK}@/run/r.sock?db=1"),
        ("unix:///run/r.sock", "unix:///run/r.sock"),
        ("redis://u:%40s3cr3t%2F@h", f"redis://u:{MASK}@h"),
        ("redis://u:a@s3cr3t@h", f"redis://u:{MASK}@h"),
        ("redis://u:s3cr3t:s3cr3t@h:1", f"redis://u:{MASK}@h:1"),
        ("redis+sentinel://h:1,g:2/m", "redis+sentinel://h:1,g:2/m"),
        ("redis+sentinel://u:s3cr3t@h:1,g:2/m/3?db=4", f"redis+sentinel://u:{MASK}@h:1,g:2/m/3?db=4"),
        ("rediss+sentinel://h:1/m/0?password=s3cr3t", f"rediss+sentinel://h:1/m/0?password={MASK}"),
    ],
)
def test_a_redis_address_is_shown_without_its_password(url: str, shown: str) -> None:
    settings = load_settings(flags={"redis_url": url})
    assert settings.redis.address == shown
    assert settings.redis.url.get_secret_value() == url


def texts_of(flags: dict[str, Any]) -> Iterator[str]:
    """Return every text that shows settings or the errors of wrong ones."""
    try:
        settings = load_settings(flags=flags)
    except SettingsError as error:
        yield from (str(error), repr(error), repr(error.__cause__))
        return
    yield from (
        repr(settings),
        str(settings),
        repr(settings.shown()),
        settings.redis.address,
        repr(settings.kafka),
        repr(settings.redis),
    )


secrets = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(lambda text: f"s3cr3t{text}")
URLS = [
    "redis://u:{}@h:1/0",
    "rediss://:{}@h",
    "redis://{}@h",
    "redis://h?password={}",
    "unix://:{}@/s",
    "http://u:{}@h",
    "redis://:{}",
    "redis://u:{}@h:99999",
    "redis://u:{}@h/x",
    "redis://u:1?{}@h",
    "redis://u:1#{}@h",
    "redis://u:1/{}@h",
    "redis+sentinel://u:{}@h:1,g:2/m/0",
    "redis+sentinel://{}@h:1,g:2/m",
    "redis+sentinel://:{}@h:1,g:2",
    "redis+sentinel://h:1/m?password={}",
    "redis+sentinel://u:1/{}@h:1/m",
    "redis+sentinel://u:1/m?{}@h:1/m",
    "redis://h",
    "http://h",
]


@under_any_load
@given(secrets, st.sampled_from(URLS), st.booleans(), st.booleans())
def test_secrets_are_never_shown(secret: str, url: str, encoded: bool, wrong: bool) -> None:
    assume(encoded or "//{}@" not in url or ":" not in secret)  # there the text before a colon is the user
    flags = {
        "redis_url": url.format(quote(secret, safe="") if encoded else secret),
        "kafka_sasl_password": secret,
        "kafka_sasl_username": "u",
        **({} if "{}" in url else {"redis_password": secret}),
        "lists_top_k": "ten" if wrong else "10",
    }
    for text in texts_of(flags):
        assert "s3cr3t" not in text


def put(folder: Path, content: bytes) -> str:
    path = folder / "secret"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("variable", secret_variables())
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_may_come_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, end: str
) -> None:
    name = secret_variables()[variable]
    secret, other = VALUES[name]
    for companion, value in COMPANIONS.get(name, {}).items():
        monkeypatch.setenv(f"STREAMREC_{companion.upper()}", value)
    monkeypatch.setenv(f"{variable}_FILE", put(tmp_path, f"{secret}{end}".encode()))
    setting = all_settings()[name]
    (tmp_path / "streamrec.toml").write_text(f"[{setting.group}]\n{setting.key} = {as_toml(other)}\n")
    settings = load_settings(tmp_path / "streamrec.toml")
    assert settings.value(setting).get_secret_value() == secret
    assert load_settings(flags={name: other}) != settings
    monkeypatch.setenv(variable, "")  # counts as not set
    assert load_settings().value(setting).get_secret_value() == secret
    monkeypatch.setenv(variable, other)
    with pytest.raises(SettingsError, match=f"^{variable} and {variable}_FILE are both set: set one of them$"):
        load_settings()


def test_only_secrets_may_come_from_files() -> None:
    assert set(secret_variables().values()) == {
        "kafka_sasl_password",
        "kafka_oauth_client_secret",
        "events_schema_registry_password",
        "redis_url",
        "redis_password",
        "redis_sentinel_password",
        "http_token",
    }


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b"\n", "is empty"), (b"s3cr3t\xff", "is no UTF-8"), (None, r"cannot read .*: No such file")],
)
def test_an_unusable_secret_file_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, problem: str
) -> None:
    path = str(tmp_path / "missing") if content is None else put(tmp_path, content)
    monkeypatch.setenv("STREAMREC_REDIS_PASSWORD_FILE", path)
    with pytest.raises(SettingsError, match=rf"^STREAMREC_REDIS_PASSWORD_FILE: .*{problem}") as caught:
        load_settings()
    assert path in str(caught.value)
    assert "s3cr3t" not in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize("path", ["s3cr3t", "s3cr3t/of=base64", "s3cr3t" * 100])
def test_a_secret_set_instead_of_its_path_is_not_shown(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("STREAMREC_HTTP_TOKEN_FILE", path)
    with pytest.raises(
        SettingsError, match=r"^STREAMREC_HTTP_TOKEN_FILE: cannot read the file that it names: "
    ) as caught:
        load_settings()
    assert "s3cr3t" not in str(caught.value)


def test_a_wrong_secret_from_a_file_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, wrong in (("HTTP_TOKEN", b"s3cr3t"), ("REDIS_URL", b"http://:s3cr3t@h")):
        with monkeypatch.context() as patch:
            patch.setenv(f"STREAMREC_{variable}_FILE", put(tmp_path, wrong))
            with pytest.raises(SettingsError, match=f"^{variable.lower()}: ") as caught:
                load_settings()
        assert "s3cr3t" not in str(caught.value)


def test_a_child_process_is_given_the_secrets_themselves() -> None:
    given = environment(load_settings(flags={name: VALUES[name][0] for name in ("http_token", "kafka_sasl_password")}))
    assert given["STREAMREC_HTTP_TOKEN"] == VALUES["http_token"][0]
    assert given["STREAMREC_KAFKA_SASL_PASSWORD"] == VALUES["kafka_sasl_password"][0]
    assert given["STREAMREC_REDIS_URL"] == "redis://localhost:6379/0"


def test_a_misspelt_variable_of_a_file_gives_a_warning() -> None:
    right = {f"{variable}_FILE": "/x" for variable in secret_variables()}
    assert unknown_variables(right) == []
    meant = "STREAMREC_REDIS_PASSWORD_FILE"
    assert unknown_variables({"STREAMREC_REDIS_PASWORD_FILE": "x"}) == [
        f"STREAMREC_REDIS_PASWORD_FILE is not a setting; did you mean {meant}?"
    ]


def test_every_setting_in_force_is_shown() -> None:
    shown = load_settings(
        flags={
            "lists_top_k": "7",
            "kafka_sasl_password": "s3cr3t",
            "kafka_topic": "views",
            "http_token": "s3cr3t-s3cr3t-s3cr3t",
        }
    ).shown()
    assert list(shown) == list(all_settings().values())
    shown = {setting.name: value for setting, value in shown.items()}
    assert shown["lists_top_k"] == 7
    assert shown["kafka_sasl_password"] == shown["http_token"] == MASK
    assert shown["kafka_dead_letter_topic"] == "views-dead-letter"
    assert shown["model_dir"] is None
