"""The command line shared by all datasets/prepare_*.py: executes or checks a plan of jobs, and prints a report."""

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
    """What to do for a dataset.

    Attributes:
        table: of the dataset.
        root: the dataset's folder; paths in the lists are relative to it.
        parts: {part name: jobs in the order of the list}.
        make: makes a mask.
        problems: problems found while planning, such as a mask without an image.
        notes: further lines for the report, on the dataset as a whole.
        before: is called before the masks are made; writes what they need, such as images, and returns problems.
        sources: files that are read, in addition to images and the sources of masks.
        made: files that are written into the root, in addition to masks, instance maps and lists.
        elsewhere: the options by which the user can choose another folder, for error messages.
        keep: keep an existing mask that this tool did not write if it is valid (official layouts); if False, stop.
        in_place: allow a mask to be its own source; it is kept if it is valid.
        ours: the root was prepared by an earlier version of this tool, which kept no record.
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
        """The line of a job in its list."""
        return list_line(relative(job.image, self.root), job.mask and relative(job.mask, self.root))


def parser(doc: str, folder: str | None) -> argparse.ArgumentParser:
    """A parser with the options common to all preparations.

    Args:
        doc: description for --help.
        folder: name of the dataset's folder under the data root; None if it depends on other options.
    """
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.join(data_root(), folder) if folder else None
    result.add_argument("--root", default=root, help=f"the dataset's folder ({root or 'NAME under the data root'})")
    result.add_argument("--workers", type=int, default=cores(), help="number of processes (%(default)s)")
    result.add_argument("--check", action="store_true", help="only check existing files; write nothing")
    result.add_argument("--partial", action="store_true", help="accept image counts that differ from the official ones")
    return result


def run(
    make_plan: Callable[[argparse.Namespace], Plan],
    args: argparse.Namespace,
    finish: Callable[[Plan], str] | None = None,
) -> int:
    """Makes a plan and executes it, or with --check only checks whether it has been executed.

    Args:
        make_plan: makes the plan from the options.
        args: the options.
        finish: writes further files of the dataset, and returns a message for the user.

    Returns:
        exit status: 0 only if there are no problems.
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
    """Makes or checks all parts, prints the report, and returns the exit status."""
    reports = [_do_part(plan, part, args) for part in plan.parts]
    print(describe(plan.table, reports, plan.notes))
    problems = [*plan.problems, *(problem for report in reports for problem in report.problems)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems; the images named above are left out of the lists. Fix them and run again.")
    return 1 if problems else 0


def relative(path: str, root: str) -> str:
    """``path`` as written in a list: relative to ``root`` if it is inside, else absolute."""
    inside = os.path.abspath(path).startswith(os.path.abspath(root) + os.sep)
    return os.path.relpath(path, root).replace(os.sep, "/") if inside else os.path.abspath(path)


def need_folder(path: str, advice: str) -> str:
    """Returns ``path``; raises UserError with ``advice`` if it is not a folder."""
    if not os.path.isdir(path):
        raise UserError(f"{path} does not exist; {advice}")
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
        for job in jobs:  # remove what the other workers were writing when an error or the user stopped them
            for path in filter(None, (job.mask, job.instances)):
                remove_partial(path)
        raise
    report.seconds = time.perf_counter() - start
    if expected is not None and len(jobs) != expected:
        report.problems.append(
            f"{part}: {len(jobs)} images were found under {plan.root}, but {expected} are expected; "
            "unpack all archives, or accept this with --partial"
        )
    _update_list(plan.list_of(part), lines, report, args.check)
    return report


def _update_list(path: str, lines: Sequence[str], report: PartReport, check: bool) -> None:
    """Writes a list unless it is up to date; with ``check``, adds a problem to the report instead."""
    current = read_lines(path) if os.path.exists(path) else None
    if current == list(lines):
        return
    if check:
        problem = "is missing" if current is None else "does not match the images in the folder"
        report.problems.append(f"{path} {problem}; run without --check")
    else:
        write_lines(path, lines)


def with_instances(jobs: Sequence[Job], table: DatasetTable) -> list[Job]:
    """The jobs, changed to also make instance maps, at the paths that the table defines."""
    return [replace(job, instances=table.paths.instance_map(job.mask)) for job in jobs]
