#!/usr/bin/env bash
# The whole job on a fresh machine, in some minutes on two cores: sets up, makes scikit-learn's digits long-tailed and,
# for three seeds each, trains the baseline (CE) and BBN and runs the second stage (AFG); then compares them and writes
# a page with figures. It leaves data/digits and runs/quickstart, which a second run makes anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

seeds=3
runs=runs/quickstart
rm -rf "$runs"
mkdir -p "$runs"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # cut off, it leaves no training behind
step() { printf '\n== %s\n' "$*"; }
# The options are what accelerate would otherwise warn that it assumes. Small images gain nothing from several
# threads, so the two trainings share the cores instead.
launch() {
    OMP_NUM_THREADS=1 accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"
}

step "digits, made long-tailed: data/digits"
scripts/build_shards.sh digits

all=()
for ((seed = 0; seed < seeds; seed++)); do
    folder=$runs
    [ "$seed" = 0 ] || folder=$runs/seed-$seed
    step "seed $seed: the baseline (one branch, cross-entropy), beside BBN (two branches, two streams)"
    launch train/erm.py --data data/digits --run "$folder/ce" --loop.seed "$seed" >"$runs/ce-$seed.log" 2>&1 &
    baseline=$!
    launch train/bbn.py --data data/digits --run "$folder/bbn" --loop.seed "$seed"
    wait "$baseline" || { cat "$runs/ce-$seed.log"; exit 1; }
    tail -n 2 "$runs/ce-$seed.log"
    step "seed $seed: AFG (generated tail features for BBN's classifier)"
    launch train/afg.py --from "$folder/bbn" --run "$folder/afg" --loop.seed "$seed"
    all+=("$folder/ce" "$folder/bbn" "$folder/afg")
done

step "the report"
python -m analysis report "${all[@]}" --out "$runs/report.html"
echo
python -m analysis compare "${all[@]}"
