"""demo, pretrain and finetune: commands that train."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..backend import get_backend
from ..data.texts import prose
from ..data.tokenizer import ByteTokenizer, has_tokenizer
from ..display import printable
from ..errors import ConfigError, Interrupted
from ..formats.folders import locked, numbered_folder
from ..lora import AdaLoraConfig, LoraConfig
from ..lora.optimizers import OPTIMIZERS
from ..lora.starts.values import NAMES
from ..models.config import TransformerConfig
from ..models.transformer import CausalLM
from ..training.checkpoints import find_checkpoint, open_folder
from ..training.methods import (
    CODES,
    FACTORED,
)
from ..training.replaying import noting_command
from ..training.settings import KEEP
from ..training.signals import stop_signals
from .fields import add_fields_of_methods
from .options import (
    DATA,
    Args,
    Command,
    Once,
    Parser,
    add_allow_nonfinite,
    add_base,
    add_compute,
    add_device_and_threads,
    add_method,
    add_quantize,
    add_seed,
    add_start,
    add_strict,
    option,
    path,
    positive_integer,
    select_fields,
    true_false_or_name,
)
from .preparing import AUTO, prepare_finetune, print_preparation, require_rate
from .rates import FIRST, Search, choose_rate, without_notes
from .reading import (
    open_text,
    read_training_text,
    require_bytes,
    require_context,
)
from .reporting import PAGE, Report, draw_pictures, print_report, write_page_of_run

MAX_PARAMETERS = 2**32  # 64 GiB to train; a larger shape is a typing error

# ---- demo ----------------------------------------------------------------------------------------


def add_demo_options(parser: Parser) -> None:
    option(
        parser, "--quick", "take 20 seconds: shows that everything runs, not what training can do"
    )
    add_method(parser, FACTORED)
    add_quantize(parser, CODES)
    option(parser, "--pretrain-data FILE", "text to pretrain on (default: Python's reference)")
    option(parser, "--adapt-data FILE", "text to adapt to (default: Python's standard library)")
    field = functools.partial(option, parser, default=argparse.SUPPRESS)
    field("--r R", "rank of the adapter, at least 1 (default: 4)")
    field("--lora-alpha X", "scaling is lora_alpha / r (default: 16; adalora: 256)")
    option(parser, "--out DIR", "a new or empty folder (default: runs/demo-NNN)")
    add_device_and_threads(parser)
    add_seed(parser)


def demo(args: Args) -> None:
    from ..lab.demo import Plan
    from ..lab.demo import demo as run

    plan = Plan().quick() if args.quick else Plan()
    plan = plan.adapted_by(args.method, args.quantize, select_fields(args, AdaLoraConfig))
    # What cannot work ends here, before a folder is made.
    least = 10 * (plan.pretrain.context + 1)
    if args.pretrain_data is not None:
        text = open_text(args.pretrain_data).text()
        require_bytes(text, least, f"--pretrain-data {args.pretrain_data}")
    if args.adapt_data is not None:
        text = open_text(args.adapt_data).text()
        require_bytes(text, least, f"--adapt-data {args.adapt_data}")
    get_backend(args.device)
    if args.pretrain_data is None:
        prose()
    with locked(args.out or numbered_folder("runs", "demo")) as out:
        machine = {"threads": args.threads, "device": args.device}
        run(open_folder(out), plan, args.pretrain_data, args.adapt_data, args.seed, **machine)


# ---- pretrain ------------------------------------------------------------------------------------


def add_folder_options(parser: Parser) -> None:
    option(parser, "--out DIR", "a new or empty folder (default: runs/COMMAND-NNN)")
    text = "continue from this checkpoint, or from the newest in --out (auto)"
    option(parser, "--resume auto|DIR", text, nargs="?", const="auto", type=path)


def add_training_options(parser: Parser, lr: float, auto: str = "") -> None:
    text = "text to evaluate on (default: the last tenth of the text, not trained on)"
    option(parser, "--eval-data FILE", text)
    add_strict(parser)
    option(parser, "--abort-on-divergence", "stop when the loss has diverged but is still finite")
    option(parser, "--gradient-checkpointing", "use less memory, and a third more time")
    text = "on a GPU, run the operations of a step one by one, not by one launch"
    option(
        parser, "--no-graph", text, dest="graph", action="store_false", default=argparse.SUPPRESS
    )
    add_device_and_threads(parser)
    run = parser.add_argument_group("training")
    option(run, "--steps N", "optimizer steps, at least 1", default=400)
    option(run, "--batch-size N", "sequences per batch, at least 1", default=16)
    option(run, "--accumulate N", "batches per step, at least 1", default=1)
    option(run, "--context T", "tokens per sequence, at least 1", default=128)
    option(run, "--lr X", f"highest learning rate, above 0{auto}", default=lr)
    text = "learning rate at the end / --lr, at least 0; 1: constant"
    option(run, "--floor X", text, default=0.1)
    option(
        run, "--warmup N", "steps until the learning rate is the highest, at least 0", default=20
    )
    option(run, "--weight-decay X", "AdamW's weight decay, at least 0", default=0.0)
    option(
        run, "--max-grad-norm X", "larger gradients are scaled to this norm, above 0", default=1.0
    )
    text = "sequences a thread runs together, at least 1 (default: by the model's size)"
    option(run, "--shard N", text)
    text = "positions of a sequence run together, at least 1 (default: by the shapes)"
    option(run, "--part N", text)
    option(run, "--save-every N", "steps between checkpoints, at least 1 (default: none)")
    text = "steps between evaluations, at least 1 (default: only first and last)"
    option(run, "--eval-every N", text)
    text = "weights of the result: last, or best by the held-out loss"
    option(run, "--keep WHICH", text, choices=KEEP, default=KEEP[0])
    add_seed(run)


def add_pretrain_options(parser: Parser) -> None:
    option(parser, "--data FILE", DATA, required=True)
    add_folder_options(parser)
    add_training_options(parser, lr=3e-3)
    shape = parser.add_argument_group("model")
    size = functools.partial(option, shape, type=positive_integer, default=argparse.SUPPRESS)
    default = TransformerConfig
    size("--hidden-size N", f"width of the model (default: {default.hidden_size})")
    size("--intermediate-size N", f"width of an MLP (default: {default.intermediate_size})")
    size("--num-hidden-layers N", f"layers (default: {default.num_hidden_layers})")
    size("--num-attention-heads N", f"attention heads (default: {default.num_attention_heads})")
    size("--num-key-value-heads N", "heads of keys and values (default: all attention heads)")
    size("--max-position-embeddings N", "longest context (default: 256, or --context if larger)")
    option(shape, "--untied", "do not use the weights of the embedding for the head")


def pretrain(args: Args) -> None:
    from ..training.loop import Settings, train

    settings = Settings(**select_fields(args, Settings))
    tokenizer = ByteTokenizer()
    shape = select_fields(args, TransformerConfig)
    shape.setdefault("max_position_embeddings", max(settings.context, 256))
    config = TransformerConfig(**shape, tie_word_embeddings=not args.untied)
    require_context(settings.context, config)
    count = config.parameter_count()
    if count > MAX_PARAMETERS:
        raise ConfigError(f"the model has {count:,} parameters, at most {MAX_PARAMETERS:,} train")
    text = read_training_text(
        args.data, args.eval_data, tokenizer, settings.context, strict=args.strict
    )
    model = CausalLM(config, seed=settings.seed, device=args.device)
    with _run_folder(args, "pretrain") as out:
        size = sum(p.size for p in model.parameters())
        print(f"{size:,} parameters, {len(text.tokens):,} tokens -> {printable(str(out))}")
        options = {"held_out": text.held_out, "resume": args.resume, "title": "pretrain"}
        with _saving(out):
            result = train(model, text.tokens, settings, out, **options, ranks=args.ranks)
            if args.ranks.rank == 0:
                model.save_pretrained(out)
                tokenizer.save(out)
        report = Report("pretrain", out, result, text.bytes_per_token, size)
        if args.ranks.rank == 0:
            draw_pictures(report)
        print_report(report)


# ---- finetune ------------------------------------------------------------------------------------


def add_finetune_options(parser: Parser) -> None:
    add_folder_options(parser)
    text = "a second text, evaluated at each evaluation: what the adapter forgets of it"
    option(parser, "--also-evaluate FILE", text)
    option(parser, "--report", f"write {PAGE}, a page about the adapter, at the end")
    add_tuning_options(parser)
    parser.set_defaults(method=None)  # to tell "lora" from an option that was not given


def add_tuning_options(parser: Parser) -> None:
    """All options of finetune but those of its folder: sweep has them for each of its runs."""
    add_base(parser)
    add_allow_nonfinite(parser)
    option(parser, "--data FILE", DATA)
    text = "in place of --data: one text per task, which gets an adapter of its own"
    option(parser, "--tasks FILE", text, nargs="+")
    text = "rank of one more adapter that all tasks share, at least 1 (default: none)"
    option(parser, "--shared-r R", text)
    text = "adapter to go on from, configured as it is (default: a new one)"
    option(parser, "--adapter DIR", text, action=Once)
    add_start(parser)
    text = "save A and B over the base that their start left, as peft does"
    option(parser, "--as-trained", text)
    add_training_options(parser, lr=FIRST, auto="; auto: by short runs")
    _add_optimizers(parser)
    group = parser.add_argument_group("method and adapter (fields of PEFT's configuration)")
    add_method(group)
    add_quantize(group)
    add_compute(group)
    field = functools.partial(option, group, default=argparse.SUPPRESS)
    default = LoraConfig
    field("--r R", f"rank, at least 1 (default: {default.r})")
    field("--lora-alpha X", f"scaling is lora_alpha / r (default: {default.lora_alpha})")
    text = "names (q_proj,v_proj), a pattern or all-linear (default: by type of model)"
    field("--target-modules NAMES", text)
    text = "names or a pattern of layers that get no adapter (default: none)"
    field("--exclude-modules NAMES", text)
    text = f"probability of dropout, in [0, 1) (default: {default.lora_dropout})"
    field("--lora-dropout P", text)
    text = f"biases of the base to train: none, all, lora_only (default: {default.bias})"
    field("--bias B", text, choices=("none", "all", "lora_only"))
    field("--use-rslora", "scaling is lora_alpha / sqrt(r)")
    field("--use-dora", "the same as --method dora")
    text = f"start of A and B: true, false, gaussian, {', '.join(NAMES)} (default: true)"
    field("--init-lora-weights HOW", text, type=true_false_or_name)
    field("--rank-pattern JSON", "rank by name or pattern, such as '{\"q_proj\": 4}' (default: r)")
    text = "lora_alpha by name or pattern, such as '{\"q_proj\": 16}' (default: lora_alpha)"
    field("--alpha-pattern JSON", text)
    field("--layers-to-transform N,N", "numbers of the layers to adapt, such as 0,1 (default: all)")
    text = "what comes before a layer's number in a name (default: any)"
    field("--layers-pattern NAME,NAME", text)
    field("--modules-to-save NAME,NAME", "modules to train whole, such as lm_head (default: none)")
    text = "rows of the embedding to train, such as 0,7 (default: none)"
    field("--trainable-token-indices N,N", text)
    field("--ensure-weight-tying", "adapt a tied head together with its embedding")
    field("--fan-in-fan-out", "accepted for PEFT's sake: the layout is read from the model")
    add_fields_of_methods(parser)


def _add_optimizers(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer")
    text = f"how A and B step: {', '.join(OPTIMIZERS)}"
    option(group, "--optimizer O", text, choices=OPTIMIZERS, default=OPTIMIZERS[0])
    text = "loraplus: learning rate of B over that of A, above 0 (default: 16)"
    option(group, "--loraplus-lr-ratio X", text)
    text = "loraplus: learning rate of an embedding's factors, above 0 (default: 1e-6)"
    option(group, "--loraplus-lr-embedding X", text)
    text = "riemannian: damping of the inverses, at least 0 (default: 0.01)"
    option(group, "--riemannian-reg X", text)


def finetune(args: Args) -> None:
    require_rate(args.lr)
    if args.lr == AUTO:
        _finetune_by_search(args)
    else:
        run_finetune(args, _run_folder(args, "finetune"), _saving, reports=True)


def _finetune_by_search(args: Args) -> None:
    """finetune --lr auto: find the rate, unless a run is resumed, and train as with that --lr."""
    search = None
    if args.resume is None:
        with without_notes():
            search = Search(args)
    with _run_folder(args, "finetune") as out:
        args.lr = choose_rate(args, out, search)
        search = None  # its model
        # For replay: the last one of two values counts.
        args.parser.words = [*args.parser.words, f"--lr={args.lr!r}"]
        run_finetune(args, contextlib.nullcontext(out), _saving, reports=True)


def run_finetune(
    args: Args,
    folder: contextlib.AbstractContextManager[Path],
    saving: Callable[[Path], contextlib.AbstractContextManager[None]],
    reports: bool = False,
) -> tuple[Any, float, int]:
    """Train and save; returns (the `Result`, bytes per token, number of trainable parameters).

    folder   gives the folder of the run, once all that can be refused has been
    saving   of that folder, is entered while the run trains and is saved
    reports  whether to draw the losses, and to print a table in the end
    """
    from ..tools.rewriting import copy_companions
    from ..training.loop import train

    prepared = prepare_finetune(args)
    model, config = prepared.model, prepared.config
    with folder as out:
        print_preparation(args, prepared)
        print(printable(f"{prepared.sizes} tokens -> {out}"))
        options = {**prepared.options, "resume": args.resume, "title": "finetune"}
        options["ranks"] = args.ranks
        writes = args.ranks.rank == 0
        noting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if writes and reports:
            noting = noting_command(out, args.parser.words)
        with saving(out):
            with noting:
                result = train(model, prepared.tokens, prepared.settings, out, **options)
            if writes:
                form = {"as_trained": True} if args.as_trained else {}
                model.save_pretrained(out, **form)
            if writes and config is None:
                copy_companions(args.base, out)
            if writes and args.adapter is not None and has_tokenizer(args.adapter):
                prepared.tokenizer.save(out)
        report = prepared.report(out, result)
        has_ranks = isinstance(config, AdaLoraConfig)
        if writes and (reports or has_ranks):
            draw_pictures(report, losses=reports, ranks=has_ranks)
        if reports:
            print_report(report)
        if writes and reports and args.report:
            del prepared, model  # the page reads the model again, from its files
            write_page_of_run(out, args)
    return result, report.bytes_per_token, report.trained


# ---- both ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _run_folder(args: Args, stem: str) -> Iterator[Path]:
    """--out or a new folder in runs/, locked while the run writes to it.

    The folder may have files in it only if the run continues from one of its checkpoints. Rank 0
    opens it; the others get its name.
    """
    if args.ranks.rank:
        yield Path(args.ranks.share(None))
        return
    with contextlib.ExitStack() as stack:
        is_resumed = False
        if args.resume is not None:
            if args.resume == "auto" and args.out is None:
                raise ConfigError("--resume auto needs --out, the folder of the run to continue")
            if args.out is not None and Path(args.out).is_dir():
                # Before the search: another run adds and removes checkpoints.
                stack.enter_context(locked(args.out))
            checkpoint, _ = find_checkpoint(args.resume, Path(args.out or "runs"))
            parents = checkpoint.resolve().parents
            is_resumed = args.out is not None and Path(args.out).resolve() in parents
        out = Path(args.out or numbered_folder("runs", stem))
        if args.out is None or not out.exists():
            stack.callback(_remove_if_empty, out)  # after it is unlocked
        folder = open_folder(stack.enter_context(locked(out)), is_resumed)
        args.ranks.share(str(folder))
        yield folder


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything."""
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _saving(out: Path) -> Iterator[None]:
    """Let the block train, and save what it has trained: a signal in between waits for that.

    Interrupted after the block, if one has come.
    """
    with stop_signals() as stopped:
        yield
    if stopped:
        name = signal.Signals(stopped[0]).name
        raise Interrupted(f"{name}: all steps are done, saved in {str(out)!r:.300}", stopped[0])


COMMANDS = (
    Command(
        demo,
        add_demo_options,
        "Pretrain a small model on prose, adapt it to code with a method, and measure both.",
        "--method adalora --out my-demo",
    ),
    Command(
        pretrain,
        add_pretrain_options,
        "Train a small Llama-shaped model on the bytes of a text.",
        "--data book.txt --out base",
        has_ranks=True,
    ),
    Command(
        finetune,
        add_finetune_options,
        "Train an adapter and leave the base as it is; with --method full, train the base.",
        "--base base --data notes.txt --r 8",
        has_ranks=True,
    ),
)
