"""Scale: how large the runs of exhibits are, from minutes on a laptop to the paper's protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Options of runs, by the kind of study; what is left out is the recipe's.

    Args:
        seeds: runs of each method.
        ranks: processes of methods that need several; the paper has one on each of 3 GPUs.
        images, text: of runs whose accuracy is of interest.
        virtual: of those in virtual time, which need this machine's time for every device's work.
        throughput: of runs on noise, whose speed is.
        times: of the runs that time passes, or trace them.
        bench_processes, bench_seconds: of `asyncprop bench engine`: starts of its processes, length of a measurement.
        real: whether these options hold on the paper's own data, too; if not, those take the recipe's.
    """

    seeds: int
    ranks: int
    images: Options
    text: Options
    virtual: Options
    throughput: Options
    times: Options
    bench_processes: int = 5
    bench_seconds: float = 1.0
    real: bool = field(default=True)

    def options(self, kind: str, *, is_real: bool) -> Options:
        """Return the options of runs of a kind; `is_real` for the paper's own data."""
        if is_real and not self.real and kind in ("images", "text", "throughput"):
            return {}
        if is_real and kind == "throughput":  # a ResNet-50 on real images is trained for its accuracy
            return self.images
        if kind == "virtual":
            return {**self.virtual, "costs": "a100-resnet18", "devices": 3}
        return dict(getattr(self, "times" if kind == "trace" else kind))


SCALES = {
    "tiny": Scale(
        1, 2, {"epochs": 1, "width": 2, "train_samples": 128, "test_samples": 100},
        {"epochs": 1, "width": 8, "train_samples": 128, "test_samples": 100},
        {"epochs": 1, "width": 2, "train_samples": 128, "test_samples": 100, "batch_size": 16},
        {"epochs": 1, "width": 2, "train_samples": 16, "test_samples": 8, "batch_size": 4, "lr": 0.001},
        {"epochs": 1, "width": 2, "train_samples": 16, "test_samples": 8, "batch_size": 4}, 1, 0.1,
    ),
    "small": Scale(
        3, 2, {"epochs": 6, "width": 8, "train_samples": 6400, "test_samples": 2000},
        {"epochs": 4, "width": 128, "train_samples": 3200},
        {"epochs": 4, "width": 4, "train_samples": 3840, "test_samples": 1000},
        {"epochs": 1, "width": 16, "train_samples": 128, "test_samples": 16, "batch_size": 8, "lr": 0.001},
        {"epochs": 2, "width": 32, "train_samples": 128, "test_samples": 16, "batch_size": 16}, 3, 0.5,
    ),
    "medium": Scale(
        3, 2, {"epochs": 10, "width": 16, "train_samples": 12800},
        {"epochs": 6},
        {"epochs": 10, "width": 8, "train_samples": 6400},
        {"epochs": 4, "width": 32, "train_samples": 128, "test_samples": 32, "batch_size": 16, "lr": 0.001},
        {"epochs": 1, "width": 64, "train_samples": 128, "test_samples": 32, "batch_size": 64}, 9, 2.0,
    ),
    "full": Scale(
        3, 3, {}, {}, {}, {"epochs": 3, "batch_size": 32, "lr": 0.001},
        {"epochs": 3, "width": 64, "batch_size": 128}, 9, 2.0, real=False,
    ),
}  # fmt: skip
"""`tiny` shows that everything works, and nothing else. On noise throughput alone counts; no method is to diverge."""


def get_scale(name: str) -> Scale:
    """Return the scale called `name`; a ValueError lists the known ones."""
    if name not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)} (got {name!r})")
    return SCALES[name]
