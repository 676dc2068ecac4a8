"""Settings that the task of a run never looks at: accepted means applied."""

from __future__ import annotations

import dataclasses

from lavis_mafa.common.errors import Mistakes
from lavis_mafa.common.settings import RunBlock
from lavis_mafa.common.typed import in_file

PRETRAINING_ALONE = ("record_connections", "k_test", "rank_by", "coco_captions")


def check_used(run: RunBlock, where: str = "") -> None:
    """Settings of pre-training and of retrieval in the runs of other tasks, which never look at them; raises UserError."""
    found, unset = Mistakes(), dataclasses.asdict(type(run)())
    for name in PRETRAINING_ALONE if run.task != "mafa_pretrain" else ():
        if (value := getattr(run, name)) != unset[name]:
            found.add(f"run.{name} is {value!r}, but {run.task} has no use for it; leave it out.{in_file(where)}")
    if run.grit.enabled and run.task != "mafa_pretrain":
        found.add(f"run.grit.enabled is true, but {run.task} has no use for it; allowed: false.{in_file(where)}")
    found.end()
