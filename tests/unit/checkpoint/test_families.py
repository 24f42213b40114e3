"""Every family of the table is as plain transformers has it, row by row and without padding.

Each checkpoint is a tiny one of the family's config class with seeded weights, saved with its real
processor; each reference is the transformers call written out.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import transformers as hf
from conftest import SENTENCES
from encoding import DEVICES
from media import RATE_HZ, picture, sound
from PIL import Image
from tiny import save_tiny

from fmembed.checkpoint.families import FAMILIES
from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.model.encoder import Encoder
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.spec import ModelSpec, PreprocessSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
DECODER = {**SMALL, "vocab_size": 30522, "num_key_value_heads": 2, "max_position_embeddings": 128}
TEXTS = [*SENTENCES, "x", "A second short one."]


PICTURES = [picture(50, 40), picture(32, 32), picture(70, 91), picture(33, 64)]
SOUNDS = [sound(n) for n in (8000, 16_000, 24_000, 12_345, 40_000)]


def embed(
    checkpoint: Checkpoint, inputs: list[Any], batch_tokens: int = 300, device: str = "cpu"
) -> pa.Table:
    rows = [{"row_id": str(i), "content_hash": "0", "_input": x} for i, x in enumerate(inputs)]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([]), checkpoint.modality))
    ready = Preprocess(checkpoint, PreprocessSpec())(table)
    out = Encoder(checkpoint, device, batch_tokens=batch_tokens)(ready)
    assert out["_error"].to_pylist() == [None] * len(inputs), out["_message"].to_pylist()
    return out


def check(
    folder: Path, inputs: list[Any], reference: Callable[[Any], torch.Tensor], **spec: Any
) -> Checkpoint:
    checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype="float32", **spec), False)
    with torch.inference_mode():
        expected = [reference(x).double().reshape(-1) for x in inputs]
    spread = torch.stack(expected)
    assert (spread[0] - spread[1]).norm() > 1e-3 * spread[0].norm()  # it does tell inputs apart
    for device in DEVICES:
        agree(embed(checkpoint, inputs, device=device), expected, 0.99999)
        if device == "cuda":
            half = open_checkpoint(ModelSpec(id=str(folder), dtype="bfloat16", **spec), True)
            agree(embed(half, inputs, device=device), expected, 0.999)
    return checkpoint


def agree(out: pa.Table, expected: list[torch.Tensor], least: float) -> None:
    for vector, truth in zip(out["embedding"].to_pylist(), expected, strict=True):
        found = torch.tensor(vector, dtype=torch.float64)
        assert found.shape == truth.shape
        assert torch.nn.functional.cosine_similarity(found, truth, dim=0) > least


# --- text -----------------------------------------------------------------------------------------

# Real ones have their padding at 1, and two positions more than they take tokens.
OFFSET = {**SMALL, "vocab_size": 30522, "pad_token_id": 1, "max_position_embeddings": 130}
ENCODERS = {
    "bert": (hf.BertModel, hf.BertConfig(**SMALL)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**SMALL, vocab_size=30522, pad_token_id=0)),
    "distilbert": (
        hf.DistilBertModel, hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    ),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig(**SMALL, vocab_size=30527)),
    "camembert": (hf.CamembertModel, hf.CamembertConfig(**OFFSET)),
    "data2vec-text": (hf.Data2VecTextModel, hf.Data2VecTextConfig(**OFFSET)),
    "longformer": (hf.LongformerModel, hf.LongformerConfig(**OFFSET, attention_window=8)),
    "roberta-prelayernorm": (
        hf.RobertaPreLayerNormModel, hf.RobertaPreLayerNormConfig(**OFFSET),
    ),
    "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig(**OFFSET)),
    "xlm-roberta-xl": (hf.XLMRobertaXLModel, hf.XLMRobertaXLConfig(**OFFSET)),
    "xmod": (
        hf.XmodModel, hf.XmodConfig(**OFFSET, languages=["en_XX"], default_language="en_XX"),
    ),
    "electra": (hf.ElectraModel, hf.ElectraConfig(**SMALL, embedding_size=16)),
    "big_bird": (
        hf.BigBirdModel,
        hf.BigBirdConfig(**SMALL, vocab_size=30522, max_position_embeddings=128, block_size=4,
                         num_random_blocks=1),
    ),
    "convbert": (
        hf.ConvBertModel, hf.ConvBertConfig(**SMALL, vocab_size=30522, embedding_size=32),
    ),
    "fnet": (
        hf.FNetModel,
        hf.FNetConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=30522,
                      pad_token_id=0),
    ),
    "funnel": (
        hf.FunnelModel,
        hf.FunnelConfig(vocab_size=30522, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8,
                        d_inner=64),
    ),
    "ibert": (hf.IBertModel, hf.IBertConfig(**OFFSET)),
    "lilt": (hf.LiltModel, hf.LiltConfig(**{**OFFSET, "hidden_size": 48})),
    "luke": (hf.LukeModel, hf.LukeConfig(**OFFSET, entity_vocab_size=8, entity_emb_size=16)),
    "markuplm": (hf.MarkupLMModel, hf.MarkupLMConfig(**OFFSET)),
    "mobilebert": (
        hf.MobileBertModel,
        hf.MobileBertConfig(**SMALL, vocab_size=30522, embedding_size=32, true_hidden_size=32,
                            intra_bottleneck_size=32),
    ),
    "nystromformer": (
        hf.NystromformerModel, hf.NystromformerConfig(**SMALL, vocab_size=30522),
    ),
    "yoso": (hf.YosoModel, hf.YosoConfig(**SMALL, vocab_size=30522)),
    "deberta-v2": (
        hf.DebertaV2Model,
        hf.DebertaV2Config(**SMALL, vocab_size=30522, relative_attention=True, position_buckets=16,
                           pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                           share_att_key=True, position_biased_input=False),
    ),
    "nomic_bert": (hf.NomicBertModel, hf.NomicBertConfig(**SMALL, head_dim=8)),
    "modernbert": (
        hf.ModernBertModel,
        hf.ModernBertConfig(**SMALL, vocab_size=30522, pad_token_id=0, cls_token_id=101,
                            sep_token_id=102, global_attn_every_n_layers=2, local_attention=8),
    ),
    "t5": (
        hf.T5EncoderModel,
        hf.T5Config(vocab_size=30522, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    ),
    "bart": (
        hf.BartModel,
        hf.BartConfig(vocab_size=30522, d_model=32, encoder_layers=2, decoder_layers=1,
                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                      decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0),
    ),
}  # fmt: skip
DECODERS = {
    "llama": (hf.LlamaModel, hf.LlamaConfig(**DECODER)),
    "mistral": (hf.MistralModel, hf.MistralConfig(**DECODER, sliding_window=16)),
    "phi": (hf.PhiModel, hf.PhiConfig(**DECODER)),
    "qwen2": (hf.Qwen2Model, hf.Qwen2Config(**DECODER)),
    "qwen3": (hf.Qwen3Model, hf.Qwen3Config(**DECODER, head_dim=8)),
    "mixtral": (
        hf.MixtralModel, hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
def test_text_encoders_average(family: str, tmp_path: Path, minilm: Path) -> None:
    cls, config = ENCODERS[family]
    model = save_tiny(tmp_path, cls, config, minilm)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)

    def reference(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=checkpoint_limit, return_tensors="pt")
        encoder = model.get_encoder() if family == "bart" else model
        return encoder(input_ids=ids["input_ids"]).last_hidden_state[0].mean(dim=0)

    checkpoint_limit = open_checkpoint(ModelSpec(id=str(tmp_path)), False).max_tokens
    assert check(tmp_path, TEXTS, reference).outputs[0].pooling == "mean"


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders_take_the_last_token(
    family: str, padding_side: str, tmp_path: Path, minilm: Path
) -> None:
    cls, config = DECODERS[family]
    model = save_tiny(tmp_path, cls, config, minilm)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": padding_side}))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == padding_side

    def reference(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
        return model(input_ids=ids).last_hidden_state[0, -1]

    assert check(tmp_path, TEXTS, reference).outputs[0].pooling == "last"


LETTERS = string.ascii_lowercase
NAMES = ["input_ids", "token_type_ids", "attention_mask"]


def save_xlnet(folder: Path, names: list[str]) -> tuple[Any, Any]:
    """A model and its tokenizer, whose class token comes last and is of segment 2."""
    marks = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
    pieces = [*((mark, 0.0) for mark in marks), ("\u2581", -2.0), *((x, -3.0) for x in LETTERS)]
    tokenizer = hf.XLNetTokenizer(vocab=pieces, model_input_names=names)
    config = hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)
    model = save_tiny(folder, hf.XLNetModel, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("names", [NAMES, [NAMES[0], NAMES[2]]], ids=["given", "not given"])
def test_segment_ids_are_passed_where_the_tokenizer_gives_them(
    names: list[str], tmp_path: Path
) -> None:
    model, tokenizer = save_xlnet(tmp_path, names)
    texts = ["goal", "a short one", "a longer one than that", "shares fell by four per cent"]

    def reference(text: str, **more: Any) -> torch.Tensor:
        batch = tokenizer(text, return_tensors="pt", **more)
        return model(**batch).last_hidden_state[0, -1]

    with torch.inference_mode():
        both = [reference(texts[1], return_token_type_ids=given) for given in (True, False)]
    assert torch.nn.functional.cosine_similarity(*both, dim=0) < 0.99
    check(tmp_path, texts, reference)
    # The chunks of a text are as texts of their own.
    checkpoint = open_checkpoint(ModelSpec(id=str(tmp_path), dtype="float32"), False)
    table = pa.Table.from_pylist(
        [{"row_id": "0", "content_hash": "0", "_input": texts[3]}],
        schema=row_schema(pa.schema([])),
    )
    ready = Preprocess(checkpoint, PreprocessSpec(chunk_tokens=8))(table)
    out = Encoder(checkpoint, pieces_are_rows=True)(ready)
    (vectors,), (spans,) = out["embedding"].to_pylist(), ready["piece_spans"].to_pylist()
    assert len(vectors) > 2
    for vector, (start, stop) in zip(vectors, spans, strict=True):
        with torch.inference_mode():
            expected = reference(texts[3][start:stop])
        found = torch.tensor(vector)
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99999
    assert out["num_units"].to_pylist() == [sum(ready["piece_units"].to_pylist()[0])]


def test_segment_ids_that_are_not_nought_reach_packed_models_too(
    tmp_path: Path, minilm: Path
) -> None:
    model = save_tiny(tmp_path, *ENCODERS["bert"], minilm)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    for part in saved["post_processor"]["single"]:
        next(iter(part.values()))["type_id"] = 1
    path.write_text(json.dumps(saved))
    # BERT's own class would write that part anew.
    path = tmp_path / "tokenizer_config.json"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": NAMES}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)

    def reference(text: str) -> torch.Tensor:
        batch = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        assert batch["token_type_ids"].all()
        return model(**batch).last_hidden_state[0].mean(dim=0)

    check(tmp_path, TEXTS, reference)


def test_an_instruction_goes_before_every_text(tmp_path: Path, minilm: Path) -> None:
    model = save_tiny(tmp_path, *DECODERS["qwen3"], minilm)
    prompts = {"prompts": {"query": "Instruct: find\nQuery: "}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)

    def reference(text: str) -> torch.Tensor:
        ids = tokenizer("Instruct: find\nQuery: " + text, truncation=True, max_length=128,
                        return_tensors="pt")  # fmt: skip
        return model(input_ids=ids["input_ids"]).last_hidden_state[0, -1]

    check(tmp_path, TEXTS, reference, prompt="query")


def test_a_lora_adapter_is_merged(tmp_path: Path, minilm: Path) -> None:
    import peft

    model = save_tiny(tmp_path / "base", *DECODERS["llama"], minilm)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")

    def reference(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
        return adapted(input_ids=ids).last_hidden_state[0, -1]

    plain = open_checkpoint(ModelSpec(id=str(tmp_path / "base"), dtype="float32"), False)
    merged = check(tmp_path / "base", TEXTS, reference, adapter=str(tmp_path / "adapter"))
    assert merged.identity["model.adapter"] != plain.identity["model.adapter"] is None


# --- images ---------------------------------------------------------------------------------------

VISION = {**SMALL, "image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
EFFICIENT = {
    "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 3],
    "in_channels": [32, 16], "out_channels": [16, 32], "depthwise_padding": [], "strides": [1, 2],
    "num_block_repeats": [1, 1], "expand_ratios": [1, 6],
}  # fmt: skip
SIZE = {"height": 32, "width": 32}
CROPS = hf.ConvNextImageProcessorPil(size={"shortest_edge": 32})


def token(out: Any) -> torch.Tensor:
    return out.last_hidden_state[0, 0]


def pooled(out: Any) -> torch.Tensor:
    return out.pooler_output[0].flatten()


IMAGES: dict[str, tuple[Any, Any, Any, str, Callable[[Any], torch.Tensor]]] = {
    "vit": (hf.ViTModel, hf.ViTConfig(**VISION), hf.ViTImageProcessorPil(size=SIZE), "cls", token),
    "beit": (
        hf.BeitModel, hf.BeitConfig(**VISION, use_relative_position_bias=True),
        hf.BeitImageProcessorPil(size=SIZE, crop_size=SIZE), "cls", token,
    ),
    "dinov2": (
        hf.Dinov2Model, hf.Dinov2Config(**VISION),
        hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE), "cls", token,
    ),
    "data2vec-vision": (
        hf.Data2VecVisionModel, hf.Data2VecVisionConfig(**VISION, use_relative_position_bias=True),
        hf.BeitImageProcessorPil(size=SIZE, crop_size=SIZE), "cls", token,
    ),
    "deit": (
        hf.DeiTModel, hf.DeiTConfig(**VISION), hf.DeiTImageProcessorPil(size=SIZE, crop_size=SIZE),
        "cls", token,
    ),
    "dinov2_with_registers": (
        hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=2),
        hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE), "cls", token,
    ),
    "dinov3_vit": (
        hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**VISION, num_register_tokens=2),
        hf.ViTImageProcessorPil(size=SIZE), "cls", token,
    ),
    "swin": (
        hf.SwinModel,
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
                      window_size=4),
        hf.ViTImageProcessorPil(size=SIZE), "pooler", pooled,
    ),
    "swinv2": (
        hf.Swinv2Model,
        hf.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
                        window_size=4),
        hf.ViTImageProcessorPil(size=SIZE), "pooler", pooled,
    ),
    "convnext": (
        hf.ConvNextModel, hf.ConvNextConfig(**STAGES, num_stages=2), CROPS, "pooler", pooled,
    ),
    "convnextv2": (
        hf.ConvNextV2Model, hf.ConvNextV2Config(**STAGES, num_stages=2), CROPS, "pooler", pooled,
    ),
    "dinov3_convnext": (
        hf.DINOv3ConvNextModel, hf.DINOv3ConvNextConfig(**STAGES), CROPS, "pooler", pooled,
    ),
    "resnet": (
        hf.ResNetModel, hf.ResNetConfig(**STAGES, embedding_size=16, layer_type="basic"), CROPS,
        "pooler", pooled,
    ),
    "regnet": (
        hf.RegNetModel, hf.RegNetConfig(**STAGES, embedding_size=16, groups_width=8), CROPS,
        "pooler", pooled,
    ),
    "bit": (
        hf.BitModel, hf.BitConfig(**STAGES, embedding_size=16, num_groups=4),
        hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE), "pooler", pooled,
    ),
    "efficientnet": (
        hf.EfficientNetModel,
        # The default of 0.02 makes outputs of 1e-23.
        hf.EfficientNetConfig(**EFFICIENT, hidden_dim=1280, initializer_range=0.2),
        hf.EfficientNetImageProcessorPil(size=SIZE), "pooler", pooled,
    ),
}  # fmt: skip


def pixels_of(processor: Any, content: bytes) -> Any:
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return processor(images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("family", IMAGES)
def test_images(family: str, tmp_path: Path) -> None:
    cls, config, processor, pooling, take = IMAGES[family]
    model = save_tiny(tmp_path, cls, config)
    processor.save_pretrained(tmp_path)
    reference = lambda content: take(model(pixel_values=pixels_of(processor, content)))  # noqa: E731
    assert check(tmp_path, PICTURES, reference).outputs[0].pooling == pooling


@pytest.mark.parametrize(
    ("family", "num_prefix"),
    [("dinov2", 1), ("dinov2_with_registers", 3), ("dinov3_vit", 3), ("deit", 2)],
)
def test_class_token_and_mean_of_patches(family: str, num_prefix: int, tmp_path: Path) -> None:
    cls, config, processor, *_ = IMAGES[family]
    model = save_tiny(tmp_path, cls, config)
    processor.save_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        hidden = model(pixel_values=pixels_of(processor, content)).last_hidden_state[0]
        return torch.cat([hidden[0], hidden[num_prefix:].mean(dim=0)])

    check(tmp_path, PICTURES, reference, pooling="cls+mean")


def test_a_processor_saved_under_its_old_name_is_no_sounds(tmp_path: Path) -> None:
    cls, config, processor, *_ = IMAGES["deit"]
    model = save_tiny(tmp_path, cls, config)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    del saved["image_processor_type"]
    path.write_text(json.dumps({**saved, "feature_extractor_type": "DeiTFeatureExtractor"}))
    reference = lambda content: token(model(pixel_values=pixels_of(processor, content)))  # noqa: E731
    assert check(tmp_path, PICTURES, reference).modality == "image"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_mae_sees_every_patch_in_order(pooling: str, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["intermediate_size"] = 32
    config = hf.ViTMAEConfig(**VISION, **{f"decoder_{k}": v for k, v in small.items()})
    save_tiny(tmp_path, hf.ViTMAEModel, config)
    processor = hf.ViTImageProcessorPil(size=SIZE)
    processor.save_pretrained(tmp_path)
    # The encoder by its parts, without the masking in between.
    model = hf.ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()

    def reference(content: bytes) -> torch.Tensor:
        parts = model.embeddings
        patches = parts.patch_embeddings(pixels_of(processor, content))
        patches = patches + parts.position_embeddings[:, 1:]
        first = (parts.cls_token + parts.position_embeddings[:, :1]).expand(1, -1, -1)
        hidden = torch.cat([first, patches], dim=1)
        for layer in model.layers:
            hidden = layer(hidden, None)
        hidden = model.layernorm(hidden)[0]
        return hidden[0] if pooling == "cls" else hidden[1:].mean(dim=0)

    check(tmp_path, PICTURES, reference, pooling=pooling)


def test_sam_gives_the_mean_of_its_map(tmp_path: Path) -> None:
    config = hf.SamConfig(
        vision_config=hf.SamVisionConfig(
            hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4,
            image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=64,
            initializer_range=0.2,  # the default of 1e-10 leaves nothing to compare
        ),
        prompt_encoder_config=hf.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8,
                                                        mask_input_channels=4),
        mask_decoder_config=hf.SamMaskDecoderConfig(hidden_size=16, mlp_dim=32,
                                                    num_hidden_layers=1, num_attention_heads=2,
                                                    iou_head_hidden_dim=16),
    )  # fmt: skip
    model = save_tiny(tmp_path, hf.SamModel, config)
    processor = hf.SamImageProcessorPil(size={"longest_edge": 64},
                                        pad_size={"height": 64, "width": 64})  # fmt: skip
    processor.save_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        map_ = model.vision_encoder(pixels_of(processor, content)).last_hidden_state[0]
        return map_.mean(dim=(1, 2))

    check(tmp_path, PICTURES, reference)


# timm imports torchvision, whose wheels bring gigabytes of CUDA: neither is in the test extra.
@pytest.mark.skipif(
    not hf.utils.is_timm_available() or not hf.utils.is_torchvision_available(),
    reason="timm and torchvision are not installed",
)
def test_timm_checkpoints_pool_as_timm_does(tmp_path: Path) -> None:
    eye = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
           "interpolation": "bilinear"}  # fmt: skip
    config = hf.TimmWrapperConfig.from_dict(
        {"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": eye}
    )
    model = save_tiny(tmp_path, hf.TimmWrapperModel, config)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return model(processor(image, return_tensors="pt")["pixel_values"]).pooler_output[0]

    assert check(tmp_path, PICTURES, reference).outputs[0].pooling == "pooler"


# --- two towers -----------------------------------------------------------------------------------


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector.double(), dim=-1)


READING = {
    **SMALL, "vocab_size": 30522, "max_position_embeddings": 16, "bos_token_id": 101,
    "eos_token_id": 102, "pad_token_id": 0,
}  # fmt: skip
TWO_TOWERS = {
    "align": (
        hf.AlignModel,
        hf.AlignConfig(text_config=READING, vision_config={**EFFICIENT, "hidden_dim": 32},
                       projection_dim=32),
        hf.EfficientNetImageProcessorPil(size=SIZE),
    ),
    "altclip": (
        hf.AltCLIPModel,
        hf.AltCLIPConfig(text_config={**READING, "max_position_embeddings": 18, "pad_token_id": 1,
                                      "project_dim": 32},
                         vision_config=VISION, projection_dim=24),
        hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE),
    ),
    "chinese_clip": (
        hf.ChineseCLIPModel,
        hf.ChineseCLIPConfig(text_config=READING, vision_config=VISION, projection_dim=24),
        hf.ChineseCLIPImageProcessorPil(size=SIZE, crop_size=SIZE),
    ),
    "metaclip_2": (
        hf.MetaClip2Model,
        hf.MetaClip2Config(text_config=READING, vision_config=VISION, projection_dim=24),
        hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TWO_TOWERS)
def test_two_towers_project_into_one_space(family: str, tmp_path: Path, minilm: Path) -> None:
    cls, config, processor = TWO_TOWERS[family]
    model = save_tiny(tmp_path, cls, config, minilm)
    processor.save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)

    def image(content: bytes) -> torch.Tensor:
        return unit(model.get_image_features(pixels_of(processor, content)).pooler_output[0])

    def text(words: str) -> torch.Tensor:
        ids = tokenizer(words, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        return unit(model.get_text_features(input_ids=ids).pooler_output[0])

    check(tmp_path, PICTURES, image, modality="image")
    read = check(tmp_path, TEXTS, text, modality="text")
    assert (read.max_tokens, read.outputs[0].pooling) == (16, "projection")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_clip_and_siglip_have_two_towers_into_one_space(
    family: str, tmp_path: Path, minilm: Path
) -> None:
    import tiny

    save = {"clip": tiny.save_clip, "siglip": tiny.save_siglip}[family]
    save(tmp_path, minilm)
    model = hf.AutoModel.from_pretrained(tmp_path).eval()
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    padding = "max_length" if family == "siglip" else False

    def image(content: bytes) -> torch.Tensor:
        return unit(model.get_image_features(pixels_of(processor, content)).pooler_output[0])

    def text(words: str) -> torch.Tensor:
        ids = tokenizer(words, truncation=True, padding=padding, max_length=16,
                        return_tensors="pt")  # fmt: skip
        return unit(model.get_text_features(input_ids=ids["input_ids"]).pooler_output[0])

    seen = check(tmp_path, PICTURES, image, modality="image")
    read = check(tmp_path, TEXTS, text, modality="text")
    assert {o.pooling for o in (*seen.outputs, *read.outputs)} == {"projection"}
    assert seen.outputs[0].normalize
    assert seen.identity != read.identity

    # Not the projection, but the states of one tower.
    def patches(content: bytes) -> torch.Tensor:
        hidden = model.vision_model(pixel_values=pixels_of(processor, content)).last_hidden_state
        return hidden[0, 1 if family == "clip" else 0 :].mean(dim=0)

    check(tmp_path, PICTURES, patches, modality="image", pooling="mean")


def test_clap_has_a_tower_for_sounds_and_one_for_texts(tmp_path: Path, minilm: Path) -> None:
    import tiny

    tiny.save_clap(tmp_path, minilm)
    model = hf.ClapModel.from_pretrained(tmp_path).eval()
    extractor = hf.ClapFeatureExtractor.from_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)

    def audio(content: bytes) -> torch.Tensor:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        batch = extractor(samples, sampling_rate=RATE_HZ, return_tensors="pt")
        return unit(model.get_audio_features(**batch).pooler_output[0])

    def text(words: str) -> torch.Tensor:
        ids = tokenizer(words, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        return unit(model.get_text_features(input_ids=ids).pooler_output[0])

    check(tmp_path, SOUNDS, audio)
    check(tmp_path, TEXTS, text, modality="text", max_tokens=64)
    # Of 130 positions one is the padding's.
    assert open_checkpoint(ModelSpec(id=str(tmp_path), modality="text"), False).max_tokens == 129


# --- audio ----------------------------------------------------------------------------------------

SPEECH = {
    **SMALL, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
WAVES = {
    "wav2vec2": (hf.Wav2Vec2Model, hf.Wav2Vec2Config),
    "hubert": (hf.HubertModel, hf.HubertConfig),
    "wavlm": (hf.WavLMModel, hf.WavLMConfig),
}


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", WAVES)
def test_speech_encoders_average_their_frames(family: str, norm: str, tmp_path: Path) -> None:
    cls, config = WAVES[family]
    options = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    model = save_tiny(tmp_path, cls, config(**SPEECH, **options))
    extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    extractor.save_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        batch = extractor(samples, sampling_rate=RATE_HZ, return_tensors="pt")
        return model(batch["input_values"]).last_hidden_state[0].mean(dim=0)

    check(tmp_path, SOUNDS, reference)


def test_whisper_averages_the_frames_of_the_sound(tmp_path: Path) -> None:
    config = hf.WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
        max_source_positions=1500, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = save_tiny(tmp_path, hf.WhisperModel, config)
    extractor = hf.WhisperFeatureExtractor()
    extractor.save_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        batch = extractor(samples, sampling_rate=RATE_HZ, return_tensors="pt",
                          return_attention_mask=True)  # fmt: skip
        hidden = model.get_encoder()(batch["input_features"]).last_hidden_state[0]
        # The extractor's own mask says which mel frames are the sound's; two make a state.
        num_frames = int(batch["attention_mask"].sum())
        return hidden[: (num_frames + 1) // 2].mean(dim=0)

    check(tmp_path, SOUNDS, reference)


def test_ast_averages_the_patches_of_the_sound(tmp_path: Path) -> None:
    config = hf.ASTConfig(**SMALL, patch_size=16, num_mel_bins=64, max_length=300)
    model = save_tiny(tmp_path, hf.ASTModel, config)
    extractor = hf.ASTFeatureExtractor(num_mel_bins=64, max_length=300)
    extractor.save_pretrained(tmp_path)

    def reference(content: bytes) -> torch.Tensor:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        values = extractor(samples, sampling_rate=RATE_HZ, return_tensors="pt")["input_values"]
        hidden = model(values).last_hidden_state[0, 2:]
        by_time = hidden.reshape((64 - 16) // 10 + 1, (300 - 16) // 10 + 1, -1)
        num_frames = (len(samples) - 400) // 160 + 1
        inside = [t for t in range(by_time.shape[1]) if t * 10 < num_frames]
        return by_time[:, inside].mean(dim=(0, 1))

    check(tmp_path, SOUNDS, reference)


# --- the table ------------------------------------------------------------------------------------

ALONE = {
    "audio-spectrogram-transformer": test_ast_averages_the_patches_of_the_sound,
    "clap": test_clap_has_a_tower_for_sounds_and_one_for_texts,
    "clip": test_clip_and_siglip_have_two_towers_into_one_space,
    "sam": test_sam_gives_the_mean_of_its_map,
    "siglip": test_clip_and_siglip_have_two_towers_into_one_space,
    "timm_wrapper": test_timm_checkpoints_pool_as_timm_does,
    "vit_mae": test_mae_sees_every_patch_in_order,
    "whisper": test_whisper_averages_the_frames_of_the_sound,
    "xlnet": test_segment_ids_are_passed_where_the_tokenizer_gives_them,
}
CASES: dict[str, Any] = {**ENCODERS, **DECODERS, **IMAGES, **TWO_TOWERS, **WAVES, **ALONE}


def test_every_family_of_the_table_has_a_case() -> None:
    assert sorted(CASES) == sorted(FAMILIES)
    tables = (ENCODERS, DECODERS, IMAGES, TWO_TOWERS)
    for name, (_, config, *_) in ((n, case) for table in tables for n, case in table.items()):
        assert config.model_type == name
    assert all(config.model_type == name for name, (_, config) in WAVES.items())


def test_the_facts_of_a_family_agree() -> None:
    for family in FAMILIES.values():
        # Else the driver would ask transformers' tables, and bring torch in.
        assert family.modalities
        assert family.pooling
        assert (len(family.modalities) == 2) == (family.pooling == "projection")
        assert family.fuses or not family.packs
        # Else it would be looked for at each load.
        assert (family.company is not None) == ("text" in family.modalities)
