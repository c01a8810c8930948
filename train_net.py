"""Train, resume, or evaluate HierVL. Run it from the repository:

    python train_net.py --config-file configs/camvid_23.yaml [--num-gpus N] [--resume] [KEY VALUE ...]
    python train_net.py --config-file configs/camvid_23.yaml --eval-only MODEL.WEIGHTS output/model_best.pth
    python train_net.py ... --eval-only --classes "sky, house, pole, street, ..."
    torchrun --nproc_per_node N train_net.py ...
    srun python train_net.py ...

With --classes, the dataset's classes get other names, in the same order; reports go to
OUTPUT_DIR/inference_other_words.
"""

import logging
import os

# Idle OpenMP threads must not spin on the cores that the data workers need: on a small machine, that costs more than
# the work itself. This has to be set before torch is loaded.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from hiervl.config import load_config, use_cpu_without_gpu
from hiervl.errors import UserError
from hiervl.launch import launch
from hiervl.semi.trainer import SemiSupervisedTrainer
from hiervl.modeling.text.word_lists import read_classes
from hiervl.utils.processes import end_together


def setup(args):
    """Config from file and command line, logging, output folder."""
    cfg = load_config(args.config_file, args.opts)
    no_gpu = use_cpu_without_gpu(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    # Adam's squares of small gradients are denormal numbers, which a CPU computes up to a hundred times slower.
    torch.set_flush_denormal(True)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="hiervl")
    logger, processes = logging.getLogger("hiervl"), comm.get_world_size()
    logger.info("Running on %s%s", cfg.MODEL.DEVICE, f" in {processes} processes" if processes > 1 else "")
    if no_gpu:
        logger.warning("The CPU is used instead of a GPU, because %s", no_gpu)
    return cfg


def run(args):
    cfg = setup(args)
    trainer = SemiSupervisedTrainer(cfg)
    if args.eval_only:
        trainer.load_for_evaluation()
        if not args.classes:
            return trainer.evaluation.measure(trainer.iter + 1)
        rename_classes(trainer, read_classes(args.classes))
        return trainer.evaluation.measure(trainer.iter + 1, "inference_other_words")
    trainer.resume_or_load(args.resume)
    return trainer.train()


def rename_classes(trainer, names):
    """Evaluate with other names for the classes of the dataset."""
    known = trainer.student.class_names
    if len(names) != len(known):
        raise UserError(
            f"--classes: {len(names)} names for the {len(known)} classes of the dataset; give one for "
            f"each, in the order {', '.join(known)}."
        )
    for network in (trainer.student, trainer.teacher.model):
        network.set_classes(names)


def parser():
    """Detectron2's command line, and --classes."""
    result = default_argument_parser()
    result.add_argument(
        "--classes",
        default="",
        help="with --eval-only: other names for the classes, separated by commas, or a file with one per line",
    )
    return result


def main(args):
    """`run`; a user's mistake ends it, on all processes, with one line and status 2."""
    return end_together(run, args)


if __name__ == "__main__":
    launch(main, parser().parse_args())
