"""Suite fp8-accuracy: errors of whole e4m3 outputs by recipe, emulated too, and by context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import hopper_attention
from hopper_attention import emulation_fp8, reference
from hopper_attention.bench.contestants import OURS, Contestant
from hopper_attention.bench.fp8 import FAST
from hopper_attention.bench.records import make_record
from hopper_attention.bench.rmse import draw
from hopper_attention.bench.runner import Outcome, Progress, check_alive, explain_failure
from hopper_attention.bench.shapes import UNIFORM_QUERIES, Shape
from hopper_attention.bench.timing import Clock, CudaClock
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.study.context import NOISE
from hopper_attention.study.distributions import DISTRIBUTIONS
from hopper_attention.study.recipes import RECIPES

EMULATION = "emulation"
UNIFORM = "uniform"
EMULATED_KEYS = 1024  # problems up to here are emulated on the CPU, too

_WITHOUT_RECIPE = ("fa3_fp8",)  # peers that take part: cuDNN's output in e4m3 would hide the rest

Output = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_fp8_accuracy(
    shapes: Sequence[Shape],
    contestants: Sequence[Contestant],
    outcome: Outcome,
    run: str,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Measures errors against attention in float64 of the 16-bit tensors.

    Shapes with as many queries as keys are drawn from both distributions of the error study and
    computed by every recipe; where they are short, also by the emulation. The others are uniform
    attention over V = 1 + noise, whose answer is V's mean, by both accumulations: there errors are
    relative, and ``bias`` is their mean.

    Args:
        shapes: The problems.
        contestants: Those of suite fp8; of the peers fa3_fp8 takes part.
        outcome: Where records and exclusions go.
        run: When this run began, for the records.
        clock: Waits for the device.
        device: Where the tensors live.
        progress: Is called with a label before each shape.
        after_shape: Is called after each shape.
    """
    suite = _Suite(contestants, outcome, run, clock or CudaClock(), device)
    for shape in shapes:
        progress(shape.label)
        if shape.seqlen_q == UNIFORM_QUERIES:
            suite.uniform(shape)
        else:
            for distribution in DISTRIBUTIONS:
                suite.by_recipe(shape, distribution)
        after_shape()


class _Suite:
    def __init__(
        self,
        contestants: Sequence[Contestant],
        outcome: Outcome,
        run: str,
        clock: Clock,
        device: str,
    ) -> None:
        self._peers = [one for one in contestants if one.name in _WITHOUT_RECIPE]
        self._outcome = outcome
        self._run = run
        self._clock = clock
        self._device = device

    def by_recipe(self, shape: Shape, distribution: str) -> None:
        """Errors of every recipe on one distribution."""
        qkv = draw(shape, distribution, self._device)
        outputs: dict[tuple[str, str | None], Tensor] = {}
        for name, named in RECIPES.items():
            out = self._compute(OURS, shape, qkv, _ours(named.recipe))
            if out is not None:
                outputs[OURS, name] = out
            if shape.seqlen_k <= EMULATED_KEYS:
                q, k, v = (x.cpu() for x in qkv)
                emulated, _ = emulation_fp8.attention_from_16_bits(q, k, v, named.recipe)
                outputs[EMULATION, name] = emulated.to(self._device)
        for peer in self._peers:
            out = self._compute(peer.name, shape, qkv, _peer(peer, shape))
            if out is not None:
                outputs[peer.name, None] = out
        for (impl, recipe), rmse in _errors(qkv, outputs).items():
            self._record(impl, shape, rmse, distribution=distribution, recipe=recipe)

    def uniform(self, shape: Shape) -> None:
        """Errors of uniform attention in both accumulations."""
        generator = torch.Generator(device=self._device).manual_seed(0)
        dtype = getattr(torch, shape.input_dtype)

        def normal(length: int, dim: int) -> Tensor:
            return torch.randn(1, length, 1, dim, generator=generator, device=self._device)

        q = torch.zeros(1, shape.seqlen_q, 1, shape.head_dim, device=self._device, dtype=dtype)
        k = normal(shape.seqlen_k, shape.head_dim).to(dtype)
        v = normal(shape.seqlen_k, shape.head_dim_v).mul_(NOISE).add_(1.0).to(dtype)
        exact = v.double().mean(1, keepdim=True)
        runs: dict[str, Output] = {
            OURS: _ours(Fp8Recipe()),
            FAST: _ours(Fp8Recipe(accumulation="fast")),
            **{peer.name: _peer(peer, shape) for peer in self._peers},
        }
        for impl, attend in runs.items():
            out = self._compute(impl, shape, (q, k, v), attend)
            if out is None:
                continue
            error = out.double() / exact - 1
            rmse, bias = error.square().mean().sqrt().item(), error.mean().item()
            self._record(impl, shape, rmse, distribution=UNIFORM, bias=bias)

    def _compute(
        self, impl: str, shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], attend: Output
    ) -> Tensor | None:
        try:
            out = attend(*qkv)
            self._clock.synchronize()
        except Exception as error:  # the others go on
            reason = explain_failure(error)
            check_alive(self._clock, f"{impl} on {shape.label}: {reason}")
            self._outcome.excluded.append((impl, shape.label, reason))
            return None
        return out

    def _record(self, impl: str, shape: Shape, rmse: float, **fields: Any) -> None:
        if not math.isfinite(rmse):
            reason = "the output holds NaN or infinity"
            self._outcome.excluded.append((impl, shape.label, reason))
            return
        named = {name: value for name, value in fields.items() if value is not None}
        record = make_record("fp8-accuracy", impl, shape, self._run, ms=None, rmse=rmse, **named)
        self._outcome.records.append(record)


def _ours(recipe: Fp8Recipe) -> Output:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = hopper_attention.flash_attn_fp8_func(q, k, v, recipe=recipe)
        assert isinstance(out, Tensor)
        return out

    return attend


def _peer(peer: Contestant, shape: Shape) -> Output:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bound = peer.bind(shape, q, k, v)
        with peer.context():
            return bound.to_bshd(bound.run())

    return attend


def _errors(
    qkv: tuple[Tensor, Tensor, Tensor], outputs: Mapping[tuple[str, str | None], Tensor]
) -> dict[tuple[str, str | None], float]:
    """Root mean square errors over all rows."""
    squares = dict.fromkeys(outputs, 0.0)
    batch, _, heads, _ = qkv[0].shape
    for b in range(batch):  # one head of one sequence at a time fits any memory
        for h in range(heads):
            at = slice(b, b + 1), slice(None), slice(h, h + 1)
            q, k, v = (x[at] for x in qkv)
            exact, _ = reference.attention(q, k, v)
            for key, out in outputs.items():
                squares[key] += (out[at].double() - exact).square().sum().item()
    counts = {key: out.numel() for key, out in outputs.items()}
    return {key: math.sqrt(total / counts[key]) for key, total in squares.items()}
