"""The settings in force, and the names under which each can be set. Parts take groups of them (setting_groups.py).

A setting has one name: ``kafka_topic`` is ``--kafka-topic``, ``STREAMREC_KAFKA_TOPIC``, ``topic`` in table ``[kafka]``.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import SecretStr, TypeAdapter, ValidationError

from streamrec.errors import SettingsError
from streamrec.event_roles import excludes
from streamrec.redis_urls import MASK
from streamrec.setting_groups import (
    ArchiveSettings,
    CommandSettings,
    EventSettings,
    Group,
    HttpSettings,
    InferenceSettings,
    ItemSettings,
    KafkaSettings,
    ListSettings,
    LogSettings,
    ModelSettings,
    RedisSettings,
    RegistrySettings,
    RetrainSettings,
    SequenceSettings,
    ServingSettings,
)
from streamrec.store_urls import is_url

if TYPE_CHECKING:  # importing the library imports torch, which takes seconds
    from sasrec import SASRecConfig, TrainConfig

C = TypeVar("C")
ENV_PREFIX = "STREAMREC_"
# where the worker's training differs from the library's defaults
TRAINING_DEFAULTS: dict[str, object] = {"epochs": 50, "batch_size": 64, "patience": 4, "replay": 2.0}


@dataclass(frozen=True)
class Setting:
    """One setting: name, type, default and help text."""

    group: str
    key: str  # within the group
    kind: Any  # its type
    default: Any = field(hash=False)  # may be a table
    help: str
    advanced: bool = False

    @property
    def name(self) -> str:
        """The name on the command line, with underscores."""
        return f"{self.group}_{self.key}"

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        members = typing.get_args(self.kind) if typing.get_origin(self.kind) in (types.UnionType, typing.Union) else ()
        return tuple(member for member in members if member is not types.NoneType) or (self.kind,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a choice; empty for other types."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else ()

    @property
    def is_table(self) -> bool:
        """Whether the value is a table of a settings file."""
        return typing.get_origin(self.kind) is dict

    @property
    def secret(self) -> bool:
        """Whether the value is never shown, and may come from a file."""
        return SecretStr in self.kinds


@dataclass(frozen=True)
class Settings:
    """All groups of settings. Frozen: a changed setting needs a restart."""

    kafka: KafkaSettings
    redis: RedisSettings
    events: EventSettings
    sequences: SequenceSettings
    lists: ListSettings
    items: ItemSettings
    inference: InferenceSettings
    serving: ServingSettings
    model: ModelSettings
    registry: RegistrySettings
    archive: ArchiveSettings
    retrain: RetrainSettings
    http: HttpSettings
    commands: CommandSettings
    log: LogSettings
    # the values that were set, by name; not shown, since some are secrets
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return settings made from values by name: ``Settings.of(kafka_topic="views")``.

        Raises:
            SettingsError: a name is unknown, a value is wrong, or two do not fit together.
        """
        problems = [f"{name} is not a setting" for name in values if find_setting(name) is None]
        made: dict[str, Any] = {}
        for name, group in groups().items():
            try:
                made[name] = group.model_validate(_nested(name, values))
            except ValidationError as error:
                problems += _explain(name, error)
        kafka, items = made.get("kafka"), made.get("items")
        if kafka and items and items.topic in (kafka.topic, kafka.dead_letters):
            problems.append(f"items_topic={items.topic!r} is the topic of clicks or dead letters: name one of its own")
        if problems:
            raise SettingsError("; ".join(problems))
        settings = cls(**made, given=dict(values))
        if _of_library(values):
            _ = settings.model_shape, settings.training  # raises if a value is wrong
        if settings.model.dir and settings.registry.dir:
            raise SettingsError("model_dir and registry_dir are both set: set the one that holds the model to serve")
        return settings

    def but(self, **values: Any) -> Self:
        """Return settings that differ in these values, by name.

        Raises:
            SettingsError: as for ``of``.
        """
        return self.of(**{**self.given, **values})

    @cached_property
    def exclude_ttl_s(self) -> int:
        """How long an item that an event excludes is out of the user's lists; 0 if no role excludes."""
        return self.lists.exclude_ttl_s if excludes(self.events.roles) else 0

    @cached_property
    def model_shape(self) -> SASRecConfig:
        """Shape of retrained models; the number of items comes from the data."""
        from sasrec import SASRecConfig

        return _validated(SASRecConfig, "model", {"num_items": 1} | _given("model", self.given))

    @cached_property
    def training(self) -> TrainConfig:
        """Hyper-parameters of retraining."""
        from sasrec import TrainConfig

        return _validated(TrainConfig, "train", TRAINING_DEFAULTS | _given("train", self.given))

    def value(self, setting: Setting) -> Any:
        """Return the value of a setting that is in force."""
        if setting.name not in own_settings():
            return vars(self.training if setting.group == "train" else self.model_shape)[setting.key]
        value = vars(self)[setting.group]
        for field_name in _fields_to(type(value), setting.key):
            value = vars(value)[field_name]
        return value

    def shown(self) -> dict[Setting, object]:
        """Return every setting with its value in force, secrets masked."""
        values = {setting: self.value(setting) for setting in all_settings().values()}
        special = {"redis_url": self.redis.address, "kafka_dead_letter_topic": self.kafka.dead_letters}
        return {
            setting: special.get(setting.name, MASK if isinstance(value, SecretStr) else value)
            for setting, value in values.items()
        }


@cache
def groups() -> dict[str, type[Group]]:
    """Return the groups declared in setting_groups.py, by name."""
    return {name: kind for name, kind in typing.get_type_hints(Settings).items() if name != "given"}


@cache
def own_settings() -> dict[str, Setting]:
    """Return the settings declared in setting_groups.py, by name."""
    found = (setting for name, group in groups().items() for setting in _declared(name, group))
    return {setting.name: setting for setting in found}


@cache
def library_settings() -> dict[str, Setting]:
    """Return the settings that are hyper-parameters of the model library, by name. Imports torch."""
    from sasrec import SASRecConfig, TrainConfig

    found = {}
    for group, config in (("model", SASRecConfig), ("train", TrainConfig)):
        kinds = typing.get_type_hints(config)
        for spec in fields(config):
            if spec.default is MISSING:  # the number of items
                continue
            default = TRAINING_DEFAULTS.get(spec.name, spec.default) if group == "train" else spec.default
            setting = Setting(
                group, spec.name, kinds[spec.name], default, spec.metadata["help"], spec.metadata.get("advanced", False)
            )
            found[setting.name] = setting
    return found


def all_settings() -> dict[str, Setting]:
    """Return every setting, by name, group by group. Imports torch."""
    order = [*groups(), "train"]
    found = own_settings() | library_settings()
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].group)))


def find_setting(name: str) -> Setting | None:
    """Return the setting of a name; None if there is none."""
    found = own_settings().get(name)
    return library_settings().get(name) if found is None and _of_library([name]) else found


def _of_library(names: Mapping[str, Any] | list[str]) -> bool:
    """Return whether a name may be a hyper-parameter of the model library."""
    return any(name.startswith(("model_", "train_")) and name not in own_settings() for name in names)


def _declared(group: str, model: type[Group], prefix: str = "") -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            yield from _declared(group, kind, f"{prefix}{name}_")
            continue
        extra = info.json_schema_extra
        advanced = isinstance(extra, dict) and bool(extra.get("advanced"))
        yield Setting(group, prefix + name, kind, info.get_default(), info.description or "", advanced)


def _given(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values of a library group, by key."""
    prefix = f"{group}_"
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix) and n not in own_settings()}


def _nested(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values of a group as pydantic takes them."""
    nested: dict[str, Any] = {}
    for setting in own_settings().values():
        if setting.group == group and setting.name in values:
            *outer, last = _fields_to(groups()[group], setting.key)
            target = nested
            for field_name in outer:
                target = target.setdefault(field_name, {})
            target[last] = values[setting.name]
    return nested


def _fields_to(group: type[Group], key: str) -> tuple[str, ...]:
    """Return the fields that lead to a setting of a group: ``tls_ca_file`` is field ``ca_file`` of field ``tls``."""
    for name, info in group.model_fields.items():
        kind, inner = info.annotation, key.removeprefix(f"{name}_")
        if inner != key and isinstance(kind, type) and issubclass(kind, Group):
            return name, *_fields_to(kind, inner)
    return (key,)


def _validated(config: type[C], group: str, values: dict[str, Any]) -> C:
    try:
        return TypeAdapter(config).validate_python(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(group, error))) from None


def _explain(group: str, error: ValidationError) -> Iterator[str]:
    """Yield a line for each wrong value; secrets are not repeated."""
    for detail in error.errors(include_url=False):
        name = "_".join([group, *map(str, detail["loc"])])
        message = str(detail["msg"]).removeprefix("Value error, ")
        setting = find_setting(name)
        if setting is None:  # of several values; the library names its own fields
            yield f"{group}_{message}" if group in ("model", "train") else message
        else:
            value = detail["input"]
            # a URL may hold a password
            hidden = setting.secret or (is_url(value) and (Path in setting.kinds or "@" in value))
            yield f"{name}{'' if hidden else '=' + repr(value)}: {message}"
