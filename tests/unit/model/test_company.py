"""A row's vector does not depend on its company: alone, padded, packed, at its limit, the same.

The reference is the family's own class in transformers, fresh for each row, on the row alone.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

from fmembed.checkpoint.families import FAMILIES, REFUSED
from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.errors import ModelError
from fmembed.model.company import find_company
from fmembed.model.encoder import Encoder
from fmembed.model.forward import Model
from fmembed.rows.pieces import Piece
from fmembed.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

# Where neither config nor weights have a limit: what the tests run up to.
MAX_TOKENS = 96
# Of each way to go wrong one; the others take a minute.
QUICK = (
    "bert", "big_bird", "convbert", "cpmant", "fnet", "gpt2", "ibert", "mixtral", "modernbert",
    "phi3", "xlnet",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_flop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a model's operations takes longer here than all else, and is tested elsewhere."""
    monkeypatch.setattr("fmembed.model.encoder.count_flop", lambda _: lambda _: 0.0)


def opened(folder: Path, **spec: Any) -> Checkpoint:
    spec = {"dtype": "float32", "pooling": "mean", **spec}
    return open_checkpoint(ModelSpec(id=str(folder), **spec), False)


def alone(model: Any, ids: np.ndarray[Any, Any], **more: Any) -> Any:
    """The mean of a fresh model's states."""
    fresh = copy.deepcopy(model)
    fresh.config.use_cache = False
    if fresh.config.is_encoder_decoder and hasattr(fresh, "decoder"):
        fresh = fresh.get_encoder()
    with torch.inference_mode():
        hidden = fresh(input_ids=torch.from_numpy(ids)[None].long(), **more).last_hidden_state
    return hidden[0].mean(0).double().numpy()


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def draw(*lengths: int) -> list[Any]:
    draw = np.random.default_rng(3)
    return [draw.integers(3, 100, n).astype(np.int32) for n in lengths]


def embed(encoder: Encoder, rows: list[Any]) -> Any:
    vectors, causes = encoder.embed([Piece(ids, ids.shape[-1]) for ids in rows])
    assert not causes
    return vectors["embedding"]


@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in zoo.FAMILIES],
)
@pytest.mark.filterwarnings("ignore")  # of transformers' own about configs so small
def test_a_row_is_the_same_in_any_company(family: str, tmp_path: Path) -> None:
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    checkpoint = opened(tmp_path)
    if checkpoint.max_tokens > 128:
        checkpoint = opened(tmp_path, max_tokens=MAX_TOKENS)
    encoder = Encoder(checkpoint)
    rows = draw(12, checkpoint.max_tokens, 37, 12, 64, 5)
    found = embed(encoder, rows)
    for i, ids in enumerate(rows):
        expected = alone(model, ids)
        assert cosine(found[i], expected) >= 0.99999, len(ids)
        assert cosine(embed(encoder, [ids])[0], expected) >= 0.99999, len(ids)


@pytest.mark.slow
def test_every_text_family_is_built_or_said_why_not() -> None:
    assert len(zoo.FAMILIES) >= 190
    unbuilt = [name for names in zoo.UNBUILT.values() for name in names]
    refused = REFUSED.keys() - {"perceiver"}  # whose main input has another name
    assert sorted([*zoo.FAMILIES, *unbuilt, *refused]) == sorted(zoo.list_text_families())


@pytest.mark.slow
def test_what_the_table_says_is_what_is_found(tmp_path: Path) -> None:
    """The check at load comes to the same as the record of each family that has one."""
    for family in zoo.FAMILIES:
        if family not in FAMILIES or (known := FAMILIES[family].company) is None:
            continue
        zoo.build(family).save_pretrained(tmp_path / family)
        model = Model(opened(tmp_path / family), torch.device("cpu"))
        if not model.tower.packs:
            with torch.inference_mode():
                assert find_company(model, model.tower) == known, family


def test_loading_and_short_rows_leave_the_model_as_it_was(tmp_path: Path) -> None:
    """BigBird turns its blocks off for good at the first short row, which the example is."""
    model = zoo.build("big_bird")
    model.save_pretrained(tmp_path)
    short, long = draw(5, 60)
    encoder = Encoder(opened(tmp_path))
    expected = alone(model, long)
    full = copy.deepcopy(model)
    full.set_attention_type("original_full")
    assert cosine(alone(full, long), expected) < 0.999
    for before in ([], [short], [short, short]):
        assert cosine(embed(encoder, [*before, long])[-1], expected) > 0.99999
        assert cosine(embed(encoder, [long])[0], expected) > 0.99999
    assert encoder._tower.model.attention_type == "block_sparse"


def test_rows_on_either_side_of_a_turn_of_the_positions_are_apart(tmp_path: Path) -> None:
    zoo.build("phi3").save_pretrained(tmp_path)
    encoder = Encoder(opened(tmp_path))
    assert encoder._tower.company == "any"
    batches = [
        sorted(len(rows[i]) for i in batch)
        for rows in [draw(70, 3, 33, 32, 12)]
        for batch in encoder._plan([Piece(r, len(r)) for r in rows], np.arange(5))
    ]
    assert sorted(batches) == [[3, 12, 32], [33, 70]]


class Mixing:
    """A model that adds to each row something of its batch, or of nothing at all."""

    def __init__(self, call: Any, what: str) -> None:
        self._call, self._what, self._draw = call, what, torch.Generator().manual_seed(0)

    def __call__(self, **inputs: Any) -> Any:
        out = self._call(**inputs)
        hidden = out.last_hidden_state
        if self._what == "company":
            more = hidden.mean(dim=(0, 1), keepdim=True)
        elif self._what == "padding":
            more = hidden.mean(dim=1, keepdim=True)
        else:
            more = torch.randn(hidden.shape, generator=self._draw)
        out.last_hidden_state = hidden + more
        return out


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("company", "which makes another vector of a text when others of its length are beside it"),
        ("chance", "which makes another vector of a text each time"),
        ("padding", "same length"),
    ],
)
def test_what_depends_on_its_company_is_refused_by_name(
    what: str, found: str, tmp_path: Path
) -> None:
    zoo.build("ernie").save_pretrained(tmp_path)
    model = Model(opened(tmp_path), torch.device("cpu"))
    model.tower._call = Mixing(model.tower._call, what)
    with torch.inference_mode():
        if what == "padding":
            assert find_company(model, model.tower) == found
            return
        with pytest.raises(ModelError, match=rf"^model\.id: .*architecture ErnieModel, {found}$"):
            find_company(model, model.tower)


def test_the_check_takes_little(minilm: Path) -> None:
    model = Model(opened(minilm), torch.device("cpu"))
    with torch.inference_mode():
        assert find_company(model, model.tower) == "any"
        took = []
        for _ in range(3):
            began = time.process_time()
            find_company(model, model.tower)
            took.append(time.process_time() - began)
    assert min(took) < 0.3


@pytest.mark.parametrize(
    ("family", "limit"),
    # Positions from the first row of the table, past the padding's, and from its third.
    [("gpt2", 80), ("ibert", 78), ("opt", 80), ("phi3", 80), ("bert", 80)],
)
def test_the_limit_is_what_the_positions_allow(family: str, limit: int, tmp_path: Path) -> None:
    zoo.build(family).save_pretrained(tmp_path)
    assert opened(tmp_path).max_tokens == limit
    with pytest.raises(ModelError, match=rf"^model\.max_tokens: takes at most {limit} with this"):
        opened(tmp_path, max_tokens=limit + 1)


def test_a_limit_that_is_none_is_found_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family that nobody has tested it is not known where its positions begin."""
    zoo.build("ibert").save_pretrained(tmp_path)
    monkeypatch.delitem(FAMILIES, "ibert")
    with pytest.raises(ModelError, match=r"IBertModel, which fails on texts of 80 tokens \(.*\) and"
                       r" takes 78; set model\.max_tokens: 78$"):  # fmt: skip
        Model(opened(tmp_path), torch.device("cpu"))
    Model(opened(tmp_path, max_tokens=78), torch.device("cpu"))


def test_a_family_that_says_so_has_each_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.build("distilbert").save_pretrained(tmp_path)
    family = replace(FAMILIES["distilbert"], company="none", packs=False)
    monkeypatch.setitem(FAMILIES, "distilbert", family)
    encoder = Encoder(opened(tmp_path))
    sizes: list[int] = []
    states = encoder._model.tower.states

    def count(pieces: Any) -> Any:
        sizes.append(len(pieces))
        return states(pieces)

    monkeypatch.setattr(encoder._model.tower, "states", count)
    embed(encoder, draw(9, 9, 9, 5))
    assert sizes == [1] * 4
