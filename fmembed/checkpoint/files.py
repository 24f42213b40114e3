"""A checkpoint's files: found, checked, digested. Nothing here loads a weight."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from fmembed.errors import ModelError
from fmembed.spec import Modality
from fmembed.storage import resolve_package, tell

# Files that decide a vector; README, training arguments and the like do not.
_DIGESTED = (
    ".safetensors", ".json", ".txt", ".model", ".py",
    ".bpe", ".codes", ".spm", ".tiktoken", ".tokenizer",
)  # fmt: skip
_DOWNLOADED = tuple(f"*{suffix}" for suffix in _DIGESTED)
_WEIGHTS_SUFFIX = ".safetensors"
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
# Far over what any checkpoint's configs and indices take.
_MAX_JSON_BYTES = 64 * 2**20
_MAX_LAYERS = 10_000
# What a tokenizer keeps its words in, and those that have none: they count characters or bytes.
_VOCABULARY = re.compile(
    r"tokenizer\.json|tekken\.json|vocab.*\.(?:txt|json)|.+\.(?:model|spm|bpe|codes|tiktoken|tokenizer)"
)
# Where a checkpoint says how pictures and sounds are prepared, newer versions' file first.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
# What timm would fetch or unpickle, of the arguments that a config hands to its models.
_TIMM_LOADS = frozenset(
    ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
)


def absolute_uri(uri: str) -> str:
    """A local folder's absolute path; a package's or a hub's id as it is."""
    if not uri.startswith("package:") and os.path.exists(uri):
        return str(Path(uri).resolve())
    return uri


def explain_adapter(folder: Path) -> None:
    """Say so where a folder without a model holds an adapter.

    Raises:
        ModelError: It does.
    """
    adapter = read_object(folder / "adapter_config.json")
    if adapter is not None:
        raise ModelError(
            f"model.id: {folder} is an adapter; name it in model.adapter, and its base "
            f"({adapter.get('base_model_name_or_path')}) in model.id"
        )


def check_can_adapt() -> None:
    """Make sure that LoRA adapters can be loaded.

    Raises:
        ModelError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("model.adapter: needs the package peft: pip install 'fmembed[lora]'")


def digest_adapter(folder: Path) -> str:
    """The digest of a LoRA adapter's files, as `digest_files` makes it.

    Raises:
        ModelError: The folder holds no LoRA adapter that peft loads safely.
    """
    config = read_object(folder / "adapter_config.json", "model.adapter")
    if config is None:
        raise ModelError(f"model.adapter: no adapter_config.json in {folder}; give a LoRA adapter")
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(
            f"model.adapter: {folder} is of the kind {shorten(kind)}; give a LoRA adapter"
        )
    if config.get("megatron_config"):  # peft imports the module that it names
        raise ModelError(f"model.adapter: {folder} needs Megatron, which is not supported")
    return digest_files(folder, [], list_weight_files(folder, {}, _ADAPTER, "model.adapter"))


def read_processor(folder: Path) -> dict[str, Any]:
    """What the processor saved with a checkpoint says; newer versions save one file for all."""
    whole, single = (read_object(folder / name) or {} for name in _PROCESSORS)
    return {
        **read_part(whole, "image_processor"),
        **read_part(whole, "feature_extractor"),
        **single,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read a module's config.json.

    Raises:
        ModelError: It is missing or no JSON object.
    """
    config = read_object(folder / "config.json")
    if config is None:
        raise ModelError(f"model.id: no config.json in {folder}; give a transformers checkpoint")
    return config


def locate(uri: str, revision: str | None, field: str = "model.id", hub: str | None = None) -> Path:
    """The folder on this machine; a checkpoint of the hub is fetched where it is not cached.

    By a commit the hub is asked for nothing that is here; several processes wait for the one that
    fetches a file. One that is not as long as the hub says is fetched anew.

    Args:
        uri: A folder, `package:` and a path in an installed package, or a hub id.
        revision: Of a hub id.
        field: What a message names.
        hub: Where a mirror of the hub is; None as the environment says (HF_ENDPOINT).

    Raises:
        ModelError: There is no such folder, and the hub does not give one, or not whole.
    """
    if uri.startswith("package:"):
        path = Path(resolve_package(uri, field, ModelError))
    else:
        path = Path(uri)
    if os.path.isdir(path):  # unlike path.is_dir(), false of a name that is too long
        return path
    if uri.startswith(("package:", ".", "/", "~")) or uri.count("/") != 1:
        # Names of the hub's first years have no owner any more, and sentence-transformers adds its.
        is_name = not uri.startswith(("package:", ".", "/", "~")) and "/" not in uri
        owner = f", which has its owner in front: sentence-transformers/{uri}?" if is_name else ""
        raise ModelError(
            f"{field}: no such folder: {uri}; give a checkpoint's folder or a hub id{owner}"
        )
    import huggingface_hub

    def fetch() -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                uri, revision=revision, allow_patterns=list(_DOWNLOADED), endpoint=hub
            )
        )

    try:
        folder = fetch()
        if cut := _list_cut(uri, folder):
            for path in cut:  # the link, and what it leads to: else it is taken for whole
                Path(os.path.realpath(path)).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            folder = fetch()
            if cut := _list_cut(uri, folder):
                raise ModelError(
                    f"{field}: {cut[0].name} of {uri} is not as long as the hub says, as of a "
                    "download that broke off; fetch the checkpoint again"
                )
        return folder
    except ModelError:
        raise
    # The hub client raises OSError, ValueError and its own HTTP errors, by version.
    except Exception as e:
        raise ModelError(
            f"{field}: {uri} is no folder here and cannot be fetched from the hub "
            f"({type(e).__name__}); check the id, the revision and the network"
        ) from None


def _list_cut(uri: str, folder: Path) -> list[Path]:
    """The files of a hub's checkpoint that have another size than it says."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(uri, revision=folder.name)
    except (OSError, ValueError):  # put there by an earlier version, or by hand
        return []
    sizes = {folder / file.path: file.size for file in tree}
    return [p for p, size in sizes.items() if p.is_file() and p.stat().st_size != size]


def list_weight_files(
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
    index = read_object(folder / f"{name}.index.json", field)
    shards = _shards(index, f"{name}.index.json", field) if index is not None else []
    names = [name] if (folder / name).is_file() or not shards else shards
    if (given := config.get("transformers_weights")) is not None:
        names = [_check_weight_name(given, "config.json", field)]
        if given.endswith(".index.json"):
            names = _shards(read_object(folder / given, field) or {}, given, field)
    files = [folder / n for n in names]
    if missing := [n for n in names if not os.path.isfile(folder / n)]:
        if names != [name]:
            raise ModelError(
                f"{field}: {folder} lacks {shorten(missing[0])}"
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
        raise ModelError(f"{field}: {where} names {shorten(name)}, which is no safetensors file")
    check_inside(name, where, field)
    return name


def check_inside(name: str, where: str, field: str = "model.id") -> None:
    """Refuse a path that leads out of the checkpoint's folder.

    Raises:
        ModelError: It does.
    """
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute() or Path(name).is_absolute() or "\0" in name:
        raise ModelError(f"{field}: {where} names a path outside the checkpoint: {shorten(name)}")


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


def check_loads(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a config that would have other libraries fetch, import or build what it should not.

    Raises:
        ModelError: It would.
    """
    # transformers would load it too, where peft is installed.
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model.id: {folder} holds an adapter beside the model; move adapter_config.json and "
            "its weights to a folder of their own, and name that in model.adapter"
        )
    for part in _parts(config):
        named = []
        if part.get("model_type") == "timm_wrapper":
            named = sorted(read_part(part, "model_args").keys() & _TIMM_LOADS)
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
                    f"({shorten(value)}); set model.attn_implementation"
                )
    if "auto_map" in config:
        # Late, because it takes seconds: ordinary checkpoints have none.
        from transformers import CONFIG_MAPPING

        if config["model_type"] not in CONFIG_MAPPING:
            raise ModelError(
                f"model.id: {folder} runs code of its own, which is not trusted; look at it, then "
                "set model.trust_remote_code: true"
            )
        if _has_own_code(folder, config):
            tell(
                f"{folder} brings code of its own, which is not run: its vectors are those of "
                f"transformers' {config['model_type']}, and may be others than its authors mean "
                "(model.trust_remote_code: true runs it)"
            )


def _has_own_code(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the code that a config names for its model is in the folder or on the hub."""
    named = [v for k, v in read_part(config, "auto_map").items() if k.startswith("AutoModel")]
    names = [str(v).partition(".")[0] for v in named]
    return any("--" in name or (folder / f"{name}.py").is_file() for name in names)


def check_processor(folder: Path, modality: Modality) -> None:
    """Refuse a checkpoint that does not say how its inputs are prepared.

    Of texts one without a vocabulary: transformers makes an empty one of it, to which all texts are
    the same.

    Raises:
        ModelError: It does not.
    """
    if modality != "text":
        # timm's own say it in their config.
        said_elsewhere = read_config(folder).get("model_type") == "timm_wrapper"
        if not said_elsewhere and not any((folder / name).is_file() for name in _PROCESSORS):
            raise ModelError(
                f"model.id: {folder} has no preprocessor_config.json, which says how its "
                f"{modality} is prepared; fetch the whole checkpoint"
            )
        return
    settings = read_object(folder / "tokenizer_config.json") or {}
    if str(settings.get("tokenizer_class")).removesuffix("Fast") in _WITHOUT_VOCABULARY:
        return
    if not any(_VOCABULARY.fullmatch(path.name) for path in folder.iterdir()):
        raise ModelError(
            f"model.id: {folder} has no tokenizer: no tokenizer.json, nor a vocabulary; fetch the "
            "whole checkpoint"
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


def digest_files(
    folder: Path, modules: list[Path], files: list[Path], with_weights: bool = True
) -> str:
    """The blake2b-128, as hex, over names and contents of all files that decide a vector.

    Args:
        folder: The checkpoint's, to which the names are relative.
        modules: Folders in it whose own files count too.
        files: What counts besides, wherever in the folder it lies.
        with_weights: Whether weights are among them.
    """
    # Only these folders: a training run keeps its other checkpoints beside the model.
    found = {
        p
        for directory in {folder, *modules}
        for p in directory.iterdir()
        if p.suffix in _DIGESTED and p.is_file() and not p.name.startswith(".")
    }
    files = sorted(found | set(files))
    if not with_weights:
        files = [p for p in files if p.suffix != _WEIGHTS_SUFFIX]

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


def read_json(path: Path, field: str = "model.id") -> Any:
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


def read_object(path: Path, field: str = "model.id") -> dict[str, Any] | None:
    """A JSON file's object, null where there is no file.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    content = read_json(path, field)
    if content is not None and not isinstance(content, dict):
        raise ModelError(f"{field}: {path} takes a JSON object, not a {type(content).__name__}")
    return content


def read_part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within a config; empty where there is none.

    Raises:
        ModelError: It is something else.
    """
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ModelError(
            f"model.id: the checkpoint's {name} is {shorten(part)}, and no JSON object"
        )
    return part


def read_whole_numbers(config: dict[str, Any], name: str) -> list[int]:
    """A number of a config, or a list of them; empty where there is none or 0.

    Raises:
        ModelError: One is no whole number over 0, or too large.
    """
    given = config.get(name)
    values = given if isinstance(given, list) else [given] if given else []
    for value in values:
        # Not a float, of which there are NaN and infinity; but 30.0 is what some have saved.
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole or not 0 < value < 2**31:
            raise ModelError(
                f"model.id: the checkpoint's {name} is {shorten(given)}; takes whole numbers over 0"
            )
    return [int(value) for value in values]


def read_whole_number(config: dict[str, Any], name: str) -> int | None:
    """A number of a config; null where there is none or 0.

    Raises:
        ModelError: It is no whole number over 0, or a list of several.
    """
    values = read_whole_numbers(config, name)
    if len(values) > 1:
        raise ModelError(f"model.id: the checkpoint's {name} is a list; takes one number")
    return values[0] if values else None


def shorten(value: Any) -> str:
    """A value of a config as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
