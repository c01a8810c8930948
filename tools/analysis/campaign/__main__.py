"""Train several runs with several seeds, and compare them.

    python -m tools.analysis.campaign configs/campaigns/camvid_23.yaml             # start or resume
    python -m tools.analysis.campaign configs/campaigns/camvid_23.yaml --jobs 3    # three trainings at a time
    python -m tools.analysis.campaign configs/campaigns/camvid_23.yaml --collect-only

A campaign file names the runs:

    output: output/campaigns/camvid_23        # each training gets its folder in it: RUN/seed_0
    config: configs/camvid_23_unimatch.yaml   # default of the runs
    overrides: {SOLVER.MAX_ITER: 3000}        # config keys for all runs; "{seed}" in a value stands for the seed
    seeds: [0, 1, 2]
    jobs: 2                                   # trainings at a time
    baseline: unimatch                        # every other run is compared with it, paired by seed
    runs:
      supervised: {config: configs/camvid_23_supervised.yaml}
      unimatch: {}
      random_text: {config: configs/camvid_23_hiervl.yaml, overrides: {MODEL.TEXT.ABLATION: random}}

Ctrl-C ends all trainings. The same command resumes them from their last checkpoints and skips those that are finished.
Each training uses one GPU. With several, the trainings are spread over them; CUDA_VISIBLE_DEVICES chooses some. The
cores are shared out equally, unless OMP_NUM_THREADS says how many each training gets.

Written into the output folder: comparison.md and comparison.json (mIoU of each run over its seeds, differences from
the baseline, and the same by class), curves.png (learning curves), and campaign.log in the folder of each training.
Exit status: 0, 1 if a training failed, 2 after a mistake in the campaign file.
"""

import argparse
import os
import sys

from hiervl.errors import UserError

from . import report
from .checks import check_data, check_folders
from .definition import Campaign, read_campaign
from .running import Runner, one_at_a_time


def run(args) -> int:
    """Returns the exit status."""
    campaign = read_campaign(args.file)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1.")
    output = check_folders(campaign, report.files(campaign))
    if args.collect_only:
        if not os.path.isdir(campaign.output):
            raise UserError(f"{campaign.output}: no such folder, so nothing to collect; run without --collect-only.")
        output.add(report.files(campaign))
        report.write(campaign)
        return 0
    with one_at_a_time(campaign.output) as lock:
        runner = Runner(campaign, args.jobs or campaign.jobs, lock)
        check_data(campaign, runner.waiting)
        output.add([*report.files(campaign), *(training.log for training in runner.waiting)])
        runner.run()
    return conclude(campaign, runner)


def conclude(campaign: Campaign, runner: Runner) -> int:
    """Write the tables and list what failed. Returns the exit status."""
    if runner.interrupted:
        print("Stopped. The same command resumes from the last checkpoints; --collect-only compares what is finished.")
        return 128 + runner.interrupted
    check_folders(campaign, report.files(campaign))  # a config may have been edited in the meantime
    report.write(campaign)
    if runner.failures:
        print(f"\n{len(runner.failures)} of {len(campaign.trainings)} trainings failed; the same command tries again:")
        for label, reason in runner.failures.items():
            print(f"  {label}: {reason}")
    return 1 if runner.failures else 0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the campaign file")
    parser.add_argument("--jobs", type=int, help="trainings at a time (that of the file, or 1)")
    parser.add_argument("--collect-only", action="store_true", help="train nothing; compare what is finished")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    try:
        return run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
