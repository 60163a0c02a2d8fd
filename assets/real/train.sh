#!/bin/bash
# Train on SVAMP with the scripted critic, the reference and GRPO, and compare them with the base.
#
#   bash assets/real/train.sh MODEL [more flags of sd.py]
#
# First a look: 5 steps of each condition at several learning rates. Then the rate with the best
# validation accuracy goes on to 25 steps. A script that was interrupted goes on where it was.
set -e
model=$1
shift
more=("$@")

train() {  # condition, learning rate, steps
    out=runs/svamp/$1-lr$2
    resume=()
    [ ! -f "$out/checkpoint.pt" ] || resume=(--resume)
    python assets/real/svamp.py sd.py --condition "$1" --lr "$2" --steps "$3" --out "$out" \
        --model "$model" --data assets/real/svamp.jsonl --prompts plain --temperature 1.0 \
        --max-new-tokens 256 --test-problems 200 --eval-every 5 --eval-samples 4 --save-every 1 \
        --show-every 5 --final-problems 0 --no-export "${resume[@]}" "${more[@]}"
}

for rate in 1e-5 3e-5 1e-4; do
    for condition in scripted reference grpo; do
        train $condition $rate 5
    done
done
train scripted 3e-5 25
train reference 1e-5 25
train grpo 3e-5 25
python assets/real/svamp.py eval.py runs/svamp/scripted-lr3e-5 runs/svamp/reference-lr1e-5 \
    runs/svamp/grpo-lr3e-5 --problems 100 --samples 4 --out runs/svamp
