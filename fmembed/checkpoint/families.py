"""What is known of each family of models: one record each, and what is assumed of all others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fmembed.checkpoint.files import read_processor, read_whole_number, read_whole_numbers
from fmembed.spec import Modality


@dataclass(frozen=True)
class Window:
    """How much of a sound a model takes at once: a field of its feature extractor's config.

    `default` holds where the config has no such field; both are in `unit`.
    """

    field: str
    default: int
    unit: Literal["seconds", "frames"] = "seconds"

    def num_samples(self, processor: dict[str, Any], rate_hz: int) -> int:
        """The window at this rate."""
        size = read_whole_number(processor, self.field) or self.default
        if self.unit == "seconds":
            return size * rate_hz
        # Kaldi's frames: 25 ms every 10 ms.
        return (size - 1) * rate_hz // 100 + rate_hz // 40


# Which rows of text may share a batch: any, padded where one is longer; rows of one length; none.
Company = Literal["any", "same length", "none"]


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies and its config does not say.

    The defaults are what is assumed of a family that is not in the table.

    Attributes:
        modalities: What it embeds; two for a model with a tower for each into one space. Empty: by
            the processor saved with the checkpoint.
        pooling: What stands for the whole input where the checkpoint does not say: the class token
            (cls), the model's own pooled output (pooler), its projection, the mean, or the last
            token. None: by transformers' own tables of text decoders, else the mean.
        company: Which rows may share a batch of text without a change to their vectors. None:
            nobody has tested it, and model/company.py finds out at load.
        changes_itself: A batch leaves its modules otherwise than it found them (another attention),
            so that they are put back before the next one.
        needs_float32: Half precision has not all that it computes (a Fourier transform).
        positions_after_padding: A text's position ids begin after the padding's id. A config's
            `max_position_embeddings` counts those before too.
        packs: Rows of text can lie one after another, because attention runs through transformers'
            interface and positions can be given.
        fuses: On a CPU the linear layers can be put into another layout (model/linear.py), because
            no module reads their weights by itself.
        pads_text: Trained on texts padded to the full length and without a mask: the padding is
            part of the input.
        masks_patches: Leaves random patches of a picture out, unless it is told to leave out none
            and given the order of the rest.
        window: How much of a sound it takes at once. None: any length.
        sequence: What makes one unit of a sound's sequence: the samples of one stride of all the
            convolutions in front, two mel frames, or what a spectrogram's patches are apart.
        frames: Which states are a sound's own and no padding, by a function's name in the table
            of model/audio.py.
        takes_is_longer: Its forward takes, for each sound, whether it was longer than the window.
        packages: What the model's code needs beside transformers; the first is also the name of
            the extra that brings them.
    """

    modalities: tuple[Modality, ...] = ()
    pooling: Literal["cls", "pooler", "projection", "mean", "last"] | None = None
    company: Company | None = None
    changes_itself: bool = False
    needs_float32: bool = False
    positions_after_padding: bool = False
    packs: bool = False
    fuses: bool = False
    pads_text: bool = False
    masks_patches: bool = False
    window: Window | None = None
    sequence: Literal["convolutions", "mel frames", "strides"] = "convolutions"
    frames: Literal["all", "whisper", "patches"] = "all"
    takes_is_longer: bool = False
    packages: tuple[str, ...] = ()


_ENCODER = Family(("text",), "mean", company="any")
# Padding changes what they make of a row: they mix over places, or share landmarks or windows.
_MIXER = replace(_ENCODER, company="same length")
_OFFSET = replace(_ENCODER, positions_after_padding=True)
_BERT = replace(_ENCODER, packs=True, fuses=True)
_ROBERTA = replace(_OFFSET, packs=True, fuses=True)
_DECODER = Family(("text",), "last", company="any", packs=True, fuses=True)
_VIT = Family(("image",), "cls")
# No token stands for the whole picture; the mean of the map, normed as in training, does.
_MAP = Family(("image",), "pooler")
_SPEECH = Family(("audio",), "mean")
_IMAGE_TEXT = Family(("image", "text"), "projection", company="any")

# By config.json's model_type. tests/unit/checkpoint/test_families.py compares each with plain
# transformers.
FAMILIES: dict[str, Family] = {
    # Texts
    "bart": _ENCODER,
    "bert": _BERT,
    "big_bird": replace(_MIXER, changes_itself=True),
    "camembert": _ROBERTA,
    "convbert": _MIXER,
    "data2vec-text": _OFFSET,
    "deberta-v2": _ENCODER,
    "distilbert": _BERT,
    "electra": _BERT,
    "fnet": replace(_MIXER, needs_float32=True),
    "funnel": _MIXER,
    "ibert": _OFFSET,
    "lilt": _OFFSET,
    "llama": _DECODER,
    "longformer": _OFFSET,
    "luke": _OFFSET,
    "markuplm": _OFFSET,
    "mistral": _DECODER,
    "mixtral": _DECODER,
    "mobilebert": _MIXER,
    "modernbert": _BERT,
    "mpnet": _OFFSET,
    "nomic_bert": _ENCODER,
    "nystromformer": _MIXER,
    "phi": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _OFFSET,
    "t5": _ENCODER,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _OFFSET,
    "xlnet": replace(_ENCODER, pooling="last"),
    "xmod": _OFFSET,
    "yoso": _MIXER,
    # Pictures
    "beit": _VIT,
    "bit": _MAP,
    "convnext": _MAP,
    "convnextv2": _MAP,
    "data2vec-vision": _VIT,
    "deit": _VIT,
    "dinov2": replace(_VIT, fuses=True),
    "dinov2_with_registers": _VIT,
    "dinov3_convnext": _MAP,
    "dinov3_vit": _VIT,
    "efficientnet": _MAP,
    "regnet": _MAP,
    "resnet": _MAP,
    "sam": Family(("image",), "mean"),
    "swin": _MAP,
    "swinv2": _MAP,
    "timm_wrapper": replace(_MAP, packages=("timm", "torchvision")),
    "vit": replace(_VIT, fuses=True),
    "vit_mae": replace(_VIT, masks_patches=True),
    # Sounds
    "audio-spectrogram-transformer": replace(
        _SPEECH,
        # Past these its extractor cuts without a word.
        window=Window("max_length", 1024, "frames"),
        sequence="strides",
        frames="patches",
    ),
    "hubert": replace(_SPEECH, fuses=True),
    "wav2vec2": replace(_SPEECH, fuses=True),
    "wavlm": _SPEECH,
    "whisper": replace(
        _SPEECH, window=Window("chunk_length", 30), sequence="mel frames", frames="whisper"
    ),
    # Two towers
    "align": _IMAGE_TEXT,
    "altclip": replace(_IMAGE_TEXT, positions_after_padding=True),
    "chinese_clip": _IMAGE_TEXT,
    "clap": Family(
        ("audio", "text"),
        "projection",
        company="any",
        positions_after_padding=True,
        window=Window("max_length_s", 10),  # past this its extractor takes a random piece
        sequence="mel frames",
        takes_is_longer=True,
    ),
    "clip": _IMAGE_TEXT,
    "metaclip_2": _IMAGE_TEXT,
    "siglip": replace(_IMAGE_TEXT, pads_text=True),
}
# What cannot be embedded, and why: each needs more than texts, or gives less than their states.
REFUSED = {
    "bros": "needs the place of each word on its page",
    "dpr": "gives one vector and no states of its tokens",
    "lxmert": "needs a picture beside the text",
    "perceiver": "reads bytes, and needs to be asked for its outputs",
    "udop": "needs the place of each word on its page",
    "vilt": "needs a picture beside the text",
}
# Where a model with two towers keeps what its config says of one.
TOWER_CONFIG = {"text": "text_config", "image": "vision_config", "audio": "audio_config"}


def family_of(model_type: str) -> Family:
    """What is known of a family; for one that is not in the table, what is assumed of any."""
    return FAMILIES.get(model_type, Family())


def list_two_towers() -> list[str]:
    """The families that embed two modalities into one space, sorted."""
    return sorted(name for name, family in FAMILIES.items() if len(family.modalities) > 1)


def default_pooling(modality: Modality, model_type: str, config: dict[str, Any]) -> str:
    """What stands for the whole input where neither the checkpoint nor the user says."""
    if modality == "text" and _has_causal_head(config):
        return "last"
    if (known := family_of(model_type).pooling) is not None:
        return known
    return "last" if modality == "text" and _is_decoder(model_type, config) else "mean"


def read_sound_limits(folder: Path, family: Family) -> tuple[int, int | None]:
    """The rate that sounds are resampled to, and how many samples the model takes at once."""
    processor = read_processor(folder)
    rate_hz = read_whole_number(processor, "sampling_rate") or 16_000
    return rate_hz, family.window.num_samples(processor, rate_hz) if family.window else None


def unit_size_of(modality: Modality, family: Family, config: dict[str, Any]) -> int:
    """How many numbers of the model's input make one unit of its sequence."""
    if modality == "image":
        height, *width = read_whole_numbers(config, "patch_size") or [32]
        return height * (width[0] if width else height) * 3
    if modality == "text":
        return 1
    if family.sequence == "mel frames":
        return (read_whole_number(config, "num_mel_bins") or 64) * 2
    if family.sequence == "strides":
        strides = (read_whole_number(config, f"{axis}_stride") for axis in ("frequency", "time"))
        return math.prod(stride or 10 for stride in strides)
    return math.prod(read_whole_numbers(config, "conv_stride") or [320])


def list_turns(config: dict[str, Any]) -> Iterator[int]:
    """The lengths past which rotary positions turn by other factors, those of all rows of a batch.

    LongRoPE's, as of Phi-3. (Of kinds that go on changing with the length, the limit is the turn.)
    """
    for value in config.values():
        if isinstance(value, dict):
            if value.get("rope_type", value.get("type")) == "longrope":
                turn = value.get("original_max_position_embeddings")
                turn = turn or config.get("original_max_position_embeddings")
                if isinstance(turn, int):
                    yield turn
            yield from list_turns(value)


def _has_causal_head(config: dict[str, Any]) -> bool:
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any(
        str(a).endswith("ForCausalLM") for a in architectures
    )


def _is_decoder(model_type: str, config: dict[str, Any]) -> bool:
    # Late, and only for families that the table has not: it brings torch into the driver, 206 MiB
    # and 1.7 s.
    from transformers.models.auto import modeling_auto

    # BERT and its kin have a causal head too, but theirs is the masked one.
    return (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.get("is_encoder_decoder")
    )
