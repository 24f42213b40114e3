"""Three ways at once: what a source holds, what a table holds, and what is written for it by now.

For each id: which of the rows that are stored stay or come in, and what is to be done with those
that were found. The same comparison is made twice in a refresh: before it, to see what is to be
done, and after, when all that is done is stored, to see what the new version is made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmembed.rows.found import (
    BAD_ID,
    COPY,
    DONE,
    EMBED,
    GOOD,
    KEPT,
    REJECT,
    REST,
    TWIN,
    FoundRows,
)
from fmembed.rows.ids import Keys, halves
from fmembed.table.key_rows import KINDS, KeyRows

_EMBEDDED, _REFUSED, _TWIN, _REST = range(len(KINDS))

_Bools = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """What may leave the table: rows that the source has no more, and rows that have gone wrong."""

    removes: bool = True
    removes_rejected: bool = False


@dataclass(frozen=True)
class Compared:
    """What is to be done, and what stays.

    `fates` are those of the found rows; `live` says which stored rows the table is to hold, as far
    as all is done, and `stands_for` the place of the found row that each of these is, -1 where
    none was found; shapes (rows,). `counts` are of ids of embedded rows: those that `were` there,
    `new`, `changed`, `unchanged`, `gone`, `gone_wrong` and `kept`; and of rows: `rejected` that
    come in, `todo`, and found ones `without_id` or `broken_off`, which stand for others.
    """

    fates: npt.NDArray[np.int8]
    live: _Bools
    stands_for: _Ints
    counts: Mapping[str, int]


def compare(found: FoundRows, stored: KeyRows, is_old: _Bools, rules: Rules) -> Compared:
    """Decide what becomes of each row; of the ids of one bucket, or of all.

    A row that is to be replaced stays until what replaces it is stored.

    Args:
        found: Rows of the source, in its order.
        stored: Rows of the newest version, and rows that are written and not committed.
        is_old: Which of them the newest version holds.
        rules: What may leave.
    """
    group, num_groups = _group(np.concatenate([found.ids, stored.ids]))
    of_found, of_stored = group[: len(found)], group[len(found) :]
    fates = np.full(len(found), DONE, dtype=np.int8)
    live = np.zeros(len(stored), dtype=np.bool_)
    stands_for = np.full(len(stored), -1, dtype=np.int64)

    def count(groups: Any) -> _Ints:
        return np.bincount(groups, minlength=num_groups)

    is_plain = _is_plain(
        count(of_found), count(of_stored),
        count(of_found[found.states != GOOD]) + count(of_stored[stored.kinds != _EMBEDDED]),
    )  # fmt: skip
    # The row of each group, where it has one only.
    one_found, one_stored = (np.full(num_groups, -1, dtype=np.int64) for _ in range(2))
    one_found[of_found] = np.arange(len(found))
    one_stored[of_stored] = np.arange(len(stored))
    _decide_plain(
        found, stored, is_old, rules, one_found[is_plain], one_stored[is_plain],
        fates, live, stands_for,
    )  # fmt: skip
    for f_at, s_at in _members(of_found, of_stored, is_plain):
        _decide(found, stored, is_old, rules, f_at, s_at, fates, live, stands_for)
    counts = _count(fates, of_found, stored, is_old, live, of_stored, count)
    # Of what was known before, one that has no id hides nothing that it has not hidden before.
    is_known = np.zeros(len(found), dtype=np.bool_)
    is_known[stands_for[is_old & (stands_for >= 0)]] = True
    counts["without_id"] = int(((found.states == BAD_ID) & ~is_known).sum())
    counts["broken_off"] = int((found.states == REST).sum())
    return Compared(fates, live, stands_for, counts)


def _is_plain(num_found: _Ints, num_stored: _Ints, num_bad: _Ints) -> _Bools:
    """Which ids at most one good row and one embedded row have: nearly all."""
    return np.asarray((num_found <= 1) & (num_stored <= 1) & (num_bad == 0), dtype=np.bool_)


def _group(keys: Keys) -> tuple[_Ints, int]:
    """A number for each different key, shape (rows,); and how many there are."""
    if not len(keys):
        return np.empty(0, dtype=np.int64), 0
    first, rest = halves(keys)
    # Of rows that are sorted by their ids, as most are, the stable one takes little.
    order = np.argsort(first, kind="stable")
    is_new = np.diff(first[order]) != 0
    is_other = np.diff(rest[order]) != 0
    if (is_other & ~is_new).any():  # two ids that share their first halves
        order = np.lexsort((rest, first))
        is_new = (np.diff(first[order]) != 0) | (np.diff(rest[order]) != 0)
    group = np.empty(len(keys), dtype=np.int64)
    group[order] = np.concatenate([[0], np.cumsum(is_new)])
    return group, int(is_new.sum()) + 1


def _members(
    of_found: _Ints, of_stored: _Ints, is_plain: _Bools
) -> Iterable[tuple[list[int], list[int]]]:
    """The found and stored rows of each group that is not plain."""
    groups: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for which, of_rows in enumerate((of_found, of_stored)):
        rows = np.flatnonzero(~is_plain[of_rows])
        for row, at in zip(rows.tolist(), of_rows[rows].tolist(), strict=True):
            groups[at][which].append(row)
    return groups.values()


def _decide_plain(
    found: FoundRows,
    stored: KeyRows,
    is_old: _Bools,
    rules: Rules,
    one_found: _Ints,
    one_stored: _Ints,
    fates: npt.NDArray[np.int8],
    live: _Bools,
    stands_for: _Ints,
) -> None:
    """As `_decide`, of the ids of which `_is_plain`."""
    new = one_found[(one_found >= 0) & (one_stored < 0)]
    fates[new] = EMBED
    gone = one_stored[(one_found < 0) & (one_stored >= 0)]
    live[gone] = is_old[gone] & (not rules.removes)
    is_both = (one_found >= 0) & (one_stored >= 0)
    f, s = one_found[is_both], one_stored[is_both]
    has_content = found.contents[f] == stored.contents[s]
    is_same = has_content & _is_same_carried(found.carried[f], stored.carried[s])
    fates[f] = np.where(is_same, DONE, np.where(has_content, COPY, EMBED))
    live[s] = is_same | is_old[s]
    stands_for[s[is_same]] = f[is_same]


def _is_same_carried(found: Any, stored: Any) -> Any:
    # 0 is none, or one that is not known.
    return (found == stored) | (found == 0) | (stored == 0)


def _decide(
    found: FoundRows,
    stored: KeyRows,
    is_old: _Bools,
    rules: Rules,
    f_at: list[int],
    s_at: list[int],
    fates: npt.NDArray[np.int8],
    live: _Bools,
    stands_for: _Ints,
) -> None:
    """Decide of the rows of one id, given by their places."""

    def take(f: int, s: int) -> None:
        fates[f], live[s], stands_for[s] = DONE, True, f

    old = [s for s in s_at if is_old[s] and stored.kinds[s] == _EMBEDDED][:1]
    good = [f for f in f_at if found.states[f] == GOOD]
    refused = [s for s in s_at if stored.kinds[s] in (_REFUSED, _REST)]
    if not f_at:
        live[s_at] = is_old[s_at] & (not rules.removes)
        return
    if not good:
        if old and not rules.removes_rejected:
            fates[f_at], live[old] = KEPT, True
            return
        # Of those no content is known.
        refused = [s for s in refused if stored.contents[s] == b""]
        for f, s in zip(f_at, refused, strict=False):
            take(f, s)
        fates[f_at[len(refused) :]] = REJECT
        live[old] = len(f_at) > len(refused)
        return
    twin_of = _best_pair(found, stored, is_old, good, s_at)
    if twin_of is not None:
        chosen, s = twin_of
        if _is_same_carried(found.carried[chosen], stored.carried[s]):
            take(chosen, s)
        else:
            fates[chosen], live[old] = COPY, True
    else:
        refused_by = {stored.contents[s]: s for s in reversed(refused)}
        # One that was not tried yet, if there is one: what is on record as a twin may have been
        # tried when the table had no row of this id.
        twins = {stored.contents[s] for s in s_at if stored.kinds[s] == _TWIN}
        for tried in (refused_by.keys() | twins, refused_by.keys()):
            chosen = next((f for f in good if found.contents[f] not in tried), good[0])
            if found.contents[chosen] not in tried:
                break
        s = refused_by.get(found.contents[chosen], -1)
        if s < 0:
            fates[chosen], live[old] = EMBED, True
        elif old and not rules.removes_rejected:
            fates[chosen], live[old] = KEPT, True
        else:
            take(chosen, s)
    others = [f for f in f_at if f != chosen]
    spare = [s for s in s_at if stored.kinds[s] == _TWIN]
    for f, s in zip(others, spare, strict=False):
        take(f, s)
    fates[others[len(spare) :]] = TWIN


def _best_pair(
    found: FoundRows, stored: KeyRows, is_old: _Bools, good: list[int], s_at: list[int]
) -> tuple[int, int] | None:
    """A found row, and an embedded one of its content; of several one that carries the same, and
    that the table has.
    """
    embedded: dict[bytes, list[int]] = defaultdict(list)
    for s in s_at:
        if stored.kinds[s] == _EMBEDDED:
            embedded[stored.contents[s]].append(s)
    pairs = [
        (not _is_same_carried(found.carried[f], stored.carried[s]), not is_old[s], f, s)
        for f in good
        for s in embedded.get(found.contents[f], ())
    ]
    return min(pairs)[2:] if pairs else None


def _count(
    fates: npt.NDArray[np.int8],
    of_found: _Ints,
    stored: KeyRows,
    is_old: _Bools,
    live: _Bools,
    of_stored: _Ints,
    count: Any,
) -> dict[str, int]:
    is_embedded = stored.kinds == _EMBEDDED
    was = count(of_stored[is_embedded & is_old]) > 0
    stays = count(of_stored[is_embedded & is_old & live]) > 0
    comes = count(of_stored[is_embedded & ~is_old & live]) > 0
    comes |= count(of_found[np.isin(fates, (EMBED, COPY))]) > 0
    is_found = count(of_found) > 0
    is_kept = count(of_found[fates == KEPT]) > 0
    # Until it is stored that they are rejected they stay.
    stays &= count(of_found[fates == REJECT]) == 0
    return {
        "were": int(was.sum()),
        "new": int((~was & comes).sum()),
        "changed": int((was & comes).sum()),
        "unchanged": int((was & stays & is_found & ~comes & ~is_kept).sum()),
        # The source has no more of them, whether they may leave or not.
        "gone": int((was & ~is_found).sum()),
        # They are rejected now, and leave; or stay as they were.
        "gone_wrong": int((was & is_found & ~comes & ~stays).sum()),
        "kept": int(is_kept.sum()),
        "rejected": int((~is_embedded & ~is_old & live).sum()),
        "todo": int(np.isin(fates, (EMBED, COPY, TWIN, REJECT)).sum()),
    }
