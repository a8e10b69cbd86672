"""What fits: frames and pixels to tokens, then GPU memory of the rollout and of the update, by arithmetic alone.

    python scripts/plan_memory.py --size 8b --gpus 8 --frames 128
    python scripts/plan_memory.py --model DIR --gpus 2 --gpu_memory_gib 80 --frames 256 --video_max_pixels 200704
    python scripts/plan_memory.py --size 4b --gpus 1 --fused --kept_layers 12
    python scripts/plan_memory.py --size 8b --gpus 2 --optimizer adamw_stochastic
    python scripts/plan_memory.py --size 8b --gpus 1 --optimizer adamw_stochastic --grad_accum_dtype bf16 --park

Nothing is loaded and no GPU is needed. Weights, states and cache are exact up to norms and biases; activations are an
estimate of a packed group under gradient checkpointing. Peaks measured with 2B, 4B and 8B, 0 to 28 kept layers, lie within
5 % of it (docs/gpu_results.md); other models, and the tower's kept layers, were not measured: leave a tenth of the memory free.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from dataclasses import dataclass

from data.video import VideoSettings, frame_size
from train.flops import Shape, parameters, read_shape
from train.memory import (
    BF16,
    FP32,
    GRADIENT_BYTES,
    LOGIT_CHUNK,
    OPTIMIZER_BYTES,
    activation_bytes,
    gathered_bytes,
    peak_bytes,
)

GIB = 1024**3
FP64 = 8
TIMESTAMP_TOKENS = 9  # "<12.5 seconds>" and the two vision markers around each temporal patch (Qwen3-VL, Qwen3.5)
RESIDENT = "resident weights (bf16, whole)"
OPTIMISER = {  # --optimizer -> the line of its states
    "adamw": "optimiser (fp32 master, two moments)",
    "adamw_stochastic": "optimiser (two moments)",
    "adamw_kahan": "optimiser (bf16 residues, two moments)",
}
# --grad_accum_dtype -> the line of DeepSpeed's buffer of them
GRADIENTS = {dtype: f"gradients ({dtype} shard)" for dtype in GRADIENT_BYTES}
PREFETCH_BUCKET = REDUCE_BUCKET = 100_000_000  # elements, as in train.policy.deepspeed_config
SUB_GROUP = 1_000_000_000  # elements of a shard that DeepSpeed updates at once


def _qwen3_vl(hidden, intermediate, layers, heads, tied, vision_hidden, vision_intermediate, vision_depth) -> dict:
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    vision = {"hidden_size": vision_hidden, "intermediate_size": vision_intermediate, "depth": vision_depth}
    vision |= {"out_hidden_size": hidden, "patch_size": 16, "deepstack_visual_indexes": [0, 1, 2]}
    return {"model_type": "qwen3_vl", "tie_word_embeddings": tied, "text_config": text, "vision_config": vision}


SIZES = {  # published configurations of Qwen3-VL
    "2b": _qwen3_vl(2048, 6144, 28, 16, True, 1024, 4096, 24),
    "4b": _qwen3_vl(2560, 9728, 36, 32, True, 1024, 4096, 24),
    "8b": _qwen3_vl(4096, 12288, 36, 32, False, 1152, 4304, 27),
}


def video_tokens(shape: Shape, frames: int, height: int, width: int) -> tuple[int, int]:
    """(tokens of the language model, patches of the vision tower) of a clip whose frames are height x width pixels."""
    slices = -(-frames // shape.temporal_patch)
    patches = slices * (height // shape.patch) * (width // shape.patch)
    text = slices * TIMESTAMP_TOKENS if shape.family in ("qwen3_vl", "qwen3_5") else 2
    return patches // shape.merge**2 + text, patches


def kv_bytes_per_token(shape: Shape) -> int:
    """Keys and values of one token in all layers with softmax attention, bf16: 2 x layers x kv_heads x head_dim x 2."""
    return 2 * shape.full_layers * shape.kv_heads * shape.head_dim * BF16


def state_bytes(
    shape: Shape,
    gpus: int,
    optimizer_on_host: bool,
    parameters_on_host: bool,
    resident: bool = False,
    optimizer: str = "adamw",
    grad_accum_dtype: str = "fp32",
) -> dict[str, float]:
    """ZeRO-3 shards per GPU as DeepSpeed 0.19 holds them: bf16 weights, a buffer of summed gradients that is never given
    back (with the optimiser's states on the host it is there, too), two Adam moments and, by --optimizer, fp32 master weights
    or bf16 residues; its buffer for reductions; and, gathered whole, two layers (the running one and the one fetched ahead)
    and the larger embedding, or, if resident, all weights beside their shards (on one GPU they are the shard).
    """
    n = parameters(shape)["total"]
    gathered = {"gathered layers and embedding": gathered_bytes(shape)}
    if resident:
        gathered = {RESIDENT: 0 if gpus == 1 else n * BF16}
    return {
        "weights (bf16 shard)": 0 if parameters_on_host else n * BF16 / gpus,
        GRADIENTS[grad_accum_dtype]: 0 if optimizer_on_host else n * GRADIENT_BYTES[grad_accum_dtype] / gpus,
        OPTIMISER[optimizer]: 0 if optimizer_on_host else n * OPTIMIZER_BYTES[optimizer] / gpus,
        **gathered,
        "buckets of gathers and reductions": (PREFETCH_BUCKET + REDUCE_BUCKET) * BF16,
    }


def step_bytes(
    shape: Shape, gpus: int, optimizer_on_host: bool, optimizer: str = "adamw", grad_accum_dtype: str = "fp32"
) -> float:
    """What the optimiser's step takes beside the states, the larger of two that are never there together: the gradients of a
    sub-group, copied flat, and once more where they are not of the master weights' dtype (fp32 of adamw, bf16 of the others;
    DeepSpeed's _prepare_fp32_grad_for_sub_group); and before, for the norm, those of the largest matrix in fp64
    (get_grad_norm_direct)."""
    if optimizer_on_host:
        return 0
    summed, master = GRADIENT_BYTES[grad_accum_dtype], FP32 if optimizer == "adamw" else BF16
    per_element = summed if summed == master else summed + master
    copied = min(parameters(shape)["total"] / gpus, SUB_GROUP) * per_element
    return max(copied, shape.vocabulary * shape.hidden / gpus * FP64)


STATES = {
    "weights (bf16 shard)",
    *GRADIENTS.values(),
    *OPTIMISER.values(),
    "gathered layers and embedding",
    "buckets of gathers and reductions",
    "second copy of the weights (hpZ)",
    "resident weights (bf16, whole)",
}
SECOND_COPY = "second copy of the weights (hpZ)"
STEP = "gradients copied in the optimiser's step"


@dataclass(frozen=True)
class Plan:
    prompt_tokens: int
    patches: int
    frame: tuple[int, int]  # height, width in pixels
    group_tokens: int  # prompt once and G longest responses
    update: dict[str, float]  # bytes per GPU while the policy trains (vLLM asleep)
    rollout: dict[str, float]  # bytes per GPU while vLLM is awake

    @property
    def peak_bytes(self) -> float:
        states = sum(value for name, value in self.update.items() if name in STATES)
        activations = peak_bytes({name: value for name, value in self.update.items() if name not in STATES | {STEP}})
        return max(states + activations, states + self.update[STEP], sum(self.rollout.values()))


def make_plan(shape: Shape, args: argparse.Namespace, frames: int) -> Plan:
    """The plan for clips of `frames` frames of args.height x args.width."""
    settings = VideoSettings(
        max_frames=max(frames, 4),
        max_pixels=args.video_max_pixels,
        total_pixels=args.total_pixels,
        factor=shape.patch * shape.merge,
        temporal_patch=shape.temporal_patch,
    )
    height, width = frame_size(args.height, args.width, frames, settings)
    visual, patches = video_tokens(shape, frames, height, width)
    prompt = visual + args.text_tokens
    responses = args.group_size * args.max_response_tokens
    tokens = args.groups_per_micro_batch * (prompt + responses)
    apart = args.offload_parameters or args.hpz_partition_size > 1
    resident = args.resident_parameters == "on" or (args.resident_parameters == "auto" and args.gpus == 1 and not apart)
    kinds = {"optimizer": args.optimizer, "grad_accum_dtype": args.grad_accum_dtype}
    rest = state_bytes(shape, args.gpus, args.offload_optimizer, args.offload_parameters, resident, **kinds)
    if args.hpz_partition_size > 1:
        rest[SECOND_COPY] = parameters(shape)["total"] * BF16 / args.hpz_partition_size
    update = rest | activation_bytes(
        shape,
        tokens,
        args.groups_per_micro_batch * responses,
        args.groups_per_micro_batch * patches,
        args.sequence_parallel,
        kept=(args.kept_layers, args.kept_vision_layers),
        fused=args.fused,
        logit_chunk=args.logit_chunk,
    )
    update[STEP] = step_bytes(shape, args.gpus, args.offload_optimizer, **kinds)
    asleep = {name: value for name, value in rest.items() if not name.startswith(("gathered", "buckets of gathers"))}
    if args.park:
        asleep = {name: 0 if name.startswith("optimiser") else value for name, value in asleep.items()}
    rows = args.groups_per_rank * args.group_size
    cached = args.groups_per_rank * prompt + min(rows, args.max_num_seqs) * args.max_response_tokens
    n = parameters(shape)["total"]
    rollout = asleep | {
        "vLLM weights (bf16)": n * BF16 / args.tensor_parallel,
        "KV cache of the whole step": cached * kv_bytes_per_token(shape) / args.tensor_parallel,
        "vLLM activations and CUDA graphs (allowance)": 4 * GIB,
    }
    return Plan(prompt, patches, (height, width), prompt + responses, update, rollout)


def most_frames(shape: Shape, args: argparse.Namespace) -> int:
    """The largest even number of frames up to --max_frames whose plan stays within nine tenths of the GPU; 0 if none."""
    low, high = 0, args.max_frames // 2
    while low < high:
        middle = (low + high + 1) // 2
        fits = make_plan(shape, args, 2 * middle).peak_bytes <= 0.9 * args.gpu_memory_gib * GIB
        low, high = (middle, high) if fits else (low, middle - 1)
    return 2 * low


def most_kept_layers(shape: Shape, args: argparse.Namespace) -> int | None:
    """The largest --kept_layers whose plan stays within nine tenths of the GPU; None if not even 0 does."""
    fitting = None
    for kept in range(shape.layers + 1):
        plan = make_plan(shape, argparse.Namespace(**vars(args) | {"kept_layers": kept}), args.frames)
        if plan.peak_bytes > 0.9 * args.gpu_memory_gib * GIB:
            break
        fitting = kept
    return fitting


def describe(shape: Shape, args: argparse.Namespace) -> str:
    plan, n = make_plan(shape, args, args.frames), parameters(shape)
    height, width = plan.frame
    share = plan.prompt_tokens / plan.group_tokens
    unpacked = args.group_size * (plan.prompt_tokens + args.max_response_tokens)
    lines = [
        f"{shape.family}, {n['total'] / 1e9:.2f} B parameters "
        f"(language {n['language'] / 1e9:.2f}, embeddings {n['embeddings'] / 1e9:.2f}, vision {n['vision'] / 1e9:.2f})",
        "",
        "tokens",
        f"  frames                 {args.frames} of {args.width}x{args.height}, resized to {width}x{height}",
        f"  patches                {plan.patches:,} for the vision tower",
        f"  prompt                 {plan.prompt_tokens:,} tokens ({args.text_tokens} of them text, by --text_tokens)",
        f"  one packed group       {plan.group_tokens:,} tokens at most, {share:.0%} of them the prompt",
        f"  as rows per response   {unpacked:,} tokens: {unpacked / plan.group_tokens:.1f} times as many",
        "",
    ]
    for title, part in (("update", plan.update), ("rollout", plan.rollout)):
        lines.append(f"{title}, GiB per GPU ({args.gpus} GPUs)")
        lines += [f"  {name:<46}{value / GIB:8.2f}" for name, value in part.items()]
    peak, room = plan.peak_bytes / GIB, 0.9 * args.gpu_memory_gib
    lines += [
        "",
        f"peak {peak:.1f} GiB of {args.gpu_memory_gib:g} GiB: " + ("fits" if peak <= room else "does NOT fit"),
    ]
    if shape.linear_layers and args.kept_layers:
        lines.append(
            "kept linear-attention layers hold more than is counted here: torch's rule keeps its chunks in fp32"
        )
    kept = most_kept_layers(shape, args)
    if kept is not None:
        lines.append(
            f"most --kept_layers with these flags: {kept} of {shape.layers}, {'with' if args.fused else 'without'} --fused"
        )
    most = most_frames(shape, args)
    if most:
        lines.append(f"most frames with these flags: {most}{' (--max_frames)' if most >= args.max_frames - 1 else ''}")
    else:
        fewer = "--optimizer adamw_stochastic, " if args.optimizer == "adamw" else ""
        if args.grad_accum_dtype == "fp32" and not args.offload_optimizer:  # on the host they take nothing here
            fewer += "--grad_accum_dtype bf16, "
        lines.append(f"no number of frames fits: more GPUs, {fewer}--offload_optimizer, or a smaller model")
    return "\n".join(lines)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="Hugging Face folder (its config.json is read)")
    model.add_argument("--size", choices=SIZES, help="a published Qwen3-VL size")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share the ZeRO-3 states")
    parser.add_argument("--gpu_memory_gib", type=float, default=139.0, help="memory of one GPU (H200: 139)")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="GPUs per vLLM engine")
    parser.add_argument("--sequence_parallel", type=int, default=1, help="GPUs that share a packed sequence")
    parser.add_argument(
        "--hpz_partition_size", type=int, default=1, help="GPUs that share the second copy of the weights"
    )
    parser.add_argument(
        "--resident_parameters",
        choices=("auto", "on", "off"),
        default="auto",
        help="all weights gathered on every GPU; auto: with one GPU",
    )
    parser.add_argument("--kept_layers", type=int, default=0, help="language layers that are not recomputed")
    parser.add_argument("--kept_vision_layers", type=int, default=0, help="the same of the vision tower")
    parser.add_argument("--fused", action="store_true", help="norms and gated products compiled: kept layers hold less")
    parser.add_argument(
        "--logit_chunk", type=int, default=LOGIT_CHUNK, help="response tokens whose logits exist at once"
    )
    parser.add_argument("--frames", type=int, default=128, help="frames of a clip")
    parser.add_argument("--max_frames", type=int, default=2048, help="upper end of the search for what fits")
    parser.add_argument("--height", type=int, default=720, help="height of the source video, pixels")
    parser.add_argument("--width", type=int, default=1280, help="width of the source video, pixels")
    parser.add_argument("--video_max_pixels", type=int, default=262144, help="largest area of one video frame, pixels")
    parser.add_argument("--total_pixels", type=int, default=None, help="budget of a clip as in train/main.py")
    parser.add_argument("--text_tokens", type=int, default=150, help="prompt tokens that are not visual")
    parser.add_argument("--group_size", type=int, default=8, help="G: responses per prompt")
    parser.add_argument("--max_response_tokens", type=int, default=2048, help="longest response")
    parser.add_argument("--groups_per_rank", type=int, default=4, help="prompts of a step on one GPU")
    parser.add_argument("--groups_per_micro_batch", type=int, default=1, help="groups packed into one forward")
    parser.add_argument("--max_num_seqs", type=int, default=256, help="responses decoded at once per engine")
    parser.add_argument(
        "--optimizer",
        choices=OPTIMISER,
        default="adamw",
        help="as in train/main.py: adamw keeps fp32 master weights, adamw_kahan bf16 residues, adamw_stochastic neither",
    )
    parser.add_argument(
        "--grad_accum_dtype",
        choices=GRADIENTS,
        default="fp32",
        help="as in train/main.py: dtype that the gradients of micro-batches are summed in",
    )
    parser.add_argument("--offload_optimizer", action="store_true", help="optimiser states in host memory")
    parser.add_argument("--park", action="store_true", help="optimiser states in host memory while vLLM samples")
    parser.add_argument("--offload_parameters", action="store_true", help="weights in host memory")
    return parser


def main() -> None:
    parser = flags()
    args = parser.parse_args()
    if args.resident_parameters == "on" and (args.offload_parameters or args.hpz_partition_size > 1):
        parser.error("--resident_parameters on goes with neither --offload_parameters nor --hpz_partition_size")
    for flag in ("kept_layers", "kept_vision_layers"):
        if getattr(args, flag) < 0:
            parser.error(f"--{flag} must be 0 or more, got {getattr(args, flag)}")
    try:
        config = SIZES[args.size] if args.size else json.loads((args.model / "config.json").read_text())
        text = describe(read_shape(config), args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text)


if __name__ == "__main__":
    main()
