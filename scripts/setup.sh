#!/usr/bin/env bash
# Makes .venv with what this machine can use. Safe to run again: it does nothing when the requirements are unchanged.
#   bash scripts/setup.sh            CPU or GPU set, by what the machine has
#   REELRL_DEVICE=cpu|gpu            choose by hand;  REELRL_VENV=DIR  another place than .venv
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '[setup] %s\n' "$*"; }
venv=${REELRL_VENV:-.venv}
python=${REELRL_PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      python=$candidate; break
    fi
  done
fi
if [ -z "$python" ]; then
  say "ReelRL needs Python 3.11, 3.12 or 3.13; $(python3 --version 2>&1 || echo 'no python3') was found. Install one, or set REELRL_PYTHON=/path/to/python."
  exit 1
fi
device=${REELRL_DEVICE:-}
if [ -z "$device" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
fi
case "$device" in
  cpu) requirements=requirements-cpu.txt ;;
  gpu) requirements=requirements.txt ;;
  *) say "REELRL_DEVICE must be cpu or gpu, got '$device'"; exit 1 ;;
esac
stamp=$venv/.reelrl-$device-$(cat "$requirements" scripts/cpu/*/{pyproject.toml,*.py,*.pth} 2>/dev/null | sha256sum | cut -c1-16 || true)
if [ -e "$stamp" ]; then say "$venv is up to date ($requirements)"; exit 0; fi
start=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv with $("$python" --version)"
  if ! "$python" -m venv "$venv"; then
    say "python -m venv failed: install your distribution's venv package (Debian: apt-get install python3-venv)"; exit 1
  fi
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q "setuptools>=64,<82" wheel
extra=()
if [ "$device" = cpu ]; then
  torch_pin=$(grep '^torch==' requirements-cpu.txt)
  # The default index of most machines has only CUDA builds of torch, so look before installing.
  if "$venv/bin/python" -c "import torch, sys; sys.exit('torch==' + torch.__version__ != '$torch_pin')" 2>/dev/null \
     || "${pip[@]}" download -q --no-deps -d "$venv/.probe" "$torch_pin" >/dev/null 2>&1; then
    say "$torch_pin: found where pip already looks"
  else
    say "$torch_pin: not where pip looks by default; using PyTorch's CPU wheel index"
    extra=(--extra-index-url https://download.pytorch.org/whl/cpu)
  fi
fi
say "installing $requirements (a few minutes the first time)"
if [ -d "$venv/.probe" ]; then extra+=(--find-links "$venv/.probe"); fi
# setuptools is in the venv, so local packages and source packages build without fetching build requirements again.
"${pip[@]}" install -q --no-build-isolation "${extra[@]}" -r "$requirements"
rm -rf "$venv/.probe"
touch "$stamp"
say "done in $((SECONDS - start)) s"
