"""TCL in albef_mafa: whose features of which view are contrasted, and what a step without a second view is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from families import TEACHER, batch, build, step
from lavis_mafa.errors import UserError

ALBEF = ("albef", True)
TCL = {"momentum_distillation": {**TEACHER["momentum_distillation"], "momentum": 1.0}, "intra_modal": ["global", "local"]}


def two_views(**more):
    samples = batch(ALBEF, **more)
    return {**samples, "image_second_view": samples["image"].flip(3)}


def other_teacher(model):
    """Another one than the student."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_m." in name and parameter.dim() > 1:
                parameter.mul_(1.3)
    return model


@torch.no_grad()
def test_anchors_are_the_models_and_keys_the_teachers_of_the_second_view():
    model = other_teacher(build(ALBEF, itc=TCL)).eval()
    samples = two_views()
    inputs = model.inputs(samples)
    found = model.encode(inputs).batch
    ids, mask = model.words(samples["text_input"])
    image = F.normalize(model.vision_proj(model.visual_encoder.forward_features(samples["image"])[:, 0]), dim=-1)
    patches = F.normalize(model.vision_proj_m(model.visual_encoder_m.forward_features(samples["image_second_view"])), dim=-1)
    text = F.normalize(model.text_proj(model.text_states(ids, mask)[:, 0]), dim=-1)
    words = F.normalize(model.text_proj_m(model.text_states(ids, mask, encoder=model.text_encoder_m)), dim=-1)
    keys_image = torch.cat([patches[:, 0], model.image_queue.T])
    keys_text = torch.cat([words[:, 0], model.text_queue.T])
    torch.testing.assert_close(found.intra.whole[0], image @ keys_image.T)
    torch.testing.assert_close(found.intra.whole[1], text @ keys_text.T)
    torch.testing.assert_close(found.sim_t2i, text @ keys_image.T)  # the second view is the key of texts too
    of_patches, of_words, real = found.intra.parts
    assert of_patches.shape == (4, 4, 4) and torch.equal(real, mask[:, 1:])
    for b in range(4):
        for k in range(4):
            for n in range(4):  # of 4 x 4 patches four regions of 2 x 2
                corner = 8 * (n // 2) + 2 * (n % 2)
                region = patches[k, [1 + corner, 2 + corner, 5 + corner, 6 + corner]].mean(dim=0)
                torch.testing.assert_close(of_patches[b, k, n], image[b] @ region)
            for n in range(int(mask[k].sum()) - 1):
                torch.testing.assert_close(of_words[b, k, n], text[b] @ words[k, n + 1])


def test_a_step_logs_both_losses_and_every_weight_has_a_gradient():
    model = other_teacher(build(ALBEF, itc=TCL))
    output, gradients = step(model, two_views())
    assert {"loss_imc", "loss_lmi"} < output.stats.keys() and output.loss.isfinite()
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_without_a_second_view_a_step_is_refused():
    model = build(ALBEF, itc=TCL)
    with pytest.raises(UserError, match="samples has no 'image_second_view', with which model.itc.intra_modal"):
        model(batch(ALBEF))
    for wrong in (torch.zeros(3, 3, 32, 32), torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "a file"):
        with pytest.raises(UserError, match=r"samples\['image_second_view'\] is .*; needed: another view of each image"):
            model({**batch(ALBEF), "image_second_view": wrong})
