"""SASRec (Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018), for training and for whole windows.

For serving, packed.py puts tokens through the same weights, also after cached tokens. This module knows only tensors:
no item ids, files, users or slots.

Layout. A row holds its tokens first and zeros behind them, so the causal mask alone hides the padding. Still,
sequences are *right-aligned* in their positions, as in the paper: with ``position="learned"`` the newest item is always
at position ``max_len - 1``. With ``position="rope"`` (Su et al., RoFormer, 2021) only distances count, so alignment
changes nothing, and a cached key remains valid while the window grows.
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


def option(default: Any, text: str, *, advanced: bool = False) -> Any:
    """Return a dataclass field for a hyper-parameter, with its default and help text.

    Args:
        advanced: rarely needed; references and command lines list it after the others.
    """
    return field(default=default, metadata={"help": text, "advanced": advanced})


@dataclass(frozen=True)
class SASRecConfig:
    """The shape of a model. ``num_items`` does not count the padding index 0.

    Raises:
        ValueError: a value is out of range, or ``hidden_units`` does not divide into heads.
    """

    num_items: int
    max_len: int = option(50, "tokens in a window")
    hidden_units: int = option(64, "width of the model")
    num_blocks: int = option(2, "transformer blocks")
    num_heads: int = option(1, "attention heads; hidden_units must divide into them")
    dropout_rate: float = option(0.2, "share of activations dropped in training")
    item_dropout_rate: float = option(
        0.0, "share of a window's items hidden in training; the others' positions do not change", advanced=True
    )
    position: Literal["learned", "rope"] = option("rope", "rope encodes one token per click; learned is the paper's")
    scale_embeddings: bool = option(
        True, "multiply item embeddings by sqrt(hidden_units), as the paper's code does", advanced=True
    )
    reminder: float = option(
        0.0, "added to the scores of the window's items; pays off where people return to items", advanced=True
    )

    def __post_init__(self) -> None:
        counts = ("num_items", "max_len", "hidden_units", "num_blocks", "num_heads")
        for name, value in vars(self).items():
            if name in counts and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
            if name in ("dropout_rate", "item_dropout_rate") and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value!r}: must be at least 0 and below 1")
        if self.position not in ("learned", "rope"):
            raise ValueError(f"position={self.position!r}: must be 'learned' or 'rope'")
        if not math.isfinite(self.reminder):
            raise ValueError(f"reminder={self.reminder!r}: must be finite")
        if self.hidden_units % self.num_heads:
            raise ValueError(f"hidden_units={self.hidden_units} is not a multiple of num_heads={self.num_heads}")
        if self.position == "rope" and (self.hidden_units // self.num_heads) % 2:
            raise ValueError(
                f"position='rope' rotates pairs of dimensions: hidden_units / num_heads must be even, "
                f"not {self.hidden_units // self.num_heads}"
            )

    def same_shape(self, other: SASRecConfig) -> bool:
        """Return whether the weights of one model fit the other, except for the number of items."""
        free: dict[str, Any] = {"num_items": 1, "dropout_rate": 0.0, "item_dropout_rate": 0.0, "reminder": 0.0}
        return replace(self, **free) == replace(other, **free)


def suggest_config(n_items: int) -> dict[str, int]:
    """Suggest hidden_units, num_blocks and num_heads for a catalogue of this size.

    ``SASRecClassifierEstimator(**suggest_config(n))`` uses them.

    Raises:
        ValueError: n_items is smaller than 1.
    """
    if n_items < 1:
        raise ValueError(f"n_items={n_items}: must be at least 1")
    if n_items < 10_000:
        return {"hidden_units": 50, "num_blocks": 2, "num_heads": 1}
    if n_items <= 100_000:
        return {"hidden_units": 100, "num_blocks": 2, "num_heads": 1}
    return {"hidden_units": 128, "num_blocks": 3, "num_heads": 2}


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention of (B, T, H, Dh) to (B, L, H, Dh).

    Args:
        mask: (B, T, L), True = may attend; None lets each token attend to itself and those before it.
    """
    attended: Tensor = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
    )
    return attended.transpose(1, 2)


class Dropout(nn.Module):
    """Dropout with one random number for eight values: drawing one for each took a third of an epoch on a CPU.

    Args:
        rate: rounded to whole 256ths.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.survivors = max(1, 256 - round(256 * rate))  # of 256 byte values

    def forward(self, x: Tensor) -> Tensor:
        """Set each value to 0 with probability ``rate``, and scale the others so that the mean does not change."""
        if not self.training or self.survivors == 256:
            return x
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        each = numbers.view(torch.int8)[: x.numel()].view(x.shape)
        # a comparison that writes floats is ten times as fast as one that writes booleans
        keep = torch.lt(each, self.survivors - 128, out=torch.empty_like(x, requires_grad=False))
        return x * keep.mul_(256 / self.survivors)


class Attention(nn.Module):
    """Causal multi-head self-attention over one fused projection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_units, 3 * config.hidden_units)
        self.out = nn.Linear(config.hidden_units, config.hidden_units)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, last: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D), or to (B, D) of the tokens at ``last`` (B,) alone."""
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
        """Map (B, T, D) to (B, T, D), or to (B, D) of the tokens at ``last`` (B,) alone."""
        attended = self.attention(self.attention_norm(x), rotation, last)
        x = (x if last is None else _at(x, last)) + self.dropout(attended)
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class SASRec(nn.Module):
    """Item embedding, ``num_blocks`` causal blocks, final LayerNorm; scores by the tied item embedding."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        # without it the blocks' output outweighs the items themselves, above all rare ones
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
        """Return the hidden states of all tokens, or of one token of each row.

        Args:
            items: (B, T) item indices, a row's tokens first and zeros behind; T at most max_len.
            last: (B,) the place of the token in each row whose hidden state is returned.

        Returns:
            (B, T, D), meaningless at padding. With ``last``, (B, D).

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
            # the newest token of a row is at max_len - 1; the clamp changes only padding
            at = self.config.max_len - lengths + torch.arange(time, device=items.device)  # (B, T)
            x = x + self.position_embedding(at.clamp(max=self.config.max_len - 1))
        else:
            cos, sin = self.rotation
            rotation = cos[:time, None], sin[:time, None]  # for all heads
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
        """Return scores of the whole catalogue, (..., D) -> (..., num_items + 1); column 0 is padding."""
        return hidden @ self.item_embedding.weight.T


def rotation_table(max_len: int, head_units: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (max_len, head_units) of RoFormer, section 3.2.2, as ``rotate`` takes them."""
    rates = ROPE_BASE ** (-torch.arange(0, head_units, 2, dtype=torch.float64) / head_units)
    angles = torch.arange(max_len, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos().to(torch.get_default_dtype()), angles.sin().to(torch.get_default_dtype())
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension pairs (i, i + Dh/2) of x (..., H, Dh) by the angle of their position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Return the token at ``places`` (B,) of each row of x (B, T, ...), (B, ...)."""
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
