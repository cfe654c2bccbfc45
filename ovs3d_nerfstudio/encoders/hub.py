"""Whether a hub of weights can be asked, known within seconds. Its own client retries an unreachable hub for half a minute, for
each file of each encoder."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE = 3.0
"""Seconds in which a hub that can be reached takes a connection."""


@cache
def reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection. Where none does, its client is told to be offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = next(
        (os.environ[name] for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)),
        "",
    )
    place = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (place.hostname, place.port or (443 if place.scheme == "https" else 80)), PATIENCE
        ).close()
    except (OSError, ValueError, TypeError):
        # Read anew at every call; what is cached is found all the same.
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def cached(model: str, *files: str) -> bool:
    """Whether one of the files of a model of the hub lies on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(model, file) for file in files]
    except HFValidationError:  # no name that a model of the hub can have, which its client says better
        return True
    return any(isinstance(path, str) and Path(path).is_file() for path in found)
