"""How tests/golden/bitsandbytes was written: weights by bitsandbytes, a model by transformers.

`weight(case)` gives the same float32 numbers wherever it runs. To write the files again, with
torch, transformers, accelerate and bitsandbytes installed (transformers 5.23.0 and bitsandbytes
0.50.2 wrote them, on a CPU): python tests/support/bitsandbytes_golden.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).parents[1] / "golden" / "bitsandbytes" / "expect.safetensors"
FOLDER = FILE.parent / "llama--nf4"  # of transformers; logits.safetensors has `ids` and `logits`


class Case(NamedTuple):
    kind: str
    shape: tuple[int, int]
    block_size: int
    double_quant: bool


CASES = {
    "plain": Case("nf4", (48, 64), 64, False),
    "nested": Case("nf4", (65, 128), 32, True),  # 260 blocks: two scales
    "short end": Case("nf4", (16, 33), 64, True),  # 528 weights: the last block has 16
    "long block": Case("nf4", (5, 1000), 4096, False),
    "odd": Case("nf4", (9, 7), 64, False),  # a nibble is left over
    "fp4": Case("fp4", (32, 60), 64, True),
    "nf4 ties": Case("nf4", (2, 64), 64, False),
    "fp4 ties": Case("fp4", (2, 64), 64, False),
    "small": Case("nf4", (4, 64), 64, False),
}


def weight(name: str) -> np.ndarray:
    """The weight (O, I) float32 of a case.

    Products of exact numbers, so that no generator and no library matters.
    """
    case = CASES[name]
    size = case.shape[0] * case.shape[1]
    count = np.arange(size, dtype=np.uint64)
    k = count * np.uint64(2654435761) % np.uint64(2**32)  # Knuth's multiplicative hash
    u = k.astype(np.float64) / 2**31 - 1  # in [-1, 1)
    values = (u * u * u * 0.5 + u * 0.25) * (1 + np.arange(size) // case.block_size % 5)
    if name.endswith("ties"):
        values = np.resize(_midpoints(case.kind), size)
        values[0] = 1.0  # absmax 1: what is divided is the midpoint itself
        values[case.block_size] = 1.0
    if name == "small":
        values = values.reshape(4, 64)
        values[0] = [0.0, -0.0] * 32
        values[1] *= 2.0**-126 / np.abs(values[1]).max()  # the end of the normal numbers
        values[2] *= 2.0**-120  # some are subnormal
    return values.reshape(case.shape).astype(np.float32)


def _midpoints(kind: str) -> np.ndarray:
    """The float32 midpoints of neighbouring levels, and the float32 just below and above each."""
    from minilora.quant import LEVELS

    levels = np.sort(LEVELS[kind])
    middle = (levels[:-1] + levels[1:]) / np.float32(2)
    below = np.nextafter(middle, np.float32(-2))
    above = np.nextafter(middle, np.float32(2))
    return np.concatenate([middle, below, above])


def main() -> None:
    import torch
    from bitsandbytes import functional as bnb

    from minilora.formats import save_file

    tensors = {}
    for name, case in CASES.items():
        packed, state = bnb.quantize_4bit(
            torch.from_numpy(weight(name)),
            blocksize=case.block_size,
            compress_statistics=case.double_quant,
            quant_type=case.kind,
        )
        tensors[f"{name}.weight"] = packed.numpy()
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.weight.{key}"] = value.numpy()
        if packed.numel() <= 2048:
            tensors[f"{name}.decoded"] = bnb.dequantize_4bit(packed, state).numpy()
    FILE.parent.mkdir(exist_ok=True)
    save_file(FILE, tensors)
    write_folder()


def write_folder() -> None:
    """A Llama that transformers quantised, and the logits of the weights that it decodes.

    Rows are as long as blocks: with shorter rows bitsandbytes' CPU kernel decodes with another
    block's absmax.
    """
    import tempfile

    import torch
    import transformers

    from minilora.formats import save_file

    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, attention_bias=True, initializer_range=0.2)
    )
    for p in dense.parameters():
        if p.ndim == 1:
            p.data = 1 + 0.3 * torch.randn_like(p)
    scheme = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        coded = load(folder, quantization_config=scheme, dtype=torch.float32, device_map="cpu")
    coded.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = load(FOLDER, device_map="cpu").eval().dequantize()(ids).logits
    save_file(FOLDER / "logits.safetensors", {"ids": ids.numpy(), "logits": logits.numpy()})


if __name__ == "__main__":
    main()
