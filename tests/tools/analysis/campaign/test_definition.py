"""Every mistake in a campaign file is one line that names the file, and the run that it is about."""

from pathlib import Path

import pytest

from hiervl.errors import UserError
from tools.analysis.campaign.definition import read_campaign

CONFIG = "configs/shapes_supervised.yaml"
SHIPPED = sorted(Path("configs/campaigns").glob("*.yaml"))


def test_what_each_training_gets(write):
    runs = {"plain": {}, "other": {"config": "configs/shapes.yaml", "overrides": {"SOLVER": {"MAX_ITER": 9}}}}
    overrides = {"SOLVER.MAX_ITER": 6, "DATASETS.SPLIT": "shapes/splits/seed{seed}/4", "SEMI.FILTERS": ["adaptive"]}
    campaign = read_campaign(write(runs=runs, overrides=overrides, seeds=[3, 1], jobs=4))
    assert [training.label for training in campaign.trainings] == [
        "plain/seed_3",
        "other/seed_3",
        "plain/seed_1",
        "other/seed_1",
    ]
    assert campaign.runs == ["plain", "other"] and campaign.jobs == 4 and campaign.dataset == "shapes_val"
    plain, other = campaign.trainings[:2]
    assert plain.iterations == 6 and plain.cfg.SEMI.UNLABELED_PER_BATCH == 0
    assert other.iterations == 9 and other.cfg.SEMI.UNLABELED_PER_BATCH == 8  # of its own config
    assert plain.cfg.SEED == 3 and plain.cfg.DATASETS.SPLIT == "shapes/splits/seed3/4"
    assert tuple(plain.cfg.SEMI.FILTERS) == ("adaptive",)
    assert plain.folder.endswith("campaigns/test/plain/seed_3")


def test_only_what_is_needed(write):
    campaign = read_campaign(write(overrides=None, baseline=None, runs={"one": None}))
    assert (campaign.jobs, campaign.baseline, campaign.runs) == (1, "", ["one"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": [0]}, "unknown key 'seed'; did you mean seeds?"),
        ({"output": None}, "output is missing"),
        ({"output": 3}, "output is 3; it must be text"),
        ({"seeds": None}, "seeds is None; list at least one"),
        ({"seeds": []}, r"seeds is \[\]; list at least one"),
        ({"seeds": 3}, "seeds is 3; list at least one"),
        ({"seeds": [0, -1]}, "seeds has -1; a seed is a whole number"),
        ({"seeds": [0, True]}, "seeds has True; a seed is a whole number"),
        ({"seeds": [0, 1, 0]}, "seeds has 0 twice"),
        ({"jobs": 0}, "jobs is 0; it must be a whole number"),
        ({"jobs": "two"}, "jobs is 'two'; it must be a whole number"),
        ({"runs": None}, "runs is None; give each run a name"),
        ({"runs": ["plain"]}, r"runs is \['plain'\]; give each run a name"),
        ({"runs": {"plain": {}, 1: {}}}, "1 cannot name a run"),
        ({"runs": {"plain": {}, "../x": {}}}, "'../x' cannot name a run"),
        ({"runs": {"plain": {}, "Plain": {}}}, "runs 'plain' and 'Plain' differ in case only"),
        ({"runs": {"plain": CONFIG}}, f"run 'plain': is '{CONFIG}'; it takes config and overrides"),
        ({"runs": {"plain": {"overides": {}}}}, "run 'plain': unknown key 'overides'; did you mean overrides?"),
        ({"baseline": "none"}, r"baseline is 'none', which is none of the runs \(plain, changed\)"),
        ({"config": None}, "run 'plain': has no config"),
        ({"config": "configs/shape.yaml"}, r"run 'plain': configs/shape.yaml: no such config file \(config\)"),
        ({"overrides": [1]}, r"overrides is \[1\]; write them as \{KEY: VALUE\}"),
        ({"overrides": {"SOLVER.MAXITER": 3}}, "run 'plain': overrides: unknown config key SOLVER.MAXITER; did you"),
        ({"overrides": {"SOLVER.MAX_ITER": "many"}}, "run 'plain': overrides: .*many"),
        ({"overrides": {"SOLVER.MAX_ITER": None}}, "overrides has no value for SOLVER.MAX_ITER"),
        ({"overrides": {"SOLVER.MAX_ITER": 1, "SOLVER": {"MAX_ITER": 2}}}, "overrides has SOLVER.MAX_ITER twice"),
        ({"overrides": {"SEED": 3}}, "overrides has SEED, which the campaign sets itself"),
        (
            {"runs": {"plain": {}, "changed": {"overrides": {"TEST.MODE": "tiles"}}}},
            "run 'changed': TEST.MODE: 'tiles' is not one of",
        ),
        (
            {"runs": {"plain": {}, "changed": {"overrides": {"DATASETS.TEST": ["camvid_val"]}}}},
            "plain is evaluated on shapes_val and changed on camvid_val",
        ),
        ({"overrides": {"DATASETS.TEST": []}}, "run 'plain': DATASETS.TEST is empty"),
    ],
)
def test_mistakes(write, changes, message):
    path = write(**changes)
    with pytest.raises(UserError, match=message) as error:
        read_campaign(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_a_name_that_is_given_twice(write):
    path = Path(write())
    path.write_text(f"output: x\nseeds: [0]\nconfig: {CONFIG}\nruns:\n  plain: {{}}\n  plain: {{}}\n")
    with pytest.raises(UserError, match="'plain' is given twice.*line 6"):
        read_campaign(str(path))


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: no such campaign file"):
        read_campaign(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_campaigns_that_come_with_the_repository(path):
    campaign = read_campaign(str(path))
    assert campaign.baseline and campaign.output == f"output/campaigns/{path.stem}"


def test_the_campaign_on_camvid_draws_its_labeled_images_by_seed():
    campaign = read_campaign("configs/campaigns/camvid_23.yaml")
    assert len(campaign.seeds) >= 3
    assert {(t.seed, t.cfg.DATASETS.SPLIT) for t in campaign.trainings} == {
        (seed, f"camvid/seed{seed}/23") for seed in campaign.seeds
    }
    assert {training.iterations for training in campaign.trainings} == {3000}
