#!/bin/bash
# Train on SVAMP: the scripted critique under both divergences, the copy control, GRPO, the reference.
#
#   bash assets/real/train.sh MODEL [more flags of sd.py]
#
# A script that was interrupted goes on where it was.
set -e
model=$1
shift

train() {  # condition, divergence, learning rate, seed
    out=runs/svamp/$1-$2-lr$3-seed$4
    resume=()
    [ ! -f "$out/checkpoint.pt" ] || resume=(--resume)
    python assets/real/svamp.py sd.py --condition "$1" --kl "$2" --lr "$3" --seed "$4" --out "$out" \
        --model "$model" --critic self --data assets/real/svamp.jsonl --prompts plain \
        --temperature 1.0 --max-new-tokens 256 --test-problems 200 --attempts-per-step 8 --steps 20 \
        --closing-problems 0 "${resume[@]}" "${more[@]}"
    runs+=("$out")
}

more=("$@")
runs=()
train scripted 'student||teacher' 1e-5 0
train scripted 'teacher||student' 1e-5 0
train copy 'student||teacher' 1e-5 0
train copy 'teacher||student' 1e-5 0
train grpo 'student||teacher' 3e-5 0
train reference 'student||teacher' 1e-5 0
train scripted 'student||teacher' 1e-5 1
train scripted 'teacher||student' 1e-5 1
python assets/real/svamp.py eval.py "${runs[@]}" --problems 100 --samples 2 --out runs/svamp
