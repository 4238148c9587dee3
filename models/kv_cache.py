"""The key/value cache of text generation: what later tokens attend to, layer by layer.

Sequences of a batch end together: a shorter one begins with padding. A slot holds a token of each sequence.

Legend: B batch, G key/value groups of this rank, S tokens of this pass, T slots, N width of what is cached.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """Which slots the queries of a pass see."""

    first: int
    """The first slot that any of them sees; the last is that of the pass's last token."""
    mask_B1ST: Tensor | None
    """bool over the slots from `first` on; None: every query sees all of these."""


@dataclass
class LayerSlots:
    """What one layer keeps of the tokens so far."""

    stored: tuple[Tensor, ...] = ()
    """[B, G, slots, N] each, with room for further tokens."""
    derived: tuple[Tensor, ...] = ()
    """What the layer computes of its weights once (models.mla)."""


@dataclass(frozen=True)
class LayerCache:
    """A layer's part of the cache during one pass."""

    slots: LayerSlots
    before: int
    """Tokens of the earlier passes."""
    visible: Visible | None
    """None in the first pass, whose tokens attend to each other alone."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Stores [B, G, S, N] of the pass's tokens. Returns the slots that its queries see. A pass may be repeated, as
        the interleaved pipeline schedule does: it stores the same again."""
        end = self.before + new[0].shape[2]
        if not self.slots.stored or self.slots.stored[0].shape[2] < end:
            self.slots.stored = self._grown(new, end)
        for kept, t in zip(self.slots.stored, new, strict=True):
            kept[:, :, self.before : end] = t
        first = 0 if self.visible is None else self.visible.first
        return tuple(kept[:, :, first:end] for kept in self.slots.stored)

    def _grown(self, new: tuple[Tensor, ...], end: int) -> tuple[Tensor, ...]:
        """Room for half as many tokens again, so that growing copies a token a few times at most."""
        room = end + max(64, end // 2)
        grown = tuple(t.new_empty((*t.shape[:2], room, t.shape[3])) for t in new)
        for larger, kept in zip(grown, self.slots.stored, strict=False):
            larger[:, :, : self.before] = kept[:, :, : self.before]
        return grown

    def derived(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `compute` returned in the first call."""
        if not self.slots.derived:
            self.slots.derived = compute()
        return self.slots.derived


@dataclass
class KVCache:
    """The cache of this rank's layers."""

    padding: list[int]
    """Of each sequence, the number of slots before its first token."""
    length: int = 0
    """Slots that earlier passes have filled."""
    layers: dict[int, LayerSlots] = field(default_factory=dict)

    def advance(self, tokens: int) -> None:
        """After a pass of so many tokens, once it has gone through all layers."""
        self.length += tokens

    def layer(self, index: int, visible: Visible | None) -> LayerCache:
        return LayerCache(self.layers.setdefault(index, LayerSlots()), self.length, visible)

    def visible(
        self, tokens: int, device: torch.device, *, window: int | None = None, chunk: int | None = None
    ) -> Visible | None:
        """What the tokens of this pass see of all slots up to their own; a token of padding sees its own at least.

        Args:
            window, chunk: as in ops.attention_pieces.attention_pieces.
        """
        if not self.length:
            return None
        if tokens == 1 and window is None and chunk is None and min(self.padding) == max(self.padding):
            return Visible(self.padding[0], None)
        end = self.length + tokens
        query_S, padding_B1 = torch.arange(self.length, end), torch.tensor(self.padding)[:, None]
        first_BS = padding_B1.expand(-1, tokens)
        if window is not None:
            first_BS = torch.maximum(first_BS, query_S - window + 1)
        if chunk is not None:
            position_BS = query_S - padding_B1
            first_BS = torch.maximum(first_BS, query_S - position_BS % chunk)
        first_BS = torch.minimum(first_BS, query_S)
        first, last = (int(t) for t in first_BS.aminmax())
        if tokens == 1 and first == last:
            return Visible(first, None)
        key_T = torch.arange(first, end)
        mask_BST = (key_T >= first_BS[..., None]) & (key_T <= query_S[:, None])
        return Visible(first, mask_BST.unsqueeze(1).to(device, non_blocking=True))

    def first_positions(self, tokens: int) -> Tensor:
        """int64 [B, S] for attention_pieces in the first pass: padding is a document of its own before the text."""
        slot_S, padding_B1 = torch.arange(tokens), torch.tensor(self.padding)[:, None]
        return torch.where(slot_S < padding_B1, slot_S, slot_S - padding_B1)

    def lengths(self, tokens: int) -> Tensor:
        """int64 [B]: tokens of each sequence, those of this pass included."""
        return (self.length + tokens - torch.tensor(self.padding)).clamp(min=0)
