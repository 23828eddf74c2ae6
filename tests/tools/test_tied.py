"""Models whose head has the embedding's weight: every kind of adapter through every tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods import move
from small import IDS, base, bits
from tool_files import GOLDEN, WEIGHTS, logits, read_weights

from minilora.errors import ConfigError
from minilora.formats import read_adapter, save_file
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM
from minilora.tools.combining import combine
from minilora.tools.comparing import diff
from minilora.tools.converting import convert
from minilora.tools.factoring import extract, resize
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge

Q = {"target_modules": ["q_proj"]}
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"

# An adapter's options, and where its choices of `tied` give its own output: None needs no choice.
KINDS: dict[str, tuple[dict[str, Any], set[str | None]]] = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, {"untie"}),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {"untie"}),
    "both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"untie"}),
    "one for both": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {None, "share", "untie"},
    ),
    "saved head": ({**Q, "modules_to_save": ["lm_head"]}, {"untie"}),
    "saved embedding": ({**Q, "modules_to_save": ["embed_tokens"]}, {"untie"}),
    "saved both": ({**Q, "modules_to_save": ["embed_tokens", "lm_head"]}, {"untie"}),
    "saved as one": (
        {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {None, "share", "untie"},
    ),
    "tokens": ({**Q, "trainable_token_indices": [1, 3]}, {None, "share", "untie"}),
    "tokens of the head": ({**Q, "trainable_token_indices": {"lm_head": [2]}}, {"untie"}),
    "other tokens in each": (
        {**Q, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
        {"untie"},
    ),
}
BOTH_APART = {"both", "saved both", "other tokens in each"}
SAVED = {"saved head", "saved embedding", "saved both"}
CHOICES: tuple[str | None, ...] = (None, "share", "untie")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, an adapter of each kind, and "plain", which changes q_proj alone."""
    made = tmp_path_factory.mktemp("tied")
    base(tie_word_embeddings=True).save_pretrained(made / "base")
    for kind, options in {**{k: o for k, (o, _) in KINDS.items()}, "plain": Q}.items():
        config = LoraConfig(r=2, init_lora_weights=False, **options)
        model = get_peft_model(base(tie_word_embeddings=True), config)
        move(model, "default")
        model.save_pretrained(made / kind)
    return made


def output(checkpoint: Path, *adapters: Path) -> np.ndarray:
    model: Any = CausalLM.from_pretrained(checkpoint, dtype="float64")
    names = []
    for number, adapter in enumerate(adapters):
        names.append("default" if not number else f"a{number}")
        if number:
            model.load_adapter(adapter, names[-1])
        else:
            model = PeftModel.from_pretrained(model, adapter)
    if names:
        model.set_adapter(names)
    return np.asarray(model(IDS).numpy())


def is_near(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(one - other).max() <= tolerance * np.abs(other).max())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_extract_of_a_tied_model_are_each_other_s_inverse(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """merge keeps the adapter's output, or shares one weight, or refuses; extract finds it all."""
    keeps = KINDS[kind][1]
    expected = output(folder / "base", folder / kind)
    for tied in CHOICES:
        if (tied is None and None not in keeps) or (tied == "share" and kind in BOTH_APART):
            with pytest.raises(ConfigError, match="choose tied='untie'"):
                merge(folder / "base", [folder / kind], tmp_path / "no", tied=tied)
            continue
        tuned = tmp_path / f"tuned {tied}"
        merge(folder / "base", [folder / kind], tuned, tied=tied)
        assert is_near(output(tuned), expected) == (tied in keeps)
        is_untied = tied == "untie" and None not in keeps
        assert json.loads((tuned / "config.json").read_text())["tie_word_embeddings"] != is_untied
        difference = diff(folder / "base", tuned)
        assert difference["only in b"] == (["lm_head.weight"] if is_untied else [])

        found = tmp_path / f"found {tied}"
        extract(folder / "base", tuned, 16, found)
        assert is_near(output(folder / "base", found), output(tuned))
        assert inspect_adapter(found, folder / "base")["mismatches"] == []
        assert read_adapter(found)[0]["ensure_weight_tying"] is not is_untied
        again = tmp_path / f"again {tied}"
        merge(folder / "base", [found], again, tied="untie" if is_untied else None)
        assert is_near(output(again), output(tuned))
        convert(tuned, tmp_path / f"half {tied}", dtype="bfloat16")
        assert is_near(output(tmp_path / f"half {tied}"), output(tuned), 0.1)


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_combine_and_resize_keep_what_a_tied_model_computes(
    kind: str, how: str, folder: Path, tmp_path: Path
) -> None:
    for number, others in enumerate(([kind], [kind, "plain"], ["plain", kind])):
        out = tmp_path / f"{number}"
        adapters = [folder / name for name in others]
        combine(adapters, out, how=how, r=4 if how == "svd" else None)
        assert inspect_adapter(out, folder / "base")["mismatches"] == []
        assert is_near(output(folder / "base", out), output(folder / "base", *adapters))
    resize(folder / kind, 2, tmp_path / "resized")
    assert is_near(
        output(folder / "base", tmp_path / "resized"), output(folder / "base", folder / kind)
    )


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_resize_keeps_one_weight_for_embedding_and_head(seed: int, r: int, tmp_path: Path) -> None:
    """The factors of the two are each other's transposes, whatever the rank; the file fits."""
    plain = base(tie_word_embeddings=True, vocab_size=23)
    plain.save_pretrained(tmp_path / "base")
    options = KINDS["one for both"][0]
    model = get_peft_model(plain, LoraConfig(r=3, init_lora_weights=False, **options), seed=seed)
    move(model, "default", seed)
    model.save_pretrained(tmp_path / "adapter")
    resize(tmp_path / "adapter", r, tmp_path / "resized")
    assert inspect_adapter(tmp_path / "resized", tmp_path / "base")["mismatches"] == []
    merge(tmp_path / "base", [tmp_path / "resized"], tmp_path / "merged")
    expected = output(tmp_path / "base", tmp_path / "resized")
    assert is_near(output(tmp_path / "merged"), expected)
    if r >= 3:
        assert is_near(expected, output(tmp_path / "base", tmp_path / "adapter"))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_shares_or_unties_as_merge_does(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """Bit for bit, or both refuse. A model needs no choice for a copy, which has its own weight."""
    for tied in CHOICES:
        model = PeftModel.from_pretrained(CausalLM.from_pretrained(folder / "base"), folder / kind)
        if tied is None and kind in SAVED:
            merge(folder / "base", [folder / kind], tmp_path / "None", tied="untie")
        else:
            try:
                merge(folder / "base", [folder / kind], tmp_path / f"{tied}", tied=tied)
            except ConfigError:
                with pytest.raises(ConfigError, match="choose tied='untie'"):
                    model.merge_and_unload(tied=tied)
                continue
        plain = model.merge_and_unload(tied=tied)
        expected = CausalLM.from_pretrained(tmp_path / f"{tied}")
        assert plain.config.tie_word_embeddings == expected.config.tie_word_embeddings
        assert bits(plain) == bits(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert_of_an_adapter_keeps_it_readable(
    kind: str, dtype: str, folder: Path, tmp_path: Path
) -> None:
    """Copies of the base's weight in the file are rounded too, and are still the base's."""
    convert(folder / kind, tmp_path / "half", dtype=dtype)
    assert inspect_adapter(tmp_path / "half", folder / "base")["mismatches"] == []
    expected = output(folder / "base", folder / kind)
    assert is_near(output(folder / "base", tmp_path / "half"), expected, 0.1)


def test_convert_of_an_adapter_does_not_hide_another_base(folder: Path, tmp_path: Path) -> None:
    fields, tensors = read_adapter(folder / "head")
    key = HEAD.replace(".weight", ".base_layer.weight")
    tensors[key] = tensors[key] * np.float32(1.02)
    (tmp_path / "other").mkdir()
    save_file(tmp_path / "other" / "adapter_model.safetensors", tensors)
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(fields))
    convert(tmp_path / "other", tmp_path / "half", dtype="bfloat16")
    [mismatch] = inspect_adapter(tmp_path / "half", folder / "base")["mismatches"]
    assert mismatch.startswith(f"{key} differs from the base's")


@pytest.mark.filterwarnings("ignore:.*above the full rank")
@pytest.mark.parametrize("name", ["llama_tied_llama3rope", "gpt2"])
def test_extract_of_a_tied_model_tuned_in_full_saves_its_one_weight_once(
    name: str, tmp_path: Path
) -> None:
    """As `finetune --method full` leaves it: every weight has changed, the embedding too."""
    tuned = CausalLM.from_pretrained(GOLDEN / name)
    rng = np.random.default_rng(0)
    for p in tuned.parameters():
        p.data = p.data + rng.standard_normal(p.shape).astype(p.dtype) / 8
    tuned.save_pretrained(tmp_path / "tuned")
    rows = extract(GOLDEN / name, tmp_path / "tuned", 16, tmp_path / "out")
    assert max(row["relative"] for row in rows) < 1e-6
    fields, tensors = read_adapter(tmp_path / "out")
    embedding = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    assert embedding in fields["modules_to_save"]
    assert "lm_head" not in fields["modules_to_save"]
    assert fields["ensure_weight_tying"] is True
    key = f"base_model.model.{embedding}.weight"
    assert np.array_equal(tensors[HEAD], tensors[key])  # as in PEFT's files
    expected = logits(tmp_path / "tuned")
    assert is_near(logits(GOLDEN / name, tmp_path / "out"), expected)
    merge(GOLDEN / name, [tmp_path / "out"], tmp_path / "merged")
    assert is_near(logits(tmp_path / "merged"), expected)
    merged = read_weights(tmp_path / "merged")
    assert set(merged) == set(read_weights(GOLDEN / name))


def test_extract_takes_a_tied_weight_that_is_stored_twice(folder: Path, tmp_path: Path) -> None:
    """Some writers store a tied head beside its embedding."""
    merge(folder / "base", [folder / "saved as one"], tmp_path / "tuned")
    expected = output(tmp_path / "tuned")
    for copied in (["base"], ["tuned"], ["base", "tuned"]):
        folders = {"base": folder / "base", "tuned": tmp_path / "tuned"}
        for name in copied:
            twice = tmp_path / f"{'+'.join(copied)} {name}"
            twice.mkdir()
            weights = read_weights(folders[name])
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
            save_file(twice / WEIGHTS, weights)
            (twice / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
            folders[name] = twice
        out = tmp_path / f"{'+'.join(copied)} out"
        extract(folders["base"], folders["tuned"], 16, out)
        assert read_adapter(out)[0]["modules_to_save"] == ["model.embed_tokens"]
        assert is_near(output(folder / "base", out), expected)
