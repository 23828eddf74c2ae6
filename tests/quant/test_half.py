"""Weights in sixteen bits: they compute what their floats compute, bit for bit, and come back as they were stored.

Adapters of every method over them are in test_methods.py's table, too, beside those over other bases.
"""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from methods import METHODS, move
from shapes import randomised, shape
from small import bits
from strict_xp import STRICT, counted, no_sync

from minilora import AdamW, CausalLM, LoraConfig, PeftModel, get_peft_model
from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.backend import NUMPY
from minilora.cli import main
from minilora.data import Batch
from minilora.errors import ConfigError, NonFiniteError
from minilora.formats import bf16_from, read_checkpoint
from minilora.lab.demo import Plan
from minilora.lora import RankAllocator
from minilora.nn import Embedding, Linear
from minilora.quant import dequantize, quantization_report, quantize
from minilora.quant.half import (
    NAMES,
    Half,
    HalfLinear,
    HalfWeight,
    convert_to_half,
    encode_half,
    half_weight_owners,
    iterate_pieces,
)
from minilora.tools.merging import merge
from minilora.training.methods import measure_weight_memory
from minilora.training.parallel import ShardedStep, language_modelling_loss

KINDS = tuple(NAMES)
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
IDS = np.random.default_rng(0).integers(0, 11, (3, 10))
MODELS = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {},
}
ANY_MODEL = pytest.mark.parametrize("name", MODELS)


def exact(model: CausalLM, kind: str) -> CausalLM:
    """The model with every number rounded to one of `kind`."""
    for p in model.parameters():
        p.data = encode_half(p.data, kind).decode(p.dtype)
    return model


def model_of(name: str, kind: str = "bfloat16", dtype: str = "float32", **changes: Any) -> CausalLM:
    return exact(randomised(shape(name, **{**MODELS[name], **changes}), dtype), kind)


def stored(folder: Path, name: str, kind: str = "bfloat16", **changes: Any) -> Path:
    """A folder whose tensors are all of this kind."""
    convert_to_half(model_of(name, kind, **changes), kind).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    with read_checkpoint(folder)[1] as checkpoint:
        return {
            key: (checkpoint.dtype(key), checkpoint.read_bits(key).tobytes())
            for key in checkpoint.keys()
        }


def loss(model: Any) -> Tensor:
    return F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])


def halves(model: Any) -> dict[str, HalfWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, HalfWeight)}


# ---- an array -------------------------------------------------------------------------------------------------------


@ANY_KIND
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pattern_is_widened_to_its_own_value(kind: str, dtype: str) -> None:
    """By the definition of a binary format: (-1)^s 2^(e - bias) 1.m, or 0.m for the smallest e."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    width, bias = (7, 127) if kind == "bfloat16" else (10, 15)
    e, m = (
        (patterns >> width).astype(int) & (2 * bias + 1),
        (patterns & (2**width - 1)).astype(float),
    )
    value = np.where(
        e == 0, np.ldexp(m, 1 - bias - width), np.ldexp(2.0**width + m, e - bias - width)
    )
    value = np.where(e == 2 * bias + 1, np.where(m == 0, np.inf, np.nan), value) * np.where(
        patterns >> 15, -1, 1
    )
    codes = patterns if kind == "bfloat16" else patterns.view(np.float16)
    half = Half(kind, codes.reshape(256, 256))
    found = half.decode(dtype)
    assert (found.dtype, found.shape, half.size, half.nbytes) == (
        np.dtype(dtype),
        (256, 256),
        1 << 16,
        1 << 17,
    )
    assert np.array_equal(found.reshape(-1), value, equal_nan=True)
    assert np.array_equal(np.signbit(found.reshape(-1)), patterns >> 15 == 1)
    assert np.array_equal(half.decode(dtype, slice(3, 5)), found[3:5], equal_nan=True)
    there = half.to(STRICT).decode(dtype)
    assert STRICT.to_numpy(there).tobytes() == found.tobytes()
    with np.errstate(invalid="ignore"):
        again = encode_half(found, kind)
    assert np.array_equal(again.decode(dtype), found, equal_nan=True)


@ANY_KIND
def test_a_weight_reads_as_floats_and_cannot_be_written(kind: str) -> None:
    values = encode_half(np.random.default_rng(0).standard_normal((5, 3)), kind)
    weight, floats = HalfWeight(values), values.decode()
    assert (weight.shape, weight.ndim, weight.size, len(weight), weight.dtype) == (
        (5, 3),
        2,
        15,
        5,
        np.float32,
    )
    for read in (
        weight.data,
        weight.numpy(),
        np.array(weight),
        Tensor(weight).data,
        weight.take(slice(None)),
    ):
        assert read.tobytes() == floats.tobytes()
    assert weight.take(np.array([4, 0, 4])).tobytes() == floats[[4, 0, 4]].tobytes()
    assert b"".join(piece.tobytes() for piece in iterate_pieces(weight)) == floats.tobytes()
    with pytest.raises(ConfigError, match=f"{kind} cannot be assigned to"):
        weight.data = floats
    with pytest.raises(ConfigError, match=f"{kind} cannot be trained"):
        weight.requires_grad = True
    weight.data[...] = 0  # of an array that was made for this look alone
    twin = copy.deepcopy(weight)
    assert type(twin) is HalfWeight
    assert weight.data.tobytes() == twin.data.tobytes() == floats.tobytes()


def test_pieces_are_rows_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.quant.half.PIECE", 8)
    weight = HalfWeight(encode_half(np.arange(33.0).reshape(11, 3), "float16"))
    found = list(iterate_pieces(weight))
    assert [len(piece) for piece in found] == [2] * 5 + [1]
    assert np.array_equal(np.concatenate(found), weight.data)
    assert [
        len(piece) for piece in iterate_pieces(HalfWeight(encode_half(np.ones((2, 99)), "float16")))
    ] == [
        1,
        1,
    ]


# ---- a model --------------------------------------------------------------------------------------------------------


@ANY_KIND
@ANY_MODEL
def test_logits_and_gradients_have_the_bits_of_the_floats(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = stored(tmp_path, name, kind)
    wide, held = CausalLM.from_pretrained(folder), CausalLM.from_pretrained(folder, stored=True)
    assert not halves(wide)
    assert set(halves(held)) == {n for n, p in wide.named_parameters() if p.ndim == 2}
    assert (
        held.lm_head.weight is held.get_input_embeddings().weight
    ) == held.config.tie_word_embeddings
    assert bits(held) == bits(wide) == bits(model_of(name, kind))
    for p in wide.parameters():
        p.requires_grad = p.ndim == 1  # what is held in floats still trains
    batch, found = Batch(IDS[:, :-1], IDS[:, 1:]), []
    for model in (wide, held):
        assert not any(m.training for _, m in model.named_modules())
        params, each = [p for p in model.parameters() if p.requires_grad], [model(IDS).numpy()]
        for value in (loss(model), language_modelling_loss(model, batch)):
            each += [value.data, *gradients(value, params)]
        found.append([a.tobytes() for a in each])
    assert found[0] == found[1]


@ANY_KIND
@ANY_MODEL
@pytest.mark.parametrize("method", METHODS)
def test_five_steps_have_the_bits_of_five_over_floats(kind: str, name: str, method: str) -> None:
    """Autograd's own, and those of a sharded step in which dropout keeps a dense base from forming W + dW."""
    adapters = []
    for model in (model_of(name, kind), convert_to_half(model_of(name, kind), kind)):
        more = {"total_step": 11, "tfinal": 1} if method == "adalora" else {}
        config = METHODS[method].config(
            lora_alpha=6, target_modules="all-linear", lora_dropout=0.3, **more
        )
        made = get_peft_model(model, config, seed=2).train()
        move(made, "default")
        params, values = [p for p in made.parameters() if p.requires_grad], []
        optimiser, batch = AdamW(params, lr=0.02), Batch(IDS[:, :-1], IDS[:, 1:])
        allocator = RankAllocator.of(made) if method == "adalora" else None

        def take(
            value: Any, grads: list[Any], optimiser: AdamW = optimiser, allocator: Any = allocator
        ) -> None:
            optimiser.step(grads)
            if allocator is not None:
                allocator.step(grads)
            values.append(float(value))  # noqa: B023 - of this round

        with ShardedStep(made, shard=2, threads=2) as sharded:
            for step in range(5):
                value, grads = sharded.gradients(batch, params, seed=1, step=step)
                take(value, grads)
        made.eval()
        for _ in range(5):
            value = loss(made)
            take(value, gradients(value, params))
        adapters.append((values, bits(made)))
    assert adapters[0] == adapters[1]
    assert len(set(adapters[0][0])) == 10


def test_loading_holds_two_bytes_a_weight_and_a_step_widens_one_layer_at_a_time(
    tmp_path: Path,
) -> None:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "vocab_size": 4096,
        "num_hidden_layers": 6,
    }
    folder = stored(tmp_path, "gpt2", **sizes)
    batch = Batch(np.arange(16)[None], np.arange(1, 17)[None])

    def measured(stored: bool) -> tuple[float, float]:
        """Bytes a weight, at rest; and what a step takes on top, in bytes."""
        tracemalloc.start()
        model = CausalLM.from_pretrained(folder, stored=stored)
        at_rest = tracemalloc.get_traced_memory()[0] / sum(p.size for p in model.parameters())
        made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        params, before = (
            [p for p in made.parameters() if p.requires_grad],
            tracemalloc.get_traced_memory()[0],
        )
        tracemalloc.reset_peak()
        with ShardedStep(made, threads=1) as step:
            step.gradients(batch, params)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return at_rest, peak - before

    largest, activations = (
        4 * 4096 * 128,
        16 * (3 * 4096 + 6 * 24 * 128) * 4,
    )  # the head; logits, and each layer's own
    (held, added), (wide, _) = measured(True), measured(False)
    assert held < 2.3
    assert wide > 4
    assert (
        added < largest + activations < 4 * 6 * 12 * 128 * 128
    )  # which is what all layers are in floats


def test_a_dtype_is_what_is_computed_in_and_a_device_where(tmp_path: Path) -> None:
    folder = stored(tmp_path, "qwen2")
    single, double = (
        CausalLM.from_pretrained(folder, dtype, stored=True) for dtype in ("float32", "float64")
    )
    assert (
        double(IDS).numpy().tobytes()
        == CausalLM.from_pretrained(folder, "float64")(IDS).numpy().tobytes()
    )
    there = CausalLM.from_pretrained(folder, device=STRICT, stored=True)
    assert {p.backend for p in there.parameters()} == {STRICT}
    twin, expected = copy.deepcopy(there), single(IDS).numpy()
    assert twin.lm_head.weight is twin.get_input_embeddings().weight is not there.lm_head.weight
    assert there(IDS).numpy().tobytes() == twin(IDS).numpy().tobytes() == expected.tobytes()
    with counted() as meter, no_sync(), no_grad():
        there(STRICT.from_numpy(IDS))
    assert meter.downloads == meter.syncs == []
    codes = {name: p.quantized.codes.tobytes() for name, p in halves(single).items()}
    assert {
        n: p.quantized.codes.tobytes()
        for n, p in halves(there.to("cpu").to(dtype="float64")).items()
    } == codes
    assert there(IDS).numpy().tobytes() == double(IDS).numpy().tobytes()
    assert {p.backend for p in there.parameters()} == {NUMPY}


@ANY_KIND
@ANY_MODEL
def test_saved_again_it_is_the_file_that_it_came_from(kind: str, name: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "first", name, kind)
    assert {dtype for dtype, _ in tensors(folder).values()} == {NAMES[kind]}
    CausalLM.from_pretrained(folder, stored=True).save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(folder)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    assert config["dtype"] == kind
    assert "quantization_config" not in config


def test_what_sixteen_bits_cannot_hold_is_written_in_its_own(tmp_path: Path) -> None:
    model = convert_to_half(model_of("qwen2"))
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.data = bias.data + np.float32(2.0**-20)
    model.save_pretrained(tmp_path)
    assert {key for key, (dtype, _) in tensors(tmp_path).items() if dtype == "F32"} == {
        "model.layers.0.self_attn.q_proj.bias"
    }
    assert bits(CausalLM.from_pretrained(tmp_path, stored=True)) == bits(model)


def test_float32_files_and_mixed_ones_are_held_as_they_are(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "wide")
    assert not halves(CausalLM.from_pretrained(tmp_path / "wide", stored=True))
    model = model_of("llama")
    plain = model.lm_head, model.model.layers[1].mlp
    convert_to_half(model)
    model.lm_head, model.model.layers[1].mlp = plain
    model.save_pretrained(tmp_path / "mixed")
    mixed = CausalLM.from_pretrained(tmp_path / "mixed", stored=True)
    assert set(halves(mixed)) == set(halves(model))
    assert type(mixed.lm_head) is Linear
    assert mixed(IDS).numpy().tobytes() == model_of("llama")(IDS).numpy().tobytes()


def test_codes_made_of_it_are_those_of_its_floats(tmp_path: Path) -> None:
    folder = stored(tmp_path / "base", "llama")
    wide, held = CausalLM.from_pretrained(folder), CausalLM.from_pretrained(folder, stored=True)
    assert bits(quantize(held)) == bits(quantize(wide))
    assert set(halves(held)) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(quantization_report(held)) == 14
    held.save_pretrained(tmp_path / "codes")
    again = CausalLM.from_pretrained(tmp_path / "codes", stored=True)
    assert (
        again(IDS).numpy().tobytes() == held(IDS).numpy().tobytes() == wide(IDS).numpy().tobytes()
    )
    assert set(halves(again)) == set(halves(held))


def test_what_a_base_holds_is_counted() -> None:
    model = convert_to_half(model_of("gpt2"))
    vectors = sum(p.size for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.size for p in model.parameters()) - vectors
    held = measure_weight_memory(model)
    assert (held["kind"], held["layers"], held["weights"], held["bytes"]) == (
        "bfloat16",
        10,
        matrices,
        2 * matrices,
    )
    assert held["all_bytes"] == 2 * matrices + 4 * vectors


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "kind": (lambda: model_of("llama"), {"kind": "float8"}, "'float8': the kinds are bfloat16, float16"),
    "no model": (lambda: "model", {}, "expected a model"),
    "not exact": (lambda: randomised(shape("llama"), "float32"), {}, "bfloat16 cannot hold its weights exactly"),
    "another kind": (lambda: model_of("llama", "float16"), {}, r"embed_tokens: bfloat16 cannot hold"),
    "too small": (lambda: model_of("llama"), {"kind": "float16"}, "float16 cannot hold"),
    "adapters": (lambda: get_peft_model(model_of("gpt2"), LoraConfig(target_modules=["c_fc"])), {}, "c_fc has adapt"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_rounded_is_refused_before_anything_changes(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    if case == "too small":
        model.lm_head.weight.data[0, 0] = 2.0**-30
    with pytest.raises(ConfigError, match=message):
        convert_to_half(model, **options)
    assert isinstance(model, str) or not halves(model)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_it_cannot_be_trained_whole(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} is quantised, or held in sixteen bits: it cannot be trained"
    ):
        get_peft_model(
            convert_to_half(model_of("llama")),
            LoraConfig(target_modules=["q_proj"], modules_to_save=[name]),
        )


def test_there_is_nothing_to_dequantize() -> None:
    with pytest.raises(ConfigError, match="there is no quantised layer"):
        dequantize(convert_to_half(model_of("llama")))


# ---- adapters -------------------------------------------------------------------------------------------------------


@ANY_KIND
@ANY_MODEL
@pytest.mark.parametrize("method", ["lora", "rslora", "adalora"])
def test_a_merge_is_the_float64_sum_rounded_once_as_from_the_files(
    kind: str, name: str, method: str, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "base", name, kind)
    config = METHODS[method].config(lora_alpha=6, target_modules="all-linear")
    made = get_peft_model(CausalLM.from_pretrained(folder, stored=True), config, seed=2)
    move(made, "default")
    made.save_pretrained(tmp_path / "adapter")
    rows = {
        row["tensor"]: row["lost"]
        for row in merge(folder, [tmp_path / "adapter"], tmp_path / "by files")
    }
    model = made.merge_and_unload()
    model.save_pretrained(tmp_path / "in memory")
    assert tensors(tmp_path / "in memory") == tensors(tmp_path / "by files") != tensors(folder)
    lost = {key: p.lost for key, p in halves(model).items() if p.lost is not None}
    assert lost.keys() == rows.keys()
    for key, share in rows.items():
        assert lost[key] == pytest.approx(share, rel=1e-9)
        assert 0 < share < 0.1
    assert all(
        isinstance(m, HalfLinear)
        for p, m in model.named_modules()
        if p.endswith(("_proj", "c_fc", "lm_head"))
    )


def test_a_sum_beyond_the_kind_is_not_merged() -> None:
    """float16 ends at 65504; and what was merged before comes out again."""
    made = get_peft_model(
        convert_to_half(model_of("llama", "float16"), "float16"),
        LoraConfig(2, target_modules="all-linear"),
    )
    move(made, "default")
    made.model.model.layers[1].mlp.down_proj.adapters["default"].lora_B.data *= np.float32(1e6)
    before = bits(made)
    with pytest.raises(
        NonFiniteError,
        match=r"layers\.1\.mlp\.down_proj: merging default gives weights that are not finite in float16",
    ):
        made.merge_adapter()
    assert bits(made) == before
    assert not any(getattr(m, "merged", ()) for _, m in made.named_modules())


ENDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "DoRA's": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, None),
    "tied": ("qwen2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "untied": ("gpt2", {"target_modules": ["wte"]}, "untie"),
    "shared": ("gpt2", {"target_modules": ["wte"]}, "share"),
    "head": ("gpt2", {"target_modules": ["lm_head"]}, "untie"),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7]}, None),
    "tied tokens": ("gpt2", {"target_modules": ["c_fc"], "trainable_token_indices": [1, 7]}, None),
    "tokens of the head": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}},
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("case", ENDS)
def test_embeddings_heads_and_tokens_over_it(case: str, tmp_path: Path) -> None:
    name, options, tied = ENDS[case]
    found = []
    for model in (model_of(name), convert_to_half(model_of(name))):
        made = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options), seed=2)
        move(made, "default")
        params = [p for p in made.parameters() if p.requires_grad]
        value = loss(made)
        found.append([made(IDS).numpy(), *gradients(value, params)])
    assert [np.asarray(a).tobytes() for a in found[0]] == [
        np.asarray(a).tobytes() for a in found[1]
    ]
    names, adapted = set(halves(made)), made(IDS).numpy()
    with made.disable_adapter():
        assert made(IDS).numpy().tobytes() == model_of(name)(IDS).numpy().tobytes()
    plain = made.merge_and_unload(tied=tied)
    own = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in names}
    assert own <= set(halves(plain))  # and a head's own, once it is untied
    together = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert together == plain.config.tie_word_embeddings == (name != "llama" and tied != "untie")
    if tied != "share":
        assert np.abs(plain(IDS).numpy() - adapted).max() < 0.05 * np.abs(adapted).max()
    plain.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path, stored=True)
    assert again(IDS).numpy().tobytes() == plain(IDS).numpy().tobytes()
    assert {dtype for dtype, _ in tensors(tmp_path).values()} == {"BF16"}


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_commands_hold_a_base_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "base", "gpt2", vocab_size=256)
    Path("book.txt").write_text(
        "the quick brown fox jumps over the lazy dog, again and again. " * 9
    )
    line = [
        "finetune",
        "--base",
        "base",
        "--data",
        "book.txt",
        "--batch-size",
        "2",
        "--context",
        "16",
        "--r",
        "2",
    ]
    line += ["--lora-dropout", "0.2", "--warmup", "0", "--steps"]

    def run(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    said = run(*line, "6", "--out", "held", "--quantize", "stored")
    assert (
        "3,200 weights of 10 layers in 6,400 bytes of bfloat16, 50.0 % of their size in float32"
        in said
    )
    run(*line, "6", "--out", "wide")
    logs = [
        [json.loads(row)["loss"] for row in Path(out, "log.jsonl").read_text().splitlines()]
        for out in ("held", "wide")
    ]
    assert logs[0] == logs[1]
    assert tensors_of_adapter("held") == tensors_of_adapter("wide")
    run(*line, "4", "--out", "half way", "--quantize", "stored", "--save-every", "2")
    run(*line, "4", "--out", "half way", "--quantize", "stored", "--save-every", "2", "--resume")
    use = ["--base", "base", "--adapter", "held"]
    found = [run("evaluate", "--data", "book.txt", "--context", "16", *use, *more) for more in HELD]
    losses = [float(said.split()[1]) for said in found]  # here a dense base does form W + dW
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = [
        run("generate", "--prompt", "the", "--max-new-tokens", "5", *use, *more) for more in HELD
    ]
    assert found[0] == found[1]
    run("verify", *use)
    assert main(["demo", "--quantize", "stored"]) == 2
    assert "invalid choice: 'stored'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the demo trains its own"):
        Plan().adapted_by("lora", "stored")


HELD = ([], ["--quantize", "stored"])


def tensors_of_adapter(folder: str) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_a_loaded_adapter_runs_over_it(tmp_path: Path) -> None:
    folder = stored(tmp_path / "base", "qwen2")
    made = get_peft_model(
        CausalLM.from_pretrained(folder), LoraConfig(r=2, init_lora_weights=False)
    )
    made.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        CausalLM.from_pretrained(folder, stored=True), tmp_path / "adapter"
    )
    assert again(IDS).numpy().tobytes() == made(IDS).numpy().tobytes()


def test_a_damaged_number_is_found_without_widening_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = convert_to_half(model_of("gpt2", vocab_size=256))
    model.transformer.h[1].mlp.c_fc.weight.quantized.codes[3, 2] = bf16_from(np.array([np.nan]))[0]
    model.save_pretrained(tmp_path)
    words = ["generate", "--base", str(tmp_path), "--prompt", "a", "--quantize", "stored"]
    assert main(words) != 0
    assert "transformer.h.1.mlp.c_fc.weight is not finite" in capsys.readouterr().err


def test_all_that_can_be_held_are_dense_layers_and_embeddings() -> None:
    model = small.base()
    assert {type(m) for m in half_weight_owners(model).values()} == {Linear, Embedding}
    assert len(half_weight_owners(model)) == 16
    assert not half_weight_owners(convert_to_half(exact(model, "bfloat16")))
