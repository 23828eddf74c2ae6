"""Texts, sizes and arms of the laboratory."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.lab.protocol import BriefPlan, Plan, documents, lora, spread
from minilora.training.loop import Settings


@pytest.mark.parametrize("name", ["prose", "code", "c"])
def test_documents_are_split_into_parts_that_share_none(name):
    parts = documents(name)
    names = [{document for document, _ in part} for part in parts]
    assert all(names)
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
    sizes = [sum(len(text) for _, text in part) for part in parts]
    assert 0.05 < (sizes[1] + sizes[2]) / sum(sizes) < 0.15


def test_spread_takes_whole_blocks_from_all_over_a_text():
    ids = np.arange(20 * 50 + 7)
    blocks = spread(ids, 4, 50).reshape(4, 50)
    assert (blocks[:, 0] == np.array([0, 5, 10, 15]) * 50).all()
    assert (np.diff(blocks, axis=1) == 1).all()
    assert len(spread(ids, 100, 50)) == 20 * 50
    assert len(spread(ids[:5], 3, 50)) == 5


def test_plan_shorten_takes_three_steps_if_quick():
    settings = Settings(steps=160)
    assert Plan(quick=True).shorten(settings).steps == 3
    assert Plan().shorten(settings) == settings


def test_documents_of_several_names_are_those_of_each():
    both, python, c = (documents(name) for name in ("python+c", "python", "c"))
    assert both == tuple(a + b for a, b in zip(python, c, strict=True))


def test_documents_to_learn_by_heart_are_the_same_in_all_parts():
    training, tune, report = documents("memory 4")
    assert training == tune == report
    assert [len(text) for _, text in training] == [4000]


def test_arm_identity_leaves_out_what_changes_no_fit():
    assert lora(2, "one name").identity() == lora(2, "another", rates=(1.0,)).identity()
    assert lora(2).identity() != lora(3).identity()


def test_brief_plan_has_one_seed_and_shortens_what_is_long_alone():
    plan = BriefPlan()
    assert plan.seeds == (0,)
    assert plan.shorten(Settings(steps=1500)).steps == 200
    assert plan.shorten(Settings(steps=160, batch_size=8)) == Settings(steps=160, batch_size=8)
    assert plan.held_out == Plan().held_out
