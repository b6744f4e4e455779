"""Every hyper-parameter is declared once, and can be set from the estimator and from the command line."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pandas as pd
import pytest

from sasrec import SASRecClassifierEstimator, SASRecConfig, TrainConfig
from sasrec.__main__ import main
from sasrec.training.objectives import OBJECTIVES, Loss

NOT_IN_ESTIMATOR = {"num_items", "schedule", "warmup_steps", "replay"}
NOT_IN_TRAIN_COMMAND = {"num_items", "replay"}
NOT_IN_STREAM_EVAL = {"num_items", "patience", "restore_best"}
ESTIMATOR_NAMES = {
    "patience": "early_stopping_patience",
    "restore_best": "restore_best_weights",
    "seed": "random_state",
}
NAMES = {spec.name for kind in (SASRecConfig, TrainConfig) for spec in fields(kind)}


class Captured(Exception):
    """Ends a training before it starts."""


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Collect the fields of the configurations that a training is called with."""
    found: dict[str, Any] = {}

    def train(config: SASRecConfig, sequences: object, train_config: TrainConfig, *_: object, **__: object) -> None:
        found.update(asdict(config) | asdict(train_config))
        raise Captured

    for module in ("sasrec.estimator", "sasrec.__main__", "sasrec.stream_eval"):
        monkeypatch.setattr(f"{module}.train", train)
    return found


HINTS = get_type_hints(SASRecConfig) | get_type_hints(TrainConfig)
DEFAULTS = asdict(SASRecConfig(1)) | asdict(TrainConfig())
CHOSEN = {"hidden_units": 24, "num_heads": 4, "num_negatives": 7}


def changed(name: str, default: Any) -> Any:
    """Return a valid value that is not the default."""
    if name in CHOSEN:
        return CHOSEN[name]
    if get_origin(HINTS[name]) is Literal:
        return next(choice for choice in get_args(HINTS[name]) if choice != default)
    if isinstance(default, bool):
        return not default
    return default / 2 + 0.125 if isinstance(default, float) else default + 3


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    path = tmp_path / "clicks.csv"
    rows = [f"u{user},i{step},{step}" for user in range(5) for step in range(6)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path


def flags(wanted: dict[str, Any]) -> list[str]:
    found = []
    for name, value in wanted.items():
        flag = name.replace("_", "-")
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def test_every_hyper_parameter_can_be_set_from_the_estimator(captured: dict[str, Any]) -> None:
    names = {name: ESTIMATOR_NAMES.get(name, name) for name in sorted(NAMES - NOT_IN_ESTIMATOR)}
    defaults = SASRecClassifierEstimator().get_params()
    wanted = {name: changed(name, defaults[own]) for name, own in names.items()}
    estimator = SASRecClassifierEstimator(**{own: wanted[name] for name, own in names.items()})
    frame = pd.DataFrame({"USER_ID": list("aabb"), "ITEM_ID": list("xyxy"), "TIMESTAMP": [1, 2, 3, 4]})
    with pytest.raises(Captured):
        estimator.fit(frame, frame.assign(TIMESTAMP=[5, 6, 7, 8]))
    assert {name: captured[name] for name in wanted} == wanted
    untouched = NOT_IN_ESTIMATOR - {"num_items"}
    assert {name: captured[name] for name in untouched} == {name: DEFAULTS[name] for name in untouched}


def test_every_hyper_parameter_can_be_set_from_the_command_line(captured: dict[str, Any], clicks: Path) -> None:
    wanted = {name: changed(name, DEFAULTS[name]) for name in sorted(NAMES - NOT_IN_TRAIN_COMMAND)}
    with pytest.raises(Captured):
        main(["train", str(clicks), "--out", str(clicks.parent / "m"), *flags(wanted)])
    assert {name: captured[name] for name in wanted} == wanted


def test_every_hyper_parameter_can_be_set_for_an_evaluation_over_a_stream(
    captured: dict[str, Any], tmp_path: Path
) -> None:
    for period in range(2):
        (tmp_path / f"period_{period}.txt").write_text("s1 a\ns1 b\ns2 a\ns2 b\n")
    wanted = {name: changed(name, DEFAULTS[name]) for name in sorted(NAMES - NOT_IN_STREAM_EVAL)}
    with pytest.raises(Captured):
        main(["stream-eval", str(tmp_path), "--out", str(tmp_path / "out"), *flags(wanted)])
    assert {name: captured[name] for name in wanted} == wanted


@pytest.mark.parametrize("kind", [SASRecConfig, TrainConfig])
def test_every_hyper_parameter_has_a_help_text_and_is_usual_or_advanced(kind: Any) -> None:
    for spec in fields(kind):
        if spec.name != "num_items":
            assert spec.metadata["help"]
            assert isinstance(spec.metadata["advanced"], bool)


def test_the_table_of_objectives_has_an_entry_for_every_loss_and_the_help_names_its_negatives() -> None:
    assert tuple(OBJECTIVES) == get_args(Loss)
    text = TrainConfig.__dataclass_fields__["num_negatives"].metadata["help"]
    for name, objective in OBJECTIVES.items():
        assert f"{name} {objective.default_negatives}" in text
        assert objective.default_negatives >= objective.fewest_negatives
