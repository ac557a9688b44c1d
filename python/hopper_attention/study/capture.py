"""Records the Q, K and V of every attention layer while a Hugging Face model runs.

A model of transformers hands them to the attention function that its configuration names, after
rotary embeddings and the like. The recorder is such a function: it passes Q, K and V on to its
listener and the call on to PyTorch. Some models of transformers 4 do not ask for a function by
name but call PyTorch's scaled_dot_product_attention themselves; there the recorder listens to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .errors import StudyError
from .inputs import AttentionInputs
from .masks import UnsupportedMaskError, apply_mask, padding

ATTENTION_NAME = "hopper_attention_recorder"

# Arguments with which transformers asks for attention that is more than softmax(QK^T)V.
_BEYOND_ATTENTION = ("s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class LayerActivations:
    """What one attention layer was given in one forward pass.

    Attributes:
        index: the layer's place, in the order in which the model calls its layers.
        name: the attention module's name inside the model.
        problems: the layer's problems without padding: one for the whole batch, or one for each
            sequence where the batch is padded. Q, K and V have the model's dtype and device.
        padding: (batch, seqlen_k) bool, True where a token is padding; None where none is.
    """

    index: int
    name: str
    problems: list[AttentionInputs]
    padding: Tensor | None


Listener = Callable[[LayerActivations], None]


class _Recorder:
    """Gives layers their places and hands their activations to the listener."""

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._places: dict[str, int] = {}
        self._listener = listener

    def name_of(self, module: nn.Module) -> str:
        return self._names.get(id(module)) or type(module).__name__

    def record(self, name: str, inputs: AttentionInputs, mask: Tensor | None) -> None:
        """Q, K and V as (batch, seqlen, heads, head_dim); `mask` as `apply_mask` takes it."""
        place = self._places.setdefault(name, len(self._places))
        try:
            problems = apply_mask(inputs, mask)
        except UnsupportedMaskError as error:
            raise StudyError(f"layer {name}: {error}, which the study cannot compare") from error
        padded = padding(mask, inputs.batch, inputs.seqlen_k)
        self._listener(LayerActivations(place, name, problems, padded))


_active: ContextVar[_Recorder | None] = ContextVar("hopper_attention_recorder", default=None)


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: Q, K, V are (batch, heads, seqlen, head_dim)."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    inputs = _inputs(query, key, value, scaling, causal and attention_mask is None, softcap)
    recorder = _active.get()
    if recorder is not None:
        name = recorder.name_of(module)
        for option in _BEYOND_ATTENTION:
            if kwargs.get(option) is not None:
                raise StudyError(f"layer {name} uses {option}, which the study cannot compare")
        recorder.record(name, inputs, attention_mask)
    if inputs.softcap > 0:
        return _softcapped(inputs, attention_mask), None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    causal: bool,
    softcap: float | None = None,
) -> AttentionInputs:
    """The problem of Q, K, V in transformers' order of dimensions."""
    return AttentionInputs(
        query.detach().transpose(1, 2),
        key.detach().transpose(1, 2),
        value.detach().transpose(1, 2),
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=causal and query.shape[2] > 1,
        softcap=float(softcap or 0.0),
    )


def _softcapped(x: AttentionInputs, mask: Tensor | None) -> Tensor:
    """Attention with a softcap, which PyTorch's own does not have; (batch, seqlen, heads, d)."""
    query, key, value = (t.transpose(1, 2) for t in (x.query, x.key, x.value))
    group = x.heads // x.heads_kv
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * x.softmax_scale
    scores = torch.tanh(scores / x.softcap) * x.softcap
    visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
    if mask is not None:
        visible = (mask if mask.dtype == torch.bool else mask == 0)[..., : x.seqlen_k]
    elif x.causal:
        visible = visible.tril(x.seqlen_k - x.seqlen_q)
    scores = scores.masked_fill(~visible, float("-inf"))
    # Rows of padding may see nothing: 0, as in PyTorch's own, where a softmax would be NaN.
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


class _ListenToPyTorch(TorchFunctionMode):
    """Records calls of PyTorch's scaled_dot_product_attention inside a model's modules."""

    def __init__(self, recorder: _Recorder, inside: list[str]) -> None:
        super().__init__()
        self._recorder = recorder
        self._inside = inside

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._inside:
            self._record(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        inputs = _inputs(query, key, value, scale, is_causal)
        self._recorder.record(self._inside[-1], inputs, attn_mask)


@contextmanager
def _listening_to_pytorch(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keeps track of the module that runs, since PyTorch's function does not know it."""
    inside: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda _m, _a, name=name: inside.append(name))
            leave = module.register_forward_hook(
                lambda _m, _a, _o: (inside.pop(), None)[1], always_call=True
            )
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        with _ListenToPyTorch(recorder, inside):
            yield


@contextmanager
def recording(model: Any, listener: Listener) -> Iterator[None]:
    """While this context lasts, `listener` gets the activations of every layer that runs.

    The model computes what it always does; the listener is called in the midst of its forward
    pass, layer by layer, so nothing needs to be kept.

    Args:
        model: a `transformers.PreTrainedModel`, in eval mode.
        listener: called with `LayerActivations` for each attention layer of each forward pass.

    Raises:
        StudyError: from the forward pass, where a layer computes something else than
            attention with padding, causal masks, sliding windows and softcap.
    """
    AttentionInterface.register(ATTENTION_NAME, _recording_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    recorder = _Recorder(model, listener)
    before = model.config._attn_implementation
    with _quiet_transformers():
        model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        with _listening_to_pytorch(model, recorder):
            yield
        return
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)
        model.set_attn_implementation(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the warning of models that take no attention function, which we provide for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
