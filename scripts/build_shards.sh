#!/usr/bin/env bash
# Builds a dataset; paths are relative to where you are.
#   scripts/build_shards.sh digits
#   scripts/build_shards.sh folder --source ~/pets --out data/pets --shorter-side 256
#   scripts/build_shards.sh digits --help
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# What setup installs last: one that was cut off goes on.
[ -x "$root/.venv/bin/tailstream" ] || "$root/scripts/setup.sh"
# -P: a folder called shards where you are is not this program.
exec env PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$root/.venv/bin/python" -P -m shards build "$@"
