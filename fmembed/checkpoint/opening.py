"""What a checkpoint folder says of itself, read before any weight is loaded.

Files, digest, pooling, normalisation, prompt and length limit, from a sentence-transformers
modules.json where there is one and from the family's convention otherwise. No torch here: the
driver decides, and refuses, within a second.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fmembed.checkpoint.families import (
    FAMILIES,
    REFUSED,
    TOWER_CONFIG,
    Family,
    default_pooling,
    family_of,
    list_turns,
    list_two_towers,
    read_sound_limits,
    unit_size_of,
)
from fmembed.checkpoint.files import (
    absolute_uri,
    check_can_adapt,
    check_loads,
    digest_adapter,
    digest_files,
    explain_adapter,
    list_weight_files,
    locate,
    read_config,
    read_object,
    read_part,
    read_processor,
    read_whole_number,
)
from fmembed.checkpoint.modules import read_modules, resolve_prompt
from fmembed.checkpoint.shapes import (
    check_shapes,
    count_layers,
    count_positions,
    explain_layer,
    read_shapes,
)
from fmembed.errors import ModelError
from fmembed.redaction import redact
from fmembed.rows.outputs import DEFAULT, Output
from fmembed.rows.precision import PRECISIONS
from fmembed.spec import EndpointSpec, Modality, ModelSpec, VectorSpec

# Raised when the arithmetic changes by more than its rounding, so that old tables are not continued
# with new vectors.
_CONTRACT = 2
# Of families whose rows once took part of their vectors from their company, or went without their
# segment ids, or with other token ids.
_CONTRACT_OF_COMPANY = 3
_FALLBACK_MAX_TOKENS = 512
# What configs call max_position_embeddings besides.
_OLDER_LIMITS = ("n_positions", "max_sequence_length", "max_seq_len")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood, with every choice made.

    `model_type` is config.json's, by which the family is known.
    `dense` are the folders of sentence-transformers Dense modules, applied in order after pooling.
    `revision` is the hub's commit, null for a local folder, and `hub` a mirror of it that this
    process was told of. `digest` is a blake2b-128 over the
    names and contents of all files that decide a vector, `words_digest` over those of them that are
    no weights. `unit_size` is how many numbers of the
    model's input make one unit of its sequence: 1 for token ids, the values of a patch for pixels,
    the samples of a frame for audio. `rate_hz` is what sounds are resampled to, `window_samples`
    how many of them the model takes at once, null where it takes any number.
    """

    id: str
    uri: str
    revision: str | None
    digest: str
    model_type: str
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
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_digest: str | None = None
    attn_implementation: str | None = None
    compile: bool = False
    rate_hz: int = 0
    window_samples: int | None = None
    endpoint: EndpointSpec | None = None
    contract: int = _CONTRACT
    words_digest: str = ""
    hub: str | None = None

    @property
    def family(self) -> Family:
        """What is known of models of this type."""
        return family_of(self.model_type)

    @property
    def pads_text(self) -> bool:
        """Whether texts are padded to the full length, and the padding is part of the input."""
        return self.family.pads_text and self.modality == "text"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a vector; its hash is the fingerprint."""
        identity: dict[str, Any] = {
            "contract": self.contract,
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
        return locate(self.uri, self.revision, hub=self.hub)

    def num_bytes(self) -> int:
        """What the weights take in memory; 0 for a server's."""
        if self.endpoint is not None:
            return 0
        folder = self.folder() / self.weights
        return sum(p.stat().st_size for p in list_weight_files(folder, read_config(folder)))


def check_unchanged(checkpoint: Checkpoint, with_weights: bool = False) -> None:
    """Make sure that what was just loaded is what the run knows the checkpoint by.

    It is loaded seconds after its digest was taken, by an actor that is started again hours after,
    and on each node from that one's own copy.

    Args:
        checkpoint: Whose files; a hub's commit does not change.
        with_weights: Whether the weights were loaded too.

    Raises:
        ModelError: It is not.
    """
    if checkpoint.endpoint is not None or checkpoint.revision is not None:
        return
    found = _digest(checkpoint.folder(), checkpoint, with_weights)
    is_same = found == (checkpoint.digest if with_weights else checkpoint.words_digest)
    if is_same and with_weights and checkpoint.adapter is not None:
        is_same = digest_adapter(adapter_folder(checkpoint)) == checkpoint.adapter_digest
    if not is_same:
        raise ModelError(
            f"model.id: the files of {checkpoint.id} have changed since this run began, or are "
            "others on one of its nodes; nothing that was made with them is kept: run again once "
            "they are whole"
        )


def _digest(folder: Path, checkpoint: Checkpoint, with_weights: bool) -> str:
    weights = folder / checkpoint.weights
    dense = [folder / path for path in checkpoint.dense]
    files = list_weight_files(weights, read_config(weights))
    files += [p for module in dense for p in list_weight_files(module, {})]
    if checkpoint.trust_remote_code:  # code may lie deeper than what is its own to name
        files += sorted(folder.rglob("*.py"))
    return digest_files(folder, [weights, *dense], files, with_weights)


def _commit_of(folder: Path) -> str | None:
    """Of a hub's snapshot, whose folder is named after it; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _mirror() -> str | None:
    """Where the hub is by this process's environment, which workers do not have."""
    told = os.environ.get("HF_ENDPOINT")
    return told if told and redact(told) == told else None


def list_modalities(spec: ModelSpec) -> tuple[Modality, ...]:
    """What a checkpoint can embed, by the processor saved with it; more than one for two towers.

    Raises:
        ModelError: No such folder or no config in it, or a model of another kind.
    """
    if spec.endpoint is not None:
        return ("text",)
    folder = locate(absolute_uri(spec.id), spec.revision)
    weights = folder / read_modules(folder).transformer
    model_type = str(read_config(weights).get("model_type"))
    known = family_of(model_type).modalities
    if known and known != ("text",):
        return known
    processor = read_processor(weights)
    if "image_processor_type" in processor:
        if (weights / "tokenizer_config.json").is_file():
            raise ModelError(
                f"model.id: {spec.id} joins text and images ({model_type}) in a way that is not "
                f"supported; {', '.join(list_two_towers())} are"
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
    uri = absolute_uri(spec.id)
    folder = locate(uri, spec.revision)
    if (commit := _commit_of(folder)) is not None:  # from here on what the hub has now
        spec = spec.model_copy(update={"revision": commit})
    modules = read_modules(folder)
    weights = folder / modules.transformer
    if not (weights / "config.json").is_file():
        explain_adapter(weights)
    config = read_config(weights)
    if not isinstance(model_type := config.get("model_type"), str):
        raise ModelError(f"model.id: {weights}/config.json names no model_type")
    if (why := REFUSED.get(model_type)) is not None:
        raise ModelError(
            f"model.id: {spec.id} is of the architecture {model_type}, which {why}; take another"
        )
    own_files = list_weight_files(weights, config)
    check_loads(weights, config, spec.trust_remote_code)
    modalities = list_modalities(spec)
    modality = modality or spec.modality or modalities[0]
    _check_packages(modality)
    family = family_of(model_type)
    if family.packages:
        _check_installed(family.packages[0], *family.packages)
    towers = modalities if len(modalities) > 1 else ()
    inner = {**config, **read_part(config, TOWER_CONFIG[modality])}
    max_tokens = spec.max_tokens or modules.max_tokens or _FALLBACK_MAX_TOKENS
    shapes = {} if towers else read_shapes(own_files)
    # Of pictures there are families that call other things layers (EfficientNet).
    is_plain = model_type in FAMILIES and modality != "image"
    num_layers = count_layers(weights, shapes, inner) if is_plain else None
    if modality == "text":
        if family.company is not None:
            check_shapes(weights, shapes, inner)
        max_tokens = _resolve_max_tokens(spec, modules.max_tokens, weights, inner, family, shapes)
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16 and not family.needs_float32 else "float32"
    if spec.prompt is not None and modality != "text":
        raise ModelError(f"model.prompt: {spec.id} embeds {modality}, which takes no prompt")
    default = modules.pooling or default_pooling(modality, model_type, config)
    outputs = _resolve_outputs(
        spec, modality, default, modules.normalize, bool(towers), modules.dims
    )
    _check_layers(outputs, num_layers)
    adapter = absolute_uri(spec.adapter) if spec.adapter else None
    if adapter is not None:
        check_can_adapt()
    found = locate(adapter, None, "model.adapter") if adapter else None
    rate_hz, window_samples = (
        read_sound_limits(weights, family) if modality == "audio" else (0, None)
    )
    checkpoint = Checkpoint(
        id=spec.id,
        uri=uri,
        revision=_commit_of(folder),
        hub=_mirror(),
        digest="",
        model_type=model_type,
        weights=modules.transformer,
        outputs=outputs,
        max_tokens=max_tokens,
        prompt=resolve_prompt(folder, spec.prompt) if modality == "text" else "",
        lower_case=modules.lower_case,
        dense=modules.dense,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        modality=modality,
        unit_size=unit_size_of(modality, family, inner),
        towers=towers,
        adapter=adapter,
        adapter_revision=_commit_of(found) if found else None,
        adapter_digest=digest_adapter(found) if found else None,
        attn_implementation=spec.attn_implementation,
        compile=spec.compile,
        rate_hz=rate_hz,
        window_samples=window_samples,
        contract=_CONTRACT_OF_COMPANY if _once_mixed(family, inner) else _CONTRACT,
    )
    return replace(
        checkpoint,
        digest=_digest(folder, checkpoint, with_weights=True),
        words_digest=_digest(folder, checkpoint, with_weights=False),
    )


def _once_mixed(family: Family, config: dict[str, Any]) -> bool:
    """Whether earlier versions gave a row another vector in other company, without segments, or
    without what a tokenizer does in Python.
    """
    # XLNet's class token has a segment of its own.
    is_named = config.get("model_type") in ("xlnet", "markuplm")
    return is_named or family.company == "same length" or bool(list(list_turns(config)))


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
        model_type="endpoint",
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


def _resolve_outputs(
    spec: ModelSpec,
    modality: Modality,
    default: str,
    normalize: bool,
    has_towers: bool,
    dims: int | None = None,
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
        if pooling == "tokens" and not PRECISIONS[precision].for_tokens:
            takes = " or ".join(name for name, p in PRECISIONS.items() if p.for_tokens)
            raise ModelError(f"{where}.precision: tokens takes {takes}")
        # What the checkpoint says of normalising and of dimensions is said of its own vector.
        own_way = pooling == default and layer is None
        outputs.append(
            Output(
                column,
                pooling,
                layer,
                bool(choose("normalize", normalize and own_way)),
                choose("dims", dims if own_way else None),
                precision,
            )
        )
    return tuple(outputs)


def _check_layers(outputs: tuple[Output, ...], num_layers: int | None) -> None:
    """Refuse a layer that the model has not, where its number is known by now.

    Raises:
        ModelError: There is one; of other models this is found when they are loaded.
    """
    for output in outputs:
        if num_layers is None or output.layer is None:
            continue
        # What goes into the first layer is a state too.
        if not -num_layers - 1 <= output.layer <= num_layers:
            raise ModelError(explain_layer(num_layers + 1, output.layer))


def adapter_folder(checkpoint: Checkpoint) -> Path:
    """The adapter's folder on this machine."""
    assert checkpoint.adapter is not None
    revision = checkpoint.adapter_revision
    return locate(checkpoint.adapter, revision, "model.adapter", checkpoint.hub)


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


def _resolve_max_tokens(
    spec: ModelSpec,
    of_modules: int | None,
    folder: Path,
    config: dict[str, Any],
    family: Family,
    shapes: dict[str, tuple[int, ...]],
) -> int:
    """After how many tokens a text is cut.

    What sentence-transformers' files say takes the place of what the tokenizer says, as it does
    there; neither goes beyond the model's positions.

    Raises:
        ModelError: The spec asks for more than the model takes.
    """
    tokenizer = read_object(folder / "tokenizer_config.json") or {}
    # An absent limit is saved as about 1e30.
    said = tokenizer.get("model_max_length")
    of_tokenizer = said if isinstance(said, int) and 0 < said < 10**7 else None
    places = [_count_places(shapes, config, family)]
    if isinstance(m := config.get("max_position_embeddings"), int) and m > 0:
        places.append(m - _num_before(config, family))
    # A model whose positions have no end takes what its tokenizer says.
    most = min((n for n in places if n is not None), default=None)
    limit = min((n for n in (most, of_tokenizer) if n is not None), default=None)
    if spec.max_tokens is not None:
        if limit is not None and spec.max_tokens > limit:
            raise ModelError(
                f"model.max_tokens: takes at most {limit} with this model, got {spec.max_tokens}"
            )
        return spec.max_tokens
    max_tokens = of_modules or limit or _FALLBACK_MAX_TOKENS
    return min(max_tokens, most or max_tokens)


def _num_before(config: dict[str, Any], family: Family) -> int:
    """The positions that come before a text's first."""
    # A model that wraps another may have that one's name in its text_config.
    inner = family_of(str(config.get("model_type")))
    if family.positions_after_padding or inner.positions_after_padding:
        return (read_whole_number(config, "pad_token_id") or 0) + 1
    return 0


def _count_places(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], family: Family
) -> int | None:
    """For how many tokens the model has positions, as its weights and older names say."""
    places = [m for name in _OLDER_LIMITS if isinstance(m := config.get(name), int) and m > 0]
    if "relative_attention_num_buckets" in config:
        places = []  # T5's positions are relative and have no end, whatever its config says
    if (rows := count_positions(shapes, config)) is not None:
        places.append(rows - _num_before(config, family))
    return min(places, default=None)
