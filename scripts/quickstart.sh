#!/usr/bin/env bash
# The whole job on a fresh machine, in some minutes on two cores: sets up, makes scikit-learn's digits long-tailed,
# trains the baseline (CE) and BBN, runs the second stage (AFG), compares them, and writes a page with figures.
# It leaves data/digits and runs/quickstart, which a second run makes anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

runs=runs/quickstart
rm -rf "$runs"
# What accelerate would otherwise warn that it assumes.
launch() { accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"; }
step() { printf '\n== %s\n' "$*"; }

step "1/5 digits, made long-tailed: data/digits"
scripts/build_shards.sh digits --profile exp --imbalance-factor 20
step "2/5 the baseline: one branch, cross-entropy"
launch train/erm.py --data data/digits --run "$runs/ce"
step "3/5 BBN: two branches, two streams"
launch train/bbn.py --data data/digits --run "$runs/bbn"
step "4/5 AFG: generated tail features for BBN's classifier"
launch train/afg.py --from "$runs/bbn" --run "$runs/afg"
step "5/5 the report"
python -m analysis report "$runs/ce" "$runs/bbn" "$runs/afg" --out "$runs/report.html"
echo
python -m analysis compare "$runs/ce" "$runs/bbn" "$runs/afg"
