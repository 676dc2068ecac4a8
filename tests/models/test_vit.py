"""Our vision transformers against LAVIS's, which are the oracle for all that both can do."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.models import eva_vit, vit
from torch import Tensor, nn

import reduced
import reduced_blip
import reduced_blip2
from lavis_mafa.models.vit import EvaVit, VisionTransformer, fit_position_embeddings, resize_positions

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
EPSILON = partial(nn.LayerNorm, eps=1e-6)
SMALL: dict[str, Any] = {"image_size": 24, "patch_size": 6, "width": 16, "depth": 2, "heads": 2}
KINDS = ("ViT", "EVA")


def lavis(kind: str, image_size: int, patch_size: int, width: int, depth: int, heads: int, drop_path: float = 0.0) -> Any:
    sizes: dict[str, Any] = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
    sizes |= {"norm_layer": EPSILON, "drop_path_rate": drop_path}
    if kind == "ViT":
        return vit.VisionTransformerEncoder(**sizes)
    return eva_vit.VisionTransformer(**sizes, mlp_ratio=4.3637, qkv_bias=True, use_mean_pooling=False)


def ours(kind: str, **sizes: Any) -> VisionTransformer:
    return VisionTransformer(**sizes) if kind == "ViT" else EvaVit(**sizes, mlp_ratio=4.3637)


def pair(kind: str, **sizes: Any) -> tuple[Any, VisionTransformer]:
    """LAVIS's, and ours with its weights, which are larger than initial ones and no bias of which is 0."""
    torch.manual_seed(0)
    theirs, mine = lavis(kind, **sizes), ours(kind, **sizes)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def images(count: int = 3, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def states_and_gradients(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)  # of what drop_path draws
    states = model.forward_features(image)
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    return states.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def same(theirs: nn.Module, mine: nn.Module, image: Tensor, within: float = 1e-5) -> None:
    wanted, found = states_and_gradients(theirs, image), states_and_gradients(mine, image)
    torch.testing.assert_close(found[0], wanted[0], rtol=within, atol=within)
    assert list(found[1]) == [name for name, _ in theirs.named_parameters()]
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=within, atol=within, msg=f"{name}")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3)))
def test_states_and_gradients_are_those_of_lavis_at_any_size(kind, sizes):
    side, patch_size, heads, of_head, depth = sizes
    size = side * patch_size
    theirs, mine = pair(kind, image_size=size, patch_size=patch_size, width=heads * of_head, depth=depth, heads=heads)
    same(theirs.double(), mine.double(), images(2, size).double(), within=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_lavis_in_fp32(kind):
    same(*pair(kind, image_size=48, patch_size=6, width=192, depth=3, heads=3), images(8, 48))


@pytest.mark.parametrize("kind", KINDS)
def test_drop_path_leaves_out_what_lavis_leaves_out_under_one_seed(kind):
    theirs, mine = pair(kind, **SMALL, drop_path=0.6)
    same(theirs.train(), mine.train(), images(16))
    close(mine.eval()(images()), theirs.eval()(images()))
    assert not torch.allclose(mine.train()(images(16)), mine(images(16)))  # each image and step by itself


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_not_even_of_what_is_drawn(kind):
    plain = ours(kind, **SMALL, drop_path=0.5).train()
    careful = ours(kind, **SMALL, drop_path=0.5, gradient_checkpointing=True).train()
    careful.load_state_dict(plain.state_dict())
    same(plain, careful, images(8))


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_lavis_weights_in_its_order_and_leaves_the_generator_where_lavis_does(kind):
    made = []
    for build in (lavis, ours):
        torch.manual_seed(5)
        made.append((list(build(kind, **SMALL).state_dict().items()), torch.rand(1)))
    (theirs, after), (mine, after_mine) = made
    assert [name for name, _ in mine] == [name for name, _ in theirs] and torch.equal(after, after_mine)
    assert all(torch.equal(value, other) for (_, value), (_, other) in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_both_ways(kind):
    theirs, mine = pair(kind, **SMALL)
    theirs.load_state_dict(deepcopy(mine).state_dict())
    close(theirs(images()), mine(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eva_computes_in_its_precision_as_lavis_does_under_autocast(dtype):
    theirs, mine = pair("EVA", **SMALL)
    exact = theirs(images()).detach()
    half = EvaVit(frozen=True, dtype=dtype, **SMALL, mlp_ratio=4.3637)
    half.load_state_dict(theirs.state_dict())
    for model in (theirs, half):
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        wanted = theirs(images()).detach().float()
    found = half(images())
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found - exact).abs().max() < 2 * (wanted - exact).abs().max()
    with torch.autocast("cpu", dtype=dtype):
        assert half(images()).dtype == theirs(images()).dtype


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_whole_half_models_stay_as_near_as_lavis(kind):
    theirs, mine = pair(kind, **SMALL, drop_path=0.5)
    exact = theirs.eval()(images()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = theirs(images()), mine.eval()(images())
        assert mine.train()(images()).dtype == wanted.dtype == found.dtype
    assert (found - exact).abs().max() < 2 * (wanted - exact).abs().max()
    theirs.to(torch.bfloat16), mine.eval().to(torch.bfloat16)
    wanted, found = theirs(images().bfloat16()), mine.forward_features(images().bfloat16())
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 2 * (wanted - exact).abs().max()


def test_a_copy_has_weights_of_its_own():
    model = VisionTransformer(**SMALL, gradient_checkpointing=True)
    before, copy = model(images()), deepcopy(model)
    with torch.no_grad():
        copy.blocks[1].mlp.fc2.bias[0].add_(1.0)  # LAVIS's copies run the layers of the model that they were copied from
    assert torch.equal(model(images()), before) and (copy(images()) - before).abs().max() > 0.1


@settings(max_examples=20, deadline=None)
@given(old=st.integers(1, 9), new=st.integers(1, 9))
def test_positions_are_resized_as_lavis_does(old, new):
    state = {"pos_embed": torch.randn(1, 1 + old**2, 8), "other": torch.zeros(1)}
    encoder = ours("EVA", **(SMALL | {"width": 8, "image_size": new, "patch_size": 1}))
    wanted = dict(state)
    eva_vit.interpolate_pos_embed(encoder, wanted)
    found = fit_position_embeddings(state, encoder, "pos_embed")
    torch.testing.assert_close(found["pos_embed"], wanted["pos_embed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pos_embed"], vit.interpolate_pos_embed(state["pos_embed"], encoder), rtol=0, atol=1e-6)
    assert found["other"] is state["other"] and state["pos_embed"].shape[1] == 1 + old**2


def test_positions_that_cannot_be_resized_are_left_for_the_error():
    no_square, other_width = torch.zeros(1, 1 + 6, 16), torch.zeros(1, 1 + 4, 8)
    assert resize_positions(no_square, 16) is no_square
    state = {"visual_encoder.pos_embed": other_width}
    assert fit_position_embeddings(state, ours("ViT", **SMALL)) == state


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images are 30 x 24, but the ViT takes 24 x 24"):
        ours("ViT", **SMALL)(torch.zeros(1, 3, 30, 24))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("share", "count"), [(0.25, 12), (0.5, 8), (0.9, 2), (0.99, 1)])
def test_dropped_patches_are_no_part_of_an_image(kind, share, count):
    model = ours(kind, **SMALL, drop_patches=share).double().train()
    image, drawn = images(5).double(), []
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    keep = model._kept
    model._kept = lambda image: drawn.append(keep(image)) or drawn[-1]  # type: ignore[method-assign]
    found = states_and_gradients(model, image)
    (kept,), states = drawn, []
    assert kept.shape == (5, count) and all(len(set(row)) == count and set(row) <= set(range(16)) for row in kept.tolist())
    model.zero_grad()
    for one, row in zip(image, kept.tolist(), strict=True):
        pixels = model.patch_embed.proj(one[None])[0]  # [width, 4, 4]
        tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        tokens += [pixels[:, i // 4, i % 4] + model.pos_embed[0, 1 + i] for i in row]
        states.append(model.norm(nn.Sequential(*model.blocks)(torch.stack(tokens)[None]))[0])
    wanted = torch.stack(states)
    (wanted * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-9, atol=1e-9)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[1][name], weight.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_every_patch_is_kept_equally_often_and_each_image_keeps_others():
    model = ours("ViT", **SMALL, drop_patches=0.75)
    kept = model._kept(torch.zeros(20_000, 3, 24, 24))
    assert (kept.flatten().bincount(minlength=16) / 20_000 - 0.25).abs().max() < 0.02
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1500  # of 1820


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_or_drawn_in_eval_mode_or_at_0(kind):
    plain, dropping = ours(kind, **SMALL), ours(kind, **SMALL, drop_patches=0.5)
    dropping.load_state_dict(plain.state_dict())
    before = torch.get_rng_state()
    assert torch.equal(dropping.eval()(images()), plain.train()(images())) and torch.equal(before, torch.get_rng_state())
    assert dropping.train()(images()).shape[1] == 1 + 8


def test_no_number_is_read_from_the_device():
    """A meta tensor has none."""
    with torch.device("meta"):
        model = ours("ViT", **SMALL, drop_path=0.5, drop_patches=0.5).train()
        assert model(torch.empty(3, 3, 24, 24)).shape == (3, 9, 16)


@pytest.mark.parametrize("host", ["albef", "blip", "blip2"])
def test_a_model_trains_on_half_of_each_image_and_its_teacher_sees_all(host):
    dropping: dict[str, Any] = {"image_encoder": {"drop_patches": 0.5}}
    if host == "blip2":
        dropping["image_encoder"]["freeze"] = False
    else:
        dropping["itc"] = {"momentum_distillation": {"queue_size": 8}}
    family: Any = {"albef": reduced, "blip": reduced_blip, "blip2": reduced_blip2}[host]
    model, seen = family.ours(**dropping).train(), {}
    for name in ("visual_encoder", "visual_encoder_m"):
        for block in getattr(getattr(model, name, None), "blocks", ())[:1]:
            block.register_forward_hook(lambda _, __, states, name=name: seen.update({name: states.shape[1]}))
    model(family.batch(4)).loss.backward()
    assert seen == ({"visual_encoder": 9} if host == "blip2" else {"visual_encoder": 9, "visual_encoder_m": 17})
    assert all(weight.grad.isfinite().all() for weight in model.visual_encoder.parameters())
