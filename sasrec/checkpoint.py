"""A model directory on disk. Never pickle.

    model.safetensors   the weights
    config.json         the model's shape (SASRecConfig)
    vocab.json          item ids in index order, and the number of clicks on each in training
    metadata.json       how and when the model was made, and how good it is (ModelMetadata)
    manifest.json       format version and the SHA-256 of every file above

A directory is written under a temporary name, flushed to disk and renamed, so a reader sees all of it or nothing. It is
read only if every byte matches the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, cast

import safetensors
import safetensors.torch
import torch

from sasrec.data.vocab import ItemVocab
from sasrec.durable import flush_file, flush_folder
from sasrec.model import SASRec, SASRecConfig

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = "metadata.json"
FILES = ("model.safetensors", "config.json", "vocab.json", METADATA)


class ModelDirectoryError(ValueError):
    """A model directory cannot be written or must not be used; the message gives the reason."""


# written by an estimator, to load itself again
EstimatorMetadata = TypedDict("EstimatorMetadata", {"class": str, "params": dict[str, Any], "integer_items": bool})


class ModelMetadata(TypedDict, total=False):
    """How and when a model was made, and how good it is.

    Which keys are there depends on the writer. Unknown keys are stored and read as they are.
    """

    created_at: str  # ISO 8601, UTC
    torch: str  # version
    train_config: dict[str, Any]  # a TrainConfig
    epochs: int
    best_epoch: int  # counted from 1
    validation: dict[str, float]  # Metrics.as_dict(); empty without validation
    trained_from_ms: int
    trained_until_ms: int
    train_s: float
    estimator: EstimatorMetadata
    number: int  # place in its registry: a later version has a greater one
    # of a retraining round
    mode: str  # full or incremental
    rounds_since_full: int
    parent: str | None  # the version that was champion
    report: Any  # the gate's figures
    refused: str | None  # why the gate refused the model
    topic_epoch: int  # of the offsets
    next_offsets: dict[str, int]  # by partition
    git_commit: str | None


@dataclass(frozen=True)
class SavedModel:
    """The content of a model directory. ``version`` is derived from weights, shape and vocabulary."""

    model: SASRec
    vocab: ItemVocab
    metadata: ModelMetadata
    version: str


def save_model(path: str | Path, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata | None = None) -> str:
    """Write a model directory, replacing an older one at this path; return its version.

    Raises:
        ModelDirectoryError: something that is not a model directory exists at this path, the path cannot be written, or
            model and vocabulary differ in size.
    """
    path = Path(path)
    if len(vocab) != model.config.num_items:
        raise ModelDirectoryError(f"the vocabulary has {len(vocab)} items but the model {model.config.num_items}")
    check_destination(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        try:
            version = _write(temporary, model, vocab, metadata or {})
            _replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ModelDirectoryError(f"cannot write the model directory {path}: {error.strerror or error}") from error
    return version


def check_destination(path: Path) -> None:
    """Check, before a long training, that ``save_model`` may write here.

    Raises:
        ModelDirectoryError: something that is not a model directory exists at this path, or the path is not writable.
    """
    if path.exists() and not (path / MANIFEST).is_file():
        raise ModelDirectoryError(f"{path} exists and is not a model directory; choose another path, or remove it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ModelDirectoryError(f"cannot write the model directory {path}: {parent} is not a writable folder")


def load_model(path: str | Path, device: str = "cpu") -> SavedModel:
    """Read and verify a model directory.

    Raises:
        ModelDirectoryError: it is missing, damaged, of another format, or its files do not fit together.
    """
    path = Path(path)
    version, contents = _verify(path)
    try:
        config = SASRecConfig(**_parse_json(path / "config.json", contents["config.json"]))
        stored = _parse_json(path / "vocab.json", contents["vocab.json"])
        vocab = ItemVocab(stored["ids"], stored["counts"])
        metadata = cast(ModelMetadata, _parse_json(path / METADATA, contents[METADATA]))
        weights = safetensors.torch.load(contents["model.safetensors"])
    except (TypeError, KeyError, ValueError, OverflowError, safetensors.SafetensorError) as error:
        raise ModelDirectoryError(f"{path} does not hold a model this version can read: {error}") from error
    if len(vocab) != config.num_items:
        raise ModelDirectoryError(f"{path}: the vocabulary has {len(vocab)} items but config.json {config.num_items}")
    model = SASRec(config).to(device)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # PyTorch spreads it over lines
        raise ModelDirectoryError(f"{path}: weights and config.json do not fit together: {reason}") from error
    unusable = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if unusable:
        raise ModelDirectoryError(f"{path}: weights {', '.join(unusable)} hold NaN or infinite values; train again")
    return SavedModel(model.eval(), vocab, metadata, version)


def read_metadata(path: str | Path) -> ModelMetadata:
    """Read a model directory's metadata, without its weights.

    Raises:
        ModelDirectoryError: the directory is missing, or its manifest or metadata are damaged.
    """
    path = Path(path)
    hashes = _hashes(path)
    return cast(ModelMetadata, _parse_json(path / METADATA, _read_verified(path, METADATA, hashes[METADATA])))


def _write(folder: Path, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata) -> str:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    _write_json(folder / "config.json", asdict(model.config))
    _write_json(folder / "vocab.json", {"ids": list(vocab.ids), "counts": vocab.counts.tolist()})
    made: ModelMetadata = {
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "torch": torch.__version__,
    }
    _write_json(folder / METADATA, made | metadata)
    hashes = {name: _sha256(folder / name) for name in FILES}
    version = _version(hashes)
    _write_json(folder / MANIFEST, {"format": FORMAT, "version": version, "sha256": hashes})
    for name in (*FILES, MANIFEST):
        flush_file(folder / name)
    flush_folder(folder)
    return version


def _version(hashes: dict[str, str]) -> str:
    # without metadata.json: a model that is trained again with equal weights has the same version
    return hashlib.sha256("".join(hashes[name] for name in FILES[:3]).encode()).hexdigest()[:12]


def _replace(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    try:
        flush_folder(path.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _verify(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the version, and the verified bytes of every file, so that nothing is read a second time."""
    hashes = _hashes(path)
    return _version(hashes), {name: _read_verified(path, name, expected) for name, expected in hashes.items()}


def _hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file from the manifest."""
    if not path.is_dir():
        raise ModelDirectoryError(
            f"there is no model directory at {path}; make one with: sasrec train FILE --out {path}"
        )
    if not (path / MANIFEST).is_file():
        raise ModelDirectoryError(f"{path} is not a model directory: it has no {MANIFEST}")
    manifest = _parse_json(path / MANIFEST, _read(path / MANIFEST))
    if manifest.get("format") != FORMAT:
        raise ModelDirectoryError(
            f"{path}/{MANIFEST}: model format {manifest.get('format')!r}, but this version reads {FORMAT}; "
            "upgrade, or train it again"
        )
    hashes = manifest.get("sha256")
    if (
        not isinstance(hashes, dict)
        or set(hashes) != set(FILES)
        or not all(isinstance(h, str) for h in hashes.values())
    ):
        raise ModelDirectoryError(f"{path}/{MANIFEST} is damaged: it must name a version and the hashes of {FILES}")
    if manifest.get("version") != _version(hashes):
        raise ModelDirectoryError(
            f"{path}/{MANIFEST} is damaged: version and hashes do not fit; copy or train it again"
        )
    return hashes


def _read_verified(path: Path, name: str, expected: str) -> bytes:
    if not (path / name).is_file():
        raise ModelDirectoryError(f"{path}: {name} is missing; copy the whole directory again")
    content = _read(path / name)
    if hashlib.sha256(content).hexdigest() != expected:
        raise ModelDirectoryError(
            f"{path}: {name} is damaged (SHA-256 differs from {MANIFEST}); copy or train it again"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelDirectoryError(f"cannot read {path}: {error.strerror or error}") from error


def _parse_json(path: Path, content_bytes: bytes) -> dict[str, Any]:
    try:
        content = json.loads(content_bytes.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelDirectoryError(f"{path} is damaged: a JSON object is expected")
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
