"""Configuration: every option of the command, validated, without importing PyTorch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    """What `train` and `compare` have in common. None means: as the task's recipe, or the method, has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Count | None = Field(None, description="Passes over the training data. Default: the recipe's.")
    stop_at_target: bool = Field(
        False, description="End a run at its first epoch that reaches the target: its time is all that is asked for."
    )
    batch_size: Count | None = Field(None, description="Samples per batch. Default: the recipe's.")
    lr: Rate | None = Field(None, description="Peak learning rate; scales the warm-up. Default: the recipe's.")
    momentum: Share | None = Field(
        None, description="Momentum (beta1 of Adam). Asynchrony adds momentum of its own: lower it if accuracy suffers."
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="Weight decay. Default: the recipe's.")
    width: Count | None = Field(None, description="Width of the model. Default: the task's.")
    train_samples: Count | None = Field(None, description="Train on so many samples, always the same. Default: all.")
    test_samples: Count | None = Field(None, description="Test on so many samples, always the same. Default: all.")
    forward_threads: Count | Literal["auto"] | None = Field(
        None, description="Threads that run forward passes; auto lets a plan on the first batches choose these, "
        "backward threads and lanes. Default: the method's."
    )  # fmt: skip
    backward_threads: Count | None = Field(None, description="Threads that run backward passes. Default: the method's.")
    lanes: Count | None = Field(
        None, description="Passes in flight at most: more hide uneven passes, fewer keep staleness and memory low."
    )
    workers: Count | None = Field(None, description="Coupled workers per rank. Default: the method's.")
    ranks: Count | None = Field(None, description="Processes on this machine that train together. Default: 1.")
    exchange: Literal["averaging", "gossip"] | None = Field(
        None, description="How ranks of an asynchronous method meet. Default: the method's, or averaging."
    )
    period: Count | None = Field(
        None, description="Batches of a rank between two averages (default 8); updates of a layer between two sends "
        "of it (default 2)."
    )  # fmt: skip
    topology: Literal["uniform", "ring", "exponential"] | None = Field(
        None,
        description="To whom gossip goes: anybody, the next rank, or those at distances 1, 2, 4 ... Default: uniform.",
    )
    probability: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="With which a layer that is to be sent is sent. Default: 1."
    )
    bucket_bytes: Count | None = Field(
        None, description="Layers are gossiped together in messages of at most so many bytes. Default: 4 MiB."
    )
    wire: Literal["exact", "bf16"] | None = Field(
        None, description="bf16 halves what gossip sends, and rounds what it brings. Default: exact."
    )
    timeout_s: Rate | None = Field(
        None, description="Seconds of silence after which gossip goes on without a rank. Default: 10."
    )
    prepass_epochs: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Epochs before passes become partial (default 1), or steps local (default 0)."
    )
    compensation: Literal["none", "constant", "adaptive", "attenuation"] | None = Field(
        None,
        description="Correct gradients for what changed since they were begun (constant, adaptive: DC-ASGD), or make "
        "stale ones smaller (attenuation). Default: the method's.",
    )
    comm_hook: Literal["none", "fp16", "bf16", "powersgd"] | None = Field(
        None, description="torch's compression of the gradients that ddp exchanges. Default: none."
    )
    delay: str | None = Field(
        None,
        description="Slow a rank or worker, by waits: rank=1,seconds=0.5 or worker=0,factor=3,every=10; also "
        "distribution=exponential, seed=N. Several are separated by semicolons.",
    )
    device: str = Field(
        "cpu", description="Where the model lives: cpu, cuda or cuda:N.", pattern=r"^(cpu|cuda(:\d+)?)$"
    )
    data_dir: Path | None = Field(None, description="Folder of the data. Default: where this machine has them.")


class TrainOptions(Options):
    """The options of one run."""

    method: str = Field("async-lu", description="How to train: a name from `asyncprop methods`.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Fixes the weights, the order of the data, augmentation.")
    turn: Literal["free", "lockstep", "ordered"] = Field(
        "free",
        description="lockstep trains one batch at a time, reproducibly, equal to the plain loop bit for bit; ordered "
        "lets nobody read a layer while another writes it, so that asyncprop replay can train the same again.",
    )
    trace: bool = Field(False, description="Note what each thread does, in trace.jsonl; ordered does so, too.")
    target: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Test metric whose time and epochs are reported. Default: the task's."
    )
    checkpoint_every: Rate = Field(60.0, description="Seconds of training between checkpoints within an epoch.")
    warm_up_batches: Annotated[int, Field(ge=0)] = Field(
        4, description="Batches that a copy of the model is trained on, and thrown away, before time is taken."
    )


class TrainConfig(TrainOptions):
    """One run."""

    task: str = Field(description="What to train: a name from `asyncprop tasks`.")


class SimulateOptions(TrainOptions):
    """The options of a run in virtual time."""

    devices: Count = Field(3, description="Simulated devices. Methods of several ranks have a rank on each.")
    ranks: Count | None = Field(
        None,
        description="Replicas that train together, and share out the devices. Default: one on each device for methods "
        "of several ranks, else 1.",
    )
    speeds: str | None = Field(
        None, description="Of the devices, separated by commas, relative to the costs'; the last counts for the rest."
    )
    cores: Count = Field(
        1,
        description="Operations that a device computes at once: 1 for a GPU, its cores for a CPU. Loops (sgd, ddp and "
        "their like) compute one.",
    )
    costs: str = Field(
        "a100-resnet18",
        description="Seconds by layer: a100-resnet18 or a100-resnet50 (the paper's Table 9), or a file that asyncprop "
        "plan has written.",
    )
    variation: Share | None = Field(
        None,
        description="Standard deviation over mean of the times of passes, drawn from the seed; 0: all take equally "
        "long. Default: the costs'.",
    )


class SimulateConfig(SimulateOptions, TrainConfig):
    """One run in virtual time."""


NOT_MODELLED = ("bucket_bytes", "wire", "timeout_s", "comm_hook", "checkpoint_every", "warm_up_batches")
"""Options that mean nothing in virtual time."""


class CompareOptions(Options):
    """The options of a comparison."""

    methods: str = Field(
        "sgd,async-lu,async-bu",
        description="Names from `asyncprop methods`, separated by commas. NAME:OPTION=VALUE is that method with an "
        "option of its own, as in async-bu:momentum=0.5; more follow after further colons.",
    )
    seeds: Count = Field(3, description="Runs per method: seeds 0 to N-1.")
    target: str | None = Field(
        None,
        description="Test metric to reach, 0 to 1; or worst-best: the best that the worst method reached. "
        "Default: the task's.",
    )
    tune: str | None = Field(
        None,
        description="Choose options for every method, by runs with a seed of their own: lr=0.05,0.1:momentum=0.5,0.9 "
        "tries all four. What a method's own options fix is not tried.",
    )
    costs: str | None = Field(
        None, description="Compare in virtual time, by these costs (see asyncprop simulate). Default: on this machine."
    )
    devices: Count | None = Field(None, description="Simulated devices, with costs. Default: 3.")
    speeds: str | None = Field(None, description="Of simulated devices, relative to the costs', separated by commas.")


class CompareConfig(CompareOptions):
    """Several methods, several seeds."""

    task: str = Field(description="What to train: a name from `asyncprop tasks`.")


C = TypeVar("C", bound=Options)


def resolve(kind: type[C], given: dict[str, Any], file: Path | None) -> C:
    """Return the configuration: what is `given` on the command line, else what `file` says, else the defaults.

    Raises:
        ValueError: one line that says argument, rule and value.
    """
    values = {**read_toml(file), **given}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error, kind)) from None


def read_toml(file: Path | None) -> dict[str, Any]:
    """Return the options in a TOML file; keys may be written with - or _."""
    if file is None:
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config must be a readable file ({file}: {error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config must be TOML ({file}: {error})") from None
    return {key.replace("-", "_"): value for key, value in content.items()}


def one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    """Say what is wrong first with a configuration: argument, rule, value."""
    first = error.errors()[0]
    name = str(first["loc"][0]).replace("_", "-") if first["loc"] else kind.__name__
    if first["type"] == "extra_forbidden":
        known = ", ".join(field.replace("_", "-") for field in kind.model_fields)
        return f"{name} is no option here: the options are {known}"
    if first["type"] == "missing":
        return f"{name} must be given"
    return f"{name} must be {_rule(first)} (got {first['input']})"


def _rule(error: Any) -> str:
    """Say a rule of pydantic's as short as code does."""
    limits = error.get("ctx", {})
    signs = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than_equal": ("le", "<="),
             "less_than": ("lt", "<")}  # fmt: skip
    if error["type"] in signs:
        key, sign = signs[error["type"]]
        return f"{sign} {limits[key]:g}"
    if error["type"] == "string_pattern_mismatch":
        return f"of the form {limits['pattern']}"
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def to_toml(config: BaseModel) -> str:
    """Write a configuration as TOML; what is None is left out, as leaving it out is what None means."""
    lines = [
        f"{key} = {_toml_value(value)}" for key, value in config.model_dump(mode="json").items() if value is not None
    ]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in str(value))
    return f'"{escaped}"'
