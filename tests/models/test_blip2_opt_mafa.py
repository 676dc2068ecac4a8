"""blip2_opt_mafa: weights from stage 1, LAVIS's loss and captions, and answers that do not depend on their batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import MODEL_DEFAULTS, VqaRun, typed_block
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.errors import UserError
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.blip2_opt import Blip2OptMafa, byte_tokenizer
from lavis_mafa.models.encoders import build_eva
from lavis_mafa.runners.checkpoint import load_model, model_state
from lavis_mafa.tasks.vqa import MafaVqaTask
from reduced_blip2 import lavis_qformer

pytestmark = pytest.mark.slow

VIT: dict[str, Any] = {"image_size": 24, "patch_size": 12, "width": 32, "depth": 2, "heads": 2}
QFORMER: dict[str, Any] = {"init": None, "width": 32, "layers": 2, "heads": 2, "queries": 3}
SMALL: dict[str, Any] = {
    "arch": "blip2_opt_mafa",
    "model_type": "tiny",
    "image_encoder": VIT,
    "qformer": QFORMER,
    "language_model": {"width": 32, "layers": 2, "heads": 2},
}


def config(arch: str, **changes: Any) -> Any:
    return OmegaConf.merge(
        OmegaConf.load(MODEL_DEFAULTS / f"{arch}_tiny.yaml").model, SMALL if arch == "blip2_opt_mafa" else {}, changes
    )


def typed(arch: str, **changes: Any) -> Any:
    return typed_block("model", config(arch, **changes))


def stage_1(**changes: Any) -> Blip2Mafa:
    torch.manual_seed(1)
    block = config("blip2_mafa", image_encoder=VIT, qformer=QFORMER, ecm={"enabled": False})
    return Blip2Mafa(typed_block("model", OmegaConf.merge(block, changes))).eval()


def stage_2(seed: int = 2, **changes: Any) -> Blip2OptMafa:
    torch.manual_seed(seed)
    model = Blip2OptMafa(typed_block("model", config("blip2_opt_mafa", **changes))).eval()
    with torch.no_grad():  # initial weights are so small that every image gets the same words
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stage_1_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stage_1") / "stage_1.pth"
    torch.save({"model": stage_1().state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory) -> Path:
    """An OPT as it is published: weights, config and tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("opt")
    model = stage_2()
    model.opt_model.save_pretrained(folder, safe_serialization=False)  # LAVIS names no tied weights as later releases ask
    model.opt_tokenizer.save_pretrained(folder)
    return folder


# --- weights -------------------------------------------------------------------------------------------------------------


def test_stage_2_takes_what_it_needs_of_stage_1(stage_1_file, caplog):
    caplog.set_level("INFO")
    first = torch.load(stage_1_file, weights_only=True)["model"]
    model = Blip2OptMafa.from_config(config("blip2_opt_mafa", stage_1=str(stage_1_file)))
    own = model.state_dict()
    taken = [name for name in own if name in first]
    assert taken and all(torch.equal(own[name], first[name]) for name in taken)
    assert all(name.startswith(("opt_proj.", "opt_model.")) for name in own if name not in first)
    left = {name for name in first if name not in own}
    assert f"{len(taken)} weights taken, {len(left)} of its text branch and heads left behind" in caplog.text
    branch = ("intermediate.", "output.", "word_embeddings", "position_embeddings", "cls.")
    assert all(any(p in n for p in branch) or n.split(".")[0] in ("vision_proj", "text_proj", "itm_head", "temp") for n in left)


def test_what_does_not_fit_is_named(stage_1_file, tmp_path):
    state = torch.load(stage_1_file, weights_only=True)["model"]
    for wrong, message in (
        ({n: v for n, v in state.items() if n != "query_tokens"}, "1 missing: query_tokens"),
        ({**state, "query_tokens": torch.zeros(1, 5, 32)}, r"1 other size: query_tokens \[1, 5, 32\] \(wanted \[1, 3, 32\]\)"),
        ({**state, "opt": torch.zeros(1)}, "1 left over: opt"),
    ):
        torch.save({"model": wrong}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=message):
            stage_2().load_stage_1(str(tmp_path / "wrong.pth"))


def test_stage_mix_ups_are_found_from_names_alone(stage_1_file, tmp_path):
    torch.save({"model": stage_2().state_dict()}, tmp_path / "stage_2.pth")
    second = str(tmp_path / "stage_2.pth")
    with pytest.raises(UserError, match="is a BLIP-2 stage-1 checkpoint.*model.stage_1"):
        check_kinds(typed("blip2_opt_mafa", pretrained=str(stage_1_file)))
    with pytest.raises(UserError, match="is a BLIP-2 stage-2 checkpoint.*model.pretrained"):
        check_kinds(typed("blip2_opt_mafa", stage_1=second))
    with pytest.raises(UserError, match="is a BLIP-2 stage-2 checkpoint, but blip2_mafa needs a BLIP-2 stage-1"):
        check_kinds(typed("blip2_mafa", pretrained=second))
    con_d = {"arch": "blip2", "checkpoint": str(stage_1_file)}
    with pytest.raises(UserError, match="Q-Former of 2 layers of width 32 with 3 queries, but 4 layers of width 96 with 4 queries"):
        check_kinds(typed("blip2_mafa", discriminator=con_d))
    with pytest.raises(UserError, match="is a BLIP-2 stage-1 checkpoint, but albef_retrieval needs an ALBEF"):
        check_kinds(typed("blip2_mafa", discriminator={"arch": "albef_retrieval", "checkpoint": str(stage_1_file)}))
    check_kinds(typed("blip2_opt_mafa", pretrained=second))
    check_kinds(typed("blip2_opt_mafa", stage_1=str(stage_1_file)))


def test_frozen_parts_with_a_file_of_their_own_are_not_saved_again(opt_folder, tmp_path):
    torch.save({f"visual_encoder.{n}": v for n, v in stage_1().visual_encoder.state_dict().items()}, tmp_path / "vit.pth")
    frozen: dict[str, Any] = {
        "image_encoder": {"init": str(tmp_path / "vit.pth"), "freeze": True},
        "language_model": {"init": str(opt_folder), "freeze": True},
    }
    model = stage_2(3, **frozen)
    state = model_state(model)
    assert not any(name.startswith(("visual_encoder.", "opt_model.")) for name in state)
    assert {"ln_vision.weight", "query_tokens", "opt_proj.weight"} <= state.keys()
    torch.save({"model": state}, tmp_path / "stage_2.pth")
    again = Blip2OptMafa.from_config(config("blip2_opt_mafa", pretrained=str(tmp_path / "stage_2.pth"), **frozen))
    load_model(again, state, "the same")
    for name, value in state.items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(UserError, match="missing: visual_encoder"):
        Blip2OptMafa.from_config(config("blip2_opt_mafa", pretrained=str(tmp_path / "stage_2.pth")))
    whole = model_state(stage_2())
    assert any(name.startswith("opt_model.") for name in whole), "from scratch: nowhere else to be found"


def test_a_missing_language_model_is_one_message(tmp_path):
    with pytest.raises(UserError, match="model.language_model.init is .*neither a folder with OPT's weights"):
        stage_2(language_model={"init": str(tmp_path / "opt"), "freeze": True})


# --- LAVIS ---------------------------------------------------------------------------------------------------------------


class OfLavis(Blip2OPT):
    """LAVIS's blip2_opt with its own __init__, from local parts: the OPT is a folder, as LAVIS takes it."""

    def __init__(self, opt: Path) -> None:
        block = typed_block("model", config("blip2_opt_mafa"))
        self.block = block
        super().__init__(img_size=24, vit_precision="fp32", freeze_vit=False, num_query_token=3, opt_model=str(opt), max_txt_len=48)
        self.opt_model.float()

    def init_tokenizer(self) -> None:  # type: ignore[override]
        return None

    def init_vision_encoder(self, *_: Any) -> Any:
        return build_eva(self.block.image_encoder), LayerNorm(32)

    def init_Qformer(self, queries: int, width: int) -> Any:
        return lavis_qformer(30523, 32, 2, 2, width), nn.Parameter(torch.zeros(1, queries, 32))


def test_the_loss_and_the_captions_are_those_of_lavis(opt_folder):
    theirs, ours = OfLavis(opt_folder).eval(), stage_2(language_model={"init": str(opt_folder), "freeze": True})
    with torch.no_grad():
        for parameter in theirs.opt_proj.parameters():
            parameter.mul_(5.0)
    assert not theirs.load_state_dict(ours.state_dict()).missing_keys, "the same names"
    samples = {"image": images(3), "text_input": ["a red dog", "two cats on a mat", "it"]}
    ours.train(), theirs.train()  # the OPT drops nothing out here
    mine, lavis = ours(samples), theirs(samples)
    torch.testing.assert_close(mine.loss, lavis["loss"], atol=1e-5, rtol=1e-5)
    mine.loss.backward(), lavis["loss"].backward()
    torch.testing.assert_close(ours.opt_proj.weight.grad, theirs.opt_proj.weight.grad, atol=1e-6, rtol=1e-4)
    assert ours.opt_model.lm_head.weight.grad is None and mine.stats == {"loss": mine.loss.item(), "loss_lm": mine.loss.item()}
    ours.eval(), theirs.eval()
    for beams in (1, 3):
        options = {"num_beams": beams, "max_length": 6, "min_length": 1}
        assert ours.generate(samples, **options) == theirs.generate(samples, **options)


def test_a_stage_1_checkpoint_of_ours_loads_into_lavis_blip2_opt(stage_1_file, opt_folder):
    model = OfLavis(opt_folder)
    message = model.load_from_pretrained(str(stage_1_file))
    assert all(name.startswith(("opt_proj.", "opt_model.")) for name in message.missing_keys)
    first = torch.load(stage_1_file, weights_only=True)["model"]
    assert torch.equal(model.query_tokens, first["query_tokens"])
    assert torch.equal(
        model.Qformer.bert.encoder.layer[0].crossattention.self.key.weight,
        first["Qformer.bert.encoder.layer.0.crossattention.self.key.weight"],
    )


def test_and_into_the_parts_that_lavis_blip2_t5_has(stage_1_file):
    block = typed_block("model", config("blip2_opt_mafa"))
    model = Blip2T5.__new__(Blip2T5)  # its own __init__ downloads a T5
    BaseModel.__init__(model)
    model.visual_encoder, model.ln_vision = build_eva(block.image_encoder), LayerNorm(32)
    model.Qformer, model.query_tokens = lavis_qformer(30523, 32, 2, 2, 32), nn.Parameter(torch.zeros(1, 3, 32))
    Blip2OptMafa._drop_text_branch(model)  # as Blip2T5.__init__ does
    message = model.load_from_pretrained(str(stage_1_file))
    assert message.missing_keys == []


# --- answers -------------------------------------------------------------------------------------------------------------

QUESTIONS = ["what is this?", "which of the two animals is standing nearer to the house?", "why?"]


def test_an_answer_does_not_depend_on_the_other_questions_of_its_batch():
    model, samples = stage_2(), {"image": images(3), "text_input": QUESTIONS}
    options: dict[str, Any] = {"prompt": "Question: {} Answer:", "num_beams": 3, "max_len": 6}
    together = model.predict_answers(dict(samples), **options)
    alone = [model.predict_answers({"image": images(3)[i : i + 1], "text_input": [q]}, **options)[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone and len(set(together)) > 1
    assert samples["text_input"] == QUESTIONS


def ends_its_lines(bias: float = 3.0, **changes: Any) -> Blip2OptMafa:
    """A model that says the end token often, which one of random weights never does."""
    model = stage_2(**changes)
    more = torch.zeros(len(model.opt_tokenizer))
    more[model.eos_token_id] = bias
    model.opt_model.lm_head.register_forward_hook(lambda _, __, logits: logits + more)
    return model


@torch.no_grad()
def beam_search(model: Blip2OptMafa, image: torch.Tensor, text: str, beams: int, longest: int, shortest: int, penalty: float) -> str:
    """One sample, without padding, without a cache: a line of n tokens scores its log probability / n ^ penalty."""
    queries = model.opt_proj(
        model.Qformer.bert(
            query_embeds=model.query_tokens, encoder_hidden_states=model.ln_vision(model.visual_encoder(image)), return_dict=True
        ).last_hidden_state
    )
    prompt = model.opt_tokenizer(text).input_ids

    def following(line: list[int]) -> list[float]:
        embeds = torch.cat([queries, model.opt_model.model.decoder.embed_tokens(torch.tensor([prompt + line]))], dim=1)
        scores = model.opt_model(inputs_embeds=embeds).logits[0, -1].log_softmax(dim=0)
        if len(line) < shortest:
            scores[model.eos_token_id] = float("-inf")
        return scores.tolist()

    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(longest):
        options = [(score + more, line, token) for score, line in live for token, more in enumerate(following(line))]
        options = sorted(options, key=lambda option: -option[0])[: 2 * beams]
        length = max(1, len(live[0][1]))
        live = []
        for place, (score, line, token) in enumerate(options):
            if token != model.eos_token_id:
                live.append((score, [*line, token]))
            elif place < beams:
                ended = sorted([*ended, (score / length**penalty, line)], key=lambda one: -one[0])[:beams]
            if len(live) == beams:
                break
        if len(ended) == beams and ended[-1][0] >= options[0][0] / length**penalty:
            break
    else:
        ended += [(score / len(line) ** penalty, line) for score, line in live]
    return model.opt_tokenizer.decode(max(ended, key=lambda one: one[0])[1], skip_special_tokens=True).strip()


@pytest.mark.parametrize("shortest", [0, 2])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 2.0])
def test_the_length_penalty_counts_generated_tokens_alone(penalty, shortest):
    """Neither the prompt, nor the padding beside a longer question, nor the end of the line."""
    model = ends_its_lines()
    prompts = ["{}", "Question: {} Answer:"]
    for beams, prompt in zip((2, 4), prompts, strict=True):
        options: dict[str, Any] = {"num_beams": beams, "max_len": 5, "min_len": shortest, "length_penalty": penalty}
        found = model.predict_answers({"image": images(3), "text_input": QUESTIONS}, prompt=prompt, **options)
        asked = [prompt.replace("{}", question) for question in QUESTIONS]
        wanted = [beam_search(model, images(3)[i : i + 1], text, beams, 5, shortest, penalty) for i, text in enumerate(asked)]
        assert found == wanted
        said = {"image": images(3), "prompt": asked}
        lengths: dict[str, Any] = {"max_length": 5, "min_length": shortest, "length_penalty": penalty}
        assert model.generate(said, num_beams=beams, **lengths) == wanted
    two = model.generate({"image": images(3), "prompt": asked}, num_beams=4, num_captions=2, **lengths)
    assert two[::2] == wanted and all(one != other for one, other in zip(two[::2], two[1::2], strict=True))


def test_the_length_penalty_decides_how_long_answers_are():
    model, samples = ends_its_lines(), {"image": images(3), "text_input": QUESTIONS}
    tokens = byte_tokenizer()

    def length(penalty: float) -> int:
        answers = model.predict_answers(samples, prompt="Question: {} Answer:", num_beams=4, max_len=8, length_penalty=penalty)
        return sum(len(tokens(answer).input_ids) for answer in answers)

    assert length(-1.0) < length(3.0)


def test_a_prompt_for_each_image_or_one_for_all():
    model = stage_2()
    with pytest.raises(UserError, match=r"prompt is \['a'\], but must be a text, or a list of as many texts as there are images \(2\)"):
        model.generate({"image": images(2), "prompt": ["a"]})
    with pytest.raises(UserError, match=r"prompt is \['a \{\}', 3\], but must be"):
        model.predict_answers({"image": images(2), "text_input": QUESTIONS[:2]}, prompt=["a {}", 3])  # type: ignore[list-item]
    samples: dict[str, Any] = {"image": images(2)}
    one = model.generate({**samples, "prompt": "a photo of"}, num_beams=2, max_length=4)
    assert one == model.generate({**samples, "prompt": ["a photo of"] * 2}, num_beams=2, max_length=4)
    assert model.generate({**samples, "prompt": ""}, num_beams=2, max_length=4) == model.generate(samples, num_beams=2, max_length=4)
    assert len(model.generate(samples, use_nucleus_sampling=True, num_captions=3, max_length=4)) == 6


def test_what_has_no_room_or_is_not_there_is_refused():
    model = stage_2()
    samples = {"image": images(1), "text_input": ["why?"]}
    with pytest.raises(UserError, match="min_length is 5 and max_length 4; allowed: "):
        model.predict_answers(samples, min_len=5, max_len=4)
    with pytest.raises(UserError, match="inference_method is 'rank', but blip2_opt_mafa ranks no given answers"):
        model.predict_answers(samples, inference_method="rank", answer_list=["a"])
    with pytest.raises(
        UserError, match="max_len is 600, but the language model has 512 positions, of which 3 are the image's and 1 the"
    ):
        model.predict_answers(samples, max_len=600)
    with pytest.raises(UserError, match="max_len is 508, .*; allowed: at most 499"):
        model.generate({"image": images(1), "prompt": "a dog at "}, max_length=508)
    with pytest.raises(
        UserError, match="model.max_text_length is 510, .* 512 positions, of which 3 are the image's; allowed: at most 509"
    ):
        stage_2(max_text_length=510)
    longest = stage_2(max_text_length=509).train()
    longest({"image": images(1), "text_input": ["why " * 400]}).loss.backward()


def test_answers_are_trained_after_their_questions():
    """Every answer by itself, in plain loops; the question's tokens give no loss, and the answers' weights count."""
    model, prompt = stage_2(), "Question: {} Answer:"
    samples = {
        "image": images(2),
        "text_input": QUESTIONS[:2],
        "prompt": prompt,
        "answer": ["a dog", "puppy", "the one on the left"],
        "weight": torch.tensor([0.75, 0.25, 1.0]),
        "n_answers": torch.tensor([2, 1]),
    }
    total, tokens = 0.0, 0.0
    for row, answer, weight in ((0, "a dog", 0.75), (0, "puppy", 0.25), (1, "the one on the left", 1.0)):
        before = model.opt_tokenizer(prompt.replace("{}", QUESTIONS[row])).input_ids
        line = model.opt_tokenizer(f" {answer}\n", add_special_tokens=False).input_ids
        embeds = model.opt_model.model.decoder.embed_tokens(torch.tensor([before + line]))
        states = model.Qformer.bert(
            query_embeds=model.query_tokens,
            encoder_hidden_states=model.ln_vision(model.visual_encoder(images(2)[row : row + 1])),
            return_dict=True,
        ).last_hidden_state
        logits = model.opt_model(inputs_embeds=torch.cat([model.opt_proj(states), embeds], dim=1)).logits[0]
        for place, token in enumerate(line):
            total += weight * -float(logits[place - len(line) - 1].log_softmax(dim=0)[token])
        tokens += weight * len(line)
    output = model.train()(samples)
    assert float(output.loss) == pytest.approx(total / tokens, rel=1e-4) and output.loss_lm is output.loss
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(model({**samples, "prompt": [prompt] * 2}).loss, output.loss), "a prompt for all, or for each question"
    for wrong in (
        {"n_answers": torch.tensor([1, 1])},
        {"answer": ["a dog"]},
        {"weight": torch.ones(2)},
        {"n_answers": torch.tensor([3])},
    ):
        with pytest.raises(UserError, match="samples has 2 questions, n_answers .*; needed: n_answers for each question, and as many"):
            model({**samples, **wrong})
    read: list[str] = []
    words = model.opt_model.model.decoder.embed_tokens
    hook = words.register_forward_hook(lambda _, given, __: read.extend(model.opt_tokenizer.batch_decode(given[0])))
    model({**samples, "prompt": "Q: {} A: "})
    hook.remove()
    assert " A: a dog" in read[0] and " A: puppy" in read[1], "one blank before the answer"
    long = [float(model({**samples, "answer": ["x" * length] * 3}).loss) for length in (model.max_txt_len, 200, 700)]
    assert long[0] == long[1] == long[2], "an answer is cut where a caption is"
    other = model({**samples, "answer": ["xyzzy"] * 3})
    assert float(other.loss) != pytest.approx(float(output.loss), rel=1e-3)


def test_mafa_vqa_trains_on_the_answers_of_lavis_sets(tmp_path):
    """COCO VQA's rows, through the loader's collating: other answers give another loss, the same answers the same."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.jpg")
    processors: Any = (lambda image: images(1)[0], str.lower)

    def loss(*answers: list[str]) -> float:
        rows = [
            {"image": "0.jpg", "question": q, "question_id": i, "answer": a}
            for i, (q, a) in enumerate(zip(QUESTIONS[:2], answers, strict=True))
        ]
        (tmp_path / "vqa.json").write_text(json.dumps(rows))
        data = IndexedDataset(ConcatDataset([COCOVQADataset(*processors, str(tmp_path), [str(tmp_path / "vqa.json")])]))
        batch = data.collate(data.__getitems__([0, 1]))
        return float(MafaVqaTask(VqaRun()).step_output(model, batch)["loss"])

    model = stage_2()
    wanted = loss(["Dog"] * 3 + ["cat"], ["red"])
    assert wanted == loss(["Dog", "cat", "Dog", "Dog"], ["red"])
    for others in ((["Dog"] * 2 + ["cat"] * 2, ["red"]), (["Dog"] * 3 + ["cow"], ["red"]), (["Dog"] * 3 + ["cat"], ["blue"])):
        assert loss(*others) != pytest.approx(wanted, rel=1e-3)


def test_the_whole_prompt_is_read_however_long_the_question():
    model = stage_2(max_text_length=8)
    seen: list[torch.Tensor] = []
    model.opt_model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    model.predict_answers({"image": images(2), "text_input": QUESTIONS[:2]}, prompt="Question: {} Answer:", num_beams=2, max_len=2)
    texts = model.opt_tokenizer.batch_decode(seen[0], skip_special_tokens=True)
    assert texts == [f"Question: {q} Answer:" for q in QUESTIONS[:2]]
    pad = model.opt_tokenizer.pad_token_id
    assert seen[0][0, 0] == pad and seen[0][0, -1] != pad, "padded on the left"


def test_greedy_answers_are_the_most_probable_tokens():
    model = stage_2()
    prompt = "Question: what is this? Answer:"
    (answer,) = model.predict_answers(
        {"image": images(1), "text_input": ["what is this?"]}, prompt="Question: {} Answer:", num_beams=1, max_len=4
    )
    ids = model.opt_tokenizer(prompt, return_tensors="pt").input_ids
    queries = model.opt_proj(
        model.Qformer.bert(
            query_embeds=model.query_tokens, encoder_hidden_states=model.ln_vision(model.visual_encoder(images(1))), return_dict=True
        ).last_hidden_state
    )
    tokens: list[int] = []
    for _ in range(4):
        embeds = torch.cat(
            [queries, model.opt_model.model.decoder.embed_tokens(torch.cat([ids, torch.tensor([tokens]).long().view(1, -1)], 1))], 1
        )
        best = int(model.opt_model(inputs_embeds=embeds).logits[0, -1].argmax())
        if best == model.eos_token_id and tokens:
            break
        tokens.append(best)
    assert answer == model.opt_tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_length_limits_hold():
    model = stage_2()
    samples = {"image": images(2), "text_input": QUESTIONS[:2]}
    tokenizer = byte_tokenizer()
    for shortest, longest in ((1, 3), (5, 5)):
        answers = model.predict_answers(samples, prompt="{}", num_beams=2, max_len=longest, min_len=shortest)
        assert all(len(tokenizer(a, add_special_tokens=False).input_ids) <= 3 * longest for a in answers)
    one = model.predict_answers({"image": images(1), "text_input": "what is this?"}, num_beams=2, max_len=2)
    assert len(one) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_precision_language_models_run_on_a_cpu(precision):
    part = {"freeze": True, "precision": precision}
    model = stage_2(image_encoder=part, language_model=part)
    exact = stage_2(image_encoder={"freeze": True})
    samples = {"image": images(2), "text_input": ["a red dog", "two cats"]}
    loss = model(samples).loss
    loss.backward()
    torch.testing.assert_close(loss, exact(samples).loss, rtol=0.05, atol=0.05)
    assert torch.isfinite(model.opt_proj.weight.grad).all() and model.opt_proj.weight.dtype == torch.float32
    assert len(model.generate(samples, num_beams=2, max_length=3)) == len(model.predict_answers(samples, num_beams=2, max_len=3)) == 2


def test_a_byte_tokenizer_knows_every_text():
    tokenizer = byte_tokenizer()
    for text in ("a red dog", "Côte d'Ivoire", "犬\n", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
        assert max(ids) < len(tokenizer)


def test_an_opt_without_some_of_its_weights_is_refused(opt_folder, tmp_path):
    import shutil

    folder = tmp_path / "half"
    shutil.copytree(opt_folder, folder)
    (weights,) = folder.glob("pytorch_model.bin")
    state = torch.load(weights, weights_only=True)
    torch.save(dict(list(state.items())[: len(state) // 2]), weights)
    with pytest.raises(UserError, match="which lacks .* of its weights"):
        stage_2(language_model={"init": str(folder), "freeze": True})
    with pytest.raises(UserError, match="model.qformer.init is .*holds a model of type 'opt'"):
        stage_2(qformer={"init": str(opt_folder)})


def test_a_stage_2_file_is_no_stage_1(tmp_path):
    torch.save({"model": stage_2().state_dict()}, tmp_path / "stage_2.pth")
    with pytest.raises(UserError, match="is a stage-2 checkpoint; give it as model.pretrained"):
        stage_2().load_stage_1(str(tmp_path / "stage_2.pth"))


def test_a_question_longer_than_the_positions_is_cut_and_its_prompt_kept():
    model = stage_2()
    seen: list[torch.Tensor] = []
    model.opt_model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    model.predict_answers({"image": images(1), "text_input": ["why " * 400]}, prompt="Question: {} Answer:", num_beams=2, max_len=4)
    text = model.opt_tokenizer.decode(seen[0][0], skip_special_tokens=True)
    assert text.startswith("Question: why why") and text.endswith(" Answer:")
    assert seen[0].shape[1] <= model.opt_model.config.max_position_embeddings - 3 - 4


def test_a_cut_question_ends_with_a_whole_character():
    """A character is up to four of these tokens, and half of one would be read as another, of three: no cut may go on for ever."""
    model, room = stage_2(), 512 - 3 - 10
    for letter in ("é", "猫", "😀"):
        for shift in range(5):
            question = "?" * shift + letter * 260
            text = model._asked(question, "Question: {} Answer:", 10)
            kept = text.removeprefix("Question: ").removesuffix(" Answer:")
            assert question.startswith(kept) and room - 4 < len(model.opt_tokenizer(text).input_ids) <= room


def two_samples() -> dict[str, Any]:
    return {"image": images(), "text_input": ["a red dog", "a blue car in the rain"]}


def test_the_range_of_the_soft_prompt_is_returned():
    model = stage_2()
    with torch.no_grad():
        output, again = model(two_samples()), model(two_samples())
    assert list(output.ranges) == ["soft_prompt"] and output.ranges["soft_prompt"].shape == (2,)
    assert output.ranges["soft_prompt"][0] < output.ranges["soft_prompt"][1]
    assert torch.equal(output.ranges["soft_prompt"], again.ranges["soft_prompt"]) and not model.opt_proj._forward_hooks
    assert "soft_prompt" not in output.stats


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoilt_image_gives_a_loss_that_is_not_finite(value):
    spoilt = two_samples()
    spoilt["image"][1, 0, 0, 0] = value
    output = stage_2().train()(spoilt)
    output.loss.backward()
    assert output.loss.isnan() and output.ranges["soft_prompt"].isnan().all()


@pytest.mark.parametrize("captions", [["a red dog"], ["", ""], ["a red dog", "a red dog"]], ids=["one", "empty", "equal"])
def test_the_least_there_can_be_gives_a_finite_loss(captions):
    model = stage_2().train()
    output = model({"image": images()[: len(captions)], "text_input": captions})
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
