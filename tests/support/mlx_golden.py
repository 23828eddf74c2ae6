"""What mlx-lm makes of tiny models: how tests/golden/mlx was written, and what mlx-lm can load.

To write the files again, install mlx and mlx-lm (mlx 0.32.4 and mlx-lm 0.32.2 wrote them on a CPU):

    python tests/support/mlx_golden.py

and to compare an adapter that `minilora convert --to mlx` wrote, the logits of ids 0 to 3 with it:

    python tests/support/mlx_golden.py BASE ADAPTER    # prints them, a row a position
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = (
    GOLDEN / "mlx"
)  # by case: mlx-lm's two files as its trainer saved them, and logits.npy, float32; some fused
IDS = np.arange(4)[None]
# base, fine_tune_type, num_layers, lora_parameters' keys
CASES: dict[str, tuple[str, str, int, list[str] | None]] = {
    "lora": ("llama", "lora", 1, None),
    "dora": ("llama", "dora", 2, ["self_attn.q_proj", "mlp.down_proj"]),
    "head": ("llama", "lora", 1, ["self_attn.q_proj", "lm_head"]),
    "tied-embedding": (
        "llama_tied_llama3rope",
        "lora",
        1,
        ["self_attn.v_proj", "model.embed_tokens"],
    ),
    "gpt2": ("gpt2", "lora", 1, None),
    "gpt2-embedding": ("gpt2", "lora", 1, ["model.wte"]),
    "dora-embedding": ("llama", "dora", 1, ["model.embed_tokens"]),
}
FUSED = ("lora", "dora", "head")
REFUSED = ("gpt2-embedding", "dora-embedding")  # what PEFT cannot say


def load(base: Path) -> Any:
    """mlx-lm's model of a folder, which knows older files' names of RoPE's fields and of GPT-2."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("n_ctx", config.get("n_positions"))
        rope = config.get("rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"})
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None
        if rope["rope_type"] != "default":
            config["rope_scaling"] = scaling
        weights = mx.load(str(folder / "model.safetensors"))
        mx.save_safetensors(
            str(folder / "model.safetensors"),
            {k.removeprefix("transformer."): w for k, w in weights.items()},
        )
        (folder / "config.json").write_text(json.dumps(config))
        model, _ = load_model(folder, lazy=False)
    model.set_dtype(mx.float32)
    return model


def logits(model: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(model.eval()(mx.array(IDS)))[0]


def train(name: str, folder: Path) -> None:
    import mlx.core as mx
    import mlx.optimizers as opt
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    base, kind, layers, keys = CASES[name]
    mx.random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (mlx-lm draws its batches of it)
    model = load(GOLDEN / base)
    model.freeze()
    parameters = {"rank": 3, "scale": 5.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    folder.mkdir(parents=True)
    fields = {
        "model": base,
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    save_config(fields, folder / "adapter_config.json")
    data = [(mx.random.randint(0, 96, (20,)).tolist(), 0) for _ in range(8)]
    file = str(folder / "adapters.safetensors")
    options = trainer.TrainingArgs(batch_size=2, iters=8, max_seq_length=32, adapter_file=file)
    trainer.train(model, opt.Adam(learning_rate=3e-2), data, None, options)
    for snapshot in folder.glob("*_adapters.safetensors"):
        snapshot.unlink()
    if name not in REFUSED:
        np.save(folder / "logits.npy", logits(model))


def fuse(name: str, folder: Path) -> None:
    """Write what mlx-lm's `fuse` makes of a case in bfloat16: folder/fused.safetensors."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import load_adapters

    model = load(GOLDEN / CASES[name][0])
    model.set_dtype(mx.bfloat16)
    model = load_adapters(model, str(folder))
    layers = [(path, m.fuse()) for path, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(layers))
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "fused.safetensors"), tensors, metadata={"format": "mlx"})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        from mlx_lm.utils import load_adapters

        np.savetxt(sys.stdout, logits(load_adapters(load(Path(sys.argv[1])), sys.argv[2])))
    else:
        shutil.rmtree(FOLDER, ignore_errors=True)
        for case in CASES:
            train(case, FOLDER / case)
        for case in FUSED:
            fuse(case, FOLDER / case)
