"""The list over somebody's own files, and the command that prints it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_verify import BY_NAME, LORAS
from test_verify_mistakes import SABOTAGES

import minilora.verify.run
from minilora.cli import main
from minilora.errors import FormatError
from minilora.formats import load_file, save_file
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM, TransformerConfig
from minilora.verify import verify_files
from minilora.verify.run import rounded


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


# ---- somebody's own files ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shape = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    base = CausalLM(
        TransformerConfig(
            **shape, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4
        )
    )
    base.save_pretrained(folder / "base")
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_files_are_measured_layer_by_layer_and_left_alone(files: Path) -> None:
    before = contents(files)
    report = verify_files(files / "base", files / "adapter")
    assert contents(files) == before
    assert all(row.ok for row in report.rows)
    assert {row.property for row in report.rows} == {"finite", "merge as stored", *LORAS} - {
        "sum",
        "cross terms",
    }
    assert {row.cases for row in report.rows if row.property not in ("finite", "rank")} == {4}
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(files / "base"), files / "adapter")
    found = {f.layer: f for f in report.layers}
    paths = [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert list(found) == paths
    for path, layer in ((p, m) for p, m in model.get_base_model().named_modules() if p in paths):
        f, delta = found[path], layer.delta_weight("default")
        share = np.linalg.svd(delta, compute_uv=False)[:3] ** 2 / np.linalg.norm(delta) ** 2
        assert (f.shape, f.r, f.scaling, f.dtype, f.finite) == (
            f"8 x {layer.base_layer.in_features}",
            3,
            2.0,
            "F32",
            True,
        )
        assert math.isclose(f.dW, np.linalg.norm(delta), rel_tol=1e-13)
        assert math.isclose(
            f.W, np.linalg.norm(layer.base_layer.weight.data.astype(float)), rel_tol=1e-13
        )
        assert math.isclose(f.rank, np.exp(-(share * np.log(share)).sum()), rel_tol=1e-12)
        merged = (layer.base_layer.weight.data + delta).astype(np.float32)
        lost = np.linalg.norm(merged - (layer.base_layer.weight.data + delta)) / np.linalg.norm(
            delta
        )
        assert math.isclose(f.lost, lost, rel_tol=1e-12)
        assert 0.5 < f.error <= 1


@pytest.mark.parametrize(
    ("dtype", "least"), [("F64", 0.0), ("F32", 1e-9), ("F16", 1e-5), ("BF16", 1e-4)]
)
def test_the_stored_dtype_is_seen_and_rounded_to_once(
    dtype: str, least: float, files: Path, tmp_path: Path
) -> None:
    from minilora.formats import Entry, bf16_from, write_stream

    stored = {"F64": lambda a: a.astype("f8"), "F16": lambda a: a.astype("f2"), "BF16": bf16_from}
    cast = stored.get(dtype, np.asarray)
    tensors = {name: cast(a) for name, a in load_file(files / "base" / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((files / "base" / "config.json").read_bytes())
    entries = [Entry(name, dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]
    write_stream(tmp_path / "model.safetensors", entries)
    report = verify_files(tmp_path, files / "adapter")
    assert all(row.ok for row in report.rows)
    assert all(
        f.dtype == dtype and f.error <= 1 and least <= f.lost < 1000 * least + 1e-15
        for f in report.layers
    )


@given(
    st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-4),
    st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
def test_rounding_once_is_within_half_an_ulp(value: float, dtype: str) -> None:
    value = math.fmod(value, 60000) if dtype == "F16" else value
    near, half = rounded(np.array([value]), dtype)
    assert abs(near[0] - value) <= half[0]
    bits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[dtype]
    if abs(near[0]) > 1e-4:
        assert half[0] == 2.0 ** (math.frexp(near[0])[1] - bits - 1)


def test_a_wrong_rounding_would_be_seen(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    def truncating(total: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        near, half = rounded(total, dtype)
        return near + 2 * half * (abs(near) < abs(total)), half

    monkeypatch.setattr(minilora.verify.run, "rounded", truncating)
    row = {r.property: r for r in verify_files(files / "base", files / "adapter").rows}[
        "merge as stored"
    ]
    assert not row.ok
    assert 1 < row.measured <= 3  # half an ulp, and one more


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
A, B = FIRST.format("A"), FIRST.format("B")
Tensors = dict[str, np.ndarray]
BROKEN: dict[
    str, tuple[Callable[[Tensors], Tensors], str | None]
] = {  # how, and what FormatError says, if it is one
    "a NaN": (lambda t: t | {B: np.where(np.arange(3) == 1, np.float32(np.nan), t[B])}, None),
    "an inf": (lambda t: t | {A: np.where(np.arange(8) == 1, np.float32(np.inf), t[A])}, None),
    "dW overflows": (
        lambda t: t | {A: t[A] / abs(t[A]).max() * np.float32(3e38), B: t[B] * np.float32(1e3)},
        None,
    ),
    "lora_A is zero": (lambda t: t | {A: 0 * t[A]}, None),
    "another rank": (lambda t: t | {A: t[A][:2]}, "(2, 8), the base needs (3, 8)"),
    "a missing key": (lambda t: {k: v for k, v in t.items() if k != B}, "missing"),
    "an unknown key": (lambda t: t | {"stranger": t[A]}, "unknown stranger"),
    "a swapped pair": (lambda t: t | {A: t[B], B: t[A]}, "the base needs"),
    "a transposed factor": (lambda t: t | {A: t[A].T}, "the base needs"),
}


def broken(files: Path, where: Path, how: str) -> Path:
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    (where / "adapter_config.json").write_bytes(
        (files / "adapter" / "adapter_config.json").read_bytes()
    )
    save_file(where / "adapter_model.safetensors", BROKEN[how][0](tensors))
    return where


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_caught(how: str, files: Path, tmp_path: Path) -> None:
    adapter, message = broken(files, tmp_path, how), BROKEN[how][1]
    before = contents(tmp_path)
    if message:
        with pytest.raises(FormatError) as caught:
            verify_files(files / "base", adapter)
        assert message in str(caught.value)
    else:
        failing = [row for row in verify_files(files / "base", adapter).rows if not row.ok]
        assert failing
        assert all("layers.0.self_attn.q_proj" in row.where for row in failing)
    assert contents(tmp_path) == before


# ---- the command ----


def command(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["verify", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_a_table() -> None:
    code, out, err = command("--cases", "3", "--seed", "5")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == [
        "property",
        "equation",
        "measured",
        "bound",
        "ratio",
        "ok",
        "source",
    ]
    for name, p in BY_NAME.items():
        assert any(
            re.search(rf"^{re.escape(name)} .* True +{re.escape(p.source)}$", line)
            for line in lines
        ), name
    assert lines[-1].startswith("worst measured / bound: ")
    assert command("--cases", "3", "--seed", "5")[1] == out
    assert command("--cases", "3", "--seed", "6")[1] != out


def test_the_command_reads_files(files: Path) -> None:
    code, out, err = command("--base", files / "base", "--adapter", files / "adapter")
    assert (code, err) == (0, "")
    assert "merge as stored" in out
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +8 x 12 +3 +2 ", out, re.MULTILINE)
    code, out, _ = command("--base", files / "base", "--adapter", files / "adapter", "--json")
    report = json.loads(out)
    assert (code, report["ok"], len(report["layers"])) == (0, True, 4)
    assert {row["property"] for row in report["rows"]} == {"finite", "merge as stored", *LORAS} - {
        "sum",
        "cross terms",
    }
    assert 0.5 < report["worst_ratio"] <= 1


@pytest.mark.parametrize("how", ["a NaN", "dW overflows"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_fails_with_one_line(
    how: str, options: tuple[str, ...], files: Path, tmp_path: Path
) -> None:
    code, out, err = command(
        "--base", files / "base", "--adapter", broken(files, tmp_path, how), *options
    )
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("minilora: error: property '")
    assert "model.layers.0.self_attn.q_proj" in err
    if options:

        def strict(constant: str) -> None:
            raise AssertionError(constant)

        assert json.loads(out, parse_constant=strict)["ok"] is False
    else:
        assert re.search(r" False +\w", out)


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        (["--base", "somewhere"], 2, "neither"),
        (["--adapter", "somewhere"], 2, "neither"),
        (["--cases", "0"], 2, "--cases"),
        (["--seed", "-1"], 2, "--seed"),
        (["--base", "nowhere", "--adapter", "nowhere"], 4, "nowhere"),
        (["--base", "", "--adapter", "x"], 2, "--base"),
    ],
)
def test_a_mistake_on_the_command_line(argv: list[str], code: int, named: str) -> None:
    got, out, err = command(*argv)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_a_failing_property_is_shown_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    SABOTAGES["unmerging_subtracts"][1](monkeypatch)
    code, out, err = command("--cases", "5")
    assert code == 1
    assert err.startswith(
        "minilora: error: property 'unmerge' fails: W comes back, every bit: measured "
    )
    assert [line.split()[0] for line in out.splitlines() if " False " in line] == ["unmerge"]


def test_help_fits_a_screen_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("example: minilora verify --base") for line in lines)
