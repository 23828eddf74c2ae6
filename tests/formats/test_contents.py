"""Files that should be something else: known by their first bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.formats.contents import MAGIC, TEXTS, describe_content


@pytest.mark.parametrize("size", [0, 1, 8, 100, 10_000])
@pytest.mark.parametrize(("start", "kind"), [*MAGIC.items(), *TEXTS.items()])
def test_describe_content_knows_a_file_by_its_beginning(start, kind, size):
    assert describe_content(start + b"\1" * size) == kind


@given(st.binary(max_size=99))
def test_describe_content_never_fails(head):
    content = describe_content(head)
    assert content is None or content
    assert describe_content(b'{"a": 1}') is None
