"""Nothing starts on missing data, and no run counts that was made with another definition."""

import os

import pytest

from hiervl.config import device
from hiervl.errors import UserError
from tools.analysis.campaign.checks import check_data, check_folders
from tools.analysis.campaign.definition import read_campaign
from tools.analysis.campaign.report import files


def folders(campaign):
    return check_folders(campaign, files(campaign))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"DATASETS.SPLIT": "shapes/splits/seed{seed}/4"}, "plain/seed_1: split folder .*seed1/4 does not exist"),
        ({"DATASETS.TEST": ["shapes_val", "voc_val"]}, "plain/seed_0: .*VOC2012 does not exist"),
        ({"MODEL.WEIGHTS": "none.pth"}, r"plain/seed_0: none.pth: no such file \(MODEL.WEIGHTS\)"),
        ({"MODEL.BACKBONE.WEIGHTS": "none.pth"}, r"none.pth: no such file \(MODEL.BACKBONE.WEIGHTS\)"),
        ({"MODEL.TEXT.EMBEDDINGS": "none.npz"}, r"none.npz: no such file \(MODEL.TEXT.EMBEDDINGS\)"),
    ],
)
def test_what_the_trainings_need_is_looked_for(write, overrides, message):
    campaign = read_campaign(write(overrides={"DATASETS.SPLIT": "shapes/splits/seed0/4"} | overrides))
    with pytest.raises(UserError, match=message):
        check_data(campaign, campaign.trainings)
    check_data(campaign, [])  # of a finished training, nothing is needed any more


def test_a_gpu_that_cannot_be_used(write, monkeypatch):
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: True)
    campaign = read_campaign(write())
    campaign.trainings[0].cfg.MODEL.DEVICE = "cuda:99"
    with pytest.raises(UserError, match="plain/seed_0: .*MODEL.DEVICE"):
        check_data(campaign, campaign.trainings)


def test_data_that_is_there(write):
    campaign = read_campaign(
        write(overrides={"DATASETS.SPLIT": "shapes/splits/seed0/4", "MODEL.WEIGHTS": "http://x/y"})
    )
    check_data(campaign, campaign.trainings)


def test_a_run_of_another_definition(write, make_results):
    make_results({"plain": {1: (50.0, 50.0, {})}})
    folders(read_campaign(write()))
    folders(read_campaign(write(runs={"new": {}, "plain": {}})))
    overrides = {"DATASETS.SPLIT": "shapes/splits/seed0/4", "SOLVER.MAX_ITER": 7}
    with pytest.raises(UserError, match="plain/seed_1: contains a run with SOLVER.MAX_ITER 6, but .* says 7; .*delete"):
        folders(read_campaign(write(overrides=overrides)))
    overrides["SOLVER.MAX_ITER"] = 6
    folders(read_campaign(write(overrides=overrides | {"DATALOADER.NUM_WORKERS": 1, "SOLVER.LOG_PERIOD": 1})))
    with pytest.raises(UserError, match="SEMI.FILTERS"):
        folders(read_campaign(write(overrides=overrides | {"SEMI.FILTERS": ["confidence", "boundary"]})))


def test_a_folder_with_something_else(write):
    campaign = read_campaign(write())
    os.makedirs(campaign.trainings[0].folder)
    folders(campaign)  # empty
    with open(os.path.join(campaign.trainings[0].folder, "photo.jpg"), "w"):
        pass
    with pytest.raises(UserError, match="plain/seed_0 already exists .* output in .*test.yaml"):
        folders(campaign)
    with open(campaign.trainings[0].log, "w"):
        pass
    with pytest.raises(UserError, match="campaign.log already exists"):
        folders(campaign)


def test_a_training_that_ended_before_it_wrote_its_config(write):
    campaign = read_campaign(write())
    training = campaign.trainings[0]
    os.makedirs(training.folder)
    folders(campaign).add([training.log])
    with open(training.log, "w"):
        pass
    folders(campaign)


@pytest.mark.parametrize("name", ["comparison.md", "comparison.json", "curves.png"])
def test_tables_that_a_campaign_did_not_write(write, name):
    campaign = read_campaign(write())
    os.makedirs(campaign.output)
    with open(os.path.join(campaign.output, name), "w"):
        pass
    with pytest.raises(UserError, match=f"{name} already exists"):
        folders(campaign)
