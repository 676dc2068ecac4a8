"""One whole step in plain loops, one number at a time, written from the papers: what mafa_step is held against.

MAFA Algorithm 1 and eq. 1 to 6, GRIT-VLP eq. 6, ALBEF eq. 2 to 6, with every switch; gradients are written down by hand.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Given:
    """B anchors, K candidates, C keys; ``noise`` is what sampled and random negatives are drawn with."""

    sims: tuple[list[list[float]], list[list[float]]]  # image to text, text to image: [B][C]
    teacher: tuple[list[list[float]], list[list[float]]] | None
    alpha: float  # of the teacher
    temperature: float
    image_keys: list[int]  # [C]; below 0: unknown
    text_keys: list[int]
    candidates: int
    noise: tuple[list[list[float]], list[list[float]]]  # [B][K]
    con_d: list[list[float]]  # [K][K] of image and text
    itm_logits: list[list[list[float]]]  # [K][K][2]
    lm_losses: list[list[float]]  # [K][K]
    extra: list[tuple[int, int, int, int]] = field(default_factory=list)  # image, text, label, weight
    judged: bool = False  # is Con-D asked about them
    in_place: bool = False  # of the images' hardest texts


@dataclass
class Found:
    """Losses, metrics, and the gradients of the whole loss."""

    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)  # Con-D's pairs
    itm: list[tuple[int, int, int]] = field(default_factory=list)  # image, text, label
    lm: list[tuple[int, int]] = field(default_factory=list)
    of_sims: tuple[list[list[float]], list[list[float]]] = ((), ())
    of_temperature: float = 0.0
    of_itm: dict[tuple[int, int, int], float] = field(default_factory=dict)  # image, text, class
    of_lm: dict[tuple[int, int], float] = field(default_factory=dict)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def is_known(given: Given, b: int, c: int) -> bool:
    same_image = given.image_keys[b] >= 0 and given.image_keys[b] == given.image_keys[c]
    same_text = given.text_keys[b] >= 0 and given.text_keys[b] == given.text_keys[c]
    return b == c or same_image or same_text


def step(given: Given, settings) -> Found:
    found, ecm = Found(), settings.ecm
    count, temperature = len(given.sims[0]), given.temperature
    found.of_sims = tuple([[0.0] * len(row) for row in sims] for sims in given.sims)

    # the hardest and the second hardest, for each image and each text (line 11, line 18)
    mined = []  # direction, anchor, hardest, second hardest
    for direction in (0, 1):
        for b in range(count):
            open_ = [k for k in range(given.candidates) if not is_known(given, b, k)]
            score = {
                "hardest": lambda k, d=direction, b=b: given.sims[d][b][k],
                "sampled": lambda k, d=direction, b=b: given.sims[d][b][k] / temperature + given.noise[d][b][k],
                "random": lambda k, d=direction, b=b: given.noise[d][b][k],
                "none": lambda k, d=direction, b=b: given.sims[d][b][k],  # ITM asks nothing, and Con-D about the hardest
            }[settings.negatives]
            ranked = sorted(open_, key=lambda k: (-score(k), k))
            mined.append((direction, b, ranked[0] if ranked else None, ranked[1] if len(ranked) > 1 else None))

    # Con-D's verdicts (lines 12, 13, 17)
    positive, ambiguous = set(), set()
    for direction, b, hardest, _ in mined:
        if hardest is None:
            continue
        pair = (b, hardest) if direction == 0 else (hardest, b)
        found.asked.append(pair)
        if ecm.enabled and given.con_d[pair[0]][pair[1]] > ecm.threshold:
            positive.add((direction, b))
        elif ecm.enabled and given.con_d[pair[0]][pair[1]] > ecm.ambiguous_from:
            ambiguous.add((direction, b))
    if ecm.enabled:
        found.metrics["new_positive_share"] = len(positive) / max(len(found.asked), 1)
        found.metrics["ambiguous_share"] = len(ambiguous) / max(len(found.asked), 1)

    if settings.itc.weight > 0:
        found.losses["itc"] = contrast(given, settings, mined, positive, found.of_sims)
        found.loss += settings.itc.weight * found.losses["itc"]
    if settings.itm_weight > 0 and settings.negatives != "none":
        match(given, settings, mined, positive, ambiguous, found)
        found.loss += settings.itm_weight * found.losses["itm"]
    if settings.lm_weight > 0:
        new = set()  # D_ECM of eq. 4 is a set
        for direction, b, hardest, _ in mined:
            if (direction, b) in positive and "lm" in ecm.use_in and ecm.false_negatives == "convert":
                new.add((b, hardest) if direction == 0 else (hardest, b))
        found.lm = [(b, b) for b in range(count)] + sorted(new)
        found.losses["lm"] = sum(given.lm_losses[i][t] for i, t in found.lm) / len(found.lm)
        found.of_lm = {pair: settings.lm_weight / len(found.lm) for pair in found.lm}
        found.loss += settings.lm_weight * found.losses["lm"]

    for sims, gradients in zip(given.sims, found.of_sims, strict=True):  # of logits until here
        for row, gradient in zip(sims, gradients, strict=True):
            for c, s in enumerate(row):
                found.of_temperature -= gradient[c] * s / temperature**2
                gradient[c] /= temperature
    return found


def contrast(given: Given, settings, mined, positive, gradients) -> float:
    """Eq. 1 with the labels of section 4.1, eq. 5 and ALBEF eq. 6, plus lambda times GRIT-VLP eq. 6; adds to the logits' gradients."""
    ecm, total, count = settings.ecm, 0.0, len(given.sims[0])
    weight = settings.itc.weight
    for direction, b, hardest, _ in mined:
        converted = (direction, b) in positive and "itc" in ecm.use_in
        row = given.sims[direction][b]
        kept = list(range(len(row)))
        labels = {c for c in kept if is_known(given, b, c)}
        if converted and ecm.false_negatives == "eliminate":
            kept.remove(hardest)
        elif converted:
            labels.add(hardest)
        smoothing = settings.itc.smoothing
        target = {c: (1 - smoothing) * (c in labels) / len(labels) + smoothing / len(kept) for c in kept}
        if given.teacher is not None:
            soft = softmax([given.teacher[direction][b][c] / given.temperature for c in kept])
            target = {c: (1 - given.alpha) * target[c] + given.alpha * q for c, q in zip(kept, soft, strict=True)}
        predicted = softmax([row[c] / given.temperature for c in kept])
        for c, p in zip(kept, predicted, strict=True):
            total -= target[c] * math.log(p) / count / 2
            gradients[direction][b][c] += weight * (p - target[c]) / count / 2
    for b in range(count) if settings.itc.consistency > 0 else ():
        to_text, to_image = (softmax([s / given.temperature for s in sims[b][: given.candidates]]) for sims in given.sims)
        for c, (p, q) in enumerate(zip(to_text, to_image, strict=True)):
            share = settings.itc.consistency / count / 2
            total += share * (p * math.log(p / q) + q * math.log(q / p))
            # the target of each divergence is a constant
            gradients[0][b][c] += weight * share * (p - q)
            gradients[1][b][c] += weight * share * (q - p)
    return total


def match(given: Given, settings, mined, positive, ambiguous, found: Found) -> None:
    """Eq. 3 over the own pairs and the hard negatives with their corrected labels."""
    ecm = settings.ecm
    pairs = [(b, b, 1) for b in range(len(given.sims[0]))]
    extra = [pair for *pair, weight in given.extra if weight]
    asked = ecm.enabled and given.judged
    kept = [(i, t, y) for i, t, y in extra if y == 1 or not asked or given.con_d[i][t] <= ecm.ambiguous_from]
    taken = {image for image, _, _ in kept} if given.in_place else set()
    if asked:
        found.metrics["extra_judged_true_share"] = 1 - len(kept) / len(extra) if extra else math.nan
    for direction, b, hardest, second in mined:
        if direction == 0 and b in taken:
            continue
        other, label = hardest, 0
        if "itm" in ecm.use_in and (direction, b) in positive:
            label = 1
            other = None if ecm.false_negatives == "eliminate" else hardest
        elif "itm" in ecm.use_in and (direction, b) in ambiguous and ecm.resample_ambiguous:
            other = second
        if other is not None:
            pairs.append((b, other, label) if direction == 0 else (other, b, label))
    own, pairs = len(pairs), pairs + kept
    found.itm, found.losses["itm"] = pairs, 0.0
    right: dict[tuple[bool, int], list[bool]] = {(extra, label): [] for extra in (False, True) for label in (0, 1)}
    for number, (image, text, label) in enumerate(pairs):
        logits = given.itm_logits[image][text]
        predicted = softmax(logits)
        found.losses["itm"] -= math.log(predicted[label]) / len(pairs)
        right[number >= own, label].append((logits[1] > logits[0]) == bool(label))
        for which in (0, 1):
            place = (image, text, which)
            gradient = settings.itm_weight * (predicted[which] - (which == label)) / len(pairs)
            found.of_itm[place] = found.of_itm.get(place, 0.0) + gradient
    for (of_extra, label), answers in right.items():
        if given.extra or not of_extra:
            name = f"itm_accuracy_{'extra_' * of_extra}{('negative', 'positive')[label]}"
            found.metrics[name] = sum(answers) / len(answers) if answers else math.nan
