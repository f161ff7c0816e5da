"""A Gradio Space that shows a student at work: three files, of which people may want to change one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from huggingface_hub import SpaceCardData

from . import __version__

APP = '''\
"""A demo of {model_id}: `python app.py` runs it anywhere."""

from asd_hf.demo import build_app

app = build_app(model="{model_id}")  # with teacher="..." both answer side by side

if __name__ == "__main__":
    app.launch()
'''
REQUIREMENTS = """\
# Where no index has this version, the address of a wheel or a Git repository takes the place of the version.
asd-hf[demo]=={version}
"""
README = """\
---
{metadata}
---

[{model_id}](https://huggingface.co/{model_id}) at work on your own images, by `asd_hf.demo`.
"""


def space_files(model_id: str, license: dict[str, str]) -> dict[str, bytes]:
    """The files of the Space by their paths.

    Args:
        model_id: the student's name on the Hub.
        license: metadata of its licence; empty if there is none.
    """
    metadata = SpaceCardData(
        title=model_id.split("/")[-1],
        sdk="gradio",
        sdk_version=_gradio(),
        app_file="app.py",
        models=[model_id],
        tags=["object-detection", "asd_hf"],
        **license,
    )
    texts = {
        "README.md": README.format(metadata=metadata.to_yaml(), model_id=model_id),
        "app.py": APP.format(model_id=model_id),
        "requirements.txt": REQUIREMENTS.format(version=__version__),
    }
    return {name: text.encode() for name, text in texts.items()}


def _gradio() -> str | None:
    """The version that is installed here; without one the Hub takes its own."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None
