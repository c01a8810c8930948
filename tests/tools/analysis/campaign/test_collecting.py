"""Tables against numbers computed by hand."""

import json

import pytest
from PIL import Image

from tools.analysis.campaign import report
from tools.analysis.campaign.__main__ import main
from tools.analysis.campaign.collecting import collect

RESULTS = {
    "plain": {
        0: (50.0, 49.0, {"car": 60.0, "sky": 40.0}),
        1: (54.0, 52.0, {"car": 62.0, "sky": 46.0, "bus": 10.0}),
        2: (58.0, 57.0, {"car": 70.0, "sky": 46.0}),
    },
    "changed": {
        0: (52.5, 48.0, {"car": 66.0, "sky": 39.0, "bus": 1.0}),
        1: (53.0, 55.0, {"car": 70.0, "sky": 36.0, "bus": 14.0}),
        2: (64.0, 57.0, {"car": 74.0, "sky": 54.0}),
    },
}


def cells(tables, start):
    """Of the first line of a table that begins with this cell."""
    line = next(line for line in tables.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_three_seeds(make_results):
    facts = collect(make_results(RESULTS, seeds=[0, 1, 2]))
    plain = facts["runs"]["plain"]["summary"]
    assert plain["teacher"]["last"] == {"mean": 54.0, "min": 50.0, "max": 58.0, "count": 3}
    assert plain["teacher"]["best"] == {"mean": 55.0, "min": 51.0, "max": 59.0, "count": 3}
    assert plain["student"]["last"]["mean"] == pytest.approx(158 / 3)
    difference = facts["differences"]["changed"]
    assert list(facts["differences"]) == ["changed"] and difference["unpaired"] == []
    assert difference["teacher"]["last"] == {
        "seeds": {0: 2.5, 1: -1.0, 2: 6.0},
        "mean": 2.5,
        "min": -1.0,
        "max": 6.0,
        "count": 3,
        "positive": 2,
    }
    assert difference["student"]["last"]["seeds"] == {0: -1.0, 1: 3.0, 2: 0.0}
    assert difference["student"]["last"]["positive"] == 1  # no change is no gain
    assert facts["unfinished"] == []


def test_classes_by_their_gain(make_results):
    rows = collect(make_results(RESULTS, seeds=[0, 1, 2]))["differences"]["changed"]["per_class"]
    assert [row["class"] for row in rows] == ["car", "bus", "sky"]
    car, bus, sky = rows
    assert (car["baseline"], car["run"], car["difference"]) == (64.0, 70.0, 6.0)
    assert (car["min"], car["max"], car["count"]) == (4.0, 8.0, 3)
    assert (bus["baseline"], bus["run"], bus["difference"], bus["count"]) == (
        10.0,
        14.0,
        4.0,
        1,
    )  # only seed 1 has both
    assert (sky["difference"], sky["min"], sky["max"]) == (-1.0, -10.0, 8.0)


def test_a_seed_that_is_missing_on_one_side(make_results):
    results = {"plain": RESULTS["plain"], "changed": {0: RESULTS["changed"][0], 1: None, 2: RESULTS["changed"][2]}}
    campaign = make_results(results, seeds=[0, 1, 2])
    facts = collect(campaign)
    difference = facts["differences"]["changed"]
    assert difference["unpaired"] == [1]
    assert difference["teacher"]["last"]["seeds"] == {0: 2.5, 2: 6.0} and difference["teacher"]["last"]["mean"] == 4.25
    assert [row["class"] for row in difference["per_class"]] == ["car", "sky"]
    assert difference["per_class"][0]["baseline"] == 65.0  # of the paired seeds, not of all three
    assert facts["unfinished"] == [{"run": "changed", "seed": 1, "iteration": 3, "of": 6}]
    assert facts["runs"]["plain"]["summary"]["teacher"]["last"]["mean"] == 54.0
    tables = report.tables_of(facts)
    assert "changed: only one side has seed 1, which is left out" in tables
    assert "Not finished, so not counted: changed seed 1 (3/6)." in tables
    assert cells(tables, "changed, teacher") == [
        "changed, teacher",
        "+2.50",
        "–",
        "+6.00",
        "+4.25",
        "+2.50 to +6.00",
        "2 of 2",
        report.REMARK,
    ]


def test_a_seed_that_the_baseline_lacks(make_results):
    results = {"plain": {1: RESULTS["plain"][1]}, "changed": RESULTS["changed"]}
    difference = collect(make_results(results, seeds=[0, 1, 2]))["differences"]["changed"]
    assert difference["unpaired"] == [0, 2] and difference["teacher"]["last"]["seeds"] == {1: -1.0}


def test_the_tables(make_results):
    tables = report.tables_of(collect(make_results(RESULTS, seeds=[0, 1, 2])))
    assert cells(tables, "plain")[:3] == ["plain", "3", "54.00 (50.00 to 58.00)"]
    assert cells(tables, "changed, teacher")[1:] == ["+2.50", "−1.00", "+6.00", "+2.50", "−1.00 to +6.00", "2 of 3", ""]
    assert cells(tables, "sky") == ["sky", "44.00", "43.00", "−1.00", "−10.00 to +8.00", "3"]
    assert "not a result" not in tables and "significant" not in tables


def test_two_seeds_are_no_result(make_results):
    tables = report.tables_of(collect(make_results(RESULTS)))
    assert tables.lower().count(report.REMARK) == 5  # both runs, both models' differences, classes


def test_runs_of_which_nothing_is_finished(make_results):
    campaign = make_results({"plain": {0: None}})
    facts = collect(campaign)
    tables = report.tables_of(facts)
    assert cells(tables, "plain")[:3] == ["plain", "0", "–"]
    assert cells(tables, "changed, teacher")[1:6] == ["–"] * 5
    assert "changed seed 1 (0/6)" in tables
    assert report.learning_curves(campaign) is None


def test_without_a_baseline_nothing_is_compared(make_results):
    facts = collect(make_results(RESULTS, baseline=None))
    assert facts["differences"] == {} and "Difference" not in report.tables_of(facts)


def test_curves_show_mean_and_range(make_results):
    axes = report.learning_curves(make_results(RESULTS, seeds=[0, 1, 2])).axes[0]
    plain, changed = axes.lines
    assert plain.get_xdata().tolist() == [3, 6] and plain.get_ydata().tolist() == [55.0, 54.0]
    assert changed.get_ydata().tolist() == pytest.approx([57.5, 56.5])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (50.0, 59.0)
    low, high = axes.get_ylim()
    assert low < 50 and high > 65  # all seeds are inside
    assert [text.get_text() for text in axes.texts] == ["plain 54.0", "changed 56.5"]


def test_curves_say_how_many_seeds_are_finished(make_results):
    campaign = make_results({**RESULTS, "changed": {1: (53.0, 55.0, {})}})
    axes = report.learning_curves(campaign).axes[0]
    assert [text.get_text() for text in axes.texts] == ["plain 52.0", "changed (1 of 2 seeds) 53.0"]
    assert cells(report.tables_of(collect(campaign)), "changed")[1:3] == ["1", "53.00"]  # one seed has no range


def test_collect_only(make_results, capsys):
    campaign = make_results({**RESULTS, "changed": {1: RESULTS["changed"][1]}})
    for _ in range(2):  # it may overwrite what it has written
        assert main([campaign.path, "--collect-only"]) == 0
    printed = capsys.readouterr().out
    markdown, facts, picture = report.files(campaign)
    with open(markdown) as file:
        assert file.read() in printed
    with open(facts) as file:
        assert json.load(file)["differences"]["changed"]["teacher"]["last"]["seeds"] == {"1": -1.0}
    assert Image.open(picture).format == "PNG"


def test_nothing_to_collect(write, capsys):
    assert main([write(), "--collect-only"]) == 2
    assert "no such folder, so nothing to collect" in capsys.readouterr().err
