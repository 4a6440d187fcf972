#!/bin/sh
# Creates $VENV and installs raysys into it, versions fixed by constraints.txt.
# Without an NVIDIA GPU it takes the CPU build of torch: the default Linux wheel brings several GB of CUDA.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
CPU_INDEX=https://download.pytorch.org/whl/cpu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "raysys needs Python 3.11 or newer, found: $("$PYTHON" --version); try: make PYTHON=python3.12 install" >&2
    exit 1
}
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

torch_flags=
if ! command -v nvidia-smi >/dev/null 2>&1; then
    # An index that cannot be reached costs pip a minute of retries, so ask first.
    if "$PYTHON" -c "import urllib.request as u; u.urlopen('$CPU_INDEX/torch/', timeout=5)" 2>/dev/null; then
        torch_flags="--extra-index-url $CPU_INDEX"
    fi
fi
echo "installing raysys and its dependencies into $VENV (about a minute)"
# shellcheck disable=SC2086
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt $torch_flags -e '.[dev]'
