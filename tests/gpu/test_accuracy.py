"""Root mean square errors: as the emulation predicts, and no larger than standard attention's."""

import pytest
import torch
from checking import DEVICE, DTYPES, TILES, attention, name, rmse, same_precision

from hopper_attention import emulation, reference
from hopper_attention.study.distributions import random_inputs

EMULATION_TOLERANCE = 0.10


def draw(distribution, head_dim, head_dim_v, dtype, seqlen=1024):
    drawn = random_inputs(
        distribution, batch=1, seqlen=seqlen, heads=4, head_dim=head_dim, seed=1
    ).to(dtype)
    return drawn.query, drawn.key, drawn.value[..., :head_dim_v]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("distribution", ["normal", "outliers"])
def test_the_emulation_predicts_the_error(distribution, dtype, tile, causal):
    q, k, v = draw(distribution, *tile, dtype)
    on_card = [x.to(DEVICE) for x in (q, k, v)]
    exact, exact_lse = reference.attention(*on_card, causal=causal)
    emulated, _ = emulation.attention(q, k, v, causal=causal)
    out, lse = attention(*on_card, causal=causal)
    predicted, found = rmse(emulated, exact.cpu()), rmse(out, exact)
    assert abs(found / predicted - 1) <= EMULATION_TOLERANCE, (found, predicted)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("distribution", ["normal", "outliers"])
def test_the_error_is_below_that_of_standard_attention(distribution, dtype, tile, causal):
    q, k, v = (x.to(DEVICE) for x in draw(distribution, *tile, dtype, seqlen=2048))
    exact, _ = reference.attention(q, k, v, causal=causal)
    out, _ = attention(q, k, v, causal=causal)
    assert rmse(out, exact) < rmse(same_precision(q, k, v, causal=causal), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_error_does_not_grow_with_the_keys(dtype):
    """Uniform attention over values of mean 1, whose answer is known: no sum loses its low bits."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for seqlen_k in (4096, 131_072):
        q = torch.zeros(1, 128, 1, 128, device=DEVICE, dtype=dtype)
        k = torch.randn(1, seqlen_k, 1, 128, device=DEVICE, generator=generator).to(dtype)
        noise = torch.randn(1, seqlen_k, 1, 128, device=DEVICE, generator=generator)
        v = (1 + 0.1 * noise).to(dtype)
        out, _ = attention(q, k, v)
        mean = v.double().mean(dim=1, keepdim=True)
        # half a unit in the last place of a number near 1, and as much again
        assert (out.double() - mean).abs().max() <= torch.finfo(dtype).eps
