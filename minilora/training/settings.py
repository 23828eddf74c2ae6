"""How to train: the numbers of a run, checked once."""

from __future__ import annotations

import dataclasses

from ..display import render_settings
from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_flag,
    is_plain_number,
    number_rules,
    one_of,
    optional_rule,
    rules_for,
)
from ..lora.optimizers import OPTIMIZERS

# Sequences per step. More is a typing mistake, whose array would not fit into memory.
MAX_SEQUENCES = 2**20
_LIMIT = 2**63
_COUNTS = ("steps", "batch_size", "context", "accumulate")
KEEP = ("last", "best")
_OPTIONAL = ("shard", "part", "threads", "eval_every", "save_every")
_OF_OPTIMIZERS = {
    "loraplus_lr_ratio": "loraplus",
    "loraplus_lr_embedding": "loraplus",
    "riemannian_reg": "riemannian",
}
_RATES = ("loraplus_lr_ratio", "loraplus_lr_embedding")
_RULES = [
    *integer_rules(*_COUNTS, least=1, limit=_LIMIT),
    *map(optional_rule, integer_rules(*_OPTIONAL, least=1, limit=_LIMIT)),
    *integer_rules("warmup", "seed", least=0, limit=_LIMIT),
    *number_rules("lr", "max_grad_norm", is_kind=is_plain_number, above=0),
    *number_rules("floor", "weight_decay", is_kind=is_plain_number, least=0),
    Rule("optimizer", one_of(*OPTIMIZERS), f"one of {', '.join(OPTIMIZERS)}"),
    *map(optional_rule, number_rules(*_RATES, is_kind=is_plain_number, above=0)),
    *map(optional_rule, number_rules("riemannian_reg", is_kind=is_plain_number, least=0)),
    *rules_for(
        ("abort_on_divergence", "gradient_checkpointing", "graph"), is_flag, "True or False"
    ),
    Rule("keep", lambda value: value in KEEP, " or ".join(map(repr, KEEP))),
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. ConfigError names a value that is out of range.

    batch_size     sequences per step; with `accumulate`, that many times more
    context        positions per sequence (windows of context + 1 tokens)
    warmup         steps of linear warm-up to `lr`, followed by half a cosine down to `floor` x lr
    max_grad_norm  gradients are scaled down to this norm
    shard          sequences that run forward and backward together; None: chosen from the shape
    part           positions of a sequence that run forward and backward together, about; None:
                   chosen from the shape: parts run at the same time, see parts.py
    eval_every     in steps; None: at the start and at the end only
    save_every     in steps, and at the end; None: only when the run is stopped
    keep           the weights that the run ends with: "last", or "best": those with the lowest
                   held-out loss, the first of equal ones. A copy is in memory, and in each
                   checkpoint. AdaLoRA's evaluations count once its ranks are final
    gradient_checkpointing  store less for backward and compute it again: see
                   `CausalLM.gradient_checkpointing_enable`
    graph          on a GPU, take each step by one launch: see graphed.py
    optimizer      adamw, loraplus, lorafa or riemannian: see lora/optimizers.py
    loraplus_lr_ratio      of loraplus: learning rate of B over that of A; None: 16
    loraplus_lr_embedding  of loraplus: learning rate of an embedding's factors; None: 1e-6
    riemannian_reg         of riemannian: damping of the inverses; None: 0.01
    """

    steps: int = 400
    batch_size: int = 16
    context: int = 128
    lr: float = 1e-3
    warmup: int = 20
    floor: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulate: int = 1
    seed: int = 0
    shard: int | None = None
    part: int | None = None
    threads: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    abort_on_divergence: bool = False
    gradient_checkpointing: bool = False
    graph: bool = True
    keep: str = "last"
    optimizer: str = "adamw"
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None
    riemannian_reg: float | None = None

    # These may change on resuming: they do not change the result.
    FREE = (
        "threads",
        "eval_every",
        "save_every",
        "abort_on_divergence",
        "gradient_checkpointing",
        "graph",
    )

    def __post_init__(self) -> None:
        check_fields(vars(self), _RULES)
        if self.sequences > MAX_SEQUENCES:
            raise ConfigError(
                f"batch_size x accumulate must be at most {MAX_SEQUENCES} sequences, "
                f"got {self.batch_size} x {self.accumulate}"
            )
        for field, optimizer in _OF_OPTIMIZERS.items():
            if getattr(self, field) is not None and self.optimizer != optimizer:
                raise ConfigError(
                    f"{field} is for optimizer {optimizer}, got optimizer {self.optimizer}: "
                    "leave it out, or choose that optimizer"
                )
        if self.part is not None and self.part > self.context:
            raise ConfigError(
                f"part must be at most context ({self.context}), which leaves sequences whole, "
                f"got {self.part}"
            )

    def _repr_html_(self) -> str:
        return render_settings(self)

    @property
    def sequences(self) -> int:
        """Sequences per step, accumulated ones included."""
        return self.batch_size * self.accumulate
