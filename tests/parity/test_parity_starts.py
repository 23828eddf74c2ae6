"""Starts beside peft's: the same A, B and base, and files of either side read by the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import save_base, small_base
from peers import close, in_double, load_model, logits, peft, torch, trainable
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from minilora import CausalLM, PeftModel, get_peft_model
from minilora.errors import MiniloraError
from minilora.formats import load_file
from minilora.lora import LoraConfig
from minilora.lora.starts.values import Given, begin
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge
from minilora.tools.plain import make_plain

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
NAMES = ["q_proj", "v_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(0, 13, (2, 9))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "gpt2"):
        save_base(folder / kind, kind, small_base(kind, tied=False))
    return folder


def make_theirs(base: Path, dtype: str = "float32", **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": NAMES, **options})
    return peft.get_peft_model(load_model(base, dtype), config).eval()


class Torch64:
    """torch, in which float32 means float64: peft computes its starts in float32 alone."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.layer, "torch", Torch64())


def layer_of(model: Any, path: str) -> Any:
    return dict(model.named_modules())[f"base_model.model.{path}"]


# ---- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.usefixtures("in_float64")
def test_begin_is_pefts_pissa_and_olora(bases: Path, name: str, rslora: bool) -> None:
    """In float64: A and B but for the signs of singular vectors, which cancel in B A."""
    pattern = {"v_proj": 4}
    options = {"use_rslora": rslora, "rank_pattern": pattern, "alpha_pattern": {"down_proj": 7}}
    theirs = make_theirs(bases / "llama", "float64", init_lora_weights=name, **options)
    before = dict(load_model(bases / "llama").named_parameters())
    ours = CausalLM.from_pretrained(bases / "llama", dtype="float64")
    config = LoraConfig(r=2, lora_alpha=3, target_modules=NAMES, init_lora_weights=name, **options)
    model = get_peft_model(ours, config)
    for path, layer in model.changed_layers.items():
        their_layer = layer_of(theirs, path)
        A = their_layer.lora_A["default"].weight.detach().numpy()
        B = their_layer.lora_B["default"].weight.detach().numpy()
        adapter = layer.adapters["default"]
        assert A.dtype == adapter.lora_A.dtype == np.float64
        dW = adapter.scaling * adapter.lora_B.numpy() @ adapter.lora_A.numpy()
        assert close(dW, their_layer.scaling["default"] * B @ A, 1e-9)
        assert close(abs(adapter.lora_A.numpy()), abs(A), 1e-9)
        assert close(abs(adapter.lora_B.numpy()), abs(B), 1e-9)
        R = their_layer.base_layer.weight.detach().numpy()
        assert close(layer.base_layer.weight.numpy(), R, 1e-9)
        W = before[f"{path}.weight"].detach().numpy()
        assert not close(R, W, 1e-2)


def test_begin_is_pefts_orthogonal_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the random numbers handed in."""
    r, I, O = 4, 7, 5
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal(shape) for shape in ((r, r), (r // 2, I), (O, r // 2))]

    class Drawn:
        def __init__(self) -> None:
            self.left = list(draws)

        def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
            draw = self.left.pop(0)
            assert draw.shape == shape
            return draw

    theirs = [draws[0], draws[1].T, draws[2].T]
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.tensor(theirs.pop(0)))
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(I, O, bias=False).double(),
        "default",
        peft.LoraConfig(init_lora_weights="orthogonal", r=r),
        r=r,
        lora_alpha=r,
    )
    A, B, *_ = begin("orthogonal", "proj", np.zeros((O, I)), r, 1.0, Given(Drawn()))
    assert close(A, layer.lora_A["default"].weight, 1e-9)
    assert close(B, layer.lora_B["default"].weight, 1e-9)


@pytest.mark.usefixtures("in_float64")
def test_begin_is_pefts_stable_lora_ga(bases: Path) -> None:
    """Gradients of the same batch, and of a low-rank decomposition that is whole: 4 r = 8."""
    options = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3}
    config = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **options)
    theirs = in_double(load_model(bases / "llama"))
    ids = torch.tensor(IDS)

    def train_step() -> None:
        theirs(input_ids=ids, labels=ids).loss.backward()

    preprocess_loraga(theirs, config, train_step)
    theirs = peft.get_peft_model(theirs, config)
    ours = CausalLM.from_pretrained(bases / "llama", dtype="float64")
    config = LoraConfig(init_lora_weights="lora_ga_stable", **options)
    model = get_peft_model(ours, config, data=[IDS])
    for path, layer in model.changed_layers.items():
        their_layer = layer_of(theirs, path)
        adapter = layer.adapters["default"]
        assert close(abs(adapter.lora_A.numpy()), abs(their_layer.lora_A["default"].weight), 1e-9)
        assert close(abs(adapter.lora_B.numpy()), abs(their_layer.lora_B["default"].weight), 1e-9)


# ---- files ---------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa, rsLoRA": ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa, patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "pissa, DoRA": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa, DoRA, rsLoRA, patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 1},
        },
    ),
    "pissa, an embedding": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "pissa, a saved head": (
        "llama",
        {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
    ),
    "pissa, gpt2": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "olora, alpha = 6": ("llama", {"init_lora_weights": "olora", "lora_alpha": 6}),
    "olora, DoRA, patterns": (
        "llama",
        {"init_lora_weights": "olora", "use_dora": True, "alpha_pattern": {"q_proj": 1}},
    ),
    "pissa_niter_4": ("llama", {"init_lora_weights": "pissa_niter_4"}),
}
RECOMPUTED = [name for name in CONFIGURATIONS if "niter" not in name]


def write_theirs(base: Path, folder: Path, options: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Write a trained adapter, and `initial` as peft's users do; the logits, and peft's model."""
    theirs = make_theirs(base, **options)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(folder / "initial")
    theirs.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    rng = np.random.default_rng(3)
    for p in trainable(theirs).values():
        p.data += torch.tensor(0.1 * rng.standard_normal(tuple(p.shape)), dtype=p.dtype)
    theirs.save_pretrained(folder / "adapter")
    # In float64, so that what peft computed in float32, its start, is all that differs.
    return logits(copy.deepcopy(theirs).double(), IDS), theirs


def our_logits(base: Path, adapter: Path | None = None, **options: Any) -> np.ndarray:
    model: Any = CausalLM.from_pretrained(base, dtype="float64")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, **options)
    return model.eval()(IDS).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_from_pretrained_merge_and_convert_give_pefts_merged_model(
    name: str, bases: Path, tmp_path: Path
) -> None:
    kind, options = CONFIGURATIONS[name]
    base = bases / kind
    expected, theirs = write_theirs(base, tmp_path, options)
    adapter = tmp_path / "adapter"
    merged = copy.deepcopy(theirs).double().merge_and_unload()
    assert close(logits(merged, IDS), expected, 1e-9)
    weights = {key: tensor.numpy() for key, tensor in merged.state_dict().items()}
    for initial in [tmp_path / "initial"] + [None] * (name in RECOMPUTED):
        assert close(our_logits(base, adapter, initial=initial), expected, 1e-5)
        trained = our_logits(base, adapter, initial=initial, is_trainable=True)
        assert close(trained, expected, 1e-5)
    merge(base, [adapter], tmp_path / "exact", initial=tmp_path / "initial")
    for key, W in load_file(tmp_path / "exact" / "model.safetensors").items():
        assert close(W, weights[key], 1e-6), key
    # Without the first values, they are computed in float64, where peft had float32.
    initial = None if name in RECOMPUTED else tmp_path / "initial"
    merge(base, [adapter], tmp_path / "merged", initial=initial)
    assert close(our_logits(tmp_path / "merged"), expected, 1e-5)
    # peft reads what is plain by now, over the base as it was.
    make_plain(adapter, tmp_path / "plain", base, initial)
    read = peft.PeftModel.from_pretrained(load_model(base, "float32"), tmp_path / "plain").eval()
    assert close(logits(read, IDS), expected, 1e-5)
    assert inspect_adapter(adapter, base, initial)["mismatches"] == []
    # The changed base itself is the other way.
    residual = theirs.unload()
    residual.save_pretrained(tmp_path / "residual")
    assert close(our_logits(tmp_path / "residual", adapter, base_is="residual"), expected, 1e-5)
    if name.startswith("pissa"):
        with pytest.raises(MiniloraError, match="looks like the residual already; say --base-is"):
            our_logits(tmp_path / "residual", adapter, initial=initial)


@pytest.mark.parametrize("name", ["orthogonal", "pissa", "olora", "eva"])
def test_save_pretrained_writes_what_peft_reads(name: str, bases: Path, tmp_path: Path) -> None:
    base = bases / "llama"
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=NAMES, init_lora_weights=name, task_type="CAUSAL_LM"
    )
    model = get_peft_model(CausalLM.from_pretrained(base), config, data=[IDS]).eval()
    rng = np.random.default_rng(3)
    for p in model.adapter_parameters("default").values():
        p.data = p.data + (0.1 * rng.standard_normal(p.shape)).astype(np.float32)
    expected = model(IDS).numpy()
    for as_trained in (False, True):
        folder = tmp_path / str(as_trained)
        model.save_pretrained(folder, as_trained=as_trained)
        read = peft.PeftModel.from_pretrained(load_model(base, "float32"), folder).eval()
        assert close(logits(read, IDS), expected, 1e-5)
        word = json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"]
        assert word == (name if as_trained else True)


def test_begin_model_measures_the_inputs_that_pefts_eva_sees(bases: Path) -> None:
    """peft's incremental decomposition reaches the optimum to a few percent, never more."""
    base = bases / "llama"
    config = LoraConfig(
        r=2, target_modules=["down_proj"], init_lora_weights="eva",
        extra={"eva_config": {"rho": 1.0}},
    )  # fmt: skip
    model = get_peft_model(CausalLM.from_pretrained(base), config, data=[np.c_[IDS, IDS[:, :1]]])
    inputs = {}
    theirs = load_model(base, "float32")
    for path, module in theirs.named_modules():
        if path.endswith("down_proj"):
            module.register_forward_hook(
                lambda module, x, y, path=path: inputs.__setitem__(path, x[0].detach().numpy())
            )
    logits(theirs, IDS)
    for path, X in inputs.items():
        X = X.reshape(-1, X.shape[-1]).astype(np.float64)
        X = X - X.mean(axis=0)
        A = model.adapters_by_path("default")[path].lora_A.numpy()
        best = (np.linalg.svd(X, compute_uv=False)[:2] ** 2).sum()
        assert abs(((X @ A.T) ** 2).sum() - best) <= 1e-5 * best
