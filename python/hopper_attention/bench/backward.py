"""The contestants of the backward suites: this package's gradients, and its peers'.

Each makes its own forward call when it is bound. What is timed is the backward pass alone: given
dO, Q, K, V, O and the log-sum-exp, find dQ, dK and dV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hopper_attention.bench.contestants import (
    OURS,
    UnavailableError,
    collect,
    load_fa3,
    require_kernels,
)
from hopper_attention.bench.shapes import Shape

OURS_DETERMINISTIC = "hopper_attention_deterministic"
FA3_DETERMINISTIC = "fa3_deterministic"

# FlashAttention-3 orders its sums up to here.
_FA3_LARGEST_DETERMINISTIC = 192

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BoundBackward:
    """A backward call with its tensors.

    Attributes:
        run: Makes the call; returns dQ, dK and dV as the implementation does.
        to_bshd: Views these as (batch, seqlen, heads, d).
    """

    run: Callable[[], Gradients]
    to_bshd: Callable[[Gradients], Gradients]


class BackwardContestant(Protocol):
    """An implementation of attention's backward pass."""

    name: str

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> BoundBackward:
        """Runs the forward pass, and prepares a backward call.

        Args:
            shape: The problem.
            q: (batch, seqlen_q, heads, head_dim)
            k: (batch, seqlen_k, heads_kv, head_dim)
            v: (batch, seqlen_k, heads_kv, head_dim_v)
            dout: (batch, seqlen_q, heads, head_dim_v)

        Raises:
            UnavailableError: The implementation does not do this problem.
        """


def _same(found: Gradients) -> Gradients:
    return found


def _heads_first(found: Gradients) -> Gradients:
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


class OursBackward:
    """This package's operator, ``torch.ops.hopper_attention.backward``."""

    def __init__(self, deterministic: bool = False) -> None:
        import hopper_attention
        from hopper_attention import ops_backward

        require_kernels()
        self.name = OURS_DETERMINISTIC if deterministic else OURS
        self._deterministic = deterministic
        self._forward = hopper_attention.flash_attn_func
        self._backward = ops_backward.backward

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> BoundBackward:
        """Prepares a call; see `BackwardContestant.bind`."""
        out, lse = self._forward(
            q, k, v, causal=shape.causal, window_size=shape.window, return_attn_probs=True
        )
        scalars = (shape.head_dim**-0.5, shape.causal, *shape.window, 0.0, self._deterministic)
        call = self._backward

        def run() -> Gradients:
            dq, dk, dv = call(dout, None, q, k, v, out, lse, *scalars)[:3]
            return dq, dk, dv

        return BoundBackward(run, _same)


class Fa3Backward:
    """FlashAttention-3's operator, ``torch.ops.flash_attn_3.bwd``."""

    def __init__(self, peers_dir: Path | None = None, deterministic: bool = False) -> None:
        where = load_fa3(peers_dir)
        self.name = FA3_DETERMINISTIC if deterministic else "fa3"
        self._deterministic = deterministic
        self._forward = torch.ops.flash_attn_3.fwd
        if not hasattr(torch.ops.flash_attn_3, "bwd"):
            raise UnavailableError(f"{where} does not define torch.ops.flash_attn_3.bwd")
        self._backward = torch.ops.flash_attn_3.bwd

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> BoundBackward:
        """Prepares a call; see `BackwardContestant.bind`."""
        if self._deterministic and shape.head_dim > _FA3_LARGEST_DETERMINISTIC:
            raise UnavailableError(
                "FlashAttention-3 is not deterministic above head dimension "
                f"{_FA3_LARGEST_DETERMINISTIC}"
            )
        keywords: dict[str, Any] = {
            "softmax_scale": shape.head_dim**-0.5,
            "is_causal": shape.causal,
        }
        if shape.window != (-1, -1):
            keywords["window_size_left"] = shape.window[0]
            keywords["window_size_right"] = 0 if shape.causal else shape.window[1]
        out, lse = self._forward(q, k, v, num_splits=1, **keywords)[:2]
        call, deterministic = self._backward, self._deterministic

        def run() -> Gradients:
            found = call(dout, q, k, v, out, lse, deterministic=deterministic, **keywords)
            return cast(Gradients, tuple(found[:3]))

        return BoundBackward(run, _same)


class SdpaBackward:
    """Autograd through a backend of ``torch.nn.functional.scaled_dot_product_attention``.

    The forward call settles the backend; its graph is kept, and only the gradients are timed.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self._backend = backend

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> BoundBackward:
        """Prepares a call; see `BackwardContestant.bind`."""
        from torch.nn.attention import sdpa_kernel

        if shape.window != (-1, -1):
            raise UnavailableError("PyTorch's interface to it has no window")
        if shape.causal and shape.seqlen_q != shape.seqlen_k:
            raise UnavailableError("PyTorch's causal mask is aligned top left, ours bottom right")
        # views are made before the leaves, so that autograd differentiates attention alone
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
        grad_out = dout.transpose(1, 2)
        with torch.enable_grad(), sdpa_kernel(self._backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.heads_kv
            )

        def run() -> Gradients:
            found = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
            return cast(Gradients, found)

        return BoundBackward(run, _heads_first)


def _cudnn(peers_dir: Path | None) -> BackwardContestant:
    del peers_dir  # it is inside PyTorch
    from torch.nn.attention import SDPBackend

    if not torch.backends.cudnn.is_available():
        raise UnavailableError("this PyTorch has no cuDNN")
    return SdpaBackward("cudnn", SDPBackend.CUDNN_ATTENTION)


def _fa2(peers_dir: Path | None) -> BackwardContestant:
    del peers_dir
    from torch.nn.attention import SDPBackend

    return SdpaBackward("fa2", SDPBackend.FLASH_ATTENTION)


def gather_backward(
    peers: bool = True, peers_dir: Path | None = None
) -> tuple[list[BackwardContestant], dict[str, str]]:
    """Collects the contestants of the backward suites, as `contestants.gather` the forward's.

    Args:
        peers: Whether to take the peers, too.
        peers_dir: Folder of the peers' files, or None.

    Returns:
        The contestants, ours first, and the reason for each that is missing.
    """
    makers: dict[str, Callable[[Path | None], BackwardContestant]] = {
        OURS: lambda _: OursBackward(),
        OURS_DETERMINISTIC: lambda _: OursBackward(deterministic=True),
    }
    if peers:
        makers["fa3"] = Fa3Backward
        makers[FA3_DETERMINISTIC] = lambda folder: Fa3Backward(folder, deterministic=True)
        makers.update({"cudnn": _cudnn, "fa2": _fa2})
    return collect(makers, peers_dir)
