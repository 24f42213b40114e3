"""What the weights' shapes say, read from their files' headers: no weight is loaded for it."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmembed.checkpoint.files import read_whole_number
from fmembed.errors import ModelError

# One row a position, counted from the text's beginning.
POSITIONS = re.compile(
    r"(?:.+\.)?(?:position_embeddings?|position_embed|embed_positions|wpe|positions_embed)\.weight"
)


@dataclass(frozen=True)
class _Table:
    """A table of embeddings: how its weight is called, and where a config says its rows.

    `extra` are rows that the family may have besides: BART's positions begin at 2.
    """

    name: re.Pattern[str]
    field: str
    extra: tuple[int, ...] = (0,)


_TABLES = (
    _Table(POSITIONS, "max_position_embeddings", (0, 2)),
    _Table(
        re.compile(r"(?:.+\.)?(?:word_embeddings|embed_tokens|tok_embeddings|shared|wte)\.weight"),
        "vocab_size",
    ),
    _Table(re.compile(r"(?:.+\.)?token_type_embeddings\.weight"), "type_vocab_size"),
)
# How configs call the columns of these tables; an embedding may be narrower than the states.
_WIDTHS = ("embedding_size", "hidden_size", "d_model", "dim", "n_embd")
# How configs call the number of a model's layers, and how one layer's weights are called: by the
# outermost number, as there may be layers in a block.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_LAYER = re.compile(r"(?:(.+?)\.)?(?:layers?|h|blocks?)\.(\d+)\..+")


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, by name."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="np") as f:
            shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    return shapes


def check_shapes(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """Refuse weights of embeddings that are not what the config says.

    Of families that are known; the weights that are not looked at here are compared at load.

    Raises:
        ModelError: They are not.
    """
    widths = [w for name in _WIDTHS if (w := read_whole_number(config, name))]
    for name, shape in sorted(shapes.items()):
        table = next((t for t in _TABLES if t.name.fullmatch(name)), None)
        if table is None or len(shape) != 2:
            continue
        num_rows = read_whole_number(config, table.field) or shape[0]
        num_columns = shape[1] if not widths or shape[1] in widths else widths[0]
        if shape[0] - num_rows not in table.extra or num_columns != shape[1]:
            raise ModelError(explain_mismatch(folder, name, shape, (num_rows, num_columns)))


def count_layers(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> int | None:
    """How many layers there are, where config and weights say so in a way that is known.

    Raises:
        ModelError: They say different numbers: the rest would be random, or left out.
    """
    said = next((n for name in _DEPTHS if (n := read_whole_number(config, name))), None)
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in shapes:
        if layer := _LAYER.fullmatch(name):
            stacks[layer[1] or ""].add(int(layer[2]))
    if said is None or not stacks:
        return None
    depths = {max(numbers) + 1 for numbers in stacks.values()}
    if said in depths:
        return said
    if len(stacks) > 1:  # layers in layers, or beside others
        return None
    raise ModelError(
        f"model.id: {folder} has the weights of {max(depths)} layers, and by config.json it has "
        f"{said}; fetch config and weights that belong together"
    )


def explain_mismatch(
    name: str | Path, weight: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> str:
    """The one line about a weight of another shape than the config says."""
    found, said = (" x ".join(map(str, s)) for s in (shape, expected))
    return (
        f"model.id: {name}: the weight {weight} is {found}, and by config.json it is {said}; "
        "fetch config and weights that belong together"
    )


def explain_layer(num_states: int, layer: int) -> str:
    """The one line about a layer that a model of so many hidden states has not."""
    return f"model.layer: takes {-num_states} to {num_states - 1} with this model, got {layer}"


def count_positions(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> int | None:
    """Rows of the shortest table of positions; None where there is none."""
    rows = []
    for name, shape in shapes.items():
        if len(shape) == 2 and POSITIONS.fullmatch(name):
            # Where the config does not say, these are taken for BART's, whose first two are no
            # place of a token.
            hidden = (
                2 if "embed_positions" in name and "max_position_embeddings" not in config else 0
            )
            rows.append(shape[0] - hidden)
    return min(rows, default=None)
