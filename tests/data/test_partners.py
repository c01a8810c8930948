"""CutMix partners over processes: everybody's partner is somebody else, and at most a neighbor's."""

import pytest

from hiervl.data.partners import partner_of, remote_partners, slots_of


@pytest.mark.parametrize("total", range(1, 13))
def test_every_slot_has_another_slot_as_its_partner(total):
    for slot in range(total):
        partner = partner_of(slot, total)
        assert 0 <= partner < total and (partner != slot or total == 1)
        assert total % 2 or partner_of(partner, total) == slot


@pytest.mark.parametrize("world_size, per_rank", [(1, 5), (2, 1), (2, 3), (3, 1), (4, 2), (5, 3)])
def test_remote_partners_are_the_partners_that_a_process_lacks(world_size, per_rank):
    total, blocks = world_size * per_rank, []
    for rank in range(world_size):
        slots, remote = slots_of(rank, world_size, total), remote_partners(rank, world_size, total)
        blocks += slots
        assert {partner_of(slot, total) for slot in slots} <= {*slots, *remote}
        assert not set(remote) & set(slots) and remote == sorted(remote) and len(remote) <= 2
        assert per_rank % 2 or not remote  # blocks of even length keep their pairs
    assert blocks == list(range(total))
