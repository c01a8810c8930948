"""The training loop on a complete small run."""

import json

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from hiervl.config import load_config
from hiervl.errors import UserError
from hiervl.losses import points as points_module
from hiervl.semi.trainer import SemiSupervisedTrainer, may_lack_gradients

from tests.networks import flatten_losses, training_input
from tools.gpu_check.waits import Waits


def train(cfg, iterations=None, resume=False):
    """Run to the end, or stop after `iterations` as a kill between two steps would."""
    trainer = SemiSupervisedTrainer(cfg)
    trainer.resume_or_load(resume)
    if iterations is not None:
        trainer.max_iter = iterations
    trainer.train()
    return trainer


def weights(trainer):
    return {
        f"{kind}.{name}": value.clone()
        for kind, model in (("student", trainer.student), ("teacher", trainer.teacher.model))
        for name, value in model.state_dict().items()
    }


def assert_identical(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def watch(trainer, before=lambda: None, after=lambda: None):
    """Call these functions before and after every step."""
    hook = HookBase()
    hook.before_step, hook.after_step = before, after
    trainer.register_hooks([hook])


def test_a_resumed_run_is_bit_identical(make_cfg, tmp_path):
    whole = train(make_cfg("OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path / "parts"))
    train(cfg, iterations=3)  # the checkpoint of iteration 3 lies inside the ramp
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    assert_identical(weights(whole), weights(resumed))
    assert whole.state_dict()["hooks"].keys() == resumed.state_dict()["hooks"].keys()
    adaptive = whole.state_dict()["hooks"]["PseudoLabelHook"]["adaptive"]
    assert adaptive and adaptive == resumed.state_dict()["hooks"]["PseudoLabelHook"]["adaptive"]


def test_processes_that_would_resume_differently_are_refused(make_cfg, monkeypatch):
    trainer = SemiSupervisedTrainer(make_cfg())
    # The other process has found a checkpoint.
    monkeypatch.setattr(comm, "all_gather", lambda value: [value, 3 if isinstance(value, int) else None])
    with pytest.raises(UserError, match=r"run: the processes find different iterations .*\[0, 3\].*OUTPUT_DIR"):
        trainer.resume_or_load(True)


def test_weight_zero_is_bit_identically_the_supervised_student(make_cfg, tmp_path):
    with_stream = train(make_cfg("SEMI.WEIGHT", 0.0, "OUTPUT_DIR", str(tmp_path / "a")))
    supervised = train(make_cfg("SEMI.UNLABELED_PER_BATCH", 0, "OUTPUT_DIR", str(tmp_path / "b")))
    assert_identical(weights(with_stream), weights(supervised))


def test_unlabeled_images_change_the_student_after_burn_in_only(make_cfg, tmp_path):
    cfgs = [make_cfg("SEMI.UNLABELED_PER_BATCH", count, "OUTPUT_DIR", str(tmp_path / f"{count}")) for count in (0, 2)]
    during = [weights(train(cfg, iterations=2)) for cfg in cfgs]
    assert_identical(*during)
    after = [weights(train(cfg, iterations=4)) for cfg in cfgs]
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("burn_in", [2, 5])
def test_the_teacher_is_the_student_during_and_at_the_end_of_burn_in(make_cfg, burn_in):
    trainer = train(make_cfg("SEMI.BURN_IN", burn_in), iterations=2)
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(value, trainer.teacher.model.state_dict()[name]), name
    assert trainer.teacher.updates == 0


def test_the_teacher_gets_no_gradient_and_stays_in_eval_mode(make_cfg):
    trainer = train(make_cfg())
    assert all(p.grad is None for p in trainer.teacher.model.parameters())
    assert not any(module.training for module in trainer.teacher.model.modules())
    assert all(p.grad is not None for p in trainer.student.parameters() if p.requires_grad)


def test_results_tell_last_and_best_of_student_and_teacher(make_cfg, tmp_path):
    train(make_cfg("TEST.EVAL_PERIOD", 3))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["last"]["iteration"] == 6 and results["best"]["iteration"] in (3, 6)
    for entry in results.values():
        assert set(entry["shapes_val"]) == {"student", "teacher"}
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    assert best["iteration"] + 1 == results["best"]["iteration"]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_resumed_run_remembers_its_best_result(make_cfg, tmp_path):
    cfg = make_cfg()
    train(cfg, iterations=3)
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    for metrics in results["best"]["shapes_val"].values():
        metrics["mIoU"] = 101.0
    path.write_text(json.dumps(results))
    resumed = train(cfg, resume=True)
    assert resumed.evaluation.results["best"] == results["best"]
    assert resumed.evaluation.results["last"]["iteration"] == 6


def test_the_logged_total_is_the_loss_that_is_minimized(make_cfg, tmp_path):
    train(make_cfg("SEMI.WEIGHT", 0.5), iterations=4)  # iteration 2 lies inside the ramp
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    lines = [line for line in lines if "total_loss" in line]  # the others are evaluations
    assert [line["unlabeled_weight"] for line in lines] == [0.0, 0.0, 0.25, 0.5]
    for line in lines:
        labeled = sum(v for k, v in line.items() if k.startswith("loss_"))
        pseudo = sum(v for k, v in line.items() if k.startswith("pseudo/loss_"))
        assert (pseudo > 0) == (line["unlabeled_weight"] > 0)
        assert line["total_loss"] == pytest.approx(labeled + line["unlabeled_weight"] * pseudo)


def test_evaluation_of_a_checkpoint_gives_the_same_numbers(make_cfg):
    cfg = make_cfg()
    results = train(cfg).evaluation.results["last"]["shapes_val"]
    again = SemiSupervisedTrainer(cfg)
    again.load_for_evaluation()
    metrics = again.evaluation.measure(again.iter + 1)["shapes_val"]
    assert metrics["teacher"]["mIoU"] == results["teacher"]["mIoU"]
    assert metrics["student"]["mIoU"] == results["student"]["mIoU"]


def test_accumulation_learns_from_every_image_once(make_cfg, tmp_path):
    trainer = SemiSupervisedTrainer(make_cfg("SOLVER.ACCUMULATE", 2))
    trainer.batch = {"labeled": [{"i": 0}, {"i": 1}, {"i": 2}], "unlabeled": []}
    trainer.pseudo_inputs = [{"i": 3}, {"i": 4}]
    chunks = trainer._micro_batches()
    assert sorted(x["i"] for chunk in chunks for x in chunk) == [0, 1, 2, 3, 4]
    trainer.accumulate = 99  # as many as there are images; the last one is labeled
    assert [x["i"] for (x,) in trainer._micro_batches()] == [3, 4, 0, 1, 2]
    assert train(make_cfg("SOLVER.ACCUMULATE", 2, "OUTPUT_DIR", str(tmp_path / "b"))).iter == 6


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.CMSAM.ENABLED", False),
        ("MODEL.CMSAM.FEATURE_EXCHANGE", False),
        ("MODEL.DECODER.SEMANTIC", False),
        ("MODEL.REGULARIZERS.VISION_LANGUAGE", 0.0),
        ("MODEL.REGULARIZERS.DIVERSITY", 0.0),
    ],
)
def test_distributed_training_looks_for_missing_gradients_in_ablations_only(key, value):
    assert not may_lack_gradients(load_config("", []))
    assert may_lack_gradients(load_config("", [key, value]))
    without = ["MODEL.HSQG.ENABLED", False, "MODEL.CMSAM.ENABLED", False, "MODEL.DECODER.SEMANTIC", False]
    assert not may_lack_gradients(load_config("", [key, value, *without]))


@pytest.mark.parametrize(
    "ablation",
    [
        (),
        ("MODEL.CMSAM.ENABLED", False),
        ("MODEL.CMSAM.FEATURE_EXCHANGE", False),
        ("MODEL.DECODER.SEMANTIC", False),
        ("MODEL.REGULARIZERS.VISION_LANGUAGE", 0.0),
        ("MODEL.HSQG.ENABLED", False, "MODEL.CMSAM.ENABLED", False, "MODEL.DECODER.SEMANTIC", False),
    ],
)
def test_networks_that_lack_gradients_are_known(make_cfg, ablation):
    cfg = make_cfg(*ablation)
    student = SemiSupervisedTrainer(cfg).student.train()
    sum(flatten_losses(student([training_input(classes=student.num_classes) for _ in range(2)])).values()).backward()
    lacking = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert may_lack_gradients(cfg) or not lacking, lacking
    if ablation == ("MODEL.DECODER.SEMANTIC", False):
        assert lacking  # so the search is worth its time


def test_a_non_finite_loss_stops_before_the_weights_and_names_the_images(make_cfg):
    trainer = SemiSupervisedTrainer(make_cfg())
    with torch.no_grad():
        trainer.student.decoder.mask_embed.layers[2].bias.fill_(float("nan"))
    before = trainer.student.backbone.state_dict()
    before = {k: v.clone() for k, v in before.items() if "running" not in k and "num_batches" not in k}
    with pytest.raises(FloatingPointError, match=r"iteration 0.*\.png"):
        trainer.train()
    for name, value in before.items():
        assert torch.equal(value, trainer.student.backbone.state_dict()[name])


def test_modes_differ_in_config_only(make_cfg, tmp_path):
    """fixmatch: one strong view; unimatch: two and feature dropout."""
    for views, dropout, expected in ((1, 0.0, 2), (2, 0.5, 6)):
        trainer = train(
            make_cfg(
                "SEMI.STRONG_VIEWS", views, "SEMI.FEATURE_DROPOUT", dropout, "OUTPUT_DIR", str(tmp_path / f"{views}")
            )
        )
        assert len(trainer.pseudo_inputs) == expected


def test_the_initial_backbone_outlives_a_resume(make_cfg):
    options = ("MODEL.REGULARIZERS.VISION", 0.1, "SEMI.UNLABELED_PER_BATCH", 0)
    first = SemiSupervisedTrainer(make_cfg(*options, "SOLVER.MAX_ITER", 3))
    before = {name: value.clone() for name, value in first.student.regularizers.initial.state_dict().items()}
    first.train()
    assert any(not torch.equal(value, before[name]) for name, value in first.student.backbone.state_dict().items())
    resumed = SemiSupervisedTrainer(make_cfg(*options, "SEED", 5))
    resumed.resume_or_load(resume=True)
    for name, value in resumed.student.regularizers.initial.state_dict().items():
        assert torch.equal(value, before[name])
    assert resumed.teacher.model.regularizers is None


def test_gradients_are_those_of_the_step_and_are_clipped(make_cfg):
    trainer = SemiSupervisedTrainer(make_cfg("SOLVER.CLIP_NORM", 0.01, "SOLVER.MAX_ITER", 1))
    norms = []

    def leave_gradients():
        for parameter in trainer.student.parameters():
            parameter.grad = torch.full_like(parameter, 1e6)

    def measure():
        gradients = [p.grad.norm() for p in trainer.student.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())

    watch(trainer, leave_gradients, measure)
    trainer.train()
    assert norms == [pytest.approx(0.01, rel=0.01)]
    assert 0.01 < trainer.storage.latest()["grad_norm"][0] < 1e5  # as it was before it was clipped


def test_micro_batches_share_the_denominators_of_the_whole_batch(make_cfg):
    trainer = SemiSupervisedTrainer(make_cfg("SOLVER.ACCUMULATE", 2, "SEMI.BURN_IN", 0, "SOLVER.MAX_ITER", 1))
    compared = []

    def compare():
        student = trainer.student
        parts = trainer._normalizers([student.prepare_batch(inputs) for inputs in trainer._micro_batches()])
        whole = student.normalizers(student.prepare_batch(trainer.batch["labeled"] + trainer.pseudo_inputs))
        compared.extend((parts[kind].stack(), whole[kind].stack()) for kind in ("labeled", "pseudo"))

    watch(trainer, after=compare)
    trainer.train()
    assert len(compared) == 2
    for parts, whole in compared:
        torch.testing.assert_close(parts, whole)
    assert [whole[2] for _, whole in compared] == [2, 6]  # images: two unlabeled ones, three streams each


def test_every_iteration_has_a_random_seed_and_a_progress(make_cfg):
    trainer, seeds, progress = SemiSupervisedTrainer(make_cfg("SOLVER.MAX_ITER", 4)), [], []

    def note():
        seeds.append(torch.initial_seed())
        progress.append(trainer.student.regularizers.progress)

    watch(trainer, note)
    trainer.train()
    assert len(set(seeds)) == 4
    assert progress == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("horizon, expected", [(2, 2), (1000, 3)])
def test_the_teachers_horizon_is_at_most_a_share_of_the_run(make_cfg, horizon, expected):
    cfg = make_cfg("SEMI.EMA.HORIZON", horizon, "SEMI.EMA.MAX_SHARE", 0.5, "SOLVER.MAX_ITER", 6)
    assert SemiSupervisedTrainer(cfg).teacher.horizon == expected


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_weights_of_one_network_are_for_student_and_teacher(make_cfg, tmp_path, for_evaluation):
    path = str(tmp_path / "weights.pth")
    first = SemiSupervisedTrainer(make_cfg())
    torch.save({"model": first.student.state_dict()}, path)
    second = SemiSupervisedTrainer(make_cfg("MODEL.WEIGHTS", path, "SEED", 5))
    second.load_for_evaluation() if for_evaluation else second.resume_or_load(resume=False)
    for model in (second.student, second.teacher.model):
        for name, value in model.state_dict().items():
            assert torch.equal(value, first.student.state_dict()[name]), name


def gradients_of_one_step(cfg, monkeypatch):
    """Losses and gradients of the last iteration of a short run; points are drawn alike for every image."""
    monkeypatch.setattr(points_module.torch, "rand", lambda *shape, device=None: evenly(shape))
    trainer, found = SemiSupervisedTrainer(cfg), {}

    def note():
        found.update({name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None})

    watch(trainer, after=note)
    trainer.train()
    log = {name: value[0] for name, value in trainer.storage.latest().items() if "loss" in name}
    return log, found


def evenly(shape):
    return torch.linspace(0, 1, shape[-1] + 1)[:-1].expand(*shape)


SAME_STEP = ["SEMI.BURN_IN", 0, "SEMI.RAMP", 0, "SOLVER.MAX_ITER", 1, "SOLVER.LOG_PERIOD", 1]
SAME_STEP += ["MODEL.BACKBONE.FREEZE_BN", True, "SEMI.FEATURE_DROPOUT", 0.0]  # nothing depends on the batch's make-up
SAME_STEP += ["MODEL.CRITERION.IMPORTANCE_RATIO", 1.0, "SOLVER.BASE_LR", 1e-12, "SOLVER.CLIP_NORM", 1e9]


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.ACCUMULATE", 3),
        ("SOLVER.ACCUMULATE", 99),
        ("SOLVER.ACTIVATION_CHECKPOINTING", ("pixel_decoder", "decoder")),
    ],
)
def test_saving_memory_changes_neither_losses_nor_gradients(make_cfg, monkeypatch, key, value):
    plain = gradients_of_one_step(make_cfg(*SAME_STEP), monkeypatch)
    saving = gradients_of_one_step(make_cfg(*SAME_STEP, key, value), monkeypatch)
    for expected, result in zip(plain, saving):
        assert expected.keys() == result.keys() and len(expected) > 10
        for name in expected:
            a, b = torch.as_tensor(expected[name]), torch.as_tensor(result[name])
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(a.abs().max().item(), 1e-2), msg=name)


def test_float16_skips_a_step_that_overflows_and_goes_on_after_a_resume(make_cfg, tmp_path):
    cfg = make_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    trainer = train(cfg, iterations=3)
    scaler = trainer.precision.scaler
    assert scaler.is_enabled() and scaler.get_scale() == 65536 / 2**trainer.precision.skipped
    resumed = SemiSupervisedTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.precision.state_dict() == trainer.precision.state_dict()
    before, skipped = weights(resumed), resumed.precision.skipped
    parameters = list(resumed.student.parameters())
    for p in parameters:
        p.grad = torch.full_like(p, torch.inf)
    resumed.precision.backward(torch.zeros((), requires_grad=True))  # the scaler works on gradients it has scaled
    resumed.precision.step(resumed.optimizer, parameters, 1.0)
    assert resumed.precision.skipped == skipped + 1
    assert_identical({name: value for name, value in weights(resumed).items()}, before)
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-2])
    assert line["skipped_steps"] == trainer.precision.skipped and line["loss_scale"] == scaler.get_scale()


ALL_FILTERS = ("adaptive", "text_agreement", "relevance", "region", "boundary", "image_average", "confidence")


@pytest.mark.parametrize(
    "segments, matching, most",
    [("class_regions", "fixed", 9), ("components", "hungarian", 20)],
)
def test_a_step_makes_the_host_wait_a_handful_of_times(make_cfg, segments, matching, most):
    """Per kind of image: which classes there are, how large the components, and the costs of the matching. Besides: the
    components of the region filter, and whether the gradient is finite."""
    options = ["MODEL.CRITERION.SEGMENTS", segments, "MODEL.CRITERION.SEMANTIC_MATCHING", matching]
    options += ["SEMI.BURN_IN", 0, "SEMI.FILTERS", ALL_FILTERS, "SOLVER.MAX_ITER", 3, "SOLVER.LOG_PERIOD", 50]
    trainer, counted = SemiSupervisedTrainer(make_cfg(*options)), []
    plain = trainer.run_step

    def run_step():
        with Waits() as waits:
            trainer._hooks[0].before_step()  # the pseudo-labels
            plain()
        counted.append(waits.places)

    trainer.run_step = run_step
    trainer.train()
    assert len(counted) == 3 and 3 <= max(len(seen) for seen in counted[:2]) <= most, "\n".join(counted[0])


def test_the_best_model_is_saved_before_it_is_recorded(make_cfg, tmp_path):
    trainer = SemiSupervisedTrainer(make_cfg())
    trainer.checkpointer.save = lambda name, **more: (_ for _ in ()).throw(KeyboardInterrupt)  # a kill during the save
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert not (tmp_path / "run" / "results.json").exists()
