"""AdaLoRA: training finds the ranks, dW = s B diag(E) A (Zhang et al. 2023).

               x (I)
             /       \\
      W (O, I)        A (r, I)      right singular vectors; a penalty keeps rows near orthonormal
      frozen          E (r, 1)      singular values, zero at the start; a zero here cuts a triplet
             \\        B (O, r)      left singular vectors; a penalty keeps columns near orthonormal
              \\      /  * s         s = lora_alpha / (init_r + 1e-5)
               y (O)

The paper's P, Lambda, Q are PEFT's lora_B, lora_E, lora_A. Triplet i of a layer is (B[:, i], E[i],
A[i]): one rank of dW. `RankAllocator` measures the importance of every triplet over all layers at
once, and keeps as many as a falling budget allows. `orthogonality` is the penalty in the loss.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from typing import Any

import numpy as np

from ..autograd import Tensor, grad_enabled
from ..backend import Array, Shape
from ..effective import Formed, Pull
from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_flag,
    is_plain_number,
    number_rules,
    one_of,
)
from ..functional import Grads
from ..nn import Dropout, LinearBase, Parameter, normal
from .config import MAX_COUNT, LoraConfig
from .lora import LoraAdapter

RANK_EPS = 1e-5  # PEFT adds this to AdaLoRA's rank before it divides by the rank


RULES = [
    *integer_rules("init_r", "target_r", "total_step", "deltaT", least=1, limit=MAX_COUNT),
    *integer_rules("tinit", "tfinal", least=0, limit=MAX_COUNT),
    *number_rules("beta1", "beta2", is_kind=is_plain_number, above=0, below=1),
    *number_rules("orth_reg_weight", is_kind=is_plain_number, least=0),
    Rule("init_lora_weights", is_flag, "True or False"),
    Rule("use_rslora", one_of(False), f"False: the scaling is lora_alpha / (init_r + {RANK_EPS})"),
    Rule("alpha_pattern", operator.not_, "empty: all layers have one lora_alpha"),
    Rule("use_dora", one_of(False), "False: AdaLoRA has no magnitude"),
]


@dataclasses.dataclass
class AdaLoraConfig(LoraConfig):
    """Adaptive rank: dW = s B diag(E) A; training keeps the important triplets (Zhang et al. 2023).

    init_r, target_r    triplets of every layer at the start, and of the average layer at the end
    total_step          steps of the whole training; required, because the schedule depends on it
    tinit, tfinal       number of first steps, in which nothing is cut, and of last steps, in which
                        ranks stay; the budget falls between them, so tinit < total_step - tfinal
    deltaT              steps from one allocation to the next
    beta1, beta2        how slowly the averages of sensitivity and uncertainty forget
    orth_reg_weight     weight of the penalty that keeps A's rows and B's columns orthonormal
    rank_pattern        after pruning, "<layer>.lora_E" -> which of its init_r triplets are left
    init_lora_weights   True: E zero, A and B ~ N(0, 0.02^2); False: all three ~ N(0, 1)

    The other fields are LoraConfig's. s = lora_alpha / (init_r + 1e-5), however many triplets are
    cut. As in PEFT `r` has no effect here: a value other than the default warns. use_rslora,
    alpha_pattern and use_dora have no meaning either: ConfigError.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = None  # type: ignore[assignment]  # PEFT's default, which PEFT refuses
    rank_pattern: dict[str, list[bool]] = dataclasses.field(  # type: ignore[assignment]
        default_factory=dict
    )

    peft_type = "ADALORA"

    def __post_init__(self) -> None:
        masks = self.rank_pattern or {}
        self.rank_pattern = {}  # LoRA's field of this name has another meaning and other rules
        super().__post_init__()
        self.rank_pattern = masks
        check_fields(vars(self), RULES)
        most = self.init_r
        last = self.total_step - self.tfinal
        wanted = (
            f"a dictionary from '<layer>.lora_E' to {most} values True or False, one per triplet"
        )
        rules = [
            Rule("target_r", lambda value: value <= most, f"at most init_r = {most}"),
            Rule("tinit", lambda value: value < last, f"below total_step - tfinal = {last}"),
            Rule("rank_pattern", self._is_rank_pattern, wanted),
        ]
        check_fields(vars(self), rules)
        if self.r != 8:
            warnings.warn(
                f"r = {self.r} has no effect in AdaLoRA; set init_r, the rank at the start",
                stacklevel=3,
            )

    def _is_rank_pattern(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        for key, mask in value.items():
            if not (isinstance(key, str) and key.endswith(".lora_E") and isinstance(mask, list)):
                return False
            if len(mask) != self.init_r or {*map(type, mask)} != {bool}:
                return False
        return True

    def rank(self, name: str) -> int:
        """The number of triplets of the layer `name` at first: init_r, or what pruning left."""
        mask = self.rank_pattern.get(f"{name}.lora_E")
        return self.init_r if mask is None else sum(mask)

    def scaling(self, name: str) -> float:
        """s, equal for all layers. It divides by init_r always: a larger s would undo a cut."""
        return self.lora_alpha / (self.init_r + RANK_EPS)

    def to_dict(self) -> dict[str, Any]:
        """Every field that PEFT 0.21 writes; rank_pattern is null while nothing was cut."""
        return {**super().to_dict(), "rank_pattern": self.rank_pattern or None}


class AdaLoraAdapter(LoraAdapter):
    """The trainable triplets of one layer, lora_A (r, I), lora_E (r, 1) and lora_B (O, r), with s.

    r counts the triplets, `ranknum` those before the first cut, from which s is computed.
    """

    TENSORS = ("lora_A", "lora_E", "lora_B")
    SUFFIX = ""  # in PEFT these are bare parameters
    lora_E: Parameter

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        assert isinstance(config, AdaLoraConfig)
        self.r = config.rank(name)
        self.ranknum = float(config.init_r)
        self.lora_alpha = config.layer_alpha(name)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(config.lora_dropout, stream)
        std = 0.02 if config.init_lora_weights else 1.0
        for tensor, shape in self.shapes(base, self.r).items():
            if tensor == "lora_E" and config.init_lora_weights:
                values = np.zeros(
                    shape, base.dtype
                )  # so the first output is the base's, bit for bit
            else:
                values = normal(rng, std, shape, base.dtype)
            setattr(self, tensor, Parameter(base.backend.from_numpy(values)))
        # The version of lora_E when ranks were last allocated, where that is known.
        self._settled: int | None = None

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, Shape]:
        """The shapes of the trainable tensors of a layer over `base`: r (in + out + 1) numbers."""
        return {"lora_A": (r, base.in_features), "lora_E": (r, 1), "lora_B": (base.out_features, r)}

    @property
    def first_factor(self) -> Tensor:
        """diag(E) A (r, I)"""
        return self.lora_A * self.lora_E

    def factors(self, dtype: Any) -> tuple[Array, Array]:
        """(diag(E) A (r, I), B (O, r)), each tensor converted to `dtype` first."""
        A, B = super().factors(dtype)
        return A * self.lora_E.data.astype(dtype), B

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y plus s B diag(E) A x.    x (..., I), y (..., O) -> (..., O)

        ConfigError if this trains and no RankAllocator allocates its ranks.
        """
        self._require_allocator()
        return super().__call__(x, y, base)

    def write_effective_weight(self, W: Array, base: LinearBase | None = None) -> Formed:
        """Add dW to W (O, I) in place; returns A, E, B and the function of their gradients.

        With P = s B^T G, LoRA's gradient of the first factor diag(E) A, dA = diag(E) P, and dE is
        the sum of P * A over the inputs.
        """
        self._require_allocator()
        a = self.lora_A.data
        e = self.lora_E.data
        pull_factors = self._add_update(W, a * e)

        def pull(X: Array, dY: Array) -> Grads:
            P, dB = pull_factors(X, dY)
            dE = (P * a).sum(axis=1, keepdims=True)
            return P * e, dE, dB  # dA (r, I), dE (r, 1), dB (O, r)

        return (self.lora_A, self.lora_E, self.lora_B), Pull(pull)

    def keep(self, mask: np.ndarray) -> None:
        """Remove every triplet i with mask[i] False from dW: new, smaller parameters."""
        backend = self.lora_E.backend
        rows = backend.from_numpy(np.flatnonzero(mask))
        for name in self.TENSORS:
            before: Parameter = getattr(self, name)
            left = backend.xp.take(before.data, rows, axis=1 if name == "lora_B" else 0)
            setattr(self, name, Parameter(left, before.requires_grad))
        self.r = len(rows)

    def settle(self, known: bool = True) -> None:
        """Take lora_E as allocated: as it is now, or, if not `known`, as it is at the next forward.

        Only a forward pass in training counts.
        """
        assert self.lora_E.version is not None
        self._settled = self.lora_E.version[0] if known else None

    def _require_allocator(self) -> None:
        """ConfigError if lora_E changed without an allocation since the last training forward."""
        if not (self.training and self.lora_E.requires_grad and grad_enabled()):
            return
        if self._settled is None:
            self.settle()
        elif self.lora_E.version is not None and self._settled != self.lora_E.version[0]:
            raise ConfigError(
                "AdaLoRA trains with a RankAllocator, or no rank would ever change: make one by "
                "RankAllocator.of(model), and call its step(grads) after every optimiser step"
            )
