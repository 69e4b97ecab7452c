"""A seeded sample of the fuzz that needs torch; ``make fuzz`` runs the whole."""

import random

import pytest

from tests.fuzz.outcomes import AGREED, REFUSED, outcome
from tests.fuzz.parts import PARTS
from tests.parity.conftest import NOTES, SEED

SAMPLES = {"config": 300, "tokenizer": 300, "adapter": 400, "generation": 150}


@pytest.mark.parametrize("part", SAMPLES)
def test_a_damaged_file_works_as_the_referee_says_or_is_refused_in_one_line(tmp_path, part):
    chosen = random.Random(SEED).sample(list(PARTS[part](tmp_path, SEED)), SAMPLES[part])
    results = {damaged.name: outcome(damaged) for damaged in chosen}
    counts = {result: list(results.values()).count(result) for result in (AGREED, REFUSED)}
    NOTES.append(f"fuzz of {part}: {len(chosen)} inputs, {counts}")
    assert {name: result for name, result in results.items() if result not in counts} == {}
    assert all(counts.values())
