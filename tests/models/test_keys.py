"""ITC's keys carry no gradient: what an anchor is compared with is not moved by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import families


@pytest.mark.parametrize("family", ["albef", "blip", "blip2"])
def test_the_gradient_of_itc_flows_through_the_anchors_alone(family):
    model = families.build((family, False), itc={"smoothing": 0.0})
    samples, own = families.batch((family, False)), torch.arange(4)
    _, image = model.image_rows(samples["image"])
    _, text = model.text_rows(samples["text_input"])
    image = image if family == "blip2" else image[:, None]
    i2t = torch.einsum("iqd,td->itq", image, text.detach()).amax(dim=2) / model.temp
    t2i = torch.einsum("iqd,td->tiq", image.detach(), text).amax(dim=2) / model.temp
    ((F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own)) / 2).backward()
    weights = [model.vision_proj.weight, model.text_proj.weight, model.temp]
    wanted = [weight.grad.clone() for weight in weights]
    model.zero_grad()
    model(samples).loss_itc.backward()
    for weight, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4)
    assert all(gradient.abs().max() > 1e-4 for gradient in wanted)
