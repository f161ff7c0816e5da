"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from asd_hf.config import load_config
from asd_hf.data import make_shapes, open_source, shard_dataset
from asd_hf.data.shapes import CLASS_NAMES
from asd_hf.evaluation import STATS
from asd_hf.loading import PACKAGED
from asd_hf.trainer import METHOD_WEIGHTS
from tests import tiny
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "configs/accelerate/one_process.yaml"]


def run(*arguments, launcher=(), ok=True, environment=None, cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) is ok, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A teacher, a COCO folder, the same in one Parquet shard a split, and a configuration."""
    root = tmp_path_factory.mktemp("world")
    make_shapes(root / "shapes", num_train=24, num_val=10, image_size=96, progress=False)
    for split in ("train", "val"):
        shard_dataset(open_source(str(root / "shapes"), split), split, root / "parquet", 1, progress=False)
    teacher = tiny.deformable_detr(1, classes=CLASS_NAMES, num_queries=15)
    teacher.save_pretrained(root / "teacher")
    tiny.processor(size={"height": 96, "width": 96}).save_pretrained(root / "teacher")
    config = {
        "model": {"teacher": str(root / "teacher"), "student": {"base": "teacher", "num_queries": 12}},
        "data": {
            "source": str(root / "parquet"),
            "resize": "fixed",
            "fixed_size": [96, 96],
            "augmentation": "flip",
            "shuffle_buffer": 16,
        },
        "method": {"name": "asd", "hidden_dim": 16, "key_dim": 16, "ramp_steps": 0},
        "training": {
            "output_dir": str(root / "out"),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            # Biases of attention keys have no gradient but rounding errors, which Adam would blow up to full steps.
            "adam_epsilon": 1e-4,
            "logging_steps": 5,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 0,
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="session")
def trained(world):
    """`accelerate launch scripts/train.py` with one process, ten steps of four images."""
    folder = world / "one"
    done = run(
        *("scripts/train.py", "--config", world / "run.yaml", f"training.output_dir={folder}"),
        *("training.save_strategy=steps", "training.save_steps=4"),
        launcher=ACCELERATE,
    )
    return folder, done


def test_train_prints_a_table_and_writes_metrics_student_card_and_configuration(trained):
    folder, done = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    for role in ("teacher", "student"):
        assert set(STATS) <= metrics[role].keys()
        assert metrics[role]["parameters"] > 0 and metrics[role]["ms_per_image"] > 0
        assert role in done.stdout
    assert metrics["protocol"]["num_images"] == 10
    training = metrics["training"]
    assert (training["steps"], training["images"], training["train_images"]) == (10, 40, 24)
    assert training["train_runtime"] > 0 and "cpu" in metrics["environment"]["device"]
    student = AutoModelForObjectDetection.from_pretrained(folder)
    assert sum(p.numel() for p in student.parameters()) == metrics["student"]["parameters"]
    assert "12 queries" in done.stderr and "15 queries" in done.stderr  # what was built is said
    assert "distillation  share  gradient" in done.stderr
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "Active Sampling" in card


def test_the_saved_configuration_runs_again_to_the_same_student(trained, tmp_path):
    folder, _ = trained
    assert load_config(folder / "asd_hf.yaml").training.max_steps == 10
    run("scripts/train.py", "--config", folder / "asd_hf.yaml", f"training.output_dir={tmp_path}")
    a, b = (load_file(where / "model.safetensors") for where in (folder, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_ranks_train_as_one_rank_with_the_doubled_batch(trained, world, tmp_path):
    folder, _ = trained
    run(
        *("scripts/train.py", "--config", world / "run.yaml", f"training.output_dir={tmp_path}"),
        *("training.per_device_train_batch_size=2", "training.ddp_backend=gloo"),
        launcher=TORCHRUN,
    )
    for name in ("model.safetensors", METHOD_WEIGHTS):
        one, two = load_file(folder / "checkpoint-10" / name), load_file(tmp_path / name)
        assert one.keys() == two.keys()
        assert max((one[k].float() - two[k].float()).abs().max().item() for k in one) < 1e-5
    one, two = (json.loads((where / "metrics.json").read_text()) for where in (folder, tmp_path))
    assert one["protocol"]["num_images"] == two["protocol"]["num_images"] == 10
    for role in ("teacher", "student"):
        assert all(one[role][s] == pytest.approx(two[role][s], abs=1e-3) for s in STATS)


def test_a_stopped_run_goes_on_with_the_same_command(trained, world, tmp_path):
    folder, _ = trained
    (tmp_path / "run").mkdir()
    (folder / "checkpoint-8").rename(tmp_path / "run" / "checkpoint-8")
    command = ["scripts/train.py", "--config", world / "run.yaml", f"training.output_dir={tmp_path / 'run'}"]
    refused = run(*command, ok=False)
    assert "holds checkpoints of an earlier run" in refused.stderr
    run(*command, "training.resume_from_checkpoint=true")
    a, b = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_command_of_the_card_gives_the_numbers_of_the_training_run(trained, world, tmp_path):
    folder, _ = trained
    out, results = tmp_path / "metrics.json", tmp_path / "results.json"
    command = (folder / "README.md").read_text().split("```bash\n")[1].split("\n```")[0]
    program, *arguments = shlex.split(command)
    assert program == "asd-hf"
    done = run("-m", "asd_hf.commands", *arguments, "--output", out, "--predictions", results, cwd=world)
    assert f"are in {out}" in done.stderr and "Loading weights" not in done.stderr
    numbers, known = json.loads(out.read_text()), json.loads((folder / "metrics.json").read_text())["student"]
    assert {s: numbers[s] for s in STATS} == {s: known[s] for s in STATS}
    assert numbers["protocol"]["resolution"] == {"height": 96, "width": 96}
    truth = json.loads((world / "shapes/annotations/instances_val.json").read_text())
    rows = json.loads(results.read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {r["image_id"] for r in rows} == {i["id"] for i in truth["images"]}
    assert {r["category_id"] for r in rows} <= {c["id"] for c in truth["categories"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rte=1"], "training.learning_rte is unknown: did you mean 'learning_rate'?"),
        (["data.source=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.train_split=trian"], "trian"),
        (["model.teacher=/nowhere/teacher"], "folder /nowhere/teacher does not exist"),
        (["method.name=none"], "method.hidden_dim has no meaning without a method"),
        (["model.teacher=null", "model.student.base=deformable_detr"], "needs a teacher: set model.teacher"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(world, overrides, message):
    done = run("scripts/train.py", "--config", world / "run.yaml", *overrides, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_teacher_that_shares_no_class_with_the_data(world, tmp_path):
    tiny.deformable_detr(1, classes=("dog", "cat")).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    done = run("scripts/train.py", "--config", world / "run.yaml", f"model.teacher={tmp_path}", ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "share no class: the teacher has dog, cat" in done.stderr


def test_missing_annotation_file(world, tmp_path):
    (tmp_path / "annotations").mkdir()
    arguments = ["--model", world / "teacher", "--data", tmp_path, "--split", "val"]
    done = run("scripts/evaluate.py", *arguments, ok=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path}/annotations/instances_val.json does not exist; splits of {tmp_path}: none\n"
    )


def test_a_hub_that_is_down_is_one_line(world, tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
    overrides = [f"training.output_dir={tmp_path}", "training.push_to_hub=true", "training.hub_model_id=user/small"]
    done = run("scripts/train.py", "--config", world / "run.yaml", *overrides, ok=False, environment=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "hf_secret" not in done.stderr
    assert "training has not begun" in done.stderr.splitlines()[-1]


def test_push_to_hub(world, tmp_path):
    """And the numbers of the card are those of the model that is there."""
    data = "shapes?num_train=8&num_val=20"
    with HubServer() as hub:
        done = run(
            *("scripts/train.py", "--config", world / "run.yaml", f"training.output_dir={tmp_path}"),
            *(f"model.student={PACKAGED['shapes']}", f"data.source={data}"),
            *("training.max_steps=1", "training.learning_rate=1e-6"),
            *("training.push_to_hub=true", "training.hub_model_id=user/small"),
            environment=hub.env,
        )
        repository = hub.repositories["user/small"]
        assert {"README.md", "asd_hf.yaml", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(
            repository.files
        )
        assert not [name for name in repository.files if name.startswith(("_", "checkpoint")) or name.endswith(".bin")]
        assert len(repository.commits) == 1
        card = repository.files["README.md"].decode()
        texts = {name: text for name, text in repository.files.items() if not name.endswith(".safetensors")}
        assert not [name for name, text in texts.items() if str(world).encode() in text]
        assert str(world) in (tmp_path / "asd_hf.yaml").read_text()  # here it must run again
        assert "model-index" in card and "AP50" in card and 'model="user/small"' in card
        arguments = ["--model", "user/small", "--data", data, "--output", tmp_path / "again.json", "--batch-size", "3"]
        again = run("scripts/evaluate.py", *arguments, environment=hub.env | {"HF_HOME": str(tmp_path / "home")})
    said = ModelCard(card).data.eval_results
    numbers = json.loads((tmp_path / "again.json").read_text())
    assert {result.metric_name: result.metric_value for result in said} == pytest.approx(
        {name: numbers[name] for name in STATS if numbers[name] >= 0}, abs=1e-6
    )
    assert numbers["AP"] > 0.1  # the packaged teacher, trained for a step
    row = next(line for line in card.splitlines() if line.startswith("| student |"))
    assert row.split(" | ")[2] == f"{100 * numbers['AP']:.1f}"
    assert numbers["parameters"] == json.loads((tmp_path / "metrics.json").read_text())["student"]["parameters"]
    written = [path.read_bytes() for path in tmp_path.glob("*") if path.is_file()] + [*repository.files.values()]
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
    assert not any(TOKEN.encode() in content for content in written)


def test_a_licence_that_forbids_pushing_ends_the_run_before_it_begins(world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    overrides = [
        f"model.teacher={tmp_path}/teacher",
        f"training.output_dir={tmp_path}/out",
        "training.push_to_hub=true",
    ]
    done = run("scripts/train.py", "--config", world / "run.yaml", *overrides, ok=False)
    assert "teacher, which taught the student, is under cc-by-nd-4.0, which forbids derived works" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_python_example_of_the_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text()
    example = readme[readme.index("from asd_hf.config import") :]
    example = example[: example.index("```")].replace('"shapes", "', '"shapes?num_train=40&num_val=10", "')
    example = example.replace("max_steps=20", "max_steps=2").replace("outputs/python", str(tmp_path))
    assert 0 <= float(run("-c", example).stdout.splitlines()[-1]) <= 1


def test_help_and_unknown_command():
    text = run("-m", "asd_hf.commands", "train", "--help").stdout
    assert "training.learning_rate (default: 0.0002)" in text and "method.name (default: none)" in text
    assert "%%" not in text
    done = run("-m", "asd_hf.commands", "trian", ok=False)
    assert done.stderr.strip() == "error: unknown command 'trian': did you mean 'train'?"


def test_make_shapes_and_shard(tmp_path):
    run("-m", "asd_hf.commands", "make-shapes", tmp_path / "s", "--num-train", "6", "--num-val", "3")
    arguments = ["--data", tmp_path / "s", "--split", "val", "--output", tmp_path / "p", "--num-shards", "2"]
    assert "3 images in 2 shards" in run("-m", "asd_hf.commands", "shard", *arguments).stdout
    assert open_source(str(tmp_path / "p"), "val").num_rows == 3


def test_quiet_leaves_results_and_warnings(tmp_path, world):
    settings = [f"training.output_dir={tmp_path}", "training.max_steps=1", "training.logging_steps=1"]
    done = run("scripts/train.py", "--quiet", "--config", world / "run.yaml", *settings)
    assert done.stdout.split()[:2] == ["model", "params"]
    assert not any(word in done.stderr for word in ("it/s", "batch/s", "s/step", " OK ", "error"))


def test_doctor_writes_what_it_found(tmp_path, world):
    arguments = ["--config", world / "run.yaml", "--images", "0", "--steps", "0", "--json", tmp_path / "found.json"]
    table = run("-m", "asd_hf.commands", "doctor", *arguments).stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [line.split("  ")[0] for line in table.splitlines()] == [finding["topic"] for finding in found]
