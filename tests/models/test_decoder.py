"""What shares a row and must not see each other: `first_key`, for every type of model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape

from minilora.autograd import gradients, no_grad
from minilora.errors import DataError
from minilora.functional import IGNORE
from minilora.models.dialects import MODEL_TYPES
from minilora.models.transformer import CausalLM, KeyValueCache

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # fits 16 positions


def starts_of(sizes: list[int]) -> np.ndarray:
    """(T,): for each position of records in a row, where its record begins."""
    return np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)


def two_rows(model: Any, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, first_key), each (2, T): the records in this order, and in the opposite one."""
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, sum(sizes)))
    return ids, np.stack([starts_of(sizes), starts_of(sizes[::-1])])


def pieces(ids: np.ndarray, first_key: np.ndarray) -> list[tuple[int, slice, np.ndarray]]:
    """(row, columns, ids (1, n)) of each record."""
    found = []
    for row, begins in enumerate(first_key):
        for start in np.unique(begins).tolist():
            columns = slice(start, start + int((begins == start).sum()))
            found.append((row, columns, ids[row : row + 1, columns]))
    return found


@given(configs(), SIZES)
def test_first_key_computes_each_record_as_if_alone(config, sizes):
    model = randomised(config)
    ids, first_key = two_rows(model, sizes)
    packed = model(ids, first_key=first_key).data
    bound = 1e-12 * max(1, np.abs(packed).max())
    for row, columns, alone in pieces(ids, first_key):
        assert np.abs(packed[row, columns] - model(alone).data[0]).max() <= bound


@pytest.mark.parametrize("recompute", [False, True])
@given(configs(), SIZES)
def test_first_key_gives_the_gradients_of_the_records_alone(recompute, config, sizes):
    model = randomised(config)
    model.gradient_checkpointing_enable(recompute)
    ids, first_key = two_rows(model, sizes)
    params = list(model.parameters())
    targets = np.roll(ids, -1, axis=1)
    packed = gradients(model(ids, targets=targets, first_key=first_key), params)
    expected = [np.zeros(p.shape) for p in params]
    for row, columns, alone in pieces(ids, first_key):
        loss = model(alone, targets=targets[row : row + 1, columns])
        for total, grad in zip(expected, gradients(loss, params), strict=True):
            total += grad
    for grad, total in zip(packed, expected, strict=True):
        assert np.abs(grad - total).max() <= 1e-11 * max(1, np.abs(total).max())


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_first_key_of_zero_keeps_every_bit(kind):
    """A row that is one record is an ordinary text: nothing is masked, and it begins at 0."""
    model = CausalLM(shape(kind), seed=1)
    ids = np.random.default_rng(0).integers(0, 11, (2, 30))
    plain = model(ids).data
    assert model(ids, first_key=np.zeros((2, 30), np.int64)).data.tobytes() == plain.tobytes()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_first_key_is_counted_over_the_cache_too(kind):
    model = randomised(shape(kind))
    ids, first_key = two_rows(model, [4, 5, 3])
    whole = model(ids, first_key=first_key).data
    cache = KeyValueCache(model, 2, 12)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        with no_grad():
            part = model(ids[:, start:stop], cache, first_key=first_key[:, start:stop]).data
        assert np.abs(part[:, 0] - whole[:, stop - 1]).max() <= 1e-12 * np.abs(whole).max()


def test_first_key_leaves_the_loss_of_other_targets_alone():
    model = randomised(shape("llama"))
    ids, first_key = two_rows(model, [3, 4])
    targets = np.where(first_key == 0, IGNORE, ids)
    before = model(ids, targets=targets, first_key=first_key).item()
    changed = np.where(first_key == 0, (ids + 1) % 11, ids)
    assert model(changed, targets=targets, first_key=first_key).item() == before


OWN = [[0, 0, 2], [0, 1, 1]]
REFUSED = {
    "after its own": ([[0, 0, 3], [0, 1, 1]], "at most each position's own key, got 0 to 3 for"),
    "negative": ([[0, 0, -1], [0, 1, 1]], "at least 0 .*, got -1 to 1 for keys 0 to 2"),
    "another shape": (OWN[:1], r"the ids' shape \(2, 3\), got int64 \(1, 3\)"),
    "floats": (np.array(OWN, float), r"integers .* got float64 \(2, 3\)"),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.uint64])
def test_first_key_may_have_any_dtype_of_integers(kind, dtype):
    model = CausalLM(shape(kind), seed=1)
    ids = np.ones((2, 3), int)
    expected = model(ids, first_key=OWN).data
    got = model(ids.astype(dtype), first_key=np.array(OWN, dtype)).data
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", REFUSED)
def test_first_key_is_checked(name):
    first_key, message = REFUSED[name]
    model = CausalLM(shape("llama"), seed=1)
    ids = np.ones((2, 3), int)
    model(ids, first_key=OWN)
    with pytest.raises(DataError, match=message):
        model(ids, first_key=first_key)
