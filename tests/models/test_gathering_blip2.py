"""blip2_mafa on two processes with batch_scope: global has the losses and gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

import gathering_blip2 as gathering
import launched

pytestmark = pytest.mark.ranks


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    words = [len(gathering.reduced.ours().tokenizer(caption).input_ids) for caption in gathering.CAPTIONS]
    assert sum(words[:4]) == sum(words[4:]) and max(words[:4]) != max(words[4:])  # as many, padded differently
    gathering.write_con_d(tmp_path)
    second = launched.Process([gathering.__file__, tmp_path], tmp_path)
    try:
        found = gathering.on_two_processes(tmp_path, rank=0)
    finally:
        told = second.communicate(timeout=120)
    assert told.returncode == 0, told.stderr
    wanted = {name: gathering.step(tmp_path, name == "frozen", 0, 8) for name in ("frozen", "trained")}
    wanted["synthetic"] = gathering.step(tmp_path, True, 0, 8, synthetic=True)
    for name, one in wanted.items():
        assert found[name].keys() == one.keys()
        assert bool(one["shared"]) == (name != "trained")  # Con-D reads the gathered states, or gathers its own
        for key, value in one.items():
            torch.testing.assert_close(found[name][key], value, atol=2e-5, rtol=1e-3, msg=lambda m, k=(name, key): f"{k}: {m}")
        asked = one["probability"][one["probability"] > 0]
        assert (asked > gathering.THRESHOLD).any() and (asked < gathering.THRESHOLD).any()
        crossing = torch.cat([one["probability"][:4, 4:].flatten(), one["probability"][4:, :4].flatten()])
        assert (crossing > 0).any()  # some of the hardest negatives are on the other process
    assert 0 < wanted["synthetic"]["losses"][-1] < 1 and not torch.equal(wanted["synthetic"]["losses"], wanted["frozen"]["losses"])
    assert not any(key.startswith("visual_encoder.") for key in found["frozen"])
    # the comparison says something: these gradients are not that small, and without those of the other process it fails
    assert min(wanted["frozen"][key].abs().max() for key in ("temp", "query_tokens", "ln_vision.weight", "itm_head.weight")) > 1e-3
    of_vit = {key: value for key, value in wanted["trained"].items() if key.startswith("visual_encoder.")}
    assert max(float((found["cut"][key] - value).abs().max()) for key, value in of_vit.items()) > 1e-3
