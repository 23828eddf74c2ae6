"""Adapters added up, in a model and from files, beside the exact sum."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from strict_xp import STRICT
from tool_files import GOLDEN, PREFIX, logits, tree
from tool_files import base_of as of

from minilora import CausalLM
from minilora.errors import ConfigError, FormatError, MiniloraError, NonFiniteError
from minilora.formats import read_adapter, write_adapter
from minilora.lora import AdaLoraConfig, HydraConfig, LoraConfig, PeftModel, get_peft_model
from minilora.lora.combining import FACTORWISE, combine_layer
from minilora.lora.factors import Part
from minilora.lora.files.adapter import AdapterFile
from minilora.lora.pruning import PRUNED, RANDOM
from minilora.tools.combining import combine
from minilora.tools.merging import merge

U32, U64 = 2.0**-24, 2.0**-53
Q = "model.layers.0.self_attn.q_proj"
PATHS = (Q, "model.layers.1.mlp.up_proj", "model.embed_tokens")
PAIRS = [  # golden adapters of one base that can be added up
    ("llama--lora", "llama--rslora_all"),
    ("llama--adalora", "llama--patterns"),
    ("llama--save_head", "llama--regex_layer1"),
    ("gpt2--lora", "gpt2--lora_wte"),
]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


def largest(array: Any) -> float:
    return float(np.abs(array).max())


def near(got: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    return largest(got - expected) <= tolerance * largest(expected)


# ---- files ---------------------------------------------------------------------------------------


def random_part(rng: np.random.Generator, O: int, r: int, I: int) -> Part:
    return Part(rng.normal(size=(r, I)), rng.normal(size=(O, r)), 1.0)


def write(
    folder: Path,
    parts: dict[str, Part],
    rng: np.random.Generator,
    kind: str = "LORA",
    alpha: float = 2,
) -> Path:
    """An adapter with these factors; `kind` is a peft_type or "RSLORA"."""
    tensors = {}
    ranks = {}
    for path, (A, B, *_) in parts.items():
        names = ["lora_A.weight", "lora_B.weight"]
        if "embed" in path:
            names = ["lora_embedding_A", "lora_embedding_B"]
        if kind == "ADALORA":
            names = ["lora_A", "lora_B"]
            E = rng.normal(size=(len(A), 1))
            tensors[f"{PREFIX}{path}.lora_E"] = E.astype(np.float32)
        tensors[f"{PREFIX}{path}.{names[0]}"] = np.float32(A)
        tensors[f"{PREFIX}{path}.{names[1]}"] = np.float32(B)
        ranks[path] = len(A)
    r = max(ranks.values())
    fields: dict[str, Any] = {"target_modules": sorted(parts), "lora_alpha": alpha}
    if kind == "ADALORA":
        fields |= {"peft_type": kind, "init_r": r, "target_r": r, "total_step": 9}
    else:
        fields |= {"r": r, "rank_pattern": ranks, "use_rslora": kind == "RSLORA"}
    write_adapter(folder, fields, tensors)
    return folder


def read_parts(adapters: list[Path], weights: list[float]) -> dict[str, list[Part]]:
    """The factors of each layer, each c times its adapter's weight."""
    parts: dict[str, list[Part]] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        with AdapterFile(folder) as file:
            for path in file.layers:
                part = file.part(path)
                parts.setdefault(path, []).append(part._replace(c=weight * part.c))
    return parts


def exact_sum(parts: list[Part]) -> Any:
    return sum(part.c * (part.B @ part.A) for part in parts)


def size_of(parts: list[Part]) -> Any:
    """The sum of |c| |B| |A|."""
    return sum(abs(part.c) * (abs(part.B) @ abs(part.A)) for part in parts)


def cross_terms(parts: list[Part]) -> tuple[Any, Any]:
    """What linear adds to the sum, sum over i != j of sgn(c_j) sqrt|c_i c_j| B_i A_j, and its size.

    The size is that of the sum and the cross terms, in absolute values.
    """
    cross: Any = 0.0
    size: Any = 0.0
    for (i, one), (j, other) in itertools.product(enumerate(parts), repeat=2):
        root = math.sqrt(abs(one.c) * abs(other.c))
        if i != j:
            cross = cross + math.copysign(root, other.c) * (one.B @ other.A)
        size = size + root * (abs(one.B) @ abs(other.A))
    return cross, size


@st.composite
def combinations(draw: st.DrawFn) -> tuple[Any, ...]:
    """(how, r, weights, a list of adapters): each a kind, alpha and the (O, r, I) of its layers."""
    how = draw(st.sampled_from(FACTORWISE))
    ranks = st.integers(1, 5)
    sizes = st.integers(1, 9)
    shapes = {path: (draw(sizes), draw(sizes)) for path in PATHS}
    same = draw(st.integers(1, 4))
    adapters = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["LORA", "RSLORA", "ADALORA"]))
        paths = PATHS[:2] if kind == "ADALORA" else PATHS
        one_rank = draw(ranks)
        layers = {}
        for path in draw(st.lists(st.sampled_from(paths), min_size=1, unique=True)):
            r = one_rank if kind == "ADALORA" else draw(ranks)
            O, I = shapes[path]
            layers[path] = (O, same if how == "linear" else r, I)
        adapters.append((kind, draw(st.sampled_from([1, 3.5])), layers))
    weights = [draw(st.sampled_from([1.0, 0.5, -0.75, 2.0, 0.0])) for _ in adapters]
    return how, draw(sizes) if how == "svd" else None, weights, adapters


@settings(max_examples=40)
@given(combinations(), st.integers(0, 2**32))
def test_combine_is_the_sum_or_as_far_from_it_as_its_rows_say(
    drawn: tuple[Any, ...], seed: int
) -> None:
    how, r, weights, described = drawn
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapters = []
        for i, (kind, alpha, layers) in enumerate(described):
            made = {path: random_part(rng, *shape) for path, shape in layers.items()}
            adapters.append(write(folder / f"a{i}", made, rng, kind, alpha))
        before = tree(folder)
        rows = combine(adapters, folder / "out", weights, how, r)
        after = tree(folder)
        assert before == {name: after[name] for name in before}
        parts = read_parts(adapters, weights)
        combined = read_parts([folder / "out"], [1.0])
        fields, tensors = read_adapter(folder / "out")
    assert set(combined) == set(parts) == {row["layer"] for row in rows}
    ranks = []
    for row in rows:
        path = row["layer"]
        want = exact_sum(parts[path])
        size = size_of(parts[path])
        cross: Any = 0.0
        if how == "linear":
            cross, size = cross_terms(parts[path])
        got = exact_sum(combined[path])
        rounding = 64 * 9 * U64 * np.linalg.norm(size)
        # A and B are rounded once each. With svd |B| |A| may be larger than the sum's.
        rounded = size_of(combined[path]) if how == "svd" else size
        bound = (2 * U32 + U32**2) * rounded + rounding
        missed = np.linalg.norm(got - want)
        assert abs(row["error"] - missed) <= rounding
        whole = np.linalg.norm(want)
        assert row["|dW|"] == pytest.approx(whole, rel=1e-11, abs=64 * 9 * U64 * size.max())
        of_parts, _, rank = row["r"].partition(" -> ")
        if how == "svd":
            values = np.linalg.svd(want, compute_uv=False)
            least = np.linalg.norm(values[int(rank) :])
            assert abs(missed - least) <= np.linalg.norm(bound)
        else:
            assert (abs(got - want - cross) <= bound).all()
        listed = [int(n) for n in of_parts.split(" + ")]
        ranks.append(sum(listed) if how == "cat" else max(listed))
    assert fields["r"] == fields["lora_alpha"] == (r or max(ranks))
    assert fields["use_rslora"] is False
    assert fields["rank_pattern"] == {}
    assert {len(a) for key, a in tensors.items() if "_A" in key} == {fields["r"]}


def logits_of_both(base: Path, folders: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a model in which both adapters are active, and of one with the first alone."""
    plain = CausalLM.from_pretrained(base, dtype="float64")
    model = PeftModel.from_pretrained(plain, folders[0], "one")
    model.load_adapter(folders[1], "two")
    results = []
    for names in (["one", "two"], ["one"]):
        model.set_adapter(names)
        results.append(np.asarray(model(np.arange(7)[None]).numpy()))
    return results[0], results[1]


@pytest.mark.filterwarnings("ignore:.*above the full rank")
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_combine_by_cat_has_the_logits_of_both_at_once(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """As far as float32 represents the factors."""
    folders = [GOLDEN / name for name in pair]
    combine(folders, tmp_path / "both")
    both, first = logits_of_both(of(pair[0]), folders)
    assert near(logits(of(pair[0]), tmp_path / "both"), both)
    assert largest(first - both) > 1e-3


@pytest.mark.parametrize("how", FACTORWISE)
def test_combine_merges_as_the_two_do(how: str, tmp_path: Path) -> None:
    names = [GOLDEN / "llama--lora", GOLDEN / "llama--lora"]
    combine(names, tmp_path / "both", [0.75, -0.25], how)
    merge(of("llama--lora"), names, tmp_path / "two", [0.75, -0.25])
    merge(of("llama--lora"), [tmp_path / "both"], tmp_path / "one")
    assert largest(logits(tmp_path / "one") - logits(tmp_path / "two")) < 1e-6


def test_combine_by_svd_without_a_rank_takes_the_largest(tmp_path: Path) -> None:
    folders = [GOLDEN / "llama--lora", GOLDEN / "llama--rslora_all"]
    rows = combine(folders, tmp_path / "out", how="svd")
    assert {row["r"] for row in rows} == {"4 + 3 -> 4", "3 -> 4"}
    assert read_adapter(tmp_path / "out")[0]["r"] == 4


def test_combine_with_a_weight_of_one_keeps_the_bits_of_A(tmp_path: Path) -> None:
    combine([GOLDEN / "llama--lora"] * 2, tmp_path / "out")
    _, before = read_adapter(GOLDEN / "llama--lora")
    _, after = read_adapter(tmp_path / "out")
    assert set(before) == set(after)
    for key, array in before.items():
        if "lora_A" in key:
            expected = np.concatenate([array, array])
        else:
            expected = np.concatenate([array * 2, array * 2], axis=1)  # s = 8 / 4 goes into B
        assert (after[key] == expected).all()


ALONE = ["llama--dora", "llama--save_head", "qwen2--lora_bias_only", "gpt2--lora_wte"]


@pytest.mark.parametrize("name", ALONE)
def test_combine_keeps_everything_of_a_single_adapter(name: str, tmp_path: Path) -> None:
    combine([GOLDEN / name], tmp_path / "out")
    _, before = read_adapter(GOLDEN / name)
    _, after = read_adapter(tmp_path / "out")
    assert set(after) == set(before)
    expected = logits(of(name), GOLDEN / name)
    assert largest(logits(of(name), tmp_path / "out") - expected) < 1e-5


OTHERS: dict[str, dict[str, Any]] = {
    "a copied module": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [3, 1]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("what", OTHERS)
def test_combine_keeps_what_only_one_adapter_has(what: str, first: int, tmp_path: Path) -> None:
    """The other adapter has one layer only, by layers_to_transform and by exclude_modules."""
    model = small.base("float64")
    model.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    other: dict[str, Any] = {"layers_to_transform": [1]}
    if what == "a pattern":
        other["exclude_modules"] = ["down_proj"]
    for name, changes in (("0", OTHERS[what]), ("1", other)):
        fields = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        made = get_peft_model(model, LoraConfig(**fields | changes), name)
        for key, p in made.adapter_parameters(name).items():
            if "lora_" not in key:  # trained in the file, and not in the base
                p.data = p.data + rng.normal(size=p.shape)
        made.save_pretrained(tmp_path)
        made.unload()
    both, _ = logits_of_both(tmp_path / "base", [tmp_path / "0", tmp_path / "1"])
    combine([tmp_path / str(first), tmp_path / str(1 - first)], tmp_path / "out")
    assert near(logits(tmp_path / "base", tmp_path / "out"), both)


@pytest.mark.parametrize("first", [0, 1])
def test_combine_takes_fan_in_fan_out_from_whichever_adapter_has_it(
    first: int, tmp_path: Path
) -> None:
    fields, tensors = read_adapter(GOLDEN / "gpt2--lora_wte")
    fields |= {"target_modules": ["wte"], "fan_in_fan_out": False}
    write_adapter(tmp_path / "wte", fields, {k: a for k, a in tensors.items() if "wte" in k})
    folders = [GOLDEN / "gpt2--lora", tmp_path / "wte"]
    combine([folders[first], folders[1 - first]], tmp_path / "out")
    assert read_adapter(tmp_path / "out")[0]["fan_in_fan_out"]


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_combine_of_tied_adapters_is_tied(how: str, tmp_path: Path) -> None:
    """The base is tied, and each adapter is one for embedding and head."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = small.base(dtype="float64", tie_word_embeddings=True)
    model.save_pretrained(base)
    folders = []
    for seed in (0, 1):
        fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        config = LoraConfig(r=2 + seed, init_lora_weights=False, **fields)
        made = get_peft_model(model, config, seed=seed)
        folders.append(tmp_path / f"{seed}")
        made.save_pretrained(folders[-1])
        made.unload()
    combine(folders, out, [0.5, -1.0], how, r=5 if how == "svd" else None)
    merge(base, folders, tmp_path / "two", [0.5, -1.0])
    merge(base, [out], tmp_path / "one")
    expected = logits(tmp_path / "two")
    assert near(logits(tmp_path / "one"), expected, 1e-4)
    assert near(logits(base, out), expected, 1e-4)
    assert read_adapter(out)[0]["ensure_weight_tying"]


# ---- what cannot be combined ---------------------------------------------------------------------


class Pair:
    """Two adapters of one layer, `a` and `b`, and the options of `combine`."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.rng = rng
        part = random_part(rng, 4, 2, 4)
        self.a, self.b = (write(folder / name, {Q: part}, rng) for name in "ab")
        self.options: dict[str, Any] = {"adapters": [self.a, self.b], "out": folder / "out"}

    def change_b(self, key: str, array: Any, **fields: Any) -> None:
        """Give b another tensor, and other fields."""
        before, tensors = read_adapter(self.b)
        tensors[f"{PREFIX}{key}"] = np.float32(array)
        write_adapter(self.b, before | fields, tensors)

    def copy_b(self) -> None:
        shutil.rmtree(self.a)
        shutil.copytree(self.b, self.a)


TOKEN = "model.embed_tokens.token_adapter.trainable_tokens_delta"
Change = Callable[[Pair], object]
CHANGES: dict[str, Change] = {}
REFUSALS: dict[str, tuple[type[MiniloraError], str]] = {}


def refused(kind: type[MiniloraError], message: str) -> Callable[[Change], Change]:
    """Add a change to a pair that makes `combine` raise this error."""

    def add(change: Change) -> Change:
        CHANGES[change.__name__] = change
        REFUSALS[change.__name__] = kind, message
        return change

    return add


def refused_options(name: str, kind: type[MiniloraError], message: str, **options: Any) -> None:
    CHANGES[name] = lambda pair: pair.options.update(options)
    REFUSALS[name] = kind, message


@refused(ConfigError, "b'.*what it does to .*q_proj.weight cannot be added")
def dora(pair: Pair) -> None:
    pair.change_b(f"{Q}.lora_magnitude_vector", np.ones(4), use_dora=True)


def add_head(pair: Pair) -> None:
    pair.change_b("lm_head.weight", np.ones((7, 4)), modules_to_save=["lm_head"])


@refused(ConfigError, r"lm_head.weight.*0\.5 times")
def weighted_head(pair: Pair) -> None:
    add_head(pair)
    pair.options["weights"] = [1.0, 0.5]


@refused(ConfigError, "lm_head.weight cannot be added")
def two_heads(pair: Pair) -> None:
    add_head(pair)
    pair.copy_b()


def add_bias(pair: Pair) -> None:
    pair.change_b(f"{Q}.base_layer.bias", np.ones(4), bias="lora_only")


@refused(ConfigError, r"q_proj.bias.*0\.5 times")
def weighted_biases(pair: Pair) -> None:
    add_bias(pair)
    pair.options["weights"] = [1.0, 0.5]


@refused(ConfigError, "biases of its layers, but does not adapt model.layers.1.self_attn.q_proj")
def biases_beside_another_layer(pair: Pair) -> None:
    add_bias(pair)
    part = random_part(pair.rng, 4, 2, 4)
    write(pair.a, {"model.layers.1.self_attn.q_proj": part}, pair.rng)


def add_token(pair: Pair) -> None:
    pair.change_b(TOKEN, np.ones((1, 4)), trainable_token_indices=[3])


@refused(ConfigError, "embed_tokens.weight cannot be added")
def two_tokens(pair: Pair) -> None:
    add_token(pair)
    pair.copy_b()


@refused(ConfigError, r"embed_tokens.weight.*0\.5 times")
def weighted_tokens(pair: Pair) -> None:
    add_token(pair)
    pair.options["weights"] = [1.0, 0.5]


@refused(ConfigError, "only one adapter can have trainable tokens, .*/a' has some")
def tokens_of_head_and_embedding(pair: Pair) -> None:
    key = TOKEN.replace("model.embed_tokens", "lm_head")
    pair.change_b(key, np.ones((1, 4)), trainable_token_indices={"lm_head": [3]})
    pair.copy_b()
    pair.b = write(pair.b, {Q: random_part(pair.rng, 4, 2, 4)}, pair.rng)
    add_token(pair)


@refused(FormatError, r"q_proj is another layer than the other adapters': \(4, 4\), \(4, 5\)")
def another_shape(pair: Pair) -> None:
    pair.change_b(f"{Q}.lora_A.weight", np.ones((2, 5)))


@refused(NonFiniteError, "q_proj: the sum of its adapters is not finite")
def not_a_number(pair: Pair) -> None:
    pair.change_b(f"{Q}.lora_A.weight", np.full((2, 4), np.nan))


@refused(NonFiniteError, "q_proj: the sum of its adapters is too large for float32")
def too_large(pair: Pair) -> None:
    pair.change_b(f"{Q}.lora_B.weight", np.full((4, 2), 3e38))
    pair.options["weights"] = [1.0, 100.0]


@refused(ConfigError, "q_proj: linear adds factors of one rank, and these have 3, 2")
def ranks(pair: Pair) -> None:
    write(pair.a, {Q: random_part(pair.rng, 4, 3, 4)}, pair.rng)
    pair.options["how"] = "linear"


@refused(ConfigError, "HydraLoRA")
def hydra(pair: Pair) -> None:
    pair.change_b(f"{Q}.lora_route.weight", np.ones((1, 4)), peft_type="HYDRALORA", experts=1)


@refused(ConfigError, "no layer is adapted")
def tokens_alone(pair: Pair) -> None:
    fields = {"trainable_token_indices": [3], "target_modules": None}
    write_adapter(pair.a, fields, {f"{PREFIX}{TOKEN}": np.ones((1, 4))})
    pair.options["adapters"] = [pair.a]


@refused(ConfigError, "--out .* is inside --adapter")
def out_inside_an_adapter(pair: Pair) -> None:
    pair.options["out"] = pair.a / "out"


@refused(ConfigError, "out")
def out_exists(pair: Pair) -> None:
    shutil.copytree(pair.a, pair.options["out"])


NUMBERS = "--weights: expected 2 finite numbers"
LISTS = "adapters: expected a list of one or more, got "
refused_options("one weight", ConfigError, NUMBERS, weights=[1.0])
refused_options("NaN times", ConfigError, NUMBERS, weights=[1.0, math.nan])
refused_options("no numbers", ConfigError, NUMBERS + ".*got 2$", weights=2)
refused_options("a long number", ConfigError, NUMBERS, weights=[1, 10**400])
refused_options("no adapters", ConfigError, LISTS + r"\[\]", adapters=[])
refused_options("no list", ConfigError, LISTS + "'a'", adapters="a")
UNKNOWN = "no combination type 'mean'; choose from cat, svd, linear, ties, dare_linear"
refused_options("a way", ConfigError, UNKNOWN, how="mean")
refused_options("a rank with cat", ConfigError, "a rank is for svd.*cat got 3", r=3)
refused_options("rank 0", ConfigError, "from 1 to 65536; svd got 0", how="svd", r=0)


@pytest.mark.parametrize("name", CHANGES)
def test_combine_names_what_cannot_be_combined_and_leaves_nothing(
    name: str, tmp_path: Path
) -> None:
    pair = Pair(tmp_path)
    CHANGES[name](pair)
    before = tree(tmp_path)
    kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        combine(**pair.options)
    assert tree(tmp_path) == before


def test_combine_warns_of_adapters_that_name_different_bases(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = random_part(rng, 4, 2, 4)
    folders = {}
    for name, base in (("a", "one"), ("b", "two\n"), ("c", None)):
        folders[name] = write(tmp_path / name, {Q: part}, rng)
        fields, tensors = read_adapter(folders[name])
        fields["base_model_name_or_path"] = base
        write_adapter(folders[name], fields, tensors)
    message = r"different bases, and a sum is for one model: 'one', 'two\\n'"
    with pytest.warns(UserWarning, match=message):
        combine([*folders.values()], tmp_path / "out")
    quiet = [folders["a"], folders["c"], folders["a"]]
    combine(quiet, tmp_path / "quiet")  # a warning would be an error here


@pytest.mark.parametrize("way", FACTORWISE)
def test_combine_refuses_a_sum_too_large_for_its_own_singular_values(
    way: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    part = Part(rng.normal(size=(2, 64)), rng.uniform(size=(64, 2)), 1)
    folder = write(tmp_path / "a", {Q: part}, rng)
    message = "q_proj: the sum of its adapters is too large for float64"
    with pytest.raises(NonFiniteError, match=message):
        combine([folder], tmp_path / "out", [1e308], way)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("way", FACTORWISE)
def test_combine_of_a_sum_that_cancels_has_no_dW(way: str, tmp_path: Path) -> None:
    """Not a dW of 1e-17, most of which the new adapter would then miss."""
    folders = [GOLDEN / "llama--lora"] * 3
    rows = combine(folders, tmp_path / "out", [0.7, -1.0, 0.3], way)
    for row in rows:
        assert row["|dW|"] == row["relative"] == 0
        assert way == "linear" or row["error"] < 1e-6
    rows = combine(folders, tmp_path / "more", [0.7, -1.0, 0.3 + 1e-9], way)
    for row in rows:
        assert 0 < row["|dW|"] < 1e-8  # what does not cancel wholly is not lost


def test_combine_refuses_an_embedding_of_another_base(tmp_path: Path) -> None:
    fields, tensors = read_adapter(GOLDEN / "gpt2--lora_wte")
    key = f"{PREFIX}transformer.wte.base_layer.weight"
    folders = []
    for value in (1, 2):
        folders.append(tmp_path / str(value))
        tensors[key] = np.full((3, 3), value, np.float32)
        write_adapter(folders[-1], fields, tensors)
    with pytest.raises(FormatError, match=r"wte\.base_layer\.weight differs from another"):
        combine(folders, tmp_path / "out")


def test_combine_refuses_dora_beside_another_adapter(tmp_path: Path) -> None:
    folders = [GOLDEN / "gpt2--dora_proj", GOLDEN / "gpt2--lora"]
    message = "gpt2--dora_proj': DoRA's scales cannot be added to another adapter"
    with pytest.raises(ConfigError, match=message):
        combine(folders, tmp_path / "out")


# ---- in a model ----------------------------------------------------------------------------------


def lora(*targets: str, **fields: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets), init_lora_weights=False, **fields)


PATTERNS: dict[str, Any] = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}
PATTERNS |= {"alpha_pattern": {"v_proj": 7}, "exclude_modules": ["up_proj"]}
CONFIGS = {
    "one": lora("q_proj", "up_proj", r=3, lora_alpha=2),
    "two": lora("q_proj", "v_proj", "up_proj", r=3, lora_alpha=5, use_rslora=True, **PATTERNS),
    "ends": lora("embed_tokens", "lm_head", "q_proj", r=2),
}


def several(dtype: str = "float64", device: Any = "cpu", **more: LoraConfig) -> PeftModel:
    base = small.base(dtype, device, tie_word_embeddings=False)
    model = get_peft_model(base, CONFIGS["one"], "one")
    for seed, (name, config) in enumerate({**CONFIGS, **more}.items()):
        if name != "one":
            model.add_adapter(name, config, seed)
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["cat", "svd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_add_weighted_adapter_gives_what_all_the_adapters_give(way: str, dtype: str) -> None:
    model = several(dtype)
    weights = {"two": -1.5, "one": 0.5, "ends": 2.0}
    before = small.bits(model)
    r = 8 if way == "svd" else None
    rows = model.add_weighted_adapter([*weights], [*weights.values()], "sum", way, svd_rank=r)
    after = small.bits(model)
    assert {name: after[name] for name in after if ".sum" not in name} == before
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    model.set_adapter("sum")
    got = small.logits(model)
    for layer in model._wrappers().values():
        for name, weight in weights.items():
            if name in layer.entries:
                layer.entries[name].scaling *= weight
    model.set_adapter(list(weights))
    assert near(got, small.logits(model), 1e-4 if dtype == "float32" else 1e-12)
    assert max(row["relative"] for row in rows) < (1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("pair", [PAIRS[0], ("llama--lora", "llama--patterns")], ids="+".join)
@pytest.mark.parametrize("way", ["cat", "svd", *PRUNED])
def test_add_weighted_adapter_has_the_bits_of_combine(
    pair: tuple[str, str], way: str, tmp_path: Path
) -> None:
    folders = [GOLDEN / name for name in pair]
    weights = [0.3, -2.0]
    options: dict[str, Any] = {"density": 0.5} if way in PRUNED else {}
    if way in RANDOM:
        options["seed"] = 7
    expected = combine(folders, tmp_path / "files", weights, way, **options)
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(of(pair[0])), folders[0], "one")
    model.load_adapter(folders[1], "two")
    rows = model.add_weighted_adapter(["one", "two"], weights, "sum", way, **options)
    assert sorted(rows, key=lambda row: row["layer"]) == expected
    model.save_pretrained(tmp_path, ["sum"])
    of_files, theirs = read_adapter(tmp_path / "files")
    of_model, ours = read_adapter(tmp_path / "sum")
    assert set(ours) == set(theirs)
    for key, array in ours.items():
        assert array.tobytes() == theirs[key].tobytes()
    differing = {key for key in of_files if of_files[key] != of_model[key]}
    assert differing <= {"base_model_name_or_path", "task_type"}


def test_add_weighted_adapter_is_the_same_on_another_backend() -> None:
    results = []
    for device in ("cpu", STRICT):
        model = several("float32", device)
        model.add_weighted_adapter(["one", "ends"], [1.0, 0.5], "sum")
        results.append(small.bits(model))
    assert results[0] == results[1]


MORE = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "ada": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"]),
    "hydra": HydraConfig(r=2, experts=2, target_modules=["q_proj"]),
    "biased": LoraConfig(r=2, bias="all", target_modules=["q_proj"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"o_proj": [1]}),
}
WRONG: list[tuple[str, type[MiniloraError], tuple[Any, ...]]] = []


def wrong(message: str, *arguments: Any, kind: type[MiniloraError] = ConfigError) -> None:
    WRONG.append((message, kind, arguments))


wrong("'dora' is DoRA's", ["one", "dora"], [1, 1], "sum")
wrong("'ada' is of ADALORA", ["one", "ada"], [1, 1], "sum")
wrong("'hydra' is of HYDRALORA", ["hydra", "one"], [1, 1], "sum")
wrong("'biased' trains biases", ["biased", "one"], [1, 1], "sum")
wrong("'saved' replaces modules or tokens", ["saved", "one"], [1, 1], "sum")
wrong("'tokens' replaces modules or tokens", ["tokens", "one"], [1, 1], "sum")
wrong("no adapter 'nobody'", ["one", "nobody"], [1, 1], "sum")
wrong("a list of one or more", [], [], "sum")
wrong("a list of one or more, got 'one'", "one", [1], "sum")
wrong(r"no adapter \['two'\]", ["one", ["two"]], [1, 1], "sum")
wrong("None cannot name an adapter", ["one", "two"], [1, 1], None)
wrong("weights: expected 2 finite numbers.*got 1$", ["one", "two"], 1, "sum")
wrong("weights: expected 2 finite numbers", ["one", "two"], [1], "sum")
wrong("weights: expected 2 finite numbers", ["one", "two"], [1, "x"], "sum")
wrong("weights: expected 2 finite numbers", ["one", "two"], [1, math.inf], "sum")
wrong("an adapter 'two' exists already", ["one", "two"], [1, 1], "two")
wrong("cannot name an adapter", ["one", "two"], [1, 1], "one.two")
wrong("no combination type 'mean'", ["one", "two"], [1, 1], "sum", "mean")
wrong("a rank is for svd", ["one", "two"], [1, 1], "sum", "cat", 4)
wrong("ties needs density", ["one", "two"], [1, 1], "sum", "ties")
OPTIONS = None, None, True, None  # svd_rank and the other arguments before density
wrong("ties adds up two or more .* got 1", ["one"], [1], "sum", "ties", *OPTIONS, 0.5)
wrong(r"density must be .* in \(0, 1\]", ["one", "two"], [1, 1], "sum", "ties", *OPTIONS, 0.0)
wrong("density is for ties", ["one", "two"], [1, 1], "sum", "svd", *OPTIONS, 0.5)
wrong("'total' or 'frequency'", ["one", "two"], [1, 1], "sum", "ties", *OPTIONS, 0.5, "most")
wrong(r"svd_clamp must be a number in \(0, 1\]", ["one", "two"], [1, 1], "sum", "svd", 2, 1.5)
wrong("svd_clamp is for svd, .* not for cat", ["one", "two"], [1, 1], "sum", "cat", None, 0.9)
wrong("svd_clamp 0.1: this quantile", ["one", "two"], [1, 1], "sum", "svd", 2, 0.1)
wrong("svd got 0", ["one", "two"], [1, 1], "sum", "svd", 0)
wrong("linear adds factors of one rank", ["one", "two"], [1, 1], "sum", "linear")
LARGE = "q_proj: the sum of its adapters is too large"
wrong(LARGE, ["one", "two"], [1e300, 1e300], "sum", kind=NonFiniteError)


@pytest.mark.parametrize(("message", "kind", "arguments"), WRONG)
def test_add_weighted_adapter_refuses_what_it_cannot_add_and_changes_nothing(
    message: str, kind: type[MiniloraError], arguments: tuple[Any, ...]
) -> None:
    model = several("float32", **MORE)
    before = small.bits(model)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(kind, match=message):
        model.add_weighted_adapter(*arguments)
    assert small.bits(model) == before
    assert [name for name, _ in model.named_modules()] == modules
    assert "sum" not in model.peft_config


def test_add_weighted_adapter_refuses_an_embedding_that_a_head_follows() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(small.base(tie_word_embeddings=True), config)
    with pytest.raises(ConfigError, match="the head that is tied"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# ---- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_combine_layer_forms_no_matrix_as_large_as_dW(way: str) -> None:
    """60,000 x 60,000 would be 29 GB."""
    n = 60_000
    ones = Part(np.ones((2, n)), np.ones((n, 2)), 1.0)
    corner = Part(np.eye(1, n), np.eye(n, 1), -1.0)
    _, _, row = combine_layer("q", [ones, corner], way, 3)
    assert row["|dW|"] == pytest.approx(math.sqrt(n**2 * 4 - 2 * 2 + 1), rel=1e-12)
    assert row["relative"] < 1e-6


@pytest.mark.parametrize("way", FACTORWISE)
@pytest.mark.parametrize("x", [1e160, 1e200, 1e308])
def test_combine_layer_refuses_a_sum_beyond_float64_before_it_is_decomposed(
    way: str, x: float
) -> None:
    """Its factors are finite. LAPACK's decomposition of the infinite core may never end."""
    A = np.full((2, 5), x)
    B = np.full((4, 2), x)
    with pytest.raises(NonFiniteError, match="q: the sum of its adapters is too large for float64"):
        combine_layer("q", [Part(A, B, 1.0), Part(A, -B, 1.0)], way, 4, np.float64)


@pytest.mark.parametrize("way", FACTORWISE)
def test_combine_layer_adds_nothing_for_an_empty_rank(way: str) -> None:
    """AdaLoRA may have cut all of a layer's triplets."""
    empty = Part(np.zeros((0, 3)), np.zeros((2, 0)), 1.0)
    A, B, row = combine_layer("q", [empty], way, 1)
    assert A.shape == (1, 3)
    assert B.shape == (2, 1)
    assert row["|dW|"] == row["error"] == 0.0
