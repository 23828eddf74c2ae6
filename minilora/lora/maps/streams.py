"""The random numbers of torch's CPU generator, bit for bit: the Mersenne Twister MT19937.

PEFT's VeRA and FourierFT write a seed to their files in the place of numbers or positions.
"""

from __future__ import annotations

import numpy as np

from ...backend import Array
from ...errors import ConfigError

MOST = (2**32 - 1) // 20  # torch permutes more numbers than this in another way


def torch_words(seed: int, count: int) -> Array:
    """The first `count` 32-bit words of torch.Generator().manual_seed(seed)."""
    generator = np.random.RandomState(seed % 2**32)  # seeds as init_genrand does
    return generator.randint(0, 2**32, count, np.uint32)


def torch_uniform(words: Array, bound: float) -> Array:
    """Tensor.uniform_(-bound, bound) in float32, one number for each word.

    f (to - from) + from, with f the word's low 24 bits as a fraction, in float32 with one rounding:
    in float64 the product is exact.
    """
    low = float(np.float32(-bound))
    width = float(np.float32(np.float32(bound) - np.float32(-bound)))
    fractions = (words & np.uint32(2**24 - 1)).astype(np.float64) * 2.0**-24
    return (fractions * width + low).astype(np.float32)


def torch_permutation(seed: int, size: int, count: int) -> Array:
    """The first `count` of torch.randperm(size) by this seed: swaps of position i with a later one.

    ConfigError for more than MOST numbers.
    """
    if size >= MOST:
        raise ConfigError(
            f"a random permutation of {size} positions: torch's is known here for fewer than "
            f"{MOST}; leave the layer out of target_modules"
        )
    moved: dict[int, int] = {}  # what was swapped away from the first positions
    chosen = []
    for i, word in enumerate(torch_words(seed, count).tolist()):
        at = i + word % (size - i)
        chosen.append(moved.get(at, at))
        moved[at] = moved.get(i, i)
    return np.array(chosen, np.int64)
