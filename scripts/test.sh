#!/usr/bin/env bash
# Sets up, checks format, lint and types, and runs the tests: all of them on every core, or those that are named.
#   scripts/test.sh [pytest arguments]     such as: scripts/test.sh tests/pipeline -k reversed
#   scripts/test.sh -m slow                every method trained on the digits: a quarter of an hour on a free core
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --test
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check --quiet . || { echo "test: run: .venv/bin/ruff format ." >&2; exit 1; }
ruff check --quiet .
mypy
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start, and each would compile what it imports
cores=$(python -c 'from shards.cores import cores; print(cores())') # as many as a container may use
# A process of a test takes one thread: with more, several at once would wait for each other most of the time.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# One more than there are cores: much of a test's time goes into waiting for processes that it starts. Neighbours stay
# together as long as they can: they share what is slow to make.
if [ $# = 0 ]; then
    set -- --numprocesses "$((cores + 1))" --dist worksteal
    if nvidia-smi -L >/dev/null 2>&1; then
        # What is not marked gpu is of the CPU: bits, and ranks that share a machine. What is marked runs alone.
        CUDA_VISIBLE_DEVICES='' python -m pytest "$@" -m 'not slow and not gpu'
        set -- -m gpu
    fi
fi
exec python -m pytest "$@"
