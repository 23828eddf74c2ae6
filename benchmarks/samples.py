"""Valid files of every kind that minilora reads, for benchmarks/fuzz.py to damage.

    valid_files        small safetensors files of every dtype; half of them by the reference package
    model_folders      models of transformers
    coded_folders      models with quantized weights, by bitsandbytes and by minilora
    sharded_folders    models in shards
    adapter_folders    adapters of peft, and those that only minilora has
    task_folders       adapters by task
    mlx_folders, tokenizer_folders, record_folders

Each function that ends in `_folders` writes folders that are complete. Files of the packages
`safetensors` and `tokenizers` are included if these are installed. This is not a script.
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

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"  # files of transformers and peft


def valid_files(rng: random.Random, count: int = 60) -> list[bytes]:
    """Safetensors files of every dtype, with rank 0 to 4 and sides of 0 to 3.

    minilora and the reference package write them by turns.
    """
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            tensors = {}
            for name in rng.sample(
                ["a", "b", "weight", "x.lora_A.weight", "é", "", "long" * 9], rng.randrange(4)
            ):
                dtype = rng.choice(sorted(NAMES, key=str))
                shape = [rng.randrange(4) for _ in range(rng.randrange(5))]
                size = int(np.prod(shape)) * dtype.itemsize
                largest = 2 if dtype == np.bool_ else 256
                content = bytes(rng.randrange(largest) for _ in range(size))
                tensors[name] = np.frombuffer(content, dtype).reshape(shape)
            # At most one key: the reference package writes several in any order.
            metadata = rng.choice([None, {}, {"format": "pt"}, {"a": "\N{BULLET}"}])
            # Without tensors and metadata safetensors 0.8 writes no valid file.
            if reference and i % 2 and (tensors or metadata):
                files.append(reference.save(tensors, metadata))
            else:
                save_file(Path(folder, "file"), tensors, metadata)
                files.append(Path(folder, "file").read_bytes())
    return files


def copy_golden(name: str, folder: Path) -> Path:
    """The golden folder without the values that tests compare with."""
    ignore = shutil.ignore_patterns("expect*", "logits*")
    return Path(shutil.copytree(GOLDEN / name, folder, ignore=ignore))


BASES = ("llama", "llama_tied_llama3rope", "mistral", "qwen2", "qwen3", "gpt2")


def model_folders(folder: Path) -> Iterator[Path]:
    """Six models of transformers, and three with quantized weights."""
    for name in BASES:
        yield copy_golden(name, folder / name)
    yield from coded_folders(folder)


def coded_folders(folder: Path) -> Iterator[Path]:
    """One model quantized by bitsandbytes, and two by minilora: fp4 with double quantization, and
    nf4 without."""
    yield copy_golden("bitsandbytes/llama--nf4", folder / "nf4")
    for kind, double in ("fp4", True), ("nf4", False):
        model = quantize(CausalLM.from_pretrained(GOLDEN / "qwen2"), kind, double_quant=double)
        model.save_pretrained(folder / f"{kind}-{double}")
        yield folder / f"{kind}-{double}"


def sharded_folders(folder: Path) -> Iterator[Path]:
    for name in "llama", "gpt2":
        copy_golden(name, folder / name)
        with read_checkpoint(folder / name)[1] as whole:
            tensors = {key: whole.read(key) for key in whole.keys()}
        (folder / name / "model.safetensors").unlink()
        weight_map = {}
        for i, key in enumerate(tensors):
            weight_map[key] = f"model-{1 + i % 3:05}-of-00003.safetensors"
        for shard in {*weight_map.values()}:
            part = {key: value for key, value in tensors.items() if weight_map[key] == shard}
            save_file(folder / name / shard, part)
        size = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / name / "model.safetensors.index.json", index)
        yield folder / name


def adapter_folders(folder: Path) -> Iterator[Path]:
    """Fifteen adapters of peft, and four of minilora; a folder's name begins with its base's."""
    for path in sorted(GOLDEN.glob("*--*")):
        yield copy_golden(path.name, folder / path.name)
    linear = ["q_proj", "down_proj"]
    layers = {"layers_to_transform": [1], "layers_pattern": "layers"}
    configs = {
        "hydra": HydraConfig(r=2, target_modules=linear, experts=2),
        "tokens": LoraConfig(r=2, target_modules=linear, trainable_token_indices=[1, 5]),
        "layers": LoraConfig(r=2, target_modules=linear, **layers),
        "all": LoraConfig(
            r=2,
            target_modules="all-linear",
            exclude_modules=["up_proj"],
            alpha_pattern={r"^.*\.[qk]_proj$": 3},
        ),
    }
    for name, config in configs.items():
        model = get_peft_model(CausalLM.from_pretrained(GOLDEN / "llama"), config)
        model.save_pretrained(folder / f"llama--{name}")
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
        model = get_multitask_model(CausalLM.from_pretrained(GOLDEN / "llama"), tasks, shared)
        model.save_pretrained(folder / f"llama--{name}")
        yield folder / f"llama--{name}"


def tokenizer_folders(folder: Path) -> Iterator[Path]:
    """The byte tokenizer, and one for each model of the package `tokenizers`."""
    (folder / "own").mkdir(parents=True)
    ByteTokenizer().save(folder / "own")
    yield folder / "own"
    for name, tokenizer in library_tokenizers().items():
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"), pretty=False)
        eos = {"content": "</s>", "special": True}
        config = {
            "eos_token": "</s>" if name == "bytes" else eos,
            "bos_token": "<s>",
            "added_tokens_decoder": {"1": eos},
        }
        write_json(folder / name / "tokenizer_config.json", config)
        yield folder / name


def library_tokenizers() -> dict[str, Any]:
    """One small tokenizer per model of the package `tokenizers`, with various other parts."""
    if tokenizers is None:
        return {}
    models = tokenizers.models
    trainers = tokenizers.trainers
    pre = tokenizers.pre_tokenizers
    norm = tokenizers.normalizers
    post = tokenizers.processors
    decoders = tokenizers.decoders
    special = ["<s>", "</s>", "[UNK]", "[MASK]"]
    pairs = [("<s>", 0), ("</s>", 1)]
    template = post.TemplateProcessing(single="<s> $A </s>", pair="$A $B:1", special_tokens=pairs)
    result = {}

    def add(
        name: str,
        model: Any,
        trainer: Any,
        normalizer: Any,
        pre_tokenizer: Any,
        decoder: Any,
        processor: Any,
    ) -> None:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.post_processor = processor
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if decoder is not None:
            tokenizer.decoder = decoder
        options = {"unk_token": "[UNK]"} if name == "unigram" else {}
        training = trainer(vocab_size=60, special_tokens=special, show_progress=False, **options)
        tokenizer.train_from_iterator(["the cat sat on the mat and the rat " * 3], training)
        word = tokenizers.AddedToken("Ünï", single_word=True, lstrip=True)
        tokenizer.add_tokens([word, "\n"])
        result[name] = tokenizer

    add(
        "bytes",
        models.BPE(),
        trainers.BpeTrainer,
        None,
        pre.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        post.ByteLevel(trim_offsets=False),
    )
    add(
        "split",
        models.BPE(unk_token="[UNK]", fuse_unk=True),
        trainers.BpeTrainer,
        norm.Sequence([norm.Prepend("\u2581"), norm.Replace(" ", "\u2581")]),
        pre.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}|\s+"), "isolated"),
        decoders.BPEDecoder(),
        template,
    )
    add(
        "pieces",
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
        norm.BertNormalizer(),
        pre.BertPreTokenizer(),
        decoders.WordPiece(),
        post.BertProcessing(("</s>", 1), ("<s>", 0)),
    )
    add(
        "unigram",
        models.Unigram(),
        trainers.UnigramTrainer,
        norm.Sequence([norm.NFKC(), norm.Lowercase()]),
        pre.Metaspace(),
        decoders.Metaspace(),
        template,
    )
    add(
        "words",
        models.WordLevel(unk_token="[UNK]"),
        trainers.WordLevelTrainer,
        norm.Replace(tokenizers.Regex("a+"), "a"),
        pre.Sequence([pre.Whitespace(), pre.Digits(), pre.Punctuation()]),
        None,
        post.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    )
    result["bytes"].enable_truncation(4)
    result["bytes"].enable_padding()
    return result


RECORDS = (
    {"text": "the cat"},
    {"prompt": "what? ", "completion": "that"},
    {"completion": "that", "prompt": ""},
    {"text": "\N{BULLET}" * 9},
    {"text": 'a\n"b"\\'},
)


def record_folders(folder: Path) -> Iterator[Path]:
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        lines = [json.dumps(record, ensure_ascii=i == 1) for record in RECORDS[i:]]
        (folder / str(i) / "data.jsonl").write_text("\n".join(lines) + "\n" * i)
        yield folder / str(i)
