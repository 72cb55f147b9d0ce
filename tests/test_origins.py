"""What a model was made from: what is asked of the hub, and when it is not asked at all."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

from itune import errors, locating


def test_without_a_network_the_hub_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its library waits longer after each of five tries, with two lines of warning for each."""

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    with pytest.raises(errors.EnvironmentRefusal, match=r"nobody/model: .*cannot be reached"):
        locating.resolve("nobody/model")


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a/b.v0.1", "gpt2.5"]
)
def test_a_name_of_the_hub_may_have_a_dot(name: str) -> None:
    assert locating.local(name) is None


@pytest.mark.parametrize("name", ["a/model.safetensors", "model.gguf", "b/config.json"])
def test_a_file_is_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(errors.ModelError, match="no such folder"):
        locating.local(name)
