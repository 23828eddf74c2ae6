"""`verify_files`, and the command that prints the properties."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
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
from minilora.formats import Entry, bf16_from, load_file, save_file, write_stream
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM, TransformerConfig
from minilora.verify import Case, Measured, Property, verify_files
from minilora.verify.run import round_with_half_ulp

Array = np.ndarray
Tensors = dict[str, Array]
# One adapter per layer: sums of several do not apply.
NAMES = {"finite", "merge as stored", *LORAS} - {"sum", "cross terms", "elected sign"}
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
]

# ---- given files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    config = TransformerConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    base = CausalLM(config)
    base.save_pretrained(folder / "base")
    targets = ["q_proj", "down_proj"]
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    get_peft_model(base, adapter).save_pretrained(folder / "adapter")
    return folder


def read_contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            contents[path] = path.read_bytes(), path.stat().st_mtime_ns
    return contents


def test_verify_files_measures_each_layer_and_changes_no_file(files: Path) -> None:
    before = read_contents(files)
    report = verify_files(files / "base", files / "adapter")
    assert read_contents(files) == before
    assert {row.property for row in report.rows} == NAMES
    for row in report.rows:
        assert row.ok, row
        if row.property not in ("finite", "rank"):
            assert row.cases == 4, row


def test_verify_files_describes_each_layer(files: Path) -> None:
    report = verify_files(files / "base", files / "adapter")
    assert [finding.layer for finding in report.layers] == PATHS
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(files / "base"), files / "adapter")
    modules = dict(model.get_base_model().named_modules())
    for finding in report.layers:
        layer = modules[finding.layer]
        W = layer.base_layer.weight.data
        dW = layer.delta_weight("default")
        norm = np.linalg.norm(dW)
        share = np.linalg.svd(dW, compute_uv=False)[:3] ** 2 / norm**2
        rank = np.exp(-(share * np.log(share)).sum())
        lost = np.linalg.norm((W + dW).astype(np.float32) - (W + dW)) / norm
        assert finding.shape == f"8 x {layer.in_features}"
        assert finding.r == 3
        assert finding.scaling == 2.0
        assert finding.dtype == "F32"
        assert finding.finite is True
        assert math.isclose(finding.dW, norm, rel_tol=1e-13)
        assert math.isclose(finding.W, np.linalg.norm(W.astype(float)), rel_tol=1e-13)
        assert math.isclose(finding.rank, rank, rel_tol=1e-12)
        assert math.isclose(finding.lost, lost, rel_tol=1e-12)
        assert 0.5 < finding.error <= 1


@pytest.mark.parametrize(
    ("dtype", "least"), [("F64", 0.0), ("F32", 1e-9), ("F16", 1e-5), ("BF16", 1e-4)]
)
def test_verify_files_sees_the_stored_dtype_and_that_merging_rounds_to_it_once(
    dtype: str, least: float, files: Path, tmp_path: Path
) -> None:
    casts = {
        "F64": lambda a: a.astype("f8"),
        "F32": np.asarray,
        "F16": lambda a: a.astype("f2"),
        "BF16": bf16_from,
    }
    entries = []
    for name, a in load_file(files / "base" / "model.safetensors").items():
        stored = casts[dtype](a)
        entries.append(Entry(name, dtype, stored.shape, lambda stored=stored: stored))
    write_stream(tmp_path / "model.safetensors", entries)
    config = (files / "base" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    report = verify_files(tmp_path, files / "adapter")
    assert all(row.ok for row in report.rows)
    for finding in report.layers:
        assert finding.dtype == dtype
        assert finding.error <= 1
        assert least <= finding.lost < 1000 * least + 1e-15


@given(
    st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-4),
    st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
def test_round_with_half_ulp_is_within_half_an_ulp(value: float, dtype: str) -> None:
    if dtype == "F16":
        value = math.fmod(value, 60000)
    [near], [half_ulp] = round_with_half_ulp(np.array([value]), dtype)
    assert abs(near - value) <= half_ulp
    bits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[dtype]
    if abs(near) > 1e-4:
        _, exponent = math.frexp(near)
        assert half_ulp == 2.0 ** (exponent - bits - 1)


def test_verify_files_sees_a_wrong_rounding(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    def truncate(exact: Array, dtype: str) -> tuple[Array, Array]:
        near, half_ulp = round_with_half_ulp(exact, dtype)
        return near + 2 * half_ulp * (abs(near) < abs(exact)), half_ulp

    monkeypatch.setattr(minilora.verify.run, "round_with_half_ulp", truncate)
    report = verify_files(files / "base", files / "adapter")
    row = {row.property: row for row in report.rows}["merge as stored"]
    assert not row.ok
    assert 1 < row.measured <= 3  # half an ulp, and one more


# ---- broken adapters -----------------------------------------------------------------------------

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
A = FIRST.format("A")
B = FIRST.format("B")
Break = Callable[[Tensors], None]
BROKEN: dict[str, tuple[Break, str]] = {}  # a change in place, and what FormatError says, if raised


def breaks(name: str, message: str = "") -> Callable[[Break], Break]:
    def add(change: Break) -> Break:
        BROKEN[name] = change, message
        return change

    return add


@breaks("a NaN")
def write_nan(tensors: Tensors) -> None:
    tensors[B] = np.where(np.arange(3) == 1, np.float32(np.nan), tensors[B])


@breaks("an inf")
def write_inf(tensors: Tensors) -> None:
    tensors[A] = np.where(np.arange(8) == 1, np.float32(np.inf), tensors[A])


@breaks("dW overflows")
def overflow(tensors: Tensors) -> None:
    tensors[A] = tensors[A] / abs(tensors[A]).max() * np.float32(3e38)
    tensors[B] = tensors[B] * np.float32(1e3)


@breaks("lora_A is zero")
def zero_A(tensors: Tensors) -> None:
    tensors[A] = 0 * tensors[A]


@breaks("another rank", "(2, 8), the base needs (3, 8)")
def cut_rank(tensors: Tensors) -> None:
    tensors[A] = tensors[A][:2]


@breaks("a missing key", "missing")
def remove_key(tensors: Tensors) -> None:
    del tensors[B]


@breaks("an unknown key", "unknown another")
def add_key(tensors: Tensors) -> None:
    tensors["another"] = tensors[A]


@breaks("a swapped pair", "the base needs")
def swap_pair(tensors: Tensors) -> None:
    tensors[A], tensors[B] = tensors[B], tensors[A]


@breaks("a transposed factor", "the base needs")
def transpose_A(tensors: Tensors) -> None:
    tensors[A] = tensors[A].T


def write_broken(files: Path, folder: Path, name: str) -> Path:
    change, _ = BROKEN[name]
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    change(tensors)
    config = (files / "adapter" / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(config)
    save_file(folder / "adapter_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_verify_files_finds_a_broken_adapter(name: str, files: Path, tmp_path: Path) -> None:
    _, message = BROKEN[name]
    adapter = write_broken(files, tmp_path, name)
    before = read_contents(tmp_path)
    if message:
        with pytest.raises(FormatError) as caught:
            verify_files(files / "base", adapter)
        assert message in str(caught.value)
    else:
        report = verify_files(files / "base", adapter)
        failing = [row for row in report.rows if not row.ok]
        assert failing
        assert all("layers.0.self_attn.q_proj" in row.where for row in failing)
    assert read_contents(tmp_path) == before


# ---- the command ---------------------------------------------------------------------------------


def run_command(*argv: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `minilora verify`."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["verify", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def test_verify_command_prints_a_table() -> None:
    code, out, err = run_command("--cases", "3", "--seed", "5")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    names = ["property", "equation", "measured", "bound", "ratio", "ok", "source"]
    assert header.split() == names
    for name, p in BY_NAME.items():
        row = re.compile(rf"^{re.escape(name)} .* True +{re.escape(p.source)}$")
        assert any(row.search(line) for line in lines), name
    assert lines[-1].startswith("worst measured / bound: ")


def test_verify_command_prints_the_same_for_the_same_seed() -> None:
    _, out, _ = run_command("--cases", "3", "--seed", "5")
    _, again, _ = run_command("--cases", "3", "--seed", "5")
    _, other, _ = run_command("--cases", "3", "--seed", "6")
    assert again == out
    assert other != out


def test_verify_command_reads_files(files: Path) -> None:
    given_files = ("--base", files / "base", "--adapter", files / "adapter")
    code, out, err = run_command(*given_files)
    assert (code, err) == (0, "")
    assert "merge as stored" in out
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +8 x 12 +3 +2 ", out, re.MULTILINE)
    code, out, _ = run_command(*given_files, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert len(report["layers"]) == 4
    assert {row["property"] for row in report["rows"]} == NAMES
    assert 0.5 < report["worst_ratio"] <= 1


def reject_constant(constant: str) -> None:
    raise AssertionError(constant)


@pytest.mark.parametrize("name", ["a NaN", "dW overflows"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_command_fails_with_one_line(
    name: str, options: tuple[str, ...], files: Path, tmp_path: Path
) -> None:
    adapter = write_broken(files, tmp_path, name)
    code, out, err = run_command("--base", files / "base", "--adapter", adapter, *options)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("minilora: error: property '")
    assert "model.layers.0.self_attn.q_proj" in err
    if options:
        report = json.loads(out, parse_constant=reject_constant)
        assert report["ok"] is False
    else:
        assert re.search(r" False +\w", out)


@pytest.mark.parametrize(
    ("argv", "expected", "named"),
    [
        (["--base", "somewhere"], 2, "neither"),
        (["--adapter", "somewhere"], 2, "neither"),
        (["--cases", "0"], 2, "--cases"),
        (["--seed", "-1"], 2, "--seed"),
        (["--base", "nowhere", "--adapter", "nowhere"], 4, "nowhere"),
        (["--base", "", "--adapter", "x"], 2, "--base"),
    ],
)
def test_verify_command_names_the_wrong_option(argv: list[str], expected: int, named: str) -> None:
    code, out, err = run_command(*argv)
    assert (code, out) == (expected, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_verify_command_shows_and_names_a_failing_property(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patch = SABOTAGES["unmerging_subtracts"]
    patch(monkeypatch)
    code, out, err = run_command("--cases", "5")
    assert code == 1
    assert err.startswith(
        "minilora: error: property 'unmerge' fails: W comes back, every bit: measured "
    )
    [failing] = [line for line in out.splitlines() if " False " in line]
    assert failing.startswith("unmerge ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_verify_command_shows_layers_and_properties_on_a_terminal_alone(files: Path) -> None:
    out = io.StringIO()
    terminal = Terminal()
    argv = ["verify", "--base", str(files / "base"), "--adapter", str(files / "adapter"), "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(terminal):
        assert main(argv) == 0
    assert json.loads(out.getvalue())["ok"] is True
    shown = terminal.getvalue()
    assert "/4 [" in shown
    assert re.search(r"model\.layers\.\d\.\w+\.\w+: \w+", shown)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_command_ends_with_130_at_ctrl_c_and_shows_what_was_measured(
    options: tuple[str, ...], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Property.check

    def interrupt(p: Property, case: Case) -> Measured:
        if case.name == PATHS[2] and p.name == "gauge":
            raise KeyboardInterrupt
        return real(p, case)

    monkeypatch.setattr(Property, "check", interrupt)
    given_files = ("--base", files / "base", "--adapter", files / "adapter")
    code, out, err = run_command(*given_files, *options)
    assert code == 130
    assert err.strip() == "minilora: interrupted"
    if options:
        assert out == ""
    else:
        assert out.splitlines()[-1] == "interrupted: 2 of 4 layers were measured whole"
        assert re.search(r"^unmerge .* True ", out, re.MULTILINE)


def test_verify_help_fits_a_screen_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("example: minilora verify --base") for line in lines)
