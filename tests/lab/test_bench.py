"""Bases and fits: made once, stored, and the same wherever they are made."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.lab import bench as bench_module
from minilora.lab import protocol
from minilora.lab.bench import Bench, interpolate, linear_names, shuffle_linear
from minilora.lab.protocol import Arm, Plan, full, lora
from minilora.lora import LoraConfig, PeftModel, get_multitask_model

ARMS = [
    lora(2),
    full(),
    full(method="full"),
    Arm("DoRA", "dora", {"r": 2, "target_modules": "all-linear"}),
    lora(2, quantize="nf4"),
    lora(2, "loftq", quantize="nf4", fields={"init_lora_weights": "loftq"}),
    *(lora(2, start, fields={"init_lora_weights": start}) for start in ("pissa", "eva", "lora_ga")),
    Arm("P", "intrinsic", {"theta_d_length": 100, "target_modules": "all-linear"}),
]


def test_make_base_is_made_once(bench, monkeypatch):
    folder = bench.make_base("micro")
    monkeypatch.setattr(bench_module, "_train", None)  # would fail
    assert bench.make_base("micro") == folder


def test_make_base_goes_on_after_a_kill(tmp_path):
    bench = Bench(tmp_path, Plan(quick=True))
    bench.base_folder("micro").mkdir(parents=True)  # a killed run leaves it empty
    assert not bench.has_base("micro")
    bench.make_base("micro")
    assert bench.has_base("micro")


def test_base_folder_depends_on_configuration_and_text(bench, monkeypatch):
    names = {bench.base_folder(name) for name in protocol.BASES}
    assert len(names) == len(protocol.BASES)
    before = bench.base_folder("micro")
    monkeypatch.setattr(bench_module, "texts_checksum", lambda: "another Python's")
    assert bench.base_folder("micro") != before


def test_base_gives_a_copy_each_time(bench):
    one, other = bench.base("micro"), bench.base("micro")
    for p in one.parameters():
        p.data[...] = 0
    assert all(np.abs(p.numpy()).sum() > 0 for p in other.parameters())
    weights = bench.base_weights("micro")
    assert all((p.numpy() == weights[name]).all() for name, p in other.named_parameters())


def test_base_shuffled_has_the_same_numbers_in_another_order(bench):
    before, after = bench.base_weights("micro"), bench.base_weights("shuffled micro")
    for name, W in before.items():
        is_linear = name in linear_names(before)
        assert (after[name] != W).any() == is_linear
        assert after[name].shape == W.shape
        assert (np.sort(after[name], axis=None) == np.sort(W, axis=None)).all()
    again = shuffle_linear(before)
    assert all((again[name] == W).all() for name, W in after.items())
    assert not bench.base_folder("shuffled micro").exists()
    assert bench.base_folder("shuffled micro") != bench.base_folder("micro")


def test_start_batches_depend_on_the_seed_and_hold_the_arm_s_text(bench):
    one, again, other = (bench.start_batches(ARMS[0], seed) for seed in (0, 0, 1))
    assert [batch.shape for batch in one] == [(8, 49)] * 8
    assert (np.stack(one) == np.stack(again)).all()
    assert (np.stack(one) != np.stack(other)).any()
    text = protocol.training_ids("code").astype(np.uint8).tobytes()
    assert one[0][3].astype(np.uint8).tobytes() in text


@pytest.mark.parametrize("arm", ARMS, ids=[f"{a.name} {a.quantize} {a.method}" for a in ARMS])
def test_fit_is_stored_with_its_weights(bench, arm):
    figures = bench.fit(arm, 4e-3, 0)
    model = bench.trained(arm, 4e-3, 0)
    assert bench.bits(model) == pytest.approx(figures["report"], rel=1e-5)
    assert bench.bits(model, "prose") == pytest.approx(figures["prose"], rel=1e-5)
    assert figures["report"] < figures["before"]
    assert [step for step, *_ in figures["curve"]] == [0, 3]
    changes = bench.changes(arm, 4e-3, 0)
    assert all(np.abs(dW).max() > 0 for _, dW in changes.values())


def test_fit_again_reads_the_same_figures(bench, monkeypatch):
    figures = bench.fit(ARMS[0], 4e-3, 0)
    monkeypatch.setattr(bench_module, "_train", None)  # would fail
    assert bench.fit(ARMS[0], 4e-3, 0) == figures
    assert bench.fit(lora(2, "another name", rates=(1.0,)), 4e-3, 0) == figures


def test_fit_elsewhere_has_the_same_bytes(bench, tmp_path):
    other = Bench(tmp_path, Plan(quick=True))
    bench.fit(ARMS[0], 4e-3, 0), other.fit(ARMS[0], 4e-3, 0)
    (made,) = (tmp_path / "fits").glob("*.json")
    for suffix in (".json", ".safetensors"):
        name = made.with_suffix(suffix).name
        assert (bench.folder / "fits" / name).read_bytes() == made.with_suffix(suffix).read_bytes()


def test_fit_of_another_arm_rate_or_seed_is_another(bench):
    places = {
        bench._place(arm, lr, seed)
        for arm in [*ARMS, lora(2, settings={"steps": 7}), lora(2, task="c"), lora(2, base="mid")]
        for lr in (1e-3, 2e-3)
        for seed in (0, 1)
    }
    assert len(places) == (len(ARMS) + 3) * 4


def test_fit_that_diverges_has_no_figures(bench):
    figures = bench.fit(full(settings={"max_grad_norm": 1e9, "warmup": 0}), 1e30, 0)
    assert figures["report"] is figures["tune"] is figures["prose"] is None
    assert figures["before"] > 0


def test_fit_of_linear_layers_leaves_the_others_as_they_are(bench):
    before, after = bench.base_weights("micro"), bench.trained_weights(ARMS[1], 4e-3, 0)
    changed = {name for name, W in before.items() if (after[name] != W).any()}
    assert changed == set(linear_names(before))
    everything = bench.trained_weights(ARMS[2], 4e-3, 0)
    assert all((everything[name] != W).any() for name, W in before.items())


def test_fit_prints_nothing(bench, capfd):
    bench.fit(lora(3), 4e-3, 0)
    assert capfd.readouterr() == ("", "")


def test_prepare_gives_every_seed_a_start_of_its_own(bench):
    starts = []
    for seed in (0, 0, 1):
        model = bench.prepare(ARMS[0], seed)
        assert isinstance(model, PeftModel)
        starts.append([p.numpy() for n, p in model.named_parameters() if "lora_A" in n])
    assert all((a == b).all() for a, b in zip(starts[0], starts[1], strict=True))
    assert all((a != b).any() for a, b in zip(starts[0], starts[2], strict=True))


def test_prepare_with_loftq_begins_nearer_to_the_base_than_its_codes_are(bench):
    ids = bench.held_out("code")["report"][None, :48]
    base = bench.base("micro")(ids).numpy()
    coded, loftq = (bench.prepare(arm, 0).eval()(ids).numpy() for arm in ARMS[4:6])
    assert 0 < np.abs(loftq - base).mean() < np.abs(coded - base).mean()


def test_fit_tasks_trains_the_adapters_of_every_task(bench):
    texts = ("json", "c", "python")  # one more than a quick plan has sequences in a batch
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_multitask_model(bench.base("micro"), dict.fromkeys(texts, config), seed=0)
    before = [bench.bits(bench.base("micro"), "report", task) for task in texts]
    measured = bench.fit_tasks(model, lora(2), 4e-3, 0)
    assert list(measured) == ["tune", "report"]
    assert all(np.array(measured["report"]) < before)
    moved = {
        n.split(".")[-2] for n, p in model.named_parameters() if "lora_B" in n and p.numpy().any()
    }
    assert moved == set(texts)
    with model.task("c"):
        assert bench.bits(model, "tune", "c") == measured["tune"][1]


def test_interpolate_ends_at_both_ends():
    before, after = {"W": np.array([1.0, 2.0])}, {"W": np.array([3.0, 1.0])}
    assert interpolate(before, after, 0.0)["W"].tolist() == [1.0, 2.0]
    assert interpolate(before, after, 1.0)["W"].tolist() == [3.0, 1.0]
    assert interpolate(before, after, 0.5)["W"].tolist() == [2.0, 1.5]
