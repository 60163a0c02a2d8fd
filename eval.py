"""Evaluate runs of sd.py on problems they never saw.

  python eval.py runs/critique runs/reference runs/grpo       base and runs side by side, same problems, same seeds

For each: Avg@k (mean accuracy), Pass@k (share of problems solved at least once), Maj@k (share whose most frequent answer is
right), mean length in tokens, share cut off, share without a readable answer. Every figure has a 95 % bootstrap interval over
problems; differences are paired by problem.
"""
import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers

import sd

METRICS = {"Avg": 100, "Pass": 100, "Maj": 100, "length": 1, "truncated": 100, "unparsable": 100}  # name: shown times
SEED = 1_000_003  # of every evaluation, so that base and runs draw from the same uniforms; not a training seed


def evaluate(chat: sd.Chat, problems: list[sd.Problem], cfg: sd.Config, seed: int = SEED) -> list[list[dict]]:
    """cfg.eval_samples attempts at each problem: a list for each problem of {text, answer, correct, length, truncated}."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = sd.attempt(chat, [problem for problem in problems for _ in range(cfg.eval_samples)], cfg, generator)
    records = [
        {
            "text": r.text, "answer": sd.extract_answer(r.text), "correct": bool(r.reward),
            "length": len(r.sample.ids), "truncated": r.sample.truncated,
        }
        for r in rollouts
    ]  # fmt: skip
    return [records[i : i + cfg.eval_samples] for i in range(0, len(records), cfg.eval_samples)]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased share of k-subsets of n attempts that hold a correct one (Chen et al. 2021): 1 − C(n−c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(attempts: list[dict]) -> float:
    """1 if the most frequent answer is right; a tie counts by the share of tied answers that are right. No answer, no vote."""
    votes: dict[object, list[bool]] = defaultdict(list)
    for a in attempts:
        if a["answer"] is not None:
            number = sd.as_number(a["answer"])
            votes[sd.normalise(a["answer"]) if number is None else number].append(a["correct"])
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([votes[0] for votes in votes.values() if len(votes) == most])) if votes else 0.0


def scores(attempts: list[list[dict]]) -> dict[str, np.ndarray]:
    """Each metric as one value a problem, (problems,); its mean is the metric, its spread the interval."""
    share = lambda of: np.array([np.mean([of(a) for a in own]) for own in attempts])
    return {
        "Avg": share(lambda a: a["correct"]),
        "Pass": np.array([pass_at_k(len(own), sum(a["correct"] for a in own), len(own)) for own in attempts]),
        "Maj": np.array([maj_at_k(own) for own in attempts]),
        "length": share(lambda a: a["length"]),
        "truncated": share(lambda a: a["truncated"]),
        "unparsable": share(lambda a: a["answer"] is None),
    }


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, over the first axis; seeded, so that a table repeats to the digit."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def cell(values: np.ndarray, scale: float) -> str:
    low, high = interval(values)
    return f"{scale * values.mean():.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def table(results: dict[str, dict[str, np.ndarray]], samples: int) -> str:
    """Markdown: a row for the base and each run, then the paired differences."""
    names = [f"{name}@{samples}" if name in ("Avg", "Pass", "Maj") else name + (", %" if METRICS[name] > 1 else "") for name in METRICS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for run, values in results.items():
        lines.append(f"| {run} | " + " | ".join(cell(values[m], scale) for m, scale in METRICS.items()) + " |")
    runs = list(results)
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            paired = (cell(results[b][m] - results[a][m], scale) for m, scale in METRICS.items())
            lines.append(f"| {b} − {a} | " + " | ".join(paired) + " |")
    return "\n".join(lines)


def closing_report(chat: sd.Chat, problems: list[sd.Problem], cfg: sd.Config) -> str:
    """What sd.py prints at its end: base (adapter off) → trained, on held-out problems, same seeds."""
    with sd.adapters_off(chat.model):
        before = scores(evaluate(chat, problems, cfg))
    after = scores(evaluate(chat, problems, cfg))
    k = cfg.eval_samples
    lines = [f"held out: {len(problems)} problems × {k} attempts; 95 % bootstrap intervals over problems; seed {SEED}"]
    for name, scale in METRICS.items():
        label = f"{name}@{k}" if name in ("Avg", "Pass", "Maj") else name
        lines.append(
            f"{label} {scale * before[name].mean():.1f} → {scale * after[name].mean():.1f}   "
            f"{cell(before[name], scale)} → {cell(after[name], scale)}, paired {cell(after[name] - before[name], scale)}"
        )
    return "\n".join(lines)


def load_run(folder: str, checkpoint: str) -> tuple[sd.Config, dict]:
    """(config, adapters) of a run folder."""
    state = sd.load_checkpoint(Path(folder) / checkpoint)
    return sd.Config(**state["config"]), state["adapters"]


def evaluate_runs(folders: list[str], checkpoint: str, count: int | None, samples: int | None, out: Path) -> str:
    """The table of the base and the runs; all generations go to out/eval.jsonl, the table to out/eval.md."""
    runs = {folder: load_run(folder, checkpoint) for folder in folders}
    base = runs[folders[0]][0]
    for folder, (cfg, _) in runs.items():
        for name in ("model", "data", "prompts", "test_problems", "validation_problems", "temperature", "max_new_tokens"):
            if getattr(cfg, name) != getattr(base, name):
                raise sd.Refusal(f"{folder} and {folders[0]} differ in {name}: they cannot share a table")
    base = sd.replace(base, eval_samples=samples or base.eval_samples)
    problems = sd.load_problems(base, sd.load_model(base.model, base.dtype, base.device)).test[:count]
    attempts = {}
    for name in ["base", *folders]:
        chat = sd.load_model(base.model, base.dtype, base.device)
        if name != "base":
            cfg, adapters = runs[name]
            sd.add_adapters(chat.model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
            sd.load_adapters(chat.model, adapters)
        attempts[name] = evaluate(chat, problems, base)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "eval.jsonl", "w", encoding="utf-8") as file:
        for name, rows in attempts.items():
            for problem, own in zip(problems, rows):
                for a in own:
                    file.write(json.dumps({"run": name, "problem": problem.question, "wanted": problem.answer, **a}) + "\n")
    text = f"{len(problems)} held-out problems × {base.eval_samples} attempts, {checkpoint}, seed {SEED}; 95 % bootstrap intervals over problems\n\n"
    text += table({Path(name).name: scores(rows) for name, rows in attempts.items()}, base.eval_samples) + "\n"
    (out / "eval.md").write_text(text, "utf-8")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders written by sd.py")
    parser.add_argument("--checkpoint", default="checkpoint.pt", help="file in each run folder: checkpoint.pt (last) or best.pt")
    parser.add_argument("--samples", type=int, help="attempts a problem, k [the run's --eval-samples]")
    parser.add_argument("--problems", type=int, help="use the first so many test problems [all]")
    parser.add_argument("--out", help="folder for eval.md and eval.jsonl [the first run's parent]")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        out = Path(args.out or Path(args.runs[0]).parent)
        print(evaluate_runs(args.runs, args.checkpoint, args.problems, args.samples, out))
        return 0
    except sd.Refusal as refusal:
        print(f"eval.py: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
