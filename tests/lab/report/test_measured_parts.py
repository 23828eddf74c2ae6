"""The numbers of a report against other computations of them, over dense weights."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import ADAPTERS, ALSO, CONTEXT, TEXT, make_adapted, make_base, measured

from minilora import CausalLM
from minilora.lab.report import intruders as module
from minilora.lab.report.altering import Altered, altered
from minilora.lab.report.intruders import choose_places, count_intruders, scale_intruders
from minilora.lab.report.layers import choose_ranks, draw_map, examine_layers, place_of
from minilora.lab.report.measuring import choose_windows
from minilora.lab.report.ranks import draw_rank_curve
from minilora.lab.report.subject import Subject
from minilora.lora.embedding import LoraEmbedding
from minilora.lora.factors import effective_rank
from minilora.lora.tokens import TrainableTokens
from minilora.training.loop import evaluate

DENSE = [kind for kind in ADAPTERS if kind not in ("hydra", "biases")]
LINEAR = ["lora", "dora", "map hira", "map ia3", "nf4 base", "gpt2"]


def weights_of(model: CausalLM) -> dict[str, np.ndarray]:
    """The weights of all modules with one, in float64, by path."""
    weights = {}
    for path, one in model.named_modules():
        if hasattr(one, "dense_weight"):
            weights[path] = one.dense_weight().astype(np.float64)
        elif "weight" in vars(one):
            weights[path] = one.weight.numpy().astype(np.float64)
    return weights


def with_weights(kind: str, changes: dict[str, np.ndarray]) -> CausalLM:
    """The base of this kind with dW added to its weights, its codes decoded."""
    model = make_base(kind)
    if kind.endswith(" base"):
        from minilora.quant.linear import dequantize

        model = dequantize(model)
    for path, one in model.named_modules():
        if path in changes:
            W = one.weight.numpy().astype(np.float64)
            one.weight.data = (W + changes[path]).astype(np.float32)
    return model.eval()


def bits(model: Any, tokens: np.ndarray = TEXT) -> float:
    return measured().bits(evaluate(model, tokens, CONTEXT, threads=1))


@pytest.mark.parametrize("kind", DENSE)
def test_subject_changes_are_what_merging_adds(kind):
    subject = Subject(make_adapted(kind))
    changes = subject.changes()
    before = weights_of(make_base(kind))
    merged = weights_of(make_adapted(kind).merge_and_unload(tied="untie"))
    assert changes
    for path, form in changes.items():
        expected = merged[path] - before[path]
        wrapper = subject.wrappers[path]
        if isinstance(wrapper, LoraEmbedding):  # whose adapter reads one-hot vectors
            expected = expected.T
        elif isinstance(wrapper, TrainableTokens):
            expected = expected[wrapper.entries["default"].indices]
        scale = np.abs(merged[path]).max()
        np.testing.assert_allclose(form().dense(), expected, atol=2e-7 * scale, rtol=0)


@pytest.mark.parametrize("kind", DENSE)
def test_examine_layers_has_norms_and_ranks_of_dense_matrices(kind):
    subject = Subject(make_adapted(kind))
    layers = examine_layers(subject)
    changes = subject.changes()
    assert layers.keys() == changes.keys()
    for path, layer in layers.items():
        change = changes[path]()
        dW = change.dense()
        assert layer.relative == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(change.W))
        if dW.ndim == 1:
            assert layer.values is None
            continue
        values = np.linalg.svd(dW, compute_uv=False)
        count = len(layer.values)
        np.testing.assert_allclose(layer.values, values[:count], rtol=1e-9, atol=1e-12)
        assert values[count:].max(initial=0) < 1e-12 * max(values[0], 1e-3)
        assert effective_rank(layer.values) == pytest.approx(effective_rank(values))
        before = np.linalg.svd(change.W, compute_uv=False)
        np.testing.assert_allclose(layer.weight, before[: len(layer.weight)])


def test_examine_layers_of_large_weights_decomposes_what_has_factors_alone():
    low = examine_layers(Subject(make_adapted("lora")), work=0)
    whole = examine_layers(Subject(make_adapted("lora")))
    for path, layer in low.items():
        assert layer.likeness is None
        np.testing.assert_allclose(layer.values, whole[path].values)
        np.testing.assert_allclose(layer.weight, whole[path].weight)
    for path, layer in examine_layers(Subject(make_adapted("dora")), work=0).items():
        assert layer.values is None
        assert layer.relative == pytest.approx(
            examine_layers(Subject(make_adapted("dora")))[path].relative
        )
    with pytest.raises(module.ConfigError, match="too large together"):
        count_intruders(low)


@pytest.mark.parametrize("kind", ["lora", "dora", "map loha", "saved"])
def test_examine_layers_keeps_little_in_memory(kind):
    """No array keeps a larger one alive, and all together are smaller than two of the weights."""
    subject = Subject(make_adapted(kind))
    total = 0
    for layer in examine_layers(subject).values():
        for factors in (layer.update, layer.leading):
            for array in factors or ():
                assert array.base is None
                total += array.nbytes
    weights = sum(p.size for p in subject.adapted.parameters()) * 4
    assert total < 3 * weights  # of matrices with 16 columns the ten leading ones are most


def test_choose_ranks_has_both_ends_and_rises():
    for largest in range(400):
        ranks = choose_ranks(largest)
        assert ranks[0] == 0
        assert ranks[-1] == largest
        assert len(ranks) == min(8, largest + 1)
        assert ranks == sorted(set(ranks))
        assert ranks[-2:][0] <= choose_ranks(largest + 1)[-2:][0]


@pytest.mark.parametrize("kind", LINEAR)
def test_draw_rank_curve_is_the_loss_of_dense_weights_cut_to_a_rank(kind):
    subject = Subject(make_adapted(kind))
    layers = examine_layers(subject)
    curve = draw_rank_curve(subject, layers, measured(), threads=1)
    parts = {
        path: np.linalg.svd(form().dense(), full_matrices=False)
        for path, form in subject.changes().items()
    }
    energy = {path: np.square(values) for path, (_, values, _) in parts.items()}
    whole = sum(squares.sum() for squares in energy.values())
    for place, rank in enumerate(curve.ranks):
        cut = {path: (U[:, :rank] * s[:rank]) @ V[:rank] for path, (U, s, V) in parts.items()}
        model = with_weights(kind, cut)
        if kind == "map ia3" and rank:
            for path, layer in make_adapted(kind).merge_and_unload().named_modules():
                if path in cut:
                    dict(model.named_modules())[path].bias = layer.bias
        assert curve.losses[place] == pytest.approx(bits(model), rel=3e-6)
        left = sum(squares[:rank].sum() for squares in energy.values()) / whole
        assert curve.energies[place] == pytest.approx(left)


@pytest.mark.parametrize("kind", ["lora", "dora", "gpt2"])
def test_count_and_scale_intruders_agree_with_dense_decompositions(kind):
    subject = Subject(make_adapted(kind))
    layers = examine_layers(subject)
    counted = count_intruders(layers)
    cosines = {}
    after = {}
    for path, form in subject.changes().items():
        change = form()
        before = np.linalg.svd(change.W, full_matrices=False)[0]
        after[path] = np.linalg.svd(change.W + change.dense(), full_matrices=False)
        cosines[path] = np.abs(before.T @ after[path][0][:, :10]).max(axis=0)
    every = np.concatenate(list(cosines.values()))
    assert counted.examined == len(every)
    assert counted.counts == [int((every < limit).sum()) for limit in counted.limits]
    scalings = scale_intruders(subject, layers, measured(), measured(ALSO), threads=1)
    assert [one.name for one in scalings] == [module.INTRUDERS, module.OTHERS, module.WHOLE]
    for one in scalings:
        for place, factor in enumerate(one.factors):
            changes = {}
            for path, form in subject.changes().items():
                change = form()
                U, s, V = after[path]
                chosen = np.flatnonzero(cosines[path] < counted.limit)
                if one.name == module.OTHERS:
                    rest = np.flatnonzero(cosines[path] >= counted.limit)
                    chosen = rest[: len(chosen)]
                values = s.copy()
                values[chosen] *= factor
                changed = (U * values) @ V - change.W
                changes[path] = factor * change.dense() if one.name == module.WHOLE else changed
            model = with_weights(kind, changes)
            assert one.new[place] == pytest.approx(bits(model), rel=3e-6)
            assert one.old[place] == pytest.approx(bits(model, ALSO), rel=3e-6)


def test_choose_places_takes_as_many_others_as_intruders():
    layers = examine_layers(Subject(make_adapted("lora")))
    intruders, others = choose_places(layers)
    assert intruders
    for path, places in intruders.items():
        assert not set(places) & set(others.get(path, []))
        rest = len(layers[path].likeness) - len(places)
        assert len(others.get(path, [])) == min(len(places), rest)


@pytest.mark.parametrize("kind", ["lora", "dora", "hydra", "ends", "map ia3", "nf4 base"])
def test_altered_by_one_is_the_adapter_and_by_zero_the_base_to_the_bit(kind):
    model = make_adapted(kind)
    subject = Subject(model)
    ids = TEXT[None, :CONTEXT]
    whole = model(ids).numpy()
    with model.disable_adapter():
        base = model(ids).numpy()
    wrappers = subject.wrappers
    before = {path: wrapper.entries["default"] for path, wrapper in wrappers.items()}
    for share, wanted in ((1.0, whole), (0.0, base)):
        entries = {path: Altered(wrappers[path], entry, share) for path, entry in before.items()}
        with altered(subject, entries):
            assert (model(ids).numpy() == wanted).all()
    with contextlib.suppress(ZeroDivisionError), altered(subject, entries):
        raise ZeroDivisionError
    assert all(wrappers[path].entries["default"] is entry for path, entry in before.items())
    assert (model(ids).numpy() == whole).all()


def test_choose_windows_takes_fewer_of_a_large_model():
    assert choose_windows(123_200, 14, 48) == 32
    assert choose_windows(124_439_808, 48, 256) == 6
    assert choose_windows(7 * 10**9, 224, 256) == 4


# ---- maps ----------------------------------------------------------------------------------------


def test_place_of_a_layer_is_its_kind_and_its_block():
    assert place_of("model.layers.3.self_attn.q_proj") == ("self_attn.q_proj", "3")
    assert place_of("transformer.h.11.mlp.c_proj") == ("mlp.c_proj", "11")
    assert place_of("lm_head") == ("lm_head", "outside")
    assert place_of("0") == ("0", "outside")


def test_draw_map_tells_layers_with_one_last_name_apart():
    names = ["h.0.attn.c_proj", "h.10.mlp.c_proj", "h.2.attn.c_attn", "lm_head"]
    drawn = draw_map("t", "e", dict(zip(names, [1.0, 2.0, float("nan"), 4.0], strict=True)))
    assert drawn.kinds == ["attn.c_proj", "mlp.c_proj", "c_attn", "lm_head"]
    assert drawn.blocks == ["0", "2", "10", "outside"]
    assert drawn.values == [
        [1.0, None, None, None],
        [None, None, 2.0, None],
        [None, None, None, None],
        [None, None, None, 4.0],
    ]


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["a.x", "b.x", "b.y"]), st.integers(0, 20)),
        st.floats(-9, 9),
        min_size=1,
    )
)
def test_draw_map_has_every_number_once(numbers):
    paths = {f"m.{block}.{kind}": value for (kind, block), value in numbers.items()}
    drawn = draw_map("t", "e", paths)
    shown = [value for row in drawn.values for value in row if value is not None]
    assert sorted(shown) == sorted(paths.values())
    assert drawn.blocks == sorted(drawn.blocks, key=int)
