"""Reproduce the results of the toy: every arm at its own best learning rate, then over seeds.

  python toy/reproduce.py --seeds 5        20 minutes on one core; goes on where it was stopped
  python toy/reproduce.py -- --steps 20    flags behind -- are sd.py's

An arm is a condition with flags. Each gets its learning rate from the same sweep, by seed 0 and the
validation problems, so the test problems stay unseen. One arm is a control: its context is a copy
of the attempt, in which nothing is corrected.

It writes table.md, table.json and curves.svg into the folder of the runs. Intervals are 95 %,
Student's t over seeds.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # sd.py and eval.py are one folder up
import eval as evaluation  # noqa: E402
import sd  # noqa: E402

# ---- 1. Arms. ------------------------------------------------------------------------------------

# the arms that are a condition without other flags: they are compared in pairs and plotted
MAIN = ("critique", "reference", "grpo", "copy")
# an arm's name in the tables, where || would end a cell, and its flags of sd.py
ARMS = {
    **{condition: ["--condition", condition] for condition in MAIN},
    "critique, teacher‖student": ["--condition", "critique", "--kl", "teacher||student"],
    "copy, teacher‖student": ["--condition", "copy", "--kl", "teacher||student"],
}
SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the preset's learning rate


def reproduce(root: Path, seeds: int, flags: list[str]) -> str:
    """Train all arms, or go on where an earlier call stopped. The tables."""
    plt = evaluation.load_pyplot()  # fails before the training if matplotlib is missing
    cfg = sd.parse_config(flags)
    runs, rates = {}, {}
    for arm in ARMS:
        swept = {}
        for factor in SWEEP:
            lr = cfg.lr * factor
            _, checks = evaluation.read_log(train_once(root, arm, lr, 0, flags))
            swept[lr] = checks[-1]["validation_avg"]
        best = max(swept, key=swept.get)
        by_rate = ", ".join(f"{lr:g} → {100 * avg:.1f}" for lr, avg in swept.items())
        print(f"{arm}: validation Avg by learning rate {by_rate}", flush=True)
        # a rate at the edge is marked, because a wider sweep might find a better one
        edge = best in (min(swept), max(swept))
        rates[arm] = f"{best:g}*" if edge else f"{best:g}"
        runs[arm] = [train_once(root, arm, best, seed, flags) for seed in range(seeds)]

    k = cfg.eval_samples
    base = mean_scores(cfg, None)
    heading = (
        f"{cfg.test_problems} test problems × {k} attempts, seeds 0–{seeds - 1}, {cfg.steps} steps "
        f"of {cfg.attempts_per_step} attempts; mean ± half of the 95 % t interval over seeds; * a "
        "rate at the edge of the sweep"
    )
    final = results_table("final", "checkpoint.pt", base, runs, rates, k)
    best = results_table("best on validation", "best.pt", base, runs, rates, k)
    text = "\n\n".join([heading, final, best, pairs_table(runs, k), costs_table(runs, k)]) + "\n"
    content = json.dumps({"rates": rates, "base": base, "runs": runs}, default=str, indent=1)
    (root / "table.md").write_text(text, "utf-8")
    (root / "table.json").write_text(content, "utf-8")
    figure = draw_curves(plt, {arm: read_curves(runs[arm]) for arm in MAIN})
    return f"{text}\n{evaluation.save_figure(figure, root / 'curves.svg')}"


# ---- 2. Runs. ------------------------------------------------------------------------------------

# a run of an earlier call is used if it differs from the wanted one in these knobs alone
FREE = {
    "preset", "out", "resume", "sample_batch", "micro_batch", "gradient_checkpointing", "device",
    "closing_problems",
}  # fmt: skip


def train_once(root: Path, arm: str, lr: float, seed: int, flags: list[str]) -> Path:
    """The folder of a run, which is trained, continued, or found finished."""
    name = "-".join(re.findall(r"\w+", arm))  # for any file system
    folder = root / f"{name}-lr{lr:g}-seed{seed}"
    cfg = sd.parse_config([*flags, *ARMS[arm]])
    every = cfg.eval_every or max(1, cfg.steps // 10)
    cfg = replace(cfg, lr=lr, seed=seed, out=str(folder), eval_every=every, closing_problems=0)
    if (folder / "checkpoint.pt").exists():
        checkpoint = sd.load_checkpoint(folder / "checkpoint.pt")
        for knob in vars(cfg).keys() - FREE:
            if getattr(checkpoint["config"], knob) != getattr(cfg, knob):
                raise sd.UserError(f"{folder} was trained with another {knob}; name another --out")
        step, _, _ = checkpoint["state"]
        if step == cfg.steps:
            return folder
        cfg = replace(cfg, resume=True)
    print(f"training {folder}", flush=True)
    # a line for every step of every run would bury the table
    with contextlib.redirect_stdout(io.StringIO()):
        sd.train(cfg)
    return folder


def test_scores(folders: list[Path], name: str, metric: str) -> np.ndarray:
    """A metric of each run on the test problems, kept beside the checkpoint."""
    values = []
    for folder in folders:
        kept = folder / f"test-{name}.json"
        if not kept.exists():
            checkpoint = sd.load_checkpoint(folder / name)
            kept.write_text(json.dumps(mean_scores(checkpoint["config"], checkpoint)), "utf-8")
        values.append(json.loads(kept.read_text("utf-8"))[metric])
    return np.array(values)


def mean_scores(cfg, checkpoint) -> dict[str, float]:
    """Each metric on the test problems, by the base or by a checkpoint."""
    problems = sd.load_problems(cfg, sd.load_model(cfg.model, cfg))
    groups = evaluation.attempt_test(cfg, problems, checkpoint)
    means = evaluation.scores(groups, cfg.grader).mean(1)
    return dict(zip(evaluation.METRICS, means.tolist()))


def read_curves(folders: list[Path]) -> dict[str, np.ndarray]:
    """Validation accuracy on the way, and the tokens sampled so far: each (runs, points)."""
    curves = {"step": [], "avg": [], "solver": [], "critic": []}
    for folder in folders:
        steps, checks = evaluation.read_log(folder)
        step = np.array([entry["step"] for entry in checks])
        curves["step"].append(step)
        curves["avg"].append([entry["validation_avg"] for entry in checks])
        # the log counts tokens by the step; a curve needs them from the start
        for name in ("solver", "critic"):
            spent = np.cumsum([entry[f"{name}_tokens"] for entry in steps])
            curves[name].append(spent[step - 1])
    curves = {name: np.array(rows) for name, rows in curves.items()}
    return {**curves, "sampled": curves["solver"] + curves["critic"]}


# ---- 3. Tables and figure. -----------------------------------------------------------------------

# Student's t at 97.5 %, for 2, 3, … seeds; beyond 10 that of 10, which is slightly too wide
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t interval of the mean over the first axis, the seeds."""
    n = len(values)
    if n == 1:
        # one seed says nothing about the spread
        return np.full(values.shape[1:], math.nan)
    return T_975[min(n, 10) - 2] * values.std(0, ddof=1) / math.sqrt(n)


def over_seeds(values: np.ndarray, scale: float = 100) -> str:
    return f"{scale * values.mean():.1f} ± {half_width(scale * values):.1f}"


def results_table(title: str, checkpoint: str, base: dict, runs: dict, rates: dict, k: int) -> str:
    """Test scores of the base, and of each arm with that checkpoint."""
    metrics = list(evaluation.METRICS.items())[:4]
    rows = [["base", "-", *(f"{scale * base[metric]:.1f}" for metric, scale in metrics)]]
    for arm, folders in runs.items():
        rows.append([arm, rates[arm]])
        for metric, scale in metrics:
            rows[-1].append(over_seeds(test_scores(folders, checkpoint, metric), scale))
    head = [metric.format(k=k) for metric, _ in metrics]
    return evaluation.markdown([title, "lr", *head], rows)


def pairs_table(runs: dict, k: int) -> str:
    """Differences between the main arms, paired by seed."""
    avg = {arm: test_scores(runs[arm], "checkpoint.pt", "Avg@{k}") for arm in MAIN}
    rows = []
    for one, other in itertools.combinations(MAIN, 2):
        rows.append([f"{one} − {other}", over_seeds(avg[one] - avg[other])])
    return evaluation.markdown(["paired by seed, final", f"Avg@{k}"], rows)


def costs_table(runs: dict, k: int) -> str:
    """What each arm samples, and its validation accuracy on the way, by steps and by tokens."""
    curves = {arm: read_curves(folders) for arm, folders in runs.items()}
    # accuracy after about 30 % of the steps, and at half and all of the cheapest run's tokens
    steps = next(iter(curves.values()))["step"][0]
    early = max(0, len(steps) * 3 // 10 - 1)
    budget = min(c["sampled"][:, -1].min() for c in curves.values())
    rows = []
    for arm, c in curves.items():
        row = [arm]
        for name in ("solver", "critic"):
            row.append(f"{c[name][:, -1].mean():,.0f}")
        row.append(over_seeds(c["avg"][:, early]))
        for tokens in (budget / 2, budget):
            reached = [np.interp(tokens, x, y) for x, y in zip(c["sampled"], c["avg"])]
            row.append(over_seeds(np.array(reached)))
        rows.append(row)
    head = [
        f"cost, and validation Avg@{k} on the way", "solver tokens", "critic tokens",
        f"at step {steps[early]}", f"at {budget // 2:,.0f} sampled tokens", f"at {budget:,.0f}",
    ]  # fmt: skip
    return evaluation.markdown(head, rows)


def draw_curves(plt, curves: dict[str, dict]):
    """Validation accuracy of arms, by steps and by sampled tokens, with t intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    names = {"step": "step", "sampled": "sampled tokens (solver + critic)"}
    for axis, (name, label) in zip(axes, names.items()):
        for arm, c in curves.items():
            x, y = c[name].mean(0), 100 * c["avg"]
            mean, half = y.mean(0), half_width(y)
            axis.plot(x, mean, "o-", label=arm)
            axis.fill_between(x, mean - half, mean + half, alpha=0.2, linewidth=0)
        axis.set(xlabel=label, ylim=(0, 102))
    axes[0].set_ylabel("validation accuracy, %")
    axes[0].legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default="runs/reproduce", help="folder of the runs")
    parser.add_argument("flags", nargs="*", help="after --: flags of sd.py")
    args = parser.parse_args(argv)
    # the toy also on a machine with CUDA
    flags = ["--preset", "toy", *args.flags]
    return evaluation.guarded("reproduce.py", lambda: reproduce(args.out, args.seeds, flags))


if __name__ == "__main__":
    sys.exit(main())
