"""The command line that all datasets/prepare_*.py share: a plan of jobs is carried out, or checked, and reported."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...errors import UserError
from ..datasets import DatasetTable, data_root
from .files import list_line, palette_of, read_lines, remove_partial, write_lines
from .masks import Job, Maker, MaskTask
from .parallel import cores, parallel
from .protect import protect
from .report import PartReport, describe


@dataclass(frozen=True)
class Plan:
    """What is to be done for a dataset.

    Attributes:
        table: of the dataset.
        root: its folder; paths in the lists are relative to it.
        parts: part name -> jobs, in the order of the list.
        make: makes a mask.
        problems: what was already found wrong while planning, such as a mask without an image.
        notes: what else the report should say of the whole.
        before: writes what the masks need, such as images, and returns what is wrong with it.
        sources: files that are read, besides images and masks' sources.
        made: files that are written into the root, besides masks, instance maps and lists.
        elsewhere: the options that lead to another folder.
        keep: an existing mask that this tool did not write is kept if it is right (the official layouts);
            otherwise it is refused.
        in_place: a mask may be its own source, and is kept where it is right.
        ours: an earlier version, which kept no record, prepared the root.
    """

    table: DatasetTable
    root: str
    parts: dict[str, list[Job]]
    make: Maker
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    before: Callable[[], list[str]] = list
    sources: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    elsewhere: str = "--root"
    keep: bool = True
    in_place: bool = False
    ours: bool = False

    def task(self, check: bool) -> MaskTask:
        table = self.table
        palette = palette_of(table.colors, table.ignore_label)
        return MaskTask(self.make, len(table.classes), table.ignore_label, palette, check)

    def list_of(self, part: str) -> str:
        return os.path.join(self.root, self.table.parts[part]["list"])

    def line(self, job: Job) -> str:
        """What a list says of a job."""
        return list_line(relative(job.image, self.root), job.mask and relative(job.mask, self.root))


def parser(doc: str, folder: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every preparation has; ``folder`` is the dataset's under the data root."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.join(data_root(), folder) if folder else None
    result.add_argument("--root", default=root, help=f"the dataset's folder ({root or 'NAME under the data root'})")
    result.add_argument("--workers", type=int, default=cores(), help="processes (%(default)s)")
    result.add_argument("--check", action="store_true", help="write nothing; check what is there")
    result.add_argument("--partial", action="store_true", help="accept other numbers of images than the official ones")
    return result


def run(
    make_plan: Callable[[argparse.Namespace], Plan],
    args: argparse.Namespace,
    finish: Callable[[Plan], str] | None = None,
) -> int:
    """Carries a plan out, or checks it.

    Args:
        make_plan: makes it.
        finish: writes what else belongs to the dataset and returns what to tell the user.

    Returns:
        the exit status: 0 only if nothing is wrong.
    """
    try:
        plan = make_plan(args)
        if args.check:
            return execute(plan, args)
        folder = protect(plan, args.workers)
        plan = replace(plan, problems=(*plan.problems, *plan.before()))
        status = execute(plan, args)
        if finish is not None:
            print(finish(plan))
        folder.settle()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def execute(plan: Plan, args: argparse.Namespace) -> int:
    reports = [_do_part(plan, part, args) for part in plan.parts]
    print(describe(plan.table, reports, plan.notes))
    problems = [*plan.problems, *(problem for report in reports for problem in report.problems)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems; the images named above are not in the lists. Fix them and run again.")
    return 1 if problems else 0


def relative(path: str, root: str) -> str:
    """``path`` as a list names it: relative to ``root`` where it lies inside, absolute elsewhere."""
    inside = os.path.abspath(path).startswith(os.path.abspath(root) + os.sep)
    return os.path.relpath(path, root).replace(os.sep, "/") if inside else os.path.abspath(path)


def need_folder(path: str, what: str) -> str:
    """``path``, or UserError that names ``what`` belongs there."""
    if not os.path.isdir(path):
        raise UserError(f"{path} does not exist; {what}")
    return path


def _do_part(plan: Plan, part: str, args: argparse.Namespace) -> PartReport:
    jobs, table = plan.parts[part], plan.table
    expected = None if args.partial else table.parts[part].get("images")
    report = PartReport(part, expected, args.workers)
    task = plan.task(args.check)
    lines, start = [], time.perf_counter()
    try:
        for job, outcome in zip(jobs, parallel(task, jobs, args.workers, part)):
            report.add(job, outcome)
            if not outcome.problem:
                lines.append(plan.line(job))
    except BaseException:
        for job in jobs:  # what other workers were writing when one of them, or the user, stopped them all
            for path in filter(None, (job.mask, job.instances)):
                remove_partial(path)
        raise
    report.seconds = time.perf_counter() - start
    if expected is not None and len(jobs) != expected:
        report.problems.append(
            f"{part}: {len(jobs)} images were found under {plan.root}, {expected} are expected; "
            "unpack all archives, or say --partial"
        )
    _list(plan.list_of(part), lines, report, args.check)
    return report


def _list(path: str, lines: Sequence[str], report: PartReport, check: bool) -> None:
    there = read_lines(path) if os.path.exists(path) else None
    if there == list(lines):
        return
    if check:
        what = "is missing" if there is None else "does not list the images that are there"
        report.problems.append(f"{path} {what}; run without --check")
    else:
        write_lines(path, lines)


def with_instances(jobs: Sequence[Job], table: DatasetTable) -> list[Job]:
    """The jobs, which also make instance maps where the table says that they are."""
    return [replace(job, instances=table.paths.instance_map(job.mask)) for job in jobs]
