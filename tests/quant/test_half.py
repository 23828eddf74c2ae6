"""Half precision: weights compute what their floats compute, bit for bit, and are saved as stored.

Adapters of every method over such weights are in test_method_table.py, with other bases.
"""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
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
BATCH = Batch(IDS[:, :-1], IDS[:, 1:])
MODELS: dict[str, dict[str, Any]] = {"gpt2": {}}
MODELS["llama"] = {"tie_word_embeddings": False}
MODELS["qwen2"] = {"tie_word_embeddings": True}
ANY_MODEL = pytest.mark.parametrize("name", MODELS)


def exact(model: CausalLM, kind: str) -> CausalLM:
    """The model with every number rounded to one of `kind`."""
    for p in model.parameters():
        p.data = encode_half(p.data, kind).decode(p.dtype)
    return model


def model_of(name: str, kind: str = "bfloat16", dtype: str = "float32", **changes: Any) -> CausalLM:
    config = shape(name, **{**MODELS[name], **changes})
    return exact(randomised(config, dtype), kind)


def stored(folder: Path, name: str, kind: str = "bfloat16", **changes: Any) -> Path:
    """A folder whose tensors are all of this kind."""
    model = convert_to_half(model_of(name, kind, **changes), kind)
    model.save_pretrained(folder)
    return folder


def load_half(folder: Path, dtype: str = "float32", device: Any = "cpu") -> CausalLM:
    return CausalLM.from_pretrained(folder, dtype, device, stored=True)


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """The dtype and the bytes of each tensor of a folder."""
    found = {}
    with read_checkpoint(folder)[1] as checkpoint:
        for key in checkpoint.keys():
            found[key] = (checkpoint.dtype(key), checkpoint.read_bits(key).tobytes())
    return found


def loss(model: Any) -> Tensor:
    return F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])


def logits(model: Any) -> bytes:
    return model(IDS).numpy().tobytes()  # type: ignore[no-any-return]


def trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def halves(model: Any) -> dict[str, HalfWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, HalfWeight)}


# ---- an array -----------------------------------------------------------------------------------


def every_value(kind: str, patterns: np.ndarray) -> np.ndarray:
    """Values by the definition of a binary format: (-1)^s 2^(e - bias) 1.m, or 0.m for e = 0."""
    width, bias = (7, 127) if kind == "bfloat16" else (10, 15)
    e = (patterns >> width).astype(int) & (2 * bias + 1)
    m = (patterns & (2**width - 1)).astype(float)
    subnormal = np.ldexp(m, 1 - bias - width)
    normal = np.ldexp(2.0**width + m, e - bias - width)
    special = np.where(m == 0, np.inf, np.nan)
    value = np.where(e == 0, subnormal, normal)
    value = np.where(e == 2 * bias + 1, special, value)
    return value * np.where(patterns >> 15, -1, 1)


@ANY_KIND
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_half_decode_widens_every_pattern_to_its_value(kind: str, dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    value = every_value(kind, patterns)
    codes = patterns if kind == "bfloat16" else patterns.view(np.float16)
    half = Half(kind, codes.reshape(256, 256))
    found = half.decode(dtype)
    assert found.dtype == np.dtype(dtype)
    assert found.shape == (256, 256)
    assert (half.size, half.nbytes) == (1 << 16, 1 << 17)
    assert np.array_equal(found.reshape(-1), value, equal_nan=True)
    assert np.array_equal(np.signbit(found.reshape(-1)), patterns >> 15 == 1)
    assert np.array_equal(half.decode(dtype, slice(3, 5)), found[3:5], equal_nan=True)
    there = half.to(STRICT).decode(dtype)
    assert STRICT.to_numpy(there).tobytes() == found.tobytes()
    with np.errstate(invalid="ignore"):
        again = encode_half(found, kind)
    assert np.array_equal(again.decode(dtype), found, equal_nan=True)


@ANY_KIND
def test_half_weight_reads_as_floats_and_cannot_be_written(kind: str) -> None:
    values = encode_half(np.random.default_rng(0).standard_normal((5, 3)), kind)
    weight = HalfWeight(values)
    floats = values.decode()
    assert (weight.shape, weight.ndim) == ((5, 3), 2)
    assert (weight.size, len(weight)) == (15, 5)
    assert weight.dtype == np.float32
    for read in (weight.data, weight.numpy(), np.array(weight), weight.read_rows(slice(None))):
        assert read.tobytes() == floats.tobytes()
    assert Tensor(weight).data.tobytes() == floats.tobytes()
    assert weight.read_rows(np.array([4, 0, 4])).tobytes() == floats[[4, 0, 4]].tobytes()
    pieces = [piece.tobytes() for piece in iterate_pieces(weight)]
    assert b"".join(pieces) == floats.tobytes()
    with pytest.raises(ConfigError, match=f"{kind} cannot be assigned to"):
        weight.data = floats
    with pytest.raises(ConfigError, match=f"{kind} cannot be trained"):
        weight.requires_grad = True
    weight.data[...] = 0  # of an array that was widened for this one access
    twin = copy.deepcopy(weight)
    assert type(twin) is HalfWeight
    assert weight.data.tobytes() == twin.data.tobytes() == floats.tobytes()


def test_iterate_pieces_gives_rows_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.quant.half.PIECE", 8)
    weight = HalfWeight(encode_half(np.arange(33.0).reshape(11, 3), "float16"))
    found = list(iterate_pieces(weight))
    assert [len(piece) for piece in found] == [2] * 5 + [1]
    assert np.array_equal(np.concatenate(found), weight.data)
    wide = HalfWeight(encode_half(np.ones((2, 99)), "float16"))
    assert [len(piece) for piece in iterate_pieces(wide)] == [1, 1]


# ---- a model ------------------------------------------------------------------------------------


@ANY_KIND
@ANY_MODEL
def test_from_pretrained_stored_has_the_bits_of_the_floats(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Its logits, and the gradients of what is stored in floats and still trains."""
    folder = stored(tmp_path, name, kind)
    wide = CausalLM.from_pretrained(folder)
    half = load_half(folder)
    matrices = {n for n, p in wide.named_parameters() if p.ndim == 2}
    assert not halves(wide)
    assert set(halves(half)) == matrices
    is_tied = half.lm_head.weight is half.get_input_embeddings().weight
    assert is_tied == half.config.tie_word_embeddings
    assert bits(half) == bits(wide) == bits(model_of(name, kind))
    for p in wide.parameters():
        p.requires_grad = p.ndim == 1

    def results(model: CausalLM) -> list[bytes]:
        assert not any(m.training for _, m in model.named_modules())
        found = [model(IDS).numpy()]
        for value in (loss(model), language_modelling_loss(model, BATCH)):
            found += [value.data, *gradients(value, trainable(model))]
        return [array.tobytes() for array in found]

    assert results(half) == results(wide)


def five_steps_of_both_loops(model: Any, method: str) -> tuple[list[float], dict[str, bytes]]:
    """The losses and the parameters after five sharded steps and five of plain autograd."""
    more = {"total_step": 11, "tfinal": 1} if method == "adalora" else {}
    config = METHODS[method].config(
        lora_alpha=6, target_modules="all-linear", lora_dropout=0.3, **more
    )
    made = get_peft_model(model, config, seed=2).train()
    move(made, "default")
    params = trainable(made)
    losses: list[float] = []
    optimiser = AdamW(params, lr=0.02)
    allocator = RankAllocator.of(made) if method == "adalora" else None

    def take(value: Any, grads: list[Any]) -> None:
        optimiser.step(grads)
        if allocator is not None:
            allocator.step(grads)
        losses.append(float(value))

    with ShardedStep(made, shard=2, threads=2) as sharded:
        for step in range(5):
            take(*sharded.gradients(BATCH, params, seed=1, step=step))
    made.eval()
    for _ in range(5):
        value = loss(made)
        take(value, gradients(value, params))
    return losses, bits(made)


@ANY_KIND
@ANY_MODEL
@pytest.mark.parametrize("method", METHODS)
def test_convert_to_half_keeps_the_bits_of_five_steps(kind: str, name: str, method: str) -> None:
    """In sharded steps dropout keeps a dense base from forming W + dW."""
    wide = five_steps_of_both_loops(model_of(name, kind), method)
    half = five_steps_of_both_loops(convert_to_half(model_of(name, kind), kind), method)
    assert half == wide
    assert len(set(wide[0])) == 10


def test_from_pretrained_stored_takes_two_bytes_per_weight_and_widens_one_layer_at_a_time(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512}
    sizes |= {"vocab_size": 4096, "num_hidden_layers": 6}
    folder = stored(tmp_path, "gpt2", **sizes)
    batch = Batch(np.arange(16)[None], np.arange(1, 17)[None])

    def measure(stored: bool) -> tuple[float, float]:
        """Bytes per weight at rest, and the bytes that a step adds to all."""
        tracemalloc.start()
        model = CausalLM.from_pretrained(folder, stored=stored)
        count = sum(p.size for p in model.parameters())
        at_rest = tracemalloc.get_traced_memory()[0] / count
        made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        params = trainable(made)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with ShardedStep(made, threads=1) as step:
            step.gradients(batch, params)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return at_rest, peak - before

    head = 4 * 4096 * 128  # the largest layer
    activations = 16 * (3 * 4096 + 6 * 24 * 128) * 4  # logits, and those of each layer
    all_layers = 4 * 6 * 12 * 128 * 128  # in floats
    half, added = measure(True)
    wide, _ = measure(False)
    assert half < 2.3
    assert wide > 4
    assert added < head + activations < all_layers


def test_from_pretrained_stored_computes_in_a_dtype_and_on_a_device(tmp_path: Path) -> None:
    folder = stored(tmp_path, "qwen2")
    single = load_half(folder)
    double = load_half(folder, "float64")
    assert logits(double) == logits(CausalLM.from_pretrained(folder, "float64"))
    there = load_half(folder, device=STRICT)
    assert {p.backend for p in there.parameters()} == {STRICT}
    twin = copy.deepcopy(there)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert twin.lm_head.weight is not there.lm_head.weight
    assert logits(there) == logits(twin) == logits(single)
    with counted() as meter, no_sync(), no_grad():
        there(STRICT.from_numpy(IDS))
    assert meter.downloads == meter.syncs == []
    back = there.to("cpu").to(dtype="float64")
    for name, p in halves(back).items():
        assert p.quantized.codes.tobytes() == halves(single)[name].quantized.codes.tobytes()
    assert halves(back).keys() == halves(single).keys()
    assert logits(there) == logits(double)
    assert {p.backend for p in there.parameters()} == {NUMPY}


@ANY_KIND
@ANY_MODEL
def test_save_pretrained_writes_the_file_that_it_came_from(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "first", name, kind)
    again = tmp_path / "again"
    assert {dtype for dtype, _ in tensors(folder).values()} == {NAMES[kind]}
    load_half(folder).save_pretrained(again)
    assert tensors(again) == tensors(folder)
    config = json.loads((again / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    assert config["dtype"] == kind
    assert "quantization_config" not in config


def test_save_pretrained_writes_floats_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = convert_to_half(model_of("qwen2"))
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.data = bias.data + np.float32(2.0**-20)
    model.save_pretrained(tmp_path)
    wide = [key for key, (dtype, _) in tensors(tmp_path).items() if dtype == "F32"]
    assert wide == ["model.layers.0.self_attn.q_proj.bias"]
    assert bits(load_half(tmp_path)) == bits(model)


def test_from_pretrained_stored_keeps_float32_files_and_mixed_ones_as_they_are(
    tmp_path: Path,
) -> None:
    model_of("llama").save_pretrained(tmp_path / "wide")
    assert not halves(load_half(tmp_path / "wide"))
    model = model_of("llama")
    head = model.lm_head
    mlp = model.model.layers[1].mlp
    convert_to_half(model)
    model.lm_head = head
    model.model.layers[1].mlp = mlp
    model.save_pretrained(tmp_path / "mixed")
    mixed = load_half(tmp_path / "mixed")
    assert set(halves(mixed)) == set(halves(model))
    assert type(mixed.lm_head) is Linear
    assert logits(mixed) == logits(model_of("llama"))


def test_quantize_makes_the_codes_of_the_floats(tmp_path: Path) -> None:
    folder = stored(tmp_path / "base", "llama")
    wide = CausalLM.from_pretrained(folder)
    half = load_half(folder)
    assert bits(quantize(half)) == bits(quantize(wide))
    assert set(halves(half)) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(quantization_report(half)) == 14
    half.save_pretrained(tmp_path / "codes")
    again = load_half(tmp_path / "codes")
    assert logits(again) == logits(half) == logits(wide)
    assert set(halves(again)) == set(halves(half))


def test_measure_weight_memory_counts_half_precision() -> None:
    model = convert_to_half(model_of("gpt2"))
    vectors = sum(p.size for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.size for p in model.parameters()) - vectors
    report = measure_weight_memory(model)
    assert report["kind"] == "bfloat16"
    assert report["layers"] == 10
    assert report["weights"] == matrices
    assert report["bytes"] == 2 * matrices
    assert report["all_bytes"] == 2 * matrices + 4 * vectors


def with_a_small_weight() -> CausalLM:
    model = model_of("llama")
    model.lm_head.weight.data[0, 0] = 2.0**-30
    return model


def with_adapters() -> PeftModel:
    return get_peft_model(model_of("gpt2"), LoraConfig(target_modules=["c_fc"]))


# Case -> (a function that makes the model, options, what the message says).
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {}


def refused(case: str, message: str, make: Callable[[], Any], **options: Any) -> None:
    REFUSED[case] = (make, options, message)


kinds = "kind must be one of bfloat16, float16, got 'float8'"
refused("kind", kinds, lambda: model_of("llama"), kind="float8")
refused("no model", "expected a model", lambda: "model")
not_exact = "bfloat16 cannot hold its weights exactly"
refused("not exact", not_exact, lambda: randomised(shape("llama"), "float32"))
other_kind = "embed_tokens: bfloat16 cannot hold"
refused("another kind", other_kind, lambda: model_of("llama", "float16"))
refused("too small", "float16 cannot hold", with_a_small_weight, kind="float16")
refused("adapters", "c_fc has adapters", with_adapters)


@pytest.mark.parametrize("case", REFUSED)
def test_convert_to_half_refuses_before_anything_changes(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    with pytest.raises(ConfigError, match=message):
        convert_to_half(model, **options)
    assert isinstance(model, str) or not halves(model)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_modules_to_save_refuse_half_precision(name: str) -> None:
    model = convert_to_half(model_of("llama"))
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    message = f"{name} is quantised or in 16 bits and cannot be trained"
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, config)


def test_dequantize_refuses_half_precision() -> None:
    with pytest.raises(ConfigError, match="the model has no quantised layer"):
        dequantize(convert_to_half(model_of("llama")))


def test_half_weight_owners_are_dense_layers_and_embeddings() -> None:
    model = small.base()
    owners = half_weight_owners(model)
    assert {type(module) for module in owners.values()} == {Linear, Embedding}
    assert len(owners) == 16
    assert not half_weight_owners(convert_to_half(exact(model, "bfloat16")))


# ---- adapters -----------------------------------------------------------------------------------


@ANY_KIND
@ANY_MODEL
@pytest.mark.parametrize("method", ["lora", "rslora", "adalora"])
def test_merge_and_unload_rounds_the_float64_sum_once_as_merging_files_does(
    kind: str, name: str, method: str, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "base", name, kind)
    config = METHODS[method].config(lora_alpha=6, target_modules="all-linear")
    made = get_peft_model(load_half(folder), config, seed=2)
    move(made, "default")
    made.save_pretrained(tmp_path / "adapter")
    by_files = tmp_path / "by files"
    in_memory = tmp_path / "in memory"
    lost_by_files = {}
    for row in merge(folder, [tmp_path / "adapter"], by_files):
        lost_by_files[row["tensor"]] = row["lost"]
    model = made.merge_and_unload()
    model.save_pretrained(in_memory)
    assert tensors(in_memory) == tensors(by_files) != tensors(folder)
    lost = {key: p.lost for key, p in halves(model).items() if p.lost is not None}
    assert lost.keys() == lost_by_files.keys()
    for key, share in lost_by_files.items():
        assert lost[key] == pytest.approx(share, rel=1e-9)
        assert 0 < share < 0.1
    for path, module in model.named_modules():
        if path.endswith(("_proj", "c_fc", "lm_head")):
            assert isinstance(module, HalfLinear)


def test_merge_adapter_refuses_a_sum_beyond_the_kind() -> None:
    """float16 ends at 65504; and what was merged before comes out again."""
    model = convert_to_half(model_of("llama", "float16"), "float16")
    made = get_peft_model(model, LoraConfig(2, target_modules="all-linear"))
    move(made, "default")
    made.model.model.layers[1].mlp.down_proj.adapters["default"].lora_B.data *= np.float32(1e6)
    before = bits(made)
    message = (
        r"layers\.1\.mlp\.down_proj: merging default gives weights that are not finite in float16"
    )
    with pytest.raises(NonFiniteError, match=message):
        made.merge_adapter()
    assert bits(made) == before
    assert not any(getattr(module, "merged", ()) for _, module in made.named_modules())


# Case -> (type of model, options of LoraConfig, `tied` of merge_and_unload).
ENDS: dict[str, tuple[str, dict[str, Any], str | None]] = {}


def end(case: str, name: str, targets: str, tied: str | None = None, **options: Any) -> None:
    ENDS[case] = (name, {"target_modules": targets.split(), **options}, tied)


end("embedding", "llama", "embed_tokens q_proj")
end("DoRA's", "llama", "embed_tokens", use_dora=True)
end("tied", "qwen2", "embed_tokens", ensure_weight_tying=True)
end("untied", "gpt2", "wte", "untie")
end("shared", "gpt2", "wte", "share")
end("head", "gpt2", "lm_head", "untie")
end("tokens", "llama", "q_proj", trainable_token_indices=[1, 7])
end("tied tokens", "gpt2", "c_fc", trainable_token_indices=[1, 7])
end("tokens of the head", "llama", "q_proj", trainable_token_indices={"lm_head": [2]})


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("case", ENDS)
def test_adapters_of_embeddings_heads_and_tokens_over_half_precision(
    case: str, tmp_path: Path
) -> None:
    name, options, tied = ENDS[case]
    config = LoraConfig(r=2, init_lora_weights=False, **options)

    def adapted(model: CausalLM) -> PeftModel:
        made = get_peft_model(model, config, seed=2)
        move(made, "default")
        return made

    def results(made: PeftModel) -> list[bytes]:
        grads = gradients(loss(made), trainable(made))
        return [logits(made), *(np.asarray(g).tobytes() for g in grads)]

    made = adapted(convert_to_half(model_of(name)))
    assert results(made) == results(adapted(model_of(name)))
    names = set(halves(made))
    before = made(IDS).numpy()
    with made.disable_adapter():
        assert logits(made) == logits(model_of(name))
    plain = made.merge_and_unload(tied=tied)
    plain_names = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in names}
    assert plain_names <= set(halves(plain))  # and the head's, once it is untied
    is_tied = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert is_tied == plain.config.tie_word_embeddings
    assert is_tied == (name != "llama" and tied != "untie")
    if tied != "share":
        assert np.abs(plain(IDS).numpy() - before).max() < 0.05 * np.abs(before).max()
    plain.save_pretrained(tmp_path)
    assert logits(load_half(tmp_path)) == logits(plain)
    assert {dtype for dtype, _ in tensors(tmp_path).values()} == {"BF16"}


def test_peft_model_from_pretrained_runs_over_half_precision(tmp_path: Path) -> None:
    folder = stored(tmp_path / "base", "qwen2")
    config = LoraConfig(r=2, init_lora_weights=False)
    made = get_peft_model(CausalLM.from_pretrained(folder), config)
    made.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_half(folder), tmp_path / "adapter")
    assert logits(again) == logits(made)


# ---- the command line ---------------------------------------------------------------------------

STORED = ("--quantize", "stored")


def test_finetune_and_others_keep_a_base_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "base", "gpt2", vocab_size=256)
    text = "the quick brown fox jumps over the lazy dog, again and again. " * 9
    Path("book.txt").write_text(text)

    def run(line: str, *more: str) -> str:
        assert main([*line.split(), *more]) == 0
        return capsys.readouterr().out

    finetune = "finetune --base base --data book.txt --batch-size 2 --context 16 --r 2 "
    finetune += "--lora-dropout 0.2 --warmup 0 --steps "
    said = run(finetune + "6 --out half", *STORED)
    share = "in 6,400 bytes of bfloat16, 50.0 % of their size in float32"
    assert f"3,200 weights of 10 layers {share}" in said
    run(finetune + "6 --out wide")

    def losses(out: str) -> list[float]:
        lines = Path(out, "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def adapter(out: str) -> bytes:
        return Path(out, "adapter_model.safetensors").read_bytes()

    assert losses("half") == losses("wide")
    assert adapter("half") == adapter("wide")
    resumed = (*STORED, "--save-every", "2", "--out", "half way")
    run(finetune + "4", *resumed)
    run(finetune + "4", *resumed, "--resume")
    use = " --base base --adapter half"
    evaluate = "evaluate --data book.txt --context 16" + use
    wide = float(run(evaluate).split()[1])  # here a dense base does form W + dW
    half = float(run(evaluate, *STORED).split()[1])
    assert wide == pytest.approx(half, rel=1e-6)
    generate = "generate --prompt the --max-new-tokens 5" + use
    assert run(generate) == run(generate, *STORED)
    run("verify" + use)
    assert main(["demo", *STORED]) == 2
    assert "invalid choice: 'stored'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the demo trains its own"):
        Plan().adapted_by("lora", "stored")


def test_generate_names_a_damaged_number_without_widening_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = convert_to_half(model_of("gpt2", vocab_size=256))
    codes = model.transformer.h[1].mlp.c_fc.weight.quantized.codes
    codes[3, 2] = bf16_from(np.array([np.nan]))[0]
    model.save_pretrained(tmp_path)
    assert main(["generate", "--base", str(tmp_path), "--prompt", "a", *STORED]) != 0
    error = capsys.readouterr().err
    assert "transformer.h.1.mlp.c_fc.weight" in error
    assert "is not finite" in error
