"""Runs each compiled kernel once on a small odd shape, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py

Full kernels run once, masked ones with a causal mask, a window and a soft cap. On the device there
is nothing but copies and our kernels: inputs are made, and outputs looked at, on the CPU.
"""

from __future__ import annotations

import argparse
import re

import torch

import hopper_attention
from hopper_attention import _library

# odd, more than one tile in each direction, and grouped heads
BATCH, SEQLEN_Q, HEADS, HEADS_KV = 2, 197, 2, 1
# full problems with few keys may run in the masked kernel
SEQLEN_K = {"full": 4101, "masked": 333}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "full": [{}],
    "masked": [{"causal": True}, {"window_size": (70, 20)}, {"softcap": 20.0}],
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def parse(name: str) -> tuple[torch.dtype, int, int, str]:
    """Reads an instance's name, such as bf16_d192x128_full."""
    match = re.fullmatch(r"(fp16|bf16)_d(\d+)(?:x(\d+))?_(full|masked)", name)
    if match is None:
        raise ValueError(f"cannot read the instance's name {name!r}")
    dtype, head_dim, head_dim_v, mask = match.groups()
    return DTYPES[dtype], int(head_dim), int(head_dim_v or head_dim), mask


def run(name: str) -> None:
    """Runs one instance; raises AssertionError when an output is not finite."""
    dtype, head_dim, head_dim_v, mask = parse(name)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).cuda()

    q = normal(BATCH, SEQLEN_Q, HEADS, head_dim)
    k = normal(BATCH, SEQLEN_K[mask], HEADS_KV, head_dim)
    v = normal(BATCH, SEQLEN_K[mask], HEADS_KV, head_dim_v)
    for options in OPTIONS[mask]:
        plan = hopper_attention.explain(q, k, v, **options)
        assert plan.instance == name, f"{name}: {plan.instance} ran with {options}"
        out, lse = hopper_attention.flash_attn_func(
            q,
            k,
            v,
            return_attn_probs=True,
            **options,  # type: ignore[arg-type]
        )
        assert out.cpu().isfinite().all(), f"{name} {options}: out is not finite"
        assert lse.cpu().isfinite().all(), f"{name} {options}: lse is not finite"


def main() -> None:
    """Runs the instances whose names match."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression on the instances' names")
    pattern = re.compile(parser.parse_args().only)
    names = [name for name in _library.load().instances() if pattern.search(name)]
    if not names:
        raise SystemExit("no compiled instance matches")
    for name in names:
        run(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
