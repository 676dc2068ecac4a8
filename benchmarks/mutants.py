"""One-line mistakes in the objectives and the models' steps: does a test see each of them?

python benchmarks/mutants.py [PART OF A NAME ...]: applies each mutant to a copy of the package, runs the tests that should see it,
and lists the survivors. Minutes; by hand, after a change of objectives/ or of a model's step, and not in CI.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES, STEP = "tests/objectives/test_objectives.py", "tests/objectives/test_step.py"
LOSSES, ALBEF, GATHERING = "tests/models/test_losses.py", "tests/models/test_albef_mafa.py", "tests/models/test_gathering.py"
NOTHING = "tests/models/test_nothing_to_do.py"

# file below lavis_mafa, its text, the mistake; per list of test files
# ruff: noqa: E501
PURE = [
    ("objectives/mining.py", "mask = mask | known_positive", "mask = known_positive"),
    ("objectives/mining.py", "mask = mask | known_positive", "pass"),
    (
        "objectives/mining.py",
        "image_1st, image_2nd = _two_best(sim_t2i.detach(), mask)",
        "image_1st, image_2nd = _two_best(sim_i2t.detach(), mask)",
    ),
    ("objectives/mining.py", 'rest = left.scatter(1, first[:, None], float("-inf"))', "rest = left"),
    ("objectives/mining.py", "    return _or_none(left, first), _or_none(rest, second)", "    return _or_none(left, first), second"),
    ("objectives/mining.py", "sim.detach().float() / temperature + gumbel", "sim.detach().float() + gumbel"),
    ("objectives/mining.py", ".exponential_().log()", ".exponential_()"),
    (
        "objectives/mining.py",
        "return torch.rand_like(sim, dtype=torch.float32)",
        "return torch.rand_like(sim, dtype=torch.float32) + sim.detach()",
    ),
    ("objectives/mining.py", "columns < rows:", "columns < 0:"),
    ("objectives/itc.py", "targets_t2i)) / 2", "targets_t2i))"),
    ("objectives/itc.py", "_soft_cross_entropy(logits_t2i, targets_t2i)) / 2", "_soft_cross_entropy(logits_t2i, targets_i2t)) / 2"),
    ("objectives/itc.py", "log_probability = F.log_softmax(logits.float(), dim=1)", "log_probability = F.log_softmax(logits, dim=1)"),
    (
        "objectives/itc.py",
        "log_probability = F.log_softmax(logits.float(), dim=1)",
        "log_probability = F.log_softmax(logits.float(), dim=0)",
    ),
    ("objectives/itc.py", "torch.where(targets != 0,", "torch.where(targets > 0.01,"),
    (
        "objectives/itc.py",
        "torch.where(targets != 0, targets * log_probability, torch.zeros_like(targets))",
        "targets * log_probability",
    ),
    ("objectives/itc.py", "F.kl_div(log_t2i, log_i2t.detach()", "F.kl_div(log_t2i, log_i2t"),
    ("objectives/itc.py", "F.kl_div(log_i2t, log_t2i.detach()", "F.kl_div(log_i2t, log_t2i"),
    ("objectives/itc.py", "(kl_i2t + kl_t2i) / 2", "(kl_i2t + kl_t2i)"),
    ("objectives/itc.py", "(kl_i2t + kl_t2i) / 2", "kl_i2t"),
    ("objectives/itc.py", "log_i2t = F.log_softmax(logits_i2t.float()", "log_i2t = F.log_softmax(logits_i2t"),
    ("objectives/itc.py", "return -terms.sum(dim=1).mean()", "return -terms.mean()"),
    ("objectives/itc.py", "labels = known_positive.float()", "labels = torch.eye(*known_positive.shape)"),
    ("objectives/itc.py", "labels / labels.sum(dim=1, keepdim=True)", "labels"),
    (
        "objectives/itc.py",
        "torch.maximum(labels.gather(1, column), new_positive_mask.float()[:, None])",
        "new_positive_mask.float()[:, None]",
    ),
    ("objectives/itc.py", "if excluded is None else (~excluded).float()", ""),
    ("objectives/itc.py", "smoothing * share / share.sum(dim=1, keepdim=True)", "smoothing * share / len(share)"),
    ("objectives/itc.py", "(1.0 - smoothing) * targets", "targets"),
    ("objectives/connections.py", "positive = match_probability > threshold", "positive = match_probability >= threshold"),
    ("objectives/connections.py", "(match_probability > ambiguous_from)", "(match_probability >= ambiguous_from)"),
    ("objectives/connections.py", "ambiguous_from) & ~positive", "ambiguous_from)"),
    ("objectives/connections.py", "(values >= 0) & (values <= 1)", "(values >= 0)"),
    ("objectives/itm.py", "texts = negatives.text_for_image_2nd if second", "texts = negatives.text_for_image if second"),
    ("objectives/itm.py", "images = negatives.image_for_text_2nd if second", "images = negatives.image_for_text if second"),
    ("objectives/itm.py", "swap = connections.ambiguous", "swap = connections.positive"),
    ("objectives/itm.py", "keep = torch.where(swap, second.exists, keep)", "pass"),
    ("objectives/itm.py", "keep = keep & ~positive", "keep = keep & positive"),
    ("objectives/itm.py", "            label = positive.long()", "            pass"),
    ("objectives/itm.py", "if resample_ambiguous:", "if True:"),
    ("objectives/itm.py", "/ pairs.weight.sum()\n\n\ndef itm_accuracy", "/ len(pairs.weight)\n\n\ndef itm_accuracy"),
    ("objectives/itm.py", "(per_pair * pairs.weight).sum()", "per_pair.sum()"),
    ("objectives/itm.py", "positive = pairs.label.float() * pairs.weight", "positive = pairs.label.float()"),
    ("objectives/itm.py", "negative = (1 - pairs.label).float() * pairs.weight", "negative = (1 - pairs.label).float()"),
    ("objectives/itm.py", "(right * negative).sum() / negative.sum()", "(right * negative).sum() / pairs.weight.sum()"),
    ("objectives/itm.py", "taken = extra.weight > 0", "taken = extra.weight >= 0"),
    ("objectives/itm.py", "torch.arange(len(joined", "1 + torch.arange(len(joined"),
    ("objectives/pretraining.py", "(extra.label == 1) | (of_extra", "(extra.label == 0) | (of_extra"),
    ("objectives/pretraining.py", "of_extra <= ecm.ambiguous_from", "of_extra <= ecm.threshold"),
    ("objectives/lm.py", "noise = torch.randint(vocab_size,", "noise = torch.randint(3,"),
    ("objectives/lm.py", "(what < 0.8)", "(what < 0.7)"),
    ("objectives/lm.py", "(what >= 0.9)", "(what >= 0.8)"),
    ("objectives/lm.py", "chosen = (draw < probability) & ~special", "chosen = draw < probability"),
    ("objectives/lm.py", "torch.where(chosen, input_ids, IGNORED)", "torch.where(chosen, masked, IGNORED)"),
    ("objectives/lm.py", "(1 - alpha) * loss + alpha * distilled", "loss + alpha * distilled"),
    ("objectives/lm.py", "    logits = logits.float()\n", ""),
    ("objectives/lm.py", "soft = F.softmax(teacher_logits.float(), dim=1)", "soft = F.softmax(teacher_logits, dim=1)"),
    ("objectives/lm.py", "count = max(len(labels), 1)", "count = len(labels)"),
    ("objectives/lm.py", "losses.sum() / max(1, len(losses))", "losses.sum()"),
    ("objectives/lm.py", "sub_(smoothing / logits.shape[1])", "sub_(0.0)"),
    ("objectives/momentum.py", "alpha=1 - momentum", "alpha=momentum"),
    ("objectives/momentum.py", "(1 - alpha) * targets + alpha * F", "targets + alpha * F"),
    ("objectives/momentum.py", "min(1.0, (epoch * steps_per_epoch + step)", "min(1.0, (epoch * steps_per_epoch)"),
    ("objectives/momentum.py", "alpha * min(1.0,", "alpha * max(0.0,"),
    ("objectives/momentum.py", "new if taken is None else torch.where(taken, new, queue[..., columns])", "new"),
    ("objectives/mining.py", ".any(dim=2)", ".all(dim=2)"),
    ("objectives/mining.py", " & (keys[:, None] >= 0)", ""),
    ("objectives/mining.py", "return same | torch.eye", "return same & torch.eye"),
    ("objectives/mining.py", '" ".join(text.split())', "text"),
    ("objectives/mining.py", ">> 1", ">> 44"),
    ("objectives/pretraining.py", "ends[:, 1].amax()", "ends[:, 1].amin()"),
    ("objectives/pretraining.py", "image_index * count + mined", "image_index * (count // 2) + mined"),
    ("objectives/pretraining.py", "_on_host(pairs, mined, count)", "_on_host(pairs, mined, own_count)"),
    ("objectives/pretraining.py", "code = torch.unique(", "code = torch.sort("),
    (
        "objectives/pretraining.py",
        "consistency_loss(logits_i2t[:, : batch.candidates], logits_t2i[:, : batch.candidates])",
        "consistency_loss(logits_i2t, logits_t2i)",
    ),
    ("objectives/pretraining.py", 'teacher_t2i = teacher_t2i.masked_fill(excluded_t2i, float("-inf"))', "pass"),
    ("objectives/pretraining.py", 'teacher_i2t = teacher_i2t.masked_fill(excluded_i2t, float("-inf"))', "pass"),
    ("objectives/pretraining.py", '"ambiguous_share"] = verdicts.ambiguous', '"ambiguous_share"] = verdicts.positive'),
    ("objectives/pretraining.py", "asked = mined.pairs.exists.sum().clamp_min(1)", "asked = mined.pairs.exists.numel()"),
    (
        "objectives/pretraining.py",
        "loss + settings.itc.consistency * consistency",
        "(1 - settings.itc.consistency) * loss + settings.itc.consistency * consistency",
    ),
    (
        "objectives/pretraining.py",
        "batch.sim_t2i[:, :count], batch.temperature, settings.negatives",
        'batch.sim_t2i[:, :count], batch.temperature, "hardest"',
    ),
    (
        "objectives/pretraining.py",
        "batch.sim_i2t[:, :count], batch.temperature, settings.negatives",
        'batch.sim_i2t[:, :count], batch.temperature, "hardest"',
    ),
    ("objectives/pretraining.py", 'verdicts if "itm" in ecm.use_in else None', "verdicts"),
    ("objectives/pretraining.py", '"itc" in settings.ecm.use_in', "settings.ecm.use_in"),
    ("objectives/pretraining.py", '"lm" not in ecm.use_in or ', ""),
    ("objectives/pretraining.py", 'or ecm.false_negatives == "eliminate"', ""),
    (
        "objectives/pretraining.py",
        "ecm.false_negatives, ecm.resample_ambiguous)\n",
        "ecm.false_negatives)\n",
    ),
    ("objectives/pretraining.py", "counted = torch.where(pairs.exists, probability, 0.0)", "counted = probability"),
    (
        "objectives/pretraining.py",
        "itc_targets(batch.known_positive, images, found_t2i, smoothing, excluded_t2i)",
        "itc_targets(batch.known_positive, images, found_t2i, smoothing)",
    ),
    (
        "objectives/pretraining.py",
        "itc_targets(batch.known_positive, texts, found_i2t, smoothing, excluded_i2t)",
        "itc_targets(batch.known_positive, texts, found_i2t, 0.0, excluded_i2t)",
    ),
    (
        "objectives/pretraining.py",
        "distilled_targets(targets_t2i, teacher_t2i.detach(), batch.distillation)",
        "distilled_targets(targets_t2i, teacher_i2t.detach(), batch.distillation)",
    ),
    (
        "objectives/pretraining.py",
        "distilled_targets(targets_i2t, teacher_i2t.detach(), batch.distillation)",
        "distilled_targets(targets_i2t, teacher_i2t, batch.distillation)",
    ),
    ("objectives/pretraining.py", "= batch.teacher_i2t / batch.temperature,", "= batch.teacher_i2t / batch.temperature * 1.1,"),
    ("objectives/pretraining.py", "found_i2t = found_t2i = torch.zeros_like(found_i2t)", "pass"),
    ("objectives/pretraining.py", "    if settings.itm_weight:", "    if True:"),
    ("objectives/pretraining.py", "[weight * loss for", "[loss for"),
    ("objectives/pretraining.py", "settings.itm_weight, settings.lm_weight", "settings.lm_weight, settings.itm_weight"),
    ("objectives/pretraining.py", "known = batch.known_positive[:, :count]", "known = torch.eye(own_count, count, dtype=torch.bool)"),
    ("objectives/pretraining.py", "exists=pairs.exists & similarity.isfinite()", "exists=pairs.exists"),
    ("objectives/pretraining.py", "value_range(batch.sim_i2t, batch.sim_t2i)", "value_range(batch.sim_i2t)"),
    (
        "objectives/pretraining.py",
        "[batch.sim_i2t.gather(1, texts[:, None]), batch.sim_t2i.gather(1, images[:, None])]",
        "[batch.sim_i2t.gather(1, texts[:, None]), batch.sim_i2t.gather(1, images[:, None])]",
    ),
]
HOSTS = [
    ("models/base.py", "consistency=itc.consistency)", "consistency=0.0)"),
    ("models/base.py", "negatives=self.settings.itm.negatives,", ""),
    ("models/base.py", "itm_weight=itm_weight,", ""),
    ("models/base.py", "lm_weight=lm_weight,", "lm_weight=itm_weight,"),
    ("models/base.py", "ItcSettings(weight=itc_weight,", "ItcSettings("),
    ("models/base.py", '(when == "grouped" and inputs.grouped)', 'when == "grouped"'),
    ("models/base.py", "self.temp.clamp_(0.001, 0.5)", "self.temp.clamp_(min=0.001)"),
    ("models/base.py", "text_key(text) if ecm.same_text else UNKNOWN", "text_key(text)"),
    ("models/base.py", "if not losses & on]", "if losses.isdisjoint({'itc'})]"),
    ("models/base.py", "        self._freeze_what_no_loss_trains()\n", ""),
    ("models/base.py", "(image_feature.detach(), text_feature.detach())", "(image_feature.detach(), text_feature)"),
    ("models/base.py", "(image_feature.detach(), text_feature.detach())", "(image_feature, text_feature.detach())"),
    (
        "models/albef.py",
        "named_images(self.momentum_image_embeds, image_index)",
        "named_images(self.image_embeds.detach(), image_index)",
    ),
    (
        "models/albef.py",
        "tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]",
        "tokenizer.cls_token_id, tokenizer.pad_token_id]",
    ),
    (
        "models/albef.py",
        "momentum_logits = model.predict(model.text_encoder_m,",
        "momentum_logits = model.predict(model.text_encoder,",
    ),
    (
        "models/albef.py",
        'if distillation is not None and not (distillation.mlm and loss_weights(self.settings)["mlm"]):',
        "if distillation is not None and not distillation.mlm:",
    ),
    (
        "models/albef.py",
        'if distillation is not None and not (distillation.mlm and loss_weights(self.settings)["mlm"]):',
        "if False:",
    ),
    ("models/momentum.py", "if not self.training or size == 0:", "if not self.training:"),
    (
        "models/momentum.py",
        "enqueue(self.text_queue_keys, self.queue_ptr, keys[:, 1], finite)",
        "enqueue(self.text_queue_keys, self.queue_ptr, keys[:, 0], finite)",
    ),
    ("models/base.py", "self.training and inputs.first_of_window", "self.training"),
    (
        "models/momentum.py",
        'update_teacher(getattr(self, part).parameters(), getattr(self, f"{part}_m").parameters(), momentum.momentum)',
        'update_teacher(getattr(self, part).parameters(), getattr(self, f"{part}_m").parameters(), 0.5)',
    ),
    (
        "models/momentum.py",
        "step = inputs.epoch * inputs.steps_per_epoch + inputs.step",
        "step = inputs.epoch * inputs.steps_per_epoch",
    ),
    ("runners/checkpoint.py", '(*may_miss, "text_queue_keys")', "may_miss"),
]
RANKS = [
    (
        "models/momentum.py",
        "gather_in_rank_order(image_feature), gather_in_rank_order(text_feature)",
        "image_feature, gather_in_rank_order(text_feature)[: len(image_feature)]",
    ),
    (
        "models/momentum.py",
        "        keys = gather_in_rank_order(keys)\n",
        "        keys = keys.repeat(len(image_feature) // len(keys), 1)\n",
    ),
    ("models/base.py", "all_keys = gather_own_first(keys)", "all_keys = torch.cat([keys, keys - 1])"),
    (
        "models/base.py",
        "keys_image, keys_text = gather_own_first(keys_image), gather_own_first(keys_text)",
        "keys_image, keys_text = gather_own_first(keys_image), keys_text.repeat(len(all_keys) // len(keys), 1)",
    ),
    (
        "models/albef.py",
        "gather_own_first(texts, with_gradient=True)",
        "gather_own_first(texts)",
    ),
]
VILTA = [
    ("objectives/synthetic_negatives.py", "scatter(1, original[:, None], False)", "scatter(1, original[:, None], True)"),
    ("objectives/synthetic_negatives.py", "best - known.gather", "best + known.gather"),
    ("objectives/synthetic_negatives.py", "masked_fill(~eligible, -1.0)", "masked_fill(eligible, -1.0)"),
    ("objectives/synthetic_negatives.py", "allowed.expand_as(fits)", "torch.ones_like(fits, dtype=torch.bool)"),
    ("models/albef.py", "batch.extra.text_index + len(mask)", "batch.extra.text_index"),
    (
        "models/albef.py",
        "tokens = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1) + at[:, 0]",
        "tokens = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1)",
    ),
    ("models/albef.py", "self._of_language(reading.rows.index_select(0, masked))", "self._of_language(masked)"),
]
MUTANTS = [(*m, [OBJECTIVES, STEP]) for m in PURE] + [(*m, [LOSSES, ALBEF]) for m in HOSTS] + [(*m, [GATHERING]) for m in RANKS]
MUTANTS += [(*m, ["tests/models/test_vilta.py"]) for m in VILTA]


def survives(copy: Path, file: str, old: str, new: str, tests: list[str]) -> bool:
    path = copy / "lavis_mafa" / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{file} has {old!r} {text.count(old)} times; a mutant is one line that is there once.")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        if (child := os.fork()) == 0:  # torch and LAVIS are imported already, the package is not
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
        return os.waitpid(child, 0)[1] == 0
    finally:
        path.write_text(text, encoding="utf-8")


def main(wanted: list[str]) -> None:
    chosen = [m for m in MUTANTS if not wanted or any(part in " ".join(m[:3]) for part in wanted)]
    survivors = []
    for number, (file, old, new, tests) in enumerate(chosen, 1):
        start, alive = time.perf_counter(), survives(Path.cwd(), file, old, new, tests)
        survivors += [f"survives: {file}: {old.strip()} -> {new.strip()}"] if alive else []
        what = "SURVIVES" if alive else "killed"
        print(
            f"{number}/{len(chosen)} {what:8} {time.perf_counter() - start:4.0f} s  {file}: {old.strip()} -> {new.strip()}", flush=True
        )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed", *survivors, sep="\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for part in ("lavis_mafa", "tests", "pyproject.toml"):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, Path(folder) / part)
        os.environ |= {"PYTHONPATH": folder, "LAVIS_MAFA_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        sys.dont_write_bytecode, sys.path[0] = True, folder
        os.chdir(folder)
        import hypothesis
        import lavis.models  # noqa: F401
        import pytest

        hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], database=None)
        hypothesis.settings.load_profile("mutants")  # a failure need not be made small
        main(sys.argv[1:])
