"""The gallery: a page that depends on the results alone, with a picture for each experiment."""

from __future__ import annotations

import pytest

from minilora.errors import ConfigError
from minilora.lab import gallery
from minilora.lab.gallery import gallery_text, write_gallery
from minilora.lab.store import Store
from minilora.lab.verdicts import decide, judge

MADE_WITH = {
    "minilora": "1.0",
    "python": "3.12.1",
    "machine": {"numpy": "2.1", "processor": "a processor"},
}
VERDICT = decide(judge("gain", [0.5, 0.6, 0.7], at_least=0.95), note="A note.")
RESULTS = {
    "claim": "LoRA is enough",
    "source": "a paper",
    "control": "full training",
    "panels": [],
    **VERDICT,
}


def test_gallery_text_has_claim_picture_verdict_numbers_time_and_command():
    text = gallery_text({"rank": RESULTS}, {"rank": 12.3}, MADE_WITH)
    for words in (
        "LoRA is enough",
        "](rank/rank.png)",
        "does not hold here",
        "0.6 +- 0.25",
        "Control: full training.",
        "`minilora lab rank`: 12 seconds",
        "a processor",
    ):
        assert words in text
    assert text == gallery_text({"rank": dict(RESULTS)}, {"rank": 12.3}, dict(MADE_WITH))


def test_write_gallery_draws_the_pictures_that_are_missing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gallery, "draw_results", lambda source, *rest: drawn.append(source))
    store = Store(tmp_path)
    store.claim(MADE_WITH)
    with pytest.raises(ConfigError, match="no results yet"):
        write_gallery(store)
    store.write_results("rank", RESULTS)
    store.write_results("layers", RESULTS)
    store.picture_file("layers").write_bytes(b"a picture")
    page = write_gallery(store).read_text(encoding="utf-8")
    assert drawn == [store.results_file("rank")]
    assert page.index("## rank") < page.index("## layers")  # the order of the table
