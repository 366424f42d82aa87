"""The table of exhibits: a row for each table and figure of the paper: what is run for it, and how it is shown.

A Study is runs of several methods on one task, made by `methods.compare`; exhibits share studies. Where the paper's
data are not at hand, a study runs on a stand-in, which every heading names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Show = Literal[
    "timeline", "time to the worst's best", "own best", "large scale", "speed-up", "pass times", "hyper-parameters",
    "test curves", "training curves",
]  # fmt: skip

LU = "async-lu:forward-threads=1:backward-threads=2"
BU = "async-bu:forward-threads=1:backward-threads=2"
LAPSGD = "lapsgd:ranks={ranks}"
LPPSGD = "lppsgd:ranks={ranks}"


@dataclass(frozen=True)
class Study:
    """What is run on one task.

    Args:
        network: as the paper names it.
        task: the paper's.
        data: the paper's name of its data.
        stand_in: task that is run where the paper's data are not at hand.
        shown_as: what the stand-in's data are called in headings.
        methods: rows of the comparison; `{ranks}` is the scale's.
        kind: which of a scale's options it is run with: images, text, throughput (of noise), times, trace,
            virtual (time: three of the paper's GPUs, by its Table 9).
    """

    network: str
    task: str
    data: str
    stand_in: str
    shown_as: str
    methods: tuple[str, ...]
    kind: Literal["images", "text", "throughput", "times", "trace", "virtual"]


@dataclass(frozen=True)
class Exhibit:
    """One table or figure of the paper.

    Args:
        name: as the command has it.
        title: what it is about.
        show: how it is shown.
        studies: names in STUDIES.
        bench: workloads of `asyncprop bench engine`, by network, for speed-ups.
    """

    name: str
    title: str
    show: Show
    studies: tuple[str, ...] = ()
    bench: tuple[tuple[str, str], ...] = ()


ALL = ("sgd", LU, BU, LAPSGD, LPPSGD)
VIRTUAL = ("sgd", LU, BU, "lapsgd", "lppsgd", "ddp")  # ranks are devices there
FASHION, NOISE = "Fashion-MNIST", "synthetic 224x224 noise"

STUDIES = {
    "cifar10": Study("ResNet-18", "cifar10", "CIFAR-10", "fashion-mnist", FASHION, ALL, "images"),
    "cifar100": Study("ResNet-18", "cifar100", "CIFAR-100", "fashion-mnist", FASHION, ALL, "images"),
    "cifar10-resnet50": Study("ResNet-50", "cifar10-resnet50", "CIFAR-10", "synthetic-imagenet", NOISE, ALL,
                              "throughput"),
    "cifar100-resnet50": Study("ResNet-50", "cifar100-resnet50", "CIFAR-100", "synthetic-imagenet", NOISE, ALL,
                               "throughput"),
    "imagenet": Study("ResNet-50", "imagenet", "ImageNet", "synthetic-imagenet", NOISE, ALL, "throughput"),
    "cifar10-virtual": Study("ResNet-18", "cifar10", "CIFAR-10", "fashion-mnist", FASHION, VIRTUAL, "virtual"),
    "cifar100-virtual": Study("ResNet-18", "cifar100", "CIFAR-100", "fashion-mnist", FASHION, VIRTUAL, "virtual"),
    "imdb": Study("LSTM", "imdb", "IMDb", "rotten-tomatoes", "Rotten Tomatoes", ("sgd", LU, BU), "text"),
    "times-resnet18": Study("ResNet-18", "cifar100", "CIFAR-100", "fashion-mnist", FASHION, ("sgd",), "times"),
    "times-resnet50": Study("ResNet-50", "cifar100-resnet50", "CIFAR-100", "synthetic-imagenet", NOISE, ("sgd",),
                            "times"),
    "traced": Study("ResNet-18", "cifar100", "CIFAR-100", "fashion-mnist", FASHION, (f"{LU}:trace=true",), "trace"),
}  # fmt: skip

_TEN, _HUNDRED = ("cifar10", "cifar10-resnet50"), ("cifar100", "cifar100-resnet50")
_TEN_TIMED, _HUNDRED_TIMED = (*_TEN, "cifar10-virtual"), (*_HUNDRED, "cifar100-virtual")
_BENCH = (("ResNet-18", "resnet18-width16"), ("ResNet-50", "resnet50"))

_ROWS = (
    Exhibit(
        "table1", "Time to the best accuracy of the worst method, CIFAR-10", "time to the worst's best", _TEN_TIMED
    ),
    Exhibit("table2", "Best accuracy, and the time to it, CIFAR-10", "own best", _TEN_TIMED),
    Exhibit(
        "table3", "Time to the best accuracy of the worst method, CIFAR-100", "time to the worst's best", _HUNDRED_TIMED
    ),
    Exhibit("table4", "Best accuracy, and the time to it, CIFAR-100", "own best", _HUNDRED_TIMED),
    Exhibit("table5", "ImageNet", "large scale", ("imagenet",)),
    Exhibit("table6", "Sequence modelling, IMDb", "own best", ("imdb",)),
    Exhibit("table7", "Speed-up beside DDP, CIFAR-10", "speed-up", ("cifar10-virtual",), bench=_BENCH),
    Exhibit("table8", "Speed-up beside DDP, CIFAR-100", "speed-up", ("cifar100-virtual",), bench=_BENCH),
    Exhibit("table9", "Times of forward and backward passes", "pass times", ("times-resnet18", "times-resnet50")),
    Exhibit("table10", "Hyper-parameters", "hyper-parameters"),
    Exhibit("figure1", "Decoupled backpropagation: who does what when", "timeline", ("traced",)),
    Exhibit("figure2", "Learning curves of Async LU and Async BU, CIFAR-100", "test curves", _HUNDRED),
    Exhibit("figure3", "Testing curves of Async LU and Async BU, CIFAR-10", "test curves", _TEN),
    Exhibit("figure4", "Testing curves of Async LU and Async BU, IMDb", "test curves", ("imdb",)),
    Exhibit("figure5", "Training curves of Async LU and SGD, CIFAR-10", "training curves", _TEN),
    Exhibit("figure6", "Training curves of Async LU and SGD, CIFAR-100", "training curves", _HUNDRED),
    Exhibit("figure7", "Training curves of Async LU and SGD, ImageNet", "training curves", ("imagenet",)),
    Exhibit("figure8", "Testing curves of Async LU and SGD, ImageNet", "test curves", ("imagenet",)),
)
EXHIBITS: dict[str, Exhibit] = {exhibit.name: exhibit for exhibit in _ROWS}

ONE_RUN = ("times", "trace")
"""Kinds of study whose every batch is an observation: one run of them is enough."""

# Which rows a figure draws, where it does not draw all.
DRAWN = {
    **dict.fromkeys(("figure2", "figure3", "figure4"), ("async-lu", "async-bu")),
    **dict.fromkeys(("figure5", "figure6", "figure7", "figure8"), ("async-lu", "sgd")),
}


def choose(names: tuple[str, ...]) -> list[Exhibit]:
    """Return the exhibits called so, in the paper's order; `all` is all of them.

    Raises:
        ValueError: if one is unknown, or none is given.
    """
    known = ", ".join([*EXHIBITS, "all"])
    if not names:
        raise ValueError(f"exhibit must be given: some of {known}")
    for name in names:
        if name not in EXHIBITS and name != "all":
            raise ValueError(f"exhibit must be one of {known} (got {name!r})")
    return [exhibit for exhibit in EXHIBITS.values() if exhibit.name in names or "all" in names]


def name_of(chosen: Sequence[Exhibit]) -> str:
    """Return what some exhibits, in the paper's order, are called together, and no others are.

    `all` if they are; up to four by their names; of more, three and more in a row as `table1-to-table5`.
    """
    order = list(EXHIBITS)
    places = [order.index(exhibit.name) for exhibit in chosen]
    if len(places) == len(order):
        return "all"
    if len(places) <= 4:
        return "-".join(order[place] for place in places)
    rows: list[list[int]] = []
    for place in places:
        if rows and place == rows[-1][-1] + 1:
            rows[-1].append(place)
        else:
            rows.append([place])
    return "-".join(_row_name([order[place] for place in row]) for row in rows)


def _row_name(names: list[str]) -> str:
    return f"{names[0]}-to-{names[-1]}" if len(names) > 2 else "-".join(names)
