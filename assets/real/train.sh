#!/bin/bash
# Train on SVAMP: the scripted critique under both divergences, its controls, GRPO, the reference,
# and critiques by a language model.
#
#   bash assets/real/train.sh MODEL CRITIC [more flags of sd.py]
#
# A script that was interrupted goes on where it was.
set -e
model=$1
critic=$2
more=("${@:3}")
runs=()

train() {  # name, condition, divergence, learning rate, seed, more flags
    out=runs/svamp/$1-seed$5
    resume=()
    [ ! -f "$out/checkpoint.pt" ] || resume=(--resume)
    python assets/real/svamp.py sd.py --condition "$2" --kl "$3" --lr "$4" --seed "$5" --out "$out" \
        --model "$model" --data assets/real/svamp.jsonl --prompts plain \
        --temperature 1.0 --max-new-tokens 256 --test-problems 200 --attempts-per-step 8 --steps 20 \
        --closing-problems 0 "${@:6}" "${resume[@]}" "${more[@]}"
    runs+=("$out")
}

eq4='student||teacher'
eq5='teacher||student'
train scripted-eq4 scripted "$eq4" 1e-5 0
train scripted-eq5 scripted "$eq5" 1e-5 0
train copy-eq4 copy "$eq4" 1e-5 0
train grpo grpo "$eq4" 3e-5 0
train filtered-eq4 filtered "$eq4" 1e-5 0 --critic "$critic"
train reference-eq4 reference "$eq4" 1e-5 0 --data assets/real/svamp-worked.jsonl
train edits-eq4 edits "$eq4" 1e-5 0
train copy-eq5 copy "$eq5" 1e-5 0
train scripted-eq4 scripted "$eq4" 1e-5 1
train scripted-eq5 scripted "$eq5" 1e-5 1
python assets/real/svamp.py eval.py "${runs[@]}" --problems 100 --samples 2 --out runs/svamp
