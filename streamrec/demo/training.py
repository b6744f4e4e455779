"""Train the demo's first model on the past clicks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sasrec import Interactions, ItemVocab, ModelMetadata, SASRecConfig, Sequences, TrainConfig, save_model, train
from streamrec.demo.hits import K
from streamrec.local.movielens import cache_folder
from streamrec.retraining.round import loss_for

SHAPE = SASRecConfig(num_items=1, max_len=50, hidden_units=64, dropout_rate=0.3)
BATCH_SIZE = 32
PATIENCE = 4
TIME_LIMIT_S = 120.0  # a slow machine trains fewer epochs


def train_model(past: Interactions, filter_seen: bool, epochs: int, console: Console) -> Path:
    """Train and save a model; return its folder.

    Raises:
        TrainingError: the clicks are too few.
    """
    vocab = ItemVocab.from_items(past.item_ids)
    sequences, validation = Sequences.build(past, vocab).leave_last_out()
    config = TrainConfig(
        epochs=epochs, batch_size=BATCH_SIZE, patience=PATIENCE, loss=loss_for(len(vocab)), skip_seen=filter_seen
    )
    deadline = time.monotonic() + TIME_LIMIT_S
    model, result = train(
        replace(SHAPE, num_items=len(vocab)),
        sequences,
        config,
        validation,
        progress=console.is_terminal,
        stop=lambda: time.monotonic() > deadline,
    )
    metrics = result.best.validation
    folder = cache_folder() / "demo-model"
    metadata: ModelMetadata = {
        "trained_until_ms": int(past.timestamps_ms.max()),
        "validation": metrics.as_dict() if metrics else {},
    }
    version = save_model(folder, model, vocab, metadata)
    seconds = sum(epoch.seconds for epoch in result.epochs)
    text = f"model {version}: {len(vocab):,} items, {len(result.epochs)} epochs in {seconds:.0f} s"
    console.print(text + (f", validation HR@10 {metrics.hr[K]:.3f}" if metrics else ""), highlight=False)
    return folder
