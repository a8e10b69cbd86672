"""Take the policy of a run out as a Hugging Face folder, check that it is whole, and upload it when asked.

    python scripts/export_hf.py runs/first --output_dir models/first                     the newest checkpoint
    python scripts/export_hf.py runs/first --step 120 --dtype bf16 --output_dir models/first-120
    python scripts/export_hf.py runs/first --best validate/accuracy --output_dir models/first-best
    python scripts/export_hf.py runs/first --output_dir models/first --upload my-org/first      private; --public otherwise

RUN is a run folder, one checkpoint of it, or a Hugging Face folder such as runs/first/final. Nothing is overwritten: the
output folder must not exist. Without --upload nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def source_folder(run: Path, step: int | None, metric: str | None) -> Path:
    """The Hugging Face folder to export. Raises FileNotFoundError naming what there is instead."""
    from train.checkpoint import best, list_checkpoints

    if (run / "config.json").is_file():
        if step is not None or metric is not None:
            raise FileNotFoundError(f"{run} is one model: --step and --best choose among a run's checkpoints")
        return run
    if (run / "hf" / "config.json").is_file():
        return run / "hf"
    complete = [path for path in list_checkpoints(run) if (path / "complete.json").is_file()]
    names = ", ".join(path.name for path in complete) or "none"
    if step is not None:
        complete = [path for path in complete if path.name == f"step-{step:06d}"]
    elif metric is not None:
        chosen = best(run, metric)
        complete = [chosen] if chosen else []
    elif (run / "final" / "config.json").is_file():
        return run / "final"
    if not complete:
        wanted = f"step {step}" if step is not None else f"one that measured {metric}" if metric else "a checkpoint"
        raise FileNotFoundError(f"{run}: no {wanted}; complete checkpoints there: {names}")
    return complete[-1] / "hf"


def load_tensors(folder: Path) -> dict:
    """All tensors of a folder's safetensors files by name. Raises ValueError when one that the index lists is missing."""
    from safetensors.torch import load_file

    tensors: dict = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(json.loads(index.read_text())["weight_map"].keys() - tensors.keys())
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors of the index are in no file, the first is {missing[0]}")
    if not tensors:
        raise ValueError(f"{folder}: no *.safetensors file")
    return tensors


def export(source: Path, target: Path, dtype: str | None) -> dict:
    """Write `target` under a temporary name and rename it; -> {"tensors", "parameters", "dtype"}.

    Every tensor must be finite, and the model that transformers builds from the folder must know every name and miss none.
    Raises ValueError otherwise, FileExistsError when target is there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if target.exists():
        raise FileExistsError(f"--output_dir {target} exists: give another, or remove it")
    tensors = load_tensors(source)
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors hold values that are not finite, the first is {wrong[0]}")
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wanted = getattr(torch, DTYPES[dtype]) if dtype else None
    model, report = AutoModelForImageTextToText.from_pretrained(
        source, config=AutoConfig.from_pretrained(source), dtype=wanted or "auto", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(f"{source}: transformers found {kind} {sorted(map(str, report[kind]))[:3]}")
    model.save_pretrained(partial)
    for path in source.iterdir():  # tokenizer, processor, chat template: whatever stands beside the weights
        weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not weights and not (partial / path.name).exists():
            shutil.copyfile(path, partial / path.name)
    partial.rename(target)
    return {
        "tensors": len(tensors),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="export a run's policy as a Hugging Face folder", allow_abbrev=False)
    parser.add_argument("run", help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("--output_dir", required=True, help="folder to write; it must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: final/, else the newest)")
    which.add_argument("--best", metavar="METRIC", help="the best checkpoint by a score measured at its step")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the weights (default: as saved)")
    parser.add_argument("--upload", metavar="ORG/NAME", help="also upload to the Hugging Face hub (private)")
    parser.add_argument("--public", action="store_true", help="with --upload: visible to everybody")
    args = parser.parse_args(arguments)
    if args.public and not args.upload:
        parser.error("--public needs --upload")
    target = Path(args.output_dir)
    try:
        source = source_folder(Path(args.run), args.step, args.best)
        wrote = export(source, target, args.dtype)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{target}: {wrote['parameters']:,} parameters in {wrote['dtype']}, from {source}")
    if args.upload:
        from huggingface_hub import HfApi

        hub = HfApi()
        hub.create_repo(args.upload, private=not args.public, exist_ok=True)
        hub.upload_folder(repo_id=args.upload, folder_path=str(target))
        print(f"uploaded to {args.upload} ({'public' if args.public else 'private'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
