"""One run of the benchmark: contestants, ceilings, suites, and the result file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hopper_attention.bench import machine, records, sources
from hopper_attention.bench.accuracy import FP8_NOTE, SAMPLE_NOTE
from hopper_attention.bench.backward import BackwardContestant
from hopper_attention.bench.backward_suites import run_backward, run_backward_rmse
from hopper_attention.bench.contestants import Contestant
from hopper_attention.bench.fp8_accuracy import run_fp8_accuracy
from hopper_attention.bench.gradients import GRADIENTS_NOTE
from hopper_attention.bench.host import has_parts, run_host_parts
from hopper_attention.bench.quantizer import run_quantize
from hopper_attention.bench.rmse import run_rmse
from hopper_attention.bench.runner import Outcome, Progress, run_timed
from hopper_attention.bench.shapes import BACKWARD_SUITES, Shape
from hopper_attention.bench.timing import Ceilings, Clock, CudaClock
from hopper_attention.bench.varlen import PackedContestant
from hopper_attention.bench.varlen_suite import VARLEN_NOTE, run_varlen

NOTES = [
    "ms: median device time of a call; suite host: of the host's time a call (host_us)",
    "tflops: 2 b h (head_dim + head_dim_v) s_q s_k / time, half of it with a causal mask, the "
    "visible pairs alone with a window",
    "gbps: suite quantize: each 16-bit input read once and each e4m3 output written once, over the "
    "time; copy: a device copy that reads and writes as many bytes",
    SAMPLE_NOTE,
    GRADIENTS_NOTE,
    VARLEN_NOTE,
    FP8_NOTE,
    "run: when the run began; only records of one run are compared, for cards slow down as they "
    "warm up",
]


@dataclass
class Session:
    """A run over several suites.

    Attributes:
        contestants: Who takes part in the suites of 16 bits.
        plan: The suites with their shapes.
        reps: Timed calls of each contestant on each shape, at least.
        json_file: Where results go, or None.
        device: Where the tensors live.
        clock: What measures instead of each suite's own clock; for tests.
        backward: Who takes part in those of the backward pass.
        fp8: Who takes part in those of e4m3.
        varlen: Who takes part in that of packed batches.
        header: The machine and the sources, as result files have them.
        outcome: What was measured so far.
        ceilings: The card's own limits; None leaves them unmeasured.
        kept: A sentence on what became of the result file's old records.
    """

    contestants: Sequence[Contestant]
    plan: Sequence[tuple[str, Sequence[Shape]]]
    reps: int = 30
    json_file: Path | None = None
    device: str = "cuda"
    clock: Clock | None = None
    backward: Sequence[BackwardContestant] = ()
    fp8: Sequence[Contestant] = ()
    varlen: Sequence[PackedContestant] = ()
    header: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    ceilings: Ceilings | None = None
    kept: str = ""
    _old: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Describes the machine and reads the result file; raises ValueError when it is none."""
        self.header = {**machine.describe(), "sources": sources.current_sources()}
        if self.json_file is not None and self.json_file.exists():
            self._old = records.load(self.json_file)

    def steps(self) -> int:
        """Counts the calls that `run` makes of its argument progress."""
        twice = ("rmse", "backward-rmse")  # once for each distribution
        steps = 2 + sum(len(shapes) * (2 if suite in twice else 1) for suite, shapes in self.plan)
        return steps + sum(sum(map(has_parts, s)) for suite, s in self.plan if suite == "host")

    def run(self, progress: Progress) -> None:
        """Measures everything; results are saved shape by shape.

        Args:
            progress: Is called with a few words before each step.

        Raises:
            DeviceLostError: A contestant broke the CUDA context; what was measured before is kept.
        """
        self._measure_ceilings(progress)
        for suite, shapes in self.plan:
            self._run_suite(suite, shapes, _prefixed(suite, progress))
        self._measure_ceilings(progress)
        self.save()

    def document(self) -> dict[str, Any]:
        """Makes the result file's content, old records that still hold included."""
        ceilings = self.ceilings.result() if self.ceilings else {}
        header = {**self.header, "ceilings": {self.header["date"]: ceilings}, "notes": NOTES}
        document, self.kept = records.merge(self._old, header, self.outcome.records)
        return document

    def save(self) -> None:
        """Writes the result file, if there is to be one and something was measured."""
        if self.json_file is not None and self.outcome.records:
            records.save(self.json_file, self.document())

    def _run_suite(self, suite: str, shapes: Sequence[Shape], progress: Progress) -> None:
        common: dict[str, Any] = {
            "run": self.header["date"],
            "clock": self.clock,
            "device": self.device,
            "progress": progress,
            "after_shape": self.save,
        }
        if suite == "rmse":
            run_rmse(shapes, self.contestants, self.outcome, **common)
        elif suite == "backward-rmse":
            run_backward_rmse(shapes, self.backward, self.outcome, **common)
        elif suite in BACKWARD_SUITES:
            run_backward(suite, shapes, self.backward, self.outcome, reps=self.reps, **common)
        elif suite == "varlen":
            run_varlen(shapes, self.varlen, self.outcome, reps=self.reps, **common)
        elif suite == "quantize":
            run_quantize(shapes, self.outcome, reps=self.reps, **common)
        elif suite == "fp8-accuracy":
            run_fp8_accuracy(shapes, self.fp8, self.outcome, **common)
        else:
            contestants = self.fp8 if suite == "fp8" else self.contestants
            run_timed(suite, shapes, contestants, self.outcome, reps=self.reps, **common)
        if suite == "host":
            run_host_parts(shapes, self.contestants, self.outcome, reps=self.reps, **common)

    def _measure_ceilings(self, progress: Progress) -> None:
        progress("the card's ceilings")
        if self.ceilings is not None:
            self.ceilings.measure()


def _prefixed(suite: str, progress: Progress) -> Progress:
    return lambda label: progress(f"{suite}: {label}")


def start(
    contestants: Sequence[Contestant],
    plan: Sequence[tuple[str, Sequence[Shape]]],
    reps: int,
    json_file: Path | None,
) -> Session:
    """Makes a session on the current CUDA device, ceilings included."""
    session = Session(contestants, plan, reps, json_file)
    session.ceilings = Ceilings(CudaClock())
    return session


def stale_sources() -> str | None:
    """Says which sources are newer than the compiled library, or None when none is.

    Results are filed under the hash of the sources at hand, so the library must come from them.
    """
    root, library = sources.source_root(), machine.library_file()
    if root is None or library is None:
        return None
    newer = sources.newer_than(library, root)
    if not newer:
        return None
    names = ", ".join(map(str, newer[:3])) + (", ..." if len(newer) > 3 else "")
    return f"{len(newer)} sources were written after the library was built ({names}): rebuild it"
