"""The contestants of the FP8 suites: this package's e4m3 forward, its peers', and FA3 in bf16.

Each is given 16-bit tensors and quantizes them before it is timed, as its own users do: ours by the
default recipe, the peers by a scale of 1 for the whole tensor, which N(0, 1) allows.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hopper_attention.bench.contestants import (
    OURS,
    Bound,
    Contestant,
    Fa3,
    UnavailableError,
    collect,
    load_library,
    require_kernels,
)
from hopper_attention.bench.shapes import Shape
from hopper_attention.recipe import Fp8Recipe

FAST = "hopper_attention_fast"
BASE = "fa3"  # in bf16
FP8_PEERS = ("cudnn_fp8", "fa3_fp8")

FA3_FP8_VARIABLE = "FA3_FP8_SO"
_FA3_FP8_HELP = (
    "put fa3_fp8.so (the operator library of vLLM's FlashAttention-3, _vllm_fa3_C of the vllm 0.21 "
    f"wheel) into --peers-dir, or name it in {FA3_FP8_VARIABLE}"
)
_E4M3 = torch.float8_e4m3fn


class Fp8Ours:
    """This package's `flash_attn_fp8_func` of what `quantize` returned."""

    def __init__(self, name: str = OURS, recipe: Fp8Recipe | None = None) -> None:
        require_kernels()
        self.name = name
        self._recipe = recipe or Fp8Recipe()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Needs nothing around its calls."""
        return contextlib.nullcontext()

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Quantizes, and prepares a call; see `Contestant.bind`."""
        import hopper_attention

        quantized = hopper_attention.quantize(q, k, v, self._recipe)
        call, causal, window = (
            hopper_attention.flash_attn_fp8_func,
            shape.causal,
            shape.window,
        )

        def run() -> Tensor:
            # without return_attn_probs it is the output alone
            return cast(Tensor, call(quantized, causal=causal, window_size=window))

        return Bound(run, lambda out: out, quantized.dequantize)


class Fa3Fp8:
    """vLLM's FlashAttention-3, ``torch.ops._vllm_fa3_C.fwd``: two-level sums, packed calls."""

    name = "fa3_fp8"

    def __init__(self, peers_dir: Path | None = None) -> None:
        load_library(peers_dir, "fa3_fp8.so", FA3_FP8_VARIABLE, "_vllm_fa3_C", _FA3_FP8_HELP)
        self._call = torch.ops._vllm_fa3_C.fwd

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Needs nothing around its calls."""
        return contextlib.nullcontext()

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Rounds to e4m3, packs, and prepares a call; see `Contestant.bind`."""
        packed, stands_for = _rounded(q, k, v)
        batch, heads_kv = shape.batch, shape.heads_kv
        descale = torch.ones(batch, heads_kv, device=q.device)
        bounds = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
        lengths = (shape.seqlen_q, shape.seqlen_k)
        cu_q, cu_k = (bounds * length for length in lengths)
        left, right = shape.window[0], 0 if shape.causal else shape.window[1]
        arguments: list[Any] = [x.flatten(0, 1) for x in packed]
        # k_new, v_new, q_v, out; cu_seqlens; seqused; maxima; page table to rotary embedding
        arguments += [None, None, None, None, cu_q, cu_k, None, None, None, *lengths]
        arguments += [None] * 6 + [descale] * 3
        # scale, mask, soft cap, rotary; scheduler metadata, splits, GQA packing, margin; sinks, the
        # rank and size of a context group
        arguments += [shape.head_dim**-0.5, shape.causal, left, right, 0.0, True]
        arguments += [None, 1, None, 0, None, 1, 0, None]
        call = self._call

        def run() -> Tensor:
            out: Tensor = call(*arguments)[0]
            return out

        return Bound(run, lambda out: out.unflatten(0, (batch, shape.seqlen_q)), stands_for)


class CudnnFp8:
    """cuDNN's FP8 forward through nvidia-cudnn-frontend; its output is e4m3 too."""

    name = "cudnn_fp8"

    def __init__(self, peers_dir: Path | None = None) -> None:
        del peers_dir  # a package, over the cuDNN inside PyTorch
        try:
            self._cudnn: Any = importlib.import_module("cudnn")
        except Exception as error:  # its library may lack others
            raise UnavailableError(
                f"not installed ({error}): pip install nvidia-cudnn-frontend"
            ) from error

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Needs nothing around its calls."""
        return contextlib.nullcontext()

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Rounds to e4m3, builds a graph, and prepares a call; see `Contestant.bind`."""
        if shape.window != (-1, -1):
            raise UnavailableError("windows are not asked of cuDNN's FP8 here")
        if shape.causal and shape.seqlen_q != shape.seqlen_k:
            raise UnavailableError("cuDNN's causal mask is aligned top left, ours bottom right")
        rounded, stands_for = _rounded(q, k, v)
        tensors = [x.transpose(1, 2) for x in rounded]
        size = (shape.batch, shape.seqlen_q, shape.heads, shape.head_dim_v)
        out = torch.empty(size, device=q.device, dtype=_E4M3).transpose(1, 2)
        run = _cudnn_graph(self._cudnn, tensors, out, shape)
        # e4m3 has few operations: the checks take float32
        return Bound(run, lambda found: found.transpose(1, 2).float(), stands_for, _E4M3)


def _cudnn_graph(cudnn: Any, qkv: list[Tensor], out: Tensor, shape: Shape) -> Callable[[], Tensor]:
    """Builds cuDNN's graph; its call computes out, (batch, heads, seqlen_q, head_dim_v)."""
    fp8, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=single, compute_data_type=single)
    ones = [1, 1, 1, 1]

    def describe(x: Tensor) -> Any:
        return graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=fp8)

    inputs = [describe(x) for x in qkv]
    # P is multiplied by 256 and its product divided, as ours is
    values = {"q": 1.0, "k": 1.0, "v": 1.0, "s": 1 / 256, "scale_s": 256.0, "scale_o": 1.0}
    scales = {n: graph.tensor(dim=ones, stride=ones, data_type=single) for n in values}
    found, _, *amaxes = graph.sdpa_fp8(
        **dict(zip("qkv", inputs, strict=True)),
        **{f"descale_{name}": scales[name] for name in "qkvs"},
        **{name: scales[name] for name in ("scale_s", "scale_o")},
        is_inference=True,
        attn_scale=shape.head_dim**-0.5,
        use_causal_mask=shape.causal,
    )
    found.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    found.set_data_type(fp8)
    for amax in amaxes:
        amax.set_output(True).set_dim(ones).set_stride(ones).set_data_type(single)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()

    def scalar(value: float) -> Tensor:
        return torch.full(ones, value, device=out.device)

    bytes_ = max(1, graph.get_workspace_size())
    workspace = torch.empty(bytes_, device=out.device, dtype=torch.uint8)
    pack = {**dict(zip(inputs, qkv, strict=True)), found: out}
    pack.update({scales[name]: scalar(value) for name, value in values.items()})
    pack.update({amax: scalar(0.0) for amax in amaxes})

    def run() -> Tensor:
        graph.execute(pack, workspace)
        return out

    return run


def _rounded(
    q: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Tensor], Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Tensors rounded to e4m3 with a scale of 1, and what they stand for."""
    rounded = [x.to(_E4M3) for x in (q, k, v)]

    def stands_for() -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = (x.float() for x in rounded)
        return first, second, third

    return rounded, stands_for


def gather_fp8(
    peers: bool = True, peers_dir: Path | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """Collects the contestants of the FP8 suites, as `contestants.gather` those of the others.

    Args:
        peers: Whether to take the peers, too.
        peers_dir: Folder of the peers' files, or None.

    Returns:
        The contestants, ours first, and the reason for each that is missing.
    """
    makers: dict[str, Callable[[Path | None], Contestant]] = {
        OURS: lambda _: Fp8Ours(),
        FAST: lambda _: Fp8Ours(FAST, replace(Fp8Recipe(), accumulation="fast")),
    }
    if peers:
        makers.update({"cudnn_fp8": CudnnFp8, "fa3_fp8": Fa3Fp8, BASE: Fa3})
    return collect(makers, peers_dir)
