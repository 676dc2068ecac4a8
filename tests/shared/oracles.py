"""Naive loops written from the papers, one number at a time, to hold the tensor code against."""

from __future__ import annotations

import math


def hard_negatives(sim_i2t, sim_t2i, known):
    """MAFA Algorithm 1, line 11: per anchor the most similar candidate that is not known to match, and the next one."""
    result = {"text": [], "text_2nd": [], "image": [], "image_2nd": []}
    for direction, sim in (("text", sim_i2t), ("image", sim_t2i)):
        for b in range(len(sim)):
            order = sorted((k for k in range(len(sim[b])) if not known[b][k]), key=lambda k: (-sim[b][k], k))
            result[direction].append(order[0] if order else -1)
            result[f"{direction}_2nd"].append(order[1] if len(order) > 1 else -1)
    return result


def softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def itc_target_row(known, new, found, smoothing):
    """Section 4.1: own and new positive share the mass; eq. 5: (1 - alpha) y + alpha / K."""
    positives = {k for k, yes in enumerate(known) if yes}
    if found:
        positives.add(new)
    row = [1 / len(positives) if k in positives else 0.0 for k in range(len(known))]
    return [(1 - smoothing) * y + smoothing / len(known) for y in row]


def itc(logits_i2t, logits_t2i, targets_i2t, targets_t2i):
    """Eq. 1: half the sum of both directions' expected cross-entropies."""
    total = 0.0
    for logits, targets in ((logits_i2t, targets_i2t), (logits_t2i, targets_t2i)):
        for row, target in zip(logits, targets, strict=True):
            total += -sum(y * math.log(p) for y, p in zip(target, softmax(row), strict=True) if y > 0) / len(logits)
    return total / 2


def consistency(logits_i2t, logits_t2i):
    """GRIT-VLP eq. 6 without lambda."""
    total = 0.0
    for row, other in zip(logits_i2t, logits_t2i, strict=True):
        p, q = softmax(row), softmax(other)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return total / len(logits_i2t) / 2


def itm_rows(found, probability, threshold, ambiguous_from, convert=True, resample=True):
    """Section 4.1: (image, text, label) of all pairs, own pairs first, then text for image, then image for text."""
    count = len(found["text"])
    rows = [(b, b, 1) for b in range(count)]
    for direction, start in (("text", 0), ("image", count)):
        for b in range(count):
            candidate, second, p = found[direction][b], found[f"{direction}_2nd"][b], probability[start + b]
            if candidate < 0:
                continue
            label = 0
            if p > threshold:
                if not convert:
                    continue
                label = 1
            elif p > ambiguous_from and resample:
                if second < 0:
                    continue
                candidate = second
            rows.append((b, candidate, label) if direction == "text" else (candidate, b, label))
    return rows


def cross_entropy(logits, labels):
    return sum(-math.log(softmax(row)[y]) for row, y in zip(logits, labels, strict=True)) / len(labels)


def language_modelling(states, ids, head, pad, smoothing):
    """BLIP section 3.2: each token but the first, given the state before it, with a smoothed one-hot target."""
    total, count = 0.0, 0
    for row, tokens in zip(states, ids, strict=True):
        for state, token in zip(row, tokens[1:], strict=False):
            if token == pad:
                continue
            log_p = [math.log(p) for p in softmax(head(state))]
            total -= (1 - smoothing) * log_p[token] + smoothing * sum(log_p) / len(log_p)
            count += 1
    return total / count
