"""Rows: one formula in one case, beside what was counted or simulated, and what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None stands for what there is not.

    Attributes:
        section, quantity, case: what it is, in which setting.
        equation: where the paper has it.
        as_printed, corrected: the formula's two versions. A bound has only one, which counts as printed.
        twin: what was counted or simulated, or an exact solution; `twin_is` says which.
        measured: one value for each seed, in real training.
    """

    section: str
    quantity: str
    case: str
    equation: str
    as_printed: float | None = None
    corrected: float | None = None
    twin: float | None = None
    twin_is: str = ""
    measured: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it with mean, sample standard deviation, n, and the errors of both versions.

        An error is version / measured - 1, or version / twin - 1 where nothing was measured.
        """
        mean = statistics.fmean(self.measured) if self.measured else None
        truth = mean if mean is not None else self.twin
        return {
            **asdict(self),
            "measured_mean": mean,
            "measured_std": statistics.stdev(self.measured) if len(self.measured) > 1 else None,
            "n": len(self.measured),
            "error_as_printed": _error(self.as_printed, truth),
            "error_corrected": _error(self.corrected, truth),
            "error_twin": _error(self.twin, mean),
        }


def mean_of(values: Sequence[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)


def _error(value: float | None, truth: float | None) -> float | None:
    return None if value is None or not truth else value / truth - 1
