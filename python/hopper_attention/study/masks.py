"""What a model's attention mask says: who is padding, and which keys the others see."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .inputs import AttentionInputs


class UnsupportedMaskError(ValueError):
    """A mask that is not padding, causal, a window, or a combination of them."""


def apply_mask(inputs: AttentionInputs, mask: Tensor | None) -> list[AttentionInputs]:
    """Turns a problem with a mask into problems without padding, whose options say the same.

    Args:
        inputs: the problem; its `causal` counts only where there is no mask.
        mask: (batch or 1, heads or 1, seqlen_q, seqlen_k): bool, True where the query sees the
            key; or floating, 0 where it does and the dtype's minimum or -infinity where it does
            not. None for no mask.

    Returns:
        One problem, where no token is padding; else one for each sequence, cut down to the
        tokens that are not padding.

    Raises:
        UnsupportedMaskError: for a mask that changes from head to head, adds to the scores, or
            has a pattern that causal and window_size cannot say.
    """
    if mask is None:
        return [inputs]
    visible = _visible(mask)[..., : inputs.seqlen_k]
    if bool((visible == visible[:1]).all()) and bool(visible[0].any(0).all()):
        return [_with_pattern(inputs, visible[0])]
    visible = visible.expand(inputs.batch, -1, -1)
    sequences = []
    for index in range(inputs.batch):
        keys = visible[index].any(0)
        # In self-attention a padded token is padding as a query too.
        queries = keys if inputs.seqlen_q == inputs.seqlen_k else torch.ones_like(visible[0, :, 0])
        sequence = replace(
            inputs,
            query=inputs.query[index : index + 1, queries],
            key=inputs.key[index : index + 1, keys],
            value=inputs.value[index : index + 1, keys],
        )
        if keys.any():
            sequences.append(_with_pattern(sequence, visible[index][queries][:, keys]))
    return sequences


def padding(mask: Tensor | None, batch: int, seqlen_k: int) -> Tensor | None:
    """(batch, seqlen_k) bool, True where a token is padding; None where none is."""
    if mask is None:
        return None
    hidden = ~_visible(mask)[..., :seqlen_k].any(1)
    return hidden.expand(batch, -1) if bool(hidden.any()) else None


def _visible(mask: Tensor) -> Tensor:
    """(batch or 1, seqlen_q, seqlen_k) bool: what the mask lets through."""
    if mask.dtype == torch.bool:
        visible = mask
    else:
        visible = mask == 0
        # Half the minimum, since models add their minima to one another.
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((visible | hidden).all()):
            raise UnsupportedMaskError("the mask adds a bias to the scores")
    if not bool((visible == visible[:, :1]).all()):
        raise UnsupportedMaskError("the mask changes from head to head")
    return visible[:, 0]


def _with_pattern(inputs: AttentionInputs, visible: Tensor) -> AttentionInputs:
    """`inputs` with the causal flag and window that `visible`, (seqlen_q, seqlen_k), shows."""
    seqlen_q, seqlen_k = visible.shape
    rows = torch.arange(seqlen_q, device=visible.device)[:, None] + seqlen_k - seqlen_q
    distance = torch.arange(seqlen_k, device=visible.device)[None, :] - rows
    seen = distance[visible]
    left, right = -int(seen.min()), int(seen.max())
    band = (distance >= -left) & (distance <= right)
    if left < 0 or right < 0 or not torch.equal(band, visible):
        raise UnsupportedMaskError("the mask is neither full, causal nor a sliding window")
    causal = right == 0 and seqlen_q > 1
    window_left = left if left < seqlen_k - 1 else -1
    window_right = right if right < seqlen_q - 1 else -1
    if causal:
        window_right = 0 if window_left >= 0 else -1
    return replace(inputs, causal=causal, window_size=(window_left, window_right))
