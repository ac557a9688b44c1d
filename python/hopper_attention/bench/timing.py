"""Timing calls on a CUDA device, contestants in turn."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

WARM_UPS = 3
ROUNDS = 5

_COPY_BYTES = 1 << 31
_MATMUL_SIZE = 8_192
# How long the stream is held up while calls are queued: 2 million cycles are about 1 ms
_SLEEP_CYCLES = 2_000_000

Run = Callable[[], object]


class Clock(Protocol):
    """Measures calls."""

    def batch(self, run: Run, count: int) -> list[float]:
        """Times count consecutive calls.

        Returns:
            Milliseconds of each call.
        """

    def synchronize(self) -> None:
        """Waits for all work that was started; raises when some of it failed."""


class CudaClock:
    """Times the device's side of calls by CUDA events on the current stream."""

    def batch(self, run: Run, count: int) -> list[float]:
        """Times count consecutive calls after an untimed one; see `Clock.batch`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        # While the device sleeps the calls queue up, so that short kernels follow each other
        # without waiting for Python.
        torch.cuda._sleep(_SLEEP_CYCLES)
        run()
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def synchronize(self) -> None:
        """Waits for the device; see `Clock.synchronize`."""
        torch.cuda.synchronize()


class HostClock:
    """Times the host's side of calls: back to back, without waiting for the device."""

    def __init__(self, calls: int = 200) -> None:
        """Sets how many calls make one measurement.

        Args:
            calls: Calls between two waits; below 1000, where CUDA's launch queue is full and calls
                begin to wait for the device.
        """
        self._calls = calls

    def batch(self, run: Run, count: int) -> list[float]:
        """Times count series of calls; the time of each is its mean over the series.

        One more comes first, untimed: it finds the last contestant's code and data in the caches.
        """
        times = []
        collecting = gc.isenabled()
        gc.disable()
        try:
            for _ in range(self._calls):
                run()
            for _ in range(count):
                self.synchronize()
                begin = time.perf_counter_ns()
                for _ in range(self._calls):
                    run()
                end = time.perf_counter_ns()
                times.append((end - begin) / self._calls * 1e-6)
            self.synchronize()
        finally:
            if collecting:
                gc.enable()
        return times

    def synchronize(self) -> None:
        """Waits for the device; see `Clock.synchronize`."""
        torch.cuda.synchronize()


def warm_up(run: Run, clock: Clock) -> None:
    """Makes the first calls, which may compile, plan or allocate, and waits for them."""
    for _ in range(WARM_UPS):
        run()
    clock.synchronize()


def round_robin(
    runs: Mapping[str, Run],
    reps: int,
    clock: Clock,
    contexts: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]] | None = None,
) -> dict[str, float]:
    """Times calls in turn, so that a card that grows hot slows all of them alike.

    Args:
        runs: The calls by name, warmed up.
        reps: Timed calls of each, at least; they are spread over `ROUNDS` rounds.
        clock: What measures.
        contexts: What surrounds a call's series, by name.

    Returns:
        The median time of each, in milliseconds.
    """
    each = -(-reps // ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(ROUNDS):
        # nobody is always the one who follows the same neighbour
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            surround = contexts[name] if contexts and name in contexts else contextlib.nullcontext
            with surround():
                times[name] += clock.batch(runs[name], each)
    return {name: statistics.median(values) for name, values in times.items()}


class Ceilings:
    """The card's own limits, measured now and again during a run, since a card gets hot."""

    def __init__(self, clock: Clock, device: str = "cuda") -> None:
        """Prepares the measurements; 5 GB of device memory are taken, but only while measuring.

        Args:
            clock: What measures.
            device: Where the matrices and buffers live.
        """
        self._clock = clock
        self._device = device
        self._matmul_ms: dict[str, list[float]] = {"bf16": [], "fp16": []}
        self._copy_ms: list[float] = []

    def measure(self, reps: int = 10) -> None:
        """Adds reps timed matrix products and copies to the measurements."""
        size = (_MATMUL_SIZE, _MATMUL_SIZE)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            pair = [torch.randn(size, device=self._device, dtype=dtype) for _ in range(2)]
            self._matmul_ms[name] += self._batch(partial(torch.matmul, *pair), reps)
        source = torch.empty(_COPY_BYTES, device=self._device, dtype=torch.uint8).random_()
        target = torch.empty_like(source)
        self._copy_ms += self._batch(lambda: target.copy_(source), reps)

    def _batch(self, run: Run, reps: int) -> list[float]:
        warm_up(run, self._clock)
        return self._clock.batch(run, reps)

    def result(self) -> dict[str, float]:
        """Computes the ceilings.

        Returns:
            ``matmul_bf16_tflops`` and ``matmul_fp16_tflops``, the median rates of an 8192 x 8192 x
            8192 matrix product of normal values; ``copy_gbps``, bytes read plus written a second,
            in 1e9, of a 2 GiB copy. Empty before the first measurement.
        """
        if not self._copy_ms:
            return {}
        copy_ms = statistics.median(self._copy_ms)
        return {
            **{
                f"matmul_{name}_tflops": round(
                    2.0 * _MATMUL_SIZE**3 / statistics.median(times) * 1e-9, 1
                )
                for name, times in self._matmul_ms.items()
            },
            "copy_gbps": round(2.0 * _COPY_BYTES / copy_ms * 1e-6, 1),
        }
