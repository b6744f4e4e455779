"""Clicks in a circle and settings for rounds of retraining that take a second."""

from __future__ import annotations

from typing import Any

from sasrec import Event

ITEMS = 12
QUICK: dict[str, Any] = {
    "model_max_len": 8,
    "model_hidden_units": 16,
    "model_num_blocks": 1,
    "model_dropout_rate": 0.0,
    "train_epochs": 60,
    "train_batch_size": 16,
    "train_learning_rate": 0.01,
    "retrain_update_learning_rate": 0.01,
    "train_patience": 0,
    "lists_filter_seen": False,
}


def circle(steps: int, start: int = 0, users: int = 30) -> list[Event]:
    """Return clicks in which item n + 1 always follows item n."""
    return [
        Event(f"u{user}", f"i{(user + step) % ITEMS}", 1_000 * (step * users + user))
        for step in range(start, start + steps)
        for user in range(users)
    ]
