"""Make the report, the tables and, where it is asked for, the picture of a results folder again:

python -m statewise.report runs/compare-spoken_digits --picture docs/images/compare.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core import StatewiseError
from . import read_comparison, write_all, write_picture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m statewise.report", description=(__doc__ or "").split(":")[0])
    parser.add_argument("results", type=Path, help="a folder written by statewise compare")
    parser.add_argument("--picture", type=Path, help="also write this SVG file, of the first task")
    options = parser.parse_args()
    try:
        found = read_comparison(options.results)
        if options.picture:
            write_picture(found, options.picture)
        print(*write_all(found, options.results), sep="\n")
    except StatewiseError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
