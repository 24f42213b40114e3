"""A table kept in step with its source: by Ray, by command, with a budget.

Most of what a refresh does is looked at in tests/unit/run/test_refreshing.py, without Ray.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_cli
from refreshing import Corpus, make_stage, row

import fmembed
from fmembed import BudgetSpec, BudgetSpentError, SpecError, pipeline
from fmembed.table.table import Table

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def corpus(tmp_path: Path, tiny_bert: Path) -> Corpus:
    corpus = Corpus(tmp_path, tiny_bert)
    corpus.write("1.jsonl", [row(f"a{i}") for i in range(10)])
    corpus.write("2.jsonl", [row(f"b{i}") for i in range(10)])
    return corpus


def test_new_changed_and_removed_rows_make_one_version(corpus: Corpus, tmp_path: Path) -> None:
    first = corpus.refresh_by_ray()
    assert (first.rows_new, first.contents_embedded, first.version) == (20, 20, 1)
    before = corpus.rows()
    assert corpus.refresh().unchanged
    rows = [row(f"b{i}") for i in range(1, 10)]
    rows[3] = row("b4", "another text")
    corpus.write("2.jsonl", [*rows, row("c1"), row("c2", "about c1"), row("c3", "about a3")])
    second = corpus.refresh_by_ray()
    # Of two rows of one content the model has seen one; the content of a third one was there.
    assert corpus.seen() == ["b4", "c1"]
    assert (second.rows_new, second.rows_changed, second.rows_removed) == (3, 1, 1)
    assert (second.rows_embedded, second.contents_embedded, second.rows_copied) == (3, 2, 1)
    assert (second.rows_unchanged, second.rows_read, second.version) == (18, 22, 2)
    now = corpus.rows()
    assert {key for key in now if now[key] != before.get(key)} == {"b4", "c1", "c2", "c3"}
    assert before.keys() - now.keys() == {"b0"}
    assert now["c3"]["embedding"] == now["a3"]["embedding"]
    corpus.check_as_from_scratch(tmp_path / "anew")
    # What was there is there still, as a version.
    assert corpus.rows(1) == before
    assert corpus.refresh().unchanged


def test_where_no_row_is_for_the_model_it_is_not_loaded(corpus: Corpus) -> None:
    """Another label, a name for a row that was there, and one that cannot be embedded."""
    first = pipeline.refresh(corpus.spec, quiet=True)
    before = corpus.rows()
    rows = [row(f"b{i}", topic="other") for i in range(9)]
    corpus.write("2.jsonl", [*rows, row("c9", "about b9"), {"key": "d", "text": 7}])
    compute = corpus.spec.compute.model_copy(update={"gpus_per_actor": 4.0})  # nobody has them
    corpus.spec = corpus.spec.model_copy(update={"compute": compute})
    second = pipeline.refresh(corpus.spec, quiet=True)
    assert first.spent["device_hours"] > 0
    assert second.spent["device_hours"] == 0
    assert (second.rows_changed, second.rows_new, second.rows_removed) == (9, 1, 1)
    assert (second.rows_copied, second.contents_embedded, second.rows_rejected) == (10, 0, 1)
    now = corpus.rows()
    assert now["c9"]["embedding"] == before["b9"]["embedding"]
    for i in range(9):
        assert now[f"b{i}"] == {**before[f"b{i}"], "topic": "other"}
    assert fmembed.verify(str(corpus.out)).problems == []


def test_a_table_that_is_emptied_has_no_report_of_rows_that_are_gone(corpus: Corpus) -> None:
    assert corpus.refresh_by_ray().report == f"{corpus.out}/_report.html"
    for path in corpus.folder.iterdir():
        path.unlink()
    assert corpus.refresh_by_ray().rows_withheld == 20
    assert (corpus.out / "_report.html").exists()
    result = corpus.refresh_by_ray(allow_removals=20)
    assert (result.rows_removed, result.table_rows, result.report) == (20, 0, None)
    assert not (corpus.out / "_report.html").exists()


def test_half_of_a_corpus_are_copies(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert)
    for name in "ab":
        corpus.write(f"{name}.jsonl", [row(f"{name}{i}", f"about {i}", name) for i in range(300)])
    result = corpus.refresh_by_ray()
    assert (result.contents_embedded, result.rows_embedded, result.rows_copied) == (300, 600, 0)
    assert result.rows_new == 600
    corpus.check_as_from_scratch(tmp_path / "anew")


def test_by_command(corpus: Corpus, tiny_bert: Path) -> None:
    """What a scheduler sees: JSON, exit codes; and of a run with nothing to do that it is light."""
    args = [
        "refresh", "--source", str(corpus.folder), "--id", "key", "--label", "topic",
        "--model", str(tiny_bert), "--dtype", "float32", "--output", str(corpus.out),
        "--set", "probes=[]",
    ]  # fmt: skip
    done = run_cli(*args)
    assert done.returncode == 0
    said = [re.sub(r"^([0-9-]{10} )?\d\d:\d\d ", "", line) for line in done.stderr.splitlines()]
    assert [line.split(",")[0] for line in said] == [
        "starting Ray …", "comparing the source with the table …", "loading the model",
        "making the new version …",
    ]  # fmt: skip
    assert "20 in the source; 20 new, 0 changed, 0 unchanged, 0 removed" in done.stdout
    script = (
        "import sys; from fmembed import cli; code = cli.run(sys.argv[1:]); import ray\n"
        "assert not ray.is_initialized() and 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *args]
    light = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (light.returncode, light.stderr) == (0, "")
    assert light.stdout.startswith("nothing to do: the table is in step with its source\n")
    (corpus.folder / "1.jsonl").unlink()
    done = run_cli(*args, "--json")
    assert (done.returncode, done.stderr) == (3, "")
    assert '"rows_withheld": 10, ' in done.stdout
    assert "they are more than refresh.max_removed_fraction" in done.stdout
    assert run_cli(*args, "--allow-removals", "-1").returncode == 2
    with pytest.raises(SpecError, match="allow_removals"):
        pipeline.refresh(corpus.spec, allow_removals=-1)


@pytest.mark.parametrize("verb", ["embed", "refresh"])
def test_a_budget_stops_a_run_and_the_next_one_goes_on(
    verb: str, tmp_path: Path, tiny_bert: Path
) -> None:
    """Within a window of each actor; what is finished is committed, and computed once."""
    corpus = Corpus(
        tmp_path, tiny_bert,
        compute={"window_rows": 16, "actors": 1, "price_per_device_hour": 3600,
                 "budget": {"cost": 0.1}},
    )  # fmt: skip
    for file in range(10):
        corpus.write(f"{file}.jsonl", [row(f"f{file}-{i}") for i in range(40)])
    line = pipeline.embed if verb == "embed" else pipeline.refresh
    spent_message = r"compute\.budget\.cost: .* of 0\.1 are spent"
    with pytest.raises(BudgetSpentError, match=spent_message) as stopped:
        line(corpus.spec, quiet=True, stage=corpus.stage)
    assert stopped.value.exit_code == 4
    num_done = len(corpus.rows())
    assert 0 < num_done <= len(corpus.seen()) < 400
    assert Table(str(corpus.out)).staged() == []
    spent = Table(str(corpus.out)).spent()
    assert spent["cost"] == pytest.approx(spent["device_hours"] * 3600, rel=0.01)
    compute = corpus.spec.compute.model_copy(update={"budget": BudgetSpec()})
    corpus.spec = corpus.spec.model_copy(update={"compute": compute})
    # Apart from what the first one's actor had in hand, and may finish after that was stopped.
    corpus.log = tmp_path / "seen by the next one"
    corpus.stage = make_stage(corpus.log)
    done = line(corpus.spec, quiet=True, stage=corpus.stage)
    assert (done.rows_embedded, len(corpus.seen()), len(corpus.rows())) == (
        400 - num_done, 400 - num_done, 400,
    )  # fmt: skip
    assert done.table_spent["cost"] > done.spent["cost"] > 0
    assert corpus.refresh().unchanged
