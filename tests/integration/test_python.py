"""Data that a program holds, to vectors that it works on: on a Ray of the test's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray.data

import fmembed
from fmembed.errors import SourceError

pytestmark = pytest.mark.usefixtures("local_ray")
TEXTS = [f"the {w} number {i}" for i in range(30) for w in ("river", "market")]


def test_a_list_becomes_a_table_and_an_array(tmp_path: Path, tiny_bert: Path) -> None:
    model = {"id": str(tiny_bert), "dtype": "float32"}
    given = {"model": model, "output": tmp_path / "out", "overrides": {"probes": []}}
    result = fmembed.embed(TEXTS, **given)
    assert (result.rows_embedded, result.rows_rejected) == (60, 0)
    vectors, ids = result.numpy(ids=True)
    assert vectors.flags.c_contiguous
    assert ids.tolist() == [str(i) for i in range(60)]  # as they were given
    expected = fmembed.encode(TEXTS, model=model)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    assert result.open().info().source == "60 texts"

    again = fmembed.embed(iter(TEXTS), **given)
    assert (again.rows_embedded, again.rows_skipped) == (0, 60)
    other = [*TEXTS[:50], "", "something else", *TEXTS[52:]]
    refreshed = fmembed.refresh(other, **given)
    assert (refreshed.rows_changed, refreshed.contents_embedded) == (1, 1)
    assert refreshed.rows_withheld == 1  # a text that is empty now keeps the vector it had
    assert fmembed.verify(result.table).problems == []


def test_a_frame_and_a_ray_dataset_have_ids_of_their_own(tmp_path: Path, tiny_bert: Path) -> None:
    frame = pd.DataFrame(
        {"body": TEXTS, "key": [f"k{i}" for i in range(60)], "topic": ["r", "m"] * 30}
    )
    given = {
        "model": {"id": str(tiny_bert), "dtype": "float32"}, "input": "body", "id": "key",
        "label": "topic", "output": tmp_path / "out", "overrides": {"probes": []},
    }  # fmt: skip
    result = fmembed.embed(frame, **given)
    vectors, topics = result.numpy(label="topic")
    assert (vectors.shape, sorted(set(topics))) == ((60, 32), ["m", "r"])
    assert result.to_pandas()["row_id"].tolist() == frame["key"].tolist()
    assert topics.tolist() == frame["topic"].tolist()
    # The same rows, wherever they come from.
    again = fmembed.embed(ray.data.from_pandas(frame), **given)
    assert (again.rows_embedded, again.rows_skipped, again.rows_changed) == (0, 60, 0)
    with pytest.raises(SourceError, match=r"source\.id: the rows of a Ray Dataset have no order"):
        fmembed.embed(ray.data.from_pandas(frame), **{**given, "id": None})
