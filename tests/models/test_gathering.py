"""batch_scope: global on two processes has the gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

import gathering
import launched

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gathering") / "found.pth"
    done = launched.run(gathering.__file__, path, cwd=path.parent, processes=2, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("model", gathering.MODELS)
def test_two_processes_have_the_gradients_and_the_queue_of_one(of_two_processes, model):
    found, wanted = of_two_processes[model]["whole"], gathering.gradients(model, 0, 8)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("model", "first_text_layer"),
    [("albef", "text_encoder.bert.encoder.layer.0."), ("blip", None)],  # BLIP's texts are matched from their ids: nothing to gather
)
def test_the_comparison_says_something(of_two_processes, model, first_text_layer):
    """These gradients are not that small, and without those of the other rank it fails."""
    wanted = of_two_processes[model]["whole"]
    assert min(wanted[name].abs().max() for name in ("temp", "vision_proj.weight", "itm_head.weight")) > 1e-3
    away = {name: float((of_two_processes[model]["cut"][name] - gradient).abs().max()) for name, gradient in wanted.items()}
    assert max(away[n] for n in away if n.startswith("visual_encoder.")) > 1e-3
    if first_text_layer is not None:
        assert max(away[n] for n in away if n.startswith(first_text_layer)) > 1e-3
