"""Looks at everything that a plan would write, and refuses it before the first byte if something is not ours."""

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
    """Records what the plan is about to make.

    Raises:
        UserError: it would overwrite a source or a file that this tool did not write, or two images share a mask.
    """
    # A record knows better than the table's first line, which is all that earlier versions left.
    earlier = plan.ours and not os.path.exists(os.path.join(plan.root, RECORD))
    folder = OutputFolder(plan.root, plan.elsewhere, ours=earlier)
    jobs = [job for part in plan.parts.values() for job in part]
    sources = identities([*plan.sources, *(path for job in jobs for path in (job.image, job.source) if path)])
    _refuse_shared_masks(jobs)
    for path in (*plan.made, *map(plan.list_of, plan.parts)):
        if identity(path) in sources:
            folder.refuse_source(path)
    for path in plan.made:
        if there := folder.foreign(path):
            folder.refuse_foreign(there)
    for part in plan.parts:
        _refuse_foreign_list(plan, part, folder)
    kept = _not_ours(plan, jobs, folder, sources)
    look = [job for job, _, _ in kept]
    for (_, path, refuse), why in zip(kept, parallel(plan.task(True).objection, look, workers, "masks that are there")):
        if why:
            refuse(path, why)
    others = {path for _, path, _ in kept}
    masks = (path for job in jobs for path in _targets(job) if path not in others)
    folder.add([*masks, *map(plan.list_of, plan.parts), *plan.made])
    return folder


def _targets(job: Job) -> Iterator[str]:
    return filter(None, (job.mask, job.instances))


def _not_ours(plan: Plan, jobs: list[Job], folder: OutputFolder, sources: set) -> list[tuple]:
    """(job, path, what refuses it) of masks and instance maps that are there, not ours, and may be kept if right."""
    kept = []
    for job in jobs:
        for path in _targets(job):
            there = folder.foreign(path)
            if identity(path) in sources:
                if not plan.in_place:
                    folder.refuse_source(path)
                kept.append((job, path, folder.refuse_source))
            elif there and not (plan.keep and there == path):
                folder.refuse_foreign(there)
            elif there:
                kept.append((job, path, folder.refuse_foreign))
    return kept


def _refuse_foreign_list(plan: Plan, part: str, folder: OutputFolder) -> None:
    """Refuse an existing list that this tool did not write, unless it has the same content."""
    path = plan.list_of(part)
    there = folder.foreign(path)
    if not there:
        return
    try:
        same = there == path and read_lines(path) == [plan.line(job) for job in plan.parts[part]]
    except UserError:
        same = False
    if not same:
        folder.refuse_foreign(there)


def _refuse_shared_masks(jobs: list[Job]) -> None:
    first = {}
    for job in jobs:
        other = first.setdefault(job.mask, job)
        if job.mask and (other.source, other.key) != (job.source, job.key):
            raise UserError(
                f"{other.image} and {job.image} would both have the mask {job.mask}; rename one of the two "
                "images (and its entry in the annotations). Nothing was written."
            )
