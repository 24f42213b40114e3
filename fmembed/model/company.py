"""Whether a row's vector depends on its company: found out at load, where nobody has tested it.

Padding is kept out of a text's vector by its mask, if the model looks at it; some mix over places
nevertheless (Fourier transforms, convolutions, landmarks). So a few ragged texts are run alone and
together, as they are in a run, and one at the limit. Families that were tested are spared this
(checkpoint/families.py); MiniLM on one core would take 0.1 s for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fmembed.arrays import Ints
from fmembed.checkpoint.families import Company
from fmembed.checkpoint.processors import first_line
from fmembed.checkpoint.shapes import POSITIONS
from fmembed.errors import ModelError
from fmembed.rows.pieces import Piece

if TYPE_CHECKING:
    from fmembed.model.forward import Model
    from fmembed.model.text import TextTower

_LENGTHS, _TWIN_LENGTH = (29, 17, 9, 5), 9
# Whatever a config calls so: past it a model may compute otherwise.
_WINDOWS = ("window", "block_size", "chunk", "original_max_position", "landmarks")
_MOST_TOKENS, _MOST_LIMIT = 512, 1024
# Cosine of a row alone and in company, by the bytes of a number. Rounding gave 0.9999999, and in
# bfloat16 0.9997; families that do depend gave 0.998 and less. Where padding is taken for
# harmful by mistake rows are only slower; where rows of one length disagree the model is refused.
_PADDED = {4: 0.99999, 2: 0.999}
_SAME = {4: 0.9999, 2: 0.99}

# For each row its vector in each output, float64, flat.
_Vectors = list[list[Any]]


def find_company(model: Model, tower: TextTower) -> Company:
    """Which rows may share a batch.

    Args:
        model: A model of texts.
        tower: Its tower, of which it is found out.

    Raises:
        ModelError: The model makes something else of a row each time, or of two rows of one length
            together than of each alone; or it does not take as many tokens as it should.
    """
    checkpoint, config = model.checkpoint, tower.model.config.to_dict()
    limit = checkpoint.max_tokens
    windows = {n + 3 for n in _list_windows(config) if n + 3 <= _MOST_TOKENS}
    lengths = sorted({min(n, limit) for n in (*_LENGTHS, *windows)}, reverse=True)
    draw, words = np.random.default_rng(0), _list_words(config)
    rows = [_draw(draw, words, n) for n in lengths]
    twins = [_draw(draw, words, min(_TWIN_LENGTH, limit)) for _ in range(3)]
    num_bytes = getattr(torch, checkpoint.dtype).itemsize
    alone = [_run(model, [row])[0] for row in rows]
    named = f"model.id: {checkpoint.id} is of the architecture {type(tower.model).__name__}"
    ends = slice(None, None, max(len(rows) - 1, 1))  # the longest and the shortest once more
    if not _agree([_run(model, [row])[0] for row in rows[ends]], alone[ends], _SAME[num_bytes]):
        raise ModelError(f"{named}, which makes another vector of a text each time")
    apart = [_run(model, [twin])[0] for twin in twins]
    if not _agree(_run(model, twins), apart, _SAME[num_bytes]):
        raise ModelError(
            f"{named}, which makes another vector of a text when others of its length are beside it"
        )
    if limit <= _MOST_LIMIT and not _has_room(model):
        _check_limit(model, _draw(draw, words, limit), named)
    tower.company = "any"
    try:
        for key in {tower.shares(row) for row in rows}:
            here = [i for i, row in enumerate(rows) if tower.shares(row) == key]
            together = _run(model, [rows[i] for i in here])
            if not _agree(together, [alone[i] for i in here], _PADDED[num_bytes]):
                return "same length"
    except Exception:  # it was not written for padding
        return "same length"
    return "any"


def _has_room(model: Model) -> bool:
    """Whether a table of positions is longer than the limit, wherever in it they begin."""
    config = model.tower.model.config
    most = model.checkpoint.max_tokens + int(getattr(config, "pad_token_id", 0) or 0) + 2
    return any(
        weight.ndim == 2 and weight.shape[0] >= most
        for name, weight in model.tower.model.named_parameters()
        if POSITIONS.fullmatch(name)
    )


def _check_limit(model: Model, row: Piece, named: str) -> None:
    """Run the longest text that there may be; find where it ends if it does not go."""
    fits, fails = 1, len(row.values)
    try:
        _run(model, [row])
    except Exception as e:
        reason = first_line(e)
    else:
        return
    while fits + 1 < fails:
        middle = (fits + fails) // 2
        try:
            _run(model, [Piece(row.values[:middle], middle)])
        except Exception:
            fails = middle
        else:
            fits = middle
    raise ModelError(
        f"{named}, which fails on texts of {len(row.values)} tokens ({reason}) and takes {fits}; "
        f"set model.max_tokens: {fits}"
    )


def _run(model: Model, rows: list[Piece]) -> _Vectors:
    columns = model.forward(rows).values()
    return [
        [np.asarray(torch.as_tensor(c[i]).cpu(), dtype=np.float64).ravel() for c in columns]
        for i in range(len(rows))
    ]


def _agree(found: _Vectors, expected: _Vectors, least: float) -> bool:
    """Whether the cosine of all pairs is at least this; what is not finite agrees with its like."""
    for a, b in zip((v for r in found for v in r), (v for r in expected for v in r), strict=True):
        with np.errstate(invalid="ignore"):
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        if not cosine >= least and not np.array_equal(a, b, equal_nan=True):
            return False
    return True


def _draw(draw: np.random.Generator, words: Ints, length: int) -> Piece:
    return Piece(draw.choice(words, length).astype(np.int32), length)


def _list_words(config: dict[str, Any]) -> Ints:
    """The token ids that mean nothing special, as far as the config says."""
    vocab_size = config.get("vocab_size")
    special = {v for k, v in config.items() if str(k).endswith("_token_id") and isinstance(v, int)}
    words = np.arange(vocab_size if isinstance(vocab_size, int) else 128)
    return words[~np.isin(words, list(special))]


def _list_windows(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _list_windows(value)
        elif any(word in str(name) for word in _WINDOWS):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int) and one > 0:
                    yield one
