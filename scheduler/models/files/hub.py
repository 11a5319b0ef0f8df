"""Models of the Hugging Face hub: from an id to a folder. What is in its cache is taken without asking anybody."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from scheduler.models.files.fetching import FetchError

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "1_Pooling/*")

REACHED_SECONDS = 3.0
"""The hub has to answer a connection within these: its library would go on trying for most of a minute."""


def hub_folder(name: str) -> str:
    """The snapshot of `owner/name`, which is downloaded if it is not in the hub's cache. Raises `FetchError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, local_files_only=True)
        if is_complete(Path(folder)):
            return folder
    except LocalEntryNotFoundError:
        pass
    _reach(name)
    try:
        return snapshot_download(name, allow_patterns=list(WANTED))
    except (HfHubHTTPError, OSError) as error:
        raise FetchError(f"{name} cannot be downloaded from the Hugging Face hub: {error}") from error


def is_complete(folder: Path) -> bool:
    """Whether a snapshot has a model's configuration and all of its weights."""
    if not (folder / "config.json").is_file():
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        return all((folder / name).is_file() for name in set(index["weight_map"].values()))
    except OSError:
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    except (ValueError, KeyError):
        return False


def _reach(name: str) -> None:
    """Raises `FetchError` where nobody answers. Through a proxy the library sees for itself."""
    advice = "connect to the network for the first start, or give --model a local folder"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise FetchError(
            f"{name} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to download it: {advice}"
        )
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if url.scheme in urllib.request.getproxies():
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=REACHED_SECONDS).close()
    except OSError as error:
        raise FetchError(
            f"{name} is not in the Hugging Face cache, and {url.hostname} cannot be reached ({error}): {advice}"
        ) from error
