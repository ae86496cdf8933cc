#!/usr/bin/env bash
# Makes .venv, a Python environment with tailstream and everything it needs. Safe to run again: it does
# nothing when the environment is already what requirements.txt and pyproject.toml ask for.
#   scripts/setup.sh --test                what the tests need, too (requirements-test.txt)
#   PYTHON=python3.12 scripts/setup.sh     use another Python (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

case "${1-}" in
    "") requirements=requirements.txt ;;
    --test) requirements=requirements-test.txt ;;
    *) die "unknown argument $1; there is only --test" ;;
esac

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}; install one or name it: PYTHON=/path/to/python $0"
}

# pillow-simd is compiled here: that takes a C compiler, Python's own headers, zlib and libjpeg.
can_build_pillow_simd() {
    local include
    include=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    printf '#include <Python.h>\n#include <stdio.h>\n#include <zlib.h>\n#include <jpeglib.h>\nint main(void) { return 0; }\n' |
        ${CC:-cc} -I"$include" -x c -o /dev/null - -lz -ljpeg 2>/dev/null
}

install_build_needs() {
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null || return 1
    say "installing what pillow-simd's build needs (gcc, zlib, libjpeg, libwebp)"
    { "${as_root[@]}" apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq gcc libc6-dev zlib1g-dev libjpeg-dev libwebp-dev; } >/dev/null 2>&1
}

if [ -n "${PYTHON-}" ] && [ -x .venv/bin/python ] && [ "$(.venv/bin/python --version)" != "$($PYTHON --version)" ]; then
    die ".venv has $(.venv/bin/python --version), and PYTHON=$PYTHON is another; remove .venv to make it with that"
fi
[ -x .venv/bin/python ] || { python=$(find_python); say "creating .venv with $python"; "$python" -m venv .venv; }

# Whether everything is there, and one PIL alone. (Importing torch would take seconds.)
is_whole() {
    [ -x .venv/bin/tailstream ] || return 1
    # In a moved or copied checkout the programs still start the old one's Python.
    local home
    home=$(sed -n '1s|^#!\(.*/\.venv/bin\)/python.*|\1|p' .venv/bin/tailstream)
    [ -z "$home" ] || [ "$home" -ef .venv/bin ] || return 1
    .venv/bin/python - <<'EOF' 2>/dev/null
import importlib.metadata
import importlib.util

import PIL

assert importlib.util.find_spec("torch") and importlib.metadata.version("tailstream")
both = [importlib.metadata.distribution(name) for name in ("pillow", "pillow-simd")]
(installed,) = [found for found in both if found.read_text("INSTALLER").strip() != "setup.sh"]
assert PIL.__version__ == installed.version
EOF
}

# pillow-simd and Pillow are two builds of one package, and others ask for the one or the other by its name. An entry
# without files under the name that is not installed keeps pip quiet, and keeps a later installation (of timm, of
# tensorboard) from putting one over the other.
claim_the_name() { # NAME VERSION
    .venv/bin/python - "$@" <<'EOF'
import pathlib
import sys
import sysconfig

name, version = sys.argv[1:]
folder = pathlib.Path(sysconfig.get_paths()["purelib"], f"{name.replace('-', '_')}-{version}.dist-info")
files = {
    "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: the other build is installed\n",
    "INSTALLER": "setup.sh\n",
}
files["RECORD"] = "".join(f"{folder.name}/{file},,\n" for file in (*files, "RECORD"))
folder.mkdir(exist_ok=True)
for file, text in files.items():
    (folder / file).write_text(text)
EOF
}

# Whether Pillow stands in for a pillow-simd that could be built by now.
could_be_faster() {
    grep -qs '^setup.sh' .venv/lib/python3*/site-packages/pillow_simd-*.dist-info/INSTALLER &&
        [ "$(uname -m)" = x86_64 ] && can_build_pillow_simd
}

# An environment that fits the tests fits everything.
stamp_of() { echo ".venv/tailstream-$(cat "$1" pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)"; }
stamp=$(stamp_of $requirements)
if { [ -e "$stamp" ] || [ -e "$(stamp_of requirements-test.txt)" ]; } && is_whole && ! could_be_faster; then
    exit 0
fi
rm -f .venv/tailstream-*

if command -v uv >/dev/null; then uv=uv; else
    # A .venv whose making was cut off has no pip yet.
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
        die "$(.venv/bin/python --version) has no ensurepip (on Debian: apt install python3-venv); then remove .venv and start again"
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    uv=.venv/bin/uv
fi
# --no-deps: the files are complete, and torchvision's wish for Pillow would overwrite pillow-simd.
# --no-config: pyproject.toml tells uv to leave Pillow out, which is wrong where it has to stand in.
install() { "$uv" pip install --quiet --no-config --python .venv/bin/python --no-deps "$@"; }
uninstall() { "$uv" pip uninstall --quiet --no-config --python .venv/bin/python "$1" 2>/dev/null || true; }

wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
pillow_simd=$(grep '^pillow-simd==' $requirements)
simd_version=${pillow_simd#*==}
version=${simd_version%.post*} # pillow-simd 12.1.1.post0 is a build of Pillow 12.1.1
grep -v '^pillow-simd==' $requirements >"$wanted"
say "installing $(grep -c '==' "$wanted") packages (some GB the first time)"
install -r "$wanted"
if [ "$(uname -m)" = x86_64 ] && { can_build_pillow_simd || { install_build_needs && can_build_pillow_simd; }; }; then
    uninstall pillow # or its entry
    .venv/bin/python -c 'from PIL import Image' 2>/dev/null || uninstall pillow-simd # their files have the same names
    if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then CC="${CC:-cc} -mavx2" install "$pillow_simd"; else install "$pillow_simd"; fi
    claim_the_name pillow "$version"
else
    say "pillow-simd cannot be built here (it needs x86-64, a C compiler, Python.h, zlib and libjpeg headers)"
    say "using ordinary Pillow instead: pictures differ by a grey level here and there, and building shards takes about twice as long"
    uninstall pillow-simd
    .venv/bin/python -c 'from PIL import Image' 2>/dev/null || uninstall pillow
    install "pillow==$version"
    claim_the_name pillow-simd "$simd_version"
fi
install --editable .
# Written down once what Python compiles, also where PYTHONDONTWRITEBYTECODE is set, as in many containers: there each
# process would compile torch again and start in twice the time.
PYTHONDONTWRITEBYTECODE='' .venv/bin/python -c '
import analysis.report, pipeline.dali_loader, pipeline.torch_loader, shards.build, timm, torchvision
import train.engine.session, train.features.stage_two, train.networks.timm_models
'
pil=$(.venv/bin/python -c 'import PIL; print(PIL.__version__)')
say "PIL is version $pil (pillow-simd where it ends in .post…)"
touch "$stamp"
say "ready; to use it: source .venv/bin/activate"
