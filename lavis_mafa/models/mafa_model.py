"""What our pre-training models share: one MAFA step on an encoded batch, whoever encoded it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_mafa.common.checkpoint_kinds import LANGUAGE
from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.model_settings import MafaBlock, loss_weights
from lavis_mafa.common.settings import CHOICES
from lavis_mafa.common.typed import typed_block
from lavis_mafa.discriminators.sanity import SanityCheck
from lavis_mafa.models.nothing_to_do import NothingToDo
from lavis_mafa.models.outputs import PretrainOutput
from lavis_mafa.models.retrieval_scoring import RetrievalScores, retrieval_scores
from lavis_mafa.models.samples import checked
from lavis_mafa.objectives import Discriminator, EncodedBatch, StepSettings, mafa_step, text_key, value_range
from lavis_mafa.objectives.known import UNKNOWN
from lavis_mafa.objectives.pretraining import ItcSettings, PairModel, StepOutput

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
PROJECTIONS = r"(vision_proj|text_proj)\.|temp$"
Block = TypeVar("Block", bound=MafaBlock)


def may_lack(state: dict[str, Tensor], arch: str, source: str) -> tuple[str, ...]:
    """What a checkpoint for matching alone may do without: the whole language head, and then the temperature. A warning names it."""
    part, what, _ = LANGUAGE[arch]
    if any(name.startswith(part) for name in state):
        return ()
    lacking = [part] if "temp" in state else [part, "temp"]
    logger.warning("%s has no %s (%s): it keeps its first values. Retrieval and features need none.", source, what, ", ".join(lacking))
    return tuple(lacking)


class MafaModel(nn.Module, Generic[Block]):
    """Methods of a LAVIS model that trains with MAFA (MAFA Algorithm 1). A host adds :meth:`encode` and retrieval's parts."""

    lm_loss_name = "loss_lm"
    rank_by = "itm+itc"  # what its papers' code ranks retrieval by; run.rank_by overrides it
    # names of weights (regular expressions) that some losses alone train; all others are trained by each of the three
    trained_by: dict[str, set[str]] = {}
    settings: Block
    temp: nn.Parameter
    device: Any
    training: bool
    discriminator: Discriminator | None
    con_d_check: SanityCheck | None

    def _prepare_mafa(self) -> None:
        """To be called at the end of a host's ``__init__``."""
        self._freeze_what_no_loss_trains()
        self.batch_scope = "local"  # set from run.grit.batch_scope: whose candidates an anchor sees
        # the discriminator is no part of the module tree: not trained, not saved, not broadcast
        self.__dict__["discriminator"] = None
        self.con_d_check = None
        self.nothing_to_do = NothingToDo()

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """Build from the ``model:`` block; loads ``pretrained`` and the discriminator where they are named, nothing else."""
        from lavis_mafa.discriminators import build_discriminator

        settings: Any = typed_block("model", cfg)
        model: Any = cls(settings)
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        if settings.ecm.enabled and settings.discriminator is not None:
            model.set_discriminator(build_discriminator(settings, model))
        return model

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """LAVIS's name for loading one's own weights (``load_model(..., checkpoint=FILE)``): as exact as ``load_from_pretrained``."""
        return self.load_from_pretrained(url_or_filename)

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a checkpoint; a host defines it."""
        raise NotImplementedError

    def set_discriminator(self, discriminator: Discriminator | None) -> None:
        """Use any object with ``match_probability`` as Con-D; it stays out of the module tree and of checkpoints."""
        self.__dict__["discriminator"] = discriminator
        block = self.settings.discriminator
        name = type(discriminator).__name__ if block is None else block.checkpoint or block.arch
        self.con_d_check = None if discriminator is None else SanityCheck(name, self.settings.ecm.threshold)

    def _freeze_what_no_loss_trains(self) -> None:
        """DDP waits for a gradient of every weight that wants one; and what no loss moves should not decay either."""
        weights = zip(("itc", "itm", "lm"), loss_weights(self.settings).values(), strict=True)
        on = {loss for loss, weight in weights if weight}
        idle = [names for names, losses in self.trained_by.items() if not losses & on]
        for name, parameter in self.named_parameters():
            if any(re.match(names, name) for names in idle):
                parameter.requires_grad_(False)

    # --- what a host defines ---------------------------------------------------------------------------------------

    def encode(self, samples: dict[str, Any]) -> tuple[PairModel, EncodedBatch, tuple[Tensor, Tensor]]:
        """Encode a batch once: pair lists for ITM and LM, similarities for ITC and mining, features [B, d] for GRIT."""
        raise NotImplementedError

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """See :class:`lavis_mafa.models.retrieval_scoring.RetrievalModel`."""
        raise NotImplementedError

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`lavis_mafa.models.retrieval_scoring.RetrievalModel`."""
        raise NotImplementedError

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """See :class:`lavis_mafa.models.retrieval_scoring.RetrievalModel`."""
        raise NotImplementedError

    # --- one training step -----------------------------------------------------------------------------------------

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """One MAFA step on a batch.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list of B captions; from the runner also ``index`` and ``image_key``
                LongTensor[B], ``grouped`` (does GRIT's order serve this epoch), ``epoch``, ``iters``, ``num_iters_per_epoch``.

        In eval mode without a Con-D the losses are those of the plain labels.

        Raises:
            UserError: samples that do not go together, training with ECM but without a Con-D, or one that answers no probability.
        """
        samples = self.checked(samples, "image", "text_input")
        if self.training and self.settings.ecm.enabled and self.discriminator is None:
            raise UserError(
                "model.ecm.enabled is true, but the model has no Con-D to ask; hand it one by model.set_discriminator(con_d), name "
                "one in model.discriminator, or train without it: model.ecm.enabled: false."
            )
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        samples = {**samples, "gathered": self.batch_scope == "global"}
        pairs, batch, features = self.encode(samples)
        try:
            output = mafa_step(pairs, batch, samples, self._step_settings(samples), self.discriminator)
        except ValueError as error:
            index = samples["index"].tolist() if "index" in samples else "unknown"
            raise UserError(f"{self._blamed(str(error))}. Data set indices of the batch: {index}.") from error
        if self.training:
            self._look_at(samples, batch, output)
        norms = {"image_feature_norm": features[0].norm(dim=-1), "text_feature_norm": features[1].norm(dim=-1)}
        return PretrainOutput(
            loss=output.loss,
            loss_itc=output.loss_itc,
            loss_itm=output.loss_itm,
            image_features=features[0],
            text_features=features[1],
            figures=output.figures,
            verdicts=self._verdicts(output, samples),
            ranges=output.ranges | {name: value_range(norm) for name, norm in norms.items()},
            **{self.lm_loss_name: output.loss_lm},
        )

    def retrieval_scores(self, data_loader: Any, run: Any) -> RetrievalScores:
        """Scores of an evaluation set by ``run.rank_by`` (null or absent: this model's own) with ``run.k_test``, and cosines."""
        rank_by, allowed = getattr(run, "rank_by", None) or self.rank_by, CHOICES["run.rank_by"]
        if rank_by not in allowed:  # LAVIS's tasks check nothing
            raise UserError(f"run.rank_by is {rank_by!r}, but must be one of {', '.join(allowed)}, or null.")
        top_k = getattr(run, "k_test", None)
        if rank_by != "itc" and (not isinstance(top_k, int) or top_k < 1):
            raise UserError(f"run.k_test is {top_k!r}, but must be a whole number, 1 or more.")
        return retrieval_scores(self, data_loader, top_k or 0, rank_by)

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        """The same for LAVIS's ``retrieval`` task: numpy [I, T], [T, I]."""
        scores = self.retrieval_scores(data_loader, task_cfg)
        return scores.i2t.numpy(), scores.t2i.numpy()

    def checked(self, samples: dict[str, Any], *keys: str) -> dict[str, Any]:
        """See :func:`lavis_mafa.models.samples.checked`."""
        settings: Any = self.settings
        return checked(samples, settings.image_encoder.image_size, *keys)

    # --- parts of a step -------------------------------------------------------------------------------------------

    def _look_at(self, samples: dict[str, Any], batch: EncodedBatch, output: StepOutput) -> None:
        """What a user should be told about a training step; it changes nothing."""
        self.nothing_to_do.look(samples["text_input"], output, self.settings)
        check = self.con_d_check
        if self.settings.ecm.enabled and self.discriminator is not None and check is not None and not check.done:
            hardest = output.mined.probability
            if hardest is not None:
                hardest = hardest.masked_fill(~output.mined.pairs.exists, float("nan"))
            check.look(self.discriminator, samples, batch.known_positive, hardest)

    def _blamed(self, error: str) -> str:
        """What went wrong in a step; of Con-D's answers also whose they are and what to do."""
        if "match probabilities" not in error:
            return error
        name = type(self.discriminator).__name__ if self.con_d_check is None else self.con_d_check.name
        return (
            f"Con-D ({name}): {error}. Its weights are broken, or too large for their precision: try "
            "model.discriminator.precision: fp32, give another model.discriminator.checkpoint, or set model.ecm.enabled: false"
        )

    def _keys(self, samples: dict[str, Any]) -> Tensor:
        """LongTensor[B, 2]: who each sample's image is, and what its text is (see :func:`known_positives`)."""
        ecm, texts = self.settings.ecm, samples["text_input"]
        image = samples.get("image_key")
        if image is None or not ecm.same_image:
            image = samples.get("index")  # the stand-in of an unreadable sample repeats a row: that one is known to match
        if image is None:
            image = torch.full((len(texts),), UNKNOWN)
        text = torch.tensor([text_key(text) if ecm.same_text else UNKNOWN for text in texts])
        return torch.stack([image.to(self.device), text.to(self.device)], dim=1)

    def _step_settings(self, samples: dict[str, Any]) -> StepSettings:
        itc, when = self.settings.itc, self.settings.itc.smooth_when
        smooth = when == "always" or (when == "grouped" and bool(samples.get("grouped", False)))
        itc_weight, itm_weight, lm_weight = loss_weights(self.settings).values()
        return StepSettings(
            itc=ItcSettings(weight=itc_weight, smoothing=itc.smoothing if smooth else 0.0, consistency=itc.consistency),
            ecm=self.settings.ecm if self.discriminator is not None else replace(self.settings.ecm, enabled=False),
            negatives=self.settings.itm.negatives,
            itm_weight=itm_weight,
            lm_weight=lm_weight,
        )

    def _verdicts(self, output: StepOutput, samples: dict[str, Any]) -> dict[str, Tensor] | None:
        if "index" not in samples:
            return None
        index = samples["index"].to(self.device)
        index = gather_own_first(index) if self.batch_scope == "global" else index
        pairs, mined = output.mined.pairs, output.mined
        verdicts = {"image": index[pairs.image_index], "text": index[pairs.text_index], "exists": pairs.exists}
        verdicts |= {"image_position": pairs.image_index, "text_position": pairs.text_index}
        if mined.probability is not None and mined.connections is not None:
            verdicts["probability"] = mined.probability
            verdicts["positive"], verdicts["ambiguous"] = mined.connections.positive, mined.connections.ambiguous
        return verdicts
