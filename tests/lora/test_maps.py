"""What holds of every map theta -> dW: one table over all methods, their refusals, and a toy."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import maps
import numpy as np
import pytest
import small
from maps import LAYERS, ROWS, Row, draw_theta
from small import IDS, bits, logits
from strict_xp import STRICT

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.backend import get_backend
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file, read_adapter, write_adapter
from minilora.lora import LoraConfig, LoraLinear, PeftModel, get_peft_model
from minilora.lora.maps import (
    MAPS,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    OFTConfig,
    UniLoraConfig,
    VeraConfig,
)
from minilora.lora.maps.scattered import scatter
from minilora.quant import quantize
from minilora.tools.combining import combine
from minilora.tools.factoring import resize
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge
from minilora.tools.plain import make_plain
from minilora.training.parallel import ShardedStep
from minilora.verify import verify_files

METHODS = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def base(dtype: str = "float64", device: Any = "cpu") -> Any:
    return small.base(dtype, device, num_hidden_layers=1)


def adapted(row: Row, dtype: str = "float64", moved: bool = True, device: Any = "cpu") -> Any:
    """A small model with the adapter, away from its start if `moved`."""
    model = get_peft_model(base(dtype, device), row.make(), seed=1)
    rng = np.random.default_rng(3)
    for p in model.parameters():
        if p.requires_grad and moved:
            noise = (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
            p.data = p.data + p.backend.from_numpy(noise)
    return model.eval()


def near(expected: Any, share: float) -> Any:
    """Within this share of the largest expected number, or of 1."""
    return pytest.approx(expected, rel=share, abs=share * max(1.0, float(np.abs(expected).max())))


def layers(model: Any) -> dict[str, LoraLinear]:
    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, LoraLinear)}


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- the table -----------------------------------------------------------------------------------


def test_rows_have_every_map() -> None:
    assert {row.config for row in ROWS.values()} == set(MAPS.values())


@METHODS
def test_map_pull_is_the_derivative_of_delta_and_linear(row: Row) -> None:
    """Central differences of <G, dW> along random directions, in float64."""
    rng = np.random.default_rng(0)
    for path, one in row.make().maps(LAYERS).items():
        theta = draw_theta(one, rng)
        W, G, H = rng.standard_normal((3, *LAYERS[path]))
        grads = one.pull(theta, W, G)
        assert len(grads) == len(theta) - len(one.SHARED) * (not one.SHARED_TRAINS)
        for i, grad in enumerate(grads):
            assert grad.shape == theta[i].shape
            direction = rng.standard_normal(grad.shape)
            ends = []
            for step in (1e-6, -1e-6):
                moved = [*theta]
                moved[i] = theta[i] + step * direction
                ends.append(float((one.delta(moved, W) * G).sum()))
            slope = float((grad * direction).sum())
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-7)
        for both, a, b in zip(one.pull(theta, W, G + H), grads, one.pull(theta, W, H), strict=True):
            assert both == pytest.approx(a + b, rel=1e-12, abs=1e-12)
        dW = one.delta(theta, W)
        assert dW.shape == LAYERS[path]
        assert np.linalg.matrix_rank(dW, tol=1e-10) <= one.rank_bound(W)


@METHODS
@DTYPES
def test_map_starts_as_the_base_bit_for_bit(row: Row, dtype: str) -> None:
    model = adapted(row, dtype, moved=False)
    starts_as_base = next(iter(row.make().maps(LAYERS).values())).starts_as_base
    expected = logits(base(dtype)).tobytes()
    assert (logits(model).tobytes() == expected) is starts_as_base
    model.get_base_model().prepare_step()
    assert (logits(model).tobytes() == expected) is starts_as_base


@METHODS
def test_map_gradients_are_equal_with_the_weight_formed_and_apart(row: Row) -> None:
    model = adapted(row)
    params = trained(model)

    def loss() -> Tensor:
        return F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])

    apart = gradients(loss(), params)
    model.get_base_model().prepare_step()
    assert all(layer.merges(None) for layer in layers(model).values())
    formed = gradients(loss(), params)
    model.get_base_model().end_step()
    for p, a, b in zip(params, apart, formed, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
        before = p.data.copy()
        direction = np.random.default_rng(1).standard_normal(p.shape)
        ends = []
        for step in (1e-5, -1e-5):
            p.data = before + step * direction
            ends.append(float(loss().data))
        p.data = before
        slope = float((a * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8)


@METHODS
@DTYPES
def test_map_merge_keeps_the_output_and_unmerge_restores_every_bit(row: Row, dtype: str) -> None:
    model = adapted(row, dtype)
    before = logits(model)
    weights = bits(model)
    bound = 1e-4 if dtype == "float32" else 1e-12
    for path, layer in layers(model).items():
        W = layer.base_layer.dense_weight().astype(np.float64)
        exact = W + layer.delta_weight("default")
        layer.merge()
        merged = layer.base_layer.dense_weight()
        assert merged.tobytes() == exact.astype(dtype).tobytes(), path
        layer.unmerge()
    model.merge_adapter()
    assert logits(model) == near(before, bound)
    model.unmerge_adapter()
    assert bits(model) == weights
    assert logits(model).tobytes() == before.tobytes()
    assert logits(model.merge_and_unload()) == near(before, bound)


@METHODS
def test_map_files_have_every_bit_and_count(row: Row, tmp_path: Path) -> None:
    model = adapted(row, "float32")
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    state = model.state_dict()
    assert {k: v.tobytes() for k, v in state.items()} == {k: v.tobytes() for k, v in stored.items()}
    again = PeftModel.from_pretrained(base("float32"), tmp_path / "a", "other")
    assert logits(again).tobytes() == logits(model).tobytes()
    again.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(p.size for p in trained(model))
    if callable(row.count):
        sizes = [(layer.out_features, layer.in_features) for layer in layers(model).values()]
        assert trainable == sum(row.count(O, I) for O, I in sizes)
    elif row.count:
        assert trainable == row.count


@METHODS
def test_merge_of_files_has_the_bits_of_the_model(row: Row, tmp_path: Path) -> None:
    model = adapted(row, "float32")
    base("float32").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "unloaded")
    file = "model.safetensors"
    merged, unloaded = (load_file(tmp_path / n / file) for n in ("merged", "unloaded"))
    assert {k: v.tobytes() for k, v in merged.items()} == {
        k: v.tobytes() for k, v in unloaded.items()
    }


@METHODS
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_map_trains_over_codes(row: Row, kind: str) -> None:
    """dW is over what the codes decode to."""
    dense = base("float32")
    model = base("float32")
    quantize(model, kind)
    for path, module in dense.named_modules():
        coded = dict(model.named_modules())[path]
        if hasattr(coded, "dense_weight") and path != "lm_head":
            module.weight.data = coded.dense_weight()
    outputs = []
    for one in (dense, model):
        one = get_peft_model(one, row.make(), seed=1)
        rng = np.random.default_rng(3)
        for p in trained(one):
            p.data = p.data + (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
        y = one(IDS)
        outputs.append([y.data, *gradients(y, trained(one), np.ones_like(y.data))])
    for a, b in zip(*outputs, strict=True):
        assert a == near(b, 1e-4)


@METHODS
def test_sharded_step_has_the_same_bits_for_any_number_of_threads(row: Row) -> None:
    model = adapted(row, "float32").train()
    results = set()
    for threads in (1, 3):
        with ShardedStep(model, threads, shard=1) as sharded:
            value, grads = sharded.gradients(Batch(IDS[:, :-1], IDS[:, 1:]), trained(model))
        results.add((float(value), *(g.tobytes() for g in grads)))
    assert len(results) == 1


# These call cuSOLVER and cuFFT. An emulated device has neither: NumPy computes in their place.
LIBRARIES = {"oft-exact": ("linalg", "solve"), "fourierft": ("fft", "fft2", "ifft2")}
ON_DEVICES = [(name, "strict") for name in ROWS if name not in LIBRARIES]
ON_DEVICES += [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ROWS]


def emulate_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    def through_numpy(compute: Any) -> Any:
        return lambda *arrays: cupy.asarray(compute(*map(cupy.asnumpy, arrays)))

    module, *functions = LIBRARIES[name]
    for function in functions:
        compute = getattr(getattr(np, module), function)
        monkeypatch.setattr(getattr(cupy, module), function, through_numpy(compute))


@pytest.mark.parametrize(("name", "device"), ON_DEVICES)
def test_map_computes_on_a_device_what_it_computes_on_the_host(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in LIBRARIES and "cupy_on_cpu" in sys.modules:
        emulate_library(name, monkeypatch)
    row = ROWS[name]
    backend = STRICT if device == "strict" else get_backend(device)
    results = []
    for where in ("cpu", backend):
        model = adapted(row, "float32", device=where)
        params = trained(model)
        model.get_base_model().prepare_step()
        ids = IDS if where == "cpu" else backend.from_numpy(IDS)
        y = model(ids)
        ones = y.backend.from_numpy(np.ones(y.shape, np.float32))
        grads = gradients(y, params, ones)
        results.append([p.backend.to_numpy(g) for p, g in zip(params, grads, strict=True)])
        results[-1].append(y.numpy())
    for a, b in zip(*results, strict=True):
        assert a == near(b, 1e-3)


# ---- what is special -----------------------------------------------------------------------------


def test_ia3_moves_the_bias_with_the_weight() -> None:
    model = adapted(ROWS["ia3"])
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    l = layer.adapters["default"].ia3_l.data[:, 0]
    assert layer.bias.data == pytest.approx(l * layer.base_layer.bias.data)
    down = layers(model)["model.layers.0.mlp.down_proj"]
    assert down.adapters["default"].ia3_l.shape == (1, 24)
    assert down.bias is down.base_layer.bias


def test_ia3_feedforward_modules_are_among_the_targets_of_its_file(tmp_path: Path) -> None:
    """peft refuses others, and writes full names for "all-linear"."""
    config = IA3Config(target_modules="all-linear", feedforward_modules=["down_proj"])
    model = get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["feedforward_modules"] == ["model.layers.0.mlp.down_proj"]
    assert set(written["feedforward_modules"]) <= set(written["target_modules"])
    read = PeftModel.from_pretrained(base(), tmp_path)
    assert layers(read)["model.layers.0.mlp.down_proj"].adapters["default"].ia3_l.shape == (1, 24)


def test_hira_reads_the_base_whatever_else_is_merged_or_added() -> None:
    model = adapted(ROWS["hira"])
    model.add_adapter("l", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter(["l", "default"])
    expected = logits(model)
    model.merge_adapter(["l"])
    assert logits(model) == pytest.approx(expected, abs=1e-11)
    model.get_base_model().prepare_step()
    assert logits(model) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", ["hira", "vera", "miss", "unilora"])
def test_map_dropout_acts_on_the_input_in_training_alone(name: str) -> None:
    config = ROWS[name].make(**{ROWS[name].config.DROPOUT: 0.5})
    model = get_peft_model(base(), config, seed=1)
    for p in trained(model):
        p.data = p.data + 0.5
    still = logits(model.eval())
    plain = get_peft_model(base(), ROWS[name].make(), seed=1).eval()
    for p in trained(plain):
        p.data = p.data + 0.5
    assert np.array_equal(still, logits(plain))
    assert not np.array_equal(logits(model.train()), still)
    assert not any(layer.merges(None) for layer in layers(model).values())


def test_scatter_keeps_lengths_and_uses_every_entry() -> None:
    entries, scales = scatter(101, 7, 3)
    counts = np.bincount(entries)
    assert set(counts) == {14, 15}
    z = np.random.default_rng(0).standard_normal(7)
    assert np.linalg.norm(z[entries] * scales[entries]) == pytest.approx(np.linalg.norm(z))


# ---- refusals ------------------------------------------------------------------------------------


REFUSED: list[tuple[str, type, dict[str, Any]]] = [
    ("lora_alpha = 16: LoHa has no such field", LoHaConfig, {"lora_alpha": 16}),
    ("use_dora = True: HiRA has no such field", HiraConfig, {"use_dora": True}),
    ("rank_pattern = .* IA3 has no such field", IA3Config, {"rank_pattern": {"q_proj": 2}}),
    ("alpha must be", LoHaConfig, {"alpha": 0}),
    ("r = 4 and oft_block_size = 32", OFTConfig, {"r": 4}),
    ("r = 0 and oft_block_size = 0", OFTConfig, {"oft_block_size": 0}),
    ("projection_prng_key must be", VeraConfig, {"projection_prng_key": -1}),
    ("feedforward_modules", IA3Config, {"target_modules": ["a"], "feedforward_modules": ["b"]}),
    ("hira_dropout must be", HiraConfig, {"hira_dropout": 1}),
    ("d_initial must be", VeraConfig, {"d_initial": -1e308}),
    ("init_theta_d_bound must be", UniLoraConfig, {"init_theta_d_bound": 1e308}),
]


@pytest.mark.parametrize(("message", "kind", "fields"), REFUSED)
def test_map_config_refuses_by_name(message: str, kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


MISFITS = [
    (
        "oft",
        {"oft_block_size": 5},
        r"oft_block_size = 5 does not divide I = 16.*\[1, 2, 4, 8, 16\]",
    ),
    ("oft-blocks", {"r": 3}, "r = 3 does not divide I = 16"),
    ("lokr", {"decompose_factor": 1, "r": 5}, None),
    ("miss", {"r": 17}, "r = 17 is above I"),
    ("miss-mini", {"mini_r": 3}, "mini_r = 3 does not divide O"),
    ("miss", {"mini_r": 2}, "mini_r = 2 is for init_weights = 'mini'"),
    ("vera", {"d_initial": 2.0, "init_weights": False}, "d_initial = 2.0 is for init_weights"),
    (
        "unilora",
        {"init_theta_d_bound": 1, "init_weights": False},
        "init_theta_d_bound = 1 is for init_weights",
    ),
    ("unilora", {"theta_d_length": 10**6}, r"over \d+ numbers, .*: set it to at most \d+"),
    ("intrinsic", {"theta_d_length": 10**6}, r"over \d+ numbers, .*: set it to at most \d+"),
    ("ia3", {"feedforward_modules": ["dwn_proj"]}, "'dwn_proj' matches no target; the targets are"),
    ("fourierft", {"n_frequency": 129}, "fewer weights than n_frequency = 129: .* at most 128"),
]


@pytest.mark.parametrize(("name", "fields", "message"), MISFITS)
def test_get_peft_model_refuses_a_layer_that_does_not_fit(
    name: str, fields: dict[str, Any], message: str | None
) -> None:
    model = base()
    before = bits(model)
    if message is None:
        get_peft_model(model, ROWS[name].make(**fields))
        return
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, ROWS[name].make(**fields))
    assert bits(model) == before


def test_lokr_names_a_size_without_factors() -> None:
    with pytest.raises(ConfigError, match=r"no factor of O = 13 above 1: it is a prime"):
        ROWS["lokr"].make().maps({"proj": (13, 8)})["proj"].check()
    config = ROWS["lokr"].make(decompose_factor=3)
    with pytest.raises(ConfigError, match=r"O = 25 above 1: set decompose_factor to one of \[5\]"):
        config.maps({"proj": (25, 8)})["proj"].check()


@pytest.mark.parametrize("name", ["oft", "ia3"])
def test_map_that_multiplies_runs_and_merges_alone(name: str, tmp_path: Path) -> None:
    model = adapted(ROWS[name], "float32")
    model.add_adapter("l", LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match=r"adapter 'default' is .* must run or merge alone"):
        model.set_adapter(["default", "l"])
    base("float32").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    folders = [tmp_path / "a", tmp_path / "a" / "l"]
    with pytest.raises(ConfigError, match="multiplies the weight"):
        merge(tmp_path / "base", folders, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"0.5 times: .* multiplies the weight"):
        merge(tmp_path / "base", folders[:1], tmp_path / "out", weights=[0.5])


def edit(folder: Path, **fields: Any) -> None:
    config, tensors = read_adapter(folder)
    config |= fields
    write_adapter(folder, {k: v for k, v in config.items() if v != "gone"}, tensors)


FILES = [
    ("oft", {"oft_block_size": "gone"}, "oft_block_size is missing.*train the adapter again"),
    ("oft", {"peft_version": "0.17.1"}, "peft_version = '0.17.1'.*other coefficients"),
    ("oft", {"peft_version": "gone"}, "use_cayley_neumann = True with peft_version = None"),
    ("oft", {"coft": True}, "coft = True is not supported: OFT has coft = False"),
    ("oft", {"num_cayley_neumann_terms": 6}, "num_cayley_neumann_terms = 6 is not supported"),
    ("loha", {"lora_alpha": 16}, "lora_alpha = 16: LoHa has no such field"),
    ("loha", {"peft_type": "HIRA", "alpha": "gone"}, "missing .*hira_A"),
    ("miss", {"init_weights": "bat"}, "init_weights must be"),
    ("vera-unsaved", {"save_projection": True}, "vera_A and base_model.vera_B are missing"),
]


@pytest.mark.parametrize(("name", "fields", "message"), FILES)
def test_from_pretrained_refuses_what_it_would_read_wrongly(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapted(ROWS[name], "float32").save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises((ConfigError, FormatError), match=message):
        PeftModel.from_pretrained(base("float32"), tmp_path)


def test_load_adapter_uses_a_file_with_rank_dropout_but_does_not_train_it(tmp_path: Path) -> None:
    model = adapted(ROWS["loha"], "float32")
    model.save_pretrained(tmp_path)
    edit(tmp_path, rank_dropout=0.1)
    again = PeftModel.from_pretrained(base("float32"), tmp_path)
    assert logits(again).tobytes() == logits(model).tobytes()
    assert again.peft_config["default"].to_dict()["rank_dropout"] == 0.1
    with pytest.raises(ConfigError, match=r"rank_dropout = 0.1 would act in training"):
        PeftModel.from_pretrained(base("float32"), tmp_path, is_trainable=True)


@pytest.mark.parametrize(
    ("name", "tensor"), [("loha", "hada_w1_a"), ("oft", "oft_R"), ("vera", "base_model.vera_A")]
)
def test_inspect_adapter_names_peft_type_where_another_method_has_the_tensors(
    name: str, tensor: str, tmp_path: Path
) -> None:
    adapted(ROWS[name], "float32").save_pretrained(tmp_path)
    write_adapter(tmp_path, LoraConfig().to_dict(), read_adapter(tmp_path)[1])
    with pytest.raises(FormatError, match=f"{tensor}.* is not a tensor of .*peft_type in adapter_"):
        inspect_adapter(tmp_path)


def test_make_plain_names_the_method_that_has_no_start(tmp_path: Path) -> None:
    adapted(ROWS["loha"], "float32").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="is an adapter of LoHa, over its base as it is"):
        make_plain(tmp_path / "a", tmp_path / "out")


def test_tools_that_need_factors_refuse_a_map(tmp_path: Path) -> None:
    adapted(ROWS["loha"], "float32").save_pretrained(tmp_path / "a")
    for run in (
        lambda: combine([tmp_path / "a"], tmp_path / "out"),
        lambda: resize(tmp_path / "a", 1, tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"LoHa has no factors A and B.*merge the adapter"):
            run()


@METHODS
def test_verify_files_measures_the_properties_of_the_method(row: Row, tmp_path: Path) -> None:
    model = adapted(row, "float32")
    base("float32").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    report = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert all(result.ok for result in report.rows)
    names = [r.property for r in report.rows if r.property.startswith(row.config.title)]
    assert len(names) >= 2
    for finding in report.layers:
        norm = np.linalg.norm(layers(model)[finding.layer].delta_weight("default"))
        assert finding.dW == pytest.approx(norm, rel=1e-6)


@METHODS
def test_inspect_adapter_describes_a_map_with_its_base(row: Row, tmp_path: Path) -> None:
    model = adapted(row, "float32")
    base("float32").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert inspect_adapter(tmp_path / "adapter")["finite"]
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert report["mismatches"] == []
    rows = {r["layer"]: r for r in report["tensors"]}
    assert set(rows) == set(layers(model))
    for path, layer in layers(model).items():
        norm = np.linalg.norm(layer.delta_weight("default"))
        assert float(rows[path]["|dW|"]) == pytest.approx(norm, rel=1e-3)


# ---- a new method --------------------------------------------------------------------------------


def test_example_adds_a_method_by_one_class_and_one_line() -> None:
    example = Path(__file__).parents[2] / "examples" / "11_a_new_method.py"
    try:
        values = runpy.run_path(str(example), run_name="__main__")
    finally:
        MAPS.pop("TOY", None)
    assert values["after"] < values["before"]
    assert math.isfinite(values["after"])
    assert dataclasses.is_dataclass(values["RowConfig"])
    assert maps.ROWS
