"""Which unlabeled images are mixed with which: CutMix partners among the slots of a global batch.

Slots are paired (0, 1), (2, 3), ...; in an odd batch the last slot uses the one before it. Each process has a block of
consecutive slots, so a partner is its own, or a neighbor's.
"""


def partner_of(slot: int, total: int) -> int:
    """The slot that provides the CutMix box for `slot`, in a batch of `total` slots; itself in a batch of one."""
    partner = slot ^ 1
    return partner if partner < total else max(0, slot - 1)


def slots_of(rank: int, world_size: int, total: int) -> range:
    """The block of slots of a process."""
    per_rank = total // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)


def remote_partners(rank: int, world_size: int, total: int) -> list[int]:
    """Partners of a process's slots that belong to other processes, in ascending order."""
    slots = slots_of(rank, world_size, total)
    return sorted({partner_of(slot, total) for slot in slots} - set(slots))
