"""Valid files of every kind that minilora reads, each in a folder with all that stands beside it, to be damaged.

    valid_files      safetensors, small, of every dtype; half of them by the reference package
    model_folders, coded_folders, sharded_folders   models of transformers', as bitsandbytes' codes, in shards
    adapter_folders, task_folders    adapters of peft's, and those that only minilora has
    mlx_folders, tokenizer_folders, record_folders

For benchmarks/fuzz.py, and not a script. What the packages `safetensors` and `tokenizers` write is there if they are.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora import CausalLM, LoraConfig, get_peft_model
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats import read_checkpoint, save_file, write_json
from minilora.formats.safetensors import NAMES
from minilora.lora import HydraConfig, get_multitask_model
from minilora.quant import quantize
from minilora.tools.converting import convert

try:
    import safetensors.numpy as reference
except ImportError:
    reference = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"  # of transformers and peft


def valid_files(rng: random.Random, count: int = 60) -> list[bytes]:
    """Small good safetensors files of every dtype, rank 0 to 4, sides of 0 too; half of them by the reference."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            tensors = {}
            for name in rng.sample(
                ["a", "b", "weight", "x.lora_A.weight", "é", "", "long" * 9], rng.randrange(4)
            ):
                dtype = rng.choice(sorted(NAMES, key=str))
                shape = [rng.randrange(4) for _ in range(rng.randrange(5))]
                count = int(np.prod(shape)) * dtype.itemsize
                content = bytes(
                    rng.randrange(2 if dtype == np.bool_ else 256) for _ in range(count)
                )
                tensors[name] = np.frombuffer(content, dtype).reshape(shape)
            metadata = rng.choice(
                [None, {}, {"format": "pt"}, {"a": "\N{BULLET}"}]
            )  # not two: the reference has no order
            if (
                reference and i % 2 and (tensors or metadata)
            ):  # of {} and {} safetensors 0.8 makes no valid file
                made.append(reference.save(tensors, metadata))
            else:
                save_file(Path(folder, "file"), tensors, metadata)
                made.append(Path(folder, "file").read_bytes())
    return made


def copied(name: str, folder: Path) -> Path:
    return Path(
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("expect*", "logits*"))
    )


BASES = ("llama", "llama_tied_llama3rope", "mistral", "qwen2", "qwen3", "gpt2")


def model_folders(folder: Path) -> Iterator[Path]:
    """Six models of transformers', and three of codes."""
    for name in BASES:
        yield copied(name, folder / name)
    yield from coded_folders(folder)


def coded_folders(folder: Path) -> Iterator[Path]:
    """A model that bitsandbytes quantised, and ours of either kind, with and without double quantisation."""
    yield copied("bitsandbytes/llama--nf4", folder / "nf4")
    for kind, double in ("fp4", True), ("nf4", False):
        made = quantize(CausalLM.from_pretrained(GOLDEN / "qwen2"), kind, double_quant=double)
        made.save_pretrained(folder / f"{kind}-{double}")
        yield folder / f"{kind}-{double}"


def sharded_folders(folder: Path) -> Iterator[Path]:
    for name in "llama", "gpt2":
        copied(name, folder / name)
        with read_checkpoint(folder / name)[1] as whole:
            tensors = {key: whole.read(key) for key in whole.keys()}
        (folder / name / "model.safetensors").unlink()
        weight_map = {
            key: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, key in enumerate(tensors)
        }
        for shard in {*weight_map.values()}:
            save_file(
                folder / name / shard,
                {key: a for key, a in tensors.items() if weight_map[key] == shard},
            )
        index = {
            "metadata": {"total_size": sum(a.nbytes for a in tensors.values())},
            "weight_map": weight_map,
        }
        write_json(folder / name / "model.safetensors.index.json", index)
        yield folder / name


def adapter_folders(folder: Path) -> Iterator[Path]:
    """Fifteen adapters of peft's, and four of ours, whose names begin with their base's, as those do."""
    for path in sorted(GOLDEN.glob("*--*")):
        yield copied(path.name, folder / path.name)
    linear = ["q_proj", "down_proj"]
    for name, config in {
        "hydra": HydraConfig(r=2, target_modules=linear, experts=2),
        "tokens": LoraConfig(r=2, target_modules=linear, trainable_token_indices=[1, 5]),
        "layers": LoraConfig(
            r=2, target_modules=linear, layers_to_transform=[1], layers_pattern="layers"
        ),
        "all": LoraConfig(
            r=2,
            target_modules="all-linear",
            exclude_modules=["up_proj"],
            alpha_pattern={r"^.*\.[qk]_proj$": 3},
        ),
    }.items():
        made = get_peft_model(CausalLM.from_pretrained(GOLDEN / "llama"), config)
        made.save_pretrained(folder / f"llama--{name}")
        yield folder / f"llama--{name}"


def mlx_folders(folder: Path) -> Iterator[Path]:
    for name in "llama--lora", "llama--dora", "qwen3--lora":
        convert(GOLDEN / name, folder / name, to="mlx")
        yield folder / name


def task_folders(folder: Path) -> Iterator[Path]:
    tasks = {
        "one": LoraConfig(r=2, target_modules=["q_proj"]),
        "two": LoraConfig(r=1, target_modules=["v_proj"]),
    }
    for name, shared in ("apart", None), ("shared", LoraConfig(r=2, target_modules=["up_proj"])):
        made = get_multitask_model(CausalLM.from_pretrained(GOLDEN / "llama"), tasks, shared)
        made.save_pretrained(folder / f"llama--{name}")
        yield folder / f"llama--{name}"


def tokenizer_folders(folder: Path) -> Iterator[Path]:
    """Our own, and one for each model that the package `tokenizers` has, with what may stand around it."""
    (folder / "own").mkdir(parents=True)
    ByteTokenizer().save(folder / "own")
    yield folder / "own"
    for name, made in theirs().items():
        (folder / name).mkdir()
        made.save(str(folder / name / "tokenizer.json"), pretty=False)
        config = {
            "eos_token": "</s>" if name == "bytes" else {"content": "</s>", "special": True},
            "bos_token": "<s>",
        }
        config["added_tokens_decoder"] = {"1": {"content": "</s>", "special": True}}
        write_json(folder / name / "tokenizer_config.json", config)
        yield folder / name


def theirs() -> dict[str, Any]:
    if tokenizers is None:
        return {}
    t, made, special = tokenizers, {}, ["<s>", "</s>", "[UNK]", "[MASK]"]
    pre, norm, post = t.pre_tokenizers, t.normalizers, t.processors
    around = post.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    parts = {  # name -> model, trainer, normalizer, pre-tokenizer, decoder, post-processor
        "bytes": (t.models.BPE(), t.trainers.BpeTrainer, None, pre.ByteLevel(add_prefix_space=False),
                  t.decoders.ByteLevel(), post.ByteLevel(trim_offsets=False)),
        "split": (t.models.BPE(unk_token="[UNK]", fuse_unk=True), t.trainers.BpeTrainer,
                  norm.Sequence([norm.Prepend("\u2581"), norm.Replace(" ", "\u2581")]),
                  pre.Split(t.Regex(r"\p{L}+|\p{N}{1,3}|\s+"), "isolated"), t.decoders.BPEDecoder(), around),
        "pieces": (t.models.WordPiece(unk_token="[UNK]"), t.trainers.WordPieceTrainer, norm.BertNormalizer(),
                   pre.BertPreTokenizer(), t.decoders.WordPiece(), post.BertProcessing(("</s>", 1), ("<s>", 0))),
        "unigram": (t.models.Unigram(), t.trainers.UnigramTrainer, norm.Sequence([norm.NFKC(), norm.Lowercase()]),
                    pre.Metaspace(), t.decoders.Metaspace(), around),
        "words": (t.models.WordLevel(unk_token="[UNK]"), t.trainers.WordLevelTrainer, norm.Replace(t.Regex("a+"), "a"),
                  pre.Sequence([pre.Whitespace(), pre.Digits(), pre.Punctuation()]), None,
                  post.RobertaProcessing(("</s>", 1), ("<s>", 0))),
    }  # fmt: skip
    for name, (model, trainer, normalizer, before, decoder, after) in parts.items():
        one = made[name] = t.Tokenizer(model)
        one.pre_tokenizer, one.post_processor = before, after
        if normalizer is not None:
            one.normalizer = normalizer
        if decoder is not None:
            one.decoder = decoder
        options = {"unk_token": "[UNK]"} if name == "unigram" else {}
        kind = trainer(vocab_size=60, special_tokens=special, show_progress=False, **options)
        one.train_from_iterator(["the cat sat on the mat and the rat " * 3], kind)
        one.add_tokens([t.AddedToken("Ünï", single_word=True, lstrip=True), "\n"])
    made["bytes"].enable_truncation(4)
    made["bytes"].enable_padding()
    return made


RECORDS = (
    {"text": "the cat"}, {"prompt": "what? ", "completion": "that"}, {"completion": "that", "prompt": ""},
    {"text": "\N{BULLET}" * 9}, {"text": "a\n\"b\"\\"},
)  # fmt: skip


def record_folders(folder: Path) -> Iterator[Path]:
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        lines = [json.dumps(record, ensure_ascii=i == 1) for record in RECORDS[i:]]
        (folder / str(i) / "data.jsonl").write_text("\n".join(lines) + "\n" * i)
        yield folder / str(i)
