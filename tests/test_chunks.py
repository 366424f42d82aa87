"""Chunks: every row travels in exactly one of them, and none is longer than it may be."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncprop.exchange.chunks import bytes_of, cut_layer

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4)


@given(SHAPES, st.integers(1, 400), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_each_number_is_in_one_chunk_and_chunks_are_as_few_as_rows_allow(
    shapes: list[list[int]], most_bytes: int, dtype: torch.dtype
) -> None:
    parameters = {str(index): torch.zeros(shape, dtype=dtype) for index, shape in enumerate(shapes)}
    chunks = cut_layer(parameters, dict.fromkeys(parameters, dtype), most_bytes)
    for chunk in chunks:
        assert chunk
        rows = [1 if part.start is None else part.stop - part.start for part in chunk]  # type: ignore[operator]
        assert bytes_of(chunk) <= most_bytes or (len(chunk) == 1 and rows == [1]) or len(chunks) == len(parameters) == 1
        for part in chunk:
            own = part.of(parameters)
            assert tuple(own.shape) == part.shape
            own += 1
    assert all(torch.equal(value, torch.ones_like(value)) for value in parameters.values())
    for before, after in itertools.pairwise(chunks):
        assert bytes_of([*before, after[0]]) > most_bytes  # else it would have gone with it


def test_a_layer_that_fits_is_one_chunk_and_its_parameters_are_whole() -> None:
    parameters = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
    ((weight, bias),) = cut_layer(parameters, dict.fromkeys(parameters, torch.float32), 64)
    assert (weight.bytes, bias.bytes, weight.start, bias.start) == (48, 16, None, None)
    assert weight.of(parameters).data_ptr() == parameters["weight"].data_ptr()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_written_through_whatever_the_layout(layout: torch.memory_format) -> None:
    weight = torch.zeros(6, 4, 3, 3).to(memory_format=layout)
    chunks = cut_layer({"w": weight}, {"w": torch.float32}, 2 * 4 * 4 * 9)
    assert [part.shape[0] for (part,) in chunks] == [2, 2, 2]
    for index, (part,) in enumerate(chunks):
        part.of({"w": weight}).fill_(index)
    assert [weight[row].unique().tolist() for row in range(6)] == [[0], [0], [1], [1], [2], [2]]
