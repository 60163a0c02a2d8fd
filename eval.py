"""Evaluate runs of sd.py on problems they never saw, and show why they differ.

  python eval.py runs/critique runs/reference runs/grpo     base and runs side by side: same problems, same seeds
  python eval.py --tokens runs/critique                     what each context does to every token of the same attempt
  python eval.py --reproduce --seeds 5                      the results table: a learning-rate sweep, then seeds
  python eval.py --plot                                     the README's figures, from what the last two wrote
  python eval.py --filter pool.jsonl --out hard.jsonl       keep the problems that the base seldom solves

Avg@k is mean accuracy, Pass@k the share of problems solved at least once, Maj@k the share whose most frequent answer is
right. Intervals are 95 %: bootstrap over problems, or Student's t over seeds where seeds are compared.
"""

import argparse
import contextlib
import html
import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import critic_prompts as texts
import sd

# ---- 1. Sample, score, compare. ----------------------------------------------------------------------------

def table(results: dict[str, dict[str, np.ndarray]], samples: int) -> str:
    """Markdown: a row for the base and each run, then the paired differences."""
    unit = lambda name: f"@{samples}" if name in ("Avg", "Pass", "Maj") else ", %" if sd.METRICS[name] > 1 else ""
    names = [name + unit(name) for name in sd.METRICS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for run, values in results.items():
        lines.append(f"| {run} | " + " | ".join(sd.cell(values[m], scale) for m, scale in sd.METRICS.items()) + " |")
    runs = list(results)
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            paired = (sd.cell(results[b][m] - results[a][m], scale) for m, scale in sd.METRICS.items())
            lines.append(f"| {b} − {a} | " + " | ".join(paired) + " |")
    return "\n".join(lines)


def load_run(folder: Path | str, checkpoint: str) -> tuple[sd.Config, dict]:
    """(config, adapters) of a run folder."""
    state = sd.load_checkpoint(Path(folder) / checkpoint)
    return state["config"], state["adapters"]


def load_trained(cfg: sd.Config, weights: dict) -> sd.Chat:
    chat = sd.load_model(cfg.model, cfg.dtype, cfg.device)
    sd.add_adapters(chat.model, cfg)
    sd.load_adapters(chat.model, weights)
    return chat


ALIKE = ("model", "data", "prompts", "test_problems", "validation_problems", "temperature", "max_new_tokens")  # in a table


def evaluate_runs(folders: list[str], checkpoint: str, count: int | None, samples: int | None, out: Path) -> str:
    """The table of the base and the runs; all generations go to out/eval.jsonl, the table to out/eval.md."""
    runs = {folder: load_run(folder, checkpoint) for folder in folders}
    base = runs[folders[0]][0]
    for folder, (cfg, _) in runs.items():
        for name in ALIKE:
            if getattr(cfg, name) != getattr(base, name):
                raise sd.Refusal(f"{folder} and {folders[0]} differ in {name}: they cannot share a table")
    base = replace(base, eval_samples=samples or base.eval_samples)
    out.mkdir(parents=True, exist_ok=True)
    chat = sd.load_model(base.model, base.dtype, base.device)
    problems = sd.load_problems(base, chat).test[:count]
    attempts = {"base": sd.evaluate(chat, problems, base)}
    del chat
    for folder, (cfg, weights) in runs.items():
        attempts[folder] = sd.evaluate(load_trained(cfg, weights), problems, base)
    with open(out / "eval.jsonl", "w", encoding="utf-8") as file:
        for name, rows in attempts.items():
            for problem, own in zip(problems, rows):
                for a in own:
                    line = {"run": name, "problem": problem.question, "wanted": problem.answer, **a}
                    file.write(json.dumps(line) + "\n")
    text = (f"{len(problems)} held-out problems × {base.eval_samples} attempts, {checkpoint}, seed {sd.SEED}; "
            "95 % bootstrap intervals over problems\n\n")  # fmt: skip
    short = {name: Path(name).name for name in attempts}
    short = short if len(set(short.values())) == len(short) else {name: name for name in attempts}
    text += table({short[name]: sd.scores(rows) for name, rows in attempts.items()}, base.eval_samples) + "\n"
    (out / "eval.md").write_text(text, "utf-8")
    return text


# ---- 2. Per-token advantage: the paper's argument as a picture and as numbers. -----------------------------

def ratio(top: np.ndarray, bottom: np.ndarray) -> dict:
    """Σ top / Σ bottom with its 95 % bootstrap interval; one entry a problem, so that its attempts stay together."""
    if not bottom.any():
        return {"value": None, "low": None, "high": None}
    picks = np.random.default_rng(0).integers(len(top), size=(10_000, len(top)))
    with np.errstate(invalid="ignore"):  # a resample may hold none of the few problems that count
        low, high = np.nanpercentile(top[picks].sum(1) / bottom[picks].sum(1), [2.5, 97.5])
    return {"value": float(top.sum() / bottom.sum()), "low": float(low), "high": float(high)}


def wrong_step(chat: sd.Chat, rollout: sd.Rollout, critique: str, fmt) -> tuple[int, int, int]:
    """(start, end, edit) in tokens: the attempt's step in which the critique first departs from it, and the departure.

    Without steps in the attempt, its line counts as a step.
    """
    ids = rollout.sample.ids
    edit = texts.first_edit(chat.decode, ids, critique)
    ends = [len(chat.decode(ids[: t + 1])) for t in range(len(ids))]  # of each token in the text
    text, place = chat.decode(ids), ends[edit - 1] if edit else 0
    starts, position = [], 0
    for step in fmt.steps(text):
        starts.append(position := text.index(step, position))
        position += len(step)
    if not starts or place < starts[0]:
        span = text.rfind("\n", 0, place) + 1, text.find("\n", place)
    elif place >= position:  # past the last step: in the answer
        span = position, len(text)
    else:
        k = max(k for k, start in enumerate(starts) if start <= place)
        span = starts[k], (starts + [position])[k + 1]
    first = sum(end <= span[0] for end in ends)
    last = sum(end <= span[1] for end in ends) if span[1] >= 0 else len(ids)
    return min(first, edit), max(last, edit + 1), edit


def advantages(
    chat: sd.Chat, rollouts: list[sd.Rollout], contexts: list[str | None], cfg: sd.Config
) -> list[np.ndarray | None]:
    """A_t, eq (2), of each attempt's tokens under its context; None where there is none."""
    cfg = replace(cfg, condition="critique", stop_at_first_edit=False)
    for r, context in zip(rollouts, contexts):
        r.context = context
    packed = sd.pack(chat, rollouts, cfg)
    found: dict[int, np.ndarray] = {}
    for start in sd.progress(range(0, len(packed), cfg.micro_batch), desc="score"):
        part = packed[start : start + cfg.micro_batch]
        found |= {id(r): a.float().cpu().numpy() for r, a in zip(part, sd.token_advantages(chat, part, cfg))}
    return [found.get(id(r)) for r in rollouts]


@torch.no_grad()
def alternatives(chat: sd.Chat, rollout: sd.Rollout, context: str, cfg: sd.Config) -> list[str]:
    """The teacher's three likeliest tokens at each position, in words."""
    prompt = sd.teacher_prompt(chat, rollout.problem.question, context, cfg)
    hidden = sd.response_hidden(chat, [prompt], [rollout.sample.ids])
    words = []
    for rows in hidden.split(cfg.kl_chunk):
        top = sd.log_softmax_of(rows, chat.head, cfg.temperature).exp().topk(3)
        for p, ids in zip(top.values.tolist(), top.indices.tolist()):
            words.append(", ".join(f"{chat.tokenizer.decode([i])!r} {100 * share:.0f} %" for share, i in zip(p, ids)))
    return words


def localise(rollouts, samples: int, found: list, places: list) -> dict:
    """Where one context's advantage falls. Sums are kept per problem, `samples` attempts each."""
    names = ("before", "at", "after", "abs", "low", "tokens", "least", "right")
    parts = {name: np.zeros(len(rollouts)) for name in names}
    for i, (r, a, place) in enumerate(zip(rollouts, found, places)):
        if a is None:
            continue
        negative = -np.minimum(a, 0)
        if r.reward:
            parts["abs"][i], parts["low"][i], parts["tokens"][i] = np.abs(a).sum(), (a < -0.1).sum(), len(a)
            parts["least"][i], parts["right"][i] = a.min(), 1
        elif place:
            start, end, _ = place
            parts["before"][i], parts["at"][i] = negative[:start].sum(), negative[start:end].sum()
            parts["after"][i] = negative[end:].sum()
    p = {name: values.reshape(-1, samples).sum(1) for name, values in parts.items()}
    total = p["before"] + p["at"] + p["after"]
    shares = {f"wrong: negative A {where}": ratio(p[name], total) for name, where in (
        ("before", "before the first wrong step"), ("at", "on it"), ("after", "after it"))}  # fmt: skip
    return {
        **shares,
        "right: mean abs(A)": ratio(p["abs"], p["tokens"]),
        "right: tokens with A < −0.1": ratio(p["low"], p["tokens"]),
        "right: most negative token": ratio(p["least"], p["right"]),
    }


def study_tokens(folder: str, count: int | None, samples: int | None, url: str | None) -> str:
    """The table of all contexts. Writes tokens.md, tokens.json and tokens.html into the run folder."""
    cfg, _ = load_run(folder, "checkpoint.pt")
    if sd.is_url(cfg.critic) and cfg.critic != url:
        raise sd.Refusal(f"argument --critic: pass {cfg.critic} if you trust it; the API key goes to no address out of a file")
    chat = sd.load_model(cfg.model, cfg.dtype, cfg.device)
    critic, fmt, samples = sd.load_critic(cfg, chat), texts.FORMATS[cfg.prompts], samples or 4
    problems = sd.load_problems(cfg, chat).test[: count or 50]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, samples, sd.SEED)
    contexts = {
        f"critique ({style})": sd.query_critic(rollouts, critic, replace(cfg, critic_style=style))[0]
        for style in texts.STYLES
    }
    contexts["reference"] = [r.problem.solution for r in rollouts]
    found = {name: advantages(chat, rollouts, written, cfg) for name, written in contexts.items()}
    having = lambda names: [i for i in range(len(rollouts)) if all(found[name][i] is not None for name in names)]
    whole = having(found)  # all contexts are measured on the same attempts
    mended, places = contexts["critique (copy)"], [None] * len(rollouts)
    for i in whole:
        r = rollouts[i]
        if not r.reward and sd.is_correct(mended[i], r.problem.answer):
            places[i] = wrong_step(chat, r, mended[i], fmt)
    common = {name: [a if i in whole else None for i, a in enumerate(values)] for name, values in found.items()}
    numbers = {name: localise(rollouts, samples, values, places) for name, values in common.items()}
    grpo = sd.group_advantages([r.reward for r in rollouts], samples)
    perfect = lambda i: texts.first_edit(chat.decode, rollouts[i].sample.ids, mended[i]) == len(rollouts[i].sample.ids)
    shown = ("critique (copy)", "reference")
    telling = sorted(having(shown), key=lambda i: (grpo[i] == 0, not places[i]))  # groups with both outcomes first
    picks = [
        next((i for i in telling if not rollouts[i].reward), None),
        next((i for i in telling if rollouts[i].reward and perfect(i)), None),
    ]
    examples = [example(chat, rollouts[i], {n: (found[n][i], contexts[n][i]) for n in shown}, grpo[i], places[i], cfg)
                for i in picks if i is not None]  # fmt: skip
    right, wrong = sum(rollouts[i].reward for i in whole), sum(place is not None for place in places)
    text = (
        f"{len(rollouts)} attempts of the base at {len(problems)} held-out problems, seed {sd.SEED}: {right:.0f} right, {wrong} wrong with a "
        f"critique that reaches the right answer; {len(rollouts) - len(whole)} left out, for a critic failed on them. 95 % bootstrap "
        f"intervals over problems; A in nats\n\n" + numbers_table(numbers)
    )
    out = Path(folder)
    (out / "tokens.md").write_text(text, "utf-8")
    (out / "tokens.json").write_text(json.dumps({"numbers": numbers, "examples": examples}, indent=1), "utf-8")
    (out / "tokens.html").write_text(page(examples, text), "utf-8")
    return "\n".join([*map(terminal, examples), text, f"wrote tokens.html, tokens.md and tokens.json into {folder}"])


def numbers_table(numbers: dict) -> str:
    head = ["context", *next(iter(numbers.values()))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in numbers.items():
        cells = []
        for measure, v in row.items():
            scale, unit = (100, " %") if "negative A" in measure or "tokens with" in measure else (1, "")
            digits = 1 if unit else 2
            value = lambda key: f"{scale * v[key]:.{digits}f}"
            cells.append("-" if v["value"] is None else f"{value('value')}{unit} [{value('low')}, {value('high')}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def example(chat: sd.Chat, r: sd.Rollout, scored: dict, grpo: float, place, cfg: sd.Config) -> dict:
    """One attempt for the pictures: tokens, and a row of advantages for each condition."""
    rows = {}
    for name, (a, context) in scored.items():
        rows[name] = {"advantage": a.tolist(), "context": context, "teacher": alternatives(chat, r, context, cfg)}
    same, reward = [grpo] * len(r.sample.ids), "a reward for the whole attempt, eq (3)"
    rows["grpo"] = {"advantage": same, "context": reward, "teacher": []}
    tokens = [chat.tokenizer.decode([i]) for i in r.sample.ids]
    return {"problem": r.problem.question, "answer": r.problem.answer, "right": bool(r.reward), "tokens": tokens,
            "edit": place[2] if place else None, "rows": rows}  # fmt: skip


FULL = 5.0  # nats at which a colour is saturated
LEGEND = f"red: the teacher would keep the token (A > 0); blue, underlined: it would change it (A < 0); full colour at {FULL:g} nats"


def shade(a: float) -> tuple[int, int, int]:
    """White at 0; red above, blue below: the two ends of a diverging scale that the colour-blind tell apart."""
    strength, end = min(1.0, abs(a) / FULL) ** 0.5, (214, 71, 58) if a > 0 else (67, 133, 214)
    return tuple(round(255 + strength * (c - 255)) for c in end)


def terminal(e: dict) -> str:
    """The strips for a terminal: colours where it has them, else the value of each token that moves."""
    outcome = "right" if e["right"] else "wrong"
    lines = [f"{outcome} attempt at {e['problem']!r}, answer {e['answer']!r}; {LEGEND}; ▼ first edit"]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for name, row in e["rows"].items():
        cells = []
        for t, (token, a) in enumerate(zip(e["tokens"], row["advantage"])):
            token = ("▼" if t == e["edit"] else "") + token
            token = sd.printable(token)
            r, g, b = shade(a)
            under = "\x1b[4m" if a < -0.05 else ""
            plain = f"{token}[{a:+.1f}]" if abs(a) >= 0.05 and name != "grpo" else token
            cells.append(f"{under}\x1b[30;48;2;{r};{g};{b}m{token}\x1b[0m" if colour else plain)
        note = f"   {row['advantage'][0]:+.2f} everywhere" if name == "grpo" else ""
        lines.append(f"  {name:16s} {''.join(cells)}{note}")
    return "\n".join(lines)


def page(examples: list[dict], numbers: str) -> str:
    """A self-contained HTML page: no script, nothing fetched, every text of a model escaped."""
    parts = []
    for e in examples:
        parts.append(f"<h2>A {'right' if e['right'] else 'wrong'} attempt</h2><p>{html.escape(e['problem'])} "
                     f"<small>(answer {html.escape(e['answer'])})</small></p><table>")  # fmt: skip
        for name, row in e["rows"].items():
            cells = []
            for t, (token, a) in enumerate(zip(e["tokens"], row["advantage"])):
                hover = f"A = {a:+.3f} nats" + (f"\nteacher: {row['teacher'][t]}" if row["teacher"] else "")
                kind = ("n" if a < -0.05 else "") + (" e" if t == e["edit"] else "")
                style = "background:rgb({},{},{})".format(*shade(a))
                text = html.escape(token).replace("\n", "⏎<br>") or "∅"
                cells.append(f'<span class="{kind}" style="{style}" title="{html.escape(hover)}">{text}</span>')
            head = f'<th title="{html.escape(row["context"])}">{html.escape(name)}</th>'
            parts.append(f"<tr>{head}<td>{''.join(cells)}</td></tr>")
        parts.append("</table>")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Per-token advantage</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }}
th {{ text-align: left; vertical-align: top; padding-right: 1em; white-space: nowrap }} td {{ font: 16px/2 monospace }}
span {{ padding: .15em .1em; white-space: pre-wrap; print-color-adjust: exact; -webkit-print-color-adjust: exact }}
.n {{ text-decoration: underline 2px }} .e {{ border-left: 3px solid #111 }} pre {{ white-space: pre-wrap; font-size: 13px }}
</style>
<h1>What each context does to every token of the same attempt</h1>
<p>A<sub>t</sub> = log π<sub>T</sub>(y<sub>t</sub>|x,c,y<sub>&lt;t</sub>) − log π<sub>θ</sub>(y<sub>t</sub>|x,y<sub>&lt;t</sub>). {html.escape(LEGEND)}.
A black bar marks the first token at which the critique departs from the attempt. Hover over a token for its value and the teacher's three
likeliest tokens; over a name for its context.</p>
{"".join(parts)}<h2>Over all attempts</h2><pre>{html.escape(numbers)}</pre></html>
"""


# ---- 3. The results table: every arm gets its own learning rate from the same small sweep, then the same seeds. ----

ARMS = {
    "grpo": ["--condition", "grpo"],
    "reference": ["--condition", "reference"],
    "critique": ["--condition", "critique"],
    "critique, first edit": ["--condition", "critique", "--stop-at-first-edit"],
    "critique, teacher‖student": ["--condition", "critique", "--kl", "teacher||student"],
    "critique, teacher‖student, first edit":
        ["--condition", "critique", "--kl", "teacher||student", "--stop-at-first-edit"],
}  # fmt: skip
SWEEP = (0.5, 1.0, 2.0)  # times the preset's learning rate
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}  # Student's t, by number of seeds


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t interval of the mean over the first axis, the seeds; 10 seeds' t for more than 9."""
    n = len(values)
    return T_975.get(n, 2.26) * values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], math.nan)


def over_seeds(values: list[float], scale: float = 1.0) -> str:
    v = scale * np.array(values)
    return f"{v.mean():.1f} ± {half_width(v):.1f}"


def train_once(root: Path, arm: str, lr: float, seed: int, flags: list[str]) -> Path:
    """One run, trained, gone on with, or found finished."""
    folder = root / f"{'-'.join(arm.replace(',', ' ').replace('‖', ' ').split())}-lr{lr:g}-seed{seed}"
    command = [*flags, *ARMS[arm], "--lr", str(lr), "--seed", str(seed), "--out", str(folder), "--final-problems", "0",
               "--no-export", "--show-every", "0"]  # fmt: skip
    cfg, _ = sd.parse_config(command)
    if not cfg.eval_every:
        cfg = replace(cfg, eval_every=max(1, cfg.steps // 10))
        command += ["--eval-every", str(cfg.eval_every)]
    if cfg.patience or cfg.eval_every > cfg.steps:
        raise sd.Refusal("the arms of --reproduce are compared at equal steps: drop --patience, and give --eval-every "
                            "at most --steps")  # fmt: skip
    if (folder / "checkpoint.pt").exists():
        state = sd.load_checkpoint(folder / "checkpoint.pt")
        for name in vars(cfg).keys() - sd.RESUMABLE | {"critic", "critic_model", "critic_max_new_tokens"}:
            if getattr(state["config"], name) != getattr(cfg, name):
                raise sd.Refusal(f"{folder} was trained with another {name}; name another --out, or delete it")
        if state["step"] > cfg.steps:
            raise sd.Refusal(f"{folder} has taken {state['step']} steps already; name another --out, or more --steps")
        if state["step"] == cfg.steps:
            return folder
        command.append("--resume")
    for stale in folder.glob("test-*.json"):  # scores of fewer steps
        stale.unlink()
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = sd.main(command)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise sd.Refusal(f"training {folder} ended with {code}: {heard.getvalue().strip().splitlines()[-1]}")
    return folder


def curve(folder: Path) -> list[dict]:
    """Validation accuracy after so many steps and sampled tokens (solver's and critic's)."""
    points, spent = [], {"rollouts": 0, "solver_tokens": 0, "critic_tokens": 0}
    cfg, *entries = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    for entry in entries:
        if "validation_avg" in entry:
            points.append({"step": entry["step"], "avg": entry["validation_avg"], **spent})
        else:
            spent["rollouts"] += cfg["config"]["attempts_per_step"]
            for name in ("solver_tokens", "critic_tokens"):
                spent[name] += entry[name]
    return points


def test_scores(folder: Path, checkpoint: str) -> dict[str, float]:
    """A run's metrics on the test problems, computed once and kept beside the checkpoint."""
    kept = folder / f"test-{checkpoint}.json"
    if not kept.exists():
        cfg, weights = load_run(folder, checkpoint)
        chat = load_trained(cfg, weights)
        result = sd.scores(sd.evaluate(chat, sd.load_problems(cfg, chat).test, cfg))
        sd.write_atomic(kept, json.dumps({name: float(values.mean()) for name, values in result.items()}).encode())
    return json.loads(kept.read_text())


def reproduce(root: Path, seeds: int, flags: list[str]) -> str:
    """Train all arms, or go on where an earlier call stopped; writes root/table.md and root/table.json."""
    flags = flags or ["--preset", "toy"]  # also on a machine with CUDA
    base_lr, runs, rates, edge = sd.parse_config([*flags, "--condition", "critique"])[0].lr, {}, {}, {}
    with tqdm(total=len(ARMS) * (len(SWEEP) + seeds - 1), desc="runs", disable=None) as bar:
        for arm in ARMS:
            swept = {}
            for factor in SWEEP:
                swept[base_lr * factor] = curve(train_once(root, arm, base_lr * factor, 0, flags))[-1]["avg"]
                bar.update()
            rates[arm] = max(swept, key=swept.get)
            edge[arm] = rates[arm] in (min(swept), max(swept))
            by_rate = ", ".join(f"{lr:g} → {100 * v:.1f}" for lr, v in swept.items())
            print(f"{arm}: validation Avg by learning rate {by_rate}", flush=True)
            runs[arm] = [train_once(root, arm, rates[arm], seed, flags) for seed in range(seeds)]
            bar.update(seeds - 1)
    cfg, _ = load_run(runs["critique"][0], "checkpoint.pt")
    chat = sd.load_model(cfg.model, cfg.dtype, cfg.device)
    problems = sd.load_problems(cfg, chat).test
    base = {name: float(values.mean()) for name, values in sd.scores(sd.evaluate(chat, problems, cfg)).items()}
    rates = {arm: f"{lr:g}" + "*" * edge[arm] for arm, lr in rates.items()}
    text = results_text(cfg, base, runs, rates, len(problems), seeds)
    (root / "table.md").write_text(text, "utf-8")
    kept = {"rates": rates, "base": base, "runs": {arm: list(map(str, folders)) for arm, folders in runs.items()}}
    (root / "table.json").write_text(json.dumps(kept))
    return text


def results_text(cfg: sd.Config, base: dict, runs: dict, rates: dict, problems: int, seeds: int) -> str:
    names = ("Avg", "Pass", "Maj", "length")
    k = cfg.eval_samples
    lines = [f"{problems} test problems × {k} attempts, seeds 0–{seeds - 1}, {cfg.steps} steps of {cfg.attempts_per_step} attempts; mean ± half of the "
             f"95 % t interval over seeds; * a rate at the edge of the sweep", ""]  # fmt: skip
    for checkpoint, title in (("checkpoint.pt", "final"), ("best.pt", "best on validation")):
        lines += [f"| {title} | lr | Avg@{k} | Pass@{k} | Maj@{k} | length |", "|---" * 6 + "|"]
        cells = [f"{sd.METRICS[n] * base[n]:.1f}" for n in names]
        lines.append(f"| base | - | {' | '.join(cells)} |")
        for arm, folders in runs.items():
            results = [test_scores(folder, checkpoint) for folder in folders]
            cells = [over_seeds([r[n] for r in results], sd.METRICS[n]) for n in names]
            lines.append(f"| {arm} | {rates[arm]} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| paired by seed, final | Avg@{k} |", "|---|---|"]
    for a, b in (("critique", "reference"), ("critique", "grpo"), ("reference", "grpo")):
        one, other = ([test_scores(folder, "checkpoint.pt")["Avg"] for folder in runs[arm]] for arm in (a, b))
        lines.append(f"| {a} − {b} | {over_seeds(np.subtract(one, other), 100)} |")
    curves = {arm: [curve(folder) for folder in folders] for arm, folders in runs.items()}
    spent = lambda point: point["solver_tokens"] + point["critic_tokens"]
    steps = [point["step"] for point in curves["critique"][0]]
    early = steps[max(0, len(steps) * 3 // 10 - 1)]
    budget = min(spent(c[-1]) for cs in curves.values() for c in cs)
    reached = lambda c, tokens: float(np.interp(tokens, [spent(point) for point in c], [point["avg"] for point in c]))
    lines += ["", f"| cost, and validation Avg@{k} on the way | rollouts | solver tokens | critic tokens | at step {early} | "
              f"at {budget // 2:,} sampled tokens | at {budget:,} |", "|---" * 7 + "|"]  # fmt: skip
    for arm, cs in curves.items():
        last = cs[0][-1]
        at = [over_seeds([next(point["avg"] for point in c if point["step"] == early) for c in cs], 100)]
        at += [over_seeds([reached(c, tokens) for c in cs], 100) for tokens in (budget / 2, budget)]
        cells = [f"{last[name]:,}" for name in ("rollouts", "solver_tokens", "critic_tokens")] + at
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---- 4. Figures. -------------------------------------------------------------------------------------------

COLOURS = {"critique": "#b2182b", "reference": "#2166ac", "grpo": "#4d4d4d"}


def plot(root: Path, tokens: Path, out: Path) -> str:
    try:
        import matplotlib
    except ImportError:
        raise sd.Refusal("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "sd", "font.size": 10, "svg.fonttype": "none", "text.parse_math": False}
    import matplotlib.pyplot as plt

    for path, command in ((root / "table.json", "--reproduce"), (tokens / "tokens.json", f"--tokens {tokens}")):
        if not path.exists():
            raise sd.Refusal(f"{path} is missing; run python eval.py {command} first")
    out.mkdir(parents=True, exist_ok=True)
    runs = json.loads((root / "table.json").read_text())["runs"]
    k = load_run(runs["critique"][0], "checkpoint.pt")[0].eval_samples
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, label in zip(axes, ("step", "sampled tokens (solver + critic)")):
        for arm, colour in COLOURS.items():
            curves = [curve(Path(folder)) for folder in runs[arm]]
            spent = lambda p: p["step"] if label == "step" else p["solver_tokens"] + p["critic_tokens"]
            x = np.array([[spent(p) for p in c] for c in curves]).mean(0)
            y = 100 * np.array([[p["avg"] for p in c] for c in curves])
            half = half_width(y)
            axis.plot(x, y.mean(0), color=colour, label=arm, marker="o", markersize=3)
            axis.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel=label, ylim=(0, 102))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"validation Avg@{k}, %")
    axes[0].legend(frameon=False)
    figure.savefig(out / "curves.svg", metadata={"Date": None})
    examples = json.loads((tokens / "tokens.json").read_text())["examples"]
    size = dict(figsize=(9, 1.75 * len(examples)), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(len(examples), 1, **size)
    for axis, e in zip(axes[:, 0], examples):
        shown = slice(0, 60)
        rows = np.array([row["advantage"][shown] for row in e["rows"].values()])
        colours = [[tuple(c / 255 for c in shade(a)) for a in row] for row in rows]
        axis.imshow(colours, aspect="auto")
        for y, row in enumerate(rows):
            for x, (token, a) in enumerate(zip(e["tokens"][shown], row)):
                label = "end" if token == e["tokens"][-1] and len(token) > 6 else token[:6]
                axis.text(x, y, label, ha="center", va="center", fontsize=9, family="monospace")
                if a < -0.05:
                    axis.plot([x - 0.3, x + 0.3], [y + 0.33] * 2, color="black", linewidth=1)
        if e["edit"] is not None:
            axis.axvline(e["edit"] - 0.5, color="black", linewidth=1.5)
        axis.set_yticks(range(len(rows)), [name.split(" ")[0] for name in e["rows"]])
        axis.set_xticks([])
        axis.set_title(f"{'right' if e['right'] else 'wrong'} attempt at {e['problem']}", loc="left", fontsize=10)
        axis.spines[:].set_visible(False)
    figure.savefig(out / "advantage.svg", metadata={"Date": None})
    return f"wrote {out / 'curves.svg'} and {out / 'advantage.svg'}"


# ---- 5. Difficulty filter, after the paper's: keep what the base solves sometimes, but seldom. -------------

def filter_pool(pool: str, out: Path, below: float, samples: int, flags: list[str]) -> str:
    """Write the kept rows to `out`. Scores go to OUT.scores.jsonl as they come, so that the same command goes on."""
    cfg, _ = sd.parse_config([*flags, "--data", str(pool), "--eval-samples", str(samples)])
    chat = sd.load_model(cfg.model, cfg.dtype, cfg.device)
    rows, dropped = sd.read_problems(cfg, chat)
    how = {name: getattr(cfg, name) for name in ("model", "prompts", "temperature", "max_new_tokens", "eval_samples")}
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = Path(f"{out}.scores.jsonl")
    entries = [entry for _, entry in sd.read_rows(kept)] if kept.exists() else []  # a line cut by a kill is no dict
    known = {e["problem"]: e["avg"] for e in entries if isinstance(e, dict) and e.get("how") == how}
    todo = [(i, key, problem) for i, (key, (problem, _)) in enumerate(rows.items()) if key not in known]
    at_once = max(1, cfg.sample_batch // samples)
    with open(kept, "a", encoding="utf-8") as file:
        file.write("\n")
        for start in tqdm(range(0, len(todo), at_once), desc="problems", unit_scale=at_once, disable=None):
            numbers, keys, problems = zip(*todo[start : start + at_once])
            for key, own in zip(keys, sd.evaluate(chat, problems, cfg, numbers)):
                known[key] = float(np.mean([a["correct"] for a in own]))
                file.write(json.dumps({"problem": key, "avg": known[key], "how": how}) + "\n")
            file.flush()
    dropped["never solved"] = sum(known[key] == 0 for key in rows)
    dropped[f"solved {below:g} or more of the time"] = sum(known[key] >= below for key in rows)
    chosen = [row for key, (_, row) in rows.items() if 0 < known[key] < below]
    sd.write_atomic(out, "".join(json.dumps(row) + "\n" for row in chosen).encode())
    return f"kept {len(chosen)} of {len(chosen) + sum(dropped.values())} rows in {out}; dropped: {sd.spell(dropped)}"


# ---- 6. Main. ----------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="--reproduce and --filter pass what follows -- on to sd.py: eval.py --reproduce -- --model FOLDER --data FILE",
    )  # fmt: skip
    parser.error = sd.refuse
    parser.add_argument("runs", nargs="*", help="run folders written by sd.py, to be compared")
    parser.add_argument("--tokens", metavar="RUN", help="per-token advantage on the problems that RUN held out")
    parser.add_argument("--reproduce", action="store_true", help="train and evaluate every arm; goes on where it stopped")
    parser.add_argument("--plot", action="store_true", help="draw assets/curves.svg and assets/advantage.svg")
    parser.add_argument("--filter", metavar="POOL", help="a problem file, as sd.py's --data")
    parser.add_argument("--checkpoint", default="checkpoint.pt", help="in each run folder: checkpoint.pt (last) or best.pt")
    parser.add_argument("--critic", metavar="URL", help="--tokens: the address of RUN's http critic, once more")
    parser.add_argument("--samples", type=int, help="attempts a problem, k [12; --tokens 4; --filter 16]")
    parser.add_argument("--problems", type=int, help="use the first so many test problems [all; --tokens 50]")
    parser.add_argument("--seeds", type=int, default=5, help="--reproduce: seeds of each arm [5]")
    parser.add_argument("--below", type=float, default=0.3125, help="--filter: keep if solved less often [5/16, the paper's]")
    parser.add_argument("--out", help="output folder, or --filter's file [the runs' parent; runs/reproduce; hard.jsonl]")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        own = argv.index("--") if "--" in argv else len(argv)
        args, flags = parser.parse_args(argv[:own]), argv[own + 1 :]
        for name in ("samples", "problems", "seeds"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise sd.Refusal(f"argument --{name}: {getattr(args, name)} is out of range; the least is 1")
        if flags and not (args.reproduce or args.filter):
            raise sd.Refusal(f"argument {flags[0]}: only --reproduce and --filter pass flags on to sd.py")
        if args.reproduce:
            print(reproduce(Path(args.out or "runs/reproduce"), args.seeds, flags))
        elif args.tokens:
            print(study_tokens(args.tokens, args.problems, args.samples, args.critic))
        elif args.plot:
            print(plot(Path("runs/reproduce"), Path("runs/critique"), Path(args.out or "assets")))
        elif args.filter:
            print(filter_pool(args.filter, Path(args.out or "hard.jsonl"), args.below, args.samples or 16, flags))
        elif args.runs:
            out = Path(args.out or Path(args.runs[0]).parent)
            print(evaluate_runs(args.runs, args.checkpoint, args.problems, args.samples, out))
        else:
            raise sd.Refusal("name run folders, or one of --tokens, --reproduce, --plot, --filter; see --help")
        return 0
    except sd.Refusal as refusal:
        print(f"eval.py: {sd.printable(str(refusal))}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"eval.py: {sd.printable(str(error))[:300]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval.py: stopped; --reproduce and --filter go on where they were", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
