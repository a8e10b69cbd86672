"""Update of one packed group against one row per response: forward and backward, tower and language model, medians.

    python scripts/bench_packed.py --size tiny                          # any machine, seconds
    python scripts/bench_packed.py --size 2b --attention flex varlen    # one CUDA device
    python scripts/bench_packed.py --size 2b --zero3                    # through DeepSpeed ZeRO-3, with the optimiser
    python scripts/bench_packed.py --size deep --zero3 --prompt_tokens 80 --frames 2 --resident_parameters off   # host time

A Qwen3-VL of the real shape with random weights, one video prompt, G responses. Variants, interleaved round by round:
    packed/<backend>  one sequence per group (what training runs)
    rows/<backend>    the same kernels, one sequence per response: prompt and video G times
    rows/hf           the library's own forward: its attention per frame, convolution, full logits of the response
Correctness comes first: loss, and every parameter's gradient against the first variant, before any time is printed.
Useful FLOPs count the prompt once (train/flops.py), for all variants alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import cProfile
import gc
import json
import statistics
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from data.records import Group, Prompt, Response, Sample
from scripts.bench_results import kernel_table
from train import group_attention
from train.flops import bf16_peak_flops, group_flops, read_shape
from train.group_attention import PACKED, choose_attention, pack
from train.packed_model import PackedModel
from train.policy import checkpoint_activations
from train.vision import choose_vision_attention

# hidden, MLP, layers, heads, key-value heads; vision depth, width, MLP, heads, deepstack layers; tied
SHAPES = {
    "tiny": (128, 256, 4, 4, 2, 4, 64, 128, 2, [1, 2], False),
    "deep": (64, 128, 30, 2, 1, 4, 32, 64, 1, [1, 2], False),  # many layers and no work in them: what the host does
    "2b": (2048, 6144, 28, 16, 8, 24, 1024, 4096, 16, [5, 11, 17], True),
    "4b": (2560, 9728, 36, 32, 8, 24, 1024, 4096, 16, [5, 11, 17], True),
    "8b": (4096, 12288, 36, 32, 8, 27, 1152, 4304, 16, [8, 16, 24], False),
}
SMALL = ("tiny", "deep")
IMAGE, VIDEO = 11, 12
NORMALISATION = ((0.5,) * 3, (0.5,) * 3)


def make_config(size: str, layers: int | None) -> Qwen3VLConfig:
    hidden, mlp, depth, heads, kv_heads, v_depth, v_hidden, v_mlp, v_heads, deepstack, tied = SHAPES[size]
    tiny = size in SMALL
    text = {
        "vocab_size": 512 if tiny else 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32 if tiny else 128,
        "max_position_embeddings": 262144,
        "initializer_range": 0.05 if tiny else 0.02,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5] if tiny else [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": v_depth,
        "hidden_size": v_hidden,
        "intermediate_size": v_mlp,
        "num_heads": v_heads,
        "patch_size": 16,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64 if tiny else 2304,
        "deepstack_visual_indexes": deepstack,
    }
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=tied
    )


def make_group(args, config, seed: int) -> Group:
    """A video of `frames` frames (two per temporal patch, each after 8 tokens of timestamp) and G responses."""
    rng = np.random.default_rng(seed)
    patches_t = args.frames // 2
    edge = max(2, round((args.prompt_tokens / patches_t - 10) ** 0.5))  # merged tokens per side
    ids, types, positions, next_position = [], [], [], 0

    def add_text(length: int) -> None:
        nonlocal next_position
        ids.append(rng.integers(20, 400, length))
        types.append(np.zeros(length, dtype=np.uint8))
        positions.append(np.broadcast_to(next_position + np.arange(length), (3, length)))
        next_position += length

    add_text(20)
    for _ in range(patches_t):
        add_text(9)
        ids.append(np.full(edge * edge, VIDEO))
        types.append(np.full(edge * edge, 2, dtype=np.uint8))
        rows, columns = np.divmod(np.arange(edge * edge), edge)
        positions.append(next_position + np.stack([np.zeros_like(rows), rows, columns]))
        next_position += edge
    add_text(30)
    grid = np.array([[patches_t, 2 * edge, 2 * edge]])
    prompt = Prompt(
        sample=Sample("bench", "", "", "open-ended", "video"),
        text="",
        vllm_prompt={},
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(positions, axis=1).astype(np.int64),
        mm_type_ids=np.concatenate(types),
        patches=rng.integers(0, 256, (int(grid.prod()), 3 * 2 * 16 * 16), dtype=np.uint8),
        grid_thw=grid,
        grid_kinds=("video",),
    )
    lengths = [args.response_tokens] * args.group_size
    if args.ragged:  # log-normal, the median as given, 95th percentile three times that
        lengths = np.exp(rng.normal(np.log(args.response_tokens), np.log(3) / 1.645, args.group_size))
        lengths = np.clip(lengths, 1, 2048).astype(int).tolist()
    return Group(prompt, [Response(rng.integers(20, 400, n).tolist(), [], "stop") for n in lengths])


def packed_loss(model, group, backend: str, device, *, rows: bool, backward, temperature: float = 1.0) -> float:
    """Forward and backward of the group's mean negative log-prob; `rows`: one response at a time."""
    total = sum(len(response.token_ids) for response in group.responses)
    parts = [Group(group.prompt, [response]) for response in group.responses] if rows else [group]
    loss_sum = 0.0
    for part in parts:
        logprobs, _ = model(pack([part], backend=backend, device=device), temperature=temperature)
        loss = -logprobs.sum() / total
        backward(loss)
        loss_sum = loss_sum + loss.detach()
    return float(loss_sum)


def library_loss(hf, group, device) -> float:
    """The same by the library's forward alone, one response at a time."""
    from data.normalise import normalise

    total, loss_sum = sum(len(response.token_ids) for response in group.responses), 0.0
    prompt = group.prompt
    for response in group.responses:
        length = len(response.token_ids)
        ids = torch.from_numpy(np.concatenate([prompt.input_ids, response.token_ids])).to(device)[None]
        tail = np.broadcast_to(prompt.position_ids.max() + 1 + np.arange(length), (3, length))
        positions = torch.from_numpy(np.concatenate([prompt.position_ids, tail], axis=1)).to(device)[:, None]
        pixels = normalise(torch.from_numpy(prompt.patches).to(device), *NORMALISATION)
        logits = hf(
            input_ids=ids,
            position_ids=positions,
            pixel_values_videos=pixels,
            video_grid_thw=torch.from_numpy(prompt.grid_thw).to(device),
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, -length:], reduction="sum") / total
        loss.backward()
        loss_sum = loss_sum + loss.detach()
    return float(loss_sum)


def make_variants(args, config, device, dtype, group) -> tuple[dict, object]:
    """name -> function that runs forward and backward and returns the loss; and the trained modules."""
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    hf.config.use_cache = False
    hf.train()
    checkpoint_activations(hf, args.kept_layers, args.kept_vision_layers)
    lm_forward, conv_forward = hf.lm_head.forward, hf.model.visual.patch_embed.proj.forward
    vision_default = hf.model.visual.config._attn_implementation
    decoder = hf.model.language_model
    deepstack = decoder._deepstack_process
    model = PackedModel(hf, normalisation=NORMALISATION, fused=args.fused)
    ours = (hf.lm_head.forward, hf.model.visual.patch_embed.proj.forward)
    ours_deepstack = decoder._deepstack_process

    def use(library: bool, vision: str | None = None) -> None:
        head, conv = (lm_forward, conv_forward) if library else ours
        hf.lm_head.forward, hf.model.visual.patch_embed.proj.forward = head, conv
        hf.model.visual.config._attn_implementation = vision or vision_default
        decoder._deepstack_process = deepstack if library else ours_deepstack
        decoder.config._attn_implementation = "sdpa" if library else PACKED

    def ours_run(backend: str, rows: bool):
        def run() -> float:
            use(False, choose_vision_attention(backend, device, dtype))
            return packed_loss(model, group, backend, device, rows=rows, backward=lambda loss: loss.backward())

        return run

    def library_run() -> float:
        use(True)
        return library_loss(hf, group, device)

    def with_options(options: dict):
        packed = ours_run("flex", False)

        def run() -> float:
            usual, group_attention.FLEX_OPTIONS = group_attention.FLEX_OPTIONS, options
            try:
                return packed()
            finally:
                group_attention.FLEX_OPTIONS = usual

        return run

    variants = {f"flex {text}": with_options(json.loads(text)) for text in args.flex_options}
    for name in args.attention:
        try:
            backend = choose_attention(name, device, dtype)
        except ValueError as error:
            raise SystemExit(f"scripts/bench_packed.py: {error}") from None
        variants[f"packed/{backend}"] = ours_run(backend, False)
        if args.rows:
            variants[f"rows/{backend}"] = ours_run(backend, True)
    if args.library:
        variants["rows/hf"] = library_run
    return variants, hf


def check(variants: dict, hf) -> dict[str, dict[str, float]]:
    """Print loss and gradients of each variant against the last one (the plainest) -> their distances."""
    distances = {}
    reference_name = list(variants)[-1]
    names = [reference_name, *[name for name in variants if name != reference_name]]
    reference: dict[str, torch.Tensor] = {}
    for name in names:
        hf.zero_grad(set_to_none=True)
        loss = variants[name]()
        if name == reference_name:
            # On the host: a second set of gradients on the device would count as somebody's peak.
            reference = {n: p.grad.detach().to("cpu", torch.float32) for n, p in hf.named_parameters()}
            print(f"check {name}: loss {loss:.6f} (reference)", flush=True)
            continue
        errors = {
            n: ((p.grad.to("cpu", torch.float32) - reference[n]).norm() / reference[n].norm().clamp_min(1e-30)).item()
            for n, p in hf.named_parameters()
        }
        worst = max(errors, key=errors.get)
        distances[name] = {"median": statistics.median(errors.values()), "max": errors[worst]}
        q_proj = next(error for n, error in errors.items() if "layers.0.self_attn.q_proj.weight" in n)
        print(
            f"check {name}: loss {loss:.6f}; gradients differ from {reference_name} by median "
            f"{statistics.median(errors.values()):.2e}, first q_proj {q_proj:.2e}, at most {errors[worst]:.2e} ({worst})",
            flush=True,
        )
    hf.zero_grad(set_to_none=True)
    return distances


def measure(variants: dict, hf, args, device, flops: float) -> list[dict]:
    """Interleaved rounds; medians after the check's warm-up."""
    cuda = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks = dict.fromkeys(variants, 0.0)
    for _ in range(args.rounds):
        for name, run in variants.items():
            hf.zero_grad(set_to_none=True)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 2**30)
            times[name].append(time.perf_counter() - start)
    peak_flops = bf16_peak_flops(torch.cuda.get_device_name()) if cuda else None
    slowest = max(statistics.median(values) for values in times.values())
    rows = []
    print(f"{'variant':16} {'median s':>9} {'spread':>15} {'speed-up':>9} {'TFLOP/s':>8} {'MFU':>6} {'peak GiB':>9}")
    for name, values in times.items():
        median = statistics.median(values)
        mfu = f"{flops / median / peak_flops:6.1%}" if peak_flops else "   n/a"
        spread = f"{min(values):.3f}-{max(values):.3f}"
        peak = f"{peaks[name]:9.1f}" if cuda else "      n/a"
        print(
            f"{name:16} {median:9.3f} {spread:>15} {slowest / median:8.2f}x {flops / median / 1e12:8.2f} {mfu} {peak}"
        )
        rows.append({"variant": name, "median_s": median, "times_s": values, "peak_gib": peaks[name] if cuda else None})
    return rows


def longest_kernels(run, hf, device) -> str:
    """torch.profiler's table of one run of a variant, longest kernels first (on a CPU: operators)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    hf.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    return kernel_table(profiler, cuda, rows=40)


def run_zero3(args, config, device, dtype, group, flops: float) -> None:
    """The packed update through Policy: ZeRO-3, clipping and the optimiser's step, by phase."""
    from train import distributed
    from train.policy import build_policy

    device = distributed.init(device=device.type)
    distributed.init_deepspeed(device)
    with tempfile.TemporaryDirectory() as folder:
        if distributed.is_main():
            torch.manual_seed(0)
            with torch.device(device):
                AutoModelForImageTextToText.from_config(config, dtype=dtype).save_pretrained(folder)
        box = [folder]
        torch.distributed.broadcast_object_list(box)
        settings = argparse.Namespace(
            model=box[0], dtype="bf16" if dtype == torch.bfloat16 else "fp32", attention=args.attention[0],
            optimizer="adamw", learning_rate=1e-6, weight_decay=0.01, adam_betas=(0.9, 0.999), adam_eps=1e-8,
            max_grad_norm=1.0, gradient_checkpointing=True, deepspeed_config=args.deepspeed_config, seed=0,
            fused=args.fused, kept_layers=args.kept_layers, kept_vision_layers=args.kept_vision_layers,
            resident_parameters=args.resident_parameters,
        )  # fmt: skip
        policy = build_policy(settings, device=device, normalisation=NORMALISATION)
        distributed.barrier("model loaded")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "step": [], "no-grad forward": []}
    tokens = sum(len(response.token_ids) for response in group.responses)
    for number in range(args.rounds + 2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        marks = [time.perf_counter()]
        for _ in range(args.groups):
            logprobs, _ = policy.logprobs([group])
            wait()
            marks.append(time.perf_counter())
            policy.backward(-logprobs.sum() / tokens / args.groups / distributed.world_size())
            wait()
            marks.append(time.perf_counter())
        report = policy.step(1e-6)
        wait()
        marks.append(time.perf_counter())
        with torch.no_grad():
            policy.logprobs([group])
        wait()
        marks.append(time.perf_counter())
        if number < 2:
            continue
        gaps = np.diff(marks)
        phases["forward"].append(float(gaps[0 : 2 * args.groups : 2].sum()))
        phases["backward"].append(float(gaps[1 : 2 * args.groups : 2].sum()))
        phases["step"].append(float(gaps[-2]))
        phases["no-grad forward"].append(float(gaps[-1]))
    profiler = cProfile.Profile()
    with profiler:  # one more update, for the calls alone: it is slower
        for _ in range(args.groups):
            logprobs, _ = policy.logprobs([group])
            policy.backward(-logprobs.sum() / tokens / args.groups / distributed.world_size())
        policy.step(1e-6)
    if distributed.is_main():
        calls = sum(entry.callcount for entry in profiler.getstats())
        medians = {name: statistics.median(values) for name, values in phases.items()}
        update = medians["forward"] + medians["backward"] + medians["step"]
        line = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items())
        print(f"zero3 {policy.attention}, {args.groups} groups per update: {line}; norm {report['grad_norm']:.3g}")
        print(f"  update {update:.3f} s, {args.groups * flops / update / 1e12:.1f} useful TFLOP/s per rank")
        print(
            f"  {calls:,} Python calls per update, parameters {'resident' if policy.resident else 'gathered by module'}"
        )
        if device.type == "cuda":
            print(f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            moved = policy.park()
            start = time.perf_counter()
            policy.unpark()
            print(f"  parked {moved / 2**30:.1f} GiB; back in {time.perf_counter() - start:.2f} s")
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="tiny", help="shape of the Qwen3-VL; weights are random")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers, to shorten a check (default: all)")
    parser.add_argument(
        "--attention", nargs="+", default=["auto"], help="backends: auto sdpa flex cudnn varlen flash2 flash4"
    )
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--prompt_tokens", type=int, default=None, help="about; default 16000, tiny 600")
    parser.add_argument("--frames", type=int, default=None, help="of the video; default 128, tiny 16")
    parser.add_argument("--group_size", type=int, default=8, help="responses")
    parser.add_argument("--response_tokens", type=int, default=None, help="of each; default 400, tiny 40")
    parser.add_argument("--ragged", action="store_true", help="log-normal lengths around that median")
    parser.add_argument(
        "--fused", action="store_true", help="compiled norms, rotations and gated products (train/fused.py)"
    )
    parser.add_argument("--kept_layers", type=int, default=0, help="last decoder layers that are not recomputed")
    parser.add_argument("--kept_vision_layers", type=int, default=0, help="the same for the vision tower")
    parser.add_argument("--profile", action="store_true", help="then show the longest kernels of the first variant")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs per variant")
    parser.add_argument("--rows", action=argparse.BooleanOptionalAction, default=True, help="also our kernels in rows")
    parser.add_argument("--library", action=argparse.BooleanOptionalAction, default=True, help="also rows/hf")
    parser.add_argument("--zero3", action="store_true", help="measure the update through DeepSpeed ZeRO-3 instead")
    parser.add_argument("--groups", type=int, default=4, help="with --zero3: groups per update, one micro-batch each")
    parser.add_argument(
        "--resident_parameters", choices=("auto", "on", "off"), default="auto", help="with --zero3: as in train/main.py"
    )
    parser.add_argument("--deepspeed_config", default=None, help="with --zero3: JSON merged over the settings")
    parser.add_argument("--flex_static", action="store_true", help="compile FlexAttention per length, not for all")
    parser.add_argument(
        "--flex_options", nargs="+", default=[], metavar="JSON",
        help="further packed variants with these kernel_options of FlexAttention instead of ours: '{}' for torch's own",
    )  # fmt: skip
    parser.add_argument("--out", default=None, help="write the measurements here as JSON")
    args = parser.parse_args()
    tiny = args.size in SMALL
    args.prompt_tokens = args.prompt_tokens or (600 if tiny else 16000)
    args.frames = args.frames or (16 if tiny else 128)
    args.response_tokens = args.response_tokens or (40 if tiny else 400)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    group_attention.FLEX_DYNAMIC = not args.flex_static
    config = make_config(args.size, args.layers)
    group = make_group(args, config, seed=0)
    lengths = [len(response.token_ids) for response in group.responses]
    flops = group_flops(read_shape(config), len(group.prompt.input_ids), lengths, group.prompt.grid_thw)
    print(
        f"{args.size} {dtype} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch "
        f"{torch.__version__}: prompt {len(group.prompt.input_ids)} tokens ({len(group.prompt.patches)} patches), "
        f"responses {lengths}, useful {flops / 1e12:.2f} TFLOP per group",
        flush=True,
    )
    if args.zero3:
        return run_zero3(args, config, device, dtype, group, flops)
    variants, hf = make_variants(args, config, device, dtype, group)
    gradients = check(variants, hf)
    rows = measure(variants, hf, args, device, flops)
    if args.profile:
        print(longest_kernels(next(iter(variants.values())), hf, device))
    if args.out:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        content = {"flops": flops, "device": name, "args": vars(args), "gradients": gradients, "variants": rows}
        Path(args.out).write_text(json.dumps(content, indent=1))
    return None


if __name__ == "__main__":
    main()
