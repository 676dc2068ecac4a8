from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lavis_mafa.errors import UserError
from lavis_mafa.tasks import caption_metrics as module
from lavis_mafa.tasks.caption_metrics import caption_metrics, caption_tokens, metrics_by_domain, read_references

WITHOUT_JAVA = ["bleu", "cider", "rouge_l"]
SUBJECTS = [
    "A man",
    "Two women's dogs",
    "The U.S. player",
    "Mr. Smith",
    'A sign saying "stop"',
    "A black-and-white cat",
    "He's",
    "They",
]
VERBS = ["isn't holding", "can't see", "is riding", "has 1,000", "'s got", "cannot eat", "they're near", "don’t paint"]
OBJECTS = ["a t-shirt", "an x-ray (big one)", "3.5 pizzas", "some salt & pepper", "a café; a bar", "o'clock towers", "its tail -- wet"]
ENDS = [
    "on St. Mark's square.",
    "at 10:30 a.m.",
    "in the boys' room!!",
    "and/or w/ water",
    "50% off, #1...",
    "the end.The next",
    "no. 5",
    "",
]

REFERENCES: dict[Any, list[str]] = {
    1: ["A dog runs fast on the green grass.", "The dog is running."],
    2: ["Two cats sleep on a small bed.", "Cats, asleep on the bed!"],
    3: ["A man rides a red bicycle down the street.", "Someone on a bike."],
    4: ["A plate of food on a wooden table.", "There's food on the table."],
}
PERFECT: dict[Any, str] = {image: texts[0] for image, texts in REFERENCES.items()}
SHUFFLED: dict[Any, str] = {image: PERFECT[image % 4 + 1] for image in PERFECT}


# In the scripts of photo captions that are not English: words, as people write them, and what the sentence ends with.
SCRIPTS = {
    "Hindi": ("एक कुत्ता हरी घास पर दौड़ रहा है दो बिल्लियाँ बिस्तर हैं हिन्दी अंग्रेज़ी कि", "।"),
    "Bengali": ("একটি কুকুর সবুজ ঘাসে দৌড়াচ্ছে ক্ষ দুটি বিড়াল", "।"),
    "Tamil": ("ஒரு நாய் பச்சை புல்லில் ஓடுகிறது பூனை", "."),
    "Telugu and Gujarati": ("తెలుగు కుక్క ગુજરાતી કૂતરો", "."),
    "what is cut up": ("ಕನ್ನಡ ನಾಯಿ മലയാളം നായ မြန်မာ བོད་ཡིག ខ្មែរ සිංහල ਪੰਜਾਬੀ ଓଡ଼ିଆ", "."),
    "Thai": ("สุนัขวิ่งบนสนามหญ้า แมว กำ น้ำ", ""),
    "Arabic": ("كَلْبٌ يَجْرِي عَلَى العُشْبِ كلب قِطّ", "؟"),
    "Hebrew": ("אָדָם הָלַךְ כלב חתול", "."),
    "accents apart": ("cafe\u0301 nai\u0308ve e\u0301te\u0301 n\u0303andu\u0301 и\u0306", "."),
    "accents": ("café naïve été ñandú đường việt ärgert", "!"),
    "others": ("кот пёс γάτα σκύλος 犬が草の上を走る 개가 달린다 አማርኛ ውሻ", "。"),
}
PATTERNS = [
    "{a} {b}",
    "{a}, {b}!",
    "({a}) {b}",
    "{a}-{b}",
    "{a}/{b}",
    "{a}.{b}",
    "{a}'s {b}",
    "{a}3 {b}",
    "{a} & {b}",
    '"{a}"',
    "{a}_{b}",
]
PATTERNS += ["3-{a} {b}", "{a}:{b}", "{a}--{b}", "{a}… {b}", "#{a} {b}", "{a}\u200d{b}", "{a}m² {b}①", "l'{a} d'{b} n'{a}"]


def by_stanford(captions: list[str]) -> list[list[str]]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = ["java", "-Dfile.encoding=UTF-8", *program]
    said = subprocess.run(command, input="\n".join(captions) + "\n", capture_output=True, encoding="utf-8", check=True).stdout
    lines = said.split("\n")[: len(captions)]
    return [[word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS] for line in lines]


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java, to ask Stanford's tokeniser itself")
def test_tokens_are_those_of_stanfords_tokeniser() -> None:
    captions = [" ".join(parts) for parts in itertools.product(SUBJECTS, VERBS, OBJECTS, ENDS)]
    captions = random.Random(0).sample(captions, 400)
    for words, end in SCRIPTS.values():
        pairs = itertools.pairwise([*words.split(), words.split()[0]])
        captions += [pattern.format(a=a, b=b) + end for a, b in pairs for pattern in PATTERNS]
    # every mark, symbol and piece of punctuation of the basic plane, within a word
    kinds = [chr(c) for c in range(0xA0, 0x10000) if unicodedata.category(chr(c))[0] in "MSP" or unicodedata.category(chr(c)) == "Cf"]
    captions += [f"dog cat{one}cow man" for one in kinds]
    for caption, tokens in zip(captions, by_stanford(captions), strict=True):
        assert caption_tokens(caption) == tokens, caption


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("एक कुत्ता हरी घास पर दौड़ रहा है।", ["एक", "कुत्ता", "हरी", "घास", "पर", "दौड़", "रहा", "है", "।"]),
        ("हिन्दी-अंग्रेज़ी", ["हिन्दी", "अंग्रेज़ी"]),  # hyphens join plain letters alone
        ("দৌড়াচ্ছে।", ["দৌড়াচ্ছে", "।"]),
        ("புல்லில் ஓடுகிறது", ["புல்லில்", "ஓடுகிறது"]),
        ("สุนัขวิ่งบนสนามหญ้า", ["สุนัขวิ่งบนสนามหญ้า"]),
        ("كَلْبٌ يَجْرِي", ["كَلْبٌ", "يَجْرِي"]),
        ("Un cafe\u0301 de l'e\u0301te\u0301, l'hiver.", ["un", "cafe\u0301", "de", "l'", "e\u0301te\u0301", "l'hiver"]),
        ("ខ្មែរ", ["ខ", "ម", "រ"]),  # Stanford's knows none of its marks, and ends words there
    ],
)
def test_marks_belong_to_their_words(caption: str, tokens: list[str]) -> None:
    """What Stanford's tokeniser says, for a machine without Java."""
    assert caption_tokens(caption) == tokens


def test_perfect_captions_score_full_and_wrong_ones_less() -> None:
    perfect = caption_metrics(REFERENCES, PERFECT, WITHOUT_JAVA)
    assert set(perfect) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"}
    assert perfect["bleu_4"] == pytest.approx(100) and perfect["rouge_l"] == pytest.approx(100)
    # Case and punctuation do not count.
    assert caption_metrics(REFERENCES, {i: text.upper().strip(".") + " !" for i, text in PERFECT.items()}, WITHOUT_JAVA) == perfect
    shuffled = caption_metrics(REFERENCES, SHUFFLED, WITHOUT_JAVA)
    assert all(shuffled[name] < perfect[name] for name in perfect)
    assert caption_metrics(REFERENCES, {1: ""}, WITHOUT_JAVA)["cider"] == 0


def test_only_captioned_images_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    few = {1: PERFECT[1], 2: SHUFFLED[2]}
    assert caption_metrics(REFERENCES, few, ["bleu"]) == caption_metrics({i: REFERENCES[i] for i in few}, few, ["bleu"])
    assert [record.message for record in caplog.records] == ["2 of 4 images have a caption; the metrics are of these."]


def test_captions_without_references_and_wrong_names() -> None:
    with pytest.raises(UserError, match="2 of 5 captions have no reference, the first of image 7"):
        caption_metrics({**REFERENCES, 8: []}, {**{1: "a", 2: "b", 3: "c"}, 7: "d", 8: "e"}, ["bleu"])
    with pytest.raises(UserError, match="run.caption_metrics holds 'cidr'; allowed: bleu, .* Did you mean 'cider'"):
        caption_metrics(REFERENCES, PERFECT, ["cidr"])
    with pytest.raises(UserError, match="no captions"):
        caption_metrics(REFERENCES, {}, ["bleu"])


def test_without_java_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    metrics = metrics_by_domain(REFERENCES, PERFECT, {1: "in-domain", 2: "in-domain", 3: "out-domain"})
    assert {"bleu_4", "cider", "in_domain_cider", "out_domain_rouge_l"} < set(metrics) and not any("spice" in key for key in metrics)
    assert [record.message.split(":")[0] for record in caplog.records] == ["meteor is skipped", "spice is skipped"]
    assert "install a Java runtime" in caplog.text
    assert capsys.readouterr().out == ""


def test_spice_is_never_downloaded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(module, "SPICE_JARS", ("surely-not-there.jar",))
    assert caption_metrics(REFERENCES, PERFECT, ["spice"]) == {}
    assert len(caplog.records) == 1 and "get_stanford_models" in caplog.text


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, ["java"]), BrokenPipeError("gone"), ValueError("no number")])
def test_a_java_program_that_fails_costs_its_own_metric_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(references: Any, captions: Any) -> float:
        raise error

    monkeypatch.setattr(module, "_has_java", lambda name: True)
    monkeypatch.setattr(module, "_spice", fail)
    assert set(caption_metrics(REFERENCES, PERFECT, ["spice", "rouge_l"])) == {"rouge_l"}
    assert "spice is skipped: its Java program failed" in caplog.text


def test_domains_are_scored_by_themselves() -> None:
    domains = {1: "in-domain", 2: "near-domain", 3: "out-domain", 4: "out-domain"}
    captions = {**PERFECT, 2: SHUFFLED[2]}
    metrics = metrics_by_domain(REFERENCES, captions, domains, WITHOUT_JAVA)
    for domain in set(domains.values()):
        images = [image for image in domains if domains[image] == domain]
        alone = caption_metrics({i: REFERENCES[i] for i in images}, {i: captions[i] for i in images}, WITHOUT_JAVA)
        assert {name: metrics[f"{domain.replace('-', '_')}_{name}"] for name in alone} == alone
    assert metrics["near_domain_rouge_l"] < metrics["in_domain_rouge_l"] == pytest.approx(100)
    assert {name: value for name, value in metrics.items() if "domain" not in name} == caption_metrics(
        REFERENCES, captions, WITHOUT_JAVA
    )


def test_reading_references(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    coco = {"images": [{"id": 5, "domain": "in-domain"}, {"id": 6}], "annotations": [{"image_id": 5, "id": 1, "caption": "a"}] * 2}
    file.write_text(json.dumps(coco))
    assert read_references(file, "run.caption_references") == ({5: ["a", "a"], 6: []}, {5: "in-domain"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list; allowed: COCO's"),
        ('{"annotations": []}', "has no list 'images', but annotations;"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', r"annotations\[0\] has no 'caption'"),
        ('{"images": [', "is not JSON"),
    ],
)
def test_files_that_are_no_references(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"run.caption_references: .*{message}"):
        read_references(file, "run.caption_references")
    with pytest.raises(UserError, match="run.caption_references: there is no file"):
        read_references(tmp_path / "gone.json", "run.caption_references")
