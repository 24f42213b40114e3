"""Rows of the test split that are copies, or nearly so, of rows that were trained on."""

from __future__ import annotations

import numpy as np

from fmembed.probes.copies import is_near
from fmembed.probes.data import LabelledRows, Leaks, is_usable, normalized
from fmembed.probes.neighbours import nearest


def find_leaks(data: LabelledRows) -> Leaks:
    """Find them, by content and by vector."""
    train, test = np.flatnonzero(~data.test), np.flatnonzero(data.test)
    place = {int(code): i for i, code in zip(train[::-1], data.contents[train[::-1]], strict=True)}
    source = np.array([place.get(int(data.contents[i]), -1) for i in test], dtype=np.int64)
    usable = is_usable(data.vectors)
    asked, among = np.flatnonzero(usable[test]), train[usable[train]]
    found = nearest(
        normalized(data.vectors[test[asked]]),
        test[asked],
        [(among, normalized(data.vectors[among]))],
    )
    near = is_near(found.distances)[:, 0] & (source[asked] < 0)
    source[asked[near]] = found.rows[near, 0]
    pairs = [
        [data.row_ids[i], data.row_ids[j]] for i, j in zip(test, source, strict=True) if j >= 0
    ]
    return Leaks(source >= 0, pairs)
