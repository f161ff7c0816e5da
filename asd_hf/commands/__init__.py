"""What `asd-hf <command>` and the scripts run."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

from transformers.utils.logging import disable_progress_bar

from ..errors import UserError
from ..progress import QUIET
from ..ranks import heard
from ..registry import nearest
from ..stopping import Stopped, handled

COMMANDS = {
    "train": "train a student, with or without a teacher",
    "evaluate": "COCO numbers of a model on a data set",
    "predict": "draw what a model finds in images and videos, and write it as COCO results",
    "demo": "show in a browser what a model finds, and its teacher beside it",
    "push": "put a trained student on the Hub: model, card, numbers and, if exported, ONNX in one commit",
    "doctor": "say before training what fits, what is adapted and what is refused",
    "cache": "write the teacher's predictions to disk, to train without the teacher",
    "compare": "train several methods with several seeds and say which is better",
    "report": "show a run, or a comparison, in one HTML file",
    "shrink": "propose students of a teacher that meet a latency, and write the configuration",
    "export": "write a model as ONNX and show that it answers as in PyTorch",
    "benchmark": "measure steps, losses, latency, the reading of images and evaluation beside their references",
    "check-data": "read a data set whole and list what is wrong with it",
    "replay": "repeat a step that was left out and say where it was not finite",
    "selftest": "kill a training at random moments and show that nothing is lost",
    "shard": "turn a data set into balanced Parquet shards in the Hub's layout",
    "make-shapes": "write the generated data set as a COCO folder",
    "convert-adamixer": "turn a checkpoint of the original AdaMixer into one of Transformers' form",
}
# A disk that is full, a folder that is closed to us, a name that stands for something else
OF_FILES = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG")


def run(command: str, argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    A user's mistake, a full disk and a file that cannot be opened are one line on stderr and exit code 2; SIGTERM and
    SIGINT are one line, and 143 and 130. Every command takes `--quiet`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--quiet" in argv:
        argv.remove("--quiet")
        os.environ[QUIET] = "1"
    disable_progress_bar()  # Transformers' own, of every checkpoint read and written; Trainer's and ours stay
    try:
        with handled(), heard():
            main = import_module(f".{command.replace('-', '_')}", __name__).main
            return main(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if errno.errorcode.get(error.errno) not in OF_FILES:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {UserError(f'{place}{error.strerror}')}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; {stopped.advice}", file=sys.stderr)
        return 128 + stopped.number


def cli() -> int:
    """`asd-hf <command> ...`"""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: asd-hf COMMAND ...; asd-hf COMMAND --help tells more; --quiet shows results and warnings only\n")
        print("\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items()))
        return 0
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}: {nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    return run(command, argv)
