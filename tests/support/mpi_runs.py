"""Every kind of run under MPI: `mpiexec -n N python -m mpi4py mpi_runs.py FOLDER NAME ...`.

Rank 0 prints a JSON line per name and number of threads: checksums of weights, losses, evaluations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_multitask_model,
    get_peft_model,
)
from minilora.training.loop import Settings, train
from minilora.training.ranks import connect

CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
TEXT = np.random.default_rng(0).integers(0, 64, 800)
HELD_OUT = np.random.default_rng(1).integers(0, 64, 300)
SETTINGS = Settings(steps=3, batch_size=7, context=16, lr=1e-2, warmup=2, shard=1)
ADALORA = AdaLoraConfig(
    target_r=1, init_r=2, tinit=1, tfinal=1, deltaT=1, total_step=3, target_modules="all-linear"
)


def lora(**fields):
    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return LoraConfig(**fields)


def adapted(config):
    return get_peft_model(CausalLM(CONFIG, seed=1), config, seed=2)


RUNS = {
    "lora": (lambda: adapted(lora()), {}),
    "dora": (lambda: adapted(lora(use_dora=True)), {}),
    "adalora": (lambda: adapted(ADALORA), {}),
    "multitask": (
        lambda: get_multitask_model(CausalLM(CONFIG, seed=1), {"a": lora(), "b": lora()}, seed=2),
        {},
    ),
    "dropout": (lambda: adapted(lora(lora_dropout=0.3)), {}),
    "accumulation": (lambda: adapted(lora()), {"batch_size": 3, "accumulate": 3}),
    "full": (lambda: CausalLM(CONFIG, seed=1), {}),
}


def checksum(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main(folder: Path, names: list[str]) -> None:
    with connect() as ranks:
        for name in names:
            for threads in (1, 2):
                make, changes = RUNS[name]
                model = make()
                tokens, held_out = TEXT, HELD_OUT
                if name == "multitask":
                    tokens, held_out = (
                        {"a": text, "b": text[::-1].copy()} for text in (TEXT, HELD_OUT)
                    )
                settings = dataclasses.replace(SETTINGS, threads=threads, **changes)
                out = folder / f"{name}-{threads}"
                result = train(model, tokens, settings, out, held_out=held_out, ranks=ranks)
                weights = [p.data.tobytes() for p in model.parameters() if p.requires_grad]
                seen = checksum(*weights), result.losses, result.evaluations
                if ranks.rank == 0:
                    print(json.dumps([name, threads, *seen]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
