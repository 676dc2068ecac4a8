"""``blip2_opt_mafa``: stage 2 of BLIP-2 (LAVIS's ``blip2_opt``) on any device, from our stage 1, with answers to questions.

Its OPT comes from a hub name or a local folder, or is a small one from scratch that reads bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GPT2Tokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from lavis_mafa.config.checkpoints import OF_MODEL, check_kind, check_kind_on_hub, from_hub, model_from_hub
from lavis_mafa.config.schema import Blip2OptBlock, LanguageModel, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.encoders import (
    PRECISIONS,
    absent,
    build_eva,
    build_qformer,
    with_own_file,
    without_vit,
)
from lavis_mafa.models.generation import Writing, write
from lavis_mafa.models.hub import config_of
from lavis_mafa.models.step import PretrainOutput, check_lengths, check_samples, checked_answers
from lavis_mafa.models.vit import fit_position_embeddings
from lavis_mafa.objectives import value_range
from lavis_mafa.weights import load_exactly, read_weights

logger = logging.getLogger(__name__)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # with OPT's ids
POSITIONS = 512
KEY, WHAT = "model.language_model.init", "a folder with OPT's weights and tokenizer"
# what stage 1 has and stage 2 does not: its heads, and the text branch of the Q-Former
WORDS = ("Qformer.bert.embeddings.word_embeddings.", "Qformer.bert.embeddings.position_embeddings.")
OF_STAGE_1 = ("vision_proj.", "text_proj.", "itm_head.", "temp", "Qformer.cls.", *WORDS)
TEXT_BRANCH = ("intermediate.", "output.")
OPT = "opt_model."
OF_STAGE_2 = ("opt_proj.", OPT)


class OptWords:
    """What OPT has read of R images' queries and the words after them: see :class:`lavis_mafa.models.generation.Reader`."""

    def __init__(self, opt: OPTForCausalLM, queries: Tensor, prompts: Tensor) -> None:
        """Queries [R, Q, width]; LongTensor[R, T], 0 where a prompt is padded."""
        self.opt, self.before = opt, None
        self.queries: Tensor | None = queries
        self.seen = torch.cat([prompts.new_ones(queries.shape[:2]), prompts], dim=1)

    def read(self, ids: Tensor) -> Tensor:
        if self.before is not None:
            self.seen = torch.cat([self.seen, torch.ones_like(ids)], dim=1)
        states = self.opt(
            input_ids=ids,
            query_embeds=self.queries,
            attention_mask=self.seen,
            past_key_values=self.before,
            use_cache=True,
            return_dict=True,
        )
        self.queries, self.before = None, states.past_key_values
        return states.logits[:, -1]

    def take(self, rows: Tensor) -> None:
        self.seen = self.seen[rows]
        self.before = self.opt._reorder_cache(self.before, rows)


def build_opt(settings: LanguageModel) -> tuple[OPTForCausalLM, Any]:
    """LAVIS's OPT (which takes query embeddings) and its tokenizer; raises UserError.

    ``init``: a hub name or a local folder as OPT is published, or a folder of a whole BLIP-2 with OPT; null builds one of the given
    sizes from scratch.
    """
    dtype = PRECISIONS[settings.precision]
    if settings.init is None:
        tokenizer = byte_tokenizer()
        return _norms_in_fp32(OPTForCausalLM(_config(settings, len(tokenizer))).to(dtype)), tokenizer
    tokenizer = from_hub(lambda name: AutoTokenizer.from_pretrained(name, use_fast=False), settings.init, KEY, WHAT)
    if (sizes := opt_in_blip2(settings.init)) is not None:
        model = _norms_in_fp32(OPTForCausalLM(OPTConfig(**sizes)).to(dtype))
        state = {n: value for n, value in read_weights(settings.init, KEY).items() if n.startswith(OPT)}
        load_exactly(model, {n.removeprefix(OPT): value for n, value in state.items()}, f"{KEY}: {settings.init}")
    else:
        model = model_from_hub(OPTForCausalLM, settings.init, KEY, WHAT, "opt", may_miss=("lm_head.",), torch_dtype=dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{KEY} is {settings.init!r}, whose tokenizer has {len(tokenizer)} words, its model {model.config.vocab_size}.")
    return _norms_in_fp32(model), tokenizer


def opt_in_blip2(init: str) -> dict[str, Any] | None:
    """The sizes of OPT in a folder of a BLIP-2, which transformers calls its ``text_config``; None for anything else."""
    sizes = (config_of(Path(init)) or {}).get("text_config")
    return sizes if isinstance(sizes, dict) and sizes.get("model_type") == "opt" else None


def byte_tokenizer() -> GPT2Tokenizer:
    """A tokenizer of OPT's kind whose tokens are the 256 bytes: it knows every text and needs no data.

    Example:
        >>> byte_tokenizer()("hi", add_special_tokens=False).input_ids
        [75, 76]
    """
    tokens = [*SPECIAL, *bytes_to_unicode().values()]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return GPT2Tokenizer(
            str(vocabulary),
            str(merges),
            unk_token="</s>",
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            add_bos_token=True,
            model_max_length=POSITIONS,
        )


def _norms_in_fp32(model: OPTForCausalLM) -> OPTForCausalLM:
    """Norms stay in fp32 (0.1 % of the weights): a GPU computes them so anyway, and a CPU refuses mixed types."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def _config(settings: LanguageModel, vocabulary: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        word_embed_proj_dim=settings.width,
        ffn_dim=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        bos_token_id=SPECIAL.index("</s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )


class Fp32LayerNorm(LayerNorm):
    """LAVIS's, except that half-precision ViT states come out in fp32: the Q-Former's weights are fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Blip2OptMafa(Blip2OPT):
    """BLIP-2 stage 2: the Q-Former's queries as a soft prompt of OPT (MAFA sections 5.5, G.7, G.8).

    LAVIS's ``forward`` and ``generate``; its ``blip2_opt`` builds fixed sizes from downloads in fp16, which no CPU runs, and cannot
    answer questions. Parameter names are LAVIS's.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("blip2_opt_mafa", "tiny")
    """

    Qformer: Any

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"blip2_opt_mafa_{kind}.yaml") for kind in ("opt2.7b", "opt6.7b", "tiny")}

    def __init__(self, settings: Blip2OptBlock) -> None:
        BaseModel.__init__(self)  # Blip2OPT's own would download
        self.settings = settings
        opt = settings.language_model.init
        if opt is not None and opt_in_blip2(opt) is None:  # its 5 GB come last, a wrong name is found first
            check_kind_on_hub(opt, KEY, WHAT, "opt")
        self.visual_encoder = build_eva(settings.image_encoder)
        self.ln_vision = Fp32LayerNorm(settings.image_encoder.width)
        self.Qformer, self.query_tokens = build_qformer(settings.qformer, settings.image_encoder.width)
        self._drop_text_branch()
        self.opt_model, self.opt_tokenizer = build_opt(settings.language_model)
        positions = self.opt_model.config.max_position_embeddings
        if settings.max_text_length > positions - settings.qformer.queries:
            raise UserError(
                f"model.max_text_length is {settings.max_text_length}, but the language model has {positions} positions, of which "
                f"{settings.qformer.queries} are the image's; allowed: at most {positions - settings.qformer.queries}."
            )
        self.opt_model.requires_grad_(not settings.language_model.freeze)
        self.opt_proj = nn.Linear(settings.qformer.width, self.opt_model.config.hidden_size)
        self.eos_token_id = self.opt_tokenizer("\n", add_special_tokens=False).input_ids[0]
        self.max_txt_len = settings.max_text_length
        self.prompt = settings.prompt
        self.prompt_length = int(self.opt_tokenizer(self.prompt, return_tensors="pt").attention_mask.sum(1))

    def _drop_text_branch(self) -> None:
        self.Qformer.cls = None
        embeddings = self.Qformer.bert.embeddings
        embeddings.word_embeddings = embeddings.position_embeddings = None
        for layer in self.Qformer.bert.encoder.layer:
            layer.output = layer.intermediate = None

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Blip2OptMafa:
        """Build from the ``model:`` block; ``stage_1`` starts a training, ``pretrained`` is a stage-2 checkpoint."""
        settings: Blip2OptBlock = typed_block("model", cfg)
        model = cls(settings)
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        elif settings.stage_1 is not None:
            model.load_stage_1(settings.stage_1)
        return model

    # --- weights ---------------------------------------------------------------------------------------------------

    def load_stage_1(self, path: str) -> None:
        """Take ViT, query tokens and the Q-Former's query branch from a stage-1 checkpoint; UserError if it does not fit."""
        source = f"model.stage_1: {path}"
        state = read_weights(path, "model.stage_1")
        if any(name.startswith(OF_STAGE_2) for name in state):
            raise UserError(f"{source} is a stage-2 checkpoint; give it as model.pretrained.")
        kept = {name: value for name, value in state.items() if not _of_stage_1_alone(name)}
        kept = fit_position_embeddings(kept, self.visual_encoder)
        may_miss = without_vit(kept, self.settings.image_encoder, source)
        load_exactly(self, kept, source, may_miss=(*OF_STAGE_2, *may_miss))
        logger.info("stage 1: %d weights taken, %d of its text branch and heads left behind", len(kept), len(state) - len(kept))

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """LAVIS's name for loading one's own weights (``load_model(..., checkpoint=FILE)``): as exact as ``load_from_pretrained``."""
        return self.load_from_pretrained(url_or_filename)

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a stage-2 checkpoint of ours or LAVIS's; exact, except for parts that have a file of their own."""
        source = f"model.pretrained: {url_or_filename}"
        state = fit_position_embeddings(read_weights(url_or_filename, "model.pretrained"), self.visual_encoder)
        check_kind(state, OF_MODEL[self.settings.arch], source, self.settings.arch)
        without_vit(state, self.settings.image_encoder, source)
        return load_exactly(self, state, source, may_miss=absent(with_own_file(**self._parts()), state))

    def unsaved_parts(self) -> tuple[str, ...]:
        """Frozen weights that come from a file of their own: checkpoints leave them out, as LAVIS's do."""
        return with_own_file(frozen_only=True, **self._parts())

    def _parts(self) -> dict[str, Any]:
        return {"visual_encoder": self.settings.image_encoder, "opt_model": self.settings.language_model}

    # --- training and generation -----------------------------------------------------------------------------------

    def maybe_autocast(self, dtype: Any = None) -> Any:
        """The language model's own precision (LAVIS: fp16 on every GPU, nothing on a CPU)."""
        precision = PRECISIONS[self.settings.language_model.precision]
        if precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=precision)

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """The language modelling loss of each caption after its image's queries; with ``answer``, of the answers after their questions.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list of B captions. Or B questions, ``prompt`` with ``{}`` for the
                question, and as LAVIS's VQA sets have them: ``n_answers`` [B] (default: one each), ``answer`` the list of them all,
                ``weight`` of each (default: 1). UserError where they do not go together.
        """
        samples = self.check_samples(samples, "image", "text_input")
        ranges: dict[str, Tensor] = {}
        hook = self.opt_proj.register_forward_hook(lambda _, __, prompt: ranges.update(soft_prompt=value_range(prompt)))
        samples = {**samples, "image": samples["image"].to(self.device)}
        try:
            loss = self._answer_loss(samples) if "answer" in samples else super().forward(samples)["loss"]
        finally:
            hook.remove()
        return PretrainOutput(loss=loss, loss_lm=loss, ranges=ranges)

    def _answer_loss(self, samples: dict[str, Any]) -> Tensor:
        """The mean over the tokens of all answers and their line ends, by the answers' weights; prompt and question give none."""
        questions = samples["text_input"]
        prompts = _one_each(samples.get("prompt", ""), len(questions))
        ends = [self._asked(question, prompt, self.max_txt_len) for question, prompt in zip(questions, prompts, strict=True)]
        answers, weights, row = checked_answers(samples)
        weights = weights.to(self.device)
        ids, labels = [], []
        for question, answer in zip(row.tolist(), answers, strict=True):
            before = self.opt_tokenizer(ends[question]).input_ids
            blank = "" if ends[question][-1:].isspace() else " "
            words = self.opt_tokenizer(blank + answer, add_special_tokens=False).input_ids[: self.max_txt_len - 1]
            words = [*words, self.eos_token_id]
            ids.append(torch.tensor([*before, *words]))
            labels.append(torch.tensor([-100] * len(before) + words))
        padded = pad_sequence(ids, batch_first=True, padding_value=self.opt_tokenizer.pad_token_id).to(self.device)
        targets = pad_sequence(labels, batch_first=True, padding_value=-100).to(self.device)
        mask = pad_sequence([torch.ones_like(line) for line in ids], batch_first=True).to(self.device)
        with self.maybe_autocast():
            queries = self._queries(samples["image"])[row.to(self.device)]
            embeds = torch.cat([queries, self.opt_model.model.decoder.embed_tokens(padded)], dim=1)
            seen = torch.ones(queries.shape[:2], dtype=mask.dtype, device=self.device)
            states = self.opt_model(inputs_embeds=embeds, attention_mask=torch.cat([seen, mask], dim=1), return_dict=True)
        logits = states.logits[:, queries.shape[1] : -1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], ignore_index=-100, reduction="none")
        weight = weights[:, None] * (targets[:, 1:] != -100)
        return (losses * weight).sum() / weight.sum()

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """LAVIS's, except that lengths and their penalty count what is generated alone, and that images may differ in their prompt.

        Args:
            samples: ``image`` [B, 3, H, W], and optionally ``prompt``: one text, or a list of B.

        Returns:
            B x ``num_captions`` captions, those of an image one after another; UserError where the arguments do not go together.
        """
        check_lengths(min_length, max_length, num_beams, num_captions, use_nucleus_sampling)
        samples = self.check_samples(samples, "image")
        count = len(samples["image"])
        how = Writing(
            longest=max_length,
            shortest=min_length,
            end=self.eos_token_id,
            beams=num_beams,
            lines=num_captions,
            sampled=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
        )
        return self._spoken(samples["image"], _one_each(samples.get("prompt", self.prompt), count), how)

    def check_samples(self, samples: dict[str, Any], *keys: str) -> dict[str, Any]:
        """See :func:`lavis_mafa.models.step.check_samples`."""
        return check_samples(samples, self.settings.image_encoder.image_size, *keys)

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        max_len: int = 10,
        min_len: int = 1,
        prompt: str | list[str] = "",
        length_penalty: float = -1.0,
        inference_method: str = "generate",
        **of_ranking: Any,
    ) -> list[str]:
        """B answers to open questions by beam search (MAFA section G.7: width 5, length penalty -1).

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list of B questions.
            prompt: with ``{}`` for the question, such as ``Question: {} Answer:``; empty takes the questions as they are. Or B of them.
            max_len: tokens of an answer at most; min_len: at least.
            inference_method: ``generate``; given answers are not ranked.
            of_ranking: what LAVIS's tasks say for models that do.

        Raises:
            UserError: another ``inference_method``, lengths that do not go together, or no room for question and answer.
        """
        if inference_method != "generate":
            raise UserError(
                f"inference_method is {inference_method!r}, but blip2_opt_mafa ranks no given answers; allowed: 'generate'."
            )
        check_lengths(min_len, max_len, num_beams)
        samples = self.check_samples(samples, "image", "text_input")
        questions = samples["text_input"]
        prompts = _one_each(prompt, len(questions))
        asked = [self._asked(question, how, max_len) for question, how in zip(questions, prompts, strict=True)]
        how = Writing(longest=max_len, shortest=min_len, end=self.eos_token_id, beams=num_beams, length_penalty=length_penalty)
        return self._spoken(samples["image"], asked, how)

    def _queries(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, queries, OPT's width]"""
        bert = self.Qformer.bert
        return self.opt_proj(bert.look(self.query_tokens, bert.keys_values(self.ln_vision(self.visual_encoder(image))))[0])

    def _spoken(self, image: Tensor, prompts: list[str], how: Writing) -> list[str]:
        """What the language model says after each image's queries and prompt."""
        self.opt_tokenizer.padding_side = "left"  # what is said follows the prompt, not padding
        tokens = self.opt_tokenizer(prompts, return_tensors="pt", padding="longest").to(self.device)
        width = tokens.input_ids.shape[1]
        positions = self.opt_model.config.max_position_embeddings
        room = positions - self.query_tokens.shape[1] - width
        if how.longest > room:
            raise UserError(
                f"max_len is {how.longest}, but the language model has {positions} positions, of which "
                f"{self.query_tokens.shape[1]} are the image's and {width} the prompt's; allowed: at most {room}."
            )
        with self.maybe_autocast():
            reader = OptWords(self.opt_model, self._queries(image.to(self.device)), tokens.attention_mask)
            lines = write(reader, tokens.input_ids, how)
        return [text.strip() for text in self.opt_tokenizer.batch_decode(lines, skip_special_tokens=True)]

    def _asked(self, question: str, prompt: str, max_len: int) -> str:
        """The prompt with the question in it, the question cut where the language model's positions would not suffice."""
        text = (prompt or "{}").replace("{}", question)
        room = self.opt_model.config.max_position_embeddings - self.query_tokens.shape[1] - max_len
        words = self.opt_tokenizer(question, add_special_tokens=False).input_ids
        kept = len(words)
        while kept and (too_many := len(self.opt_tokenizer(text).input_ids) - room) > 0:
            kept = max(0, kept - too_many)
            # a character may be of several tokens, and half of one is read as another, of more tokens
            text = (prompt or "{}").replace("{}", self.opt_tokenizer.decode(words[:kept]).rstrip("\ufffd"))
        return text


def _one_each(prompt: Any, count: int) -> list[str]:
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or len(prompts) != count or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"prompt is {prompt!r}, but must be a text, or a list of as many texts as there are images ({count}).")
    return list(prompts)


def _of_stage_1_alone(name: str) -> bool:
    layer = name.split("encoder.layer.")[-1].split(".", 1)[-1] if name.startswith("Qformer.bert.encoder.layer.") else ""
    return name.startswith(OF_STAGE_1) or layer.startswith(TEXT_BRANCH)
