"""Checks everything that a plan would write, and refuses it before writing anything if a user's file is at risk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...errors import UserError
from ...ownership import RECORD, OutputFolder, identities, identity
from .files import read_lines
from .masks import Job
from .parallel import parallel

if TYPE_CHECKING:
    from .command import Plan


def protect(plan: Plan, workers: int) -> OutputFolder:
    """Checks that a plan overwrites no files of the user, and records the files that it will make.

    Args:
        plan: the plan.
        workers: number of processes that validate existing masks.

    Returns:
        the output folder with its record.

    Raises:
        UserError: the plan would overwrite a source or a file that this tool did not write, or two images would
            share a mask.
    """
    # If there is a record, it takes precedence over the first line of dataset.yaml, the only trace of earlier versions.
    earlier = plan.ours and not os.path.exists(os.path.join(plan.root, RECORD))
    folder = OutputFolder(plan.root, plan.elsewhere, ours=earlier)
    jobs = [job for part in plan.parts.values() for job in part]
    sources = identities([*plan.sources, *(path for job in jobs for path in (job.image, job.source) if path)])
    _refuse_shared_masks(jobs)
    for path in (*plan.made, *map(plan.list_of, plan.parts)):
        if identity(path) in sources:
            folder.refuse_source(path)
    for path in plan.made:
        if existing := folder.foreign(path):
            folder.refuse_foreign(existing)
    for part in plan.parts:
        _refuse_foreign_list(plan, part, folder)
    candidates = _find_keepable(plan, jobs, folder, sources)
    candidate_jobs = [job for job, _, _ in candidates]
    objections = parallel(plan.task(True).objection, candidate_jobs, workers, "existing masks")
    for (_, path, refuse), objection in zip(candidates, objections):
        if objection:
            refuse(path, objection)
    kept = {path for _, path, _ in candidates}
    masks = (path for job in jobs for path in _targets(job) if path not in kept)
    folder.add([*masks, *map(plan.list_of, plan.parts), *plan.made])
    return folder


def _targets(job: Job) -> Iterator[str]:
    return filter(None, (job.mask, job.instances))


def _find_keepable(plan: Plan, jobs: list[Job], folder: OutputFolder, sources: set) -> list[tuple]:
    """Existing masks and instance maps that this tool did not make, and that may be kept if they are valid.

    Returns:
        (job, path, function that raises the error if the file is not valid) for each.
    """
    candidates = []
    for job in jobs:
        for path in _targets(job):
            existing = folder.foreign(path)
            if identity(path) in sources:
                if not plan.in_place:
                    folder.refuse_source(path)
                candidates.append((job, path, folder.refuse_source))
            elif existing and not (plan.keep and existing == path):
                folder.refuse_foreign(existing)
            elif existing:
                candidates.append((job, path, folder.refuse_foreign))
    return candidates


def _refuse_foreign_list(plan: Plan, part: str, folder: OutputFolder) -> None:
    """Refuses an existing list that this tool did not write, unless it has the same content."""
    path = plan.list_of(part)
    existing = folder.foreign(path)
    if not existing:
        return
    try:
        same = existing == path and read_lines(path) == [plan.line(job) for job in plan.parts[part]]
    except UserError:
        same = False
    if not same:
        folder.refuse_foreign(existing)


def _refuse_shared_masks(jobs: list[Job]) -> None:
    first = {}
    for job in jobs:
        other = first.setdefault(job.mask, job)
        if job.mask and (other.source, other.key) != (job.source, job.key):
            raise UserError(
                f"{other.image} and {job.image} would both have the mask {job.mask}; nothing was written. Rename "
                "one of the two images (and its entry in the annotations)."
            )
