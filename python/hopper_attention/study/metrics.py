"""How far an attention output is from the reference, head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """The error of an output O against a reference R, over all of their elements.

    Attributes:
        rmse: sqrt(mean((O - R)^2)).
        relative_rmse: rmse / sqrt(mean(R^2)).
        max_error: max(|O - R|).
        cosine: the cosine of the angle between O and R as vectors.
        elements: how many elements were compared.
        nonfinite: how many elements of O are NaN or infinite; the others are then NaN or
            infinite too, and are never hidden.
    """

    rmse: float
    relative_rmse: float
    max_error: float
    cosine: float
    elements: int
    nonfinite: int


@dataclass(frozen=True)
class ErrorSums:
    """The sums that `Metrics` are made of, one of each per head, in float64 on the CPU.

    Sums add up over batches, sequences and layers, which root mean squares do not.
    """

    squared_error: Tensor  # (heads,)
    squared_reference: Tensor  # (heads,)
    squared_output: Tensor  # (heads,)
    product: Tensor  # (heads,)
    max_error: Tensor  # (heads,)
    elements: Tensor  # (heads,) int64
    nonfinite: Tensor  # (heads,) int64

    @staticmethod
    def measure(out: Tensor, reference: Tensor) -> ErrorSums:
        """Compares an output with its reference.

        Args:
            out: (batch, seqlen_q, heads, head_dim_v), any floating dtype.
            reference: the same shape, float64.

        Raises:
            ValueError: where the shapes differ.
        """
        if out.shape != reference.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, not {tuple(reference.shape)}")
        exact = reference.double().transpose(0, 2).flatten(1)  # (heads, everything else)
        found = out.double().transpose(0, 2).flatten(1)
        error = found - exact
        heads, per_head = exact.shape
        largest = error.abs().amax(1) if per_head else torch.zeros(heads, dtype=torch.float64)
        return ErrorSums(
            squared_error=error.square().sum(1).cpu(),
            squared_reference=exact.square().sum(1).cpu(),
            squared_output=found.square().sum(1).cpu(),
            product=(found * exact).sum(1).cpu(),
            max_error=largest.cpu(),
            elements=torch.full((heads,), per_head, dtype=torch.int64),
            nonfinite=(~found.isfinite()).sum(1).cpu(),
        )

    @staticmethod
    def zeros(heads: int) -> ErrorSums:
        """Sums over nothing."""
        real = torch.zeros(heads, dtype=torch.float64)
        count = torch.zeros(heads, dtype=torch.int64)
        return ErrorSums(real, real, real, real, real, count, count)

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
            self.squared_output + other.squared_output,
            self.product + other.product,
            torch.maximum(self.max_error, other.max_error),
            self.elements + other.elements,
            self.nonfinite + other.nonfinite,
        )

    def at_heads(self, heads: slice, total: int) -> ErrorSums:
        """These sums in the places `heads` among `total` heads, zeros elsewhere."""

        def place(part: Tensor) -> Tensor:
            whole = torch.zeros(total, dtype=part.dtype)
            whole[heads] = part
            return whole

        return ErrorSums(*(place(part) for part in self._parts()))

    def over_heads(self) -> ErrorSums:
        """The sums of all heads together, as one head."""
        summed = ErrorSums(*(part.sum(0, keepdim=True) for part in self._parts()))
        return replace(summed, max_error=self.max_error.amax(0, keepdim=True))

    def metrics(self, head: int = 0) -> Metrics:
        """The metrics of one head; 0 / 0 counts as no error, and as cosine 1."""
        elements = int(self.elements[head])
        squared_error = float(self.squared_error[head])
        squared_reference = float(self.squared_reference[head])
        norms = math.sqrt(squared_reference) * math.sqrt(float(self.squared_output[head]))
        if squared_error == 0.0:
            relative, cosine = 0.0, 1.0
        else:
            relative = _ratio(math.sqrt(squared_error), math.sqrt(squared_reference))
            cosine = _ratio(float(self.product[head]), norms)
        return Metrics(
            rmse=math.sqrt(squared_error / elements) if elements else 0.0,
            relative_rmse=relative,
            max_error=float(self.max_error[head]),
            cosine=cosine,
            elements=elements,
            nonfinite=int(self.nonfinite[head]),
        )

    def _parts(self) -> tuple[Tensor, ...]:
        return (
            self.squared_error,
            self.squared_reference,
            self.squared_output,
            self.product,
            self.max_error,
            self.elements,
            self.nonfinite,
        )


def _ratio(a: float, b: float) -> float:
    """The quotient a / b: infinite where only b is 0, NaN where both are."""
    if b == 0.0:
        return math.nan if math.isnan(a) or a == 0.0 else math.copysign(math.inf, a)
    return a / b
