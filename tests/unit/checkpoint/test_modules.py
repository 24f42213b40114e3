"""What sentence-transformers can write into a checkpoint is followed, or refused by its name."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from conftest import SENTENCES
from encoding import embed
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, Pooling

from fmembed.checkpoint import modules as ours
from fmembed.checkpoint.modules import read_modules, resolve_prompt
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.errors import ModelError
from fmembed.inputs import open_inputs
from fmembed.spec import ModelSpec, RunSpec

FOLLOWED = {"Transformer", "Pooling", "Dense", "Normalize", "Dropout"}


def save(folder: Path, tiny_bert: Path, *after: Module, **told: Any) -> SentenceTransformer:
    model = SentenceTransformer(
        modules=[Transformer(str(tiny_bert)), *(after or [Pooling(32, "mean")])],
        device="cpu",
        **told,
    )
    model.save(str(folder))
    return model


def cosines(folder: Path, expected: np.ndarray[Any, Any]) -> Any:
    checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype="float32"), False)
    found = embed(checkpoint, SENTENCES)
    assert found.shape == expected.shape
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return (found * expected).sum(axis=1) / lengths


def edit(path: Path, **fields: Any) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**raw, **fields}))


@pytest.mark.parametrize(
    "after",
    [
        lambda: [Pooling(32, "cls")],
        lambda: [Pooling(32, "max"), Normalize()],
        lambda: [Pooling(32, "mean"), Dropout(0.5), Normalize()],
        lambda: [Pooling(32, "mean"), Dense(32, 32, use_residual=True)],
        lambda: [Pooling(32, "mean"), Dense(32, 16, use_residual=True), Normalize()],
        lambda: [Pooling(32, "mean"), Dense(32, 16, activation_function=torch.nn.Identity())],
    ],
)
def test_modules_that_are_followed(after: Any, tmp_path: Path, tiny_bert: Path) -> None:
    torch.manual_seed(1)
    model = save(tmp_path / "st", tiny_bert, *after())
    assert cosines(tmp_path / "st", model.encode(SENTENCES)).min() > 0.99999


def test_dimensions_are_cut_as_the_checkpoint_says(tmp_path: Path, tiny_bert: Path) -> None:
    model = save(tmp_path / "st", tiny_bert, truncate_dim=8)
    expected = model.encode(SENTENCES)
    assert expected.shape == (len(SENTENCES), 8)
    assert cosines(tmp_path / "st", expected).min() > 0.99999


def test_the_pooler_of_the_model_itself(tmp_path: Path, tiny_bert: Path) -> None:
    way = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    module = Transformer(
        str(tiny_bert), modality_config=way, module_output_name="sentence_embedding"
    )
    model = SentenceTransformer(modules=[module], device="cpu")
    model.save(str(tmp_path / "st"))
    assert cosines(tmp_path / "st", model.encode(SENTENCES)).min() > 0.99999


@pytest.mark.parametrize("name", ["sentence_roberta_config.json", "sentence_xlnet_config.json"])
def test_settings_by_their_old_names(name: str, tmp_path: Path, tiny_bert: Path) -> None:
    save(tmp_path / "st", tiny_bert)
    (tmp_path / "st" / "sentence_bert_config.json").unlink()
    edit(tmp_path / "st" / name, max_seq_length=5, do_lower_case=True)
    found = read_modules(tmp_path / "st")
    assert (found.max_tokens, found.lower_case) == (5, True)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("sentence_bert_config.json", {"tokenizer_args": {"do_lower_case": True}}),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 4}}}),
        ("sentence_bert_config.json", {"config_args": {"attention_probs_dropout_prob": 0.5}}),
        ("sentence_bert_config.json", {"model_args": {"add_pooling_layer": False}}),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "another"}),
        ("sentence_bert_config.json", {"query_length": 32}),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
        ("sentence_bert_config.json", {"module_output_name": "all_layer_embeddings"}),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method": "generate"}}}),
        ("1_Pooling/config.json", {"include_prompt": False}),
        ("1_Pooling/config.json", {"something": 1}),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
    ],
)
def test_settings_that_are_refused_by_name(
    file: str, told: dict[str, Any], tmp_path: Path, tiny_bert: Path
) -> None:
    save(tmp_path / "st", tiny_bert)
    read_modules(tmp_path / "st")
    edit(tmp_path / "st" / file, **told)
    (name,) = told
    with pytest.raises(ModelError, match=str(told[name]) if name == "model_type" else name):
        read_modules(tmp_path / "st")


def test_a_module_of_the_checkpoint_s_own(tmp_path: Path, tiny_bert: Path) -> None:
    save(tmp_path / "st", tiny_bert)
    modules = json.loads((tmp_path / "st" / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    for trust in (False, True):
        spec = ModelSpec(id=str(tmp_path / "st"), trust_remote_code=trust)
        with pytest.raises(ModelError, match=r"custom_st\.Transformer.*is not run"):
            open_checkpoint(spec, False)


def test_prompts_that_say_nothing(tmp_path: Path, tiny_bert: Path) -> None:
    save(tmp_path / "st", tiny_bert)
    told = {"prompts": {"document": None, "query": "q: "}}
    edit(tmp_path / "st" / "config_sentence_transformers.json", **told)
    assert resolve_prompt(tmp_path / "st", "document") == ""
    assert resolve_prompt(tmp_path / "st", "query") == "q: "


def classes() -> dict[str, type[Module]]:
    """The modules of sentence-transformers that its models are made of."""
    infos = pkgutil.walk_packages(sentence_transformers.__path__, "sentence_transformers.")
    others = (".sparse_", ".cross_", ".multi_vector")  # models of other kinds: see `model_type`
    names = [
        i.name for i in infos if ".modules." in i.name and not any(o in i.name for o in others)
    ]
    return {
        name: class_
        for module in names
        for name, class_ in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if issubclass(class_, Module) and class_.__module__ == module
    }


def test_every_class_is_followed_or_refused(tmp_path: Path, tiny_bert: Path) -> None:
    save(tmp_path / "st", tiny_bert)
    found = classes()
    assert found.keys() >= FOLLOWED | {"Router", "WordEmbeddings", "CLIPModel", "StaticEmbedding"}
    kept = json.loads((tmp_path / "st" / "modules.json").read_text())
    (tmp_path / "st" / "2_X").mkdir()
    (tmp_path / "st" / "2_X" / "config.json").write_text("{}")
    for name, class_ in found.items():
        added = {"idx": 2, "name": "2", "path": "2_X", "type": f"{class_.__module__}.{name}"}
        (tmp_path / "st" / "modules.json").write_text(json.dumps([*kept, added]))
        if name in FOLLOWED - {"Pooling"}:
            read_modules(tmp_path / "st")
        else:
            with pytest.raises(ModelError, match=f"'{name}' is not supported"):
                read_modules(tmp_path / "st")


def test_without_modules_json_the_rest_of_it_is_no_plain_checkpoint(
    tmp_path: Path, tiny_bert: Path
) -> None:
    """It would be averaged and not normalised, whatever the file said."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "st"))
    (folder / "config_sentence_transformers.json").write_text('{"__version__": {"pytorch": "2"}}')
    with pytest.raises(
        ModelError, match=r"no modules\.json, which says how its vectors are pooled"
    ):
        open_checkpoint(ModelSpec(id=str(folder), dtype="float32"), False)


def test_a_module_whose_config_is_missing_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    """Without it a pooling by the first token was taken for an average."""
    save(tmp_path / "st", tiny_bert)
    (config,) = (tmp_path / "st").glob("*_Pooling/config.json")
    config.unlink()
    with pytest.raises(ModelError, match=r"has no .*_Pooling/config\.json', and its"):
        read_modules(tmp_path / "st")


@pytest.mark.parametrize(
    ("class_", "followed", "refused"),
    [
        (Transformer, ours._TRANSFORMER_KEYS,
         {"processing_kwargs", "query_length", "document_length", "query_expansion"}),
        (Pooling, ours._POOLING_KEYS, set()),
        (Dense, ours._DENSE_KEYS, {"module_input_name", "module_output_name"}),
        (Normalize, (), {"module_input_name", "module_output_name"}),
    ],
)  # fmt: skip
def test_every_key_is_followed_or_refused(
    class_: Any, followed: tuple[str, ...], refused: set[str]
) -> None:
    """Fails where a new version of sentence-transformers writes another one."""
    assert set(class_.config_keys) <= {*followed, *refused}


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, tiny_bert: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}')
    raw = {"source": {"uri": str(source)}, "model": {"id": str(folder)}}
    spec = RunSpec.from_yaml(None, {**raw, "output": {"uri": str(tmp_path / "out")}})
    (folder / "tokenizer.json").unlink()
    open_inputs(spec)  # its vocabulary is there
    (folder / "vocab.txt").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        open_inputs(spec)


def test_code_that_is_not_run_is_told(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_bi.BiModel"})
    open_checkpoint(ModelSpec(id=str(folder)), False)
    assert "code of its own" not in capsys.readouterr().err  # it is not there
    (folder / "modeling_bi.py").write_text("")
    open_checkpoint(ModelSpec(id=str(folder)), False)
    assert "brings code of its own, which is not run" in capsys.readouterr().err
