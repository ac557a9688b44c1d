"""Inputs for the quantizer's tests, and the comparison with the one in PyTorch."""

import torch
from checking import DEVICE

from hopper_attention.quantize import quantize

PARTS = ["q", "k", "v", "q_descale", "k_descale", "v_descale", "v_token_factor", "k_mean"]


def recipe_name(recipe):
    flags = ("hadamard", "smooth_k", "transpose_v")
    words = [recipe.qk_scale, recipe.v_scale, *(flag for flag in flags if getattr(recipe, flag))]
    return "-".join(words)


def random_qkv(
    seqlen_q=200, seqlen_k=333, head_dim=128, head_dim_v=None, dtype=torch.bfloat16, batch=2, seed=0
):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape):
        x = torch.randn(shape, device=DEVICE, generator=generator)
        # A scale of its own for every token, head and channel, so that no mix-up goes unseen
        for dim in range(1, len(shape)):
            sizes = [1] * len(shape)
            sizes[dim] = shape[dim]
            x *= torch.rand(sizes, device=DEVICE, generator=generator) + 0.5
        return x.to(dtype)

    return (
        draw(batch, seqlen_q, 4, head_dim),
        draw(batch, seqlen_k, 2, head_dim) + 2,
        draw(batch, seqlen_k, 2, head_dim_v or head_dim),
    )


def poison(like):
    """Leaves other bytes than the right ones where the outputs will be allocated."""
    sizes = [tensor.untyped_storage().nbytes() for tensor in like]
    del like
    held = [torch.full((max(1, size),), 0x55, dtype=torch.uint8, device=DEVICE) for size in sizes]
    del held


def on_the_card(q, k, v, recipe, **options):
    poison(quantize_parts(quantize(q, k, v, recipe, **options)))
    return quantize(q, k, v, recipe, **options)


def quantize_parts(quantized):
    return [part for part in (getattr(quantized, p) for p in PARTS) if part is not None]


def in_pytorch(q, k, v, recipe, **options):
    moved = {
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }
    return quantize(q.cpu(), k.cpu(), v.cpu(), recipe, **moved)


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def assert_same(found, expected):
    for part in PARTS:
        one, other = getattr(found, part), getattr(expected, part)
        if other is None:
            assert one is None, part
            continue
        assert one.shape == other.shape, part
        assert one.stride() == other.stride(), part
        assert one.dtype == other.dtype, part
        one, other = bits(one).cpu(), bits(other)
        wrong = (one != other).nonzero()
        assert not len(wrong), (
            f"{part}: {len(wrong)} of {one.numel()} differ, first at {wrong[0].tolist()}: "
            f"{one[tuple(wrong[0])]} where {other[tuple(wrong[0])]} is right"
        )


def check(q, k, v, recipe, **options):
    found = on_the_card(q, k, v, recipe, **options)
    assert_same(found, in_pytorch(q, k, v, recipe, **options))
    return found


def in_cpu_memory(quantized):
    return quantized.to("cpu")
