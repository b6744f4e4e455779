"""Choosing the best items for hidden states: exactly, or among the candidates that an index names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.vocab import PADDING, ItemVocab
from sasrec.inference.blocked import BlockedItems
from sasrec.inference.index import AUTO_ITEMS, IndexChoice, ItemIndex, open_index
from sasrec.inference.kernels import COLUMNS, Floats, top_k
from sasrec.inference.packed import PackedForward, PackedItems, few_threads, pad_rows
from sasrec.model import SASRec

Indices = Sequence[int] | NDArray[np.int64]
Filter = Sequence[Indices | Collection[int]]  # for each row, indices that must not be recommended

# Up to this number of items the kernel ranks all, from a copy of the embedding; above it an index names candidates.
PACKED_ITEMS = AUTO_ITEMS
# Up to this number of rows the kernel ranks faster than PyTorch, whatever the number of threads.
PACKED_ROWS = 64
# Embeddings of candidates gathered at once: until scored they stay in a core's cache, in a quarter of the time.
RESCORED_BYTES = 600_000
# An index names this many times the candidates that blocked items take away: they are not spread evenly.
SPARE = 1.5
# If a larger share of the items is blocked, the whole catalogue is ranked: too many candidates would be blocked.
MOSTLY = 0.98


class Ranking(NamedTuple):
    """Items with their scores (logits), best first. Shorter than k only where fewer items are allowed."""

    items: list[str]
    scores: list[float]


class Ranker:
    """The catalogue of a model, from which it chooses the best items for hidden states.

    Args:
        index: as for the Engine.

    Raises:
        ValueError: index is none of the choices.
        ImportError: index is "approximate", and faiss is not installed.
    """

    def __init__(self, model: SASRec, vocab: ItemVocab, index: IndexChoice) -> None:
        self.model, self.vocab = model, vocab
        weight = model.item_embedding.weight
        self.index = open_index(weight, index)
        small = PackedForward.supports(model) and model.config.num_items <= PACKED_ITEMS
        self._items = PackedItems(weight) if small and not model.config.reminder else None

    def prepare(self) -> None:
        """Compile the kernel, or load it from disk, so that no click waits for it."""
        if self._items:
            self._items.prepare()

    def logits(self, hidden: Tensor, windows: Sequence[Indices]) -> Tensor:
        """Return scores of all items, (B, num_items + 1); the reminder is added to the items of each window."""
        scores = self.model.logits(hidden)
        if reminded := self._reminded_items(hidden, windows):
            row = [i for i, items in enumerate(reminded) for _ in items]
            scores[row, [item for items in reminded for item in items]] += self.model.config.reminder
        return scores

    def top_k(
        self,
        hidden: Tensor,
        k: int,
        exclude: Filter | None,
        blocked: BlockedItems,
        allowed: Collection[int] | None,
        windows: Sequence[Indices],
    ) -> list[Ranking]:
        """Choose the k best items of each row; see ``Engine.top_k``."""
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        few_allowed = blocked.count > MOSTLY * len(self.vocab)
        if self.index is None or allowed is not None or few_allowed or not len(hidden):
            return self._rank_all(hidden, k, exclude, blocked, allowed, windows)
        exclude = [()] * len(hidden) if exclude is None else exclude
        found = self._rank_candidates(self.index, hidden, k, exclude, blocked, windows)
        short = [i for i, ranking in enumerate(found) if ranking is None]
        if short:
            windows_of_short = [windows[i] for i in short] if windows else ()
            exact = self._rank_all(hidden[short], k, [exclude[i] for i in short], blocked, None, windows_of_short)
            for i, ranking in zip(short, exact, strict=True):
                found[i] = ranking
        return [ranking for ranking in found if ranking is not None]

    @torch.inference_mode()
    def _rank_all(
        self,
        hidden: Tensor,
        k: int,
        exclude: Filter | None,
        blocked: BlockedItems,
        allowed: Collection[int] | None,
        windows: Sequence[Indices],
    ) -> list[Ranking]:
        """Choose from the whole catalogue."""
        if self._items and k <= COLUMNS and (few_threads() or len(hidden) <= PACKED_ROWS):
            states = hidden.detach().numpy()
            return self._rankings(*self._items.top_k(states, min(k, len(self.vocab)), exclude, blocked, allowed))
        scores = self.logits(hidden, windows)  # (B, num_items + 1)
        scores[:, PADDING] = -torch.inf
        if allowed is not None:
            others = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
            others[list(allowed)] = False
            scores[:, others] = -torch.inf
        if blocked.count:
            scores.masked_fill_(torch.from_numpy(blocked.mask).to(scores.device), -torch.inf)
        if exclude is not None:
            # rows are padded with 0, which is excluded already
            scores.scatter_(1, pad_rows(exclude, scores.device), -torch.inf)
        best, indices = top_k(scores, min(k, len(self.vocab)))
        return self._rankings(*_as_arrays(best, indices))

    @torch.inference_mode()
    def _rank_candidates(
        self,
        index: ItemIndex,
        hidden: Tensor,
        k: int,
        exclude: Filter,
        blocked: BlockedItems,
        windows: Sequence[Indices],
    ) -> list[Ranking | None]:
        """Choose from the index's candidates and the window's items; None for rows with too few candidates left."""
        reminded = self._reminded_items(hidden, windows) or [set()] * len(hidden)
        # a column of padding, since no row may be empty
        excluded, own = (F.pad(pad_rows(rows, hidden.device), (0, 1), value=PADDING) for rows in (exclude, reminded))
        depth = index.candidates(k)
        filtered = excluded.shape[1] + own.shape[1] + self._spare(depth, blocked)  # candidates that filters may remove
        found = index.search(hidden, min(depth + filtered, len(self.vocab)))  # (B, F)
        # (B, C), no item twice in a row
        candidates = torch.cat((found.masked_fill(_contained(found, own), PADDING), own), 1)
        banned = torch.from_numpy(blocked.mask).to(hidden.device)  # padding too
        scores = self._scores_of(candidates, hidden)  # (B, C)
        scores[:, found.shape[1] :] += self.model.config.reminder
        scores[banned[candidates] | _contained(candidates, excluded)] = -torch.inf
        best, places = top_k(scores, min(k, scores.shape[1]))  # (B, k)
        enough = (scores.isfinite().sum(1) >= depth).tolist()
        rankings = self._rankings(*_as_arrays(best, candidates.gather(1, places)))
        return [ranking if full else None for ranking, full in zip(rankings, enough, strict=True)]

    def _spare(self, depth: int, blocked: BlockedItems) -> int:
        """Return the number of candidates to add, so that about ``depth`` of them are not blocked."""
        share = blocked.count / len(self.vocab)
        return min(blocked.count, max(depth, int(SPARE * depth * share / (1 - share))))

    def _scores_of(self, items: Tensor, hidden: Tensor) -> Tensor:
        """Return the scores of items (B, C), without the reminder."""
        weight = self.model.item_embedding.weight
        users = max(1, RESCORED_BYTES // (items.shape[1] * weight[0].nbytes))
        scratch = weight.new_empty(users * items.shape[1], weight.shape[1])
        parts = []
        for part, states in zip(torch.split(items, users), torch.split(hidden, users), strict=True):
            embedding = scratch[: part.numel()]
            torch.index_select(weight, 0, part.flatten(), out=embedding)
            parts.append(torch.bmm(embedding.view(*part.shape, -1), states[:, :, None])[:, :, 0])
        return torch.cat(parts)

    def _rankings(self, best: Floats, indices: NDArray[np.int64]) -> list[Ranking]:
        """Convert scores and indices (B, k), best first; filtered items have scores that are not finite."""
        items, scores = self.vocab.decode(indices), best.tolist()
        rankings = list(map(Ranking, items, scores))
        for row in np.flatnonzero(~np.isfinite(best[:, -1])).tolist():
            count = int(np.isfinite(best[row]).sum())
            rankings[row] = Ranking(items[row][:count], scores[row][:count])
        return rankings

    def _reminded_items(self, hidden: Tensor, windows: Sequence[Indices]) -> list[set[int]]:
        """Return for each row the items whose scores the reminder raises; [] if the model has no reminder."""
        if not self.model.config.reminder:
            return []
        if len(windows) != len(hidden):
            raise ValueError(f"{len(hidden)} rows, {len(windows)} windows: a reminder needs the window of each row")
        return [set(np.asarray(window).tolist()) for window in windows]


def popular_items(vocab: ItemVocab, k: int, out: Collection[str], allowed: Collection[str] | None) -> Ranking:
    """Return the k most clicked items of the training data; scores are their clicks.

    Args:
        out: item ids to leave out.
        allowed: the only item ids to choose from; all by default.
    """
    order = np.argsort(-vocab.counts, kind="stable")
    best = [i for i in order if vocab.ids[i] not in out and (allowed is None or vocab.ids[i] in allowed)][:k]
    return Ranking([vocab.ids[i] for i in best], [float(vocab.counts[i]) for i in best])


def similar_items(embedding: Tensor, vocab: ItemVocab, index: int, k: int) -> Ranking:
    """Return the k items whose embeddings are nearest in direction to that of an item; scores are cosines.

    Args:
        embedding: (num_items + 1, D), row 0 padding.
        index: of the item, which is left out.
    """
    directions = F.normalize(embedding, dim=1)
    cosines = directions @ directions[index]  # (num_items + 1,)
    cosines[[PADDING, index]] = -torch.inf
    best, indices = cosines.topk(min(k, max(1, len(vocab) - 1)))
    count = int(best.isfinite().sum())
    return Ranking(vocab.decode(indices[:count].tolist()), best[:count].tolist())


def _as_arrays(best: Tensor, indices: Tensor) -> tuple[Floats, NDArray[np.int64]]:
    return best.cpu().double().numpy(), indices.cpu().numpy()  # double: NumPy has no bfloat16


def _contained(items: Tensor, rows: Tensor) -> Tensor:
    """Return whether each item (B, C) occurs in its row of ``rows`` (B, R), (B, C); R must be at least 1."""
    ordered = rows.sort(1).values
    places = torch.searchsorted(ordered, items).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, places) == items
