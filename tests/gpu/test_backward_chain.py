"""What runs right before and right behind a backward pass on its stream.

Its kernels start before the ones ahead of them have ended (chain.h). So here each pass stands,
without a pause, between kernels that write all it reads and kernels that read its gradients and
overwrite everything.
"""

import math

import pytest
import torch
import varlen_checking
from backward_checking import compare, draw, same_bits
from checking import DEVICE, TILES, Problem, attention, name
from varlen_checking import Packed

TURNS = 20
FIXED_ORDER = pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed"])
SMALL = Problem(batch=2, seqlen_q=500, seqlen_k=700, heads=6, heads_kv=2)


class Pass:
    """A backward pass among its neighbours on the current stream.

    Attributes:
        first: Its gradients when nothing was near.
    """

    def __init__(self, out, lse, leaves, dout, lengths=()):
        self.out, self.leaves, self.dout = out, leaves, dout
        self.read = [*leaves, out, lse, dout, *(x for x in lengths if x is not None)]
        self.sources = [x.detach().clone() for x in self.read]
        torch.cuda.synchronize()
        self.first = self.gradients()
        torch.cuda.synchronize()

    def gradients(self):
        return torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)

    def run(self):
        """The gradients as the kernel behind the pass reads them."""
        for x, source in zip(self.read, self.sources, strict=True):
            x.data.copy_(source)  # the graph does not see it
        found = self.gradients()
        copies = [x.clone() for x in found]
        for x in (*found, *self.read):
            x.data.fill_(math.nan if x.is_floating_point() else 0)
        return copies

    def check(self, found, deterministic):
        if deterministic:
            assert same_bits(found, self.first)
            return
        assert same_bits(found[1:], self.first[1:])
        error = (found[0].float() - self.first[0].float()).abs().max()
        assert error <= 2**-6 * self.first[0].float().abs().max()  # NaN is not


def make_pass(problem, seed=0, **options):
    inputs, dout = draw(problem, seed)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = attention(*leaves, **options)
    return Pass(out, lse, leaves, dout)


@FIXED_ORDER
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 20.0, "causal": True}], ids=name
)
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_between_kernels_that_write_its_tensors(tile, options, deterministic):
    problem = SMALL.but(head_dim=tile[0], head_dim_v=tile[1])
    one = make_pass(problem, deterministic=deterministic, **options)
    inputs, dout = draw(problem)
    compare(one.first, inputs, dout, **options)
    results = [one.run() for _ in range(TURNS)]
    for found in results:
        one.check(found, deterministic)


@FIXED_ORDER
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_a_packed_batch_whose_lengths_were_just_written(tile, deterministic):
    batch = Packed(head_dim=tile[0], head_dim_v=tile[1])
    inputs, dout = draw(batch)
    leaves = [x.requires_grad_() for x in inputs]
    lengths = batch.lengths()
    with torch.enable_grad():
        out, lse = varlen_checking.attention(
            *leaves, lengths, causal=True, deterministic=deterministic
        )
    one = Pass(out, lse, leaves, dout, lengths)
    results = [one.run() for _ in range(TURNS)]
    for found in results:
        one.check(found, deterministic)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_sinks_kernel_in_the_chain(head_dim):
    inputs, dout = draw(SMALL.but(head_dim=head_dim))
    sink = torch.randn(SMALL.heads, device=DEVICE)
    leaves = [x.requires_grad_() for x in (*inputs, sink)]
    with torch.enable_grad():
        out, lse = attention(*leaves[:3], learnable_sink=sink, causal=True, deterministic=True)
    one = Pass(out, lse, leaves, dout)
    results = [one.run() for _ in range(TURNS)]
    for found in results:
        one.check(found, deterministic=True)


@pytest.mark.parametrize("lengths", [(129, 0), (0, 129)], ids=name)
def test_a_chain_without_its_middle(lengths):
    problem = SMALL.but(seqlen_q=lengths[0], seqlen_k=lengths[1])
    one = make_pass(problem, deterministic=True)
    results = [one.run() for _ in range(TURNS)]
    for found in results:
        one.check(found, deterministic=True)


@FIXED_ORDER
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_in_a_graph(head_dim, deterministic):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the engine runs a pass on its forward pass's stream
        one = make_pass(SMALL.but(head_dim=head_dim), causal=True, deterministic=deterministic)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [one.run() for _ in range(3)]
    for _ in range(5):
        for found in results:
            for x in found:
                x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        for found in results:
            one.check(found, deterministic)


@FIXED_ORDER
def test_on_two_streams(deterministic):
    # Blocks of one stream's kernels wait where those of the other's compute
    problems = [SMALL.but(head_dim=64), SMALL.but(head_dim=256, seqlen_q=900)]
    streams = [torch.cuda.Stream() for _ in problems]
    passes = []
    for seed, (problem, stream) in enumerate(zip(problems, streams, strict=True)):
        with torch.cuda.stream(stream):
            passes.append(make_pass(problem, seed, causal=True, deterministic=deterministic))
    torch.cuda.synchronize()
    results = []
    for _ in range(TURNS):
        for one, stream in zip(passes, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append((one, one.run()))
    torch.cuda.synchronize()
    for one, found in results:
        one.check(found, deterministic)
