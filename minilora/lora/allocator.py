"""AdaLoRA's rank allocator: which singular triplets are worth keeping (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients, namespace, record
from ..backend import Array
from ..errors import CheckpointError, ConfigError
from ..nn import Parameter
from .adalora import AdaLoraAdapter, AdaLoraConfig


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of |A A^T - I| and |B^T B - I| over all pairs A (r, I), B (O, r) -> scalar    Zhang et al. 2023, eq. (4)

    |.| is Frobenius' norm, not squared as in the paper: PEFT's. d|M| / dA = 2 M A / |M| for M = A A^T - I, and 0 where
    A's rows are orthonormal.
    """
    inputs = tuple(f for pair in factors for f in pair)
    xp = namespace(*inputs)
    rows = [
        f.data if i % 2 == 0 else f.data.T for i, f in enumerate(inputs)
    ]  # all (r, n): B counts by its columns
    gaps = [M @ M.T - xp.eye(len(M), dtype=M.dtype) for M in rows]  # (r, r)
    norms = [xp.sqrt((gap * gap).sum()) for gap in gaps]
    count, tiny = len(inputs), [float(np.finfo(M.dtype).tiny) for M in rows]

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        scales = [
            dy * (2 / count) / xp.maximum(norm, least)
            for norm, least in zip(norms, tiny, strict=True)
        ]
        found = [(gap @ M) * scale for gap, M, scale in zip(gaps, rows, scales, strict=True)]
        return tuple(g if i % 2 == 0 else g.T for i, g in enumerate(found))

    return record(sum(norms) / count, inputs, vjp)


class RankAllocator:
    """Cuts what matters least, as a budget falls: Zhang et al. 2023, sections 3.2 and 3.3, algorithm 1.

    adapters   what it cuts, by the name of the layer
    config     theirs; `prune` writes its rank_pattern

    Sensitivity I = |w dL/dw| is smoothed, and so is how far it strays: for every number w of A, E and B

        I' <- beta1 I' + (1 - beta1) I        U' <- beta2 U' + (1 - beta2) |I - I'|        s(w) = I' U'

    and triplet i is worth S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). At an allocation after step t the b(t) best
    of all layers stay; of the others E becomes 0, and may grow again until the next. From step total_step - tfinal on
    the choice is final. One `step` goes with each step of the optimiser; they count from 1, so that a run with
    tfinal = 0 ends within its budget, too.
    """

    def __init__(self, adapters: Mapping[str, AdaLoraAdapter], config: AdaLoraConfig):
        if not adapters:
            raise ConfigError("there is no AdaLoRA layer to allocate ranks to")
        self.adapters, self.config = dict(adapters), config
        self.steps = 0
        self.final_step = config.total_step - config.tfinal  # of the last allocation
        self.initial = sum(a.r for a in adapters.values())  # b(0), in triplets of all layers
        self.target = min(config.target_r * len(adapters), self.initial)
        self._begin()

    @classmethod
    def of(cls, model: Any, adapter_name: str | None = None) -> RankAllocator:
        """For an adapter (the active one) of a PeftModel. ConfigError unless it is AdaLoRA's."""
        name = model.active_adapter if adapter_name is None else adapter_name
        config = model.peft_config.get(name)
        if not isinstance(config, AdaLoraConfig):
            there = ", ".join(f"{n} ({c.peft_type})" for n, c in model.peft_config.items())
            raise ConfigError(
                f"only an ADALORA adapter has ranks to allocate, {name!r:.99} is none: there is {there}"
            )
        end, modules = f".adapters.{name}", model.get_base_model().named_modules()
        return cls({p.removesuffix(end): m for p, m in modules if p.endswith(end)}, config)

    def _begin(self) -> None:
        """Nothing observed, everything kept, weights taken as they are."""
        xp, size = self._xp, sum(p.size for p in self.params)
        self.sensitivity, self.uncertainty = (
            xp.zeros(size, self.params[0].dtype) for _ in range(2)
        )
        self._choose(np.ones(sum(a.r for a in self.adapters.values()), bool))
        for adapter in self.adapters.values():
            adapter.settle(known=False)

    @property
    def params(self) -> list[Parameter]:
        """A, E and B of every layer in turn: the order that `step(grads)` expects."""
        return [getattr(a, name) for a in self.adapters.values() for name in AdaLoraAdapter.TENSORS]

    @property
    def ranks(self) -> dict[str, int]:
        """How many triplets of each layer the last allocation kept."""
        return {layer: int(kept.sum()) for layer, kept in self._by_layer(self.kept)}

    def budget(self, t: int) -> int:
        """b(t), how many triplets may stay after step t: all, then fewer by a cubic, then target_r a layer."""
        tinit = self.config.tinit
        left = min(
            1.0, max(0.0, 1 - (t - tinit) / (self.final_step - tinit))
        )  # of the time in which it falls
        return int((self.initial - self.target) * left**3 + self.target)

    def penalty(self) -> tuple[Array, list[Array | None]]:
        """(orth_reg_weight times `orthogonality`, its gradients along `params`): a term of the weights alone.

        Add the gradients once a step, before they are clipped. The value is a float64 scalar where the weights are.
        """
        total = orthogonality([(a.lora_A, a.lora_B) for a in self.adapters.values()])
        weight = total.backend.xp.full((), self.config.orth_reg_weight, total.dtype)
        return (total.data * weight).astype(np.float64), gradients(total, self.params, weight)

    def importance(self) -> Array:
        """S of every triplet, layer after layer: (sum r,)"""
        score, found, at = self.sensitivity * self.uncertainty, [], 0
        for adapter in self.adapters.values():
            parts = []
            for name in adapter.TENSORS:
                p: Parameter = getattr(adapter, name)
                parts.append(score[at : at + p.size].reshape(p.shape))
                at += p.size
            A, E, B = parts
            found.append(E[:, 0] + (A.mean(axis=1) + B.mean(axis=0)))
        return self._xp.concatenate(found)

    def step(self, grads: Sequence[Array | None]) -> None:
        """Call it after each step of the optimiser, with the gradients along `params` that the optimiser had.

        They are held against the weights as they are now, as in PEFT. None, for what took no part, counts as zero.
        ConfigError if their shapes are not those of `params`; nothing changes then.
        """
        params, c, xp = self.params, self.config, self._xp
        pairs = [
            (p.data, xp.zeros_like(p.data) if g is None else g)
            for p, g in zip(params, grads, strict=False)
        ]
        if len(grads) != len(params) or any(p.shape != g.shape for p, g in pairs):
            raise ConfigError(
                f"{len(grads)} gradients do not fit the {len(params)} parameters in number or in shape"
            )
        self.steps += 1
        t, end = self.steps, self.final_step
        if t < end:
            w, g = (
                xp.concatenate([a.reshape(-1) for a in side]) for side in zip(*pairs, strict=True)
            )
            now = xp.abs(w * g.astype(w.dtype))
            self.sensitivity = c.beta1 * self.sensitivity + (1 - c.beta1) * now
            self.uncertainty = c.beta2 * self.uncertainty + (1 - c.beta2) * xp.abs(
                now - self.sensitivity
            )
        due = t == end or (c.tinit < t < end and t % c.deltaT == 0)
        if due:
            cut = self.initial - self.budget(t)
            kept = xp.ones(self.initial, bool)
            kept[xp.argsort(self.importance(), kind="stable")[:cut]] = (
                False  # of equals the first goes first
            )
            self._choose(self.params[0].backend.to_numpy(kept))
        if due or t > end:
            for adapter, (_, mask) in zip(
                self.adapters.values(), self._by_layer(self._mask), strict=True
            ):
                adapter.lora_E.data = xp.where(mask.reshape(-1, 1), adapter.lora_E.data, 0)
        for adapter in self.adapters.values():
            adapter.settle()

    def prune(self) -> None:
        """Cut out for good what the final choice leaves at zero, and say so in config.rank_pattern, as in PEFT's files.

        The parameters are new ones then. ConfigError before the choice is final.
        """
        if self.steps < self.final_step:
            raise ConfigError(
                f"ranks are final after step {self.final_step}, this is step {self.steps}"
            )
        pattern, r = {}, self.config.init_r
        for layer, kept in self._by_layer(self.kept):
            left = iter(kept.tolist())  # of those that an earlier pruning left, where there was one
            key = f"{layer}.lora_E"
            pattern[key] = [
                was and next(left) for was in self.config.rank_pattern.get(key, [True] * r)
            ]
            self.adapters[layer].keep(kept)
        self.config.rank_pattern = pattern
        self._begin()

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers): copies of all that the next steps depend on besides the weights."""
        to_numpy = self.params[0].backend.to_numpy
        arrays = {
            name: np.array(to_numpy(getattr(self, name))) for name in ("sensitivity", "uncertainty")
        }
        return {**arrays, "kept": self.kept.copy()}, {"steps": self.steps}

    def load_state_dict(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with the weights of that moment. CheckpointError if it is another's."""
        now, steps = self.state_dict()[0], numbers.get("steps")
        here, there = (
            {k: f"{a.dtype} {a.shape}" for k, a in side.items()} for side in (now, arrays)
        )
        if here != there or type(steps) is not int or steps < 0:
            raise CheckpointError(
                f"the allocator's state should be {here} and steps, got {there} and {steps!r:.40}"
            )
        from_numpy = self.params[0].backend.from_numpy
        self.steps = steps
        self.sensitivity, self.uncertainty = (
            from_numpy(arrays[k].copy()) for k in ("sensitivity", "uncertainty")
        )
        self._choose(arrays["kept"].copy())
        for adapter in self.adapters.values():
            adapter.settle(known=False)

    def _choose(self, kept: np.ndarray) -> None:
        self.kept, self._mask = (
            kept,
            self.params[0].backend.from_numpy(kept),
        )  # (sum r,) on the host, and there

    def _by_layer(self, each: Array) -> list[tuple[str, Array]]:
        """(layer, its part) of an array with an entry for every triplet."""
        ends = np.cumsum([a.r for a in self.adapters.values()]).tolist()
        return [
            (name, each[end - a.r : end])
            for (name, a), end in zip(self.adapters.items(), ends, strict=True)
        ]

    @property
    def _xp(self) -> Any:
        return self.params[0].backend.xp
