"""Checks of arguments: every error names the argument, what it was and what is allowed.

The functions that take tensors run at every call of the operator, so the checks are comparisons of
integers in one pass; none of them reads a tensor's elements or waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

MAX_LENGTH = 2**30 - 1  # of a dimension: the kernels add two lengths in 32-bit integers
MAX_HEAD_DIM = 256
UNBOUNDED = -1  # a window's side without a limit
INT32_MAX = 2**31 - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max

# hopper_attention_dtype in include/hopper_attention/abi.h
DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1}
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

# (batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v)
Dims = tuple[int, int, int, int, int, int, int]


def tensors(**arguments: Any) -> None:
    """Raises TypeError unless every argument is a torch.Tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def optional_tensors(**arguments: Any) -> None:
    """Raises TypeError unless every argument is a torch.Tensor or None."""
    tensors(**{name: value for name, value in arguments.items() if value is not None})


def attention_dims(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Dims:
    """Checks that q, k and v fit together; lengths and head counts may be 0.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_kv, head_dim), q's dtype and device; heads_kv divides heads.
        v: (batch, seqlen_k, heads_kv, head_dim_v), likewise.

    Returns:
        (batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v).

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    try:
        batch, seqlen_q, heads, head_dim = q.shape
        batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
        batch_v, seqlen_v, heads_v, head_dim_v = v.shape
    except ValueError:
        _fail_rank(q, k, v)
    if batch_k != batch or batch_v != batch:
        _fail("batch (dimension 0)", q=batch, k=batch_k, v=batch_v)
    if seqlen_v != seqlen_k:
        _fail("sequence length (dimension 1)", k=seqlen_k, v=seqlen_v)
    if heads_v != heads_kv:
        _fail("number of heads (dimension 2)", k=heads_kv, v=heads_v)
    if head_dim_k != head_dim:
        _fail("head dimension (dimension 3)", q=head_dim, k=head_dim_k)
    belong_together(q, k, v, heads, heads_kv)
    return batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v


def belong_together(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, heads_kv: int
) -> None:
    """Checks what dense and packed batches share: groups of heads, one dtype, one device.

    Raises:
        ValueError: heads_kv does not divide heads, or a device does not fit.
        TypeError: a dtype does not fit.
    """
    if heads % heads_kv if heads_kv else heads:
        raise ValueError(
            f"heads of q must be a multiple of those of k and v, got q {heads}, k and v {heads_kv}"
        )
    dtype = q.dtype
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"q, k and v must have one dtype, got {dtype}, {k.dtype}, {v.dtype}")
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(f"q, k and v must be on one device, got {device}, {k.device}, {v.device}")


def kernel_limits(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> int:
    """Checks what only the kernels ask for.

    Returns:
        The dtype's code in the C interface.

    Raises:
        TypeError: dtype is not one that attention is computed in.
        NotImplementedError: it is an FP8 type.
        ValueError: head_dim or head_dim_v is out of range.
    """
    code = DTYPE_CODES.get(dtype)
    if code is None:
        if dtype in _FP8_DTYPES:
            raise NotImplementedError(
                f"q, k and v: {dtype} is not built here; use torch.float16 or torch.bfloat16, or "
                "torch.float8_e4m3fn with flash_attn_func or flash_attn_fp8_func"
            )
        raise TypeError(f"q, k and v must be torch.float16 or torch.bfloat16, got {dtype}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head dimension of q and k must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, "
            f"got {head_dim}"
        )
    if head_dim_v != head_dim and (head_dim_v % 8 or not 8 <= head_dim_v <= 128 or head_dim > 192):
        raise ValueError(
            "head dimension of v must equal that of q and k, or be a multiple of 8 from 8 to 128 "
            f"where theirs is at most 192; got {head_dim_v} beside {head_dim}"
        )
    return code


def scalars(
    softmax_scale: float, window_left: int, window_right: int, softcap: float, sm_margin: int
) -> None:
    """Checks the numbers of the operator; their types are the schema's.

    Raises:
        ValueError: a number is out of range.
    """
    # `not a <= b` also catches NaN.
    if not -_FLOAT32_MAX <= softmax_scale <= _FLOAT32_MAX:
        raise ValueError(f"softmax_scale must be a finite float32, got {softmax_scale}")
    if window_left < UNBOUNDED or window_right < UNBOUNDED:
        raise ValueError(
            "window_size must be (left, right), each -1 (unbounded) or the number of keys, "
            f"0 or more; got ({window_left}, {window_right})"
        )
    if not 0 <= softcap <= _FLOAT32_MAX:
        raise ValueError(f"softcap must be 0 (off) or a positive finite float32, got {softcap}")
    if not 0 <= sm_margin <= INT32_MAX:
        raise ValueError(
            f"sm_margin must be the number of multiprocessors to leave free, 0 or more; "
            f"got {sm_margin}"
        )


def lengths(batch: int, seqlen_q: int, seqlen_k: int, heads: int) -> None:
    """Raises ValueError where a dimension is longer than the kernels can count."""
    if max(batch, seqlen_q, seqlen_k, heads) <= MAX_LENGTH:
        return
    for name, length in (
        ("batch", batch),
        ("sequence length of q", seqlen_q),
        ("sequence length of k and v", seqlen_k),
        ("number of heads of q", heads),
    ):
        if length > MAX_LENGTH:
            raise ValueError(f"{name} must be at most {MAX_LENGTH}, got {length}")


def sink(learnable_sink: torch.Tensor, heads: int, device: torch.device) -> None:
    """Checks an attention sink: (heads,) float32 on q's device.

    Raises:
        ValueError: its shape or device does not fit.
        TypeError: it is no tensor, or its dtype does not fit.
    """
    if not isinstance(learnable_sink, torch.Tensor):
        tensors(learnable_sink=learnable_sink)
    if learnable_sink.shape != (heads,):
        raise ValueError(
            f"learnable_sink must have shape (heads,), a logit a head of q: ({heads},), got "
            f"{tuple(learnable_sink.shape)}"
        )
    if learnable_sink.dtype != torch.float32:
        raise TypeError(f"learnable_sink must be torch.float32, got {learnable_sink.dtype}")
    if learnable_sink.device != device:
        raise ValueError(
            f"learnable_sink must be on q's device, {device}, got {learnable_sink.device}"
        )


def request(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scalar_arguments: tuple[float, bool, int, int, float, int],
) -> tuple[int, Dims]:
    """Checks all that the kernels ask of a call but its device, addresses and strides.

    Args:
        q: as `attention_dims` takes it.
        k: likewise.
        v: likewise.
        scalar_arguments: the operator's arguments after them.

    Returns:
        The dtype's code in the C interface, and the dimensions.

    Raises:
        ValueError, TypeError, NotImplementedError: as the functions above.
    """
    dims = attention_dims(q, k, v)
    batch, seqlen_q, seqlen_k, heads, _, head_dim, head_dim_v = dims
    code = kernel_limits(q.dtype, head_dim, head_dim_v)
    softmax_scale, _, window_left, window_right, softcap, sm_margin = scalar_arguments
    scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    lengths(batch, seqlen_q, seqlen_k, heads)
    return code, dims


def needs_grad(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor | None
) -> bool:
    """Whether autograd will ask for a gradient of one of them.

    Raises:
        NotImplementedError: as `no_tangent`.
    """
    no_tangent(q, k, v, *more)
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bool(more) and any(x is not None and x.requires_grad for x in more))
    ) and torch.is_grad_enabled()


def may_have_tangents() -> bool:
    """Whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def no_tangent(*arguments: Any) -> None:
    """Raises NotImplementedError where a tensor has a tangent: operators would drop it."""
    if may_have_tangents() and any(
        isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None
        for x in arguments
    ):
        raise NotImplementedError(
            "attention, its gradient and quantizing have no forward-mode derivative "
            "(torch.func.jvp, dual tensors), so none of their tensors may have a tangent; "
            "hopper_attention.reference.attention has one"
        )


def no_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor | None
) -> None:
    """Raises NotImplementedError where autograd would ask for what has no gradient.

    Args:
        q: one tensor.
        k: another.
        v: another.
        more: the call's other tensors.
    """
    if needs_grad(q, k, v, *more):
        raise NotImplementedError(
            f"q, k and v: quantizing and attention of {torch.float8_e4m3fn} tensors have no "
            "gradient, so none of them, nor what comes with them, may require grad; pass 16-bit "
            "tensors to flash_attn_func, or to flash_attn_fp8_func for a forward pass in FP8, or "
            "call under torch.no_grad()"
        )


def default_scale(q: torch.Tensor) -> float:
    """1 / sqrt(head_dim); 1 where q's shape is an error that `attention_dims` reports."""
    shape = q.shape
    return shape[-1] ** -0.5 if shape and shape[-1] else 1.0


def real(name: str, value: Any) -> float:
    """A number as float. A tensor is refused: reading it would wait for the device.

    Raises:
        TypeError: value is not a real number.
    """
    if type(value) is float:  # isinstance takes 0.5 us below
        return value
    if isinstance(value, (Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def integer(name: str, value: Any) -> int:
    """A number as int.

    Raises:
        TypeError: value is not an integer.
    """
    if type(value) is int:
        return value
    if isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def flag(name: str, value: Any) -> bool:
    """True, False or NumPy's own.

    Raises:
        TypeError: value is anything else.
    """
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def window(window_size: Any) -> tuple[int, int]:
    """(left, right) in keys; None, alone or in either place, is unbounded.

    Raises:
        TypeError: window_size is not a pair of integers or None.
    """
    if type(window_size) is tuple and len(window_size) == 2:  # isinstance takes 1 us below
        left, right = window_size
        if type(left) is int and type(right) is int:
            return left, right
    if window_size is None:
        return UNBOUNDED, UNBOUNDED
    if not isinstance(window_size, Sequence) or isinstance(window_size, str):
        raise TypeError(
            f"window_size must be a pair (left, right) or None, got {type(window_size).__name__}"
        )
    if len(window_size) != 2:
        raise TypeError(f"window_size must have 2 numbers, got {len(window_size)}: {window_size}")
    left, right = window_size
    return (
        UNBOUNDED if left is None else integer("window_size[0]", left),
        UNBOUNDED if right is None else integer("window_size[1]", right),
    )


def _fail_rank(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim), "
                f"got {tensor.dim()}: {tuple(tensor.shape)}"
            )
    raise AssertionError("unreachable")


def _fail(what: str, **sizes: int) -> NoReturn:
    *others, last = sizes
    names = ", ".join(others) + f" and {last}"
    values = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise ValueError(f"{names} must have the same {what}, got {values}")
