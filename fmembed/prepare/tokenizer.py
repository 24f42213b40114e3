"""A checkpoint's tokenizer; its Rust part alone, where that is all there is to it.

transformers makes a tokenizer of a checkpoint's files; what runs then is the `tokenizers` library.
Importing transformers takes 1.7 s of a core, a second of it for torch, in every process that
prepares texts. So what it has made is kept, as that library's own JSON, and the next process takes
it from there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

import tokenizers

from fmembed import cache
from fmembed.checkpoint.opening import Checkpoint
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
        self, content: str, truncation_side: str, gives_segments: bool, splits_special: bool
    ) -> None:
        """Load one.

        Args:
            content: Its JSON, with how it cuts and pads.
            truncation_side: See `Tokenizer`.
            gives_segments: Whether segment ids are asked for.
            splits_special: Whether special tokens in a text are words like others, which the JSON
                does not say.
        """
        self.truncation_side = truncation_side
        self._gives_segments = gives_segments
        self._own = tokenizers.Tokenizer.from_str(content)
        self._own.encode_special_tokens = splits_special
        self._cuts, self._pads = self._own.truncation, self._own.padding

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
        "format": 1,
        "files": checkpoint.digest,
        "folder": checkpoint.weights,
        "family": checkpoint.model_type,
        "max_tokens": checkpoint.max_tokens,
        "pads": checkpoint.pads_text,
        "transformers": version("transformers"),
        "tokenizers": tokenizers.__version__,
    }
    is_kept = not checkpoint.trust_remote_code
    if is_kept and (kept := cache.recall(_CACHED, key)) is not None:
        return _Rust(**kept)
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
    content, splits_special = made
    kept = {
        "content": content, "truncation_side": own.truncation_side,
        "gives_segments": gives_segments, "splits_special": splits_special,
    }  # fmt: skip
    if is_kept:
        cache.remember(_CACHED, key, kept)
    return _Rust(**kept)


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    with loading(checkpoint.id):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )
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


def _rust_part(own: Any, options: dict[str, Any]) -> tuple[str, bool] | None:
    """The JSON of what runs, set to cut and pad; None where something runs besides, in Python."""
    if not own.is_fast:
        return None
    try:
        own(["a"], **options)  # sets how its Rust part cuts and pads
        return own.backend_tokenizer.to_str(), bool(own.backend_tokenizer.encode_special_tokens)
    except Exception:  # it takes no text so, or a part of it is written in Python
        return None
