"""Vision transformers with LAVIS's parameter names: the ViT of ALBEF and BLIP, and BLIP-2's EVA. Needs torch alone.

Initial weights are drawn as LAVIS draws them, so that one seed gives one model.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-6  # of every LayerNorm


class PatchEmbed(nn.Module):
    """Pixels of each patch -> its token. The weights are a convolution's, whose stride is its size: a matrix product does the same."""

    def __init__(self, image_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, patches, width], or [B, k, width] of each image's ``kept`` ones [B, k]; ValueError for another size."""
        rows, columns = image.shape[2:]
        if (rows, columns) != (self.image_size, self.image_size):
            raise ValueError(f"images are {rows} x {columns}, but the ViT takes {self.image_size} x {self.image_size}.")
        side, patch = self.image_size // self.patch_size, self.patch_size
        pixels = image.reshape(len(image), 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        pixels = pixels.reshape(len(image), self.num_patches, 3 * patch**2)
        if kept is not None:
            pixels = pixels.take_along_dim(kept[:, :, None], dim=1)
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Self-attention of all tokens of an image."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.save_attention = False  # keep the next attention's probabilities, with their graph, in attention_map
        self.attention_map: Tensor | None = None  # [B, heads, N, N]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]"""
        # views, whose gradients are joined in one copy
        q, k, v = F.linear(x, self.qkv.weight, self.qkv_bias()).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.save_attention:
            self.attention_map = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
            mixed = self.attention_map @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def qkv_bias(self) -> Tensor:
        return self.qkv.bias


class EvaAttention(Attention):
    """Keys have no bias: it would add the same to all logits of a query."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qkv_bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def qkv_bias(self) -> Tensor:
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before it; in training an image skips each with probability ``drop_path``."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float, attention: Any) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]"""
        x = self._add(x, self.attn(self.norm1(x)))
        return self._add(x, self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x + branch
        kept = 1 - self.drop_path
        scale = (torch.rand(len(x), 1, 1, device=x.device) + kept).floor_() / kept
        return x + branch * scale.to(branch.dtype)


class VisionTransformer(nn.Module):
    """The ViT of ALBEF and BLIP (ViT-B/16: width 768, depth 12, heads 12); its first token is the class token.

    Args:
        image_size: pixels of each side; ``patch_size`` divides it.
        drop_path: probability that an image skips a layer's branch, of the last block; it rises from 0 at the first (stochastic depth).
        drop_patches: share of the patches that each image goes without in training, at random (FLIP, arXiv 2212.00794). The class token
            stays, and so does at least one patch; in eval mode nothing is dropped.
        gradient_checkpointing: keep only what goes into each block, and compute the block again in backward.

    Example:
        >>> vit = VisionTransformer(image_size=32, patch_size=8, width=64, depth=2, heads=2)
        >>> vit(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 17, 64])
    """

    attention: Any = Attention

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        drop_patches: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.num_features, self.drop_patches, self.gradient_checkpointing = width, drop_patches, gradient_checkpointing
        self.patch_embed = PatchEmbed(image_size, patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        hidden, of_last = int(width * mlp_ratio), max(1, depth - 1)
        self.blocks: Any = nn.ModuleList(Block(width, heads, hidden, drop_path * i / of_last, self.attention) for i in range(depth))
        self.norm: nn.Module = nn.LayerNorm(width, eps=EPSILON)
        _draw(self.pos_embed)
        _draw(self.cls_token)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                _draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> token states [B, 1 + patches, width], of the patches that are not dropped"""
        first, places = (self.cls_token + self.pos_embed[:, :1]).expand(len(image), -1, -1), self.pos_embed[:, 1:]
        kept = self._kept(image) if self.training and self.drop_patches > 0 else None
        if kept is not None:
            places = F.embedding(kept, places[0])
        x = torch.cat([first, self.patch_embed(image, kept) + places], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> token states [B, 1 + patches, width]"""
        return self.forward_features(image)

    def _kept(self, image: Tensor) -> Tensor:
        """LongTensor[B, k]: patches of each image, any k of them with equal chances; attention does not see their order."""
        patches = self.patch_embed.num_patches
        count = max(1, patches - round(self.drop_patches * patches))
        return torch.rand(len(image), patches, device=image.device).topk(count, dim=1, sorted=False).indices


@torch.no_grad()
def _draw(weight: Tensor) -> None:
    """Normal with standard deviation 0.02, by the numbers that timm draws for LAVIS (torch's own initialiser draws others)."""
    weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)


class EvaVit(VisionTransformer):
    """BLIP-2's ViT (EVA ViT-g/14: width 1408, depth 39, heads 16, mlp_ratio 4.3637), at any size, without a norm at its end.

    It brings its own precision: LAVIS leaves that to the caller, so that half of its methods fail on half-precision weights.

    Args:
        frozen: no gradients, no graph, and always in eval mode.
        dtype: what it computes in; norms and embeddings stay fp32.
        sizes: as :class:`VisionTransformer` takes them, by name.
    """

    attention: Any = EvaAttention
    frozen = False

    def __init__(self, frozen: bool = False, dtype: torch.dtype = torch.float32, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.norm = nn.Identity()
        self.frozen, self.dtype = frozen, dtype
        self.as_published = False  # has it still the weights of the file that init names?
        for i, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.data.div_(math.sqrt(2 * i))
        if frozen:
            self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EvaVit:
        return super().train(mode and not self.frozen)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> token states [B, 1 + patches, width]; fp32 unless the caller computes in less."""
        kind = image.device.type
        caller_in_half = torch.is_autocast_enabled(kind)
        half = self.dtype != torch.float32
        context: Any = torch.autocast(kind, dtype=self.dtype) if half else contextlib.nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), context:
            states = self.forward_features(image)
        return states if caller_in_half else states.float()


def resize_images(image: Tensor, size: int) -> Tensor:
    """Images of another size: [B, 3, H, W] -> [B, 3, size, size], on their device; as they are where they have it.

    Bicubic and antialiased, the filter of our image processors, so that they are nearly what those would have made at that size.
    """
    if tuple(image.shape[2:]) == (size, size):
        return image
    return F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def resize_positions(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings of another image size, those of patches interpolated: [1, 1 + n, width] -> [1, 1 + patches, width].

    They stay as they are where the number is right, or is that of no square.

    Example:
        >>> resize_positions(torch.zeros(1, 1 + 4 * 4, 8), patches=6 * 6).shape
        torch.Size([1, 37, 8])
    """
    first, grid = positions[:, :1], positions[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(patches)
    if old == new or old**2 != grid.shape[1] or new**2 != patches:
        return positions
    grid = grid.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([first.float(), grid.flatten(2).transpose(1, 2)], dim=1)


def fit_position_embeddings(
    state: dict[str, Tensor], encoder: VisionTransformer, name: str = "visual_encoder.pos_embed"
) -> dict[str, Tensor]:
    """Resize a checkpoint's position embeddings to the image size of ``encoder``; another width is left for the error."""
    if name not in state or state[name].shape[-1] != encoder.num_features:
        return state
    return {**state, name: resize_positions(state[name], encoder.patch_embed.num_patches)}
