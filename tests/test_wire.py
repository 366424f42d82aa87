"""Wire: what is written is read back; whatever else comes is refused, and nothing of it is used."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncprop.engine.layers import find_layers
from asyncprop.exchange.identity import check_identity
from asyncprop.exchange.wire import (
    HEADER_BYTES,
    Garbage,
    Header,
    Kind,
    Wire,
    check_finite,
)
from asyncprop.testing import TINY


def make(name: str = "mlp", wire: Any = "exact", bucket_bytes: int = 1 << 20) -> tuple[Wire, dict[str, torch.Tensor]]:
    model = TINY[name].seeded_model()
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    return Wire(parameters, find_layers(model, parameters), wire, bucket_bytes), parameters


def message(
    wire: Wire, parameters: dict[str, torch.Tensor], chunks: list[int], kind: Any = Kind.CHUNKS
) -> torch.Tensor:
    buffer = torch.full((wire.message_bytes,), 7, dtype=torch.uint8)
    written = wire.write(buffer, Header(kind, 3, 5, 2, 0.75, 4), chunks)
    for part, value in wire.values(written, chunks):
        value.copy_(part.of(parameters))
    return buffer


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_is_read_back(name: str) -> None:
    wire, parameters = make(name)
    chunks = list(reversed(range(wire.count)))
    buffer = message(wire, parameters, chunks)
    header, read = wire.read(buffer, 3)
    assert (header.sequence, header.round, header.weight, header.besides, read) == (5, 2, 0.75, 4, chunks)
    assert header.length_bytes <= wire.message_bytes
    found = {part.name: value for part, value in wire.values(buffer, read)}
    assert found.keys() == parameters.keys()
    assert all(torch.equal(found[name], parameters[name]) for name in parameters)


def test_bf16_halves_floats_and_leaves_others_alone() -> None:
    parameters = {"a": torch.randn(64), "b": torch.randn(64, dtype=torch.float64)}
    layers = find_layers(torch.nn.ParameterDict({"a": parameters["a"], "b": parameters["b"]}), parameters, "parameter")
    exact, rounded = (Wire(parameters, layers, kind, 1 << 20) for kind in ("exact", "bf16"))  # type: ignore[arg-type]
    assert [exact.bytes_of(layer) for layer in range(2)] == [256, 512]
    assert [rounded.bytes_of(layer) for layer in range(2)] == [128, 512]
    buffer = message(rounded, parameters, [0, 1])
    found = {part.name: value for part, value in rounded.values(buffer, [0, 1])}
    assert torch.equal(found["a"].float(), parameters["a"].bfloat16().float())
    assert torch.equal(found["b"], parameters["b"])


@pytest.mark.parametrize(("bucket_bytes", "fits"), [(1, 1), (287, 1), (288, 2), (1000, 2)])
def test_a_message_has_no_more_than_bucket_bytes_and_one_chunk_at_least(bucket_bytes: int, fits: int) -> None:
    wire, _ = make(bucket_bytes=bucket_bytes)  # of 7·5 + 7 numbers and 3·7 + 3, each parameter aligned
    assert (wire.bytes_of(0), wire.bytes_of(1)) == (144 + 32, 96 + 16)
    assert wire.fill([1, 0]) == fits
    assert wire.fill([0]) == 1
    assert wire.message_bytes == HEADER_BYTES + 16 + min(max(bucket_bytes, 176), 288)


@pytest.mark.parametrize("wire", ["exact", "bf16"])
def test_layers_larger_than_a_bucket_travel_in_parts(wire: Any) -> None:
    parameters = {"a": torch.randn(3, 2), "b": torch.randn(100, 400), "c": torch.randn(7)}
    module = torch.nn.ParameterDict({name: value.clone() for name, value in parameters.items()})
    layers = find_layers(module, parameters, "parameter")
    made = Wire(parameters, layers, wire, 1 << 16)
    assert made.chunks == ([[0], [1, 2, 3], [4]] if wire == "exact" else [[0], [1, 2], [3]])
    assert made.message_bytes <= HEADER_BYTES + 48 + (1 << 16)
    for chunk in range(made.count):  # each by itself, as they come in any order
        for part, value in made.values(message(made, parameters, [chunk]), [chunk]):
            part.of(module).copy_(value * 2)
    for name, value in parameters.items():
        sent = value.bfloat16().float() if wire == "bf16" else value
        assert torch.equal(module[name], sent * 2)


def spoilt(wire: Wire, parameters: dict[str, torch.Tensor], place: int, value: int | float) -> torch.Tensor:
    buffer = message(wire, parameters, [0, 1])
    kind = torch.float64 if isinstance(value, float) else torch.int64
    buffer[8 * place : 8 * place + 8].view(kind).fill_(value)
    return buffer


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, 1, "not a message"),
        (1, 9, "not a message"),
        (2, 4, "not a message"),
        (5, 0.0, "a question with weight 0.0"),
        (5, math.nan, "a question with weight nan"),
        (5, math.inf, "a question with weight inf"),
        (5, 1.5, "a question with weight 1.5"),  # more than anybody has
        (6, -1, "-1 others out"),
        (7, 3, "3 chunks"),
        (7, 0, "0 chunks"),
        (7, -1, "-1 chunks"),
        (8, 1, "another model"),
        (9, 10_000, "bytes instead of"),
        (10, 2, "table of chunks"),
        (10, 1, "table of chunks"),
    ],
)
def test_garbage_is_refused(place: int, value: int | float, said: str) -> None:
    wire, parameters = make()
    with pytest.raises(Garbage, match=said):
        wire.read(spoilt(wire, parameters, place, value), 3)


def test_an_answer_may_have_chunks_and_a_greeting_may_not() -> None:
    wire, parameters = make()
    assert wire.read(message(wire, parameters, [1], Kind.MERGED), 3)[1] == [1]
    assert wire.read(message(wire, parameters, [], Kind.MERGED), 3)[1] == []
    with pytest.raises(Garbage, match="1 chunks in a message of kind 1"):
        wire.read(message(wire, parameters, [1], Kind.HELLO), 3)


@given(st.binary(min_size=1, max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    wire, _ = make()
    buffer = torch.zeros(wire.message_bytes, dtype=torch.uint8)
    buffer[: len(noise)] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)[: wire.message_bytes]
    with pytest.raises(Garbage):
        wire.read(buffer, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    wire, parameters = make()
    next(iter(parameters.values()))[0, 0] = value
    buffer = message(wire, parameters, [0, 1])
    with pytest.raises(Garbage, match="not finite"):
        check_finite(wire.values(buffer, [0, 1]))


def test_other_models_and_protocols_are_refused_with_both_sides_named() -> None:
    ours, theirs = make("mlp")[0].identity, make("resnet")[0].identity
    check_identity(ours, 0, dict(ours), 1)
    with pytest.raises(ValueError, match=r"same on all ranks \(of its layers, rank 0 has 0, rank 1 has conv1\)"):
        check_identity(ours, 0, theirs, 1)
    with pytest.raises(
        ValueError, match=r"of its parameters, rank 0 has \['0.weight', \[7, 5\].*rank 1 has \['0.weight'"
    ):
        check_identity(ours, 0, {**ours, "parameters": [["0.weight", [8, 5], "torch.float32"]]}, 1)
    with pytest.raises(ValueError, match=r"protocol must be the same on all ranks \(rank 0 has 4, rank 1 has 2\)"):
        check_identity(ours, 0, {**ours, "protocol": 2}, 1)
    with pytest.raises(ValueError, match=r"bucket_bytes must be the same on all ranks \(rank 0 has 1048576, rank 1"):
        check_identity(ours, 0, make(bucket_bytes=4096)[0].identity, 1)  # they cut layers elsewhere
    assert make("mlp")[0].digest != make("mlp", "bf16")[0].digest


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="wire must be one of exact, bf16"):
        make(wire="fp8")
    with pytest.raises(ValueError, match="bucket_bytes must be >= 1"):
        make(bucket_bytes=0)
