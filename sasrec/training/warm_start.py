"""Warm starts: a trained model for a larger catalogue."""

from __future__ import annotations

import numpy as np
import torch

from sasrec.data.sequences import Sequences
from sasrec.model import SASRec, SASRecConfig

NEIGHBOURS = 3


def resize_model(model: SASRec, config: SASRecConfig, sequences: Sequences) -> SASRec:
    """Return a copy of a model with room for more items.

    The embedding of a new item starts as the mean embedding of the known items within NEIGHBOURS events of it, weighted
    by 1 / distance. Started at random it would lag behind items with long training: R@20 .488 instead of .498 on
    Diginetica's week 2, with a model of week 0 trained further on week 1.

    Args:
        config: of the same shape, except for the number of items.
        sequences: new items among known ones.

    Raises:
        ValueError: the shape differs in more, or there are fewer items.
    """
    old = model.config
    if not old.same_shape(config):
        raise ValueError(f"the shape of the model cannot change from {old} to {config}; train from the beginning")
    if config.num_items < old.num_items:
        raise ValueError(f"the model knows {old.num_items} items already; {config.num_items} cannot hold them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        larger = SASRec(config)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    embedding = larger.item_embedding.weight.detach().clone()
    embedding[: old.num_items + 1] = weights["item_embedding.weight"]
    means, total = torch.zeros_like(embedding), torch.zeros(len(embedding))
    user = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    for distance in range(1, NEIGHBOURS + 1):
        earlier = np.flatnonzero(user[distance:] == user[:-distance])
        for at, beside in ((earlier, earlier + distance), (earlier + distance, earlier)):
            item, neighbour = torch.as_tensor(sequences.items[at]), torch.as_tensor(sequences.items[beside])
            counts = (item > old.num_items) & (neighbour <= old.num_items)
            means.index_add_(0, item[counts], embedding[neighbour[counts]] / distance)
            total.index_add_(0, item[counts], torch.full((int(counts.sum()),), 1 / distance))
    embedding[total > 0] = means[total > 0] / total[total > 0, None]
    larger.load_state_dict(weights | {"item_embedding.weight": embedding})
    return larger
