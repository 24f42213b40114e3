"""What sentence-transformers says beside a model: modules.json, pooling, prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmembed.checkpoint.files import (
    check_inside,
    read_json,
    read_object,
    read_part,
    read_whole_number,
    shorten,
)
from fmembed.errors import ModelError

_OWN = "config_sentence_transformers.json"
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


# Where sentence-transformers has kept the settings of its Transformer module, the newest first.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What a module's config may say that changes no vector, or that is followed.
_DENSE_KEYS = ("in_features", "out_features", "bias", "activation_function", "use_residual")
_POOLING_KEYS = (
    "pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension", *_POOLINGS,
)  # fmt: skip
_TRANSFORMER_KEYS = (
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name",
    "unpad_inputs", "cache_dir", "backend",
)  # fmt: skip
_SENTENCE, _TOKENS = "sentence_embedding", "token_embeddings"


@dataclass(frozen=True)
class _Modules:
    transformer: str = ""
    pooling: str | None = None
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    dense: tuple[str, ...] = ()
    dims: int | None = None


def read_modules(folder: Path) -> _Modules:
    """Read what sentence-transformers says of a model; all defaults where it says nothing.

    Each key that version 6.2 can write is followed, or refused by its name.

    Raises:
        ModelError: A module, setting or value that is not supported.
    """
    own = read_object(folder / _OWN) or {}
    if own.get("model_type") not in (None, "SentenceTransformer"):
        raise ModelError(
            f"model.id: {folder} is a {shorten(own['model_type'])} of sentence-transformers; a "
            "SentenceTransformer is supported"
        )
    dims = read_whole_number(own, "truncate_dim")
    modules = read_json(folder / "modules.json")
    if modules is None:
        if own and "__version__" in own:
            raise ModelError(
                f"model.id: {folder} has {_OWN} and no modules.json, which says how its vectors "
                "are pooled and normalised; fetch the whole checkpoint"
            )
        return _Modules(dims=dims)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ModelError(f"model.id: {folder / 'modules.json'} takes a JSON list of objects")
    transformer, pooling, normalize, lower_case = "", None, False, False
    max_tokens = None
    dense: list[str] = []
    for module in modules:
        path, class_ = module.get("path", ""), module.get("type")
        if not isinstance(path, str) or not isinstance(class_, str):
            raise ModelError(
                f"model.id: {folder / 'modules.json'} takes a type and a path for each module, as "
                "texts"
            )
        package, _, kind = class_.rpartition(".")
        # Of the class only its name is stable: the layout moved between versions 2, 5 and 6.
        if package.split(".")[0] not in ("", "sentence_transformers"):
            raise ModelError(
                f"model.id: the module {shorten(class_)} in {folder / 'modules.json'} is code of "
                "the checkpoint's own, which is not run"
            )
        check_inside(path, "modules.json")
        config = read_object(folder / path / "config.json")
        if config is None and kind in ("Pooling", "Dense"):
            raise ModelError(
                f"model.id: {folder} has no {shorten(path + '/config.json')}, and its modules.json "
                f"names the module, a {kind}; fetch the whole checkpoint"
            )
        config = config or {}
        if kind == "Transformer":
            transformer = path
            found = (read_object(folder / path / name) for name in _SETTINGS)
            settings = next((s for s in found if s is not None), {})
            pooling = _read_transformer(settings, folder / path)
            max_tokens = read_whole_number(settings, "max_seq_length")
            lower_case = bool(settings.get("do_lower_case"))
        elif kind == "Pooling" and pooling is None:
            _refuse_others(config, _POOLING_KEYS, folder / path)
            pooling = _read_pooling(config)
        elif kind == "Normalize":
            _check_names(config, folder / path)
            normalize = True
        elif kind == "Dense" and pooling is not None and not normalize:
            _check_names(config, folder / path)
            names = (*_DENSE_KEYS, "module_input_name", "module_output_name")
            _refuse_others(config, names, folder / path)
            dense.append(path)
        elif kind != "Dropout":  # which does nothing but when a model is trained
            raise ModelError(
                f"model.id: the sentence-transformers module {shorten(kind)} is not supported "
                "at this place; Transformer, Pooling, Dense, Normalize are, in this order"
            )
    return _Modules(transformer, pooling, normalize, max_tokens, lower_case, tuple(dense), dims)


def _read_transformer(settings: dict[str, Any], folder: Path) -> str | None:
    """The pooling that the Transformer module does itself, if it does."""
    _refuse_others(settings, _TRANSFORMER_KEYS, folder)
    if settings.get("transformer_task") not in (None, "feature-extraction"):
        raise _unlike(folder, "transformer_task", settings["transformer_task"])
    if settings.get("module_output_name") not in (None, _TOKENS, _SENTENCE):
        raise _unlike(folder, "module_output_name", settings["module_output_name"])
    pooling = None
    for modality, told in read_part(settings, "modality_config").items():
        told = told if isinstance(told, dict) else {}
        way = (told.get("method"), told.get("method_output_name"))
        if way == ("forward", "pooler_output"):
            pooling = "pooler"
        # A model of two towers has a method for each, which is what a projection is.
        elif way != ("forward", "last_hidden_state") and not str(way[0]).startswith("get_"):
            raise _unlike(folder, f"modality_config.{modality}", told)
    return pooling


def _check_names(config: dict[str, Any], folder: Path) -> None:
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, _SENTENCE):
            raise _unlike(folder, name, config[name])


def _refuse_others(config: dict[str, Any], names: Collection[str], folder: Path) -> None:
    """Refuse a setting that is not among these, unless it says nothing."""
    for name, value in config.items():
        if name not in names and value not in (None, {}, [], "", False):
            raise _unlike(folder, name, value)


def _unlike(folder: Path, name: str, value: Any) -> ModelError:
    return ModelError(
        f"model.id: {folder} sets {shorten(name)} to {shorten(value)} for sentence-transformers, "
        "which is not supported"
    )


def _read_pooling(config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _POOLINGS.items() if config.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    mode = "last" if modes[:1] == ["lasttoken"] else modes[0] if modes else None
    if len(modes) != 1 or mode not in ("cls", "mean", "last", "max"):
        raise ModelError(
            f"model.id: the checkpoint's pooling {shorten(modes)} is not "
            "supported; set model.pooling to cls, mean, last or max"
        )
    if config.get("include_prompt") is False:
        raise ModelError(
            "model.id: the checkpoint leaves the prompt out of its pooling "
            "(include_prompt: false), which is not supported"
        )
    return str(mode)


def resolve_prompt(folder: Path, prompt: str | None) -> str:
    """The prompt's text: a name that the checkpoint defines, or the text itself."""
    config = read_object(folder / _OWN) or {}
    prompts = read_part(config, "prompts")
    if prompt is None:
        prompt = config.get("default_prompt_name")
        if prompt is not None and (not isinstance(prompt, str) or prompt not in prompts):
            raise ModelError(
                f"model.prompt: the checkpoint's default prompt {shorten(prompt)} is not "
                "among its prompts; set model.prompt"
            )
    text = prompts.get(prompt or "", prompt or "")
    return "" if text is None else str(text)
