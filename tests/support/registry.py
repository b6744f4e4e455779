"""Publish model versions that differ by a seed, for tests of registry and swap."""

from __future__ import annotations

import torch

from sasrec import ItemVocab, SASRec, SASRecConfig
from streamrec.registry import Registry


def publish(registry: Registry, seed: int, items: range = range(50), max_len: int = 8) -> str:
    """Publish a small untrained model with distinct scores; return its version."""
    torch.manual_seed(seed)
    vocab = ItemVocab([f"i{n}" for n in items])
    model = SASRec(SASRecConfig(len(vocab), max_len, hidden_units=16, num_blocks=2, dropout_rate=0.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    with torch.no_grad():
        model.item_embedding.weight[0].zero_()
    return registry.publish(model, vocab, {"seed": seed})


def damage(registry: Registry, version: str) -> None:
    """Change the weights of a version."""
    name = f"versions/{version}/model.safetensors"
    weights = registry.store.read(name)
    assert weights is not None
    registry.store.write(name, weights[:-1] + b"x")
