"""python scripts/evaluate.py --model DIR_OR_HUB_ID --data SOURCE --split NAME --output metrics.json"""

from asd_hf.commands import run

if __name__ == "__main__":
    raise SystemExit(run("evaluate"))
