"""Runs each compiled kernel once on a small odd shape, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py \\
      --only '^(?!backward|quantize|.*packed)'

racecheck cannot judge the backward kernels: it takes a plain bulk copy (cp.async.bulk, by which LSE
and delta come) for a store of the thread that issues it, and does not see that its readers wait for
the copy's mbarrier. Copies through a tensor map it leaves out. Nor does it see that, behind a
__syncwarp(), one lane's arrival at an mbarrier gives back what its whole warp has read or written.
A kernel of a few lines shows that on the card: with such an arrival it is reported, and with one of
each of the 32 lanes it is not. The quantizer's warps arrive so, and the forward kernels' where they
give back the slot of a tile's message, whose reads and next message are then reported. Of the runs
below that befalls packed kernels; dense masked ones are reported too where a block goes through
many tiles.

Full kernels run once, masked ones with a causal mask, a window and a soft cap; those of e4m3 with V
transposed and as rows of tokens, and with scales of single tokens. Backward kernels run behind a
forward pass, with sums in any order and in a fixed one, and with a sink. Packed kernels, and in the
backward pass those of soft caps, run on sequences of several lengths, none among them. The
quantizer runs by its tile, dtype and kind of recipe. On the device there is nothing but copies and
our kernels: inputs are made, and outputs looked at, on the CPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hopper_attention
from hopper_attention import Fp8Recipe, _library

# odd, more than one tile in each direction, and grouped heads
BATCH, SEQLEN_Q, HEADS, HEADS_KV = 2, 197, 2, 1
# Full problems with few keys may run in the masked kernel, and masked ones whose rows see few keys
# in the short one, where there is one: "long" ones do not.
SEQLEN_K = {"full": 4101, "masked": 333, "short": 333, "long": 1301}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "masked": [{"causal": True}, {"window_size": (70, 20)}, {"softcap": 20.0}],
    "long": [{"causal": True}, {"window_size": (1100, 20)}, {"softcap": 20.0}],
}
OPTIONS["short"] = OPTIONS["masked"]
BACKWARD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "masked": [{"causal": True}, {"window_size": (70, 20)}],
    "capped": [{"softcap": 20.0}, {"softcap": 20.0, "causal": True}],
}
PACKED_BACKWARD_OPTIONS = {
    "packed": BACKWARD_OPTIONS["full"] + BACKWARD_OPTIONS["masked"],
    "capped": BACKWARD_OPTIONS["capped"],
}
# Of packed batches: query rows, keys, and how many of these are used. Every row sees a key.
PACKED_LENGTHS = ((70, 0, 197, 1), (333, 7, 197, 2), (300, 0, 197, 1))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP8_MASKED = {"causal": True}
# each beside options that a masked kernel serves
FP8_RECIPES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "full": [({}, {})],
    "masked": [
        *(({}, options) for options in OPTIONS["masked"]),
        ({"transpose_v": False}, {}),
        ({"transpose_v": False}, FP8_MASKED),
        ({"qk_scale": "token"}, FP8_MASKED),
        ({"v_scale": "token"}, FP8_MASKED),
    ],
}
QUANTIZER_RECIPES = (
    Fp8Recipe(),
    Fp8Recipe("tensor", "tensor", hadamard=False, transpose_v=False),
    Fp8Recipe("token", "token", smooth_k=True),
    Fp8Recipe("head", "head", smooth_k=True, transpose_v=False),
)


@dataclass(frozen=True)
class Instance:
    """What an instance's name says; dtype is None for e4m3."""

    backward: bool
    dtype: torch.dtype | None
    fast: bool
    head_dim: int
    head_dim_v: int
    mask: str


def parse(name: str) -> Instance:
    """Reads a name such as bf16_d192x128_full, e4m3fast_d64_masked or backward_fp16_d64_full."""
    match = re.fullmatch(
        r"(backward_)?(fp16|bf16|e4m3|e4m3fast)_d(\d+)(?:x(\d+))?_(full|masked|packed|capped|short)",
        name,
    )
    if match is None:
        raise ValueError(f"cannot read the instance's name {name!r}")
    backward, kind, head_dim, head_dim_v, mask = match.groups()
    dtype, fast = DTYPES.get(kind), kind == "e4m3fast"
    dims = int(head_dim), int(head_dim_v or head_dim)
    return Instance(backward is not None, dtype, fast, *dims, mask)


def draw(
    dtype: torch.dtype, seqlen_k: int, head_dim: int, head_dim_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V from N(0, 1) on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return (
        normal(BATCH, SEQLEN_Q, HEADS, head_dim),
        normal(BATCH, seqlen_k, HEADS_KV, head_dim),
        normal(BATCH, seqlen_k, HEADS_KV, head_dim_v),
    )


def check(name: str, result: Sequence[torch.Tensor], names: Sequence[str] = ("out", "lse")) -> None:
    """Raises AssertionError when an output is not finite."""
    for what, tensor in zip(names, result, strict=True):
        assert tensor.cpu().isfinite().all(), f"{name}: {what} is not finite"


def run(name: str) -> None:
    """Runs one instance; raises AssertionError when another runs or an output is not finite."""
    instance = parse(name)
    if instance.dtype is None:
        return run_fp8(name, instance)
    if instance.backward:
        if instance.mask != "packed":
            run_backward(name, instance, instance.dtype)
        if instance.mask in PACKED_BACKWARD_OPTIONS:
            run_packed_backward(name, instance, instance.dtype)
        return None
    if instance.mask == "packed":
        return run_packed(name, instance, instance.dtype)
    has_short = instance.head_dim == 64
    mask = "long" if instance.mask == "masked" and has_short else instance.mask
    on_cpu = draw(instance.dtype, SEQLEN_K[mask], instance.head_dim, instance.head_dim_v)
    q, k, v = (x.cuda() for x in on_cpu)
    for options in OPTIONS[mask]:
        plan = hopper_attention.explain(q, k, v, **options)
        assert plan.instance == name, f"{name}: {plan.instance} ran with {options}"
        result = hopper_attention.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        check(f"{name} {options}", result)
    return None


def packed_batch(
    instance: Instance, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Q, K and V of a packed batch on the device, cu_seqlens by name, and a list of used keys."""
    rows, keys, used = (torch.tensor(x, dtype=torch.int32) for x in PACKED_LENGTHS)
    q, k, v = draw(dtype, int(keys.sum()), instance.head_dim, instance.head_dim_v)
    lengths = {
        f"cu_seqlens_{side}": torch.nn.functional.pad(x.cumsum(0, dtype=torch.int32), (1, 0)).cuda()
        for side, x in (("q", rows), ("k", keys))
    }
    tensors = [x.cuda() for x in (q.flatten(0, 1)[: int(rows.sum())], k[0], v[0])]
    return tensors, lengths, used.cuda()


def run_packed(name: str, instance: Instance, dtype: torch.dtype) -> None:
    """Runs one instance of packed batches, with and without a list of used keys."""
    tensors, lengths, used = packed_batch(instance, dtype)
    for options in OPTIONS["full"] + OPTIONS["masked"]:
        for seqused_k in (None, used):
            call = {**lengths, "seqused_k": seqused_k, **options}
            plan = hopper_attention.explain(*tensors, **call)
            assert plan.instance == name, f"{name}: {plan.instance} ran with {options}"
            call |= {"max_seqlen_q": None, "max_seqlen_k": None, "return_attn_probs": True}
            check(f"{name} {options}", hopper_attention.flash_attn_varlen_func(*tensors, **call))


def run_packed_backward(name: str, instance: Instance, dtype: torch.dtype) -> None:
    """Runs one backward instance on packed batches, with and without a list of used keys."""
    tensors, lengths, used = packed_batch(instance, dtype)
    leaves = [x.requires_grad_() for x in tensors]
    size = (*tensors[0].shape[:2], instance.head_dim_v)
    dout = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    for options in PACKED_BACKWARD_OPTIONS[instance.mask]:
        for seqused_k, deterministic in ((None, False), (used, False), (None, True), (used, True)):
            call = {**lengths, "max_seqlen_q": None, "max_seqlen_k": None, "seqused_k": seqused_k}
            out = hopper_attention.flash_attn_varlen_func(
                *leaves, deterministic=deterministic, **call, **options
            )
            found = torch.autograd.grad(out, leaves, dout)
            what = f"{name} packed {options}{' deterministic' if deterministic else ''}"
            check(what, found, ("dq", "dk", "dv"))


def run_backward(name: str, instance: Instance, dtype: torch.dtype) -> None:
    """Runs one backward instance on what its forward pass left."""
    on_cpu = draw(dtype, SEQLEN_K["masked"], instance.head_dim, instance.head_dim_v)
    sink = torch.linspace(-1.0, 1.0, HEADS)
    leaves = [x.cuda().requires_grad_() for x in (*on_cpu, sink)]
    size = (*on_cpu[0].shape[:3], instance.head_dim_v)
    dout = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    for options in BACKWARD_OPTIONS[instance.mask]:
        for deterministic in (False, True):
            result = hopper_attention.flash_attn_func(
                *leaves[:3], deterministic=deterministic, learnable_sink=leaves[3], **options
            )
            found = torch.autograd.grad(result, leaves, dout)
            what = f"{name} {options}{' deterministic' if deterministic else ''}"
            check(what, found, ("dq", "dk", "dv", "dsink"))


def run_fp8(name: str, instance: Instance) -> None:
    """Runs one instance of e4m3 on what the CPU quantized."""
    qkv = draw(torch.bfloat16, SEQLEN_K["masked"], instance.head_dim, instance.head_dim_v)
    accumulation = "fast" if instance.fast else "fp32"
    for fields, options in FP8_RECIPES[instance.mask]:
        recipe = Fp8Recipe(**fields, accumulation=accumulation)
        quantized = hopper_attention.quantize(*qkv, recipe).to("cuda")
        what = f"{name} {fields} {options}"
        plan = hopper_attention.explain(quantized, **options)
        assert plan.instance == name, f"{what}: {plan.instance} ran"
        result = hopper_attention.flash_attn_fp8_func(quantized, return_attn_probs=True, **options)
        check(what, result)


def run_quantizer(dtype: torch.dtype, head_dim: int) -> None:
    """Runs the quantizer; raises AssertionError when its bits are not the reference's.

    K less its mean may differ by a rounding: the card's mean may, in its last bits.
    """
    qkv = draw(dtype, SEQLEN_K["masked"], head_dim, head_dim)
    for recipe in QUANTIZER_RECIPES:
        found = hopper_attention.quantize(*(x.cuda() for x in qkv), recipe).state_dict()
        expected = hopper_attention.quantize(*qkv, recipe).state_dict()
        for field in ("q", "k", "v"):
            one, other = (x[field].cpu().view(torch.uint8).int() for x in (found, expected))
            apart = (one - other).abs()
            if field == "k" and recipe.smooth_k:
                right = apart.max() <= 1 and apart.float().mean() < 2e-3
            else:
                right = not apart.any()
            assert right, f"quantize {dtype} d{head_dim} {recipe}: {field} differs"


def main() -> None:
    """Runs the instances and the quantizer's tiles whose names match."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression on the instances' names")
    pattern = re.compile(parser.parse_args().only)
    names = [name for name in _library.load().instances() if pattern.search(name)]
    tiles = {
        f"quantize_{name}_d{head_dim}": (dtype, head_dim)
        for name, dtype in DTYPES.items()
        for head_dim in (40, 64, 96, 128, 256)
    }
    tiles = {name: tile for name, tile in tiles.items() if pattern.search(name)}
    if not names and not tiles:
        raise SystemExit("no compiled instance matches")
    for name in names:
        run(name)
        print(name, flush=True)
    for name, (dtype, head_dim) in tiles.items():
        run_quantizer(dtype, head_dim)
        print(name, flush=True)


if __name__ == "__main__":
    main()
