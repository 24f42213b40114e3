"""What a checkpoint folder says of itself, read before any weight is loaded.

Files, digest, pooling, normalisation, prompt and length limit, from a sentence-transformers
modules.json where there is one and from the family's convention otherwise. No torch here: the
driver decides, and refuses, within a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fmembed.spec import EndpointSpec, Modality, ModelError, ModelSpec, VectorSpec, resolve_package

# The column of vectors where the config names none.
DEFAULT = "embedding"
# Raised when the arithmetic changes by more than its rounding, so that old tables are not continued
# with new vectors.
_CONTRACT = 2
# Files that decide a vector; README, training arguments and the like do not.
_DIGESTED = (
    ".safetensors", ".json", ".txt", ".model", ".py",
    ".bpe", ".codes", ".spm", ".tiktoken", ".tokenizer",
)  # fmt: skip
_DOWNLOADED = tuple(f"*{suffix}" for suffix in _DIGESTED)
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
# Far over what any checkpoint's configs and indices take.
_MAX_JSON_BYTES = 64 * 2**20
_MAX_LAYERS = 10_000
# What timm would fetch or unpickle, of the arguments that a config hands to its models.
_TIMM_LOADS = frozenset(
    ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
)
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
# Position ids of these families start after the padding id, so two positions more are needed.
_OFFSET_POSITIONS = frozenset(
    (
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)
# Text families whose tokens see each other both ways: asked before transformers' own tables, since
# importing those brings torch into the driver, 206 MiB and 1.7 s.
_BOTH_WAYS = frozenset(("bert", "deberta-v2", "distilbert", "electra", "modernbert", "nomic_bert"))
_FALLBACK_MAX_TOKENS = 512
# Families whose first token stands for the whole picture, and those with no such token, whose own
# pooled output (the mean of the map, normed as in training) does.
_CLASS_TOKEN = frozenset(
    (
        "beit",
        "data2vec-vision",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "vit",
        "vit_mae",
    )
)
_OWN_POOLER = frozenset(
    (
        "bit",
        "convnext",
        "convnextv2",
        "dinov3_convnext",
        "efficientnet",
        "regnet",
        "resnet",
        "swin",
        "swinv2",
        "timm_wrapper",
    )
)
# Models with a tower for each modality into one space.
_TOWERS: dict[str, tuple[Modality, Modality]] = {
    "align": ("image", "text"),
    "altclip": ("image", "text"),
    "chinese_clip": ("image", "text"),
    "clap": ("audio", "text"),
    "clip": ("image", "text"),
    "metaclip_2": ("image", "text"),
    "siglip": ("image", "text"),
}
# Trained on texts padded to the full length, and without a mask: its padding is part of the input.
_PADDED_TEXT = frozenset(("siglip",))
_TOKENS_ARE_FLOATS = ("float32", "float16")


@dataclass(frozen=True)
class Output:
    """One column of vectors, with every choice made; the fields are `spec.VectorSpec`'s."""

    column: str
    pooling: str
    layer: int | None
    normalize: bool
    dims: int | None
    precision: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood, with every choice made.

    `dense` are the folders of sentence-transformers Dense modules, applied in order after pooling.
    `revision` is the hub's commit, null for a local folder. `digest` is a blake2b-128 over the
    names and contents of all files that decide a vector. `unit_size` is how many numbers of the
    model's input make one unit of its sequence: 1 for token ids, the values of a patch for pixels,
    the samples of a frame for audio. `rate_hz` is what sounds are resampled to, `window_samples`
    how many of them the model takes at once, null where it takes any number.
    """

    id: str
    uri: str
    revision: str | None
    digest: str
    family: str
    weights: str
    outputs: tuple[Output, ...]
    max_tokens: int
    prompt: str
    lower_case: bool
    dense: tuple[str, ...]
    dtype: str
    trust_remote_code: bool
    modality: Modality = "text"
    unit_size: int = 1
    towers: tuple[Modality, ...] = ()
    pads_text: bool = False
    adapter: str | None = None
    adapter_digest: str | None = None
    attn_implementation: str | None = None
    compile: bool = False
    rate_hz: int = 0
    window_samples: int | None = None
    endpoint: EndpointSpec | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a vector; its hash is the fingerprint."""
        identity: dict[str, Any] = {
            "contract": _CONTRACT,
            "model.revision": self.revision,
            "model.weights": self.digest,
            "model.adapter": self.adapter_digest,
            "model.modality": self.modality,
            "model.dtype": self.dtype,
            "model.max_tokens": self.max_tokens,
            "model.prompt": self.prompt,
        }
        if self.endpoint is not None:
            # A server does not say which weights it has: its address and the name stand for them.
            identity["model.endpoint"] = [self.endpoint.base_url, self.id, self.endpoint.dimensions]
        for output in self.outputs:
            prefix = "model" if output.column == DEFAULT else f"model.outputs.{output.column}"
            choices = {k: v for k, v in asdict(output).items() if k != "column"}
            identity |= {f"{prefix}.{name}": value for name, value in choices.items()}
        return identity

    def folder(self) -> Path:
        """The folder on this machine; a hub checkpoint is fetched once per node, at its commit."""
        return _locate(self.uri, self.revision)

    def num_bytes(self) -> int:
        """What the weights take in memory; 0 for a server's."""
        if self.endpoint is not None:
            return 0
        folder = self.folder() / self.weights
        return sum(p.stat().st_size for p in _weight_files(folder, read_config(folder)))


def list_modalities(spec: ModelSpec) -> tuple[Modality, ...]:
    """What a checkpoint can embed, by the processor saved with it; more than one for two towers.

    Raises:
        ModelError: No such folder or no config in it, or a model of another kind.
    """
    if spec.endpoint is not None:
        return ("text",)
    folder = _locate(_absolute(spec.id), spec.revision)
    weights = folder / _read_modules(folder).transformer
    family = str(read_config(weights).get("model_type"))
    if family in _TOWERS:
        return _TOWERS[family]
    processor = read_processor(weights)
    if "image_processor_type" in processor or family == "timm_wrapper":
        if (weights / "tokenizer_config.json").is_file():
            raise ModelError(
                f"model.id: {spec.id} joins text and images ({family}) in a way that is not "
                f"supported; {', '.join(sorted(_TOWERS))} are"
            )
        return ("image",)
    # A tokenizer beside it spells out speech; it is no second input.
    return ("audio",) if "feature_extractor_type" in processor else ("text",)


def open_checkpoint(
    spec: ModelSpec, native_bfloat16: bool, modality: Modality | None = None
) -> Checkpoint:
    """Find a checkpoint and resolve what the spec leaves open.

    Args:
        spec: The model part of the config.
        native_bfloat16: Whether the actors' device computes bfloat16 natively; decides `auto`.
        modality: Which tower, of a model that has several; null for the first.

    Raises:
        ModelError: No such folder, no config or weights, pickle weights, an unknown module.
    """
    if spec.endpoint is not None:
        return _describe_endpoint(spec, spec.endpoint)
    uri = _absolute(spec.id)
    folder = _locate(uri, spec.revision)
    modules = _read_modules(folder)
    weights = folder / modules.transformer
    if not (weights / "config.json").is_file():
        _explain_adapter(weights)
    config = read_config(weights)
    if not isinstance(family := config.get("model_type"), str):
        raise ModelError(f"model.id: {weights}/config.json names no model_type")
    files = _weight_files(weights, config)
    for path in modules.dense:
        files += _weight_files(folder / path, {})
    _check_loads(weights, config, spec.trust_remote_code)
    modalities = list_modalities(spec)
    modality = modality or spec.modality or modalities[0]
    _check_packages(modality)
    if family == "timm_wrapper":
        _check_installed("timm", "timm", "torchvision")
    towers = modalities if len(modalities) > 1 else ()
    inner = {**config, **_part(config, _TOWER_CONFIG[modality])}
    limit = _position_limit(weights, inner) if modality == "text" else None
    if spec.max_tokens is not None and limit is not None and spec.max_tokens > limit:
        raise ModelError(
            f"model.max_tokens: takes at most {limit} with this model, got {spec.max_tokens}"
        )
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16 else "float32"
    if spec.prompt is not None and modality != "text":
        raise ModelError(f"model.prompt: {spec.id} embeds {modality}, which takes no prompt")
    default = modules.pooling or _default_pooling(modality, family, config)
    adapter = _absolute(spec.adapter) if spec.adapter else None
    rate_hz, window_samples = (
        _read_sound_limits(weights, family) if modality == "audio" else (0, None)
    )
    return Checkpoint(
        id=spec.id,
        uri=uri,
        # A hub snapshot's folder is named after its commit.
        revision=folder.name if folder.parent.name == "snapshots" else None,
        digest=_digest(
            folder,
            [weights, *(folder / path for path in modules.dense)],
            # Code may lie deeper than what is its own to name.
            files + (sorted(folder.rglob("*.py")) if spec.trust_remote_code else []),
        ),
        family=family,
        weights=modules.transformer,
        outputs=_resolve_outputs(spec, modality, default, modules.normalize, bool(towers)),
        max_tokens=spec.max_tokens or modules.max_tokens or limit or _FALLBACK_MAX_TOKENS,
        prompt=_resolve_prompt(folder, spec.prompt) if modality == "text" else "",
        lower_case=modules.lower_case,
        dense=modules.dense,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        modality=modality,
        unit_size=_unit_size(modality, family, inner),
        towers=towers,
        pads_text=family in _PADDED_TEXT and modality == "text",
        adapter=adapter,
        adapter_digest=_digest_adapter(adapter) if adapter else None,
        attn_implementation=spec.attn_implementation,
        compile=spec.compile,
        rate_hz=rate_hz,
        window_samples=window_samples,
    )


def _describe_endpoint(spec: ModelSpec, endpoint: EndpointSpec) -> Checkpoint:
    if importlib.util.find_spec("openai") is None:
        raise ModelError(
            "model.endpoint: needs the package openai: pip install 'fmembed[endpoint]'"
        )
    ours = ("revision", "adapter", "max_tokens", "pooling", "layer", "attn_implementation")
    for name in ours:
        if getattr(spec, name) is not None:
            raise ModelError(f"model.{name}: a server decides that itself; leave it out")
    return Checkpoint(
        id=spec.id,
        uri=endpoint.base_url,
        revision=None,
        digest="",
        family="endpoint",
        weights="",
        outputs=_resolve_outputs(spec, "text", "server", False, False),
        max_tokens=0,
        prompt=spec.prompt or "",
        lower_case=False,
        dense=(),
        dtype="float32",
        trust_remote_code=False,
        endpoint=endpoint,
    )


_TOWER_CONFIG = {"text": "text_config", "image": "vision_config", "audio": "audio_config"}


def _resolve_outputs(
    spec: ModelSpec, modality: Modality, default: str, normalize: bool, has_towers: bool
) -> tuple[Output, ...]:
    if has_towers:
        default, normalize = "projection", True
    given: dict[str, VectorSpec] = spec.outputs or {DEFAULT: VectorSpec()}
    outputs = []
    for column, vector in given.items():
        where = f"model.outputs.{column}" if spec.outputs else "model"

        def choose(name: str, otherwise: Any, vector: VectorSpec = vector) -> Any:
            own, common = getattr(vector, name), getattr(spec, name)
            return next((v for v in (own, common) if v is not None), otherwise)

        pooling = choose("pooling", default)
        layer = choose("layer", None)
        precision = choose("precision", "float32")
        if pooling == "projection" and not has_towers:
            raise ModelError(f"{where}.pooling: {spec.id} has no projection; pooler is its own")
        if modality == "image" and pooling in ("last", "max"):
            raise ModelError(f"{where}.pooling: {spec.id} embeds images: takes cls or mean")
        if pooling == "cls+mean" and modality != "image":
            raise ModelError(
                f"{where}.pooling: cls+mean is for images, {spec.id} embeds {modality}"
            )
        if layer is not None and pooling in ("pooler", "projection"):
            raise ModelError(f"{where}.layer: {pooling} is made of the last layer; name a pooling")
        if pooling == "tokens" and precision not in _TOKENS_ARE_FLOATS:
            raise ModelError(f"{where}.precision: tokens takes {' or '.join(_TOKENS_ARE_FLOATS)}")
        dims = choose("dims", None)
        # What the checkpoint says of normalising is said of its own pooled vector.
        own_way = pooling == default and layer is None
        outputs.append(
            Output(
                column,
                pooling,
                layer,
                bool(choose("normalize", normalize and own_way)),
                dims,
                precision,
            )
        )
    return tuple(outputs)


def _absolute(uri: str) -> str:
    if not uri.startswith("package:") and os.path.exists(uri):
        return str(Path(uri).resolve())
    return uri


def _explain_adapter(folder: Path) -> None:
    adapter = _read_object(folder / "adapter_config.json")
    if adapter is not None:
        raise ModelError(
            f"model.id: {folder} is an adapter; name it in model.adapter, and its base "
            f"({adapter.get('base_model_name_or_path')}) in model.id"
        )


def _digest_adapter(uri: str) -> str:
    if importlib.util.find_spec("peft") is None:
        raise ModelError("model.adapter: needs the package peft: pip install 'fmembed[lora]'")
    folder = _locate(uri, None, "model.adapter")
    config = _read_object(folder / "adapter_config.json", "model.adapter")
    if config is None:
        raise ModelError(f"model.adapter: no adapter_config.json in {folder}; give a LoRA adapter")
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(
            f"model.adapter: {folder} is of the kind {_short(kind)}; give a LoRA adapter"
        )
    if config.get("megatron_config"):  # peft imports the module that it names
        raise ModelError(f"model.adapter: {folder} needs Megatron, which is not supported")
    return _digest(folder, [], _weight_files(folder, {}, _ADAPTER, "model.adapter"))


def adapter_folder(checkpoint: Checkpoint) -> Path:
    """The adapter's folder on this machine."""
    assert checkpoint.adapter is not None
    return _locate(checkpoint.adapter, None, "model.adapter")


def read_processor(folder: Path) -> dict[str, Any]:
    """What the processor saved with a checkpoint says; newer versions save one file for all."""
    whole = _read_object(folder / "processor_config.json") or {}
    single = _read_object(folder / "preprocessor_config.json") or {}
    return {**_part(whole, "image_processor"), **_part(whole, "feature_extractor"), **single}


def _read_sound_limits(folder: Path, family: str) -> tuple[int, int | None]:
    """The rate that sounds are resampled to, and how many samples the model takes at once."""
    processor = read_processor(folder)
    rate_hz = _whole(processor, "sampling_rate") or 16_000
    if family == "whisper":
        return rate_hz, (_whole(processor, "chunk_length") or 30) * rate_hz
    if family == "clap":  # past this length its extractor takes a random piece
        return rate_hz, (_whole(processor, "max_length_s") or 10) * rate_hz
    if family == "audio-spectrogram-transformer":
        # Kaldi's frames: 25 ms every 10 ms; past these its extractor cuts without a word.
        frames = _whole(processor, "max_length") or 1024
        return rate_hz, (frames - 1) * rate_hz // 100 + rate_hz // 40
    return rate_hz, None


def _check_packages(modality: Modality) -> None:
    if modality == "image":
        _check_installed("image", "PIL")
    elif modality == "audio":
        _check_installed("audio", "soundfile", "soxr")


def _check_installed(extra: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model.id: this kind of model ({extra}) needs the package {package}: "
                f"pip install 'fmembed[{extra}]'"
            )


def _default_pooling(modality: Modality, family: str, config: dict[str, Any]) -> str:
    if modality == "image":
        if family in _OWN_POOLER:
            return "pooler"
        return "cls" if family in _CLASS_TOKEN else "mean"
    return "last" if modality == "text" and _is_decoder_only(family, config) else "mean"


def _unit_size(modality: Modality, family: str, config: dict[str, Any]) -> int:
    if modality == "image":
        height, *width = _wholes(config, "patch_size") or [32]
        return height * (width[0] if width else height) * 3
    if modality == "audio":
        if family in ("whisper", "clap"):
            return (_whole(config, "num_mel_bins") or 64) * 2
        if family == "audio-spectrogram-transformer":
            return (_whole(config, "frequency_stride") or 10) * (
                _whole(config, "time_stride") or 10
            )
        return math.prod(_wholes(config, "conv_stride") or [320])
    return 1


def load_image_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor, on Pillow: torchvision is not needed."""
    from transformers import AutoImageProcessor

    with loading(checkpoint.id):
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint.folder() / checkpoint.weights,
            trust_remote_code=checkpoint.trust_remote_code,
            backend="pil",
        )


def process_image(processor: Any, image: Any, is_compact: bool = False) -> Any:
    """One picture as the processor makes it for the model.

    Args:
        processor: What `load_image_processor` gave.
        image: Shape (height, width, 3), uint8.
        is_compact: Leave rescaling and normalising to the caller, where the processor can.

    Returns:
        Shape (3, height, width), a numpy array.
    """
    if hasattr(processor, "val_transforms"):  # timm's own, which knows no options
        return processor([image], return_tensors="pt")["pixel_values"][0].numpy()
    rest = {"do_rescale": False, "do_normalize": False} if is_compact else {}
    # Named, because of a picture three pixels high the processor cannot tell which axis is colour.
    batch = processor(
        images=[image], input_data_format="channels_last", return_tensors="np", **rest
    )
    return batch["pixel_values"][0]


def load_feature_extractor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own feature extractor for sounds."""
    from transformers import AutoFeatureExtractor

    with loading(checkpoint.id):
        return AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )


@contextmanager
def loading(name: str, field: str = "model.id") -> Iterator[None]:
    """What other libraries raise while they load a checkpoint, as one line.

    Raises:
        ModelError: Whatever was raised: a config can be wrong in more ways than can be checked.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as e:
        reason = next(filter(None, str(e).splitlines()), type(e).__name__)
        raise ModelError(f"{field}: {name} cannot be loaded: {reason}") from None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (avx512_bf16 or amx), from /proc/cpuinfo."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def read_config(folder: Path) -> dict[str, Any]:
    """Read a module's config.json.

    Raises:
        ModelError: It is missing or no JSON object.
    """
    config = _read_object(folder / "config.json")
    if config is None:
        raise ModelError(f"model.id: no config.json in {folder}; give a transformers checkpoint")
    return config


def _locate(uri: str, revision: str | None, field: str = "model.id") -> Path:
    if uri.startswith("package:"):
        path = Path(resolve_package(uri, field, ModelError))
    else:
        path = Path(uri)
    if os.path.isdir(path):  # unlike path.is_dir(), false of a name that is too long
        return path
    if uri.startswith(("package:", ".", "/", "~")) or uri.count("/") != 1:
        raise ModelError(f"{field}: no such folder: {uri}; give a checkpoint's folder or a hub id")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                uri, revision=revision, allow_patterns=list(_DOWNLOADED)
            )
        )
    # The hub client raises OSError, ValueError and its own HTTP errors, by version.
    except Exception as e:
        raise ModelError(
            f"{field}: {uri} is no folder here and cannot be fetched from the hub "
            f"({type(e).__name__}); check the id, the revision and the network"
        ) from None


@dataclass(frozen=True)
class _Modules:
    transformer: str = ""
    pooling: str | None = None
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    dense: tuple[str, ...] = ()


def _read_modules(folder: Path) -> _Modules:
    """Read a sentence-transformers modules.json; all defaults where there is none."""
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return _Modules()
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ModelError(f"model.id: {folder / 'modules.json'} takes a JSON list of objects")
    transformer, pooling, normalize, lower_case = "", None, False, False
    max_tokens = None
    dense: list[str] = []
    for module in modules:
        path, kind = module.get("path", ""), module.get("type")
        if not isinstance(path, str) or not isinstance(kind, str):
            raise ModelError(
                f"model.id: {folder / 'modules.json'} takes a type and a path for each module, as "
                "texts"
            )
        # Only the class name is stable: the package's layout moved between versions 2, 5 and 6.
        kind = kind.rsplit(".", 1)[-1]
        _check_inside(path, "modules.json")
        config = _read_object(folder / path / "config.json") or {}
        if kind == "Transformer":
            transformer = path
            settings = _read_object(folder / path / "sentence_bert_config.json") or {}
            max_tokens = _whole(settings, "max_seq_length")
            lower_case = bool(settings.get("do_lower_case"))
        elif kind == "Pooling":
            pooling = _read_pooling(config)
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense" and pooling is not None and not normalize:
            dense.append(path)
        else:
            raise ModelError(
                f"model.id: the sentence-transformers module {_short(kind)} is not supported "
                "at this place; Transformer, Pooling, Dense, Normalize are, in this order"
            )
    return _Modules(transformer, pooling, normalize, max_tokens, lower_case, tuple(dense))


def _read_pooling(config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _POOLINGS.items() if config.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    mode = "last" if modes[:1] == ["lasttoken"] else modes[0] if modes else None
    if len(modes) != 1 or mode not in ("cls", "mean", "last", "max"):
        raise ModelError(
            f"model.id: the checkpoint's pooling {_short(modes)} is not "
            "supported; set model.pooling to cls, mean, last or max"
        )
    if config.get("include_prompt") is False:
        raise ModelError(
            "model.id: the checkpoint leaves the prompt out of its pooling "
            "(include_prompt: false), which is not supported"
        )
    return str(mode)


def _resolve_prompt(folder: Path, prompt: str | None) -> str:
    """The prompt's text: a name that the checkpoint defines, or the text itself."""
    config = _read_object(folder / "config_sentence_transformers.json") or {}
    prompts = _part(config, "prompts")
    if prompt is None:
        prompt = config.get("default_prompt_name")
        if prompt is not None and (not isinstance(prompt, str) or prompt not in prompts):
            raise ModelError(
                f"model.prompt: the checkpoint's default prompt {_short(prompt)} is not "
                "among its prompts; set model.prompt"
            )
    return str(prompts.get(prompt or "", prompt or ""))


def _position_limit(folder: Path, config: dict[str, Any]) -> int | None:
    """The most tokens the model can take, or None where neither config nor tokenizer says."""
    limits = []
    tokenizer = _read_object(folder / "tokenizer_config.json") or {}
    # An absent limit is saved as about 1e30.
    if isinstance(m := tokenizer.get("model_max_length"), int) and 0 < m < 10**7:
        limits.append(m)
    if isinstance(m := config.get("max_position_embeddings"), int) and m > 0:
        family = config.get("model_type")
        offset = (_whole(config, "pad_token_id") or 0) + 1 if family in _OFFSET_POSITIONS else 0
        limits.append(m - offset)
    return min(limits, default=None)


def _is_decoder_only(family: str, config: dict[str, Any]) -> bool:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(
        str(a).endswith("ForCausalLM") for a in architectures
    ):
        return True
    if family in _BOTH_WAYS or family in _OFFSET_POSITIONS:
        return False
    from transformers.models.auto import modeling_auto

    # BERT and its kin have a causal head too, but theirs is the masked one.
    return (
        family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.get("is_encoder_decoder")
    )


def _weight_files(
    folder: Path, config: dict[str, Any], name: str = _WEIGHTS, field: str = "model.id"
) -> list[Path]:
    """The files that the weights are loaded from: one, or the shards that its index names.

    As transformers chooses: what the config names, else `name`, else the index beside it. A shard
    may lie in a folder below; in a hub's snapshot all files are links to elsewhere, so that the
    name alone says whether it is inside.

    Raises:
        ModelError: There are only pickles, or none; a file is named outside the folder or missing;
            one is cut or no safetensors file.
    """
    index = _read_object(folder / f"{name}.index.json", field)
    shards = _shards(index, f"{name}.index.json", field) if index is not None else []
    names = [name] if (folder / name).is_file() or not shards else shards
    if (given := config.get("transformers_weights")) is not None:
        names = [_check_weight_name(given, "config.json", field)]
        if given.endswith(".index.json"):
            names = _shards(_read_object(folder / given, field) or {}, given, field)
    files = [folder / n for n in names]
    if missing := [n for n in names if not os.path.isfile(folder / n)]:
        if names != [name]:
            raise ModelError(
                f"{field}: {folder} lacks {_short(missing[0])}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f" of its {len(names)} files of weights; fetch the whole checkpoint"
            )
        if others := sorted(p.name for p in folder.glob("*.safetensors")):
            raise ModelError(f"{field}: no {name} in {folder}, where {others[0]} is; rename it")
        if any(p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl") for p in folder.glob("*")):
            raise ModelError(
                f"{field}: {folder} has only pickle weights, which can run code when "
                f"loaded; convert them: save_pretrained(...) writes {name}"
            )
        raise ModelError(f"{field}: no weights ({name}) in {folder}; fetch the whole checkpoint")
    for file in files:
        _check_safetensors(file, field)
    return files


def _shards(index: dict[str, Any], name: str, field: str) -> list[str]:
    """The files that an index names, each once."""
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{field}: {name} has no weight_map of files; fetch the whole checkpoint")
    return sorted({_check_weight_name(file, name, field) for file in files.values()})


def _check_weight_name(name: Any, where: str, field: str) -> str:
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(f"{field}: {where} names {_short(name)}, which is no safetensors file")
    _check_inside(name, where, field)
    return name


def _check_inside(name: str, where: str, field: str = "model.id") -> None:
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute() or Path(name).is_absolute() or "\0" in name:
        raise ModelError(f"{field}: {where} names a path outside the checkpoint: {_short(name)}")


def _check_safetensors(file: Path, field: str) -> None:
    from safetensors import safe_open

    try:
        # Reads the header alone, and compares what it says with the file's size.
        with safe_open(file, framework="np") as f:
            f.keys()
    except Exception as e:  # its own kind, OSError, ValueError, by version
        raise ModelError(
            f"{field}: {file} is cut or no safetensors file ({e}); fetch it again"
        ) from None


def _check_loads(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a config that would have other libraries fetch, import or build what it should not."""
    # transformers would load it too, where peft is installed.
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model.id: {folder} holds an adapter beside the model; move adapter_config.json and "
            "its weights to a folder of their own, and name that in model.adapter"
        )
    for part in _parts(config):
        named = []
        if part.get("model_type") == "timm_wrapper":
            named = sorted(_part(part, "model_args").keys() & _TIMM_LOADS)
            if ":" in str(part.get("architecture")):
                named.append("architecture")
        backbone = part.get("backbone")
        # transformers has its config, at least, fetched from the hub; or timm's.
        if isinstance(backbone, str) and (
            "/" in backbone
            or ":" in backbone
            or not (part.get("use_timm_backbone") or part.get("model_type") == "timm_backbone")
        ):
            named.append("backbone")
        if named:
            raise ModelError(
                f"model.id: {folder}/config.json has more loaded than the weights beside it; "
                f"take out {', '.join(named)}"
            )
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for name, value in part.items():
            if name.endswith("layers") and isinstance(value, int) and value > _MAX_LAYERS:
                raise ModelError(f"model.id: {folder}/config.json has {value:,} {name}")
    if trust_remote_code:
        return
    for part in _parts(config):
        for name, value in part.items():
            if name.lstrip("_").startswith("attn_implementation") and "/" in str(value):
                raise ModelError(
                    f"model.id: {folder}/config.json has attention fetched from elsewhere "
                    f"({_short(value)}); set model.attn_implementation"
                )
    if "auto_map" in config:
        # Late, because it takes seconds: ordinary checkpoints have none.
        from transformers import CONFIG_MAPPING

        if config["model_type"] not in CONFIG_MAPPING:
            raise ModelError(
                f"model.id: {folder} runs code of its own, which is not trusted; look at it, then "
                "set model.trust_remote_code: true"
            )


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and all that are in it, however deep."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _digest(folder: Path, modules: list[Path], files: list[Path]) -> str:
    # Only these folders: a training run keeps its other checkpoints beside the model.
    found = {
        p
        for directory in {folder, *modules}
        for p in directory.iterdir()
        if p.suffix in _DIGESTED and p.is_file() and not p.name.startswith(".")
    }
    files = sorted(found | set(files))

    def digest(path: Path) -> bytes:
        hasher = hashlib.blake2b(digest_size=16)
        with path.open("rb") as f:
            while block := f.read(8 * 2**20):
                hasher.update(block)
        return hasher.digest()

    total = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock on large blocks
        for path, content in zip(files, pool.map(digest, files), strict=True):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return total.hexdigest()


def _read_json(path: Path, field: str = "model.id") -> Any:
    """A JSON file's content, null where there is none.

    Raises:
        ModelError: It cannot be read, or is no JSON.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as f:
            # Not the limit: Python makes room for what is asked for.
            content = f.read(min(path.stat().st_size, _MAX_JSON_BYTES) + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise ModelError(f"{field}: {path} is over {_MAX_JSON_BYTES:,} bytes large")
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{field}: {path} cannot be read: {e}") from None


def _read_object(path: Path, field: str = "model.id") -> dict[str, Any] | None:
    content = _read_json(path, field)
    if content is not None and not isinstance(content, dict):
        raise ModelError(f"{field}: {path} takes a JSON object, not a {type(content).__name__}")
    return content


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within a config; empty where there is none."""
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ModelError(f"model.id: the checkpoint's {name} is {_short(part)}, and no JSON object")
    return part


def _wholes(config: dict[str, Any], name: str) -> list[int]:
    """A number of a config, or a list of them; empty where there is none."""
    given = config.get(name)
    values = given if isinstance(given, list) else [given] if given else []
    for value in values:
        # Not a float, of which there are NaN and infinity; but 30.0 is what some have saved.
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole or not 0 < value < 2**31:
            raise ModelError(
                f"model.id: the checkpoint's {name} is {_short(given)}; takes whole numbers over 0"
            )
    return [int(value) for value in values]


def _whole(config: dict[str, Any], name: str) -> int | None:
    """A number of a config; null where there is none or 0."""
    values = _wholes(config, name)
    if len(values) > 1:
        raise ModelError(f"model.id: the checkpoint's {name} is a list; takes one number")
    return values[0] if values else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
