"""The weights of the evaluation with the lowest held-out loss, in memory and in checkpoints.

Each checkpoint has its own copy, so that a run that is resumed from any of them ends with the bits
of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..formats import load_file
from ..lora import RankAllocator
from ..nn import Parameter

WEIGHTS_FILE = "best.safetensors"
RANKS_FILE = "best_allocator.safetensors"


@dataclass(frozen=True)
class Best:
    """A copy on the host of what a run saves, as it was after a step.

    weights          arrays by the names of the parameters
    ranks, numbers   the state of AdaLoRA's allocator; empty without one
    """

    step: int
    loss: float
    weights: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    numbers: dict[str, Any]

    @classmethod
    def of(
        cls,
        step: int,
        loss: float,
        parameters: Mapping[str, Parameter],
        allocator: RankAllocator | None,
    ) -> Best:
        """A copy of the weights as they are now."""
        weights = {}
        for name, p in parameters.items():
            weights[name] = np.array(p.backend.to_numpy(p.data))
        ranks, numbers = allocator.state_dict() if allocator else ({}, {})
        return cls(step, loss, weights, ranks, numbers)

    @classmethod
    def read(
        cls,
        folder: Path,
        fields: list[Any],
        parameters: Mapping[str, Parameter],
        has_allocator: bool,
    ) -> Best:
        """The copy in a checkpoint. CheckpointError if it has other parameters.

        fields   as `state` has them; ValueError or TypeError for others
        """
        step, loss, numbers = fields
        weights = load_file(folder / WEIGHTS_FILE)
        expected = {name: p.shape for name, p in parameters.items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise CheckpointError(
                f"{str(folder)!r}: {WEIGHTS_FILE} has other parameters than the model: "
                "resume from another checkpoint"
            )
        ranks = load_file(folder / RANKS_FILE) if has_allocator else {}
        return cls(int(step), float(loss), weights, ranks, dict(numbers))

    @property
    def files(self) -> dict[str, dict[str, np.ndarray]]:
        """The arrays by the files of a checkpoint."""
        files = {WEIGHTS_FILE: self.weights}
        if self.ranks:
            files[RANKS_FILE] = self.ranks
        return files

    @property
    def state(self) -> list[Any]:
        """What a checkpoint has beside the files, as JSON."""
        return [self.step, self.loss, self.numbers]

    def restore(self, parameters: Mapping[str, Parameter], allocator: RankAllocator | None) -> None:
        """Give the parameters, and the allocator, the values of the copy."""
        for name, p in parameters.items():
            p.data = p.backend.from_numpy(self.weights[name])
        if allocator is not None:
            allocator.load_state_dict(self.ranks, self.numbers)
