"""Placements, the balancer and its files, as Python has them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import sluice

COUNTS = [800, 10, 10, 10, 10, 10, 10, 10]


def test_a_placement_is_a_value():
    placement = sluice.Placement(3, 2, [0, 1, 2, -1])
    assert (placement.num_experts, placement.num_ranks, placement.num_slots) == (3, 2, 4)
    assert placement.slots_per_rank == 2 and placement.slot_experts == [0, 1, 2, -1]
    assert placement == sluice.Placement(3, 2, [0, 1, 2, -1]) != sluice.Placement(3, 2, [0, 1, 2, 0])
    assert sluice.Placement(3, 2, [0, 1, 2, 0]).slots_of(0) == [0, 3]
    assert sluice.Placement.identity(4, 2) == sluice.Placement.even(4, 2, 4)
    same = {placement: "a", sluice.Placement(3, 2, [0, 1, 2, -1]): "b", sluice.Placement(3, 2, [0, 1, 2, 0]): "c"}
    assert len(same) == 2 and same[placement] == "b"
    assert placement != placement.slot_experts
    assert repr(placement) == "sluice.Placement(3 experts in 4 slots of 2 ranks)"
    for expert in -1, 3:
        with pytest.raises(sluice.Error, match=f"expert {expert} is not in"):
            placement.slots_of(expert)
    with pytest.raises(sluice.Error, match="expert"):
        sluice.Placement(3, 2, [0, 1, 1, -1])


@pytest.mark.parametrize("counts", [COUNTS, tuple(COUNTS), np.array(COUNTS)], ids=["list", "tuple", "numpy"])
def test_the_hot_expert_is_on_every_rank(counts):
    before, after = sluice.Placement.even(8, 4, 12), sluice.balance(counts, 4, 12)
    assert [slot // 3 for slot in after.slots_of(0)] == [0, 1, 2, 3]
    rows = sluice.expected_rows(counts, after)
    assert sum(rows) == sum(COUNTS) and sluice.max_over_mean(rows) < 1.02
    assert sluice.max_over_mean(sluice.expected_rows(counts, before)) > 3.7
    assert sluice.balance(counts, 4, 12, previous=after) == after
    assert sluice.count_moves(after, after) == 0 < sluice.count_moves(before, after)
    now, parts = before, 0
    while now != after:
        now, parts = sluice.placement_toward(now, after, 1), parts + 1
    assert parts > 1


def test_hosts_keep_groups_together():
    after = sluice.balance(range(16), 4, 24, hosts=2, groups=4)
    host_of = {group: {slot // 12 for e in range(4 * group, 4 * group + 4) for slot in after.slots_of(e)}
               for group in range(4)}
    assert all(len(hosts) == 1 for hosts in host_of.values())


def test_refusals_name_the_field():
    for arguments, message in (((COUNTS, 4, 10), "10 slots are no multiple of 4 ranks"),
                               ((COUNTS, 0, 8), "0 ranks are not in"), ((COUNTS, 4, -2), "-2 slots are fewer than 8 experts"),
                               (([1, -1], 1, 2), "expert 1 has -1 rows")):
        with pytest.raises(sluice.Error, match=message) as error:
            sluice.balance(*arguments)
        assert error.value.code == "invalid_argument"
    with pytest.raises(sluice.Error, match="3 hosts do not divide 4 ranks"):
        sluice.balance(COUNTS, 4, 8, hosts=3)
    with pytest.raises(TypeError):
        sluice.balance(COUNTS, 4, 8, 2)


@pytest.mark.parametrize("as_path", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
def test_files(tmp_path, as_path):
    path = as_path(tmp_path / "file.json")
    placements = {3: sluice.balance(COUNTS, 4, 12), 11: sluice.Placement.even(8, 4, 12)}
    sluice.write_placements(path, placements)
    assert sluice.read_placements(path) == placements
    text = json.loads((tmp_path / "file.json").read_text())
    assert text["layers"][1] == {"layer": 11, "slot_experts": [0, 1, None, 2, 3, None, 4, 5, None, 6, 7, None]}
    rows = {3: [COUNTS, COUNTS[::-1]]}
    sluice.write_expert_rows(path, rows)
    assert sluice.read_expert_rows(path) == rows
    with pytest.raises(sluice.Error, match="sluice-placement") as error:
        sluice.read_placements(path)
    assert error.value.code == "unsupported"
    with pytest.raises(sluice.Error, match="layers is empty"):
        sluice.write_expert_rows(path, {})
    for layer in -1, 100001:
        for write, value in ((sluice.write_expert_rows, [COUNTS]), (sluice.write_placements, placements[3])):
            with pytest.raises(sluice.Error, match=rf"layer {layer} is not in \[0, 100000\]") as error:
                write(path, {layer: value})
            assert error.value.code == "invalid_argument"
    assert sluice.read_expert_rows(path) == rows
