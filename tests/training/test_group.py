"""Ranks as threads of one process: sums with the bits of one process, and ends that all share."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
import time

import numpy as np
import pytest
from fake_ranks import Aborted, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora.training.group
import minilora.training.loop
import minilora.training.run
from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_multitask_model,
    get_peft_model,
)
from minilora.errors import (
    ConfigError,
    DataError,
    FormatError,
    Interrupted,
    LockError,
    MiniloraError,
    NonFiniteError,
)
from minilora.nn import Parameter
from minilora.training.loop import Settings, evaluate, train
from minilora.training.parallel import ShardedStep
from minilora.training.ranks import Alone
from minilora.training.sums import Node, Partial, add_up

TEXT = np.random.default_rng(0).integers(0, 13, 400)
HELD_OUT = np.random.default_rng(1).integers(0, 13, 90)
CONFIG = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)
SHORT = Settings(steps=4, batch_size=7, context=8, lr=1e-2, warmup=2, shard=1, threads=1)


@pytest.fixture(autouse=True)
def no_output(monkeypatch):
    """Ranks that are threads would print at once, into a capture that is not made for that."""
    monkeypatch.setattr(minilora.training.loop, "print", lambda *_, **__: None, raising=False)


# ---- sums ----


@st.composite
def sums(draw):
    """(parameters, a function that makes the partial of a shard anew, the number of shards)"""
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 3)]), min_size=1, max_size=4))
    dtypes = [draw(st.sampled_from([np.float32, np.float64])) for _ in shapes]
    pairs = zip(shapes, dtypes, strict=True)
    params = [Parameter(np.zeros(shape, dtype)) for shape, dtype in pairs]
    count = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 999))
    rate = draw(st.sampled_from([0.0, 0.5, 1.0]))  # of gradients that are None

    def partial(shard: int) -> Partial:
        rng = np.random.default_rng([seed, shard])
        task = rng.choice(["a", "b"])
        grads = []
        for p in params:
            # Zeros of both signs, too: -0 must stay what it is.
            values = rng.standard_normal(p.shape) * rng.choice([0.0, -0.0, 1.0], p.shape)
            grad = np.asarray(values, p.dtype)
            grads.append(None if rng.random() < rate else grad)
        trained = any(grad is not None for grad in grads)
        return Partial({task: np.float64(rng.standard_normal())}, grads, trained)

    return params, partial, count


def bits_of(partial: Partial):
    losses = {task: np.float64(loss).tobytes() for task, loss in partial.losses.items()}
    grads = [None if g is None else (g.dtype, g.shape, g.tobytes()) for g in partial.grads]
    return losses, grads, partial.trained


def summed(ranks, params, partial, count):
    own = ranks.owned(count)
    nodes = add_up((Node(i, i + 1, partial(i)) for i in own), count, Partial.add)
    return ranks.sum(nodes, count, ["a", "b"], params)


@given(case=sums(), size=st.integers(2, 5), piece=st.sampled_from([2, 1 << 24]))
@settings(max_examples=40)
def test_sum_of_ranks_has_the_bits_of_one_process(case, size, piece):
    params, partial, count = case
    losses, grads, trained = bits_of(summed(Alone(), params, partial, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilora.training.group, "NUMBERS", piece)
        outcomes = run_ranks(size, lambda ranks: bits_of(summed(ranks, *case)))
    for outcome in outcomes:
        assert outcome.error is None
        its_losses, its_grads, its_trained = outcome.result
        assert (its_grads, its_trained) == (grads, trained)
        assert {task: its_losses[task] for task in losses} == losses


@pytest.mark.parametrize("having", [0, 1])
def test_sum_keeps_the_sign_of_zero_where_another_rank_takes_no_part(having):
    params = [Parameter(np.zeros(2))]

    def work(ranks):
        grad = np.array([-0.0, 0.0]) if ranks.rank == having else None
        partial = Partial({"a": np.float64(0)}, [grad], True)
        return ranks.sum([Node(ranks.rank, ranks.rank + 1, partial)], 2, ["a"], params)

    for outcome in run_ranks(2, work):
        assert np.signbit(outcome.result.grads[0]).tolist() == [True, False]


def test_sum_of_a_batch_without_sequences_is_empty():
    params = [Parameter(np.zeros(2))]
    for outcome in run_ranks(2, lambda ranks: ranks.sum([], 0, [], params)):
        assert outcome.result == Partial({}, [None], trained=False)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sum_sends_two_times_the_gradients_for_any_number_of_ranks(size):
    params = [Parameter(np.zeros(1000, np.float32)), Parameter(np.zeros(10**6, np.float32))]

    def work(ranks):
        own = ranks.owned(size)
        nodes = [
            Node(i, i + 1, Partial({None: np.float64(1)}, [np.ones(1000, np.float32), None], True))
            for i in own
        ]
        total = ranks.sum(nodes, size, [None], params)
        return total.grads[0].tolist() == [size] * 1000, total.grads[1], ranks.comm.sent

    for outcome in run_ranks(size, work):
        is_right, none, sent = outcome.result
        assert is_right
        assert none is None  # a parameter without gradients does not travel
        assert sent <= 4000 + 4000 / size + 100


# ---- training ----


def lora(**fields):
    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return get_peft_model(CausalLM(CONFIG, seed=1), LoraConfig(**fields), seed=2)


def adalora():
    config = AdaLoraConfig(
        target_r=1, init_r=2, tinit=1, tfinal=1, deltaT=1, total_step=4, target_modules="all-linear"
    )
    return get_peft_model(CausalLM(CONFIG, seed=1), config, seed=2)


def multitask():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_multitask_model(CausalLM(CONFIG, seed=1), {"a": config, "b": config}, seed=2)


TASKS = {"a": TEXT, "b": TEXT[::-1].copy()}
RUNS = {
    "LoRA": (lora, TEXT, SHORT),
    "DoRA": (lambda: lora(use_dora=True), TEXT, SHORT),
    "AdaLoRA": (adalora, TEXT, SHORT),
    "multitask": (multitask, TASKS, SHORT),
    "dropout": (lambda: lora(lora_dropout=0.3), TEXT, SHORT),
    "accumulation": (lora, TEXT, dataclasses.replace(SHORT, batch_size=3, accumulate=2)),
    "all weights": (lambda: CausalLM(CONFIG, seed=1), TEXT, SHORT),
}


def trained(name, out, ranks=None, threads=1, **changes):
    make, tokens, settings = RUNS[name]
    model = make()
    settings = dataclasses.replace(settings, threads=threads, **changes)
    held_out = {"a": HELD_OUT, "b": HELD_OUT} if name == "multitask" else HELD_OUT
    result = train(model, tokens, settings, out, held_out=held_out, ranks=ranks)
    weights = [p.data.tobytes() for p in model.parameters() if p.requires_grad]
    return result.losses, result.evaluations, weights


@pytest.mark.parametrize("name", RUNS)
def test_train_on_ranks_has_the_bits_of_one_process(name, tmp_path):
    expected = trained(name, tmp_path / "alone")
    for size, threads in ((2, 1), (3, 2), (4, 1)):  # all of them by MPI: tests/cli/test_mpi.py
        out = tmp_path / str(size)
        outcomes = run_ranks(size, lambda ranks, out=out, k=threads: trained(name, out, ranks, k))
        for outcome in outcomes:
            assert outcome.error is None
            assert outcome.result == expected
        log = (out / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3]
        assert len((out / "eval.jsonl").read_text().splitlines()) == 2


def test_train_on_other_ranks_resumes_with_the_bits_of_an_uninterrupted_run(tmp_path, monkeypatch):
    expected = trained("dropout", tmp_path / "straight")
    plain = minilora.training.run.Run.step

    def failing(self, sharded):
        if self.done == 3 and sharded.ranks.rank == 2:
            raise MemoryError
        return plain(self, sharded)

    monkeypatch.setattr(minilora.training.run.Run, "step", failing)
    out = tmp_path / "out"
    failed = run_ranks(3, lambda ranks: trained("dropout", out, ranks, save_every=2))
    assert all(isinstance(outcome.error, MemoryError) for outcome in failed)
    monkeypatch.undo()
    make, tokens, settings = RUNS["dropout"]

    def go_on(ranks):
        model = make()
        result = train(model, tokens, settings, out, held_out=HELD_OUT, resume="auto", ranks=ranks)
        weights = [p.data.tobytes() for p in model.parameters() if p.requires_grad]
        return result.losses, result.evaluations, weights

    for outcome in run_ranks(4, go_on):
        assert outcome.error is None
        assert outcome.result == expected


def test_evaluate_on_ranks_has_the_bits_of_one_process():
    expected = evaluate(lora().eval(), TEXT, 8, threads=1)
    for size in (2, 3, 9):  # 9: more than there are shards
        work = lambda ranks: evaluate(lora().eval(), TEXT, 8, threads=1, ranks=ranks)  # noqa: E731
        assert {outcome.result for outcome in run_ranks(size, work)} == {expected}


def test_losses_of_ranks_come_in_order(monkeypatch):
    model = lora().eval()
    batches = [minilora.training.run.Windows(TEXT, 8, 5, 0).batch(i) for i in range(3)]
    with ShardedStep(model, 1, 2) as sharded:
        expected = list(sharded.losses(batches))

    def work(ranks):
        with ShardedStep(lora().eval(), 1, 2, ranks=ranks) as sharded:
            return list(sharded.losses(batches))

    for outcome in run_ranks(2, work):
        assert outcome.result == expected


def test_train_says_how_many_ranks_are_idle(tmp_path):
    settings = dataclasses.replace(SHORT, shard=7)

    def work(ranks):
        return train(lora(), TEXT, settings, tmp_path, ranks=ranks).losses

    with pytest.warns(UserWarning, match="2 of 3 ranks have no part .* 1 shards: start fewer"):
        outcomes = run_ranks(3, work)
    assert outcomes[0].result == train(lora(), TEXT, settings, tmp_path / "alone").losses
    assert [outcome.result for outcome in outcomes] == 3 * [outcomes[0].result]


# ---- ranks that differ ----


def test_train_refuses_ranks_with_other_settings_texts_or_weights(tmp_path):
    def settings_of(ranks):
        changed = dataclasses.replace(SHORT, lr=1e-2 + ranks.rank)
        train(lora(), TEXT, changed, tmp_path / "a", ranks=ranks)

    def text_of(ranks):
        train(lora(), TEXT[ranks.rank :], SHORT, tmp_path / "b", ranks=ranks)

    def held_out_of(ranks):
        held_out = HELD_OUT[ranks.rank :]
        train(lora(), TEXT, SHORT, tmp_path / "c", held_out=held_out, ranks=ranks)

    def weights_of(ranks):
        train(CausalLM(CONFIG, seed=ranks.rank), TEXT, SHORT, tmp_path / "d", ranks=ranks)

    cases = [(settings_of, "^lr is 0.01 on rank 0 and 1.01 on rank 1: start all ranks with")]
    cases += [(text_of, "^text is "), (held_out_of, "^held-out text is ")]
    cases += [(weights_of, "^the checksum of the weights after 0 steps is ")]
    for work, message in cases:
        for outcome in run_ranks(2, work):
            with pytest.raises(ConfigError, match=message):
                raise outcome.error


def test_train_refuses_a_folder_that_a_rank_does_not_see(tmp_path):
    def work(ranks):
        train(lora(), TEXT, SHORT, tmp_path / str(ranks.rank // 2), ranks=ranks)

    message = r"--out .* is not the folder that rank 0 writes to: give a folder on a disk"
    for rank, outcome in enumerate(run_ranks(3, work)):
        prefix = "" if rank == 2 else "rank 2: "
        with pytest.raises(ConfigError, match=f"^{prefix}{message}"):
            raise outcome.error


@pytest.mark.parametrize("save_every", [2, None])
def test_train_ends_where_ranks_come_to_different_weights(save_every, tmp_path, monkeypatch):
    plain = minilora.training.run.Run.step

    def step(self, sharded):
        line = plain(self, sharded)
        if self.done == 1 and sharded.ranks.rank == 1:
            parameter = self.optimizer.params[0]
            parameter.data = np.nextafter(parameter.data, 9, dtype=parameter.dtype)
        return line

    monkeypatch.setattr(minilora.training.run.Run, "step", step)
    settings = dataclasses.replace(SHORT, save_every=save_every)
    done = save_every or 4
    for outcome in run_ranks(2, lambda ranks: train(lora(), TEXT, settings, tmp_path, ranks=ranks)):
        with pytest.raises(ConfigError, match=f"after {done} steps is .*the ranks round differ"):
            raise outcome.error
    assert not (tmp_path / "checkpoints").exists()


def test_exchanges_of_ranks_that_do_different_things_end_all_of_them():
    def work(ranks):
        return ranks.share(1) if ranks.rank else list(ranks.gather([]))

    for outcome in run_ranks(3, work):
        with pytest.raises(MiniloraError, match=r"different exchanges.*: gather, share, share; "):
            raise outcome.error

    def one_ends_early(ranks):
        return None if ranks.rank else ranks.share(1)

    for outcome in run_ranks(2, one_ends_early):
        assert "share, end" in str(outcome.error)


# ---- errors ----

ERRORS = [
    ConfigError("a"),
    DataError("b"),
    FormatError("c"),
    LockError("d"),
    NonFiniteError("e", {"step": 1}),
    Interrupted("f", 15),
    OSError(errno.ENOSPC, "g", "file"),
    FileNotFoundError(errno.ENOENT, "h", "file"),
    OSError("i"),
    MemoryError("j"),
]


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_one_rank_is_raised_by_all_wherever_they_are(error, failing):
    def work(ranks):
        ranks.share(None)
        if ranks.rank == failing:
            raise error
        if ranks.rank == 1:
            return None  # at its end already
        return ranks.share(1)

    outcomes = run_ranks(3, work)
    assert outcomes[failing].error is error
    for outcome in outcomes:
        assert type(outcome.error) is type(error)
        assert getattr(outcome.error, "exit_code", 4) == getattr(error, "exit_code", 4)
        assert getattr(outcome.error, "filename", None) == getattr(error, "filename", None)
        prefix = f"rank {failing}: " if failing and outcome.error is not error else ""
        text = getattr(error, "strerror", None) or str(error)
        assert (getattr(outcome.error, "strerror", None) or str(outcome.error)) == prefix + text


def test_an_error_of_several_ranks_is_the_lowest_one_s():
    def work(ranks):
        if ranks.rank:
            raise DataError(f"text {ranks.rank}")
        ranks.share(1)

    outcomes = run_ranks(3, work)
    assert [str(outcome.error) for outcome in outcomes] == [
        "rank 1: text 1",
        "text 1",
        "rank 1: text 1",
    ]


def test_an_error_that_is_not_ours_is_named_on_the_other_ranks():
    def work(ranks):
        if ranks.rank == 1:
            raise ZeroDivisionError("division by zero")
        ranks.share(1)

    outcomes = run_ranks(2, work)
    assert isinstance(outcomes[1].error, ZeroDivisionError)
    with pytest.raises(MiniloraError, match=r"^rank 1: ZeroDivisionError: division by zero$"):
        raise outcomes[0].error


def test_an_error_of_a_shard_ends_all_ranks_in_the_same_step(tmp_path, monkeypatch):
    plain = minilora.training.parallel.language_modelling_loss

    def loss(model, shard):
        if shard.first == 5:  # the last rank's
            raise DataError("a bad shard")
        return plain(model, shard)

    def work(ranks):
        model = lora().train()
        batch = minilora.training.run.Windows(TEXT, 8, 7, 0).batch(0)
        params = [p for p in model.parameters() if p.requires_grad]
        with ShardedStep(model, 2, 1, loss, ranks=ranks) as sharded:
            sharded.gradients(batch, params)

    outcomes = run_ranks(3, work)
    assert [str(outcome.error) for outcome in outcomes] == [
        "rank 2: a bad shard",
        "rank 2: a bad shard",
        "a bad shard",
    ]


def test_a_loss_that_is_not_finite_ends_all_ranks_in_the_same_step(tmp_path, monkeypatch):
    plain = ShardedStep.gradients_by_task

    def gradients(self, *arguments):
        loss, grads = plain(self, *arguments)
        return (loss * np.nan if arguments[-1] == 2 else loss), grads

    monkeypatch.setattr(ShardedStep, "gradients_by_task", gradients)
    outcomes = run_ranks(2, lambda ranks: train(lora(), TEXT, SHORT, tmp_path, ranks=ranks))
    messages = {str(outcome.error) for outcome in outcomes}
    assert len(messages) == 1
    assert messages.pop().startswith("step 2: loss nan")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize("lost", [KeyboardInterrupt(2), SystemExit(3)])
def test_a_rank_that_cannot_say_why_it_ends_aborts_all(lost):
    def work(ranks):
        if ranks.rank == 1:
            raise lost
        ranks.share(1)

    outcomes = run_ranks(3, work)
    assert outcomes[1].error is lost
    assert outcomes[1].group.is_lost
    assert all(isinstance(outcomes[rank].error, Aborted) for rank in (0, 2))


def test_a_failure_inside_an_exchange_aborts_all(monkeypatch):
    def work(ranks):
        if ranks.rank == 1:
            ranks.comm.Iallgatherv = None
        ranks.share(1000 * "a")

    outcomes = run_ranks(2, work)
    assert isinstance(outcomes[1].error, TypeError)
    assert isinstance(outcomes[0].error, Aborted)


def test_exchanges_after_an_error_raise_it_again():
    """Whoever catches it, to clean up, cannot wait for ranks that have gone."""

    def work(ranks):
        if ranks.rank == 1:
            raise DataError("first")
        for _ in range(2):
            with pytest.raises(DataError, match="rank 1: first"):
                ranks.share(1)

    for outcome in run_ranks(2, work)[:1]:
        assert outcome.error is None


def test_help_ends_all_ranks_without_an_error():
    def work(ranks):
        raise SystemExit(0)

    assert all(isinstance(outcome.error, SystemExit) for outcome in run_ranks(2, work))


# ---- signals ----


@pytest.mark.parametrize("receiver", [0, 1, 2])
def test_a_signal_of_one_rank_stops_all_after_the_same_step(receiver, tmp_path, monkeypatch):
    plain = minilora.training.run.Run.step
    stopped = []

    def step(self, sharded):
        ranks = sharded.ranks
        if self.done == 2 and ranks.rank == receiver:
            ranks._received.append(15)
        if self.done == 3:
            stopped.append(ranks.rank)
        return plain(self, sharded)

    monkeypatch.setattr(minilora.training.run.Run, "step", step)
    outcomes = run_ranks(
        3, lambda ranks: train(lora(), TEXT, SHORT, tmp_path, held_out=HELD_OUT, ranks=ranks)
    )
    for outcome in outcomes:
        with pytest.raises(
            Interrupted, match=r"^SIGTERM: stopped after 3 steps, saved in .*step-3"
        ):
            raise outcome.error
        assert outcome.error.exit_code == 143
    assert not stopped
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("receiver", [0, 2])
def test_a_signal_in_an_evaluation_stops_all_ranks_before_it_counts(
    receiver, tmp_path, monkeypatch
):
    plain = minilora.training.loop.evaluation_windows

    def windows(*arguments):
        for i, window in enumerate(plain(*arguments)):
            yield window
            group = here.group
            if i == 0 and group.rank == receiver:
                group._received.append(10)

    here = threading.local()
    monkeypatch.setattr(minilora.training.loop, "evaluation_windows", windows)

    def work(ranks):
        here.group = ranks
        train(lora(), TEXT, SHORT, tmp_path, held_out=TEXT, ranks=ranks)

    for outcome in run_ranks(3, work):
        with pytest.raises(Interrupted, match=r"^SIGUSR1: stopped after 0 steps"):
            raise outcome.error
    assert (tmp_path / "eval.jsonl").read_text() == ""


# ---- waiting ----


def test_a_rank_that_waits_sleeps():
    """MPI's own waiting asks some hundred thousand times a second, and takes a core."""

    class Request:
        asked = 0

        def Test(self) -> bool:
            self.asked += 1
            return time.monotonic() > begun + 0.3

    request = Request()
    begun = time.monotonic()
    minilora.training.group._wait(request)
    assert request.asked < 3000
