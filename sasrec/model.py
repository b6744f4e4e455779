"""SASRec (Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018), for training and for whole windows;
packed.py puts tokens through the same weights for serving, behind cached ones too.

The module knows tensors only: nothing of item ids, files, users or slots.

Layout. A row holds its tokens first and zeros behind them, so the causal mask alone hides the padding.
Sequences are *right-aligned* all the same, and that lives where it matters, in the positions: with
``position="learned"`` the newest item is always at position ``max_len - 1``, as in the paper. With
``position="rope"`` (Su et al., RoFormer, 2021) only distances count, so alignment changes nothing and a
cached key stays valid while the window grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-8
INIT_STD = 0.02
ROPE_BASE = 10_000.0


def option(default: Any, text: str) -> Any:
    """A hyper-parameter: a dataclass field with a default and what a command line says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SASRecConfig:
    """Shape of a model. ``num_items`` does not count the padding index 0.

    Raises:
        ValueError: a value is out of range, or ``hidden_units`` does not divide into heads.
    """

    num_items: int
    max_len: int = option(50, "tokens in a window")
    hidden_units: int = option(64, "width of the model")
    num_blocks: int = option(2, "transformer blocks")
    num_heads: int = option(1, "attention heads; hidden_units must divide into them")
    dropout_rate: float = option(0.2, "share of activations dropped in training")
    item_dropout_rate: float = option(0.0, "share of the items of a window hidden in training; their places stay")
    position: Literal["learned", "rope"] = option("rope", "rope serves one token a click; learned is the paper's")
    scale_embeddings: bool = option(True, "items enter times sqrt(hidden_units), as in the paper's own code")
    reminder: float = option(0.0, "added to the scores of the window's own items, where people come back to items")

    def __post_init__(self) -> None:
        for name in ("num_items", "max_len", "hidden_units", "num_blocks", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        for name in ("dropout_rate", "item_dropout_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 0 and below 1")
        if self.position not in ("learned", "rope"):
            raise ValueError(f"position={self.position!r}: must be 'learned' or 'rope'")
        if not math.isfinite(self.reminder):
            raise ValueError(f"reminder={self.reminder!r}: must be finite")
        if self.hidden_units % self.num_heads:
            raise ValueError(f"hidden_units={self.hidden_units} is not a multiple of num_heads={self.num_heads}")
        if self.position == "rope" and (self.hidden_units // self.num_heads) % 2:
            raise ValueError(
                f"position='rope' turns pairs of dimensions: hidden_units / num_heads must be even, "
                f"not {self.hidden_units // self.num_heads}"
            )

    def same_shape(self, other: SASRecConfig) -> bool:
        """Whether weights of one fit the other, but for the number of items."""
        free: dict[str, Any] = {"num_items": 1, "dropout_rate": 0.0, "item_dropout_rate": 0.0, "reminder": 0.0}
        return replace(self, **free) == replace(other, **free)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of (B, T, H, Dh) to (B, L, H, Dh).

    Args:
        mask: (B, T, L), True = may attend, or None where each attends to those up to it.
    """
    attended: Tensor = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None], is_causal=mask is None,
    )  # fmt: skip
    return attended.transpose(1, 2)


class Dropout(nn.Module):
    """What nn.Dropout does, with one random number for eight values: on a CPU drawing them was a third of an epoch.

    Args:
        rate: rounded to whole 256ths.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.kept = max(1, 256 - round(256 * rate))  # of 256 bytes

    def forward(self, x: Tensor) -> Tensor:
        """Each value is 0 with the rate, else scaled so that the mean stays."""
        if not self.training or self.kept == 256:
            return x
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        each = numbers.view(torch.int8)[: x.numel()].view(x.shape)
        # compared into the numbers to multiply by: ten times as fast as through booleans
        keep = torch.lt(each, self.kept - 128, out=torch.empty_like(x, requires_grad=False))
        return x * keep.mul_(256 / self.kept)


class Attention(nn.Module):
    """Causal multi-head self-attention over one fused projection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_units, 3 * config.hidden_units)
        self.out = nn.Linear(config.hidden_units, config.hidden_units)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, last: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, D) of the tokens at last (B,) alone."""
        heads = self.num_heads
        qkv = self.qkv(x).view(*x.shape[:-1], 3 * heads, x.shape[-1] // heads)
        query_key, value = qkv[..., : 2 * heads, :], qkv[..., 2 * heads :, :]
        if rotation is not None:
            query_key = rotate(query_key, *rotation)
        query, key = query_key.chunk(2, dim=-2)  # each (..., H, Dh)
        if last is None:
            attended = attention(query, key, value, None)
        else:
            mask = torch.arange(x.shape[1], device=x.device) <= last[:, None]  # (B, T)
            attended = attention(_at(query, last)[:, None], key, value, mask[:, None])[:, 0]
        merged: Tensor = self.out(attended.flatten(-2))
        return merged


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU feed-forward of four times the width."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.hidden_units
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            Dropout(config.dropout_rate),
            nn.Linear(4 * width, width),
        )
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, last: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, D) of the tokens at last (B,) alone."""
        attended = self.attention(self.attention_norm(x), rotation, last)
        x = (x if last is None else _at(x, last)) + self.dropout(attended)
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class SASRec(nn.Module):
    """Item embedding, ``num_blocks`` causal blocks, final LayerNorm; scores by the tied item embedding."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        # without it what the blocks add drowns the items themselves, rare ones above all
        self.item_scale = math.sqrt(config.hidden_units) if config.scale_embeddings else 1.0
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_units, padding_idx=0)
        self.embedding_dropout = Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.hidden_units, eps=LAYER_NORM_EPS)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_len, config.hidden_units)
        else:
            cos, sin = rotation_table(config.max_len, config.hidden_units // config.num_heads)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.apply(_init_weights)

    def forward(self, items: Tensor, last: Tensor | None = None) -> Tensor:
        """Hidden states of every token, or of each row's newest.

        Args:
            items: (B, T) item indices, a row's tokens first and zeros behind; T at most max_len.
            last: (B,) where in each row the token stands whose hidden state alone is wanted.

        Returns:
            (B, T, D). What stands at padding is meaningless. With last, (B, D).

        Raises:
            ValueError: T exceeds max_len.
        """
        time = items.shape[1]
        if time > self.config.max_len:
            raise ValueError(f"{time} tokens in a row but max_len={self.config.max_len}; cut to the newest ones")
        x = self.item_embedding(items)  # (B, T, D)
        if self.item_scale != 1:
            x = x * self.item_scale
        if self.training and self.config.item_dropout_rate:
            x = x * (torch.rand(items.shape, device=x.device) >= self.config.item_dropout_rate)[..., None]
        rotation = None
        if self.config.position == "learned":
            lengths = (items != 0).sum(1, keepdim=True)  # (B, 1)
            # the newest token of a row is at max_len - 1; the clamp only touches padding
            at = self.config.max_len - lengths + torch.arange(time, device=items.device)  # (B, T)
            x = x + self.position_embedding(at.clamp(max=self.config.max_len - 1))
        else:
            cos, sin = self.rotation
            rotation = cos[:time, None], sin[:time, None]  # the same for all heads
        x = self.embedding_dropout(x)
        for block in self.blocks[:-1]:
            x = block(x, rotation)
        hidden: Tensor = self.final_norm(self.blocks[-1](x, rotation, last))
        return hidden

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """The ``rotation_table`` of a model with rotary positions, in the precision of its weights."""
        cos, sin = self.rotary_cos, self.rotary_sin
        assert isinstance(cos, Tensor) and isinstance(sin, Tensor)
        return cos, sin

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the whole catalogue, (..., D) -> (..., num_items + 1); column 0 is padding."""
        return hidden @ self.item_embedding.weight.T


def rotation_table(max_len: int, head_units: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (max_len, head_units) of RoFormer, section 3.2.2, as ``rotate`` takes them."""
    rates = ROPE_BASE ** (-torch.arange(0, head_units, 2, dtype=torch.float64) / head_units)
    angles = torch.arange(max_len, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos().to(torch.get_default_dtype()), angles.sin().to(torch.get_default_dtype())
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension pairs (i, i + Dh/2) of x (..., H, Dh) by their position's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Of rows (B, T, ...) the tokens at places (B,), (B, ...)."""
    return x[torch.arange(len(x), device=x.device), places]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
