"""Does the model look: its loss on held-out captions with their own pixels, and with those of another scene.

    python scripts/real_model/sees.py runs/real/see/sees

reads validation.jsonl, as train/sft.py --validate_only leaves it for heldout_captions.jsonl and
heldout_captions_swapped.jsonl; prints both losses and writes them to sees.json beside it. A model that has learned the
wording of captions alone is as good with another scene's pixels as with its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

OWN, OTHER = (f"validate/nll_by_source/real/caption{end}" for end in ("", "_swapped"))


def read_losses(folder: Path) -> dict[str, float]:
    """{own, other, difference} in nats per token, of the last validation. Raises SystemExit when it is not there."""
    path = folder / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    row = json.loads(lines[-1]) if lines else {}
    if row.get(OWN) is None or row.get(OTHER) is None:
        raise SystemExit(
            f"{path}: has no losses of own and swapped captions; train/sft.py --validate_only --validate_data "
            "heldout_captions.jsonl heldout_captions_swapped.jsonl writes them"
        )
    return {"own": row[OWN], "other": row[OTHER], "difference": row[OTHER] - row[OWN]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="losses with own and with other pixels", allow_abbrev=False)
    parser.add_argument("run", help="output folder of the validation")
    folder = Path(parser.parse_args(arguments).run)
    losses = read_losses(folder)
    (folder / "sees.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    print(
        f"[sees] {folder}: {losses['own']:.3f} nats per token with the scene's own pixels, {losses['other']:.3f} with another "
        f"scene's: {losses['difference']:+.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
