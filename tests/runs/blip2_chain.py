"""Con-D, stage 1 with MAFA, stage 2, captions and answers, one after another in the same processes. Run by torchrun.

Arguments: emoji folder, one free port for each job, options of all jobs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from lavis_mafa.files import last_checkpoint
from lavis_mafa.runners.job import run_job


def main(emoji: str, ports: str, *options: str) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher's store would remember the group of the job before
    free = iter(ports.split(","))
    folders = {}

    def start(name: str, *more: str) -> Any:
        os.environ["MASTER_PORT"] = next(free)
        common = [f"datasets.grit_emoji.build_info.root={emoji}", f"run.output_dir={name}", *options]
        runner = run_job(f"mafa/quickstart/blip2/{name}.yaml", [*common, *more])
        folders[name] = str(runner.output_dir)
        return runner

    con_d = last_checkpoint(start("con_d").output_dir)
    # an untrained Con-D is never sure: with these thresholds some pairs become positives all the same
    ecm = ("model.ecm.threshold=0.2", "model.ecm.ambiguous_from=0.1", "model.ecm.use_in=[itc,itm,lm]")
    stage_1 = start("stage_1", f"model.pretrained={con_d}", f"model.discriminator.checkpoint={con_d}", *ecm)
    stage_2 = start("stage_2", f"model.stage_1={last_checkpoint(stage_1.output_dir)}")
    for name in ("captions", "vqa"):
        start(name, f"model.pretrained={last_checkpoint(stage_2.output_dir)}", "run.num_beams=2", "run.max_len=6")
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(folders))


if __name__ == "__main__":
    main(*sys.argv[1:])
