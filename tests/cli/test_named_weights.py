"""Weights by LAVIS's names, `lavis:ARCH/TYPE`: from a server on this machine, with a file that one of our models takes."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch

from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.named_weights import by_name, fetched, registered

NAME = "lavis:albef_retrieval/coco"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """LAVIS's cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


class Server(http.server.SimpleHTTPRequestHandler):
    """``cut.pth`` ends before its length."""

    asked: list[str] = []

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:  # noqa: N802 - of http.server
        self.asked.append(self.path)
        if not self.path.startswith("/cut"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"PK\x03\x04")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a folder's files; ``named`` registers a file there as LAVIS's ``coco``."""
    from lavis.models import AlbefRetrieval

    (tmp_path / "www").mkdir()
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=tmp_path / "www")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def named(file: str) -> Path:
            address = f"http://127.0.0.1:{server.server_port}/{file}?version=1"
            text = f"model: {{arch: albef_retrieval, load_finetuned: true, pretrained: 'http://x/y.pth', finetuned: '{address}'}}"
            (tmp_path / "coco.yaml").write_text(text)
            monkeypatch.setattr(AlbefRetrieval, "PRETRAINED_MODEL_CONFIG_DICT", {"coco": str(tmp_path / "coco.yaml"), "flickr": "x"})
            return tmp_path / "www" / file

        yield named
        server.shutdown()


def test_lavis_registers_addresses_for_all_that_can_judge(cache):
    for name in (
        "albef_retrieval/coco",
        "albef_retrieval/flickr",
        "blip_retrieval/coco",
        "blip_image_text_matching/base",
        "blip2/coco",
    ):
        address, file = registered(f"lavis:{name}", "--con-d")
        assert address.startswith("https://storage.googleapis.com/sfr-") and file == cache / address.rsplit("/", 1)[1]
    assert registered("lavis:blip2/pretrain", "")[0].endswith("blip2_pretrained.pth"), (
        "where nothing is fine-tuned, the pre-trained one"
    )
    assert by_name(NAME, "") == NAME, "nothing is downloaded by a check"
    with pytest.raises(UserError, match="--con-d is 'lavis:albef_retrieval/cocoa', .* Its types: lavis:albef_retrieval/coco, "):
        registered("lavis:albef_retrieval/cocoa", "--con-d")
    with pytest.raises(UserError, match="Did you mean 'lavis:albef_retrieval/coco'"):
        registered("lavis:albef_retreival/coco", "--con-d")


def test_a_file_is_downloaded_once_and_its_size_is_told(cache, served, capfd):
    torch.save({"model": {"temp": torch.zeros(100_000)}}, served("weights.pth"))
    assert fetched(NAME, "--con-d") == str(cache / "weights.pth") == by_name(NAME, "--con-d")
    assert "lavis:albef_retrieval/coco: 0 MB from http://127.0.0.1:" in capfd.readouterr().err
    asked = len(Server.asked)
    assert fetched(NAME, "--con-d") and len(Server.asked) == asked
    assert torch.load(cache / "weights.pth", weights_only=True)["model"]["temp"].shape == (100_000,)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("gone.pth", None, "File not found"),
        ("cut.pth", None, "4 of 1,000 bytes arrived"),
        ("login.pth", b"<html>Please log in</html>", "there is a web page or XML"),
    ],
)
def test_what_cannot_be_downloaded_is_one_message_with_address_and_place(cache, served, file, content, reason):
    target = served(file)
    if content:
        target.write_bytes(content)
    with pytest.raises(UserError) as caught:
        fetched(NAME, "model.pretrained")
    said = str(caught.value)
    assert said.startswith(f"model.pretrained is '{NAME}', but http://127.0.0.1") and reason in said, said
    assert said.endswith(f"put it here: {cache / file}") and not list(cache.glob("*.pth")) and not list(cache.glob(".*.part"))


def test_a_job_downloads_and_validate_does_not(cache, served, run_yaml, trained, refused, capsys):
    """In the settings and in a flag; a file of the wrong kind is found once it is there."""
    (checkpoint,) = (path for path in trained.glob("checkpoint_*.pth") if "rank" not in path.name)
    target = served("weights.pth")
    torch.save({"model": torch.load(checkpoint, weights_only=True)["model"]}, target)
    options = ["model.discriminator.arch=albef_mafa", f"model.discriminator.checkpoint={NAME}", f"model.pretrained={NAME}"]
    assert main(["validate", str(run_yaml), "--options", *options]) == 0 and not Server.asked and not cache.exists()
    assert main(["train", "--cfg-path", str(run_yaml), "--options", *options, "run.max_steps=1"]) == 0
    assert (cache / "weights.pth").is_file() and str(cache / "weights.pth") in Path("output/latest/config.yaml").read_text()
    assert main(["mine", "--cfg-path", str(run_yaml), "--con-d", NAME, "--force"]) == 0

    (cache / "weights.pth").unlink()
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}, target)
    capsys.readouterr()
    assert main(["train", "--cfg-path", str(run_yaml), "--options", *options]) == 2
    assert f"model.pretrained: {cache}/weights.pth is an image encoder alone" in capsys.readouterr().err
    assert "lavis:vicuna" in refused("mine", "--cfg-path", run_yaml, "--con-d", "lavis:vicuna/7b", "--output", "again")
