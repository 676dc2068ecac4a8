"""Names that LAVIS and the authors' code have for settings of ours: whoever brings a YAML of theirs is told the new one."""

from __future__ import annotations

# key -> what to write instead, or why there is nothing
OLD_NAMES = {
    "run.amp": "run.precision (bf16, or fp16 with loss scaling)",
    "run.warmup_start_lr": "run.warmup_lr",
    "run.warmup_epochs": "run.warmup_steps, in steps",
    "run.lr": "run.init_lr",
    "run.learning_rate": "run.init_lr",
    "run.decay_rate": "run.lr_decay_rate",
    "run.epochs": "run.max_epoch",
    "run.batch_size": "run.batch_size_train, pairs a process",
    "run.max_iters": "run.max_steps and run.max_epoch",
    "run.iters_per_inner_epoch": "run.save_every_steps",
    "run.max_grad_norm": "run.grad_clip",
    "run.clip_grad_norm": "run.grad_clip",
    "run.gradient_accumulation_steps": "run.accum_grad_iters",
    "run.queue_size": "run.grit.queue_size",
    "run.search_space": "run.grit.search_space",
    "run.resume": "run.resume_ckpt_path",
    "run.inference_method": "nothing: answers are generated",
    "run.task_type": "nothing: metrics do not depend on it",
    "run.train_dataset_ratios": "nothing: data sets are joined, each sample once an epoch",
    "run.alpha": "model.itc.momentum_distillation.alpha",
    "run.temp": "model.temperature",
    "model.load_pretrained": "model.pretrained: a checkpoint, or null to start without",
    "model.load_finetuned": "model.pretrained: a checkpoint, or null to start without",
    "model.finetuned": "model.pretrained",
    "model.image_size": "model.image_encoder.image_size",
    "model.image_res": "model.image_encoder.image_size",
    "model.img_size": "model.image_encoder.image_size",
    "model.freeze_vit": "model.image_encoder.freeze",
    "model.vit_model": "model.image_encoder.init",
    "model.vit_type": "model.model_type, and sizes in model.image_encoder",
    "model.vit_precision": "model.image_encoder.precision",
    "model.vit_grad_ckpt": "model.image_encoder.gradient_checkpointing",
    "model.vit_ckpt_layer": "model.image_encoder.gradient_checkpointing, of all layers",
    "model.use_grad_checkpoint": "model.image_encoder.gradient_checkpointing",
    "model.vit_drop_path_rate": "model.image_encoder.drop_path",
    "model.drop_path_rate": "model.image_encoder.drop_path",
    "model.num_query_token": "model.qformer.queries",
    "model.cross_attention_freq": "model.qformer.cross_attention_every",
    "model.opt_model": "model.language_model.init",
    "model.t5_model": "nothing: stage 2 has OPT alone",
    "model.max_txt_len": "model.max_text_length",
    "model.max_words": "model.max_text_length",
    "model.temp": "model.temperature",
    "model.queue_size": "model.itc.momentum_distillation.queue_size",
    "model.momentum": "model.itc.momentum_distillation.momentum",
    "model.alpha": "model.itc.momentum_distillation.alpha",
    "model.use_distill": "model.itc.momentum_distillation: null, or a block",
    "model.distill": "model.itc.momentum_distillation: null, or a block",
    "model.mlm_mask_prob": "model.mlm.mask_probability",
    "model.mlm_probability": "model.mlm.mask_probability",
    "model.negative_all_rank": "run.grit.batch_scope: global, or local",
    "model.med_config_path": "sizes in model.text_encoder",
    "model.bert_config": "sizes in model.text_encoder",
    "model.text_model": "model.text_encoder.init",
}


def replaced_by(key: str) -> str:
    """`` Here it is ...`` for a name of LAVIS's, or an empty string.

    Example:
        >>> replaced_by("run.amp")
        ' Here it is run.precision (bf16, or fp16 with loss scaling).'
    """
    return f" Here it is {OLD_NAMES[key]}." if key in OLD_NAMES else ""
