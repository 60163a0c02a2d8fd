"""Write a worked solution in words for every problem of a file: sample a model until it is right.

  python assets/real/worked.py MODEL PROBLEMS.jsonl OUT.jsonl

A problem is tried four times at most; where the answer is never right, the row keeps its solution.
`source` says which it is. A right answer does not prove that the words before it are right.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sd  # noqa: E402

TRIES = 4


def main(model: str, rows_file: str, out: str) -> None:
    cfg = sd.parse_config(
        ["--preset", "qwen", "--model", model, "--prompts", "plain", "--temperature", "0.7"]
        + ["--max-new-tokens", "256", "--sample-batch", "32", "--dtype", "bfloat16"]
    )
    chat = sd.load_model(model, cfg)
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    for row in rows:
        row["source"] = "data set"
    for k in range(TRIES):
        left = [(i, row) for i, row in enumerate(rows) if row["source"] == "data set"]
        problems = [(i, sd.read_row(row)) for i, row in left]
        for (_, row), rollout in zip(left, sd.attempt(chat, problems, cfg, seed=k)):
            if rollout.reward:
                row["solution"] = chat.reply(rollout.ids).strip()
                row["source"] = f"{Path(model).name}, attempt {k + 1}"
        # after every try, so that an interrupted run is not lost
        Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"attempt {k + 1}: {len(left)} tried", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
