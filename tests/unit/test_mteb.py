"""A table as a model of mteb's: the same scores as from the model itself, and nothing embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from conftest import SENTENCES, write_jsonl
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta

import fmembed
from fmembed.errors import SpecError, TableError
from fmembed.mteb import TableEncoder

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TEXTS = [f"{SENTENCES[i % 6][:60]} number {i}" for i in range(90)]


class Task(AbsTaskClassification):
    metadata = TaskMetadata(
        name="Ours", description="x", reference=None, type="Classification", category="t2c",
        modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="accuracy",
        date=("2020-01-01", "2020-01-02"), domains=[], task_subtypes=[], license="mit",
        annotations_creators="derived", dialect=[], sample_creation="found", bibtex_citation="",
        dataset={"path": "x/x", "revision": "x"},
    )  # fmt: skip

    def load_data(self, **_: Any) -> None:
        def of(places: range) -> datasets.Dataset:
            rows = {"text": [TEXTS[i] for i in places], "label": [i % 3 for i in places]}
            return datasets.Dataset.from_dict(rows)

        self.dataset = datasets.DatasetDict(train=of(range(60)), test=of(range(60, 90)))
        self.data_loaded = True


class Direct(AbsEncoder):
    """The model itself."""

    mteb_model_meta = ModelMeta.create_empty()

    def __init__(self, model: dict[str, Any]) -> None:
        self._model = model

    def encode(self, inputs: Any, **_: Any) -> Any:
        texts = [t for batch in inputs for t in batch["text"]]
        return np.asarray(fmembed.encode(texts, model=self._model))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, local_ray: None) -> Path:
    """A table of all but the last text, and the config that made it."""
    folder = tmp_path_factory.mktemp("mteb")
    write_jsonl(folder / "in.jsonl", [{"text": text} for text in reversed(TEXTS[:-1])])
    config = {
        "source": {"uri": str(folder / "in.jsonl")},
        "model": {"id": str(tiny_bert), "dtype": "float32"},
        "output": {"uri": str(folder / "table")},
        "probes": [],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    fmembed.embed(str(folder / "config.yaml"))
    return folder


def scores(model: Any) -> Any:
    return Task().evaluate(model, "test", encode_kwargs={})["default"]["scores_per_experiment"]


def test_scores_are_those_of_the_model(made: Path, tiny_bert: Path) -> None:
    encoder = TableEncoder(made / "table", config=made / "config.yaml")
    assert scores(encoder) == scores(Direct({"id": str(tiny_bert), "dtype": "float32"}))
    assert (encoder.num_found, encoder.num_embedded) == (90, 1)
    card = fmembed.Embeddings(str(made / "table")).info()
    assert encoder.mteb_model_meta.revision == card.fingerprint


def test_what_the_table_has_not_is_refused(made: Path) -> None:
    with pytest.raises(TableError, match=r"1 of 30 texts are not in .*; embed them into it"):
        scores(TableEncoder(made / "table"))


def test_another_model_embeds_nothing(made: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((made / "config.yaml").read_text())
    config["model"]["pooling"] = "cls"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SpecError, match=r"did not make the table .*model\.pooling"):
        TableEncoder(made / "table", config=tmp_path / "other.yaml")
    with pytest.raises(SpecError, match="column: 'first' holds no vectors"):
        TableEncoder(made / "table", column="first")
    with pytest.raises(TableError, match="has the versions"):
        TableEncoder(made / "table", version=99)


def test_pictures_are_not_asked_of_a_table(made: Path) -> None:
    with pytest.raises(TableError, match="asks for image"):
        TableEncoder(made / "table").encode([{"image": [None]}])
