"""A checkpoint's tokenizer; its Rust part alone, where that is all there is to it.

transformers makes a tokenizer of a checkpoint's files; what runs then is the `tokenizers` library.
Importing transformers takes 1.7 s of a core, a second of it for torch, in every process that
prepares texts. So what it has made is kept, as that library's own JSON, and the next process takes
it from there.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

import tokenizers

from fmembed import cache
from fmembed.checkpoint.opening import Checkpoint, check_unchanged
from fmembed.checkpoint.processors import loading
from fmembed.errors import ModelError
from fmembed.startup import uncollected

_CACHED = "tokenizer"
# Of a text the token ids, or, where segment ids matter, both.
Values = list[int] | tuple[list[int], list[int]]


class Tokenizer(Protocol):
    """Texts to token ids.

    Attributes:
        truncation_side: Which end of a text is cut off: "left" or "right".
    """

    truncation_side: str

    def encode(self, texts: Sequence[str]) -> list[tuple[Values, bool]]:
        """Token ids of each text, cut to the checkpoint's limit and padded if its family is; and
        whether anything was cut off.
        """

    def count(self, text: str) -> int:
        """Tokens of a whole text, the special ones around it too."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in a whole text each of its tokens begins and ends, without special ones."""


class _Rust:
    """The `tokenizers` library's."""

    def __init__(
        self, own: tokenizers.Tokenizer, truncation_side: str, gives_segments: bool
    ) -> None:
        """Take one.

        Args:
            own: It, set to cut and pad.
            truncation_side: See `Tokenizer`.
            gives_segments: Whether segment ids are asked for.
        """
        self.truncation_side = truncation_side
        self._gives_segments = gives_segments
        self._own = own
        self._cuts, self._pads = own.truncation, own.padding

    def encode(self, texts: Sequence[str]) -> list[tuple[Values, bool]]:
        # Without offsets: 11 us of CPU a short row instead of 21, 35 us a sentence instead of 55.
        encodings = self._own.encode_batch_fast(list(texts))
        return [
            ((e.ids, e.type_ids) if self._gives_segments else e.ids, bool(e.overflowing))
            for e in encodings
        ]

    def count(self, text: str) -> int:
        return len(self._whole(text, True).ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self._whole(text, False).offsets
        return found

    def _whole(self, text: str, with_special: bool) -> Any:
        self._own.no_truncation()
        self._own.no_padding()
        try:
            return self._own.encode(text, add_special_tokens=with_special)
        finally:
            if self._cuts:
                self._own.enable_truncation(**self._cuts)
            if self._pads:
                self._own.enable_padding(**self._pads)


class _Other:
    """transformers' own: written in Python, or a checkpoint's own code."""

    def __init__(self, own: Any, options: dict[str, Any], gives_segments: bool) -> None:
        self.truncation_side: str = own.truncation_side
        self._gives_segments = gives_segments
        self._own, self._options = own, options

    def encode(self, texts: Sequence[str]) -> list[tuple[Values, bool]]:
        if not texts:
            return []
        batch = self._own(list(texts), **self._options)
        limit, every = self._options["max_length"], batch["input_ids"]
        cut = [
            len(ids) == limit and self.count(text) > limit
            for ids, text in zip(every, texts, strict=True)
        ]
        if self._gives_segments:
            every = zip(every, batch["token_type_ids"], strict=True)
        return list(zip(every, cut, strict=True))

    def count(self, text: str) -> int:
        return len(self._own(text, truncation=False, verbose=False)["input_ids"])

    def spans(self, text: str) -> list[tuple[int, int]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        found: list[tuple[int, int]] = self._own(text, **options)["offset_mapping"]
        return found


@functools.lru_cache(maxsize=2)
@uncollected()
def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint of texts.

    Raises:
        ModelError: It cannot be loaded, or has no vocabulary.
    """
    # One core a task: the tokenizer's own threads would compete with the model for the rest.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    key = {
        "format": 2,
        "files": checkpoint.digest,
        "folder": checkpoint.weights,
        "family": checkpoint.model_type,
        "company": checkpoint.family.company,
        "max_tokens": checkpoint.max_tokens,
        "pads": checkpoint.pads_text,
        "transformers": version("transformers"),
        "tokenizers": tokenizers.__version__,
    }
    is_kept = not checkpoint.trust_remote_code
    if is_kept and (kept := cache.recall(_CACHED, key)) is not None:
        read = _read_back(kept["content"], kept["splits_special"])
        return _Rust(read, kept["truncation_side"], kept["gives_segments"])
    own = _load(checkpoint)
    options = {
        "truncation": True,
        "max_length": checkpoint.max_tokens,
        "padding": "max_length" if checkpoint.pads_text else False,
        "return_attention_mask": False,
        "return_token_type_ids": (gives_segments := _gives_segments(checkpoint, own)),
    }
    if (made := _rust_part(own, options)) is None:
        return _Other(own, options, gives_segments)
    if is_kept and (content := _write_down(made)) is not None:
        kept = {
            "content": content,
            "splits_special": bool(made.encode_special_tokens),
            "truncation_side": own.truncation_side,
            "gives_segments": gives_segments,
        }
        cache.remember(_CACHED, key, kept)
    return _Rust(made, own.truncation_side, gives_segments)


def _write_down(own: tokenizers.Tokenizer) -> str | None:
    """A tokenizer as JSON; None where it does not come back as it was."""
    try:
        content: str = own.to_str()
        return content if _read_back(content, False).to_str() == content else None
    except Exception:  # a part of it is written in Python, or a score is no number
        return None


def _read_back(content: str, splits_special: bool) -> tokenizers.Tokenizer:
    """A tokenizer of its JSON, and of what that does not say: whether special tokens in a text are
    words like others.
    """
    own = tokenizers.Tokenizer.from_str(content)
    if type(own.model).__name__ == "Unigram":
        # Its parser (0.22) reads one score in ten a bit off, and of two ways to cut a run of one
        # character that score the same another one wins. Python's reads what was written.
        model = json.loads(content)["model"]
        pieces = [(piece, score) for piece, score in model["vocab"]]
        own.model = tokenizers.models.Unigram(pieces, model["unk_id"], model["byte_fallback"])
    own.encode_special_tokens = splits_special
    return own


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    with loading(checkpoint.id):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )
    check_unchanged(checkpoint)
    # transformers makes one of nothing but a config, which takes every word for unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
        raise ModelError(
            f"model.id: the tokenizer of {checkpoint.id} has no vocabulary; "
            "fetch the whole checkpoint"
        )
    return tokenizer


def _gives_segments(checkpoint: Checkpoint, own: Any) -> bool:
    """Whether the tokenizer gives segment ids, and the model may make something else without them.

    Nearly all tokenizers give nothing but zeros, which the models that were tested take for none;
    so the ids do not travel then.
    """
    if "token_type_ids" not in own.model_input_names:
        return False
    return checkpoint.family.company is None or any(own("a b")["token_type_ids"])


def _rust_part(own: Any, options: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """What runs, set to cut and pad; None where something runs besides, in Python."""
    if not own.is_fast or any(_is_overridden(own, name) for name in ("__call__", "_encode_plus")):
        return None
    try:
        own(["a"], **options)  # sets how its Rust part cuts and pads
    except Exception:  # it takes no text so
        return None
    made: tokenizers.Tokenizer = own.backend_tokenizer
    return made


def _is_overridden(own: Any, name: str) -> bool:
    """Whether what a tokenizer is called by is its own class's, as LUKE's and MarkupLM's are, which
    call themselves fast too, and not the library's.
    """
    of_library = (
        "transformers.tokenization_utils_base",
        "transformers.tokenization_utils_tokenizers",
    )
    return getattr(type(own), name).__module__ not in of_library
