"""Random numbers with an address.

Every random draw of the data layer is a function of (seed, iteration, slot,
stream) and of nothing else: not of the worker that makes it, of the number of
GPUs, or of what was drawn before. A run resumed at iteration i therefore sees
exactly the data that an uninterrupted run would have seen.
"""

import zlib

import numpy as np

_UINT64 = (1 << 64) - 1


def rng(seed: int, iteration: int, slot: int, stream: str) -> np.random.Generator:
    """Generator for one address.

    Philox is counter-based: its state *is* a key and a counter. Seed and stream
    are the key, iteration and slot the upper words of the counter, so that two
    addresses never share a number (each has 2**64 blocks of its own) and making
    a generator costs microseconds.

    Args:
        seed: the run's seed, >= 0.
        iteration: training iteration, epoch or image number, >= 0.
        slot: position in the *global* batch (over all ranks), >= 0.
        stream: what the numbers are for, such as ``"labeled/crop"``.
    """
    if min(seed, iteration, slot) < 0:
        raise ValueError(f"negative address: seed {seed}, iteration {iteration}, slot {slot}")
    # crc32, unlike hash(), is the same in every process and on every machine.
    key = [seed & _UINT64, zlib.crc32(stream.encode())]
    counter = [0, slot, iteration, 0]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))
