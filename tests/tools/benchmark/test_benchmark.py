"""The benchmark's own arithmetic: what it counts, and that what it compares does the same work."""

import argparse

import numpy as np
import pytest
import torch

from hiervl.evaluation import ConfusionMatrix
from hiervl.losses.matcher import HungarianMatcher


def test_ratios_are_taken_round_by_round():
    from tools.benchmark import common

    assert common.median_ratio([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == 2.0
    assert common.median_ms([0.001, 0.5, 0.002]) == 2.0
    calls = []
    wall, cpu = common.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and len(wall["a"]) == len(cpu["b"]) == 2


def test_table():
    from tools.benchmark import tables

    rows = [{"name": "x", "ms": 1.23456}, {"name": "y", "ms": 1234.5}]
    assert tables.markdown_table(rows).splitlines() == ["| name | ms |", "|---|---|", "| x | 1.23 |", "| y | 1234 |"]
    assert tables.markdown_table([{"either": "1|2"}]).splitlines()[2] == r"| 1\|2 |"


def test_operations_and_bytes():
    from tools.benchmark.roofline import Traffic

    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)
    with Traffic(copy_rate=1e9, gemm_rate=1e9) as traffic:
        (a.t().t() @ b).sum().backward()
    row = traffic.rows["aten.mm"]
    assert row[:2] == [2, 2 * 2 * 4 * 5 * 6]  # forward, and the gradient of a
    assert row[2] == 4 * (20 + 30 + 24) + 4 * (20 + 30 + 1)  # the gradient of a sum is one number, expanded
    assert row[3] == pytest.approx(max(240e-9, 296e-9) + 240e-9)
    assert "aten.t" not in traffic.rows


def test_an_expanded_array_is_read_once():
    from tools.benchmark.roofline import Traffic

    with Traffic(1e9, 1e9) as traffic:
        torch.ones(1, 8).expand(100, 8) + torch.ones(100, 8)
    assert traffic.rows["aten.add"][2] == 4 * (8 + 800 + 800)


def test_the_matcher_per_image_finds_the_same_pairs():
    from tools.benchmark.models import PerImageMatcher

    torch.manual_seed(0)
    own = HungarianMatcher(2.0, 5.0, 5.0)
    segments = torch.randint(-1, 3, (2, 50))
    arguments = (
        torch.randn(3, 2, 6, 5),
        3 * torch.randn(3, 2, 6, 50),
        segments,
        (segments >= 0).float(),
        [torch.tensor([0, 2, 3]), torch.tensor([1, 2, 2])],
    )
    matches = [matcher(*arguments) for matcher in (own, PerImageMatcher(own))]
    pairs = [list(zip(*(x.tolist() for x in found[:4]))) for found in matches]
    assert set(pairs[0]) == set(pairs[1]) and len(pairs[0]) == 3 * 2 * 3
    assert matches[0].counts == matches[1].counts == [3 * 3, 3 * 3]
    assert [image for _, image, *_ in pairs[1]] == 9 * [0] + 9 * [1]  # the criterion splits them by image


def test_both_paths_do_the_same_work():
    from tools.benchmark.models import Bench

    bench = Bench("camvid_23", size=64, batch=1)
    losses, matcher = [], bench.model.criterion.matcher
    bench.model.register_forward_hook(lambda module, inputs, output: losses.append(output))
    weights = {name: value.clone() for name, value in bench.model.state_dict().items()}
    for step in (bench.step, bench.grid_sample_step, bench.reference_step):
        bench.model.load_state_dict(weights)
        torch.manual_seed(0)
        step()
    assert bench.model.criterion.matcher is matcher
    for name, value in losses[0].items():
        for other in losses[1:]:
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)
    scores = bench.grid_sample_predict()
    assert scores.shape == (11, 64, 64) and len(losses) == 3
    torch.testing.assert_close(bench.reference_predict(), scores, rtol=1e-3, atol=1e-4)


def test_the_parts_of_a_step_add_up_to_a_step():
    from tools.benchmark import step
    from tools.benchmark.models import Bench

    bench = Bench("camvid_23", size=64, batch=1)
    before = {name: value.clone() for name, value in bench.model.named_parameters()}
    times = step._one_step(bench)
    assert {"forward: backbone", "forward: criterion", "forward: rest", "backward", "clipping, AdamW"} < set(times)
    assert all(seconds > 0 for seconds in times.values())
    # AdamW changes every weight that a gradient reached.
    moved = [name for name, value in bench.model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("backbone.") for name in moved) and any(name.startswith("decoder.") for name in moved)


def test_counting_as_numpy_does():
    from tools.benchmark import evaluation as bench

    random = np.random.default_rng(0)
    label = random.choice([*range(bench.CLASSES), bench.IGNORE], (40, 50)).astype(np.uint8)
    prediction = random.integers(0, bench.CLASSES, (40, 50)).astype(np.uint8)
    matrix = ConfusionMatrix(bench.CLASSES, bench.IGNORE)
    matrix.update(label, prediction)
    assert (bench.bincount_int64(label, prediction) == matrix.counts).all()


def test_every_part_has_its_module():
    from tools.benchmark import __main__ as benchmark

    options = benchmark.make_parser().parse_args([])
    assert options.part == "all" and set(benchmark.PARTS) == {
        "op",
        "step",
        "inference",
        "matcher",
        "memory",
        "evaluation",
        "scaling",
        "prepare",
    }


def test_preparation_is_measured_by_running_the_script(monkeypatch):
    from tools.benchmark import prepare as bench

    monkeypatch.setattr(bench.os, "cpu_count", lambda: 1)
    ((_, rows),) = bench.run(argparse.Namespace(masks=3))[0].items()
    assert [row["processes"] for row in rows] == [1, 1]
    assert all(row["images/s"] > 0 and row["peak MB"] > 50 for row in rows)
