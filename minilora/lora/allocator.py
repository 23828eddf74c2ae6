"""AdaLoRA's rank allocator: which singular triplets to keep (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients, namespace, record
from ..backend import Array, Backend
from ..errors import CheckpointError, ConfigError
from ..functional import Grads
from ..nn import Parameter
from .adalora import AdaLoraAdapter, AdaLoraConfig

AVERAGES = ("sensitivity", "uncertainty")


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of |A A^T - I| and |B^T B - I| over all pairs A (r, I), B (O, r) -> scalar

    Zhang et al. 2023, eq. (4). |.| is the Frobenius norm, as in PEFT; the paper squares it.
    d|M| / dA = 2 M A / |M| for M = A A^T - I, and 0 where A's rows are orthonormal.
    """
    inputs = tuple(factor for pair in factors for factor in pair)
    xp = namespace(*inputs)
    backend = inputs[0].backend
    matrices = []  # A and B^T of each pair, all (r, n)
    for A, B in factors:
        matrices += [A.data, B.data.T]
    gaps = []
    norms = []
    for M in matrices:
        gap = backend.matmul(M, M.T) - xp.eye(len(M), dtype=M.dtype)  # (r, r)
        gaps.append(gap)
        norms.append(xp.sqrt((gap * gap).sum()))
    count = len(matrices)

    def vjp(dy: Array) -> Grads:
        slopes = []
        for M, gap, norm in zip(matrices, gaps, norms, strict=True):
            least = float(np.finfo(M.dtype).tiny)
            scale = dy * (2 / count) / xp.maximum(norm, least)
            slopes.append(backend.matmul(gap, M) * scale)
        slopes[1::2] = [slope.T for slope in slopes[1::2]]  # of B, not of B^T
        return tuple(slopes)

    return record(sum(norms) / count, inputs, vjp)


class RankAllocator:
    """Cuts the least important triplets while a budget falls (Zhang et al. 2023, algorithm 1).

    adapters   the adapters to cut, by layer name
    config     their configuration; `prune` writes its rank_pattern

    Sections 3.2 and 3.3: for every number w of A, E and B the sensitivity I = |w dL/dw| is
    smoothed, and so is its distance from the smoothed value,

        I' <- beta1 I' + (1 - beta1) I    U' <- beta2 U' + (1 - beta2) |I - I'|    s(w) = I' U'

    and the importance of triplet i is S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). An allocation
    after step t keeps the b(t) best triplets of all layers. E becomes 0 in the others, and may grow
    again until the next allocation. From step total_step - tfinal on the choice is final. Each step
    of the optimiser needs one `step`; steps count from 1, so a run with tfinal = 0 also ends within
    its budget.
    """

    _mask: Array | None = None  # `kept` on the device

    def __init__(self, adapters: Mapping[str, AdaLoraAdapter], config: AdaLoraConfig):
        if not adapters:
            raise ConfigError("no AdaLoRA layer was given: a RankAllocator needs at least one")
        self.adapters = dict(adapters)
        self.config = config
        self.steps = 0
        self.final_step = config.total_step - config.tfinal  # of the last allocation
        self.initial = sum(adapter.r for adapter in adapters.values())  # b(0), over all layers
        self.target = min(config.target_r * len(adapters), self.initial)
        self._begin()

    @classmethod
    def of(cls, model: Any, adapter_name: str | None = None) -> RankAllocator:
        """The allocator of a PeftModel's adapter (the active one). ConfigError if not AdaLoRA's."""
        name = model.active_adapter if adapter_name is None else adapter_name
        config = model.peft_config.get(name)
        if not isinstance(config, AdaLoraConfig):
            present = ", ".join(f"{n} ({c.peft_type})" for n, c in model.peft_config.items())
            raise ConfigError(
                f"{name!r:.99} is not an ADALORA adapter, and only these have ranks to allocate; "
                f"the model has {present}"
            )
        end = f".adapters.{name}"
        modules = model.get_base_model().named_modules()
        adapters = {path.removesuffix(end): m for path, m in modules if path.endswith(end)}
        return cls(adapters, config)

    def _begin(self) -> None:
        """Start with nothing observed and every triplet kept; the weights count as allocated."""
        xp = self._backend.xp
        size = sum(p.size for p in self.params)
        dtype = self.params[0].dtype
        self.sensitivity = xp.zeros(size, dtype)
        self.uncertainty = xp.zeros(size, dtype)
        self._choose(np.ones(sum(adapter.r for adapter in self.adapters.values()), bool))
        self.settle(known=False)

    @property
    def params(self) -> list[Parameter]:
        """A, E and B of each layer in turn: the order that `step(grads)` expects."""
        return [getattr(a, name) for a in self.adapters.values() for name in AdaLoraAdapter.TENSORS]

    @property
    def ranks(self) -> dict[str, int]:
        """The number of triplets that the last allocation kept, by layer."""
        return {layer: int(mask.sum()) for layer, mask in self._by_layer(self.kept).items()}

    def budget(self, t: int) -> int:
        """b(t), the triplets that stay after step t: all, then a cubic, then target_r per layer."""
        tinit = self.config.tinit
        left = 1 - (t - tinit) / (self.final_step - tinit)  # of the time in which the budget falls
        left = min(1.0, max(0.0, left))
        return int((self.initial - self.target) * left**3 + self.target)

    def penalty(self) -> tuple[Array, list[Array | None]]:
        """(orth_reg_weight times `orthogonality`, its gradients along `params`): of weights alone.

        Add the gradients once per step, before they are clipped. The value is a float64 scalar on
        the device of the weights.
        """
        total = orthogonality([(a.lora_A, a.lora_B) for a in self.adapters.values()])
        weight = total.backend.xp.full((), self.config.orth_reg_weight, total.dtype)
        return (total.data * weight).astype(np.float64), gradients(total, self.params, weight)

    def importance(self) -> Array:
        """S of every triplet, layer after layer: (sum r,)"""
        score = self.sensitivity * self.uncertainty
        totals = []
        start = 0
        for adapter in self.adapters.values():
            scores = []
            for name in adapter.TENSORS:
                p: Parameter = getattr(adapter, name)
                scores.append(score[start : start + p.size].reshape(p.shape))
                start += p.size
            A, E, B = scores
            totals.append(E[:, 0] + (A.mean(axis=1) + B.mean(axis=0)))
        return self._backend.xp.concatenate(totals)

    def step(self, grads: Sequence[Array | None]) -> None:
        """Observe the gradients and allocate: call it after each step of the optimiser.

        grads   the optimiser's gradients, along `params`; None, for what took no part, counts as
                zero. As in PEFT they meet the weights as they are now

        ConfigError if the shapes are not those of `params`; nothing changes then.
        """
        slopes = self._slopes(grads)
        xp = self._backend.xp
        t = self.steps + 1
        if t < self.final_step:
            self._observe(slopes)
        if self.allocates_next:
            cut = self.initial - self.budget(t)
            mask = xp.ones(self.initial, bool)
            # Among equals, the first is cut first.
            mask[xp.argsort(self.importance(), kind="stable")[:cut]] = False
            self._choose(self._backend.to_numpy(mask))
        if self.allocates_next or t > self.final_step:
            self._cut()
        self.count_step()

    @property
    def allocates_next(self) -> bool:
        """Does the next step choose which triplets are kept?"""
        t = self.steps + 1
        end = self.final_step
        return t == end or (self.config.tinit < t < end and t % self.config.deltaT == 0)

    def step_on_device(self, grads: Sequence[Array | None], check: Array) -> None:
        """`step`, apart from `count_step`, where nothing is allocated: for a captured step.

        check   a scalar on the device: unless it is finite, nothing changes
        """
        slopes = self._slopes(grads)
        if self.steps + 1 < self.final_step:
            self._observe(slopes, check)
        else:
            self._cut()

    def count_step(self) -> None:
        """Take the step as done, and the weights as allocated."""
        self.steps += 1
        self.settle()

    def _slopes(self, grads: Sequence[Array | None]) -> list[Array]:
        """The gradients along `params`, zeros for None. ConfigError for shapes that do not fit."""
        params = self.params
        xp = self._backend.xp
        pairs = zip(params, grads, strict=False)
        slopes = [xp.zeros_like(p.data) if g is None else g for p, g in pairs]
        if len(grads) != len(params) or [p.shape for p in params] != [g.shape for g in slopes]:
            raise ConfigError(
                f"{len(grads)} gradients do not fit the {len(params)} parameters in number or in "
                "shape: give one per tensor of RankAllocator.params"
            )
        return slopes

    def _cut(self) -> None:
        """Set E to zero for the triplets that are not kept."""
        xp = self._backend.xp
        for layer, mask in self._by_layer(self._mask).items():
            E = self.adapters[layer].lora_E
            E.data = xp.where(mask.reshape(-1, 1), E.data, 0)

    def _observe(self, grads: Sequence[Array], check: Array | None = None) -> None:
        """Average the sensitivity of every number, and its distance from the average."""
        xp = self._backend.xp
        beta1 = self.config.beta1
        beta2 = self.config.beta2
        w = self._backend.join([p.data for p in self.params])
        g = self._backend.join([grad.astype(w.dtype, copy=False) for grad in grads])
        now = xp.abs(w * g)
        sensitivity = beta1 * self.sensitivity + (1 - beta1) * now
        distance = xp.abs(now - sensitivity)
        uncertainty = beta2 * self.uncertainty + (1 - beta2) * distance
        if check is not None:
            sensitivity = xp.where(xp.isfinite(check), sensitivity, self.sensitivity)
            uncertainty = xp.where(xp.isfinite(check), uncertainty, self.uncertainty)
        self.sensitivity[...] = sensitivity
        self.uncertainty[...] = uncertainty

    def prune(self) -> None:
        """Remove for good what the final choice set to zero, and write it to config.rank_pattern.

        The parameters are new ones afterwards; the pattern is as in PEFT's files. ConfigError
        before the choice is final.
        """
        if self.steps < self.final_step:
            raise ConfigError(
                f"ranks are final after step {self.final_step}, this is step {self.steps}: "
                "prune afterwards"
            )
        pattern = {}
        for layer, mask in self._by_layer(self.kept).items():
            key = f"{layer}.lora_E"
            before = self.config.rank_pattern.get(key, [True] * self.config.init_r)
            left = iter(mask.tolist())  # one value per triplet that an earlier pruning left
            pattern[key] = [was_kept and next(left) for was_kept in before]
            self.adapters[layer].keep(mask)
        self.config.rank_pattern = pattern
        self._begin()

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers): copies of all that the next steps depend on besides the weights."""
        to_numpy = self._backend.to_numpy
        arrays = {name: np.array(to_numpy(getattr(self, name))) for name in AVERAGES}
        return {**arrays, "kept": self.kept.copy()}, {"steps": self.steps}

    def load_state_dict(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with the weights of that moment.

        CheckpointError if it does not fit.
        """
        steps = numbers.get("steps")
        expected = _describe(self.state_dict()[0])
        given = _describe(arrays)
        if given != expected or type(steps) is not int or steps < 0:
            raise CheckpointError(
                f"the allocator's state must be {expected} and the number of steps, "
                f"got {given} and {steps!r:.40}"
            )
        self.steps = steps
        for name in AVERAGES:
            setattr(self, name, self._backend.from_numpy(arrays[name].copy()))
        self._choose(arrays["kept"].copy())
        self.settle(known=False)

    def settle(self, known: bool = True) -> None:
        """See `AdaLoraAdapter.settle`."""
        for adapter in self.adapters.values():
            adapter.settle(known)

    def _choose(self, mask: np.ndarray) -> None:
        self.kept = mask  # (sum r,) on the host
        on_device = self._backend.from_numpy(mask)
        if self._mask is None or self._mask.shape != mask.shape:
            self._mask = on_device.copy()
        else:
            self._mask[...] = on_device  # in place: a captured step reads this memory

    def _by_layer(self, values: Array) -> dict[str, Array]:
        """The part of each layer, by name, of an array with one entry per triplet."""
        parts = {}
        start = 0
        for layer, adapter in self.adapters.items():
            parts[layer] = values[start : start + adapter.r]
            start += adapter.r
        return parts

    @property
    def _backend(self) -> Backend:
        return self.params[0].backend


def _describe(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
