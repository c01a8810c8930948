"""Train, resume, or evaluate HierVL. Run it from the repository:

    python train_net.py --config-file configs/camvid_23.yaml [--num-gpus N] [--resume] [KEY VALUE ...]
    python train_net.py --config-file configs/camvid_23.yaml --eval-only MODEL.WEIGHTS output/model_best.pth
    python train_net.py ... --eval-only --classes "sky, house, pole, street, ..."

With --classes, the dataset's classes get other names, in the same order; reports go to
OUTPUT_DIR/inference_other_words.
"""

import logging
import os
import sys

# Idle OpenMP threads must not spin on the cores that the data workers need: on a small machine, that costs more than
# the work itself. This has to be set before torch is loaded.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from hiervl.config import load_config, use_cpu_without_gpu
from hiervl.errors import UserError
from hiervl.semi.trainer import SemiSupervisedTrainer
from hiervl.modeling.text.word_lists import read_classes


def setup(args):
    """Config from file and command line, logging, output folder."""
    cfg = load_config(args.config_file, args.opts)
    use_cpu_without_gpu(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    # Adam's squares of small gradients are denormal numbers, which a CPU computes up to a hundred times slower.
    torch.set_flush_denormal(True)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="hiervl")
    logging.getLogger("hiervl").info("Running on %s", cfg.MODEL.DEVICE)
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
    """`run`, with a user's mistake reported in one line."""
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # os._exit leaves distributed peers and data workers no chance to wait for this process.
        sys.exit(2) if args.num_gpus * args.num_machines <= 1 else os._exit(2)


if __name__ == "__main__":
    arguments = parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
