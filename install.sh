#!/usr/bin/env bash
# Creates .venv and installs the pinned versions: install.sh [PYTHON]. Running it again only fills in what is missing.
# VENV=FOLDER takes another folder than .venv.
set -euo pipefail
cd "$(dirname "$0")"
export PIP_DISABLE_PIP_VERSION_CHECK=1
venv=${VENV:-.venv}

die() {
  echo "install.sh: $*" >&2
  exit 1
}

version() { # prints major.minor of a Python that really runs: a pyenv shim may exist and fail
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

supported() {
  case $(version "$1") in 3.9 | 3.10 | 3.11 | 3.12) ;; *) return 1 ;; esac
}

python=${1:-}
if [ -n "$python" ]; then
  supported "$python" || die "$python is not a Python from 3.9 to 3.12 that runs here."
else
  for candidate in "$venv/bin/python" python3.11 python3.12 python3; do
    if supported "$candidate"; then python=$candidate && break; fi
  done
  [ -n "$python" ] || die "no Python from 3.9 to 3.12 found; name one: make setup PYTHON=/path/to/python3.11"
fi

case $(version "$python") in
  3.9 | 3.10) constraints=constraints-stock.txt ;;
  *) constraints=constraints.txt ;;
esac
fairseq=$(grep '^fairseq' "$constraints")

if [ "$(version "$venv/bin/python" || true)" != "$(version "$python")" ]; then
  echo "Creating $venv with Python $(version "$python")"
  "$python" -m venv --clear "$venv" || die "$python cannot create a virtual environment (on Debian: apt install python3-venv)."
fi
pip=("$venv/bin/python" -m pip)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "Installing the versions of $constraints (some minutes the first time)"
grep -v '^fairseq' "$constraints" >"$scratch/requirements.txt"
"${pip[@]}" install -q -r "$scratch/requirements.txt"

if ! grep -qx "$fairseq" <<<"$("${pip[@]}" freeze)"; then
  # Both fairseqs ask pip for things that are not needed (torchaudio) or that pip refuses (omegaconf 2.0), so their
  # dependencies are installed above. Where no wheel is ready, their setup.py imports torch only to add C++ extensions
  # that nothing here uses; a stand-in leaves those out, and with them the hunt for a compiler that fits torch.
  echo "Installing $fairseq (about a minute where it is built from source)"
  mkdir -p "$scratch/torch/utils"
  touch "$scratch/torch/__init__.py" "$scratch/torch/utils/__init__.py"
  cat >"$scratch/torch/utils/cpp_extension.py" <<'STANDIN'
from setuptools import Extension
from setuptools.command.build_ext import build_ext


def CppExtension(name, **unused):
    return Extension(name, sources=[])


class BuildExtension(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.extensions = [extension for extension in self.extensions if extension.sources]
STANDIN
  "${pip[@]}" uninstall -q -y fairseq fairseq-fixed 2>/dev/null
  PYTHONPATH=$scratch "${pip[@]}" install -q --no-deps --no-build-isolation "$fairseq" ||
    die "building $fairseq failed; it needs a C compiler and Python's headers (on Debian: apt install gcc g++ python3-dev)."
fi

"${pip[@]}" install -q --no-deps --no-build-isolation -e .
touch "$venv/installed"
echo "Ready: $("$venv/bin/python" --version), $fairseq, in $venv"
