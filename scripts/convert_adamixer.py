"""python scripts/convert_adamixer.py --checkpoint FILE --output DIR"""

import sys

del sys.path[0]  # this folder: its evaluate.py would hide the package `evaluate`

from asd_hf.commands import run  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(run("convert-adamixer"))
