"""Later releases of transformers: what depends on them, tested in a process that has one of them before the environment's own.

``run_scripts/test.sh`` installs those of ``run_scripts/constraints/newer.txt`` below ``.venv``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RELEASES = re.findall("transformers==([0-9.]+)", (ROOT / "run_scripts/constraints/newer.txt").read_text())
TESTS = """
test_plugin.py::test_load_model_needs_no_import_of_ours
models/test_albef_mafa.py::test_one_step_equals_lavis_albef_pretrain
models/test_albef_mafa.py::test_the_fusion_layers_start_from_berts_upper_layers
models/test_albef_vqa.py::test_a_step_is_that_of_lavis
models/test_albef_vqa.py::test_generated_words_are_the_likeliest
models/test_blip_mafa.py::test_one_step_equals_lavis_blip_pretrain
models/test_blip_mafa.py::test_a_checkpoint_loads_into_lavis_matching_and_captioning
models/test_blip2_mafa.py::test_one_step_equals_lavis_stage_1
models/test_blip2_mafa.py::test_our_checkpoint_gives_the_same_logits_in_lavis
models/test_blip2_mafa.py::test_the_qformer_starts_from_berts_weights
models/test_blip2_opt_mafa.py::test_frozen_parts_with_a_file_of_their_own_are_not_saved_again
models/test_blip2_opt_mafa.py::test_answers_are_trained_after_their_questions
models/test_blip2_opt_mafa.py::test_the_length_penalty_counts_generated_tokens_alone
models/test_con_d.py::test_a_lavis_checkpoint_gives_lavis_probabilities
models/test_generation.py
models/test_lavis_interface.py::test_captions_by_the_number
models/test_words.py::test_any_text_is_cut_as_by_transformers
tools/test_export.py::test_transformers_blip_says_the_same
tools/test_hub.py::test_transformers_matches_as_ours
tools/test_hub.py::test_transformers_writes_what_ours_writes
"""


@pytest.mark.parametrize("release", RELEASES)
def test_our_models_run_on(release):
    overlay = ROOT / ".venv" / f"transformers-{release}"
    assert (overlay / "transformers").is_dir(), f"{overlay} is missing; run_scripts/test.sh installs it"
    path = os.pathsep.join(filter(None, [str(overlay), str(ROOT), os.environ.get("PYTHONPATH")]))
    which = "import pytest, sys, transformers; print(transformers.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", which, "-p", "no:cacheprovider", *(f"tests/{test}" for test in TESTS.split())]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.startswith(release) and done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
