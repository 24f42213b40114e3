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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmembed.spec import Modality, ModelError, ModelSpec, resolve_package

# Raised when the arithmetic changes, so that old tables are not continued with new vectors.
_CONTRACT = 1
# Files that decide a vector; README, training arguments and the like do not.
_DIGESTED = (".safetensors", ".json", ".txt", ".model", ".py")
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.py")
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
_FALLBACK_MAX_TOKENS = 512
# Image families whose first token stands for the whole.
_CLASS_TOKEN = frozenset(("beit", "data2vec-vision", "deit", "dinov2", "dinov3_vit", "vit"))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood, with every choice made.

    `dense` are the folders of sentence-transformers Dense modules, applied in order after pooling.
    `revision` is the hub's commit, null for a local folder. `digest` is a blake2b-128 over the
    names and contents of all files that decide a vector. `unit_size` is how many numbers of the
    model's input make one unit of its sequence: 1 for token ids, the values of a patch for pixels,
    the samples of a frame for audio.
    """

    id: str
    uri: str
    revision: str | None
    digest: str
    family: str
    weights: str
    pooling: str
    normalize: bool
    max_tokens: int
    prompt: str
    lower_case: bool
    dense: tuple[str, ...]
    dtype: str
    trust_remote_code: bool
    modality: Modality = "text"
    unit_size: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a vector; its hash is the fingerprint."""
        return {
            "contract": _CONTRACT,
            "model.revision": self.revision,
            "model.weights": self.digest,
            "model.dtype": self.dtype,
            "model.pooling": self.pooling,
            "model.normalize": self.normalize,
            "model.max_tokens": self.max_tokens,
            "model.prompt": self.prompt,
        }

    def folder(self) -> Path:
        """The folder on this machine; a hub checkpoint is fetched once per node, at its commit."""
        return _locate(self.uri, self.revision)


def open_checkpoint(spec: ModelSpec, native_bfloat16: bool) -> Checkpoint:
    """Find a checkpoint and resolve what the spec leaves open.

    Args:
        spec: The model part of the config.
        native_bfloat16: Whether the actors' device computes bfloat16 natively; decides `auto`.

    Raises:
        ModelError: No such folder, no config or weights, pickle weights, an unknown module.
    """
    uri = spec.id
    if not uri.startswith("package:") and Path(uri).exists():
        uri = str(Path(uri).resolve())
    folder = _locate(uri, spec.revision)
    modules = _read_modules(folder)
    weights = folder / modules.transformer
    config = read_config(weights)
    _check_weights(weights)
    for path in modules.dense:
        _check_weights(folder / path)
    if "model_type" not in config:
        raise ModelError(f"model.id: {weights}/config.json names no model_type")
    family = str(config["model_type"])
    limit = _position_limit(weights, config)
    if spec.max_tokens is not None and limit is not None and spec.max_tokens > limit:
        raise ModelError(
            f"model.max_tokens: takes at most {limit} with this model, got {spec.max_tokens}"
        )
    pooling = spec.pooling or modules.pooling
    normalize = spec.normalize if spec.normalize is not None else modules.normalize
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16 else "float32"
    modality = _modality(weights)
    if spec.prompt is not None and modality != "text":
        raise ModelError(f"model.prompt: {spec.id} embeds {modality}, which takes no prompt")
    if modality == "image" and pooling in ("last", "max"):
        raise ModelError(f"model.pooling: {spec.id} embeds images: takes cls or mean")
    return Checkpoint(
        id=spec.id,
        uri=uri,
        # A hub snapshot's folder is named after its commit.
        revision=folder.name if folder.parent.name == "snapshots" else None,
        digest=_digest(folder, [weights, *(folder / path for path in modules.dense)]),
        family=family,
        weights=modules.transformer,
        pooling=pooling or _default_pooling(modality, family, config),
        normalize=normalize,
        max_tokens=spec.max_tokens or modules.max_tokens or limit or _FALLBACK_MAX_TOKENS,
        prompt=_resolve_prompt(folder, spec.prompt),
        lower_case=modules.lower_case,
        dense=modules.dense,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        modality=modality,
        unit_size=_unit_size(modality, config),
    )


def _modality(folder: Path) -> Modality:
    """What a checkpoint embeds, by the processor saved with it."""
    processor = _read_json(folder / "preprocessor_config.json") or {}
    is_text = (folder / "tokenizer_config.json").is_file()
    if "image_processor_type" in processor:
        if is_text:
            raise ModelError(f"model.id: {folder} joins text and images, which is not supported")
        _check_installed("image", "PIL")
        return "image"
    # A tokenizer beside it spells out speech; it is no second input.
    if "feature_extractor_type" in processor:
        _check_installed("audio", "soundfile", "soxr")
        return "audio"
    return "text"


def _check_installed(extra: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model.id: a model of {extra} needs the package {package}: "
                f"pip install 'fmembed[{extra}]'"
            )


def _default_pooling(modality: Modality, family: str, config: dict[str, Any]) -> str:
    if modality == "image":
        return "cls" if family in _CLASS_TOKEN else "mean"
    return "last" if modality == "text" and _is_decoder_only(family, config) else "mean"


def _unit_size(modality: Modality, config: dict[str, Any]) -> int:
    if modality == "image":
        patch = config.get("patch_size") or 32
        height, width = patch if isinstance(patch, list) else (patch, patch)
        return int(height) * int(width) * 3
    if modality == "audio":
        return math.prod(config.get("conv_stride") or [320])
    return 1


def load_image_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor, on Pillow: torchvision is not needed."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        checkpoint.folder() / checkpoint.weights,
        trust_remote_code=checkpoint.trust_remote_code,
        backend="pil",
    )


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
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"model.id: no config.json in {folder}; give a transformers checkpoint")
    return config


def _locate(uri: str, revision: str | None) -> Path:
    if uri.startswith("package:"):
        path = Path(resolve_package(uri, "model.id", ModelError))
    else:
        path = Path(uri)
    if path.is_dir():
        return path
    if uri.startswith(("package:", ".", "/", "~")) or uri.count("/") != 1:
        raise ModelError(f"model.id: no such folder: {uri}; give a checkpoint's folder or a hub id")
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
            f"model.id: {uri} is no folder here and cannot be fetched from the hub "
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
    transformer, pooling, normalize, lower_case = "", None, False, False
    max_tokens = None
    dense: list[str] = []
    for module in modules:
        # Only the class name is stable: the package's layout moved between versions 2, 5 and 6.
        kind, path = str(module["type"]).rsplit(".", 1)[-1], str(module.get("path", ""))
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise ModelError(f"model.id: modules.json names a path outside the checkpoint: {path}")
        config = _read_json(folder / path / "config.json") or {}
        if kind == "Transformer":
            transformer = path
            settings = _read_json(folder / path / "sentence_bert_config.json") or {}
            max_tokens = settings.get("max_seq_length")
            lower_case = bool(settings.get("do_lower_case"))
        elif kind == "Pooling":
            pooling = _read_pooling(config)
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense" and pooling is not None and not normalize:
            dense.append(path)
        else:
            raise ModelError(
                f"model.id: the sentence-transformers module {kind} is not supported "
                "at this place; Transformer, Pooling, Dense, Normalize are, in this order"
            )
    return _Modules(transformer, pooling, normalize, max_tokens, lower_case, tuple(dense))


def _read_pooling(config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _POOLINGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    mode = {"lasttoken": "last"}.get(modes[0], modes[0])
    if len(modes) != 1 or mode not in ("cls", "mean", "last", "max"):
        raise ModelError(
            f"model.id: the checkpoint's pooling {'+'.join(map(str, modes))} is not "
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
    config = _read_json(folder / "config_sentence_transformers.json") or {}
    prompts = config.get("prompts") or {}
    if prompt is None:
        prompt = config.get("default_prompt_name")
        if prompt is not None and prompt not in prompts:
            raise ModelError(
                f"model.prompt: the checkpoint's default prompt {prompt!r} is not "
                "among its prompts; set model.prompt"
            )
    return str(prompts.get(prompt, prompt or ""))


def _position_limit(folder: Path, config: dict[str, Any]) -> int | None:
    """The most tokens the model can take, or None where neither config nor tokenizer says."""
    limits = []
    tokenizer = _read_json(folder / "tokenizer_config.json") or {}
    # An absent limit is saved as about 1e30.
    if isinstance(m := tokenizer.get("model_max_length"), int) and m < 10**7:
        limits.append(m)
    if isinstance(m := config.get("max_position_embeddings"), int) and m > 0:
        family = config.get("model_type")
        offset = int(config.get("pad_token_id") or 0) + 1 if family in _OFFSET_POSITIONS else 0
        limits.append(m - offset)
    return min(limits, default=None)


def _is_decoder_only(family: str, config: dict[str, Any]) -> bool:
    if any(str(a).endswith("ForCausalLM") for a in config.get("architectures") or ()):
        return True
    from transformers.models.auto import modeling_auto

    # BERT and its kin have a causal head too, but theirs is the masked one.
    return (
        family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.get("is_encoder_decoder")
    )


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        raise ModelError(
            f"model.id: {folder} has only pickle weights, which can run code when "
            "loaded; convert them: save_pretrained(...) writes model.safetensors"
        )
    raise ModelError(
        f"model.id: no weights (*.safetensors) in {folder}; fetch the whole checkpoint"
    )


def _digest(folder: Path, modules: list[Path]) -> str:
    # Only these folders: a training run keeps its other checkpoints beside the model.
    files = sorted(
        p
        for directory in {folder, *modules}
        for p in directory.iterdir()
        if p.suffix in _DIGESTED and p.is_file() and not p.name.startswith(".")
    )

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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ModelError(f"model.id: {path} cannot be read: {e}") from None
