"""Each precision keeps what it promises, and those that others have are as they have them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from deltalake import Schema

from fmembed import spec
from fmembed.rows.outputs import Output
from fmembed.rows.precision import (
    PRECISIONS,
    delta_field,
    dequantize,
    finish,
    measure_ranges,
    ranges_from_lists,
    ranges_to_lists,
)

DIM = 30
VECTORS = np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)


def output(name: str, pooling: str = "mean") -> Output:
    return Output("v", pooling, None, False, None, name)


def test_a_config_takes_those_that_there_are() -> None:
    assert set(PRECISIONS) == set(get_args(spec.Precision))


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_what_is_written_is_read(name: str) -> None:
    precision = PRECISIONS[name]
    ranges = measure_ranges({"v": VECTORS}) if precision.needs_ranges else {}
    stored = finish(output(name), VECTORS, ranges)
    assert stored.shape == (200, precision.stored_dim(DIM))
    assert pa.from_numpy_dtype(stored.dtype) == precision.arrow
    # What is left over of a number that holds several dimensions comes last.
    back = dequantize(stored, "v", name, ranges)[:, :DIM]
    assert (back.shape, back.dtype) == (VECTORS.shape, np.dtype(np.float32))
    cosine = (back * VECTORS).sum(1) / np.linalg.norm(back, axis=1)
    is_bit = precision.arrow.bit_width == precision.dims_each
    assert (cosine / np.linalg.norm(VECTORS, axis=1)).min() > (0.6 if is_bit else 0.98)
    again = finish(output(name), back, ranges)
    np.testing.assert_array_equal(again, stored)
    # Norms are checked only of what reads back as it was.
    if precision.has_norms:
        norms = [np.linalg.norm(v, axis=1) for v in (back, VECTORS)]
        np.testing.assert_allclose(*norms, rtol=1e-3)


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_infinity_comes_only_of_those_that_say_so(name: str) -> None:
    precision = PRECISIONS[name]
    ranges = measure_ranges({"v": VECTORS}) if precision.needs_ranges else {}
    stored = finish(output(name), VECTORS * 1e30, ranges)
    assert precision.may_overflow == (not np.isfinite(stored).all())


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_delta_lake_has_the_type(name: str) -> None:
    for pooling, num_lists in (("mean", 1), ("tokens", 2)):
        field = delta_field(output(name, pooling))
        found = pa.schema(Schema.from_arrow(pa.schema([field])).to_arrow()).field(0).type
        for _ in range(num_lists):
            found = found.value_type
        assert found == PRECISIONS[name].delta


def test_int8_is_as_sentence_transformers_has_it_and_bits_too() -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    vectors = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    ranges = measure_ranges({"v": vectors[:100]})
    assert ranges_from_lists(ranges_to_lists(ranges))["v"][0].tolist() == ranges["v"][0].tolist()
    output = Output("v", "mean", None, False, None, "int8")
    stored = finish(output, vectors, ranges)
    inside = ((vectors >= ranges["v"][0]) & (vectors <= ranges["v"][1])).all(axis=1)
    theirs = quantize_embeddings(vectors, "int8", ranges=np.stack(ranges["v"]))
    # They cut where we round: a step apart at most, inside the ranges.
    gap = np.abs(stored[inside].astype(int) - theirs[inside].astype(int))
    assert gap.max() <= 1
    # Outside of them theirs wraps around; ours stays at the nearest end.
    beyond = finish(output, ranges["v"][1][None] + 5, ranges)
    assert (beyond == 127).all()
    step = (ranges["v"][1] - ranges["v"][0]) / 255
    back = dequantize(stored[inside], "v", "int8", ranges)
    assert (np.abs(back - vectors[inside]) <= step * 0.51).all()
    bits = finish(Output("v", "mean", None, False, None, "binary"), vectors, {})
    np.testing.assert_array_equal(bits, quantize_embeddings(vectors, "binary"))
    np.testing.assert_array_equal(dequantize(bits, "v", "binary", {}), np.where(vectors > 0, 1, -1))
