"""A finished run on its way to the Hub: the files, the licences, one commit, and all that can go wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from transformers import AutoModelForObjectDetection

from asd_hf import __version__, commands
from asd_hf.compare.gain import gain
from asd_hf.config import build_config
from asd_hf.errors import UserError
from asd_hf.evaluation import STATS
from asd_hf.hub import public_config
from asd_hf.licenses import FREE, License, Origin, check_licenses, choose_license, read_license
from asd_hf.pace import seconds_of_steps
from asd_hf.sharing import origins
from tests import tiny
from tests.hub_server import CUT, LOST, TOKEN, HubServer, Repository
from tests.test_render import study, write

STUDENT = {"README.md", "asd_hf.yaml", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
NAME = "user/student"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that this process talks to, without waiting when it fails."""
    with HubServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {"ENDPOINT": server.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        constants |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in constants.items():  # read from the environment at import
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("asd_hf.hub.time.sleep", lambda seconds: None)
        yield server


def configuration(folder: Path, **model) -> dict:
    return {
        "model": {"teacher": "shapes", "student": {"base": "teacher"}} | model,
        "data": {"source": str(folder / "private" / "animals"), "eval_split": "val", "train_split": "train"},
        "method": {"name": "asd"},
        "training": {"output_dir": str(folder / "private" / "out"), "learning_rate": 1e-3, "use_cpu": True},
    }


def write_run(folder: Path, detector: Path, **model) -> Path:
    """A finished run as `asd-hf train` leaves it (tests/test_commands.py has a real one)."""
    run = shutil.copytree(detector, folder / "run")
    (run / "asd_hf.yaml").write_text(build_config(configuration(folder, **model)).to_yaml())
    numbers = {name: 0.01 * (index + 1) for index, name in enumerate(STATS)}
    numbers |= {"parameters": 5e4, "ms_per_image": 9.0, "per_class": dict.fromkeys(tiny.CLASSES, 0.1)}
    protocol = {"source": str(folder / "private" / "animals"), "split": "val", "num_images": 7, "fingerprint": "f"}
    protocol |= {"resolution": {"shortest_edge": 64, "longest_edge": 96}, "max_detections": 100, "backend": "b 1"}
    training = {"ranks": 1, "steps": 400, "images": 800, "train_images": 80}
    training |= {"train_runtime": 61.0, "teacher_predictions": None}
    metrics = {"student": numbers, "teacher": numbers | {"AP": 0.5}, "protocol": protocol, "training": training}
    metrics["environment"] = {"device": "a GPU", "versions": {}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    tiny.deformable_detr().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, detector) -> Path:
    return write_run(tmp_path, detector)


def export(run: Path) -> None:
    (run / "onnx").mkdir()
    (run / "onnx" / "model.onnx").write_bytes(b"graph" * 9)
    (run / "onnx" / "parity.json").write_text("{}")
    (run / "onnx" / "notes.txt").write_text("private")


def push(*arguments, code: int = 0) -> None:
    assert commands.run("push", list(map(str, arguments))) == code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_files_of_the_dry_run(hub, run, tmp_path, capsys):
    export(run)
    (run / "onnx" / "model.onnx.data").write_bytes(b"weights beyond 2 GB")
    (run / "_method.safetensors").write_bytes(b"private")
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "optimizer.pt").write_bytes(b"pickle")
    dry = tmp_path / "dry"
    push(run, "--repo", NAME, "--dry-run", dry)
    shown = capsys.readouterr().out
    assert not hub.requests and "the same command without --dry-run" in shown
    files = contents(dry)
    assert files.keys() == STUDENT | {"onnx/model.onnx", "onnx/model.onnx.data", "onnx/parity.json"}
    for name, content in files.items():
        assert re.search(rf"  {re.escape(name)} +{len(content):,} bytes\n", shown)
        assert str(tmp_path).encode() not in content and b"private" not in content, name
    push(run, "--repo", NAME)
    out = capsys.readouterr().out
    repository = hub.repositories[NAME]
    assert repository.files == files and len(repository.commits) == 1 and not repository.private
    assert repository.lfs == {"model.safetensors", "onnx/model.onnx"}
    pushed, following = out.splitlines()[-2:]
    assert pushed == f"pushed: {hub.endpoint}/{NAME} (commit {repository.sha[:7]})"
    assert following == f"next: asd-hf evaluate --model {NAME} --data animals --split val --batch-size 8"
    assert TOKEN not in out + shown + "".join(map(str, files.values()))
    loaded = AutoModelForObjectDetection.from_pretrained(dry)
    assert loaded.num_parameters() == AutoModelForObjectDetection.from_pretrained(run).num_parameters()


def test_a_folder_whose_name_the_hub_would_refuse_asks_for_another(hub, run, tmp_path, capsys):
    named = run.rename(tmp_path / "my run")
    for options in ([], ["--dry-run", tmp_path / "dry"]):
        push(named, *options, code=2)
        assert (
            "without --repo the folder gives the name, and 'my run' is no name on the Hub" in capsys.readouterr().err
        )
    assert not hub.requests and not (tmp_path / "dry").exists()


def test_the_card_of_a_run(hub, run, tmp_path):
    push(run, "--repo", NAME, "--license", "mit", "--dataset", "org/animals", "--dry-run", tmp_path / "dry")
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name: pytest.approx(0.01 * (index + 1)) for index, name in enumerate(STATS)
    }
    assert card.data.license == "mit" and card.data.datasets == ["org/animals"] and card.data.base_model is None
    assert "800 images in all (10.0 times the 80 there are) on a GPU, which took 0:01:01" in card.text
    assert f'model="{NAME}"' in card.text and "`asd`, *" in card.text and "@" in card.text.split("## Citation")[1]
    assert f"asd-hf evaluate --model {NAME} --data org/animals --split val --batch-size 8\n" in card.text
    results = yaml.safe_load((tmp_path / "dry" / ".eval_results" / "animals.yaml").read_text())
    values = {entry.task_id: entry.value for entry in parse_eval_result_entries(results)}
    assert values == {name: index + 1 for index, name in enumerate(STATS)}


def test_the_name_of_a_run_is_made_whole_by_the_hub(hub, run, tmp_path, capsys):
    push(run, "--dry-run", tmp_path / "dry")
    assert "note: the card calls the student run: --repo OWNER/run would" in capsys.readouterr().out
    push(run)
    assert 'model="user/run"' in hub.repositories["user/run"].files["README.md"].decode()
    file = run / "asd_hf.yaml"
    file.write_text(file.read_text().replace("training:\n", "training:\n  hub_model_id: user/other\n"))
    push(run)
    assert 'model="user/other"' in hub.repositories["user/other"].files["README.md"].decode()


def test_what_has_not_changed_is_no_second_commit(hub, run, capsys):
    push(run, "--repo", NAME)
    push(run, "--repo", NAME)
    assert f"nothing has changed: {hub.endpoint}/{NAME} is at commit" in capsys.readouterr().out
    assert len(hub.repositories[NAME].commits) == 1
    push(run, "--repo", NAME, "--license", "mit")
    assert hub.repositories[NAME].commits[1]["paths"] == ["README.md"]


def test_what_an_earlier_student_left_is_removed_with_the_commit(hub, run):
    export(run)
    push(run, "--repo", NAME)
    repository = hub.repositories[NAME]
    theirs = {"notes.md": b"by hand", ".eval_results/other.yaml": b"by others", ".gitattributes": b"x"}
    repository.files |= theirs | {"model-00001-of-00002.safetensors": b"old", "ema/config.json": b"old"}
    shutil.rmtree(run / "onnx")
    push(run, "--repo", NAME)
    assert repository.files.keys() == STUDENT | theirs.keys()
    assert set(repository.commits[1]["paths"]) == {
        *("README.md", "onnx/model.onnx", "onnx/parity.json", "model-00001-of-00002.safetensors", "ema/config.json")
    }


def test_large_files_come_by_lfs(hub, run):
    hub.lfs_threshold = 1000
    push(run, "--repo", NAME)
    repository = hub.repositories[NAME]
    large = {name for name, content in repository.files.items() if len(content) > 1000}
    assert repository.lfs == large and "README.md" in large and "preprocessor_config.json" not in large
    assert repository.files["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_sharded_weights_and_the_moving_average_are_shared(hub, run):
    (run / "model.safetensors").unlink()
    AutoModelForObjectDetection.from_config(tiny.deformable_detr().config).save_pretrained(run, max_shard_size="100KB")
    shards = {file.name for file in run.glob("model-*.safetensors")}
    assert len(shards) > 1
    export(run)
    tiny.deformable_detr(1).save_pretrained(run / "ema")
    tiny.processor().save_pretrained(run / "ema")
    push(run, "--repo", NAME)
    ema = {f"ema/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    files = hub.repositories[NAME].files
    onnx = {"onnx/model.onnx", "onnx/parity.json"}
    assert files.keys() == STUDENT - {"model.safetensors"} | {"model.safetensors.index.json"} | shards | ema | onnx
    assert "`ema/` has the moving average" in files["README.md"].decode()


@pytest.mark.parametrize("fault", ["no parity", "older than the student"])
def test_an_export_that_was_not_compared_is_left_out_and_said(run, tmp_path, capsys, fault):
    export(run)
    if fault == "no parity":
        (run / "onnx" / "parity.json").unlink()
    else:
        os.utime(run / "onnx" / "model.onnx", (1, 1))
    push(run, "--dry-run", tmp_path / "dry")
    assert contents(tmp_path / "dry").keys() == STUDENT
    assert f"note: {run}/onnx/model.onnx is left out: " in capsys.readouterr().out


def test_a_space_imports_the_demo_of_the_model(hub, run, tmp_path, capsys):
    dry = tmp_path / "dry"
    push(run, "--repo", NAME, "--license", "mit", "--space", "--dry-run", dry)
    files = contents(tmp_path / "dry_space")
    push(run, "--repo", NAME, "--license", "mit", "--space", "--private")
    assert f"pushed: {hub.endpoint}/spaces/{NAME} " in capsys.readouterr().out
    space = hub.repositories[f"spaces/{NAME}"]
    assert space.files == files and space.sdk == "gradio" and space.private and len(space.commits) == 1
    assert files.keys() == {"README.md", "app.py", "requirements.txt"}
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["models"] == [NAME]
    assert metadata["license"] == "mit"
    assert ast.unparse(ast.parse(files["app.py"]).body[-1]) == f"launch(build_app('{NAME}'))"


def test_the_requirement_of_a_space(run, tmp_path, capsys, monkeypatch):
    """As this package was installed, or as it is given; where the Hub cannot reach it, a note."""

    def requirement(*arguments) -> str:
        shutil.rmtree(tmp_path / "dry_space", ignore_errors=True)
        shutil.rmtree(tmp_path / "dry", ignore_errors=True)
        push(run, "--space", "--dry-run", tmp_path / "dry", *arguments)
        return (tmp_path / "dry_space" / "requirements.txt").read_text()

    installed = tmp_path / "site" / "asd_hf-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: asd-hf\nVersion: 9\n")
    monkeypatch.syspath_prepend(installed.parent)
    release, note = f"asd-hf[demo]=={__version__}\n", "--requirement 'asd-hf[demo] @ ADDRESS'"
    assert requirement() == release and note not in capsys.readouterr().out  # from an index
    vcs = {"vcs": "git", "commit_id": "1a2b"}
    for origin, wanted in (
        ({"url": "https://host/asd_hf.git", "vcs_info": vcs}, "asd-hf[demo] @ git+https://host/asd_hf.git@1a2b\n"),
        ({"url": "https://host/asd_hf.whl", "archive_info": {}}, "asd-hf[demo] @ https://host/asd_hf.whl\n"),
        ({"url": "https://host/asd_hf.whl?sig=1a2b", "archive_info": {}}, release),
        ({"url": "https://me:word@host/asd_hf.git", "vcs_info": vcs}, release),
        ({"url": "file:///home/me/asd_hf.git", "vcs_info": vcs}, release),
        ({"url": "file:///home/me/asd_hf.whl", "archive_info": {}}, release),
        ({"url": "file:///home/me/asd_hf", "dir_info": {"editable": True}}, release),
    ):
        (installed / "direct_url.json").write_text(json.dumps(origin))
        assert requirement() == wanted
        assert (note in capsys.readouterr().out) == (wanted == release)
    assert requirement("--requirement", "asd-hf[demo]>=9") == "asd-hf[demo]>=9\n"
    assert note not in capsys.readouterr().out
    push(run, "--dry-run", tmp_path / "other", "--requirement", "asd-hf[demo]>=9", code=2)
    assert "--requirement says something of --space" in capsys.readouterr().err
    secret = "asd-hf[demo] @ https://me:word@host/asd_hf.whl"
    push(run, "--space", "--dry-run", tmp_path / "other", "--requirement", secret, code=2)
    assert "--requirement holds a password or token" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_dry_run_overwrites_nothing(run, tmp_path, capsys):
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "mine").write_text("kept")
    push(run, "--dry-run", tmp_path / "dry", code=2)
    assert capsys.readouterr().err == f"error: {tmp_path}/dry is not empty: name a new folder\n"
    assert contents(tmp_path / "dry").keys() == {"mine"}


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [503, 429, CUT, LOST])
@pytest.mark.parametrize("request_", ["/repos/create", "/preupload/", "/objects/", "/commit/"])
def test_a_hub_that_fails_once_has_the_files_in_the_end(hub, run, request_, status, capsys):
    hub.failures.append((request_, status))
    push(run, "--repo", NAME)
    repository = hub.repositories[NAME]
    assert not hub.failures and repository.files.keys() == STUDENT and len(repository.commits) == 1
    assert "pushed: " in capsys.readouterr().out


@pytest.mark.parametrize("request_", ["/repos/create", "/objects/", "/commit/"])
@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "hf auth login"), (403, "may not write"), (409, "asd-hf push"), (412, "start the same command again")],
)
def test_a_refusal_is_one_line_that_says_what_to_do(hub, run, request_, status, hint, capsys):
    if (request_, status) == ("/repos/create", 409):
        pytest.skip("that is a repository that is there already")
    hub.failures += [(request_, status)] * 9
    push(run, "--repo", NAME, code=2)
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the Hub: ") and hint in line and f"`asd-hf push {run}` pushes it" in line
    assert "Traceback" not in err and TOKEN not in out + err
    assert NAME not in hub.repositories or not hub.repositories[NAME].files


def test_a_wrong_token_is_not_shown(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "other" * 8)
    push(run, "--repo", NAME, code=2)
    err = capsys.readouterr().err
    assert "401" in err and "hf auth login" in err and "other" not in err and not hub.repositories


def test_a_commit_that_came_between_is_not_built_upon_unseen(hub, run, monkeypatch, capsys):
    push(run, "--repo", NAME)
    repository = hub.repositories[NAME]
    (run / "config.json").write_text((run / "config.json").read_text() + "\n")

    class Racing(list):  # a commit of someone else while the files are sent
        def append(self, request):
            if "/preupload/" in request:
                repository.commits.append({"summary": "by hand", "paths": []})

    hub.requests = Racing()
    push(run, "--repo", NAME, code=2)
    assert "someone else changed the repository meanwhile: start the same command again" in capsys.readouterr().err
    assert [commit["summary"] for commit in repository.commits[1:]] == ["by hand"]


def test_private_means_private(hub, run, capsys):
    push(run, "--repo", NAME, "--private")
    assert hub.repositories[NAME].private
    push(run, "--repo", NAME, "--private")
    hub.repositories["user/public"] = Repository()
    push(run, "--repo", "user/public", "--private", code=2)
    assert "user/public is there already, and public: make it private at" in capsys.readouterr().err
    assert not hub.repositories["user/public"].files


def test_a_name_that_the_hub_would_refuse(run, capsys):
    for flag, name in (("--repo", "a/b/c"), ("--repo", "user/a b"), ("--dataset", "coco")):
        push(run, flag, name, code=2)
        assert capsys.readouterr().err.startswith(f"error: {flag} {name!r} is ")


# -- what is no finished run ------------------------------------------------------------------------------------------


def cut_weights(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_weights(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "run folder {run} does not exist"),
        (lambda run: (run / "metrics.json").unlink(), "{run} is no finished run: it has no metrics.json"),
        (lambda run: (run / "asd_hf.yaml").unlink(), "{run} is no finished run: it has no asd_hf.yaml"),
        (lambda run: (run / "metrics.json").write_text('{"AP": 1}'), "{run} is no finished run: metrics.json or"),
        (lambda run: (run / "metrics.json").write_text("{"), "{run} is no finished run: metrics.json or"),
        (lambda run: (run / "asd_hf.yaml").write_text("model: {}"), "{run} is no finished run: metrics.json or"),
        (lambda run: (run / "asd_hf.yaml").write_text("{"), "{run}/asd_hf.yaml is not YAML"),
        (lambda run: (run / "config.json").write_text("{}"), "run folder: {run} holds no model"),
        (lambda run: (run / "model.safetensors").unlink(), "run folder: {run} cannot be loaded as a detector"),
        (lambda run: (run / "preprocessor_config.json").unlink(), "run folder: {run} has no image processor"),
        (cut_weights, "run folder: {run} cannot be loaded as a detector"),
        (lose_weights, "run folder: {run} lacks 2 weights"),
    ],
)
def test_what_is_no_finished_run_is_one_line(run, tmp_path, capsys, damage, message):
    damage(run)
    push(run, "--dry-run", tmp_path / "dry", code=2)
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message.format(run=run)}") and "Traceback" not in err
    assert not (tmp_path / "dry").exists()


def test_a_run_whose_configuration_holds_a_password(run, tmp_path, capsys):
    file = run / "asd_hf.yaml"
    file.write_text(file.read_text().replace(f"source: {tmp_path}", "source: https://me:word@host"))
    push(run, "--dry-run", tmp_path / "dry", code=2)
    assert capsys.readouterr().err == f"error: {file}: data.source holds a token or password: remove it\n"


# -- licences ---------------------------------------------------------------------------------------------------------


def write_card(folder: Path, **metadata) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A teacher\n")
    return str(folder)


@pytest.mark.parametrize(
    ("metadata", "name", "forbids"),
    [
        ({"license": "cc-by-nd-4.0"}, "cc-by-nd-4.0", "derived works"),
        ({"license": "cc-by-nc-nd-4.0"}, "cc-by-nc-nd-4.0", "derived works"),
        ({"license": "cc-by-nc-sa-4.0"}, "cc-by-nc-sa-4.0", "commercial use"),
        ({"license": "fair-noncommercial-research-license"}, "fair-noncommercial-research-license", "commercial use"),
        ({"license": ["mit", "cc-by-nd-4.0"]}, "cc-by-nd-4.0", "derived works"),
        ({"license": "intel-research"}, "intel-research", "research alone"),
        ({"license": "apple-amlr"}, "apple-amlr", "research alone"),
        ({"license": "other"}, "other", "not known"),
        ({"license": "other", "license_name": "Our Terms"}, "Our Terms", "not known"),
    ],
)
def test_a_teacher_whose_licence_forbids_something_is_refused_until_it_is_named(tmp_path, metadata, name, forbids):
    model = write_card(tmp_path / "teacher", **metadata)
    came_from = origins({"teacher": model, "student": {"copy_weights": False}})
    with pytest.raises(UserError) as caught:
        check_licenses(came_from)
    message = str(caught.value)
    assert message.startswith(f"teacher, which taught the student, is under {name}, which ") and forbids in message
    assert re.search(rf"--allow-license '?{re.escape(name)}'?$", message) and str(tmp_path) not in message
    (remark,) = check_licenses(came_from, [name])
    assert name in remark
    with pytest.raises(UserError, match=f"--allow-license mit: no model .* has it; licences: {re.escape(name)}"):
        check_licenses(came_from, ["mit"])


@pytest.mark.parametrize(
    ("metadata", "license", "remark"),
    [
        ({"license": "apache-2.0"}, License("apache-2.0"), None),
        ({"license": "cc-by-sa-4.0"}, License("cc-by-sa-4.0"), None),
        ({"license": "other", "license_name": "MIT"}, License("mit"), None),
        ({"license": "llama2"}, License("llama2"), "see whether its terms"),
        ({"license": "unknown"}, None, "states no licence"),
        ({"license": ["mit", "bsd"]}, License("mit"), None),
        ({"tags": ["x"]}, None, "states no licence"),
    ],
)
def test_a_licence_that_forbids_nothing_known_passes(tmp_path, metadata, license, remark):
    model = write_card(tmp_path / "teacher", **metadata)
    assert read_license(model) == license
    remarks = check_licenses(origins({"teacher": model, "student": {}}))
    assert not remarks if remark is None else remark in remarks[0]


def test_a_model_without_a_card_or_with_a_broken_one_states_no_licence(tmp_path):
    assert read_license(str(tmp_path)) is None and read_license("gone/away/x") is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_license(str(tmp_path)) is None
    assert read_license("shapes") == License("apache-2.0") and read_license("resnet18") == License("apache-2.0")
    assert all(License(name).forbids is None for name in FREE)


def test_a_licence_comes_from_the_hub_and_then_from_its_cache(hub):
    hub.repositories["org/big"] = Repository(files={"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    assert read_license("org/big") == License("cc-by-nc-4.0")
    assert read_license("org/absent") is None
    hub.__exit__()
    assert read_license("org/big") == License("cc-by-nc-4.0") and read_license("org/other") is None


def test_all_that_a_student_came_from(tmp_path):
    start = write_card(tmp_path / "start", license="mit")
    big = write_card(tmp_path / "big", license="apache-2.0")
    assert origins({"teacher": "ema", "student": start}) == [
        Origin(start, ("whose weights it began with",), License("mit"))
    ]
    student = {"base": "teacher", "copy_weights": True, "backbone": "resnet18", "pretrained_backbone": True}
    both = ("which taught the student", "whose weights it began with")
    assert origins({"teacher": big, "student": student}) == [
        Origin(big, both, License("apache-2.0")),
        Origin("resnet18", both[1:], License("apache-2.0")),
    ]
    assert origins({"teacher": None, "student": {"backbone": "resnet18", "checkpoint": None}}) == []


def test_first_weights_give_their_licence_to_the_student():
    taught, began = ("which taught the student",), ("whose weights it began with",)
    teacher, start = Origin("org/big", taught, License("mit")), Origin("org/start", began, License("apache-2.0"))
    assert choose_license(None, [teacher])[0] is None
    license, text = choose_license(None, [teacher, start])
    assert license == License("apache-2.0") and "as those are that they began with" in text
    assert "org/big, which taught the student, is under mit." in text
    assert choose_license("bsd", [teacher, start])[0] == License("bsd")
    assert choose_license(None, [start, start._replace(license=License("mit"))])[0] is None
    own = License("Our Terms", listed=False)
    assert choose_license(None, [start._replace(license=own)])[0].metadata == {
        "license": "other",
        "license_name": "Our Terms",
    }


def test_a_push_asks_for_the_licence_first(hub, tmp_path, detector, capsys):
    teacher = write_card(tmp_path / "private" / "big", license="cc-by-nc-4.0")
    run = write_run(tmp_path, detector, teacher=teacher, student={"base": "teacher", "copy_weights": True})
    push(run, "--repo", NAME, code=2)
    err = capsys.readouterr().err
    assert "big, which taught the student and whose weights it began with, is under cc-by-nc-4.0" in err
    assert not hub.requests
    push(run, "--repo", NAME, "--allow-license", "cc-by-nc-4.0")
    card = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and "which forbids commercial use." in card.text
    push(run, "--repo", NAME, "--allow-license", "cc-by-nc-4.0", "--license", "cc-by-nc-sa-4.0")
    assert b"license: cc-by-nc-sa-4.0\n" in hub.repositories[NAME].files["README.md"]


def test_the_configuration_may_name_the_licence(run, tmp_path):
    file = run / "asd_hf.yaml"
    file.write_text(file.read_text().replace("training:\n", "training:\n  hub_license: bsd-3-clause\n"))
    push(run, "--dry-run", tmp_path / "dry")
    assert ModelCard.load(tmp_path / "dry" / "README.md").data.license == "bsd-3-clause"
    push(run, "--license", "mit", "--dry-run", tmp_path / "other")
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license == "mit"


# -- what the method is worth -----------------------------------------------------------------------------------------


def records(folder: Path, run: Path, **changes) -> Path:
    config = yaml.safe_load(public_config((run / "asd_hf.yaml").read_text()))
    config["training"] |= {"seed": 7, "save_steps": 3, "weight_decay": 1e-4}  # of no consequence, or the default
    runs = study({"asd": 0.34, "none": 0.3, "fgd": 0.31})
    for record in runs:
        record["config"] = config if record["method"] == "asd" else config | {"method": {"name": record["method"]}}
        record |= changes
    return write(folder, runs)


def test_the_card_has_the_gain_that_a_comparison_found(run, tmp_path):
    push(run, "--compare", records(tmp_path / "compared", run), "--dry-run", tmp_path / "dry")
    text = (tmp_path / "dry" / "README.md").read_text()
    assert "`asd` and `none` alike on the setting `easy` (3 seeds, 1400 images): **+4.0 AP**, 95 % interval [+" in text
    assert "] over seeds and images. Verdict: better." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_fingerprint": "g"}, "easy/asd, the nearest, has other evaluation images$"),
        ({"steps": 7}, "easy/asd, the nearest, has other training steps$"),
        ({"config": {}}, "has other model, data, method, training.learning_rate"),
    ],
)
def test_records_of_another_run_have_no_gain_for_it(run, tmp_path, changes, message):
    folder = records(tmp_path / "compared", run, **changes)
    config = yaml.safe_load(public_config((run / "asd_hf.yaml").read_text()))
    with pytest.raises(UserError, match=message):
        gain(folder, config, "f", 400)


def test_a_gain_is_over_something(run, tmp_path):
    folder = records(tmp_path / "compared", run)
    config = yaml.safe_load(public_config((run / "asd_hf.yaml").read_text()))
    assert "**+3.0 AP**" in gain(folder, config, "f", None, baseline="fgd")
    with pytest.raises(UserError, match="easy has no 'fdg' to compare with: did you mean 'fgd'"):
        gain(folder, config, "f", 400, baseline="fdg")
    with pytest.raises(UserError, match="easy/asd, which others are compared with"):
        gain(folder, config, "f", 400, baseline="asd")
    config["method"]["temperature"] = 9.0
    with pytest.raises(UserError, match=r"easy/asd, the nearest, has other method.temperature$"):
        gain(folder, config, "f", 400)
    for file in folder.rglob("*_[12].json"):
        file.unlink()
    config["method"].pop("temperature")
    config = yaml.safe_load(public_config((run / "asd_hf.yaml").read_text()))
    assert "(1 seed, 1400 images)" in (text := gain(folder, config, "f", 400))
    assert "over images alone: there is one seed. Verdict: undecided." in text


def test_the_time_of_a_training_is_that_of_its_steps():
    history = [
        {"step": 10, "step_runtime": 0.5},
        {"step": 10, "eval_runtime": 99.0},
        {"step": 30, "step_runtime": 0.25},
        {"step": 33, "train_runtime": 7.0},
    ]
    assert seconds_of_steps(history, 33) == 10 * 0.5 + 20 * 0.25 + 3 * 0.25
    assert seconds_of_steps([{"step": 10, "eval_runtime": 99.0}], 10) is None
