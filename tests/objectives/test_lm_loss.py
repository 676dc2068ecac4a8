"""The language model's loss against PyTorch's own cross-entropy, which it overwrites the logits to undercut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_mafa.objectives import language_modelling_loss


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 6),
    words=st.integers(2, 9),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1.0, 200.0]),
    weight=st.sampled_from([1.0, 0.25]),
)
def test_it_is_pytorchs_loss_and_gradient(count, words, smoothing, scale, weight):
    torch.manual_seed(count)
    head, states = torch.nn.Linear(3, words), (scale * torch.randn(count, 3)).requires_grad_()
    target = torch.randint(words, (count,))
    found = language_modelling_loss(states, target, head, smoothing)
    wanted = F.cross_entropy(head(states), target, label_smoothing=smoothing, reduction="sum") / max(1, count)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    inputs = [states, *head.parameters()]
    gradients = (torch.autograd.grad(weight * loss, inputs) for loss in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_where_nothing_is_trained_logits_stay_as_they_are():
    seen = []
    head = torch.nn.Linear(3, 5)
    head.register_forward_hook(lambda _, __, logits: seen.append((logits, logits.clone())))
    with torch.no_grad():
        language_modelling_loss(torch.randn(4, 3), torch.arange(4), head)
    assert torch.equal(*seen[0])


def test_a_graph_goes_backward_once():
    head, states = torch.nn.Linear(3, 5), torch.randn(4, 3, requires_grad=True)
    loss = language_modelling_loss(states, torch.arange(4), head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
