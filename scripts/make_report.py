"""Make runs/<name>/report.html again, also while the run goes on:

python scripts/make_report.py runs/quickstart
python scripts/make_report.py runs/quickstart --before eval/before.json --after eval/after.json
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from train.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder: the --output_dir of a training run")
    parser.add_argument("--before", type=Path, help="held-out result before training (else before.json in the folder)")
    parser.add_argument("--after", type=Path, help="held-out result after training (else after.json in the folder)")
    parser.add_argument("--out", type=Path, help="page to write (else report.html in the folder)")
    parser.add_argument("--max_mb", type=float, default=20.0, help="largest size of the page in megabytes")
    args = parser.parse_args()
    for name in ("before", "after"):
        path = getattr(args, name)
        if path and not path.is_file():
            parser.error(f"--{name} {path} is no file")
    try:
        path = write_report(
            args.run, before=args.before, after=args.after, out=args.out, max_bytes=int(args.max_mb * 1e6)
        )
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
