#!/usr/bin/env bash
# Plans, costs, trains, resumes and tabulates a table of a paper on your data: scripts/reproduce.sh bbn-1 --data DIR
#   scripts/reproduce.sh --list            which tables there are
#   scripts/reproduce.sh TABLE --dry-run   what it would train, and how long that takes
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -x "$here/.venv/bin/python" ]; then export PATH="$here/.venv/bin:$PATH"; fi
exec env PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" python "$here/scripts/reproduce.py" "$@"
