"""Rows of Video-R1 or OneThinker -> JSON lines in this project's fields.

  python scripts/convert_dataset.py Video-R1-260k.json --media_dir VIDEO_R1 --out train.jsonl [--keep_process]
  python scripts/convert_dataset.py onethinker_rl.json --out train.jsonl --absolute

Both store {problem, data_type, problem_type, options, solution: "<answer>..</answer>", path, data_source, problem_id}.
`path` becomes `videos` or `images`, `solution` becomes `answer` without its tags, problem types get their canonical names,
and with --keep_process a worked solution (`process`) becomes a demonstration. Nothing is dropped silently: rows that cannot
be converted are listed in OUT.failed.jsonl. data/dataset.py reads such rows without conversion too; this makes them plain.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import re
from collections import Counter

from data.records import canonical_problem_type
from data.rows import BadRow, expand_files, read_rows

ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MOVED = {"path", "solution", "answer", "process", "problem", "problem_type", "data_type", "options", "images", "videos"}


def convert(row: dict, media_dir: str | None, absolute: bool, keep_process: bool) -> dict:
    """One row. Raises BadRow."""
    question = row.get("problem") or row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("problem: missing or empty", "leave the row out")
    solution = row.get("solution", row.get("answer"))
    tagged = ANSWER_TAGS.fullmatch(solution) if isinstance(solution, str) else None
    answer = tagged.group(1).strip() if tagged else solution
    if answer is None or answer == "":
        raise BadRow("solution: missing or empty", "leave the row out")
    try:
        problem_type = canonical_problem_type(row.get("problem_type"))
    except ValueError as error:
        raise BadRow(f"problem_type: {error}", "correct it") from None
    new = {"problem": question, "answer": answer, "problem_type": problem_type}
    paths = row.get("path") or []
    paths = [paths] if isinstance(paths, str) else list(paths)
    media: dict[str, list] = {"videos": list(row.get("videos") or []), "images": list(row.get("images") or [])}
    for path in paths:
        if not isinstance(path, str):
            raise BadRow(f"path: {type(path).__name__} is not a path", "give text")
        named = row.get("data_type")
        image = named == "image" or (named != "video" and path.lower().endswith(IMAGE_SUFFIXES))
        media["images" if image else "videos"].append(path.removeprefix("./"))
    for name, items in media.items():
        if items:
            new[name] = [_place(item, media_dir, absolute) for item in items]
    options = [str(option) for option in row.get("options") or []]
    if options:
        new["options"] = options
    if keep_process and isinstance(row.get("process"), str) and row["process"].strip():
        new["has_offline_trajectory"] = True
        new["offline_output"] = f"{row['process'].strip()}\n<answer>{answer}</answer>"
    return new | {name: value for name, value in row.items() if name not in MOVED and value is not None}


def _place(item, media_dir: str | None, absolute: bool):
    if not isinstance(item, str):
        return item
    path = os.path.join(media_dir, item) if media_dir else item
    return os.path.abspath(path) if absolute else path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON, JSONL or Parquet files, or globs")
    parser.add_argument("--out", required=True, help="JSON-lines file to write")
    parser.add_argument("--media_dir", default=None, help="folder put before every relative path")
    parser.add_argument("--absolute", action="store_true", help="write absolute paths")
    parser.add_argument("--keep_process", action="store_true", help="keep worked solutions as demonstrations")
    args = parser.parse_args(argv)
    counts, failed = Counter(), []
    try:
        with open(args.out + ".tmp", "w", encoding="utf-8") as out:
            for file in expand_files(args.files):
                for line, row in read_rows(file):
                    try:
                        if isinstance(row, BadRow):
                            raise row
                        new = convert(row, args.media_dir, args.absolute, args.keep_process)
                        out.write(json.dumps(new, ensure_ascii=False) + "\n")
                        counts[new["problem_type"]] += 1
                    except BadRow as bad:
                        row_id = "" if isinstance(row, BadRow) else str(row.get("problem_id", ""))
                        failed.append(
                            {"schema_version": 1, "file": file, "line": line, "id": row_id, "path": bad.path,
                             "reason": bad.reason, "remedy": bad.remedy}
                        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {sum(counts.values())} rows: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    if failed:
        with open(args.out + ".failed.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in failed)
        print(f"{len(failed)} rows could not be converted: {args.out}.failed.jsonl")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
