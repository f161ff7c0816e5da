import re
from pathlib import Path

import pytest
import yaml

from asd_hf.config import TrainingConfig, build_config, describe_config, load_config
from asd_hf.errors import UserError
from asd_hf.methods.asd import ASDConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))
VARIANTS = ("variants", "layers")  # parts of configurations
CONFIGS = [path for path in CONFIGS if path.parent.name != "accelerate" and path.stem not in VARIANTS]


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_configuration_is_valid_and_its_name_tells_its_method(path):
    run = load_config(path, ["training.use_cpu=true", "training.bf16=false"])
    assert path.parent.name in ("configs", "shapes", "bench") or path.stem.startswith(
        run.method_name.replace("+", "_")
    )
    assert run.training.output_dir.startswith("outputs/")


def test_values_keep_their_type(tmp_path):
    path = write(
        tmp_path,
        "training: {learning_rate: 1e-4, max_steps: 10, use_cpu: true, report_to: [tensorboard],\n"
        "  lr_scheduler_type: cosine, save_strategy: no}\n"
        "method: {name: asd, layers: 1, temperature: 2}\n"
        "model: {teacher: some/teacher, student: {backbone: resnet18, config: {dropout: 0.0}}}\n",
    )
    run = load_config(path, ["training.weight_decay=1e-5", "model.student.decoder_layers=3", "data.source=data/coco"])
    assert run.training.learning_rate == 1e-4 and isinstance(run.training.learning_rate, float)
    assert run.training.weight_decay == 1e-5
    assert run.training.lr_scheduler_type == "cosine"
    assert run.training.report_to == ["tensorboard"]
    assert run.training.save_strategy == "no"  # which YAML reads as false
    assert yaml.safe_load(run.to_yaml())["training"]["save_strategy"] == "no"
    method = run.methods["asd"]
    assert run.method_name == "asd" and isinstance(method, ASDConfig)
    assert method.temperature == 2.0 and isinstance(method.temperature, float)
    assert run.model.student.backbone == "resnet18" and run.model.student.decoder_layers == 3
    assert run.model.student.config == {"dropout": 0.0}
    assert run.data.source == "data/coco"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{square: 3}", "model.class_map.square must be str, not 3"),
        ("{yes: square}", "model.class_map: key True must be str, not True"),
        ("{square: null}", "model.class_map.square must be str, not None"),
        ("[square]", "model.class_map must be dict"),
    ],
)
def test_names_of_classes_are_words(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(write(tmp_path, f"model: {{class_map: {text}}}"))


def test_a_student_can_be_named_or_described(tmp_path):
    assert load_config(write(tmp_path, "model: {student: some/student}")).model.student == "some/student"
    assert load_config(write(tmp_path, "model: {student: {checkpoint: x}}")).model.student.checkpoint == "x"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "training: {learning_rte: 1}",
            [],
            "run.yaml: training.learning_rte is unknown: did you mean 'learning_rate'?",
        ),
        ("modell: {}", [], "unknown section 'modell': did you mean 'model'?"),
        ("method: {name: asd, temprature: 4}", [], "method.temprature is unknown: did you mean 'temperature'?"),
        ("model: {student: {backbon: x}}", [], "model.student.backbon is unknown: did you mean 'backbone'?"),
        ("method: {name: asdd}", [], "unknown method 'asdd': did you mean 'asd'?"),
        ("training: {max_steps: many}", [], "training.max_steps must be int, not 'many'"),
        ("training: {max_steps: 1.5}", [], "training.max_steps must be int, not 1.5"),
        ("training: {bf16: 1}", [], "training.bf16 must be bool, not 1"),
        ("training: {max_steps: true}", [], "training.max_steps must be int, not True"),
        ("data: {train_sizes: [480, big]}", [], r"data.train_sizes\[1\] must be int, not 'big'"),
        ("training: {lr_scheduler_type: cosin}", [], "training: .*cosin"),
        ("training: {eval_strategy: often}", [], "training: .*often"),
        ("training: {hub_token: secret}", [], "training.hub_token would be written into files"),
        ("training: {remove_unused_columns: true}", [], "remove_unused_columns must be false"),
        ("training: {hub_strategy: every_save}", [], "hub_strategy must be 'end'"),
        ("training: {early_stopping_patience: 2}", [], "early_stopping_patience needs evaluations"),
        ("training: {ema_decay: 1.0}", [], r"ema_decay must be in \[0, 1\)"),
        ("training: {per_device_eval_batch_size: 0}", [], "per_device_eval_batch_size must be 1 or more, not 0"),
        ("training: {learning_rate: -1}", [], "training.learning_rate must be 0 or more, not -1"),
        ("training: {seed: -1}", [], r"training.seed must be in \[0, 2\^32\), not -1"),
        ("training: {metric_for_best_model: eval_ap50}", [], "_model 'ap50' is unknown: choose one of AP, AP50"),
        ("training: {metric_for_best_model: ema_AP}", [], "metric_for_best_model 'ema_AP' is unknown"),
        ("training: {report_to: wandbb}", [], "training.report_to 'wandbb' is unknown: did you mean 'wandb'?"),
        ("training: {report_to: null}", [], "training.report_to None is unknown: choose one of"),
        ("training: {report_to: neptune}", [], "training.report_to is neptune, which is not installed"),
        (
            "training: {report_to: flyte}",
            [],
            "training.report_to is flyte, which is not installed: pip install flytekit",
        ),
        ("model: {}", ["training.max_steps"], "is not of the form section.key=value"),
        ("model: {}", ["max_steps=3"], "is not of the form section.key=value"),
        ("model: {teacher: x}", ["model.teacher.name=3"], "teacher is a value, not a group of keys"),
        ("method: [asd, none]", [], "'none' cannot stand in a list of methods"),
        ("method: [asd, asd]", [], "method 'asd' stands twice"),
        ("method: [asd, fgdd]", [], "method.fgdd: unknown method 'fgdd': did you mean 'fgd'?"),
        ("method: [asd, {name: fgd, wieght: 1}]", [], "method.fgd.wieght is unknown: did you mean 'weight'?"),
        ("method: [asd, fgd]", ["method.weight=1"], "there are several methods: give method.<name>.weight"),
        ("method: [asd, fgd]", ["method.asdd.weight=1"], "no method 'asdd' in the list: did you mean 'asd'?"),
        ("method: {name: asd, weight: -1}", [], "method.weight must be 0 or above, not -1"),
        ("method: [asd, {name: fgd, weight: -1}]", [], "^method.fgd.weight must be 0 or above, not -1"),
        ("method: {name: none, weight: 1}", [], "method.weight has no meaning without a method"),
        ("method: 3", [], "method.name must be a name, not 3"),
        ("- a", [], "must hold sections"),
        ("model: {", [], "is not YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["method: [asd, {name: fgd, weight: 0.5}]", "method: [{name: asd}, fgd]", "method: asd"]
)
def test_methods_combine(tmp_path, text):
    overrides = ["method.fgd.weight=0.25", "method.asd.layers=1"] if "fgd" in text else ["method=[asd, fgd]"]
    run = load_config(write(tmp_path, text), overrides)
    assert run.method_name == "asd+fgd" and list(run.methods) == ["asd", "fgd"]
    expected = (1, 0.25) if "fgd" in text else (2, 1.0)
    assert (run.methods["asd"].layers, run.methods["fgd"].weight) == expected
    again = build_config(yaml.safe_load(run.to_yaml()))
    assert again.methods == run.methods


def test_secret_is_not_echoed(tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "training: {hub_token: hf_secret}"))
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("secret", ["https://me:pa55@hub.example/a", "s3://AKIA@bucket", "hf_" + "a1" * 12])
@pytest.mark.parametrize(
    "where", ["model.teacher", "data.source", "training.output_dir", "model.student.config.paths", "model.class_map"]
)
def test_credentials_are_refused_and_not_echoed(tmp_path, where, secret):
    value = f"[x, '{secret}']" if where.endswith("paths") else f"{{cat: '{secret}'}}" if "map" in where else secret
    with pytest.raises(UserError, match=f"{re.escape(where)}.* holds a token or password") as caught:
        load_config(write(tmp_path, "data: {source: shapes}"), [f"{where}={value}"])
    assert secret not in str(caught.value) and "pa55" not in str(caught.value)
    load_config(write(tmp_path, "data: {source: 'a@b'}"), ["training.output_dir=hf_runs/c@d"])  # not all @ are one


def test_an_error_shows_no_credentials():
    text = str(UserError(f"401 for url: https://me:pa55@hub.example/api?x=y@z with hf_{'a1' * 12}"))
    assert text == "401 for url: https://***@hub.example/api?x=y@z with ***"


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothing.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_resolved_configuration_says_the_same_again(path):
    run = load_config(path, ["training.use_cpu=true", "training.bf16=false", "training.seed=7"])
    text = run.to_yaml()
    again = build_config(yaml.safe_load(text))
    assert again.to_yaml() == text
    assert (again.model, again.data, again.methods) == (run.model, run.data, run.methods)
    assert again.training.seed == 7 and again.training.max_steps == run.training.max_steps


def test_resolved_configuration_keeps_what_was_given_and_nothing_of_the_machine(tmp_path):
    given = [
        "training.data_seed=0",
        "training.method_max_grad_norm=0.0",
        "training.method_learning_rate=0",
        "training.ddp_find_unused_parameters=false",
        "training.greater_is_better=false",
        "training.accelerator_config={even_batches: false}",
        "training.report_to=none",
        "training.use_cpu=true",
        "training.learning_rate=3e-4",
        "training.resume_from_checkpoint=true",
    ]
    run = load_config(write(tmp_path, "method: {name: none}"), given)
    saved = yaml.safe_load(run.to_yaml())["training"]
    assert saved == {
        "data_seed": 0,
        "method_max_grad_norm": 0.0,
        "method_learning_rate": 0.0,
        "ddp_find_unused_parameters": False,
        "greater_is_better": False,
        "accelerator_config": {"even_batches": False},
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 3e-4,
    }
    again = build_config(yaml.safe_load(run.to_yaml())).training
    for name, spec in TrainingConfig.__dataclass_fields__.items():
        if spec.init and name not in ("resume_from_checkpoint", "accelerator_config"):
            assert getattr(again, name) == getattr(run.training, name), name


def test_help_lists_every_key_with_default_and_meaning():
    text = describe_config()
    for key in (
        "model.teacher",
        "model.student.backbone",
        "data.source",
        "method.temperature",
        "training.learning_rate",
    ):
        assert re.search(rf"{key} \(.+\)\n +\S", text), key
    for name in TrainingConfig.__dataclass_fields__:
        assert f"training.{name} (" in text
