"""Every command of README.md and docs/ is what it says.

Bash reads the blocks, with functions in place of the programs, so that its variables, loops and quotes count. Commands
of the README's example (r18.yaml, data/coco, outputs/r18) are run, in their order, on small stand-ins; of all others,
whose trainings take hours, the options, the configuration and its overrides are read as the command would read them.
"""

import re
import shutil
import subprocess
from pathlib import Path

import av
import pytest
import yaml

from asd_hf.commands import COMMANDS, run
from asd_hf.compare.plan import choose_variants, read_variants
from asd_hf.config import load_config, read_sections
from asd_hf.data import make_shapes
from asd_hf.loading import PACKAGED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("asd-hf", "accelerate", "python", "make", "pip", "hf", "PYTHONPATH")
PRELUDE = "\n".join(
    f"{program}() {{ printf '%s\\x1f' {program} \"$@\"; [ \"$1\" = - ] && cat; printf '\\x1e'; }}"
    for program in PROGRAMS
)
OWN_TEST = "adding_a_method"  # test_adding_a_method.py trains its example
EXAMPLE = re.compile(r"r18\.yaml|outputs/r18(_cached|_shared)?|data/coco|data/r18_teacher")
ELSEWHERE = {"demo", "fp16", "user/r18"}  # need a browser, minutes, the Hub: they have tests of their own


def documented_commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    script = "\n".join([PRELUDE, *blocks])
    done = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert done.returncode == 0 and not done.stderr, f"{page.name}: {done.stderr}"
    return [call.split("\x1f")[:-1] or [call] for call in done.stdout.split("\x1e")[:-1]]


def of_this_package(call: list[str]) -> list[str] | None:
    """The command and arguments that a call comes down to, or None."""
    program, *arguments = call
    if program == "asd-hf":
        return arguments
    scripts = [argument for argument in arguments if argument.startswith("scripts/")]
    if program in ("accelerate", "python") and scripts:
        assert (ROOT / scripts[0]).is_file()
        return [Path(scripts[0]).stem.replace("_", "-"), *arguments[arguments.index(scripts[0]) + 1 :]]
    return None


def is_of_the_example(arguments: list[str]) -> bool:
    named = [a for a in arguments if a.startswith(("configs/", "outputs/")) or EXAMPLE.fullmatch(a)]
    elsewhere = not ELSEWHERE.isdisjoint(arguments) and "--dry-run" not in arguments
    return bool(named) and all(map(EXAMPLE.fullmatch, named)) and not elsewhere


CALLS = {page: documented_commands(page) for page in PAGES}
OURS = [(page, ours) for page, calls in CALLS.items() for call in calls if (ours := of_this_package(call))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_programs_find_what_they_are_given(page):
    for program, *arguments in CALLS[page]:
        for argument in arguments:
            if argument.startswith(("tests/", "configs/", "docs/", "scripts/")) and program != "asd-hf":
                assert (ROOT / argument).exists(), argument
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def names(arguments: list[str], option: str) -> list[str]:
    """The values that follow an option."""
    return [value for known, value in zip(arguments, arguments[1:], strict=False) if known == option]


@pytest.mark.parametrize(
    "page, arguments",
    [(page, arguments) for page, arguments in OURS if not is_of_the_example(arguments) and page.stem != OWN_TEST],
    ids=lambda x: x.name if isinstance(x, Path) else " ".join(x)[:60],
)
def test_a_command_is_understood(page, arguments, capsys):
    command, *rest = arguments
    assert command in COMMANDS
    what = rest[:1] if command in ("benchmark", "selftest") else []
    with pytest.raises(SystemExit):
        run(command, [*what, "--help"])
    text = capsys.readouterr().out
    unknown = [a for a in rest if a.startswith("--") and not re.search(rf"{a}\b", text)]
    assert not unknown
    written = {file for _, other in OURS for file in names(other, "--output")}
    for file in names(rest, "--config"):
        if file in written:
            continue
        overrides = [a for a in rest if re.match(r"(model|data|method|training)\.[\w.]+=", a)]
        load_config(ROOT / file, overrides)
        known = {}
        for variants in names(rest, "--variants"):
            known = read_variants(ROOT / variants)
        for methods in names(rest, "--methods"):
            choose_variants(known, methods.split(","))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The README's example, small: teacher, COCO folder and configuration, under the names that it gives them."""
    root = tmp_path_factory.mktemp("example")
    (text,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", PAGES[0].read_text(), re.DOTALL) if "outputs/r18" in block
    )
    values = yaml.safe_load(text)
    data, training = values["data"], values["training"]
    shutil.copytree(PACKAGED["shapes"], root / values["model"]["teacher"])
    folder = root / data["source"]
    make_shapes(folder, num_train=8, num_val=8, image_size=64)
    for made, wanted in (("train", data["train_split"]), ("val", data["eval_split"])):
        (folder / made).rename(folder / wanted)
        (folder / f"annotations/instances_{made}.json").rename(folder / f"annotations/instances_{wanted}.json")
    shutil.copytree(folder / data["eval_split"], root / "photos")
    with av.open(root / "clip.mp4", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=5, width=64, height=64)
        clip.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        clip.mux(stream.encode())
    values["model"]["student"]["pretrained_backbone"] = False
    data |= {"train_sizes": [64], "eval_size": 64, "max_size": 96}
    training |= {"use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2}
    training |= {"save_strategy": "no", "report_to": "none"}
    (root / "r18.yaml").write_text(yaml.safe_dump(values))
    assert read_sections(root / "r18.yaml").keys() == {"model", "data", "method", "training"}
    return root


def test_the_commands_of_the_example_run(example, monkeypatch):
    monkeypatch.chdir(example)
    calls = [(page, arguments) for page, arguments in OURS if is_of_the_example(arguments)]
    expected = {"train", "evaluate", "doctor", "cache", "shard", "check-data", "report", "predict", "export", "push"}
    assert expected == {arguments[0] for _, arguments in calls}
    seen = set()
    for page, (command, *arguments) in calls:
        if (command, *arguments) not in seen:
            assert run(command, arguments) == 0, f"{page.name}: asd-hf {command} {' '.join(arguments)}"
        seen.add((command, *arguments))
    assert (example / "metrics.json").is_file() and (example / "outputs/r18/model.safetensors").is_file()
