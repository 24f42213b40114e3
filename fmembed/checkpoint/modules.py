"""What sentence-transformers says beside a model: modules.json, pooling, prompts."""

from __future__ import annotations

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

_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class _Modules:
    transformer: str = ""
    pooling: str | None = None
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    dense: tuple[str, ...] = ()


def read_modules(folder: Path) -> _Modules:
    """Read a sentence-transformers modules.json; all defaults where there is none."""
    modules = read_json(folder / "modules.json")
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
        check_inside(path, "modules.json")
        config = read_object(folder / path / "config.json") or {}
        if kind == "Transformer":
            transformer = path
            settings = read_object(folder / path / "sentence_bert_config.json") or {}
            max_tokens = read_whole_number(settings, "max_seq_length")
            lower_case = bool(settings.get("do_lower_case"))
        elif kind == "Pooling":
            pooling = _read_pooling(config)
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense" and pooling is not None and not normalize:
            dense.append(path)
        else:
            raise ModelError(
                f"model.id: the sentence-transformers module {shorten(kind)} is not supported "
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
    config = read_object(folder / "config_sentence_transformers.json") or {}
    prompts = read_part(config, "prompts")
    if prompt is None:
        prompt = config.get("default_prompt_name")
        if prompt is not None and (not isinstance(prompt, str) or prompt not in prompts):
            raise ModelError(
                f"model.prompt: the checkpoint's default prompt {shorten(prompt)} is not "
                "among its prompts; set model.prompt"
            )
    return str(prompts.get(prompt or "", prompt or ""))
