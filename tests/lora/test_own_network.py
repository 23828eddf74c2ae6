"""Adapters on a network that is not a language model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from minilora import (
    AdaLoraConfig,
    AdamW,
    Linear,
    LoraConfig,
    Module,
    PeftModel,
    ReLU,
    Sequential,
    Tensor,
    get_peft_model,
    manual_seed,
    quantize,
)
from minilora.errors import ConfigError
from minilora.lora import RankAllocator
from minilora.nn import mse_loss

RNG = np.random.default_rng(2)
X = Tensor(RNG.standard_normal((16, 4)))
TARGETS = RNG.standard_normal((16, 3))


class Network(Module):
    """Layers in each place that a module can have them."""

    def __init__(self):
        manual_seed(3)
        self.body = Sequential(Linear(4, 8), ReLU())
        self.layers = [Linear(8, 8), [Linear(8, 8)]]
        self.heads = {"a": Linear(8, 3), 2: Linear(8, 3, bias=False)}
        self.config = {"width": 8}  # not a language model's
        self.to(dtype="float64")

    def forward(self, x):
        x = self.body(x)
        x = self.layers[1][0](self.layers[0](x))
        return self.heads["a"](x) + self.heads[2](x)


ALL = ["body.0", "layers.0", "layers.1.0", "heads.a", "heads.2"]
ADALORA = {"init_r": 3, "target_r": 1, "total_step": 12, "tinit": 2, "tfinal": 2}
CONFIGS = {
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "names": LoraConfig(r=2, target_modules=["a", "layers.0"], lora_dropout=0.1),
    "pattern": LoraConfig(r=2, target_modules=r"layers\..*", rank_pattern={"layers.0": 1}),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "rslora": LoraConfig(r=2, target_modules="all-linear", use_rslora=True),
    "saved": LoraConfig(r=2, target_modules=["0"], modules_to_save=["heads.a"], bias="all"),
    "adalora": AdaLoraConfig(target_modules="all-linear", **ADALORA),
}


def trained(config):
    model = get_peft_model(Network(), config, seed=1)
    before = Network()(X).numpy()
    assert np.array_equal(model.eval()(X).numpy(), before)
    model.train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    allocator = RankAllocator.of(model) if isinstance(config, AdaLoraConfig) else None
    for _ in range(12):
        model.zero_grad()
        loss = mse_loss(model(X), TARGETS)
        loss.backward()
        optimizer.step()
        if allocator:
            allocator.step([p.grad for p in allocator.params])
    if allocator:
        allocator.prune()
    model.eval()
    assert not np.array_equal(model(X).numpy(), before)
    if config.bias == "none":
        with model.disable_adapter():
            assert np.array_equal(model(X).numpy(), before)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_get_peft_model_trains_merges_saves_and_loads_any_network(name, tmp_path):
    model = trained(CONFIGS[name])
    adapted = model(X).numpy()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Network(), tmp_path)
    assert np.array_equal(again(X).numpy(), adapted)
    if CONFIGS[name].bias == "none":
        again.load_adapter(tmp_path, "another")
        again.set_adapter("another")
        assert np.array_equal(again(X).numpy(), adapted)
        again.set_adapter("default")
    again.merge_adapter()
    np.testing.assert_allclose(again(X).numpy(), adapted, rtol=0, atol=1e-12)
    merged = again.merge_and_unload()
    assert type(merged) is Network
    assert all(type(m).__name__ in ("Network", "Sequential", "Linear", "ReLU") for _, m in
               merged.named_modules())  # fmt: skip
    np.testing.assert_allclose(merged(X).numpy(), adapted, rtol=0, atol=1e-12)


def test_get_peft_model_all_linear_means_every_linear_layer_of_a_network():
    model = get_peft_model(Network(), CONFIGS["all-linear"])
    assert sorted(model.peft_config["default"].target_modules) == sorted(ALL)
    factors = sum(2 * (layer.in_features + layer.out_features) for layer in layers_of(Network()))
    assert model.get_nb_trainable_parameters() == (factors, factors + size_of(Network()))


def layers_of(model):
    return [m for _, m in model.named_modules() if isinstance(m, Linear)]


def size_of(model):
    return sum(p.size for p in model.parameters())


def test_get_peft_model_of_a_lesson_s_layer_of_3_by_4():
    layer = Linear(4, 3, dtype=np.float64)
    model = get_peft_model(Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    B = model.model[0].adapters["default"].lora_B
    B.data = RNG.standard_normal((3, 2))
    A = model.model[0].adapters["default"].lora_A.numpy()
    dW = 4 * B.numpy() @ A  # lora_alpha / r = 8 / 2
    expected = X.numpy() @ (layer.weight.numpy() + dW).T + layer.bias.numpy()
    np.testing.assert_allclose(model(X).numpy(), expected, rtol=0, atol=1e-13)


def test_merge_adapter_keeps_what_a_subclass_of_linear_computes():
    class Squared(Linear):
        def forward(self, x):
            y = super().forward(x)
            return y * y

    model = get_peft_model(
        Sequential(Squared(4, 3, dtype=np.float64)),
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    )
    base = model.model[0].base_layer
    model.merge_adapter()
    assert type(model.model[0].base_layer) is Squared
    W = model.model[0].base_layer.weight.numpy()
    assert not np.array_equal(W, base.weight.numpy())
    y = X.numpy() @ W.T + base.bias.numpy()
    np.testing.assert_allclose(model(X).numpy(), y * y, rtol=0, atol=1e-12)


def test_quantize_needs_no_head():
    net = quantize(Network().to(dtype="float32"))
    model = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear"))
    loss = mse_loss(model(Tensor(X.numpy().astype(np.float32))), TARGETS.astype(np.float32))
    loss.backward()
    with pytest.raises(ConfigError, match="skip: 'lm_head' matches nothing"):
        quantize(Network(), skip="lm_head")


class InATuple(Module):
    def __init__(self):
        self.layers = (Linear(4, 3),)


REFUSALS = {
    "a layer alone": (Linear(4, 3), {"target_modules": "all-linear"}, r"give Sequential\(model\)"),
    "no targets": (Network, {}, "target_modules must be given .*choose from 0, 2, a"),
    "no layer": (Network, {"target_modules": ["fc"]}, "'fc' match nothing; choose from 0, 2, a"),
    "an activation": (Network, {"target_modules": ["body.1"]}, "not a linear layer but .* ReLU"),
    "tied": (Network, {"ensure_weight_tying": True}, r"ensure_weight_tying needs .*get_input_emb"),
    "tokens": (Network, {"trainable_token_indices": [1]}, r"needs a model .*get_input_embeddings"),
    "a tuple": (InATuple, {"target_modules": ["0"]}, "layers.0 is in a tuple.* use a list"),
    "a number": (3, {}, "expected a model .* got 3: give a Module"),
}


@pytest.mark.parametrize(("model", "fields", "message"), REFUSALS.values(), ids=REFUSALS)
def test_get_peft_model_says_which_option_needs_what(model, fields, message):
    config = LoraConfig(**{"r": 2, **({"target_modules": ["a"]} if fields else {}), **fields})
    with pytest.raises(ConfigError, match=message), warnings.catch_warnings():
        get_peft_model(model() if isinstance(model, type) else model, config)


def test_explain_of_ids_says_what_it_takes():
    model = get_peft_model(Network(), CONFIGS["names"])
    assert "layers.0" in model.explain(16)
    for ids, got in ((X, r"shape \(16, 4\)"), ([1, 2], r"\[1, 2\]"), (0, "0")):
        with pytest.raises(ConfigError, match=f"number of positions in a step, got {got}: give"):
            model.explain(ids)


# ---- beside peft ----


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["names", "dora", "rslora", "saved"])
def test_save_pretrained_of_a_network_is_equal_in_peft_and_back(name, tmp_path):
    import peft
    import torch

    def network():
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        return torch.nn.Sequential(*layers).double()

    def ours():
        net = Sequential(Linear(4, 8), ReLU(), Linear(8, 3)).to(dtype="float64")
        net.load_state_dict(network().state_dict())
        return net

    fields = {
        "names": {"lora_alpha": 3},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "saved": {"modules_to_save": ["2"]},
    }[name]
    fields["target_modules"] = ["0"] if name == "saved" else ["0", "2"]
    theirs = peft.get_peft_model(network(), peft.LoraConfig(r=2, **fields)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(ours(), tmp_path / "theirs")
    x = torch.from_numpy(X.numpy())
    expected = theirs(x).detach().numpy()
    np.testing.assert_allclose(loaded(X).numpy(), expected, rtol=0, atol=1e-6)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(loaded.state_dict())
    assert not np.allclose(loaded(X).numpy(), ours()(X).numpy())

    loaded.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(network(), tmp_path / "ours").eval()
    np.testing.assert_allclose(back(x).detach().numpy(), expected, rtol=0, atol=1e-6)
    counts = get_peft_model(ours(), LoraConfig(r=2, **fields)).get_nb_trainable_parameters()
    assert counts == theirs.get_nb_trainable_parameters()
