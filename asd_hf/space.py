"""A Gradio Space that shows a student at work: three files, of which people may want to change one."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution

from huggingface_hub import SpaceCardData

from . import __version__
from .errors import SECRET

GRADIO = "6.31.0"
PYTHON = "3.11"  # the Hub's own choice is older than this package takes
APP = '''\
"""A demo of {model_id}: `python app.py` runs it anywhere."""

from asd_hf.demo import build_app, launch

launch(build_app({arguments}))
'''
README = """\
---
{metadata}
---

{text}, on your own images, by `asd_hf.demo`.
"""


def space_files(
    model_id: str,
    teacher_id: str | None = None,
    license: dict[str, str] | None = None,
    requirement: str | None = None,
) -> dict[str, bytes]:
    """The files of the Space by their paths.

    Args:
        model_id, teacher_id: names on the Hub.
        license: metadata of the model's licence, if it has one.
        requirement: how pip gets this package with its extra `demo`; by default this version from an index.
    """
    ids = [model_id] if teacher_id is None else [model_id, teacher_id]
    metadata = SpaceCardData(
        title=f"{model_id.split('/')[-1]} demo",
        emoji="🔎",
        colorFrom="blue",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        models=ids,
        tags=["object-detection", "asd_hf"],
        **license or {},
    )
    links = [f"[{name}](https://huggingface.co/{name})" for name in ids]
    text = f"{links[0]} at work" + (f", and its teacher {links[1]} beside it" if teacher_id else "")
    texts = {
        "README.md": README.format(metadata=metadata.to_yaml(), text=text),
        "app.py": APP.format(model_id=model_id, arguments=", teacher=".join(map(json.dumps, ids))),
        "requirements.txt": f"{requirement or f'asd-hf[demo]=={__version__}'}\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def installed_requirement() -> str | None:
    """How pip gets this package elsewhere as it was got here; None where it came from a folder of this machine, or
    from an address with credentials, which a Space would show to everyone."""
    try:
        origin = json.loads(distribution("asd-hf").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a folder on PYTHONPATH
        return None
    url = origin.get("url", "")
    if url.startswith("file:") or SECRET.search(url):
        return None
    if "vcs_info" in origin:
        return f"asd-hf[demo] @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"asd-hf[demo] @ {url}" if url else f"asd-hf[demo]=={__version__}"
