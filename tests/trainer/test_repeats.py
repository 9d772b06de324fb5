from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from rtx.trainer import repeats
from rtx.trainer.repeats import PairSpool, Place
from rtx.trainer.store import hash_text


def number(text):
    return int.from_bytes(hash_text(text.encode()), "little")


def by_hand(rows):
    """(count, places in order) of each kind, with dicts."""
    found = {name: [] for name in ("queries", "pairs", "documents", "several_positives", "contradictions")}
    last_query, last_document, last_pair, positives, labelled = {}, {}, {}, defaultdict(dict), {}
    for row, (query, documents, answers) in enumerate(rows):
        if query in last_query:
            found["queries"].append(Place(row, last_query[query], number(query)))
        last_query[query] = row
        for document, answer in zip(documents, answers, strict=True):
            if document in last_document:
                found["documents"].append(Place(row, last_document[document], number(document)))
            last_document[document] = row
            if answer:
                if (query, document) in last_pair:
                    found["pairs"].append(Place(row, last_pair[query, document], number(query)))
                last_pair[query, document] = row
                known = positives[query]
                if document not in known:
                    if len(known) == 1:
                        found["several_positives"].append(Place(row, *known.values(), number(query)))
                    known[document] = row
            first = labelled.setdefault((query, document), {})
            if answer not in first and first:
                found["contradictions"].append(Place(row, *first.values(), number(document)))
            first.setdefault(answer, row)
    return {name: (len(places), sorted(places)) for name, places in found.items()}


def random_rows(count, texts, seed):
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        documents = [f"d{i}" for i in generator.integers(texts, size=generator.integers(1, 5))]
        rows.append((f"q{generator.integers(texts)}", documents, (generator.random(len(documents)) < 0.4).tolist()))
    return rows


@pytest.mark.parametrize(("count", "texts", "seed"), [(0, 5, 0), (1, 5, 1), (60, 8, 2), (500, 60, 3), (500, 3000, 4)])
@pytest.mark.parametrize("small", [True, False])
def test_repeats_are_those_found_by_hand(count, texts, seed, small, monkeypatch):
    if small:  # everything goes to the disk, in many pieces
        monkeypatch.setattr(repeats, "_MEMORY_BYTES", 64)
        monkeypatch.setattr(repeats, "_OPEN_RECORDS", 7)
    rows = random_rows(count, texts, seed)
    spool = PairSpool(shown=10**6)
    for row, (query, documents, answers) in enumerate(rows):
        spool.add(row, query, documents, answers)
    found = spool.repeats()
    expected = by_hand(rows)
    assert {name: (getattr(found, name).count, getattr(found, name).places) for name in expected} == expected
    if count == 500 and texts == 60:
        assert all(count for count, _ in expected.values())


def test_the_places_shown_are_those_nearest_to_the_beginning():
    rows = random_rows(300, 12, 5)
    spool = PairSpool(shown=3)
    for row, (query, documents, answers) in enumerate(rows):
        spool.add(row, query, documents, answers)
    found, expected = spool.repeats(), by_hand(rows)
    for name, (count, places) in expected.items():
        assert getattr(found, name).count == count > 3
        assert [place.row for place in getattr(found, name).places] == [place.row for place in places[:3]]
