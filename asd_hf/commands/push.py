from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..compare.gain import gain
from ..config import NO_METHOD
from ..errors import UserError
from ..hub import is_hub_id, public_config, secret_of
from ..progress import show_logs
from ..sharing import (
    Files,
    FinishedRun,
    Package,
    create_repository,
    package,
    push_files,
    push_run,
    read_run,
    write_files,
)
from ..space import installed_requirement, space_files


def main(argv: list[str]) -> None:
    """Puts a trained student on the Hub: model, processor, card, numbers, configuration and ONNX, in one commit."""
    parser = argparse.ArgumentParser(prog="asd-hf push", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="training.output_dir of a finished training")
    parser.add_argument(
        "--repo", metavar="OWNER/NAME", help="on the Hub (default: training.hub_model_id, or the name of RUN_DIR)"
    )
    parser.add_argument(
        "--dry-run", type=Path, metavar="DIR", help="send nothing, write the same files into this new folder"
    )
    parser.add_argument("--private", action="store_true", help="the repository shall be private")
    parser.add_argument("--space", action="store_true", help="also a Gradio Space of this name (dry run: DIR_space)")
    parser.add_argument(
        "--requirement",
        metavar="REQ",
        help="how the Space gets asd_hf, as a line for pip, such as 'asd-hf[demo] @ git+https://...' (default: as it "
        "was installed here)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="of the student (default: training.hub_license, or that of its first weights)"
    )
    parser.add_argument(
        "--allow-license",
        action="append",
        default=[],
        metavar="ID",
        help="share although a model that the student comes from is under this licence, which forbids something",
    )
    parser.add_argument("--dataset", metavar="OWNER/NAME", help="the Hub's name of the data, if they lie in a folder")
    parser.add_argument(
        "--compare", type=Path, metavar="DIR", help="output of asd-hf compare that tells what the method is worth"
    )
    parser.add_argument("--baseline", default=NO_METHOD, metavar="NAME", help=f"in --compare (default: {NO_METHOD})")
    args = parser.parse_args(argv)
    for flag, name in (("--repo", args.repo), ("--dataset", args.dataset)):
        _check_name(flag, name)
    if args.requirement is not None and not args.space:
        raise UserError("--requirement says something of --space, which is not given")
    if secret_of(args.requirement, "--requirement"):
        raise UserError("--requirement holds a password or token, which the files of the Space would show to everyone")
    show_logs(rank=0)
    run = read_run(args.run)
    name = args.repo or run.name
    _check_name("without --repo the folder gives the name, and", name)
    options = {
        "license": args.license,
        "allowed": args.allow_license,
        "dataset": args.dataset,
        "gain": None if args.compare is None else _gain(run, args.compare, args.baseline),
    }
    if args.dry_run is not None:
        shared = package(run, name, **options)
        if "/" not in name:
            shared.remarks.append(
                f"the card calls the student {name}: --repo OWNER/{name} would give it its whole name"
            )
        write_files(shared.files, args.dry_run)
        _tell(shared, f"the files of {name}, as they are in {args.dry_run}")
        if args.space:
            folder = args.dry_run.with_name(f"{args.dry_run.name}_space")
            space = _space(name, shared, args.requirement)
            write_files(space.files, folder)
            _tell(space, f"\nthe files of its Space, as they are in {folder}")
        print("\nnothing was sent: the same command without --dry-run sends these files")
        return
    shared, pushed = push_run(run, name, args.private or None, **options)
    repo_id = pushed.repo_id
    _tell(shared, f"the files of {repo_id}")
    if args.space:
        advice = "the model is pushed: the same command tries the Space again"
        create_repository(repo_id, args.private or None, advice, repo_type="space", space_sdk="gradio")
        space = _space(repo_id, shared, args.requirement)
        _tell(space, "\nthe files of its Space")
        print(push_files(space.files, repo_id, f"Demo of {repo_id}", advice, repo_type="space"))
    print(f"\n{pushed}\nnext: {run.evaluate_command(repo_id, args.dataset)}")


def _check_name(flag: str, name: str | None) -> None:
    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name!r} is no name on the Hub: {' '.join(str(error).split())}") from None
    if flag == "--dataset" and name is not None and not is_hub_id(name):
        raise UserError(f"--dataset {name!r} is not of the form OWNER/NAME")


def _gain(run: FinishedRun, folder: Path, baseline: str) -> str:
    config = yaml.safe_load(public_config(run.config_yaml))
    steps = run.metrics["training"]["steps"] if "training" in run.metrics else None
    return gain(folder, config, run.protocol["fingerprint"], steps, baseline)


def _space(name: str, shared: Package, requirement: str | None) -> Package:
    data = ModelCard(shared.files["README.md"].decode()).data
    license = {key: value for key in ("license", "license_name") if (value := data.get(key)) is not None}
    requirement, remarks = requirement or installed_requirement(), []
    if requirement is None:
        remarks.append(
            "its requirements.txt asks for a release of asd_hf, which was installed here from a folder, or from an "
            "address with a password or token: where no index has this version, "
            "--requirement 'asd-hf[demo] @ ADDRESS' names a wheel or a Git repository that the Hub can reach"
        )
    return Package(space_files(name, license=license, requirement=requirement), remarks)


def _tell(shared: Package, title: str) -> None:
    print(_table(shared.files, title))
    for remark in shared.remarks:
        print(f"note: {remark}")


def _table(files: Files, title: str) -> str:
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    shown = {name: f"{size:,}" for name, size in {**sizes, "in all": sum(sizes.values())}.items()}
    names, numbers = max(map(len, shown)), max(map(len, shown.values()))
    rows = [f"  {name.ljust(names)}  {size.rjust(numbers)} bytes" for name, size in shown.items()]
    return "\n".join([f"{title}:", *rows])
