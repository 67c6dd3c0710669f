"""What is published of an adapter and of a run that had ended before it was asked for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from training_job import arguments

from hf_saereg import publishing
from hf_saereg.layout import PublishingError, check_publishable


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": torch.zeros(2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("relative", [False, True])
def test_an_adapter_on_a_local_base_is_refused(adapter, tmp_path, monkeypatch, relative):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    name = "base" if relative else str(tmp_path / "base")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": name}))
    with pytest.raises(PublishingError, match="base"):
        check_publishable(adapter)
    config.write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    check_publishable(adapter)


def test_a_finished_run_is_published_once_it_is_asked_for(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(publishing, "publish", lambda *words: pushed.append(words))
    publishing.publish_finished(arguments(tmp_path / "mine"))
    assert not pushed
    publishing.publish_finished(arguments(tmp_path / "mine", push_to_hub=True))
    publishing.publish_finished(
        arguments(tmp_path / "mine", push_to_hub=True, hub_model_id="someone/model")
    )
    assert [words[:2] for words in pushed] == [
        (str(tmp_path / "mine"), "mine"),
        (str(tmp_path / "mine"), "someone/model"),
    ]
