"""Every row of cases.py beside transformers and peft: the same numbers, and files for both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from cases import FAMILIES, TARGETS, TIED, TRAININGS, Options, Training, V
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import (
    IDS,
    close,
    have_logits,
    have_logits_if_stable,
    in_double,
    load_model,
    load_ours,
    load_theirs,
    logits,
    make_ours,
    make_theirs,
    peft,
    randomise,
    read_fields,
    torch,
    trainable,
    transformers,
)

from minilora import CausalLM, PeftModel, TransformerConfig, generate
from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.formats import load_file
from minilora.lab.demo import Plan, demo
from minilora.lora import LoraLinear, RankAllocator
from minilora.lora.config import DEFAULT_TARGETS
from minilora.models.dialects import DIALECTS, MODEL_TYPES
from minilora.optim import AdamW
from minilora.tools.merging import merge
from minilora.training.parallel import ShardedStep

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
Bases = dict[Any, tuple[Path, Any]]


@pytest.fixture(scope="module")
def models(llama: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A folder and transformers' model of it: the three-layer Llama, each type tied and not."""
    bases: Bases = {"llama": llama}
    for kind in MODEL_TYPES:
        for tied in (False, True):
            folder = tmp_path_factory.mktemp("base")
            model = cases.save_base(folder, kind, cases.small_base(kind, tied))
            bases[kind, tied] = folder, model
    return bases


def read_shapes(folder: Path, file: str = "adapter_model") -> dict[str, Any]:
    """Shape and dtype of each tensor, by name."""
    tensors = load_file(folder / f"{file}.safetensors")
    return {key: (array.shape, array.dtype) for key, array in tensors.items()}


def read_bytes(folder: Path, file: str = "adapter_model") -> dict[str, bytes]:
    """The values of each tensor, by name."""
    tensors = load_file(folder / f"{file}.safetensors")
    return {key: array.tobytes() for key, array in tensors.items()}


# ---- bases ----


def compare_base(folder: Path, kind: str, fields: Options, dtype: str, same: Any) -> Any:
    """Load a base of theirs, save it, and let them load what we saved; return their model."""
    model = cases.save_base(folder / "theirs", kind, fields, dtype)
    ours = CausalLM.from_pretrained(folder / "theirs")
    assert ours.config.model_type == kind
    assert same(ours, logits(model))

    ours.save_pretrained(folder / "again")
    written = json.loads((folder / "again" / "config.json").read_text())
    expected = json.loads((folder / "theirs" / "config.json").read_text())
    assert written | {"dtype": dtype} == expected
    shapes = {key: shape for key, (shape, _) in read_shapes(folder / "again", "model").items()}
    expected_shapes = read_shapes(folder / "theirs", "model")
    assert shapes == {key: shape for key, (shape, _) in expected_shapes.items()}

    randomise(ours.parameters(), seed=1)
    ours.save_pretrained(folder / "ours")
    auto = transformers.AutoModelForCausalLM
    again, loading = auto.from_pretrained(folder / "ours", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[problem]
    assert same(ours, logits(again))
    assert not close(ours(IDS).data, logits(model), 1e-2)
    return model


@settings(max_examples=15)  # transformers needs a second for each
@given(cases.bases(("llama",)))
def test_from_pretrained_and_save_pretrained_of_llama_agree_with_transformers(
    tmp_path_factory: pytest.TempPathFactory, base: tuple[str, Options]
) -> None:
    compare_base(tmp_path_factory.mktemp("base"), *base, "float32", have_logits)


@settings(max_examples=10)
@given(cases.bases())
def test_generate_gives_the_greedy_text_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, base: tuple[str, Options]
) -> None:
    folder = tmp_path_factory.mktemp("base")
    model = cases.save_base(folder, *base).double()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["use_cache"] = False  # with sliding_window=1, their cache keeps every position
    prompt = IDS[:, :3]
    mask = torch.ones(2, 3)
    expected = model.generate(torch.tensor(prompt), attention_mask=mask, **options)
    ours = CausalLM.from_pretrained(folder, dtype="float64")
    text = generate(ours, prompt, 12, temperature=0)
    np.testing.assert_array_equal(text, expected.numpy())


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_transformer_config_has_the_defaults_of_transformers(kind: str) -> None:
    dialect = DIALECTS[kind]
    fields = {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": 32, "hidden_size": 64}
    if kind != "gpt2":
        fields["intermediate_size"] = 4
    written = {dialect.names.get(name, name): value for name, value in fields.items()}
    ours = TransformerConfig.from_dict({"model_type": kind, **written})
    config = transformers.AutoConfig.for_model(kind, **written)
    derived = {"intermediate_size": 256, "head_dim": 2, "num_key_value_heads": 32}
    for field in {*dialect.fields} - {"layer_types", "rope_parameters"}:
        expected = getattr(config, dialect.names.get(field, field), None)
        if expected is None:
            expected = derived.get(field)
        assert getattr(ours, field) == expected, field
    if "rope_parameters" in dialect.fields:
        assert ours.rope_parameters["rope_theta"] == 10000.0
        assert ours.rope_parameters["rope_type"] == "default"
        assert config.rope_parameters == ours.rope_parameters
    if "max_window_layers" in dialect.fields:
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        assert [ours.window(0)] == [windows[kind] for kind in config.layer_types]


# ---- adapters ----


def compare_start(base: Path, ours: PeftModel, theirs: Any, options: Options) -> None:
    """Before any training, both have as many parameters, and values that change nothing."""
    counts = ours.get_nb_trainable_parameters()
    expected = theirs.get_nb_trainable_parameters()
    assert counts[0] == expected[0]
    if "init_r" not in options:  # peft's AdaLoRA has one more number in each layer
        assert counts == expected
    if not options["init_lora_weights"]:
        return  # B is random, and so are DoRA's norms
    plain = CausalLM.from_pretrained(base)
    assert np.array_equal(ours(IDS).data, plain(IDS).data)
    parameters = trainable(theirs)
    for name, p in ours.named_parameters():
        if "magnitude" in name:
            assert close(p.numpy(), parameters[name], 1e-6)


def compare_adapter(
    folder: Path,
    base: Path,
    model: Any,
    options: Options,
    same: Any = have_logits,
    seed: int = 2,
    masks: Any = None,
    loads: bool = True,
    merges: bool = True,
    **merging: Any,
) -> tuple[PeftModel, Any]:
    """One configuration: theirs loads here and is saved again, ours loads there, and both merge.

    `masks` cuts AdaLoRA's ranks; `loads` and `merges` say whether peft can load and merge it.
    Returns our model, merged.
    """
    theirs = make_theirs(model, options)
    ours = make_ours(base, options)
    parameters = trainable(theirs)
    if "ensure_weight_tying" in options:  # the head's share the storage of the embedding's
        parameters = {name: p for name, p in parameters.items() if ".model.lm_head" not in name}
    else:
        compare_start(base, ours, theirs, options)

    randomise(parameters.values(), seed)
    if masks:
        cut_theirs(theirs, masks)
    theirs.save_pretrained(folder / "theirs")
    loaded = load_ours(base, folder / "theirs")
    assert same(loaded, logits(theirs))
    loaded.save_pretrained(folder / "again")
    assert read_bytes(folder / "again") == read_bytes(folder / "theirs")
    assert read_fields(folder / "again") == read_fields(folder / "theirs")

    randomise(trainable(ours).values(), seed + 1)
    if masks:
        cut_ours(ours, masks)
    ours.save_pretrained(folder / "ours")
    assert read_shapes(folder / "ours") == read_shapes(folder / "theirs")
    unlike: Options = {"base_model_name_or_path": None}
    if (
        options["target_modules"] == "all-linear"
    ):  # both list the layers, by longer or shorter names
        unlike["target_modules"] = None
    assert read_fields(folder / "ours") | unlike == read_fields(folder / "theirs") | unlike
    before = ours(IDS).data
    if loads:
        again = load_theirs(model, folder / "ours")
        assert same(ours, logits(again))
    merged = ours.merge_and_unload(**merging)
    if merges:
        assert same(merged, logits(again.merge_and_unload()))
    merged.save_pretrained(folder / "merged")
    assert same(merged, logits(load_model(folder / "merged", "float32")))
    return merged, before


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_model_adapters_agree_with_peft(
    tmp_path_factory: pytest.TempPathFactory, models: Bases, family: str
) -> None:
    count, rows, seeds = FAMILIES[family]

    @settings(max_examples=count)
    @given(rows, st.booleans(), seeds)
    def compare(row: tuple[Any, Options], cut: bool, seed: int) -> None:
        name, options = row
        folder = tmp_path_factory.mktemp("adapters")
        masks = None
        if family == "adalora" and cut:
            masks = draw_masks(models[name][1], options, seed)
        base, model = models[name]
        merges = family != "ends"
        merged, before = compare_adapter(
            folder, base, model, options, seed=seed, masks=masks, merges=merges, tied="untie"
        )
        assert close(merged(IDS).data, before, 2e-5)
        if merges:
            merge(base, [folder / "ours"], folder / "tool")
            assert read_bytes(folder / "tool", "model") == read_bytes(folder / "merged", "model")
        if family == "adalora":
            assert bool(read_fields(folder / "ours")["rank_pattern"]) == cut

    compare()


@settings(max_examples=40)
@given(st.data())
def test_peft_model_on_any_base_agrees_with_peft(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("base")
    kind, fields = data.draw(cases.bases())
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    model = compare_base(folder / "base", kind, fields, dtype, have_logits_if_stable)
    options = data.draw(cases.layer_options(kind, fields["tie_word_embeddings"]))
    base = folder / "base" / "theirs"
    compare_adapter(folder, base, model, options, have_logits_if_stable)


def draw_masks(model: Any, options: Options, seed: int) -> dict[str, np.ndarray]:
    """Which triplets remain of each of AdaLoRA's layers; none of the first layer's."""
    rng = np.random.default_rng(seed)
    names = trainable(make_theirs(model, options))
    layers = [name for name in names if "lora_E" in name]
    masks = {layer: rng.random(options["init_r"]) < 0.5 for layer in layers}
    masks[layers[0]][:] = False
    return masks


def cut_theirs(model: Any, masks: dict[str, np.ndarray]) -> None:
    parameters = trainable(model)
    pattern = {}
    for name, mask in masks.items():
        parameters[name].data[torch.tensor(~mask)] = 0
        pattern[name.removeprefix("base_model.model.")] = mask.tolist()
    model.peft_config["default"].rank_pattern = pattern


def cut_ours(model: PeftModel, masks: dict[str, np.ndarray]) -> None:
    """Cut the ranks, and compare the logits with those of E's zeros."""
    allocator = RankAllocator.of(model)
    for adapter, mask in zip(allocator.adapters.values(), masks.values(), strict=True):
        adapter.lora_E.data = np.where(mask[:, None], adapter.lora_E.data, np.float32(0))
    state, _ = allocator.state_dict()
    state["kept"] = np.concatenate(list(masks.values()))
    allocator.load_state_dict(state, {"steps": 3})
    whole = model(IDS).data
    allocator.prune()
    assert close(model(IDS).data, whole)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_model_ties_the_head_as_peft(
    models: Bases, kind: str, name: str, tmp_path: Path
) -> None:
    row = TIED[name]
    gpt2 = kind == "gpt2"
    options = {field: cases.name_layers(value, kind) for field, value in row.options.items()}
    if gpt2 and name == "embedding":
        options["target_modules"][0] = "lm_head"  # peft knows GPT-2's embedding by this name only
    ends = row.gpt2_ends if gpt2 else row.ends
    # Of GPT-2's tied factors, peft drops the head's when it loads them.
    loads = not gpt2 or ends in ("copies", "rows")
    base, model = models[kind, True]
    merged, before = compare_adapter(tmp_path, base, model, options, loads=loads, merges=False)
    path = "transformer.wte" if gpt2 else "model.embed_tokens"
    factors = {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    factors |= {f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"}
    required = {
        "factors": factors,
        "base factors": factors | {"lm_head.base_layer.weight", f"{path}.base_layer.weight"},
        "copies": {"lm_head.weight", f"{path}.weight"},
        "rows": {f"{path}.token_adapter.trainable_tokens_delta"},
    }
    keys = {key.removeprefix("base_model.model.") for key in read_shapes(tmp_path / "ours")}
    assert keys >= required[ends]
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert close(merged(IDS).data, before)


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_peft_model_targets_are_those_of_peft(models: Bases, options: Options) -> None:
    base, model = models["llama"]
    theirs = make_theirs(model, options)
    ours = make_ours(base, options)
    layer = peft.tuners.lora.LoraLayer
    modules = theirs.base_model.model.named_modules()
    expected = {name for name, module in modules if isinstance(module, layer)}
    modules = ours.model.named_modules()
    assert {name for name, module in modules if isinstance(module, LoraLinear)} == expected
    assert set(trainable(ours)) == set(trainable(theirs))


def test_default_targets_are_those_of_peft() -> None:
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: table[kind] for kind in MODEL_TYPES} == DEFAULT_TARGETS


def test_get_nb_trainable_parameters_of_a_usual_adapter_is_that_of_peft(models: Bases) -> None:
    base, model = models["llama"]
    options = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "none"}
    options |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    counts = make_ours(base, options).get_nb_trainable_parameters()
    assert counts == make_theirs(model, options).get_nb_trainable_parameters()
    assert counts[0] == 3 * 64 * ((8 + 8) + (8 + 4))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_lora_first_values_have_the_distribution_of_peft(init: Any, tmp_path: Path) -> None:
    n, m, r = 500, 400, 32
    torch.manual_seed(0)
    shape = {"vocab_size": 3, "hidden_size": n, "intermediate_size": 4, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": m}
    model = cases.save_base(tmp_path, "llama", shape)
    options = {"r": r, "target_modules": ["q_proj"], "init_lora_weights": init}
    ours = make_ours(tmp_path, options).state_dict()
    theirs = peft.get_peft_model_state_dict(make_theirs(model, options))
    assert set(theirs) == set(ours)
    for key, expected in theirs.items():
        a = np.sort(ours[key].astype(np.float64), axis=None)
        b = np.sort(np.asarray(expected, np.float64), axis=None)
        assert len(a) == len(b)
        assert a.any() == b.any()
        # Two-sample Kolmogorov distance: larger with probability 2 exp(-2 * 2.5^2) = 7e-6.
        everywhere = np.concatenate([a, b])
        below = np.searchsorted(a, everywhere, "right") - np.searchsorted(b, everywhere, "right")
        assert np.abs(below).max() / len(a) <= 2.5 * np.sqrt(2 / len(a))
        if init != "gaussian" and a.any():
            bound = np.float32(1 / np.sqrt(n if "lora_A" in key else r))
            for values in (a, b):
                assert bound * (1 - 50 / len(values)) < np.abs(values).max() <= bound


# ---- training ----


def ours_loss(ours: Any, ids: np.ndarray, parameters: list[Any], prepared: bool) -> Any:
    """Our loss and gradients, with each layer's weight formed by the layer or beforehand."""
    batch = Batch(ids[:, :-1], ids[:, 1:])
    if prepared:
        with ShardedStep(ours, shard=2) as step:
            return step.gradients(batch, parameters)
    loss = F.cross_entropy(ours(ids)[:, :-1], batch.targets)
    return loss.item(), gradients(loss, parameters)


@pytest.mark.parametrize("row", TRAININGS, ids=str)
def test_adamw_20_steps_of_an_adapter_agree_with_torch(
    models: Bases, row: Training, tmp_path: Path
) -> None:
    base, model = models[row.base]
    kind = model.config.model_type
    options = {field: cases.name_layers(value, kind) for field, value in row.options.items()}
    theirs = make_theirs(model, options)
    exact = row.dtype == "float64"
    theirs = (in_double(theirs) if exact else theirs).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # transformers' GPT-2 has some, ours has none
    theirs.save_pretrained(tmp_path)
    ours = load_ours(base, tmp_path, row.dtype, is_trainable=True)
    expected = trainable(theirs)
    parameters = trainable(ours)
    assert set(parameters) == set(expected)
    start = {}
    for name, p in parameters.items():  # the file's values are rounded to float32
        start[name] = p.numpy().copy()
        p.data = expected[name].detach().numpy().copy()
    trained = list(parameters.values())
    optimizer = AdamW(trained, lr=1e-2)
    their_optimizer = torch.optim.AdamW(expected.values(), lr=1e-2)
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = rng.integers(0, V, (4, 10))
        loss = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
        their_optimizer.zero_grad()
        loss.backward()
        value, grads = ours_loss(ours, ids, trained, row.prepared)
        bound = 1e-9 if exact else 1e-5 * max(1, loss.item())
        assert abs(float(value) - loss.item()) <= bound
        for name, gradient in zip(parameters, grads, strict=True):
            assert close(gradient, expected[name].grad, 1e-7 if exact else 1e-3), name
        their_optimizer.step()
        optimizer.step(grads)
    for name, p in parameters.items():
        if exact:
            assert np.abs(p.numpy() - expected[name].detach().numpy()).max() <= 1e-9, name
        assert np.abs(p.numpy() - start[name]).max() > 1e-3, name


@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_peft_model_trains_an_adapter_of_peft_and_saves_it_for_peft(
    models: Bases, tmp_path: Path, method: str
) -> None:
    base, model = models["llama"]
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    options |= {"modules_to_save": ["lm_head"], "lora_dropout": 0.1}
    theirs = make_theirs(model, options)
    theirs.save_pretrained(tmp_path / "before")
    ours = load_ours(base, tmp_path / "before", is_trainable=True)
    trained = list(trainable(ours).values())
    optimizer = AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(ours(IDS[:, :-1]), IDS[:, 1:])
        losses.append(loss.item())
        loss.backward()
        if method == "adamw":
            optimizer.step()
        for p in trained:
            if method == "sgd":
                p.data = p.data - np.float32(0.1) * p.grad
            p.grad = None
    assert losses[-1] < losses[0]
    ours.eval().save_pretrained(tmp_path / "after")
    assert have_logits(ours, logits(load_theirs(model, tmp_path / "after")))
    assert not close(ours(IDS).data, logits(theirs), 1e-4)


def test_lora_dropout_of_dora_masks_the_same_terms_as_peft(models: Bases, tmp_path: Path) -> None:
    """One layer, with peft's masks."""
    base, model = models["llama"]
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]}
    options |= {"use_dora": True, "lora_dropout": 0.4}
    theirs = make_theirs(model, options).double()
    randomise(trainable(theirs).values())
    theirs.save_pretrained(tmp_path)
    their_layer = theirs.base_model.model.model.layers[0].self_attn.q_proj.train()
    ours = load_ours(base, tmp_path, "float64")
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj.train()
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    torch.manual_seed(3)
    expected = their_layer(torch.tensor(x))
    torch.manual_seed(3)
    mask = their_layer.lora_dropout["default"](torch.ones(2, 5, 8).double()).numpy()
    assert (mask == 0).any()

    class Mask:
        active = True

        def __call__(self, x: Any) -> Any:
            return x * mask

    layer.adapters["default"].dropout = Mask()
    assert close(layer(Tensor(x)).data, expected, 1e-12)


# ---- the demonstration ----


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo that MINILORA_DEMO names, or of a quick one."""
    if "MINILORA_DEMO" in os.environ:
        return Path(os.environ["MINILORA_DEMO"])
    folder = tmp_path_factory.mktemp("demo")
    demo(folder, Plan().quick(), pictures=False, say=lambda text: None)
    return folder


def test_demo_writes_a_base_for_transformers_and_an_adapter_for_peft(demo_folder: Path) -> None:
    base = demo_folder / "base"
    text = "def read(path):\n    return "
    ids = transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert ids == list(text.encode())
    theirs = load_model(base, "float32")
    plain = CausalLM.from_pretrained(base)
    assert close(logits(theirs, [ids]), plain([ids]).numpy())
    ours = load_ours(base, demo_folder / "adapter")
    theirs = load_theirs(theirs, demo_folder / "adapter")
    assert close(logits(theirs, [ids]), ours([ids]).numpy())
    merged = ours.merge_and_unload()
    assert close(logits(theirs.merge_and_unload(), [ids]), merged([ids]).numpy())
