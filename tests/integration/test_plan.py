"""What `fmembed plan` says beside what the run then does, by real models in a real Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from fake_endpoint import serve
from media import RATE_HZ, picture, sound

import fmembed
from fmembed import Forecast, RunResult, RunSpec, SpecError
from fmembed.bench.data import save_wav2vec2
from fmembed.cli import run
from fmembed.forecast import Range, lines
from fmembed.run import pace, planning, trial
from fmembed.storage import Storage
from fmembed.table.records import read_runs

pytestmark = pytest.mark.usefixtures("local_ray")


def write_texts(folder: Path, first: int, stop: int) -> None:
    for i in range(first, stop):
        (folder / f"{i:04}.txt").write_text(f"{i} " + "several words " * (10 + i * 7 % 5))


def write_pictures(folder: Path, first: int, stop: int) -> None:
    for i in range(first, stop):
        (folder / f"{i:04}.png").write_bytes(picture(20 + i % 200, 20 + i // 200))


def write_sounds(folder: Path, first: int, stop: int) -> None:
    for i in range(first, stop):
        (folder / f"{i:04}.wav").write_bytes(sound(RATE_HZ // 10 + i))


KINDS = {
    "text": (write_texts, "tiny_bert", 1), "image": (write_pictures, "tiny_vit", 1),
    "audio": (write_sounds, "", RATE_HZ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models tell in no time how fast they are, and that for so few rows nobody needs it."""
    monkeypatch.setattr(trial, "_TRIAL_S", 0.3)
    monkeypatch.setattr(pace, "_LEAST_S", 0.0)
    monkeypatch.setattr(planning, "_SAMPLE_ROWS", 60)


def spec_of(tmp_path: Path, model_id: str, **parts: Any) -> RunSpec:
    (tmp_path / "in").mkdir(exist_ok=True)
    raw: dict[str, Any] = {
        "source": {"uri": str(tmp_path / "in")},
        "model": {"id": model_id, "dtype": "float32"},
        "output": {"uri": str(tmp_path / "out"), "max_rejected_fraction": 1.0},
        "compute": {"price_per_device_hour": 36},
        "probes": [],
    }
    return RunSpec.parse({**raw, **{name: {**raw[name], **part} for name, part in parts.items()}})


def check(plan: Forecast, result: RunResult, size: int) -> None:
    names = ["rows_read", "contents_embedded", "rows_embedded", "rows_copied"]
    if plan.kind == "embed":  # which counts no contents, and takes all rows for new
        names = ["rows_read", "rows_embedded"]
        assert plan.rows_new == result.rows_embedded + result.rows_rejected
    else:
        names += ["rows_new", "rows_changed", "rows_removed", "rows_unchanged", "rows_withheld"]
    assert {n: getattr(plan, n) for n in names} == {n: getattr(result, n) for n in names}
    assert plan.rows_rejected.low <= result.rows_rejected <= plan.rows_rejected.high
    assert plan.units.value == pytest.approx(result.num_units / size, rel=0.05)
    assert plan.seconds is not None
    assert plan.device_hours is not None
    assert 0 < plan.device_hours.value * 3600 < plan.seconds.value * plan.compute["max_actors"]
    assert plan.cost is not None
    assert plan.cost.value == pytest.approx(plan.device_hours.value * 36)
    assert plan.rate is not None
    assert plan.rate.low < plan.rate.value < plan.rate.high


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_exact_and_units_nearly(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A plan that measures; one of a refresh, by the run on record; and one of nothing."""
    write, model, size = KINDS[kind]
    if kind == "audio":
        save_wav2vec2(tmp_path / "model", "tiny")
        model = str(tmp_path / "model")
    else:
        model = str(request.getfixturevalue(model))
    spec, folder = spec_of(tmp_path, model), tmp_path / "in"
    write(folder, 0, 90)
    plan = fmembed.plan(spec)
    assert not (tmp_path / "out").exists()
    assert (plan.by, plan.version) == ("measured now", None)
    assert plan.rows_sampled == 60
    check(plan, fmembed.embed(spec, quiet=True), size)
    assert fmembed.plan(spec).is_nothing
    assert fmembed.plan(spec, refresh=True).is_nothing

    files = sorted(folder.iterdir())
    write(folder, 2000, 2020)
    files[0].write_bytes((folder / f"2000{files[0].suffix}").read_bytes())
    files[1].write_bytes(files[2].read_bytes())
    files[3].unlink()
    before = sorted((tmp_path / "out").rglob("*"))
    plan = fmembed.plan(spec, refresh=True)
    assert sorted((tmp_path / "out").rglob("*")) == before
    assert (plan.rows_new, plan.rows_changed, plan.rows_removed, plan.rows_copied) == (20, 2, 1, 1)
    assert (plan.by, plan.parts_rewritten) == ("by a run on record", 1)
    result = fmembed.refresh(spec, quiet=True)
    check(plan, result, size)
    assert (plan.parts_rewritten, result.parts_rewritten) == (1, 1)
    assert plan.parts_written is not None
    assert plan.parts_written.low <= result.parts_written <= plan.parts_written.high


def test_what_preparing_rejects_is_foretold_by_the_sample(tmp_path: Path, tiny_vit: Path) -> None:
    """And what reading rejects is counted."""
    spec = spec_of(tmp_path, str(tiny_vit))
    write_pictures(tmp_path / "in", 0, 40)
    for i in range(10):
        (tmp_path / "in" / f"bad{i}.png").write_bytes(b"no picture %d" % i)
    plan = fmembed.plan(spec)
    assert (plan.rows_new, plan.rows_rejected) == (50, Range.exactly(10))
    result = fmembed.embed(spec, quiet=True)
    assert (result.rows_embedded, result.rows_rejected) == (40, 10)


def test_by_command(tmp_path: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"key": f"k{i % 30}", "text": f"text number {i}"} for i in range(31)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"key": "k40"}])
    args = [
        "--source", str(tmp_path / "rows.jsonl"), "--id", "key", "--model", str(tiny_bert),
        "--dtype", "float32", "--output", str(tmp_path / "out"), "--set", "probes=[]",
        "--set", "output.max_rejected_fraction=1",
    ]  # fmt: skip

    def plan(*more: str, code: int = 0) -> str:
        assert run(["plan", *args, *more]) == code
        out, err = capfd.readouterr()
        assert ("fmembed: " in err) == bool(code)
        assert not (err and "--json" in more)
        return out + err

    out = f"{tmp_path}/out"
    said = plan()
    assert said.startswith(f"plan      of an embedding run of {out}; nothing was written\n")
    assert "32 in the source; 30 new, 0 changed, 0 unchanged, 2 rejected\n" in said
    assert re.search(r"^time      .*: seconds, start [\d.]+, model [\d.]+$", said, re.M)
    said = plan("--set", "compute.gpus_per_actor=1", code=2)
    assert "compute.gpus_per_actor: 1 asked, the cluster has 0" in said
    assert run(["embed", *args, "--json"]) == 0
    capfd.readouterr()
    assert json.loads(plan("--json"))["nothing"] is True
    write_jsonl(tmp_path / "rows.jsonl", rows[:3])
    said = plan("--refresh")
    assert "withheld  27 rows that should leave would stay: they are more than" in said
    found = json.loads(plan("--refresh", "--allow-removals", "27", "--json"))
    assert (found["rows_removed"], found["contents_embedded"], found["compute"]) == (27, 0, {})


def test_a_plan_for_gpus_goes_by_the_runs_that_had_them(tmp_path: Path, tiny_bert: Path) -> None:
    """None is there, and none is needed: how many there will be is in the config."""
    spec = spec_of(tmp_path, str(tiny_bert))
    write_texts(tmp_path / "in", 0, 40)
    fmembed.embed(spec, quiet=True)
    write_texts(tmp_path / "in", 40, 120)
    spec = spec_of(tmp_path, str(tiny_bert), compute={"gpus_per_actor": 1, "actors": 4})
    with pytest.raises(SpecError, match=r"compute\.gpus_per_actor"):
        fmembed.plan(spec)
    storage = Storage(str(tmp_path / "out"))
    (path,) = storage.paths("_runs/")
    ((_, raw),) = read_runs(storage)
    raw["compute"] |= {"device": "cuda", "device_name": "H200"}
    raw["verdict"]["actors"] = {
        "a": {"load_s": 10.0, "wait_s": 0.0, "busy_s": 3600.0, "forward_s": 1.0, "copy_s": 0.0,
              "tokens": 1.0},
    }  # fmt: skip
    record = json.loads(storage.get(path))
    storage.put(path, json.dumps({**record, "result": raw}).encode())
    plan = fmembed.plan(spec)
    assert (plan.rows_new, plan.by) == (80, "by a run on record")
    assert (plan.compute["device_name"], plan.compute["max_actors"]) == ("H200", 4)
    # An hour for the units of that run, on four devices, each of which loads for 10 s.
    units = plan.units.value / raw["num_units"]
    assert plan.device_hours is not None
    assert plan.device_hours.value == pytest.approx(units + 40 / 3600, rel=0.01)
    assert plan.stages["model"] == pytest.approx(units * 3600 / 4, rel=0.01)


def test_a_server_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_texts(tmp_path / "in", 0, 40)
    with serve() as server:
        endpoint = {"base_url": server.url, "usd_per_million_tokens": 10.0}
        spec = spec_of(tmp_path, "some-model", model={"endpoint": endpoint, "dtype": "auto"})
        spec = spec.model_copy(
            update={"compute": spec.compute.model_copy(update={"price_per_device_hour": None})}
        )
        plan = fmembed.plan(spec)
        assert server.num_requests == 0
        assert (plan.rows_new, plan.unit, plan.seconds) == (40, "characters", None)
        assert plan.notes[0].startswith("how fast the server answers")
        assert plan.cost is not None
        assert plan.cost.low < plan.units.value / 4 * 10 / 1e6 == plan.cost.value < plan.cost.high
        assert any(line.startswith("cost ") for line in lines(plan))
        result = fmembed.embed(spec, quiet=True)
        write_texts(tmp_path / "in", 40, 60)
        again = fmembed.plan(spec)
    # By what the server has counted.
    tokens = result.counts["endpoint_tokens"] / result.num_units * again.units.value
    assert again.cost is not None
    assert again.cost.value == pytest.approx(tokens * 10 / 1e6)
    assert (again.by, again.seconds is not None) == ("by a run on record", True)
