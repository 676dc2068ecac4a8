"""What one training step takes: weights, FLOPs and saved bytes of the model's own step, run on tensors that have no values."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lavis.common.registry import registry
from lavis.models.blip2_models.modeling_opt import OPTConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper
from transformers import BertConfig

from lavis_mafa.config.schema import DOWNSTREAM, FAMILIES, con_d_block
from lavis_mafa.errors import UserError
from lavis_mafa.models import albef_vqa, blip2, qformer, transformer
from lavis_mafa.models.blip2_opt import POSITIONS, Blip2OptMafa, OPTForCausalLM
from lavis_mafa.models.con_d import as_con_d, untrained
from lavis_mafa.models.encoders import PRECISIONS
from lavis_mafa.models.language_teacher import untrained_teacher
from lavis_mafa.plugin import register

# width, layers, heads as released, all with 50,272 words (OPT, Table 1); 350m is built differently
OPT = {"125m": (768, 12, 12), "1.3b": (2048, 24, 32), "2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40)}
BERT_WORDS = 30522
# the parts of a step; ITC, downstream the classifier, is also what belongs to no other
IMAGE, TEXT, TEACHER, ITC, ITM, LM = "image encoder", "text encoder", "momentum teacher", "ITC", "ITM", "LM"
CLASSIFIER = "classifier"
QUERIES, CON_D, CON_D_VIT = "Q-Former's queries", "Con-D, matching", "Con-D, image encoder"
LANGUAGE, SOFT_MASKS = "language teacher", "soft masks"
# torch counts attention on GPUs alone; that its kernels compute the logits again in backward is none of the model's work
ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
}
COUNTED = flop_registry | {operation: shape_wrapper(count) for operation, count in ATTENTION.items()}
WORDS = (torch.ops.aten._log_softmax.default, torch.ops.aten.log_softmax.int_out)  # masked, and one after another
BY_MODULE = {"visual_encoder": IMAGE, "text_encoder": TEXT, "text_decoder": LM}
BY_MODULE |= {"Qformer": QUERIES, "opt_proj": QUERIES, "opt_model": LM}


@dataclass(frozen=True)
class StepSize:
    """How large a step is, on one GPU."""

    batch: int  # B, pairs
    text_length: int  # T, tokens of every caption
    gathered: int = 1  # ranks whose candidates an anchor sees: all with batch_scope: global
    new_positives: float = 0.0  # what Con-D adds to the LM's B pairs, as a share of B


@dataclass(frozen=True)
class Flops:
    """Of one part, two a multiply-add, matrix products alone: forward, and backward with what it recomputes."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Weights:
    """How many weights there are, and what they take as they are stored."""

    trained: int
    frozen: int
    teacher: int
    con_d: int
    bytes_trained: int
    bytes_frozen: int
    bytes_teacher: int  # of the momentum teacher with its queue of features, and of the language teacher
    bytes_con_d: int


@dataclass(frozen=True)
class Cost:
    """What one step on one GPU takes."""

    weights: Weights
    flops: dict[str, Flops]  # by part
    saved: dict[str, int]  # bytes that are held when backward begins, by the part that first held them; no weights among them
    logits: int  # numbers that the LM head gives
    features: float  # FLOPs of GRIT's separate pass over the same batch; 0 where it was not asked for


def cost_of(
    settings: Any, size: StepSize, precision: str = "fp32", device: str = "cpu", own_vit: bool = False, collects: bool = False
) -> Cost:
    """Run one step of a typed ``model:`` block, whose files are not needed and never read.

    Args:
        device: cuda or cpu: what is saved has the types that it would have there, whether this machine has a GPU or not.
        own_vit: a BLIP-2 Con-D brings its own image encoder though it could share the model's frozen one.
        collects: count GRIT's separate pass too (run.grit.collect: separate).

    Raises:
        UserError: a language model whose size is neither in the table nor in a local folder.
    """
    settings = deepcopy(settings)
    settings.max_text_length = size.text_length
    step = _Step(settings, size, own_vit)
    with step.without_values("cpu"):  # without a GPU torch cannot run a backward pass on pretended ones
        step.run("cpu", precision)
        flops, step.flops = step.flops, {}
        if settings.arch in DOWNSTREAM and ITC in flops:
            flops[CLASSIFIER] = flops.pop(ITC)
        every = every_of(settings)
        flops |= {part: Flops(flops[part].forward / every) for part in (CON_D, CON_D_VIT) if part in flops}  # of the average step
        if collects:
            step.model.grit_features(samples_of(settings, size, "cpu"))
        features = sum(part.total for part in step.flops.values())
    if device == "cuda":
        step = _Step(settings, size, own_vit)
        with step.without_values("cuda"):
            step.run("cuda", precision, backward=False)
    vit = settings.image_encoder
    if vit.gradient_checkpointing:  # one block is whole at a time, as all are without
        vit.gradient_checkpointing = False
        whole = cost_of(settings, size, precision, device, own_vit).saved
        step.saved[IMAGE] = step.saved.get(IMAGE, 0) + whole.get(IMAGE, 0) // vit.depth
    return Cost(step.weights, flops, step.saved, step.logits, features)


# --- the model, without its weights' memory, files or downloads ------------------------------------------------------------


def build(settings: Any) -> Any:
    """The model of a typed ``model:`` block at its real size on the default device, from scratch, in training mode.

    Raises:
        UserError: a language model whose size is neither in the table nor in a local folder.
    """
    register()
    plain = _without_files(settings)
    with _vocabulary(plain), NoValues():
        if settings.arch != "blip2_opt_mafa":
            model = registry.get_model_class(settings.arch)(plain).train()
            if getattr(settings, "language_teacher", None) is not None:
                sizes = _bert_sizes(settings.language_teacher.init)
                model.set_language_teacher(untrained_teacher(model.tokenizer.vocab_size, *sizes))
            return model
        plain.max_text_length = min(settings.max_text_length, POSITIONS - settings.qformer.queries)
        model, language = Blip2OptMafa(plain), settings.language_model
        if language.init is not None:  # then of the size of what it would download
            opt = OPTForCausalLM(_opt_config(language.init)).to(PRECISIONS[language.precision])
            model.opt_model = opt.requires_grad_(not language.freeze)
            for module in model.opt_model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.float()
            model.opt_proj = nn.Linear(settings.qformer.width, model.opt_model.config.hidden_size)
        model.max_txt_len = settings.max_text_length
        return model.train()


def _bert_sizes(init: str) -> tuple[int, int, int]:
    """Width, layers and heads of a local folder's BERT; of any other name those of BERT base."""
    config = BertConfig.from_pretrained(init) if Path(init).is_dir() else BertConfig()
    return config.hidden_size, config.num_hidden_layers, config.num_attention_heads


def build_con_d(settings: Any, own_vit: bool = False) -> Any:
    """The discriminator that a ``model:`` block names, untrained, on the default device; None where ECM is off."""
    if not hasattr(settings, "ecm") or not settings.ecm.enabled:
        return None
    if settings.discriminator.arch == "ground_truth":
        return _FreeConD()
    block, shared = _without_files(con_d_block(settings)), can_share(settings) and not own_vit
    block.max_text_length = settings.max_text_length
    with _vocabulary(block), NoValues():
        return as_con_d(untrained(block, "shared" if shared else "own"), settings.discriminator.precision, shared)


class _FreeConD:
    """In the place of the data's own truth, which costs nothing."""

    def in_step(self, *_: Any) -> _FreeConD:
        return _FreeConD()

    def match_probability(self, samples: Any, image_index: Tensor, text_index: Tensor) -> Tensor:
        return torch.zeros_like(image_index, dtype=torch.float32)


def watch_con_d(con_d: Any, watched: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the ``match_probability`` of every step by what ``watched`` makes of it."""
    in_step = con_d.in_step

    def in_step_and_watch(*args: Any) -> Any:
        asked = in_step(*args)
        asked.match_probability = watched(asked.match_probability)
        return asked

    con_d.in_step = in_step_and_watch


def can_share(settings: Any) -> bool:
    """Could Con-D use the model's frozen ViT? (It does where the weights are equal too.)"""
    con_d = getattr(settings, "discriminator", None)
    if con_d is None or settings.arch != "blip2_mafa" or FAMILIES.get(con_d.arch) != "blip2_mafa" or not settings.image_encoder.freeze:
        return False
    own, theirs = settings.image_encoder, con_d_block(settings).image_encoder
    return all(getattr(own, size) == getattr(theirs, size) for size in ("width", "depth", "patch_size", "image_size"))


def weights_of(model: Any, con_d: Any) -> Weights:
    """Count the weights of what :func:`build` and :func:`build_con_d` made."""
    groups: dict[str, list[Tensor]] = {"trained": [], "frozen": [], "teacher": []}
    for name, weight in model.named_parameters():
        kind = "teacher" if name.split(".")[0].endswith("_m") else "trained" if weight.requires_grad else "frozen"
        groups[kind].append(weight)
    groups["teacher"] += [weight for module in _modules_of(getattr(model, "language_teacher", None)) for weight in module.parameters()]
    groups["con_d"] = [weight for module in _modules_of(con_d) for weight in module.parameters()]
    counts = {kind: sum(weight.numel() for weight in group) for kind, group in groups.items()}
    sizes = {f"bytes_{kind}": sum(weight.nbytes for weight in group) for kind, group in groups.items()}
    sizes["bytes_teacher"] += sum(buffer.nbytes for name, buffer in model.named_buffers() if "queue" in name)
    return Weights(**counts, **sizes)


def _without_files(settings: Any) -> Any:
    """The same sizes with nothing that would be read or downloaded."""
    settings = deepcopy(settings)
    for part in (settings, *vars(settings).values()):
        for name in ("pretrained", "stage_1", "init"):
            if hasattr(part, name):
                setattr(part, name, None)
    return settings


@contextlib.contextmanager
def _vocabulary(settings: Any) -> Iterator[None]:
    """A vocabulary of BERT's size where the block names a hub's or a package's: only its length matters."""
    if not hasattr(settings, "tokenizer") or Path(settings.tokenizer).exists():
        yield
        return
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1037: "a"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(special.get(i, f"word{i}") for i in range(BERT_WORDS)), encoding="utf-8")
        settings.tokenizer = str(path)
        yield


def _opt_config(init: str) -> OPTConfig:
    """Of a local folder, or of a size that is known offline; raises UserError."""
    if Path(init).is_dir():
        return OPTConfig.from_pretrained(init)
    kind = init.lower().rsplit("opt-", 1)[-1]
    if kind not in OPT:
        raise UserError(
            f"model.language_model.init is {init!r}, whose size is not known; known: a local folder, opt-{', opt-'.join(OPT)}."
        )
    width, layers, heads = OPT[kind]
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)


# --- the step --------------------------------------------------------------------------------------------------------------


class NoValues(TorchDispatchMode):
    """Counts FLOPs, and answers for tensors without values: yes to a question, the texts' length where a number is read, as many
    places as the step expects where some are looked for."""

    def __init__(self, step: _Step | None = None) -> None:
        super().__init__()
        self.step = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step, kwargs = self.step, kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and (step or args[0].is_meta):
            return args[0].dtype == torch.bool or (step.size.text_length if step else 0)
        if step and func is torch.ops.aten.nonzero.default:
            return torch.empty(round(step.share * args[0].numel()), args[0].dim(), dtype=torch.long, device=args[0].device)
        if step and func in (torch.ops.aten._unique2.default, torch.ops.aten.unique_dim.default):
            return args[0], torch.arange(args[0].shape[-1]), args[0]
        output = func(*args, **kwargs)
        if step and step.part == LM and func in WORDS:
            step.logits = max(step.logits, output.numel())
        if step and func._overloadpacket in COUNTED:
            step.add(COUNTED[func._overloadpacket](*args, **kwargs, out_val=output))
        return output


class _Step:
    """The model's own step. Whose an operation is, is known in forward from the modules and methods that are being called, in backward
    from what its node has saved."""

    def __init__(self, settings: Any, size: StepSize, own_vit: bool) -> None:
        with torch.device("meta"):
            self.model, self.con_d = model, con_d = build(settings), build_con_d(settings, own_vit)
        self.size, self.weights = size, weights_of(model, con_d)
        mlm = getattr(settings, "mlm", None)
        self.words = 1.0 if mlm is None else mlm.mask_probability * (size.text_length - 2) / size.text_length
        self.part, self.backward = "images", False
        self.flops: dict[str, Flops] = {}
        self.saved: dict[str, int] = {}
        self.logits = 0
        self.watched: set[nn.Module] = set()
        self.held: dict[int, Tensor] = {}  # by storage; kept, so that no storage's address is used twice
        for name, module in model.named_children():
            self._watch(module, TEACHER if name.endswith("_m") else BY_MODULE.get(name, ITC), reads_words=name == "Qformer")
        for module in _modules_of(getattr(model, "language_teacher", None)):
            self._watch(module, LANGUAGE)
        if getattr(model, "replaceable", None) is not None:
            model.tokenizer.batch_decode = lambda ids, **_: ["a " * size.text_length] * len(ids)  # which have no values to read
        for holder in (con_d, *_modules_of(con_d)):
            if vit := getattr(holder, "visual_encoder", None):
                self._watch(vit, IMAGE)
        if hasattr(model, "add_masked_images"):
            model.add_masked_images = self._of(ITM, model.add_masked_images)  # whose keys and values it is the first to ask for
            model.soft_masks = self._of(SOFT_MASKS, model.soft_masks)
        if hasattr(model, "set_discriminator"):
            model.encode = self._encode(model.encode)
            if con_d is not None:
                watch_con_d(con_d, lambda ask: self._of(CON_D, ask))
            model.set_discriminator(con_d)
            model.batch_scope = "global" if size.gathered > 1 else "local"

    @contextlib.contextmanager
    def without_values(self, device: str) -> Iterator[None]:
        """Inside, tensors have shapes alone, and say that they are on ``device``; so do the other ranks'."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)  # a model's doubts about such a batch
            if self.size.gathered > 1:
                dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.size.gathered)
                stack.callback(dist.destroy_process_group)
            if device == "cuda":
                stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention))
                for name, answer in (("cuda.amp.common.amp_definitely_not_available", False), ("cuda.is_bf16_supported", True)):
                    stack.enter_context(patch(f"torch.{name}", lambda *_, answer=answer, **__: answer))
                stack.enter_context(patch("torch.Tensor.pin_memory", lambda tensor: tensor))
                stack.enter_context(patch("torch.autograd.grad", lambda _, inputs: (torch.empty_like(inputs),)))
            # what the host reads of an index: pairs that are spread evenly over texts and images; and no text is shorter than others
            for module in (transformer, qformer, blip2):
                stack.enter_context(patch(f"{module.__name__}.numbers", self._numbers))
            for module in (transformer, albef_vqa):
                stack.enter_context(patch(f"{module.__name__}.lengths_of", lambda mask: [mask.shape[1]] * len(mask)))
            stack.enter_context(patch(f"{albef_vqa.__name__}.checked_answers", _an_answer_each))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(NoValues(self))
            for module in (self.model, *_modules_of(self.con_d), *_modules_of(getattr(self.model, "language_teacher", None))):
                _move(module, device)
                self.held |= {t.untyped_storage()._cdata: t for t in (*module.parameters(), *module.buffers())}
            yield

    def run(self, device: str, precision: str, backward: bool = True) -> None:
        """Forward and backward."""
        samples = samples_of(self.model.settings, self.size, device)
        for name in ("image", "image0", "image1"):
            if name in samples:
                self._pack(samples[name])
        self.part = ITC
        half = torch.autocast(device, PRECISIONS[precision], enabled=precision != "fp32")  # what is recomputed in backward is so too
        with half, torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            loss = self.model(samples)["loss"]
            self.backward = backward
            if backward:
                loss.backward()
        self.part, self.backward = ITC, False

    @property
    def share(self) -> float:
        """Of the positions that are looked for: words that the LM predicts, or else connections that Con-D has found."""
        return self.words if self.part == LM else self.size.new_positives / 2

    def add(self, flops: float) -> None:
        old = self.flops.get(self.part, Flops())
        new = Flops(0.0, flops) if self.backward else Flops(flops)
        self.flops[self.part] = Flops(old.forward + new.forward, old.backward + new.backward)

    def _numbers(self, index: Tensor, below: int) -> list[int]:
        """What the host reads of an index: own texts and images, then others; more than there are, and words, are spread evenly."""
        if len(index) <= below <= self.size.batch * self.size.gathered:
            return list(range(len(index)))
        return [number * below // len(index) for number in range(len(index))]

    def _encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_and_watch(*args: Any) -> Any:
            encoded = encode(*args)
            pairs = encoded.pairs
            pairs.itm_logits, pairs.lm_loss = self._of(ITM, pairs.itm_logits), self._of(LM, pairs.lm_loss)
            return encoded

        return encode_and_watch

    def _of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def of_part(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            output = function(*args, **kwargs)
            self.part = before
            return output

        return of_part

    def _watch(self, module: nn.Module, part: str, reads_words: bool = False) -> None:
        """What ``module`` and those below it do is ``part``'s, unless a loss or Con-D has called them."""
        before: list[str] = []

        def enter(_: nn.Module, args: Any) -> None:
            asked = TEXT if reads_words and args else part  # the Q-Former is given words by position, queries by name
            before.append(self.part)
            self.part = {ITC: asked, CON_D: CON_D_VIT if part == IMAGE else CON_D}.get(self.part, self.part)

        def leave(*_: Any) -> None:
            self.part = before.pop()

        # of LAVIS's ViT a method is called, and so only modules below it; what BLIP's decoder shares is the encoder's
        for below in set(module.modules()) - self.watched:
            self.watched.add(below)
            below.register_forward_pre_hook(enter)
            below.register_forward_hook(leave)

    def _pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held and self.part != SOFT_MASKS:  # what that pass saves is gone before backward begins
            self.held[storage._cdata] = tensor
            self.saved[self.part] = self.saved.get(self.part, 0) + storage.nbytes()
        return self.part, tensor

    def _unpack(self, packed: tuple[str, Tensor]) -> Tensor:
        self.part, tensor = packed  # a node of backward fetches what it saved right before it computes
        return tensor


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """What torch takes where there is a GPU; where there is none it would save every attention map."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


def _an_answer_each(samples: dict[str, Any]) -> tuple[list[str], Tensor, Tensor]:
    count = len(samples["answer"])
    return samples["answer"], torch.ones(count), torch.arange(count)


def every_of(settings: Any) -> int:
    """In one of how many steps Con-D is asked."""
    return settings.ecm.every if hasattr(settings, "ecm") else 1


def samples_of(settings: Any, size: StepSize, device: Any) -> dict[str, Any]:
    """A batch of noise, with captions that differ and are longer than the model reads."""
    side = settings.image_encoder.image_size
    captions = [f"{i} " + "a " * size.text_length for i in range(size.batch)]
    # not of the first epoch: Con-D has been looked at, and a momentum teacher counts in full; a step in which Con-D is asked
    views = ["image", "image_second_view"] if getattr(getattr(settings, "itc", None), "intra_modal", []) else ["image"]
    of_task: dict[str, Any] = {}
    if settings.arch in DOWNSTREAM:
        of_task = {"label": torch.zeros(size.batch, dtype=torch.long, device=device), "answer": ["a a"] * size.batch}
        views = ["image0", "image1"] if settings.arch == "albef_nlvr_mafa" else views
    images = {view: torch.randn(size.batch, 3, side, side, device=device) for view in views}
    return {**images, **of_task, "text_input": captions, "epoch": 2 * every_of(settings)}


def _move(module: nn.Module, device: str) -> None:
    """Weights without values that say they are on ``device``; ``Module.to`` cannot."""
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device=device)
                    tensors[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _modules_of(con_d: Any) -> list[nn.Module]:
    """Con-D holds modules and is none itself."""
    return [] if con_d is None else [module for module in vars(con_d).values() if isinstance(module, nn.Module)]
