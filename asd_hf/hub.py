"""What concerns the Hub alone: patience with it, its names, and what of a configuration may be public."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .errors import SECRET, UserError
from .loading import PACKAGED

T = TypeVar("T")

HINTS = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: make one that may, at https://huggingface.co/settings/tokens",
    412: "someone else changed the repository meanwhile: start the same command again",
}


def call_hub(call: Callable[[], T], advice: str, attempts: int = 4, wait: float = 2.0) -> T:
    """Calls `call`, again after a pause when the Hub is down, busy or out of reach.

    huggingface_hub repeats the upload of files by itself, but neither the creation of a repository nor the commit: a
    finished training must not end on one lost answer.

    Args:
        call: one that does no harm when it is done twice, since it is the answer that may be lost.
        advice: what the user can do when it failed for good; the end of the message.
        attempts: how often to call at most.
        wait: seconds before the second call, doubled each time.

    Raises:
        UserError: refused by the Hub, or failed at the last attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except UserError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            status = _status(error)
            if attempt == attempts or (status < 500 and status != 429):
                parts = [" ".join(str(error).split()), HINTS.get(status), advice]
                raise UserError(f"the Hub: {'; '.join(filter(None, parts))}") from error
            time.sleep(wait * 2 ** (attempt - 1))


def _status(error: BaseException) -> int:
    """As HTTP has it: that of the answer behind `error`, or 503 where there was none."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if error.__cause__ is not None:  # the upload of a large file wraps what went wrong
        return _status(error.__cause__)
    return 400 if isinstance(error, ValueError | OfflineModeIsEnabled) else 503


def is_hub_id(name: str) -> bool:
    """Whether `name` is an `owner/name` of the Hub: no existing folder, and nothing that the Hub would refuse."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def is_at_hand(name: str) -> bool:
    """Whether the weights of a model are on this machine: packaged, in a folder, or fetched from the Hub before."""
    files = ("model.safetensors", "model.safetensors.index.json")
    fetched = is_hub_id(name) and any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    return fetched or name in PACKAGED or Path(name).is_dir()


def public_config(config_yaml: str) -> str:
    """The configuration with the last part of each local path in its place: the author's folders are private.

    A path is a string that begins with `/`, `~` or `.`, or names what exists.
    """
    return yaml.safe_dump(without_folders(yaml.safe_load(config_yaml)), sort_keys=False, width=110)


def without_folders(value: Any) -> Any:
    """`value` with the last part of each local path in its place."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or os.path.exists(value)):
        return Path(value).name or value  # `/` and `.` have no name, and tell nothing
    return value


def secret_of(value: Any, key: str) -> str | None:
    """The key of the first text within `value` that holds a token or the credentials of an address, None if none."""
    if isinstance(value, dict):
        found = (secret_of(item, f"{key}.{name}") for name, item in value.items())
    elif isinstance(value, list):
        found = (secret_of(item, f"{key}[{index}]") for index, item in enumerate(value))
    else:
        return key if isinstance(value, str) and SECRET.search(value) else None
    return next(filter(None, found), None)
