"""MultiheadAttention taken apart into two Linear layers and a call of attention.

torch's class multiplies by its weights in one function, where neither quantizers nor rules nor
algorithms can reach them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quark_brevitas.apart import take_apart


class SplitAttention(nn.Module):
    """Computes what a MultiheadAttention does, by layers of its own.

    Args:
        whole: The module whose weights it takes over; see :func:`can_split`.
    """

    in_proj_bias = None
    """Tells torch's encoder layers to keep to the modules instead of one fused kernel."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = whole.embed_dim, whole.num_heads
        self.batch_first, self.dropout = whole.batch_first, whole.dropout
        assert whole.in_proj_weight is not None
        biased = whole.in_proj_bias is not None
        self.in_proj = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=biased)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=biased)
        self.in_proj.weight = whole.in_proj_weight
        self.out_proj.weight = whole.out_proj.weight
        if biased:
            self.in_proj.bias = whole.in_proj_bias
            self.out_proj.bias = whole.out_proj.bias
        self.train(whole.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the module it stands for: outputs shaped like ``query``, and weights or None."""
        # A tracer's stand-in for a tensor has no number of axes; batches are taken for granted.
        flat = isinstance(query, Tensor) and query.ndim == 2
        turned = not self.batch_first and not flat
        q, k, v = self._projected(query, key, value)
        if turned:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropped = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        joined = mixed.transpose(-3, -2).flatten(-2)
        output = self.out_proj(joined.transpose(0, 1) if turned else joined)
        if not need_weights:
            return output, None
        scores = q @ k.transpose(-2, -1) / (self.embed_dim // self.num_heads) ** 0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        return output, weights.mean(-3) if average_attn_weights else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            whole = self.in_proj(query).chunk(3, -1)
            return whole[0], whole[1], whole[2]
        given = enumerate((query, key, value))
        return tuple(self.in_proj(tensor).chunk(3, -1)[at] for at, tensor in given)

    def _heads(self, tensor: Tensor) -> Tensor:
        width = self.embed_dim // self.num_heads
        return torch.unflatten(tensor, -1, (self.num_heads, width)).transpose(-3, -2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        found = None
        if attn is not None:
            found = _additive(attn, like)
            if found.ndim == 3 and like.ndim == 4:
                found = torch.unflatten(found, 0, (-1, self.num_heads))
        if padding is not None:
            hidden = _additive(padding, like)[..., None, None, :]
            found = hidden if found is None else found + hidden
        return found


def can_split(module: nn.Module) -> bool:
    """Whether a module is a MultiheadAttention of the common kind: equal widths, nothing added."""
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


def split_all(model: nn.Module) -> list[str]:
    """Take every MultiheadAttention within a model apart, in place.

    Returns:
        The names of the layers that came of it.
    """

    def make(_name: str, module: Any) -> nn.Module | None:
        return SplitAttention(module) if can_split(module) else None

    return take_apart(model, make)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    empty = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return empty.masked_fill(mask, float("-inf"))
