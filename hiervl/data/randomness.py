"""Counter-based random numbers.

Every random draw in the data layer depends only on its address (seed, iteration,
slot, stream). It does not depend on the worker that makes it, the number of GPUs
or earlier draws. A run resumed at iteration i therefore sees exactly the data
that an uninterrupted run would have seen.
"""

import zlib

import numpy as np

_UINT64 = (1 << 64) - 1


def rng(seed: int, iteration: int, slot: int, stream: str) -> np.random.Generator:
    """Returns the generator for one address.

    Philox is counter-based: its state *is* a key and a counter. Seed and stream
    form the key; iteration and slot form the upper words of the counter. Each
    address thus has its own 2**64 blocks that no other address can reach, and
    creating a generator takes only microseconds.

    Args:
        seed: the run's seed, >= 0.
        iteration: training iteration, epoch or image number, >= 0.
        slot: position in the *global* batch (over all ranks), >= 0.
        stream: what the numbers are used for, such as ``"labeled/crop"``.

    Raises:
        ValueError: seed, iteration or slot is negative.
    """
    if min(seed, iteration, slot) < 0:
        raise ValueError(f"negative address: seed {seed}, iteration {iteration}, slot {slot}")
    # Unlike hash(), crc32 gives the same value in every process and on every machine.
    key = [seed & _UINT64, zlib.crc32(stream.encode())]
    counter = [0, slot, iteration, 0]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))
