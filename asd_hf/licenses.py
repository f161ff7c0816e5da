"""Whether a student may be shared: what the licences say of the models that taught it or gave it weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from .errors import UserError
from .hub import is_hub_id, without_folders
from .loading import PACKAGED

# Of the Hub's list: they allow changed versions and any use, some on the condition that these keep the licence.
FREE = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "ecl-2.0", "epl-1.0", "epl-2.0"),
    *("etalab-2.0", "eupl-1.1", "eupl-1.2", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "osl-3.0"),
    *("pddl", "postgresql", "unlicense", "wtfpl", "zlib"),
}
_RESEARCH_ALONE = ("apple-amlr", "deepfloyd-if-license")  # and whatever has "research" in its name
TAUGHT, GAVE_WEIGHTS = "which taught the student", "whose weights it began with"


class License(NamedTuple):
    """As a card states it.

    Attributes:
        name: an identifier of the Hub's list, or what a licence beyond the list is called ("other" if it has no name).
        listed: whether it is on that list.
    """

    name: str
    listed: bool = True

    @property
    def forbids(self) -> str | None:
        """What it does not allow; None if nothing is known that it forbids."""
        words = set(re.split(r"[^a-z0-9]+", self.name.lower()))
        if "nd" in words:
            return "forbids derived works"
        if words & {"nc", "noncommercial"} or {"non", "commercial"} <= words:
            return "forbids commercial use"
        if "research" in words or self.name in _RESEARCH_ALONE:
            return "allows research alone"
        return None if self.listed else "is none of the Hub's list: its terms are not known here"

    @property
    def metadata(self) -> dict[str, str]:
        """What a card's metadata has for it."""
        return {"license": self.name} if self.listed else {"license": "other", "license_name": self.name}


class Origin(NamedTuple):
    """A model that a student learnt from.

    Attributes:
        model: Hub id, folder, name among `loading.PACKAGED`, or timm's name of a backbone.
        roles: `TAUGHT`, `GAVE_WEIGHTS` or both.
        license: None where the card states none, or is out of reach.
    """

    model: str
    roles: tuple[str, ...]
    license: License | None

    @property
    def shown(self) -> str:
        return f"{without_folders(self.model)}, {' and '.join(self.roles)},"


def read_license(model: str) -> License | None:
    """The licence that a model's card states: in its folder, on the Hub, or, without a network, in the Hub's cache."""
    folder = Path(PACKAGED.get(model, model))
    if folder.is_dir():
        if not (card := folder / "README.md").is_file():
            return None
    elif is_hub_id(model):
        card = model
    else:
        return License(name) if timm.is_model(model) and (name := timm.get_pretrained_cfg(model).license) else None
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (HTTPError, OSError, ValueError, yaml.YAMLError):
        return None
    stated = data.license if isinstance(data.license, list) else [data.license]
    licenses = [_license(str(name), data.license_name) for name in stated if name and name != "unknown"]
    return max(licenses, key=lambda license: license.forbids is not None, default=None)  # of several, the strictest


def _license(name: str, own: str | None) -> License:
    if name != "other":
        return License(name)
    own = str(own or name)
    return License(own.lower()) if own.lower() in FREE else License(own, listed=False)


def check_licenses(origins: Sequence[Origin], allowed: Collection[str] = ()) -> list[str]:
    """What is to be said of the licences of all `origins` before their student is shared.

    Args:
        allowed: names of licences that the user has read and may share under.

    Raises:
        UserError: a licence forbids derived works or some uses, or is unknown to the Hub, and is not among `allowed`;
            or `allowed` has one that no origin has.
    """
    names = {origin.license.name for origin in origins if origin.license is not None}
    for name in allowed:
        if name not in names:
            found = ", ".join(sorted(names)) or "none"
            raise UserError(f"--allow-license {name}: no model that the student comes from has it; licences: {found}")
    remarks = []
    for origin in origins:
        if origin.license is None:
            remarks.append(f"{origin.shown} states no licence: see whether you may share what came of it")
            continue
        name, forbids = origin.license.name, origin.license.forbids
        if forbids and name not in allowed:
            raise UserError(
                f"{origin.shown} is under {name}, which {forbids}: if you may share its student, push with "
                f"--allow-license {shlex.quote(name)}"
            )
        if forbids:
            remarks.append(f"{origin.shown} is under {name}, which {forbids}: the card says so")
        elif name not in FREE:
            remarks.append(f"{origin.shown} is under {name}: see whether its terms let you share a student of it")
    return remarks


def choose_license(given: str | None, origins: Sequence[Origin]) -> tuple[License | None, str]:
    """The student's licence, and what the card says of it.

    Weights that began as those of one licence stay under it unless `given` says otherwise.
    """
    began = {origin.license for origin in origins if GAVE_WEIGHTS in origin.roles}
    if given is not None:
        chosen, text = License(given), f"The weights are under {given}."
    elif len(began) == 1 and None not in began:
        (chosen,) = began
        text = f"The weights are under {chosen.name}, as those are that they began with."
    else:
        chosen, text = None, "No licence is stated for these weights."
    return chosen, " ".join([text, *(f"{origin.shown} {_under(origin.license)}." for origin in origins)])


def _under(license: License | None) -> str:
    if license is None:
        return "states no licence"
    return f"is under {license.name}" + (f", which {license.forbids}" if license.forbids else "")
