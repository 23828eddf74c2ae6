"""Adapters, configurations and tokenizers that a stranger may send: each refused by name, and nothing harmed by it.

Files that are no safetensors, no JSON or no folder are in test_safetensors and test_checkpoint, command lines and texts
in test_cli; all go through the one harness.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_checkpoint
import test_safetensors
from harness import TAKEN, refused, unharmed

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, get_peft_model
from minilora.data import ByteTokenizer, load_tokenizer
from minilora.errors import ConfigError, DataError, FormatError, MiniloraError
from minilora.formats import load_file, read_checkpoint, save_file

SHAPE = TransformerConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
HANG = ["(([a-z_0-9]+)*\\.?)*!", "(.*)*x", "(x+x+)+y"]  # a backtracking engine takes minutes over one name
BOMBS = ["(a|aa)+$" * 50, "x{1,1000}" * 100, "(" * 300]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("good")
    base = CausalLM(SHAPE, seed=0)
    base.save_pretrained(folder / "base")
    ByteTokenizer().save(folder / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def world(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "world"))


Change = Callable[[Path], object]


def fields(file: str, **changes: Any) -> Change:
    """These fields of a JSON file have other values; a value that is already JSON text is put in as it is."""

    def change(world: Path) -> None:
        path = world / file
        found = json.loads(path.read_text()) | {k: v for k, v in changes.items() if not isinstance(v, Raw)}
        text = json.dumps(found | {k: f"<{k}>" for k, v in changes.items() if isinstance(v, Raw)})
        for k, v in changes.items():
            text = text.replace(f'"<{k}>"', str(v)) if isinstance(v, Raw) else text
        path.write_text(text)

    return change


class Raw(str):
    """JSON as it is to stand in the file, though no serialiser would write it."""


def adapter(**changes: Any) -> Change:
    return fields("adapter/adapter_config.json", **changes)


def config(**changes: Any) -> Change:
    return fields("base/config.json", **changes)


def tensors(file: str, change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def rewrite(world: Path) -> None:
        found = load_file(world / file)
        change(found)
        save_file(world / file, found)

    return rewrite


def of_adapter(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    return tensors("adapter/adapter_model.safetensors", change)


def of_base(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    return tensors("base/model.safetensors", change)


A, C, T = "adapter", "base", "base/tokenizer.json"  # what the message must name
ROWS: dict[str, tuple[Change, type[MiniloraError], str, str]] = {
    # an adapter that does not fit
    "a missing key": (of_adapter(lambda t: t.pop(Q.format("A"))), FormatError, "missing .*lora_A", A),
    "a key too many": (of_adapter(lambda t: t.update(more=np.zeros(1))), FormatError, "unknown more", A),
    "a factor's shape": (of_adapter(lambda t: t.update({Q.format("B"): np.zeros((5, 2))})), FormatError, "needs", A),
    "two factors exchanged": (
        of_adapter(lambda t: t.update({Q.format("A"): t[Q.format("B")], Q.format("B"): t[Q.format("A")]})),
        FormatError, "needs", A,
    ),
    "another rank": (adapter(r=3), FormatError, r"needs \(3, 16\)", A),
    "another base": (adapter(target_modules=["c_attn"]), FormatError, "'c_attn' match nothing", A),
    "20,000 keys": (of_adapter(lambda t: t.update({f"k{i}": np.zeros(0) for i in range(20_000)})),
                       FormatError, "and 19997 more", A),
    # its numbers
    **{f"r = {r!r}": (adapter(r=r), ConfigError, "r must be", A) for r in (0, -1, 2**31, 1.5, True, "8", None, [8])},
    **{f"lora_alpha = {a!r}": (adapter(lora_alpha=a), ConfigError, "lora_alpha must be", A)
       for a in (0, -1, True, "8", None)},
    **{f"lora_alpha = {a}": (adapter(lora_alpha=Raw(a)), FormatError, "not valid JSON", A)
       for a in ("NaN", "Infinity", "1e400", "9" * 5000)},
    **{f"lora_dropout = {p!r}": (adapter(lora_dropout=p), ConfigError, "lora_dropout must be", A)
       for p in (-0.1, 1.0, "0", None)},
    # its names
    **{f"target_modules = {b[:20]}": (adapter(target_modules=b), ConfigError, "pattern", A) for b in BOMBS},
    **{f"rank_pattern of {b[:20]}": (adapter(rank_pattern={b: 2}), ConfigError, "pattern", A) for b in BOMBS},
    "no target": (adapter(target_modules=[]), ConfigError, "at least one name", A),
    "60,000 targets": (adapter(target_modules=["q_proj"] * 60_000), ConfigError, "target_modules must be", A),
    "escapes for a terminal": (adapter(target_modules=["\x1b[2J\x07"]), FormatError, r"\\x1b\[2J", A),
    # what it would mean
    **{f"peft_type = {k!r}": (adapter(peft_type=k), ConfigError, "peft_type must be", A)
       for k in ("IA3", "os.system", "", None, 7)},
    **{f"{name} = {v!r}"[:60]: (adapter(**{name: v}), ConfigError, name, A) for name, v in {
        "use_dora": True, "layer_replication": [[0, 2]], "megatron_config": {"x": 1}, "init_lora_weights": "../x.py",
        "alora_invocation_tokens": [1], "loftq_config": {"bits": 4}, "target_parameters": ["experts"],
        "task_type": "SEQ_CLS", "bias": "everything", "lora_bias": True,
    }.items()},
    # a model's configuration
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), ConfigError, "hidden_size", "config"),
    "an odd head": (config(head_dim=7), ConfigError, "head_dim", "config"),
    **{f"{name} = {v!r}": (config(**{name: v}), ConfigError, name, "config") for name, v in {
        "vocab_size": 0, "num_hidden_layers": -1, "rms_norm_eps": 0, "hidden_act": "os.system", "model_type": "gpt9",
        "tie_word_embeddings": 1, "num_key_value_heads": 5, "rope_parameters": {"rope_theta": 0},
    }.items()},
    "vocab_size = 10^12": (config(vocab_size=10**12), ConfigError, "vocab_size", "config"),
    "a billion layers": (config(num_hidden_layers=10**9), FormatError, "describes", C),
    "rms_norm_eps = NaN": (config(rms_norm_eps=Raw("NaN")), FormatError, "not valid JSON", C),
    "another vocabulary": (config(vocab_size=200), FormatError, r"\(256, 16\), config.json says \(200, 16\)", C),
    "tied, with a head of its own": (
        lambda w: (of_base(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))(w),
                   config(tie_word_embeddings=True)(w)),
        FormatError, "differs from the embedding", C,
    ),
    "untied, without a head": (of_base(lambda t: t.pop("lm_head.weight")), FormatError, "missing lm_head", C),
    # a tokenizer
    "tokenizer cut": (lambda w: (w / T).write_bytes((w / T).read_bytes()[:99]), FormatError, "not valid JSON", T),
    "tokenizer list": (lambda w: (w / T).write_text("[]"), FormatError, "expected a JSON object", T),
    "tokenizer twice": (lambda w: (w / T).write_text('{"a": 1, "a": 2}'), FormatError, "appears twice", T),
    "tokenizer deep": (lambda w: (w / T).write_text('{"a":' + "[" * 10**5 + "}"), FormatError, "nested deeper", T),
    "more ids than the model": (config(vocab_size=255), DataError, "256 ids, more than", T),
}  # fmt: skip


def load(world: Path) -> PeftModel:
    """Everything in the folder: the tokenizer, the base, the adapter."""
    raw, checkpoint = read_checkpoint(world / "base")
    checkpoint.close()
    load_tokenizer(
        world / "base",
        raw["vocab_size"] if type(raw.get("vocab_size")) is int and raw["vocab_size"] in (255, 256) else 256,
    )
    return PeftModel.from_pretrained(CausalLM.from_pretrained(world / "base"), world / "adapter")


@pytest.mark.parametrize("row", ROWS)
def test_a_strangers_folder(row: str, world: Path) -> None:
    change, kind, message, names = ROWS[row]
    change(world)
    with refused(kind, message, world, row, names):
        load(world)


@pytest.mark.parametrize("pattern", HANG)
def test_a_pattern_that_would_hang_is_answered_at_once(pattern: str, world: Path) -> None:
    adapter(rank_pattern={pattern: 2}, alpha_pattern={pattern: 3})(world)
    with unharmed(world, f"rank_pattern of {pattern}"), pytest.warns(UserWarning, match="matches no target"):
        load(world)
    adapter(target_modules=pattern, rank_pattern={}, alpha_pattern={})(world)
    with refused(FormatError, "match nothing", world, f"target_modules = {pattern}", A):
        load(world)


def test_the_folder_itself_is_good_and_so_are_fields_that_ask_for_code(world: Path) -> None:
    load(world)
    code = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "custom_pipelines": {"x": "evil.py"}}
    config(**code, _attn_implementation_internal="evil/kernels")(world)
    adapter(auto_mapping={"base_model_class": "evil", "parent_library": "evil.module"})(world)
    before = set(sys.modules)
    with unharmed(world, "fields that ask for code"):
        model = load(world)
    assert not {name for name in set(sys.modules) - before if not name.startswith(("numpy", "minilora"))}
    model.save_pretrained(world / "again")
    assert json.loads((world / "again/adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "evil", "parent_library": "evil.module",
    }  # fmt: skip
    model.unload().save_pretrained(world / "copy")
    assert code.items() <= json.loads((world / "copy/config.json").read_text()).items()


def test_nothing_in_a_file_imports_code_or_reaches_the_network(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hostile file of every table, read where a socket cannot be made and a new module is seen."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a file made minilora open a socket")

    monkeypatch.setattr(socket, "socket", forbidden)
    load(Path(shutil.copytree(good, tmp_path / "first")))  # whatever a good folder imports is there now
    before = set(sys.modules)
    for number, (change, *_) in enumerate(ROWS.values()):
        world = Path(shutil.copytree(good, tmp_path / str(number)))
        change(world)
        with pytest.raises(MiniloraError):
            load(world)
    for content, _ in test_safetensors.HOSTILE.values():
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FormatError):
            load_file(tmp_path / "file")
    assert set(sys.modules) == before
    assert test_checkpoint.HOSTILE_MODELS


# ---- the harness itself ----


def grow(world: Path) -> None:
    (world / "more").touch()


def touch(world: Path) -> None:
    (world / "base/config.json").write_text((world / "base/config.json").read_text() + " ")


def leak(world: Path) -> None:
    KEPT.append(open(world / "base/config.json"))  # noqa: SIM115


def feast(world: Path) -> None:
    np.ones(64 << 20, np.uint8)


KEPT: list[Any] = []


@pytest.mark.parametrize("harm", [grow, touch, leak, feast])
def test_the_harness_sees_harm(harm: Callable[[Path], None], world: Path) -> None:
    with pytest.raises(AssertionError), unharmed(world, "harm on purpose"):
        harm(world)
    TAKEN.pop()
    while KEPT:
        KEPT.pop().close()


@pytest.mark.parametrize("text", ["config: " + "x" * 500, "config \x1b[2J", "other", "config, and not what was meant"])
def test_the_harness_sees_a_bad_message(text: str, world: Path) -> None:
    with pytest.raises(AssertionError), refused(ValueError, "config: |other|J", world, "message", "config"):
        raise ValueError(text)
    with pytest.raises(AssertionError), refused(ValueError, "", world, "kind", ""):
        raise FormatError("a kind of ValueError, but not the one")
    del TAKEN[-2:]
