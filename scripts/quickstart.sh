#!/usr/bin/env bash
# The whole job on a fresh machine, in two to four minutes on two cores after installation: sets up, makes
# scikit-learn's digits long-tailed (some 120 images of each of five classes, 3 of each of the others) and, for two seeds
# each, trains the baseline (CE) and BBN and runs the second stage (AFG); then compares them and writes a page with
# figures. It leaves data/quickstart, and runs/quickstart, which a second run makes again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

seeds="0 1"
# A third of the preset's epochs, which fits the time. Tried on another split and other seeds: analysis/results/quickstart.md
short=(--optim.epochs 20 --loop.eval_every 20)
data=data/quickstart
runs=runs/quickstart
log=$runs/ce-and-afg.log
rm -rf "$runs"
mkdir -p "$runs"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # cut off, it leaves no training behind

step() { printf '\n== %s\n' "$*"; }
folder() { if [ "$1" = 0 ]; then echo "$runs"; else echo "$runs/seed-$1"; fi; }
# Small images gain nothing from several threads, so one core trains BBN while another does the rest.
train() { OMP_NUM_THREADS=1 tailstream train "$@"; }
# A shell that is ended while a command runs in its foreground leaves that behind; one that waits for it does not.
train_and_wait() { OMP_NUM_THREADS=1 tailstream train "$@" & training=$!; wait "$training"; }
train_baselines_and_run_afg() {
    trap 'kill "${training-}" 2>/dev/null || true' EXIT
    trap 'exit 143' TERM
    for seed in $seeds; do
        train_and_wait erm --data "$data" --run "$(folder "$seed")/ce" --loop.seed "$seed" "${short[@]}"
    done
    for seed in $seeds; do
        until [ -e "$(folder "$seed")/bbn/summary.json" ]; do sleep 1; done
        train_and_wait afg --from "$(folder "$seed")/bbn" --run "$(folder "$seed")/afg" --loop.seed "$seed"
    done
}

step "digits, made long-tailed: $data"
tailstream build digits --profile step --imbalance-factor 40 --out "$data"

step "BBN (two branches, two streams); beside it, in $log:"
echo "   the baseline CE (one branch, cross-entropy), then AFG (generated tail features for BBN's classifier)"
train_baselines_and_run_afg >"$log" 2>&1 &
others=$!
for seed in $seeds; do
    train bbn --data "$data" --run "$(folder "$seed")/bbn" --loop.seed "$seed" "${short[@]}"
done
wait "$others" || { cat "$log"; exit 1; }
grep "last epoch" "$log"

step "the report"
all=()
for seed in $seeds; do
    for method in ce bbn afg; do all+=("$(folder "$seed")/$method"); done
done
tailstream report "${all[@]}" --out "$runs/report.html"
echo "   open it in a browser: file://$PWD/$runs/report.html"
echo
tailstream compare "${all[@]}"

step "now your own photographs, in a folder with a sub-folder per class:"
echo "   source .venv/bin/activate && tailstream build folder --source FOLDER --out data/mine"
