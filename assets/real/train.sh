#!/bin/bash
# Train the three conditions on SVAMP with a scripted critic, then compare them with the base.
#
#   bash assets/real/train.sh MODEL PROBLEMS [more flags of sd.py]
#
# An interrupted arm goes on with its own command and --resume; a finished one is moved aside.
set -e
model=$1
problems=$2
shift 2
runs=""
for condition in scripted reference grpo; do
    python assets/real/svamp.py sd.py --condition $condition --model "$model" --data "$problems" \
        --prompts plain --temperature 1.0 --max-new-tokens 256 --test-problems 200 \
        --attempts-per-step 16 --group-size 4 --lr 2e-5 --steps 10 --save-every 1 \
        --final-problems 0 --no-export --out runs/svamp/$condition "$@"
    runs="$runs runs/svamp/$condition"
done
python assets/real/svamp.py eval.py $runs --problems 100 --samples 2
