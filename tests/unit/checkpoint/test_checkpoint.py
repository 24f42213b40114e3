"""What a checkpoint folder may say: whatever it is, a resolved checkpoint or one line that refuses.

No Ray here; where a fault shows only when the model is loaded, it is loaded in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES
from encoding import embed, window
from safetensors.numpy import load_file, save_file
from tiny import save_tiny

from fmembed.checkpoint.families import REFUSED
from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.checkpoint.processors import loading
from fmembed.errors import ModelError
from fmembed.model.encoder import Encoder
from fmembed.spec import ModelSpec
from fmembed.table.card import fingerprint

INDEX = "model.safetensors.index.json"
ST = "sentence_transformers.models."
DEEP = "[" * 100_000 + "]" * 100_000


def resolve(folder: Path, **fields: Any) -> Checkpoint:
    return open_checkpoint(ModelSpec(id=str(folder), dtype="float32", **fields), False)


def refused(folder: Path, **fields: Any) -> str:
    with pytest.raises(ModelError) as error:
        resolve(folder, **fields)
    message = str(error.value)
    assert message.startswith(("model.id: ", "model.adapter: "))
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture
def model(tmp_path: Path, tiny_bert: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def edit(path: Path, **fields: Any) -> None:
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **fields}))


def shard(folder: Path, names: tuple[str, str]) -> None:
    """Split the weights into two files, as an index names them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        part = {k: weights[k] for k in weights if weight_map[k] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_of_a_table_made_before_is_still_the_same(minilm: Path) -> None:
    checkpoint = resolve(minilm)
    assert checkpoint.digest == "7c9d4410b6459ab92a05e8ee03d3bbdb"
    assert fingerprint(checkpoint.identity) == "c9bd9f653332f9c735ef0251f2335b12"
    assert checkpoint.num_bytes() == 90_868_376


def test_shards_below_the_folder_are_part_of_the_fingerprint(model: Path, tiny_bert: Path) -> None:
    shard(model, ("one.safetensors", "sub/deeper/two.safetensors"))
    before = resolve(model)
    sizes = [(model / n).stat().st_size for n in ("one.safetensors", "sub/deeper/two.safetensors")]
    assert before.num_bytes() == sum(sizes)
    np.testing.assert_array_equal(embed(before, SENTENCES), embed(resolve(tiny_bert), SENTENCES))
    deeper = model / "sub/deeper/two.safetensors"
    content = bytearray(deeper.read_bytes())
    content[-1] ^= 1
    deeper.write_bytes(content)
    assert resolve(model).digest != before.digest


def test_a_snapshot_of_links_is_inside(model: Path, tmp_path: Path) -> None:
    """As the hub's cache has it: every file is a link to a blob elsewhere."""
    shard(model, ("one.safetensors", "sub/two.safetensors"))
    expected = resolve(model).digest
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(p for p in model.rglob("*") if p.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    assert resolve(model).digest == expected


@pytest.mark.parametrize("name", ["source.spm", "bpe.codes", "qwen.tiktoken", "vocab.bpe"])
def test_vocabularies_are_part_of_the_fingerprint(name: str, model: Path) -> None:
    before = resolve(model).digest
    (model / name).write_text("a")
    assert resolve(model).digest != before


def test_code_below_the_folder_is_part_of_the_fingerprint_where_it_may_run(model: Path) -> None:
    (model / "sub").mkdir()
    before = resolve(model, trust_remote_code=True).digest
    (model / "sub" / "layers.py").write_text("a = 1")
    assert resolve(model, trust_remote_code=True).digest != before
    assert resolve(model).digest == before


def test_one_file_goes_before_an_index_as_transformers_has_it(model: Path) -> None:
    before = resolve(model)
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "not_there.safetensors"}}))
    assert resolve(model).num_bytes() == before.num_bytes()
    Encoder(resolve(model))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../two.safetensors", "outside the checkpoint"),
        ("sub/../../two.safetensors", "outside the checkpoint"),
        ("/two.safetensors", "outside the checkpoint"),
        ("a\0.safetensors", "outside the checkpoint"),
        ("gone.safetensors", "lacks 'gone.safetensors'"),
        ("x" * 5000 + ".safetensors", "lacks 'xxx"),
        ("pytorch_model.bin", "no safetensors file"),
        ("", "no safetensors file"),
        (7, "no safetensors file"),
        (["two.safetensors"], "no safetensors file"),
        (None, "no safetensors file"),
    ],
)
def test_an_index_names_safetensors_files_inside(name: Any, reason: str, model: Path) -> None:
    shard(model, ("one.safetensors", "two.safetensors"))
    shutil.copy(model / "two.safetensors", model.parent / "two.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"")
    weight_map = {"a": "one.safetensors", "b": name}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    message = refused(model)
    assert reason in message


@pytest.mark.parametrize("value", ["../x.safetensors", "adapter_model.bin", 7, "sub/x.safetensors"])
def test_weights_that_a_config_names_are_inside_too(value: Any, model: Path) -> None:
    edit(model / "config.json", transformers_weights=value)
    assert "safetensors" in refused(model)


def test_weights_that_a_config_names_are_digested(model: Path) -> None:
    (model / "sub").mkdir()
    shutil.move(model / "model.safetensors", model / "sub" / "own.safetensors")
    edit(model / "config.json", transformers_weights="sub/own.safetensors")
    before = resolve(model)
    assert before.num_bytes() > 0
    Encoder(before)
    with (model / "sub" / "own.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    assert resolve(model).digest != before.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 100 * 2**30) + b"{}",  # a header of 100 GB
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        struct.pack("<Q", 4) + b"\xff\xfe\0\0",
        struct.pack("<Q", 60)
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(60),
        b"\x80\x04\x95pickled",
    ],
)
def test_weights_that_are_cut_or_something_else(content: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert "cut or no safetensors file" in refused(model)


def test_weights_cut_by_a_byte(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut or no safetensors file" in refused(model)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors"])
def test_weights_that_nobody_loads(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "rename it" in refused(model)


@pytest.mark.parametrize(
    ("changes", "weight", "found", "said"),
    [
        ({"max_position_embeddings": 512}, "position_embeddings", "64 x 32", "512 x 32"),
        ({"max_position_embeddings": 32}, "position_embeddings", "64 x 32", "32 x 32"),
        ({"vocab_size": 100}, "word_embeddings", "30522 x 32", "100 x 32"),
        ({"type_vocab_size": 3}, "token_type_embeddings", "2 x 32", "3 x 32"),
        ({"hidden_size": 64}, "position_embeddings", "64 x 32", "64 x 64"),
    ],
)
def test_embeddings_of_another_size_are_named_before_anything_is_loaded(
    changes: dict[str, int], weight: str, found: str, said: str, model: Path
) -> None:
    edit(model / "config.json", **changes)
    assert re.search(
        rf"the weight embeddings\.{weight}\.weight is {found}, and by config\.json it is {said}",
        refused(model),
    )


def test_other_weights_of_another_size_are_named_at_load(model: Path) -> None:
    edit(model / "config.json", intermediate_size=48)
    named = r"the weight encoder\.layer\.0\.intermediate\.dense\.\w+ is 64( x 32)?, and by"
    with pytest.raises(
        ModelError, match=rf"^model\.id: [^\n]*{named} config\.json it is 48[^\n]+$"
    ):
        Encoder(resolve(model))


@pytest.mark.parametrize("said", [1, 3])
def test_another_number_of_layers_is_named_before_anything_is_loaded(
    said: int, model: Path
) -> None:
    edit(model / "config.json", num_hidden_layers=said)
    assert re.search(
        rf"has the weights of 2 layers, and by config\.json it has {said}; fetch", refused(model)
    )


@pytest.mark.parametrize("layer", [-4, 3, 99])
def test_a_layer_that_there_is_not_is_named_before_anything_is_loaded(
    layer: int, model: Path
) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.layer: takes -3 to 2 with this model, got {layer}$"
    ):
        resolve(model, layer=layer, pooling="mean")
    assert resolve(model, layer=-3, pooling="mean").outputs[0].layer == -3


def test_layers_that_a_config_leaves_out_are_named_at_load(model: Path) -> None:
    # Of a family that nobody has tested the names are not known.
    edit(model / "config.json", num_hidden_layers=1, model_type="ernie")
    named = (
        r"has weights of layers that config\.json leaves out, encoder\.layer\.1\.\S+ first; fetch"
    )
    with pytest.raises(ModelError, match=rf"^model\.id: [^\n]*{named}[^\n]+$"):
        Encoder(resolve(model))


def test_a_config_that_leaves_the_positions_out_has_those_of_the_weights(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    (model / "config.json").write_text(json.dumps({**config, "model_type": "ernie"}))
    edit(model / "tokenizer_config.json", model_max_length=512)
    assert resolve(model).max_tokens == 64


@pytest.mark.parametrize(
    ("tokenizer", "modules", "config", "expected"),
    [
        (32, None, None, 32),
        # As sentence-transformers does: its own word stands above the tokenizer's, not the model's.
        (32, 48, None, 48),
        (32, 600, None, 64),
        (600, None, None, 64),
        (32, 48, 16, 16),
    ],
)
def test_after_how_many_tokens_a_text_is_cut(
    tokenizer: int, modules: int | None, config: int | None, expected: int, model: Path
) -> None:
    edit(model / "tokenizer_config.json", model_max_length=tokenizer)
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": modules}))
    raw = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (model / "modules.json").write_text(json.dumps(raw))
    assert resolve(model, max_tokens=config).max_tokens == expected


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_an_architecture_that_cannot_be_run_is_named(family: str, model: Path) -> None:
    edit(model / "config.json", model_type=family)
    assert f"is of the architecture {family}, which {REFUSED[family]}" in refused(model)


def test_an_architecture_that_fails_is_named(tmp_path: Path, minilm: Path) -> None:
    from transformers import NystromformerConfig, NystromformerModel

    # It takes texts of just this many tokens.
    config = NystromformerConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, segment_means_seq_len=512,
    )  # fmt: skip
    save_tiny(tmp_path, NystromformerModel, config, minilm)
    with pytest.raises(ModelError, match=r"^model\.id: .* is of the architecture "
                       r"NystromformerModel, which cannot be run: [^\n]+$"):  # fmt: skip
        Encoder(resolve(tmp_path))


def test_half_precision_is_not_chosen_for_what_has_none(model: Path) -> None:
    edit(model / "config.json", model_type="fnet")
    assert open_checkpoint(ModelSpec(id=str(model)), native_bfloat16=True).dtype == "float32"
    given = ModelSpec(id=str(model), dtype="bfloat16")
    assert open_checkpoint(given, native_bfloat16=True).dtype == "bfloat16"


def test_a_shard_that_is_cut_is_named(model: Path) -> None:
    shard(model, ("one.safetensors", "two.safetensors"))
    path = model / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "two.safetensors is cut or no safetensors file" in refused(model)


@pytest.mark.parametrize(
    ("changes", "contract"),
    [
        ({}, 2),
        # Whose rows once took part of their vectors from their company.
        ({"model_type": "fnet"}, 3),
        ({"model_type": "xlnet"}, 3),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]},
          "original_max_position_embeddings": 16}, 3),
        ({"model_type": "phi3"}, 2),
    ],
)  # fmt: skip
def test_vectors_that_were_mixed_are_not_gone_on_with(
    changes: dict[str, Any], contract: int, model: Path
) -> None:
    edit(model / "config.json", **changes)
    assert resolve(model).identity["contract"] == contract


def test_dense_modules_are_safetensors_of_the_right_size(model: Path) -> None:
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Dense", "Dense")]
    (model / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": i, "path": p, "type": f"sentence_transformers.models.{t}"}
                for i, p, t in modules
            ]
        )
    )
    dense = model / "2_Dense"
    dense.mkdir()
    (model / "1_Pooling").mkdir()
    edit(model / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    edit(dense / "config.json", in_features=32, out_features=8)
    (dense / "pytorch_model.bin").write_bytes(b"")
    assert "only pickle weights" in refused(model)
    weights = {"linear.weight": np.ones((8, 9), np.float32), "linear.bias": np.ones(8, np.float32)}
    save_file(weights, dense / "other.safetensors")
    assert "no model.safetensors" in refused(model)
    (dense / "other.safetensors").rename(dense / "model.safetensors")
    with pytest.raises(ModelError, match=r"^model\.id: .*2_Dense cannot be loaded: [^\n]+$"):
        Encoder(resolve(model))


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_are_lora_and_no_pickles(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter / "config.json")
    assert "give a LoRA adapter" in refused(model, adapter=str(adapter))
    for content in (DEEP, "[]", "7", "{"):
        (adapter / "adapter_config.json").write_text(content)
        refused(model, adapter=str(adapter))
    (adapter / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    assert "'XLORA'" in refused(model, adapter=str(adapter))
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}'
    )
    assert "Megatron" in refused(model, adapter=str(adapter))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "only pickle weights" in refused(model, adapter=str(adapter))
    # peft would load the pickle: the other file is not its own.
    save_file({"a": np.ones(1, np.float32)}, adapter / "stray.safetensors")
    assert "no adapter_model.safetensors" in refused(model, adapter=str(adapter))


def test_an_adapter_beside_the_model_is_not_loaded_with_it(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / "adapter_model.bin").write_bytes(b"")
    assert "model.adapter" in refused(model)


# --- forged JSON ----------------------------------------------------------------------------------

HUGE = "9" * 5000
GARBAGE = ["", "{", "[]", "7", '"a"', "[7]", "[null]", '{"a"', DEEP, '{"a":' * 50_000, "\0", HUGE]
FILES = [
    "config.json", "modules.json", "tokenizer_config.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "preprocessor_config.json", "processor_config.json", INDEX,
    "1_Pooling/config.json",
]  # fmt: skip


def as_sentence_transformer(folder: Path) -> None:
    modules = [
        {"path": "", "type": ST + "Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_for_json(file: str, content: str, model: Path) -> None:
    as_sentence_transformer(model)
    resolve(model)
    if (file, content) == ("modules.json", "[]"):
        content = "{}"
    (model / file).write_text(content)
    assert file in refused(model)


@pytest.mark.parametrize("file", FILES)
def test_json_that_is_no_text_or_too_large_or_a_pipe(file: str, model: Path) -> None:
    as_sentence_transformer(model)
    (model / file).unlink(missing_ok=True)
    (model / file).write_bytes(b"\xff\xfe{}")
    refused(model)
    with (model / file).open("wb") as f:
        f.truncate(2**27)
    assert "large" in refused(model)
    (model / file).unlink()
    os.mkfifo(model / file)  # reading it would wait for ever
    if file in ("config.json", "1_Pooling/config.json"):
        refused(model)
    else:
        resolve(model)


VALUES: list[Any] = [
    None, True, -1, 0, 7, 1e400, float("nan"), 10**400, "a", "", [], [7], ["a"], [None], [[]], {},
    {"a": 7}, {"a": {"b": []}}, "\x1b[2J\n", "\ud800", "../../x", "/etc",
]  # fmt: skip
FIELDS = [
    ("config.json", "model_type"), ("config.json", "text_config"), ("config.json", "architectures"),
    ("config.json", "max_position_embeddings"), ("config.json", "pad_token_id"),
    ("config.json", "num_hidden_layers"), ("config.json", "is_encoder_decoder"),
    ("config.json", "attn_implementation"), ("config.json", "transformers_weights"),
    ("tokenizer_config.json", "model_max_length"),
    ("sentence_bert_config.json", "max_seq_length"),
    ("sentence_bert_config.json", "do_lower_case"),
    ("config_sentence_transformers.json", "prompts"),
    ("config_sentence_transformers.json", "default_prompt_name"),
    ("1_Pooling/config.json", "pooling_mode"), ("1_Pooling/config.json", "include_prompt"),
    (INDEX, "weight_map"),
    ("processor_config.json", "image_processor"), ("processor_config.json", "feature_extractor"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "field"), FIELDS)
def test_values_of_any_kind(file: str, field: str, model: Path) -> None:
    """Each is taken or refused in one line; nothing else is ever raised."""
    as_sentence_transformer(model)
    path = model / file
    before = path.read_text() if path.exists() else "{}"
    resolve(model)
    for family in ("bert", "roberta"):
        for value in VALUES:
            path.write_text(before)
            if file == "config.json":
                edit(path, model_type=family)
            edit(path, **{field: value})
            with contextlib.suppress(ModelError):
                resolve(model)


@pytest.mark.parametrize("value", [v for v in VALUES if v is not None])
def test_modules_of_any_kind(value: Any, model: Path) -> None:
    good = {"path": "", "type": ST + "Transformer"}
    for module in (
        value,
        {**good, "type": value},
        {"path": ""},
        {"path": value, "type": ST + "Dense"},
    ):
        (model / "modules.json").write_text(json.dumps([good, module]))
        refused(model)


@pytest.mark.parametrize(
    "field", ["patch_size", "num_mel_bins", "conv_stride", "sampling_rate", "chunk_length"]
)
def test_numbers_of_pictures_and_sounds(field: str, tmp_path: Path, tiny_vit: Path) -> None:
    model = Path(shutil.copytree(tiny_vit, tmp_path / "model"))
    kinds = {
        "vit": {"image_processor_type": "ViTImageProcessor"},
        "whisper": {"feature_extractor_type": "WhisperFeatureExtractor"},
        "wav2vec2": {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
    }
    for family, processor in kinds.items():
        for value in VALUES:
            (model / "preprocessor_config.json").write_text(json.dumps({**processor, field: value}))
            edit(model / "config.json", model_type=family, **{field: value})
            with contextlib.suppress(ModelError):
                resolve(model)


def test_as_many_layers_as_would_fill_the_memory(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=10**9)
    assert "num_hidden_layers" in refused(model)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", DEEP),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 7}}'),
        ("special_tokens_map.json", "[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_no_rejected_row(
    file: str, content: str, model: Path
) -> None:
    (model / file).write_text(content)
    checkpoint = resolve(model)
    with pytest.raises(ModelError, match=r"^model\.id: .*cannot be loaded: [^\n]+$"):
        window(checkpoint, SENTENCES)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "a"},
        {"hidden_size": float("nan")},
        {"hidden_act": "nonsense"},
        {"vocab_size": -1},
        {"rope_parameters": []},
        {"dtype": "nonsense"},
        {"quantization_config": {"quant_method": "nonsense"}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_one_line(fields: dict[str, Any], model: Path) -> None:
    edit(model / "config.json", **fields)
    with contextlib.suppress(ModelError):
        Encoder(resolve(model))


# --- code -----------------------------------------------------------------------------------------


def own_code(folder: Path, mark: Path) -> None:
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer")
    auto_map = {name: f"evil.{name}" for name in classes}
    edit(folder / "config.json", auto_map=auto_map)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.B"]})
    for name in ("evil", "transformers", "torch", "tokenization_evil", "modeling_bert"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")


def no_answer(*_: Any) -> str:
    raise AssertionError("nobody is there to be asked")


def test_code_of_a_checkpoint_is_not_run_unless_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", no_answer)
    own_code(model, tmp_path / "mark")
    # What transformers has itself, it takes.
    assert embed(resolve(model), SENTENCES).shape == (len(SENTENCES), 32)
    edit(model / "config.json", model_type="evil")
    assert "model.trust_remote_code" in refused(model)
    assert not (tmp_path / "mark").exists()


def test_attention_that_would_be_fetched_is_refused(model: Path) -> None:
    edit(model / "config.json", attn_implementation="someone/kernel")
    assert "model.attn_implementation" in refused(model)


@pytest.mark.parametrize(
    "fields",
    [{"model_args": {"checkpoint_path": "x.pth"}}, {"architecture": "local-dir:/x"}],
    ids=str,
)
def test_timm_loads_nothing_but_the_weights_beside(
    fields: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., Any] = lambda name: name  # noqa: E731 - neither package is installed
    monkeypatch.setattr("importlib.util.find_spec", find)
    (model / "tokenizer_config.json").unlink()
    edit(model / "config.json", model_type="timm_wrapper", **fields)
    assert "take out" in refused(model)


@pytest.mark.parametrize("name", ["x" * 5000, "~", "a/b/c", "..", "/dev/null", "a/" * 3000])
def test_ids_that_are_no_folder(name: str) -> None:
    with pytest.raises(ModelError):
        open_checkpoint(ModelSpec(id=name), False)


def test_an_import_that_fails_is_told_with_its_cause() -> None:
    """Of transformers alone: `Could not import module 'BertModel'`."""
    told = r"cannot be loaded: no module \(RuntimeError: why\)"
    with pytest.raises(ModelError, match=told), loading("tiny"):
        raise ModuleNotFoundError("no module") from RuntimeError("why")
