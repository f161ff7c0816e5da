"""accelerate launch scripts/train.py --config FILE [section.key=value ...]"""

from asd_hf.commands import run

if __name__ == "__main__":
    raise SystemExit(run("train"))
