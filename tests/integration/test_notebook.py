"""A notebook: run by a real kernel, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = (
    """
import fmembed
import pandas as pd
words = ("river", "market")
frame = pd.DataFrame({
    "key": range(40), "body": [f"the {words[i % 2]} number {i}" for i in range(40)],
    "topic": [words[i % 2] for i in range(40)],
})
model = {"id": MODEL, "dtype": "float32"}
""",
    """
result = fmembed.embed(
    frame, model=model, output=OUT, input="body", id="key", label="topic",
    overrides={"probes": ["knn"]},
)
result
""",
    "fmembed.open(OUT)",
    "X, y = result.numpy(label='topic')\nX.shape, X.dtype, list(y[:2])",
    "fmembed.encode(['a text'], model=model).shape",
    "fmembed.open(OUT).info()",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> list[Any]:
    """What each cell has put out."""
    folder = tmp_path_factory.mktemp("notebook")
    given = f"MODEL, OUT = {str(tiny_bert)!r}, {str(folder / 'out')!r}"
    cells = [nbformat.v4.new_code_cell(source) for source in (given, *CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    nbformat.write(notebook, folder / "run.ipynb")
    return [cell["outputs"] for cell in notebook["cells"][1:]]


def shown(cell: Any, kind: str) -> str:
    """What a cell shows of its last value."""
    (result,) = [output for output in cell if output["output_type"] == "execute_result"]
    return str(result["data"][kind])


def said(cell: Any) -> str:
    """What it has written."""
    return "".join(output["text"] for output in cell if output["output_type"] == "stream")


def test_a_run_says_what_it_does(outputs: list[Any]) -> None:
    told = said(outputs[1])
    for phase in ("starting Ray …", "loading the model", "probing …"):
        assert phase in told
    # No bar that redraws itself, and nothing of Ray's own.
    assert not re.search("\r|\x1b|INFO|WARNING|core_worker", told)


def test_a_result_shows_rows_scores_and_the_report(outputs: list[Any]) -> None:
    html = shown(outputs[1], "text/html")
    assert "40 read, 40 embedded, 0 rejected, 0 skipped" in html
    assert "accuracy (k = 10)" in html
    assert "TF-IDF + logistic regression" in html
    # In a frame that may run nothing outside itself.
    assert html.count("<iframe sandbox='allow-scripts'") == 1
    assert "40 read" in shown(outputs[1], "text/plain")


def test_a_table_shows_itself(outputs: list[Any]) -> None:
    html = shown(outputs[2], "text/html")
    assert "40 vectors × 32 float32" in html
    assert "a pandas.DataFrame of 40 rows, column body" in html
    assert shown(outputs[2], "text/plain").startswith("<Embeddings ")


def test_arrays_are_ready(outputs: list[Any]) -> None:
    assert shown(outputs[3], "text/plain") == "((40, 32), dtype('float32'), ['river', 'market'])"
    assert shown(outputs[4], "text/plain") == "(1, 32)"
    assert "vectors   40 vectors × 32 float32" in shown(outputs[5], "text/plain")
