"""LAVIS's own blip2_opt and blip2_t5 at a size for a CPU, trained by runner_mafa from a stage-1 checkpoint of ours, and its blip2.

Run as a script: arguments are a folder with stage_1.pth and opt.yaml, t5.yaml, blip2.yaml. Their own __init__ runs, on local parts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lavis.tasks
import torch
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from lavis.models.blip2_models.modeling_t5 import T5Config, T5ForConditionalGeneration
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import T5TokenizerFast

from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import EvaEncoder, LanguageModel
from lavis_mafa.models.blip2_opt import build_opt
from lavis_mafa.models.encoders import MINILM, build_blip2_tokenizer, build_eva
from reduced_blip2 import lavis_qformer

VIT = EvaEncoder(init=None, image_size=24, patch_size=12, width=32, depth=2, heads=2, mlp_ratio=4.3637, freeze=False, precision="fp32")
WORDS = "a red blue green small large dog cat car tree house boat sitting standing near under the old new bright".split()


class LocalParts:
    def init_tokenizer(self) -> None:
        return None

    def init_vision_encoder(self, *_: Any) -> Any:
        return build_eva(VIT), LayerNorm(32)

    def init_Qformer(self, queries: int, width: int, every: int = 2) -> Any:  # noqa: N802
        return lavis_qformer(30523, 32, 2, 2, width, every), nn.Parameter(0.02 * torch.randn(1, queries, 32))


class TinyStage1(LocalParts, Blip2Qformer):
    def init_tokenizer(self) -> Any:
        return build_blip2_tokenizer(MINILM)


class TinyOpt(LocalParts, Blip2OPT):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.opt_model.float()  # LAVIS loads it in fp16, which no CPU runs


class TinyT5(LocalParts, Blip2T5):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.t5_model.float()


def write_language_models(folder: Path) -> None:
    opt, tokenizer = build_opt(LanguageModel(init=None, freeze=False, precision="fp32", width=32, layers=1, heads=2))
    opt.save_pretrained(folder / "opt")
    tokenizer.save_pretrained(folder / "opt")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    T5TokenizerFast(tokenizer_object=words, extra_ids=0).save_pretrained(folder / "t5")
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write_language_models(where)
    registry.mapping["model_name_mapping"].update(blip2_opt=TinyOpt, blip2_t5=TinyT5, blip2=TinyStage1)
    assert lavis.tasks is not None
    sys.exit(max(main(["train", "--cfg-path", str(where / f"{name}.yaml")]) for name in ("opt", "t5", "blip2")))
