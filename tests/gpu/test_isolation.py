"""No value reaches an output that it has no part in, and nothing else is written."""

import math

import pytest
import torch
from checking import DEVICE, Problem, attention, check, compare, name, strided, surround

from hopper_attention import _library

PROBLEM = Problem(seqlen_q=333, seqlen_k=461, batch=3, heads=4, heads_kv=2)
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (100, 30)}], ids=name
)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@MASKS
@HEAD_DIM
@BAD
def test_a_bad_sequence_or_head_stays_alone(bad, head_dim, options):
    q, k, v = PROBLEM.but(head_dim=head_dim).inputs()
    clean, clean_lse = attention(q, k, v, **options)
    for which in range(3):
        tensors = [q.clone(), k.clone(), v.clone()]
        tensors[which][1, :, 1] = bad  # query head 1 reads KV head 0; KV head 1 serves 2 and 3
        out, lse = attention(*tensors, **options)
        heads = [1] if which == 0 else [2, 3]
        touched = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
        touched[1, heads] = True
        assert torch.equal(out.transpose(1, 2)[~touched], clean.transpose(1, 2)[~touched])
        assert torch.equal(lse[~touched], clean_lse[~touched])
        assert not out[1, :, heads].isfinite().all()  # and it is not hidden


@MASKS
@HEAD_DIM
@BAD
def test_memory_around_the_tensors_is_not_used(bad, head_dim, options):
    q, k, v = PROBLEM.but(head_dim=head_dim).inputs()
    clean, clean_lse = attention(q, k, v, **options)
    out, lse = attention(*(strided(x, (1, 5, 1, 8), fill=bad) for x in (q, k, v)), **options)
    assert torch.equal(out, clean)
    assert torch.equal(lse, clean_lse)


@MASKS
def test_memory_right_behind_the_last_key_is_not_used(options):
    # As in a packed batch: the next sequence's rows follow at once, in the same tile
    for head_dim in (64, 128, 256):
        q, k, v = PROBLEM.but(batch=1, head_dim=head_dim).inputs()
        clean, clean_lse = attention(q, k, v, **options)
        around = [torch.cat([x, torch.full_like(x, math.nan)], dim=1) for x in (q, k, v)]
        front = [x[:, : x.shape[1] // 2] for x in around]
        out, lse = attention(*front, **options)
        assert torch.equal(out, clean)
        assert torch.equal(lse, clean_lse)


def test_a_bad_query_row_stays_alone():
    q, k, v = PROBLEM.inputs()
    clean, _ = attention(q, k, v, causal=True)
    q[:, 100] = math.nan
    out, _ = attention(q, k, v, causal=True)
    rows = [row for row in range(PROBLEM.seqlen_q) if row != 100]
    assert torch.equal(out[:, rows], clean[:, rows])
    assert out[:, 100].isnan().all()


CANARY = -12345.0  # exact in fp16, and no output of ours


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("lengths", [(333, 461), (1, 5), (300, 40), (129, 0)], ids=name)
def test_outputs_are_written_whole_and_nothing_else(lengths, head_dim, with_lse, causal):
    """Through the C interface, whose caller brings the outputs: ours lie among canaries."""
    problem = PROBLEM.but(
        seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=head_dim, dtype=torch.float16
    )
    q, k, v = problem.inputs()
    around, out = surround(torch.full_like(q, math.nan), (1, 2, 1, 8), fill=CANARY)
    lse_around = torch.full((3 * 4 * lengths[0] + 64,), CANARY, device=DEVICE)
    lse = lse_around[32:-32].view(3, 4, lengths[0]).fill_(math.nan)
    library = _library.load()
    workspace = torch.zeros(library.workspace_bytes(), dtype=torch.uint8, device=DEVICE)
    library.forward(
        q.data_ptr(),
        k.data_ptr() or q.data_ptr(),
        v.data_ptr() or q.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if with_lse else 0,
        workspace.data_ptr(),
        torch.cuda.current_stream().cuda_stream,
        0,  # no sink
        0,  # float16
        *(3, *lengths, 4, 2, head_dim, head_dim),
        *(x.stride()[:3] if x.numel() else (0, 0, 0) for x in (q, k, v, out)),
        head_dim**-0.5,
        0.0,
        causal,
        -1,
        0 if causal else -1,
        0,
    )
    assert not workspace.any()
    if not with_lse:
        assert lse.isnan().all()
        _, lse = attention(q, k, v, causal=causal)
    compare(out.contiguous(), lse.contiguous(), q, k, v, causal=causal)
    outside = torch.ones_like(around, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert (around[outside] == CANARY).all()
    assert (lse_around[:32] == CANARY).all()
    assert (lse_around[-32:] == CANARY).all()


def need_memory(gigabytes):
    # what this process keeps for itself counts as free
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free / 1e9:.0f}")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_queries_and_outputs_beyond_2_to_31_elements(causal):
    need_memory(20)
    problem = Problem(batch=3, seqlen_q=65_536, seqlen_k=300, heads=128, heads_kv=1)
    q, k, v = problem.inputs()
    assert q.numel() > 2**31
    out, lse = attention(q, k, v, causal=causal)
    rows = slice(65_536 - 400, None)  # causal: the first hundred of these see no key
    for batch, head in ((0, 0), (1, 77), (2, 127)):
        at, heads = slice(batch, batch + 1), slice(head, head + 1)
        compare(
            out[at, rows, heads].contiguous(),
            lse[at, heads, rows],
            q[at, rows, heads],
            k[at],
            v[at],
            causal=causal,
        )
    if causal:
        assert not out[:, : 65_536 - 300].any()
    del q, out, lse
    torch.cuda.empty_cache()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_keys_and_values_beyond_2_to_31_elements(causal):
    need_memory(26)
    problem = Problem(batch=3, seqlen_q=16, seqlen_k=65_536, heads=128)
    q, k, v = problem.inputs()
    assert k.numel() > 2**31
    out, lse = attention(q, k, v, causal=causal)
    for batch, head in ((0, 0), (1, 77), (2, 127)):
        at, heads = slice(batch, batch + 1), slice(head, head + 1)
        part = [x[at, :, heads] for x in (q, k, v)]
        compare(out[at, :, heads].contiguous(), lse[at, heads], *part, causal=causal)
    del k, v
    torch.cuda.empty_cache()


def test_a_million_keys():
    problem = Problem(batch=1, seqlen_q=70, seqlen_k=1_000_003, heads=2, heads_kv=1, head_dim=64)
    check(*problem.inputs(), causal=True)
