"""The contrastive loss for a loop of one's own: CLIP's loss, a loop over all pairs, and two ranks against one.

``python test_dual_encoder.py OUT`` below a launcher: each rank's half of the batch, and the gradients averaged as DDP does.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import launched
from lavis_mafa.objectives import MafaItcLoss

COUNT, WIDTH, SCALE = 8, 6, 5.0
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.1, "smoothing": 0.5},
    "eliminated": {"threshold": 0.3, "false_negatives": "eliminate"},
}


def features(seed: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
    made = F.normalize(torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return made[0], made[1]


def by_loops(image: Tensor, text: Tensor, scores: Tensor | None, keys: Tensor, kind: dict[str, Any]) -> tuple[float, float]:
    """Loss and share of false negatives, one pair at a time (MAFA section 4.1, eq. 1 and 5)."""
    count, total, found_pairs, unlabelled = len(image), 0.0, 0, 0
    for anchors, candidates, judged in ((image, text, scores), (text, image, None if scores is None else scores.T)):
        for b in range(count):
            known = {k for k in range(count) if k == b or (keys[b] >= 0 and keys[b] == keys[k])}
            least = kind.get("threshold")
            if "margin" in kind:
                least = judged[b, b] - kind["margin"]
            found = {k for k in range(count) if judged is not None and k not in known and judged[b, k] > least}
            found_pairs, unlabelled = found_pairs + len(found), unlabelled + count - len(known)
            left = [k for k in range(count) if kind.get("false_negatives") != "eliminate" or k not in found]
            positives = known if kind.get("false_negatives") == "eliminate" else known | found
            logits = {k: SCALE * float(anchors[b] @ candidates[k]) for k in left}
            whole = math.log(sum(math.exp(logit) for logit in logits.values()))
            smoothing = kind.get("smoothing", 0.0)
            for k in left:
                target = (1 - smoothing) * (k in positives) / len(positives) + smoothing / len(left)
                total -= target * (logits[k] - whole)
    return total / (2 * count), found_pairs / max(unlabelled, 1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(0, 999), st.lists(st.integers(-1, 4), min_size=COUNT, max_size=COUNT))
def test_it_is_the_loop(name, seed, keys):
    kind, (image, text), (guide_image, guide_text) = KINDS[name], features(seed), features(seed + 1)
    guide = None if name == "plain" else (guide_image, guide_text)
    scores = None if guide is None else guide_image @ guide_text.T
    output = MafaItcLoss(**kind)(image, text, SCALE, ids=torch.tensor(keys), guide=guide)
    loss, share = by_loops(image.double(), text.double(), scores, torch.tensor(keys), kind)
    assert output.loss.item() == pytest.approx(loss, rel=1e-4) and output.false_negative_share.item() == pytest.approx(share)
    if scores is not None:
        assert torch.equal(MafaItcLoss(**kind)(image, text, SCALE, ids=torch.tensor(keys), scores=scores).loss, output.loss)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_without_false_negatives_it_is_clips_loss(seed):
    image, text = features(seed)
    logits, own = image @ text.T * SCALE, torch.arange(COUNT)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    for criterion, scores in ((MafaItcLoss(), None), (MafaItcLoss(threshold=0.5), torch.eye(COUNT))):
        output = criterion(image, text, SCALE, scores=scores)
        assert output.false_negative_share == 0
        torch.testing.assert_close(output.loss, clip)


def test_where_nobody_was_asked_nothing_is_found():
    (image, text), scores = features(0), torch.full((COUNT, COUNT), float("-inf"))
    scores[0, 1] = 0.9
    assert MafaItcLoss(margin=0.1)(image, text, SCALE, scores=scores).false_negative_share == 0
    assert MafaItcLoss(threshold=0.8)(image, text, SCALE, scores=scores).false_negative_share == pytest.approx(
        1 / (COUNT * (COUNT - 1))
    )


def test_what_does_not_fit_is_said():
    (image, text), scores = features(0), torch.eye(COUNT)
    for arguments in ({"threshold": 0.5, "margin": 0.1}, {"smoothing": 2.0}, {"false_negatives": "delete"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            MafaItcLoss(**arguments)
    for criterion, more, message in (
        (MafaItcLoss(), {"scores": scores}, "threshold or margin"),
        (MafaItcLoss(margin=0.1), {}, "a guide or scores"),
        (MafaItcLoss(margin=0.1), {"guide": (image, text), "scores": scores}, "both given"),
        (MafaItcLoss(margin=0.1), {"scores": scores[:2]}, r"must be \[8, 8\]"),
        (MafaItcLoss(margin=0.1), {"guide": (image[:2], text)}, "2 images and 8 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(image, text, SCALE, **more)
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        MafaItcLoss()(image, text[:2], SCALE)


def gradients(name: str, first: int, end: int, gather: bool) -> dict[str, Tensor]:
    """Of two small towers, over a part of the batch; the mean over ranks."""
    torch.manual_seed(0)
    towers, scale = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]), nn.Parameter(torch.tensor(SCALE))
    images, texts = features(3)
    image, text = (F.normalize(tower(rows[first:end]), dim=-1) for tower, rows in zip(towers, (images, texts), strict=True))
    guide = None if name == "plain" else tuple(rows[first:end] for rows in features(4))
    keys = torch.tensor([0, 1, 2, 3, 0, 4, 5, 2])[first:end]
    MafaItcLoss(**KINDS[name], gather=gather)(image, text, scale, ids=keys, guide=guide).loss.backward()
    found = {name: parameter.grad for name, parameter in (*towers.named_parameters(), ("scale", scale))}
    for gradient in found.values():
        if gather:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


@pytest.mark.ranks
def test_two_ranks_that_gather_have_the_gradients_of_one(tmp_path):
    done = launched.run(__file__, tmp_path / "found.pth", cwd=tmp_path, processes=2, timeout=120)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pth", weights_only=True)
    for name in KINDS:
        wanted = gradients(name, 0, COUNT, gather=False)
        assert min(gradient.abs().max() for gradient in wanted.values()) > 1e-3
        for part, gradient in wanted.items():
            torch.testing.assert_close(found[name][part], gradient, atol=1e-6, rtol=1e-4, msg=f"{name}: {part}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    half = COUNT // 2
    found_here = {name: gradients(name, dist.get_rank() * half, (dist.get_rank() + 1) * half, gather=True) for name in KINDS}
    if dist.get_rank() == 0:
        torch.save(found_here, sys.argv[1])
    dist.destroy_process_group()
