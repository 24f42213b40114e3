from __future__ import annotations

from fmembed.rows.ids import RowIds, keys_of


def test_row_ids_answer_as_a_set_does() -> None:
    ids, reference = RowIds(), set()
    for start in range(0, 3000, 7):
        names = [f"row-{i}" for i in range(start, start + 5)]
        new = [n for n in names if n not in reference]
        ids.add(keys_of(new))
        reference |= set(new)
    asked = [f"row-{i}" for i in range(4000)]
    assert ids.contains(keys_of(asked)).tolist() == [n in reference for n in asked]
    assert len(ids) == len(reference)


def test_empty() -> None:
    assert RowIds().contains(keys_of(["a"])).tolist() == [False]


def test_a_row_id_takes_16_bytes() -> None:
    ids = RowIds()
    for start in range(0, 10_000, 100):
        ids.add(keys_of(f"doc-{i}" for i in range(start, start + 100)))
    assert ids.nbytes == 16 * len(ids) == 160_000
    assert ids.contains(keys_of(["doc-0", "doc-9999", "doc-10000"])).tolist() == [True, True, False]
