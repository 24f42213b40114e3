"""The three-way comparison against one that goes through the rows of each id, and its own rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmembed.rows.found import (
    BAD,
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
from fmembed.rows.ids import contents_of, keys_of
from fmembed.table import diff
from fmembed.table.diff import Compared, Rules, compare
from fmembed.table.key_rows import KINDS, KeyRows

NONE = "-"


def hashed(contents: Sequence[str]) -> Any:
    return contents_of(None if c == NONE else f"{ord(c):032x}" for c in contents)


def found(*rows: str) -> FoundRows:
    """Rows as id, content (`-` for one that cannot be read) and, if there is one, a label."""
    states = [GOOD if row[1] != NONE else BAD for row in rows]
    return FoundRows(
        keys_of(row[0] for row in rows),
        hashed([row[1] for row in rows]),
        np.array([int(row[2:] or 0) for row in rows], dtype=np.int64),
        np.array(states, dtype=np.int8),
        np.arange(len(rows), dtype=np.int32),
        np.arange(len(rows)),
    )


def stored(*rows: str) -> KeyRows:
    """Rows as id, content, label, and a letter for their kind where they are not embedded."""
    kinds = {"r": 1, "t": 2}
    return KeyRows.of(
        keys_of(row[0] for row in rows),
        hashed([row[1] for row in rows]),
        np.array([int(row[2:].rstrip("rt") or 0) for row in rows], dtype=np.int64),
        np.array([kinds.get(row[-1] if len(row) > 2 else "", 0) for row in rows], dtype=np.int8),
    )


def look(
    rows: FoundRows, old: KeyRows, staged: KeyRows | None = None, rules: Rules | None = None
) -> Compared:
    every = KeyRows.join([old, staged or stored()])
    return compare(rows, every, np.arange(len(every)) < len(old), rules or Rules())


def test_new_changed_unchanged_and_gone() -> None:
    seen = look(found("a1", "b2", "c3", "d4"), stored("b2", "c9", "e5"))
    assert seen.fates.tolist() == [EMBED, DONE, EMBED, EMBED]
    assert seen.live.tolist() == [True, True, False]
    assert seen.stands_for.tolist() == [1, -1, -1]
    counts = seen.counts
    assert (counts["new"], counts["changed"], counts["unchanged"]) == (2, 1, 1)
    assert (counts["gone"], counts["were"], counts["todo"]) == (1, 3, 3)
    # What is staged takes the place of what it replaces.
    seen = look(found("a1", "c3"), stored("c9"), stored("a1", "c3", "z1"))
    assert seen.fates.tolist() == [DONE, DONE]
    assert seen.live.tolist() == [False, True, True, False]
    assert (seen.counts["new"], seen.counts["changed"], seen.counts["todo"]) == (1, 1, 0)


def test_a_label_alone_asks_no_model() -> None:
    seen = look(found("a17", "b28", "c3"), stored("a17", "b29", "c35"))
    assert seen.fates.tolist() == [DONE, COPY, DONE]  # of c no label is known
    assert seen.live.tolist() == [True, True, True]  # until the copy is there
    seen = look(found("b28"), stored("b29"), stored("b28"))
    assert seen.live.tolist() == [False, True]
    assert seen.counts["changed"] == 1


def test_removals_are_withheld_by_rule() -> None:
    seen = look(found(), stored("a1", "b-r"), stored("c1"), Rules(removes=False))
    assert seen.live.tolist() == [True, True, False]
    assert seen.counts["gone"] == 1
    assert look(found(), stored("a1", "b-r")).live.tolist() == [False, False]


@pytest.mark.parametrize("removes", [False, True])
def test_a_row_that_has_gone_wrong(removes: bool) -> None:
    """It cannot be read; or it is another, which cannot be embedded."""
    rules = Rules(removes_rejected=removes)
    seen = look(found("a-"), stored("a1"), rules=rules)
    assert seen.fates.tolist() == [REJECT if removes else KEPT]
    assert seen.live.tolist() == [True]
    seen = look(found("a-"), stored("a1"), stored("a-r"), rules)
    assert seen.live.tolist() == ([False, True] if removes else [True, False])
    assert seen.counts["gone_wrong" if removes else "kept"] == 1
    seen = look(found("a2"), stored("a1"), stored("a2r"), rules)
    assert seen.fates.tolist() == [DONE if removes else KEPT]
    assert seen.live.tolist() == ([False, True] if removes else [True, False])


def test_a_rejected_row_is_tried_again_when_it_is_another() -> None:
    seen = look(found("a1", "b2", "c-", "d-"), stored("a1r", "b3r", "c-r", "d1r"))
    assert seen.fates.tolist() == [DONE, EMBED, DONE, REJECT]
    assert seen.live.tolist() == [True, False, True, False]


def test_rows_of_one_id() -> None:
    # One that the table has stays, wherever it is; the others are rejected, each once.
    seen = look(found("a1", "a2", "a3"), stored("a2", "a1t"))
    assert sorted(seen.fates.tolist()) == [DONE, DONE, TWIN]
    assert seen.live.all()
    # The one that was embedded is gone: one that was its twin takes its place.
    seen = look(found("a1"), stored("a2", "a1t"))
    assert seen.fates.tolist() == [EMBED]
    assert seen.live.tolist() == [True, False]
    seen = look(found("a1", "a1", "a-"), stored())
    assert seen.fates.tolist() == [EMBED, TWIN, TWIN]
    # With a twin goes its rejection.
    seen = look(found("a1"), stored("a1", "a2t", "a1t"))
    assert seen.live.tolist() == [True, False, False]


def test_what_may_stand_for_rows_that_nobody_knows() -> None:
    rows = found("a-", "b-", "c-")
    rows.states[:] = [BAD_ID, REST, BAD_ID]
    seen = look(rows, stored("c-r"), stored("a-r"))
    # One that was known before hides nothing new; the end of a file always does.
    assert (seen.counts["without_id"], seen.counts["broken_off"]) == (1, 1)


ROW = st.builds(
    "{}{}{}".format, st.sampled_from("abcdef"), st.sampled_from("12-"), st.sampled_from(["", 3, 4])
)
KIND = st.sampled_from(["", "", "", "r", "t"])
STORED = st.builds("{}{}".format, ROW, KIND).filter(lambda r: r[1] != NONE or r.endswith("r"))


@given(st.lists(ROW), st.lists(STORED), st.lists(STORED), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_fast_way_is_the_slow_way(
    rows: list[str], old: list[str], staged: list[str], removes: bool, removes_rejected: bool
) -> None:
    given_ = (found(*rows), stored(*old), stored(*staged), Rules(removes, removes_rejected))
    fast = look(*given_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "_is_plain", lambda n, *_: np.zeros(len(n), np.bool_))
        slow = look(*given_)
    assert fast.fates.tolist() == slow.fates.tolist()
    assert fast.live.tolist() == slow.live.tolist()
    assert fast.stands_for.tolist() == slow.stands_for.tolist()
    assert fast.counts == slow.counts


@given(st.lists(ROW), st.lists(STORED), st.booleans())
@settings(max_examples=400, deadline=None)
def test_once_all_is_done_the_version_is_the_source(
    rows: list[str], old: list[str], removes_rejected: bool
) -> None:
    """Do what it says, and compare again: nothing is left, and each row has its place."""
    was, rules = stored(*old), Rules(True, removes_rejected)
    # A table has each id embedded once.
    first = dict(reversed([(k, i) for i, k in enumerate(was.ids.tolist()) if was.kinds[i] == 0]))
    is_one = [was.kinds[i] != 0 or first[k] == i for i, k in enumerate(was.ids.tolist())]
    was = was[np.array(is_one, dtype=np.bool_)]
    before = look(found(*rows), was, rules=rules)
    kinds = {EMBED: 0, COPY: 0, TWIN: 2, REJECT: 1}
    done = [i for i, fate in enumerate(before.fates.tolist()) if fate in kinds]
    some = found(*rows)[np.array(done, dtype=np.int64)]
    staged = KeyRows.of(
        some.ids, some.contents, some.carried,
        np.array([kinds[before.fates[i]] for i in done], dtype=np.int8),
    )  # fmt: skip
    after = look(found(*rows), was, staged, rules)
    assert after.counts["todo"] == 0
    now = KeyRows.join([was, staged])[after.live]
    ids = Counter(now.embedded.tolist())
    assert set(ids.values()) <= {1}
    # Each id that has a row is there, and no other; with as many rows as the source has of it.
    wanted = Counter(keys_of(row[0] for row in rows).tolist())
    assert set(now.ids.tolist()) == set(wanted)
    if removes_rejected:
        assert Counter(now.ids.tolist()) == wanted
        good = {row[0] for row in rows if row[1] != NONE}
        is_bad = now.kinds == KINDS.index("rejected")
        tried = set(now.ids[is_bad & (now.contents != b"")].tolist())
        assert set(ids) == set(keys_of(sorted(good)).tolist()) - tried
