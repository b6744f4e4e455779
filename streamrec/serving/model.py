"""The model to serve: read it from directory or registry, and make its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sasrec import Engine, ItemVocab, ModelDirectoryError, ModelMetadata, SavedModel, load_model
from streamrec.aliases import Champion
from streamrec.errors import NoChampion, SettingsError
from streamrec.metrics import unix_s
from streamrec.registry import Registry
from streamrec.setting_groups import InferenceSettings
from streamrec.settings import Settings


def read_model(settings: Settings) -> SavedModel:
    """Read the configured model directory, or the champion of the registry.

    Raises:
        SettingsError: neither is set, or the directory cannot be used.
        NoChampion: the registry has none yet.
        RegistryError: the registry cannot be read, or its champion is damaged.
    """
    if settings.registry.dir is not None:
        registry = Registry(settings.registry.dir)
        return registry.load(first_champion(registry).version)
    if settings.model.dir is None:
        raise SettingsError(
            "no model: set STREAMREC_MODEL_DIR or --model-dir to a directory made by: sasrec train FILE --out DIR"
        )
    try:
        return load_model(settings.model.dir)
    except ModelDirectoryError as error:
        raise SettingsError(str(error)) from None


def first_champion(registry: Registry) -> Champion:
    """Return the champion.

    Raises:
        NoChampion: there is none yet.
        RegistryError: the registry cannot be read.
    """
    champion = registry.champion()
    if champion is None:
        raise NoChampion(
            f"the registry {registry.store} has no champion; make one with: streamrec models publish DIR --promote"
        )
    return champion


@dataclass(frozen=True)
class ServedModel:
    """A model with the engine that serves it.

    ``max_len`` is the number of items that Redis stores per user; the engine's window may be shorter.
    """

    engine: Engine
    max_len: int
    metadata: ModelMetadata

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Read the configured model and make its engine. Raises the errors of ``read_model`` and ``of``."""
        return cls.of(read_model(settings), settings.inference, settings.sequences.max_len)

    @classmethod
    def of(
        cls, saved: SavedModel, settings: InferenceSettings, max_len: int | None, cache_bytes: int | None = None
    ) -> Self:
        """Make the engine that serves a model.

        Args:
            max_len: items stored per user [the model's max_len].
            cache_bytes: memory for cached keys and values [``settings.cache_bytes``].

        Raises:
            SettingsError: ``settings.index`` needs a package that is not installed.
        """
        own_len = saved.model.config.max_len
        stored_len = max_len or own_len
        try:
            engine = Engine(
                saved.model,
                saved.vocab,
                version=saved.version,
                cache_bytes=settings.cache_bytes if cache_bytes is None else cache_bytes,
                half_cache=settings.cache_half,
                max_len=min(stored_len, own_len),
                index=settings.index,
            )
        except ImportError as error:
            raise SettingsError(f"inference_index={settings.index}: {error}") from None
        return cls(engine, stored_len, saved.metadata)

    @property
    def version(self) -> str:
        """The version of the model."""
        return self.engine.version

    @property
    def created_s(self) -> float:
        """The Unix time at which the model was made; 0 if its metadata do not say."""
        return unix_s(str(self.metadata.get("created_at")))

    @property
    def vocab(self) -> ItemVocab:
        """The items that the model knows."""
        return self.engine.vocab
