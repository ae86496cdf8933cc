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
several=()
if [ $# = 0 ]; then several=(--numprocesses "$((cores + 1))" --dist worksteal); fi
if [[ " $* " != *" -m "* ]] && nvidia-smi -L >/dev/null 2>&1; then
    # What is not marked gpu is of the CPU: bits, and ranks that share a machine. What is marked runs alone.
    nothing=5 # pytest's status where none of the tests is of a kind
    status=0
    CUDA_VISIBLE_DEVICES='' python -m pytest "${several[@]}" "$@" -m 'not slow and not gpu' || status=$?
    if [ "$status" != 0 ] && [ "$status" != $nothing ]; then exit "$status"; fi
    on_gpu=0
    python -m pytest "$@" -m gpu || on_gpu=$?
    if [ "$on_gpu" = $nothing ]; then exit "$status"; fi
    exit "$on_gpu"
fi
exec python -m pytest "${several[@]}" "$@"
