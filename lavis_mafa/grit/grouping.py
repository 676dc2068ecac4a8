"""The similarity chain: an order in which neighbours are alike (GRIT-VLP, section 4.1, phase 3, eq. 5).

Two ways to walk it. ``memory="matrix"`` computes all similarities at once, O(M^2) memory, and is the fast one for the M of the
papers (1920, 4800). ``memory="rows"`` computes one matrix-vector product per hop, O(M * d) memory, for an M in the tens of
thousands.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Memory = Literal["matrix", "rows"]

# Similarities of one chunk of sub-queues, both directions: 2**27 fp32 numbers are 512 MiB. A single larger sub-queue is still
# walked (M = 9600 needs 737 MB); past that, memory="rows" is the answer.
MATRIX_BUDGET = 2**27

# Below this many rows, dropping the visited ones costs more than reading past them.
SMALLEST_TO_SHRINK = 1024

VISITED = float("-inf")


def group_by_similarity(image_features: Tensor, text_features: Tensor, start: int = 0, *, memory: Memory = "matrix") -> Tensor:
    """Order M image-text pairs so that each is followed by its most similar unvisited pair (GRIT-VLP, eq. 5).

    From ``start``, the first hop looks from the current image for the nearest text, the second from the current text for the
    nearest image, and so on in turn. Visited pairs are masked with -inf on the raw dot product: without softmax and temperature
    nothing can underflow, so every pair is visited exactly once. Ties go to the lowest row.

    Similarities are computed in fp32, also under autocast and for fp16 or bf16 features. The two ways of ``memory`` sum the
    same products in an order the BLAS library chooses, so they may part where two candidates differ by less than fp32 rounding
    (about 1e-7 for unit features); elsewhere their orders are identical.

    Args:
        image_features: [M, d], any floating dtype; row i belongs to pair i.
        text_features: [M, d], on the same device.
        start: the pair the chain begins with.
        memory: "matrix" holds two M x M similarity matrices; "rows" needs O(M * d) memory.

    Returns:
        LongTensor[M], a permutation of ``range(M)``, on the features' device.

    Raises:
        ValueError: shapes differ or are not [M, d]; a feature is NaN or infinite (the message lists the rows) or so large that
            a similarity would overflow; ``start`` is not a row; ``memory`` is neither way.

    Example:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
        >>> group_by_similarity(image, image, start=0)
        tensor([0, 2, 1])
    """
    _check_features(image_features, text_features, dims="M, d")
    size = image_features.shape[0]
    if not 0 <= start < max(size, 1):
        raise ValueError(f"start is {start}, but must be a row of the features: 0 <= start < {size}.")
    first = torch.tensor([start], device=image_features.device)
    return _group(image_features[None], text_features[None], first, memory)[0]


def group_sub_queues(image_features: Tensor, text_features: Tensor, start: Tensor, *, memory: Memory = "matrix") -> Tensor:
    """Order Q sub-queues of M pairs each, all at once: row q is ``group_by_similarity`` of sub-queue q, to the last index.

    The sub-queues hop together, so that the cost of launching a hop is paid once for all of them.

    Args:
        image_features: [Q, M, d], any floating dtype.
        text_features: [Q, M, d], on the same device.
        start: LongTensor[Q], the row each sub-queue begins with.
        memory: as in ``group_by_similarity``; the matrices of "matrix" are made for a few sub-queues at a time (512 MiB).

    Returns:
        LongTensor[Q, M], each row a permutation of ``range(M)``.

    Raises:
        ValueError: as ``group_by_similarity``; non-finite features are listed as (sub-queue, row).

    Example:
        >>> image = torch.eye(3).expand(2, 3, 3)
        >>> group_sub_queues(image, image, start=torch.tensor([0, 2]))
        tensor([[0, 1, 2],
                [2, 0, 1]])
    """
    _check_features(image_features, text_features, dims="Q, M, d")
    queues, size = image_features.shape[:2]
    if start.shape != (queues,) or start.is_floating_point():
        raise ValueError(f"start is {start.dtype} {list(start.shape)}, but must hold one row number per sub-queue: [{queues}].")
    if size and bool(((start < 0) | (start >= size)).any()):
        raise ValueError(f"start is {start.tolist()}, but each must be a row of its sub-queue: 0 <= start < {size}.")
    return _group(image_features, text_features, start.to(image_features.device, torch.long), memory)


def _group(image_features: Tensor, text_features: Tensor, start: Tensor, memory: Memory) -> Tensor:
    queues, size = image_features.shape[:2]
    if memory not in ("matrix", "rows"):
        raise ValueError(f"memory is {memory!r}, but must be 'matrix' or 'rows'.")
    order = torch.empty(queues, size, dtype=torch.long, device=image_features.device)
    if not order.numel():
        return order
    # Under autocast the products below stay fp32, because they are written with out=, which autocast leaves alone.
    with torch.no_grad():
        image, text = image_features.float(), text_features.float()
        if memory == "matrix":
            _walk_matrix(image, text, start, order)
        else:
            for queue in range(queues):
                order[queue] = _walk_rows(image[queue], text[queue], start[queue : queue + 1])
    return order


def _walk_matrix(image: Tensor, text: Tensor, start: Tensor, order: Tensor) -> None:
    """Fill ``order`` [Q, M] from similarity matrices, a chunk of sub-queues at a time."""
    queues, size = order.shape
    chunk = min(queues, max(1, MATRIX_BUDGET // (2 * size * size)))
    # One allocation for all chunks: writing into fresh pages takes longer than the products themselves.
    from_image, from_text = (image.new_empty(chunk, size, size) for _ in range(2))
    for begin in range(0, queues, chunk):
        members = range(begin, min(begin + chunk, queues))
        for slot, queue in enumerate(members):
            # Not bmm: one product per sub-queue sums exactly as for a sub-queue alone, so batching never changes an order.
            torch.mm(image[queue], text[queue].T, out=from_image[slot])
            torch.mm(text[queue], image[queue].T, out=from_text[slot])
        rows = slice(begin, members.stop)
        order[rows] = _hop_together(from_image[: len(members)], from_text[: len(members)], start[rows])


def _hop_together(from_image: Tensor, from_text: Tensor, start: Tensor) -> Tensor:
    """Walk Q chains over similarities [Q, M, M] of each direction; without host synchronisation or allocation per hop."""
    queues, size = from_image.shape[:2]
    directions = (from_image.view(-1, size), from_text.view(-1, size))
    first_row = torch.arange(queues, device=start.device) * size  # of each sub-queue, in the flat view above
    mask = from_image.new_zeros(queues, size)
    flat_mask = mask.view(-1)
    scores = torch.empty_like(mask)
    current = torch.empty_like(start)
    # One more step than rows: the hop after the last finds only -inf, and its answer is dropped.
    order = start.new_empty(size + 1, queues)
    steps = order.unbind(0)
    steps[0].copy_(start)
    for hop in range(size):
        torch.add(steps[hop], first_row, out=current)
        flat_mask.index_fill_(0, current, VISITED)
        torch.index_select(directions[hop % 2], 0, current, out=scores)
        torch.argmax(scores.add_(mask), dim=1, out=steps[hop + 1])
    return order[:size].T


def _walk_rows(image: Tensor, text: Tensor, start: Tensor) -> Tensor:
    """Walk one chain [M] by matrix-vector products, dropping visited rows whenever half of them are."""
    names = torch.arange(image.shape[0], device=image.device)  # rows still in play
    parts: list[Tensor] = []
    hops = 0
    while True:
        count = len(names)
        stay = count if count <= SMALLEST_TO_SHRINK else count - count // 2  # hops before the next shrinking
        mask, scores = image.new_zeros(count), image.new_empty(count)
        anchor = image.new_empty(1, image.shape[1])
        order = start.new_empty(stay + 1, 1)
        steps = order.unbind(0)
        steps[0].copy_(start)
        for step in range(stay):
            source, target = (image, text) if hops % 2 == 0 else (text, image)
            mask.index_fill_(0, steps[step], VISITED)
            torch.index_select(source, 0, steps[step], out=anchor)
            torch.addmv(mask, target, anchor[0], out=scores)
            torch.argmax(scores, dim=0, keepdim=True, out=steps[step + 1])
            hops += 1
        parts.append(names[order[:stay, 0]])
        if stay == count:
            return torch.cat(parts)
        keep = mask.isfinite().nonzero().squeeze(1)
        start = torch.searchsorted(keep, steps[stay])
        names, image, text = names[keep], image[keep], text[keep]


def _check_features(image_features: Tensor, text_features: Tensor, dims: str) -> None:
    shape = list(image_features.shape)
    if len(shape) != dims.count(",") + 1 or shape != list(text_features.shape):
        raise ValueError(f"image_features is {shape} and text_features is {list(text_features.shape)}, but both must be one [{dims}].")
    largest = 1.0
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.is_floating_point():
            raise ValueError(f"{name} is {features.dtype}, but must be a floating dtype.")
        if not features.numel():
            continue
        bad = (~features.isfinite().all(dim=-1)).nonzero()
        if len(bad):
            where = bad.squeeze(1).tolist() if len(shape) == 2 else [tuple(place) for place in bad.tolist()]
            listed = ", ".join(map(str, where[:10])) + (", ..." if len(where) > 10 else "")
            raise ValueError(f"{name} is not finite in {len(where)} of its rows: {listed}.")
        largest *= float(features.abs().max())
    # An overflowing product is inf, or NaN after the mask is added, and argmax would take either for a match.
    if largest * shape[-1] >= torch.finfo(torch.float32).max:
        raise ValueError(f"features are too large for fp32: products up to {largest:.1e} over {shape[-1]} dimensions overflow.")
