"""Evaluate runs of sd.py on problems they never saw, and show why they differ.

  python eval.py runs/critique runs/reference runs/grpo     compare runs with the base
  python eval.py --tokens runs/critique                     what each context does to every token
  python eval.py --reproduce --seeds 5                      the results table: rate sweep, seeds
  python eval.py --plot runs/critique runs/grpo             draw runs, finished or not
  python eval.py --preflight --model FOLDER --data FILE     before a long run: can it work?
  python eval.py --filter pool.jsonl --out hard.jsonl       keep what the base solves, but rarely

Avg@k is mean accuracy, Pass@k the share of problems solved at least once, and Maj@k the share whose
most frequent answer is right. Intervals are 95 %: a bootstrap over problems, or Student's t over
the seeds of --reproduce. Base and runs sample with the same random numbers.
"""

import argparse
import contextlib
import html
import io
import itertools
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import sd
from critic_prompts import FORMATS, STYLES, extract_answer, first_edit, normalise

# ---- 1. Scores and intervals. --------------------------------------------------------------------

# each metric, and the factor by which it is multiplied for display
METRICS = {"Avg": 100, "Pass": 100, "Maj": 100, "length": 1, "truncated": 100, "unparsable": 100}


def maj_at_k(group: list[sd.Rollout]) -> float:
    """1 if the most frequent answer is right; in a tie, the share of the tied answers that are."""
    votes = Counter()
    for r in group:
        answer = extract_answer(r.text)
        if r.reward:
            votes[None] += 1  # every right answer is the same vote, however it is written
        elif answer is not None:
            # 1/2 and 0.5 are the same vote
            number = sd.as_number(answer)
            vote = normalise(answer) if number is None else number
            votes[vote] += 1
    most = max(votes.values(), default=0)
    tied = [answer for answer in votes if votes[answer] == most]
    return (None in tied) / max(1, len(tied))


def scores(groups: list) -> dict[str, np.ndarray]:
    """Each metric as one value per problem, (problems,), so that runs can be compared in pairs.

    A group holds the rollouts of one problem.
    """
    rows = []
    for group in groups:
        n = len(group)
        right = sum(r.reward for r in group)
        row = {
            "Avg": right / n,
            "Pass": right > 0,
            "Maj": maj_at_k(group),
            "length": sum(len(r.sample.ids) for r in group) / n,
            "truncated": sum(r.sample.truncated for r in group) / n,
            "unparsable": sum(extract_answer(r.text) is None for r in group) / n,
        }
        rows.append(row)
    return {name: np.array([row[name] for row in rows], float) for name in METRICS}


def mean_scores(groups: list) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores(groups).items()}


def estimate(top: np.ndarray, bottom: float | np.ndarray = 1.0) -> tuple[float, float, float]:
    """(Σ top / Σ bottom, and its 95 % percentile bootstrap interval); by default the mean of top.

    Both are (problems,) or (problems, attempts). Problems are resampled, because the attempts at
    one problem are not independent. A problem whose bottom is 0 is left out.
    """
    bottom = np.broadcast_to(bottom, top.shape)
    top, bottom = (values.reshape(len(values), -1).sum(1) for values in (top, bottom))
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) == 0:
        return math.nan, math.nan, math.nan
    # seeded, so that a table repeats to the digit
    picks = np.random.default_rng(0).integers(len(top), size=(10_000, len(top)))
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    return top.sum() / bottom.sum(), *np.percentile(ratios, [2.5, 97.5])


def bracketed(numbers: tuple, scale: float = 100, form: str = ".1f", unit: str = "") -> str:
    """An estimate as `value [low, high]`; "-" if nothing counts.

    No interval where all values are equal: the bootstrap's would have no width.
    """
    value, low, high = (scale * number for number in numbers)
    if math.isnan(value):
        return "-"
    text = f"{value:{form}}{unit}"
    return text if low == high else f"{text} [{low:{form}}, {high:{form}}]"


# Student's t at 97.5 %, for 2, 3, … seeds; beyond 10 that of 10, which is slightly too wide
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t interval of the mean over the first axis, the seeds."""
    n = len(values)
    if n == 1:
        # one seed says nothing about the spread
        return np.full(values.shape[1:], math.nan)
    return T_975[min(n, 10) - 2] * values.std(0, ddof=1) / math.sqrt(n)


# ---- 2. The table of runs. -----------------------------------------------------------------------


def markdown(head: list[str], rows: list) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def headings(k: int) -> list[str]:
    """The names of METRICS in a table."""
    return [f"Avg@{k}", f"Pass@{k}", f"Maj@{k}", "length", "truncated, %", "unparsable, %"]


def table_row(name: str, values: dict) -> list[str]:
    cells = [name]
    for metric, scale in METRICS.items():
        cells.append(bracketed(estimate(values[metric]), scale))
    return cells


def table(results: dict, k: int) -> str:
    """A row for each entry of `results`, base first, then their differences, paired by problem."""
    rows = [table_row(name, values) for name, values in results.items()]
    for first, second in itertools.combinations(results, 2):
        difference = {m: results[second][m] - results[first][m] for m in METRICS}
        rows.append(table_row(f"{second} − {first}", difference))
    return markdown(["", *headings(k)], rows)


def attempt_test(cfg: sd.Config, checkpoint: dict | None = None, count: int | None = None) -> list:
    """Attempts at the first `count` test problems, by the base or with a checkpoint's adapters."""
    chat = sd.load_solver(cfg)
    problems = sd.load_problems(cfg, chat).test[:count]
    if checkpoint:
        sd.add_adapters(chat.model, checkpoint["config"])
        sd.load_adapters(chat, checkpoint)
    return sd.evaluate(chat, problems, cfg)


# the fields in which runs must agree to share a table
SHARED_FIELDS = (
    "model", "data", "prompts", "grader", "dtype", "test_problems",
    "temperature", "max_new_tokens",
)  # fmt: skip


def evaluate_runs(
    folders: list[str], name: str, count: int | None, k: int | None, out: Path
) -> str:
    """Compare the base and the runs. Writes every attempt to eval.jsonl, the table to eval.md."""
    if "base" in folders:
        raise sd.UserError("a run folder named base: write ./base, for the table has a row base")
    runs = {folder: sd.load_checkpoint(Path(folder, name)) for folder in folders}
    cfg = runs[folders[0]]["config"]
    for folder, checkpoint in runs.items():
        for field in SHARED_FIELDS:
            if getattr(checkpoint["config"], field) != getattr(cfg, field):
                raise sd.UserError(
                    f"{folder} and {folders[0]} differ in {field}: they cannot share a table"
                )
    cfg = replace(cfg, eval_samples=k or cfg.eval_samples)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    with open(out / "eval.jsonl", "w", encoding="utf-8") as file:
        for run, checkpoint in {"base": None, **runs}.items():
            groups = attempt_test(cfg, checkpoint, count)
            results[run] = scores(groups)
            for r in itertools.chain(*groups):
                entry = {
                    "run": run,
                    "problem": r.problem.question,
                    "wanted": r.problem.answer,
                    "text": r.text,
                    "answer": extract_answer(r.text),
                    "correct": bool(r.reward),
                    "length": len(r.sample.ids),
                    "truncated": r.sample.truncated,
                }
                file.write(json.dumps(entry) + "\n")
    text = (
        f"{len(groups)} held-out problems × {cfg.eval_samples} attempts, {name}, seed "
        f"{sd.EVAL_SEED}; 95 % bootstrap intervals over problems\n\n"
        f"{table(results, cfg.eval_samples)}\n"
    )
    (out / "eval.md").write_text(text, "utf-8")
    return text


# ---- 3. Token study: the paper's argument as numbers and as a picture. ---------------------------
#
# The base attempts the problems once. Each context in turn is put into the teacher's prompt, and
# A_t of eq (2) is computed at every token of the same attempts. A context is good if the negative A
# of a wrong attempt falls on its first wrong step, and if a right attempt is left alone.


def token_contexts() -> dict[str, tuple[sd.Condition, dict]]:
    """{name: (the condition that writes it, its changes to the config)} for each context."""
    contexts = {}
    for style in STYLES:
        contexts[f"critique ({style})"] = sd.CONDITIONS["critique"], {"critic_style": style}
    for name, condition in sd.CONDITIONS.items():
        if condition.has_teacher and condition.write is not sd.write_critiques:
            contexts[name] = condition, {}
    return contexts


def study_tokens(
    folder: str, count: int, samples: int, url: str | None, names: list[str] | None
) -> str:
    """The table of the named contexts, or of all. Writes tokens.md, tokens.json and tokens.html.

    The first context must be a copy of the attempt: it says where the first wrong step is.
    """
    writers = token_contexts()
    names = names or list(writers)
    for name in names:
        if name not in writers:
            raise sd.UserError(f"argument --contexts: {name!r} is not one of {', '.join(writers)}")
    saved = sd.load_checkpoint(Path(folder, "checkpoint.pt"))["config"]
    cfg = replace(saved, condition="critique")  # so that a run of grpo has a teacher, too
    chat, critic = sd.load_solver(cfg), None
    if any(writers[name][0].asks_critic for name in names):
        if sd.is_url(cfg.critic) and cfg.critic != url:
            raise sd.UserError(
                f"argument --critic: give {cfg.critic} again if you trust it; the API key is sent "
                "to no address that only a file names"
            )
        critic = sd.load_critic(cfg, chat)
    problems = sd.load_problems(cfg, chat).test[:count]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, samples, sd.EVAL_SEED)
    readers = {}
    for name in names:
        condition, changes = writers[name]
        texts = condition.write(rollouts, critic, replace(cfg, **changes))
        readers[name] = [replace(r, context=text) for r, text in zip(rollouts, texts)]
        sd.prepare(chat, readers[name], cfg)
    # all contexts are measured on the same attempts: on those for which each is valid and fits
    advantages = {name: {} for name in names}
    for i in sd.progress(range(len(rollouts)), desc="score"):
        if all(readers[name][i].teacher_prompt for name in names):
            for name in names:
                (a,) = sd.token_advantages(chat, [readers[name][i]], cfg)
                advantages[name][i] = a.cpu().numpy()

    copies = readers[names[0]]
    complete = list(advantages[names[0]])
    places, copied = {}, []
    for i in complete:
        r = copies[i]
        if not r.reward and sd.is_correct(r.context, r.problem.answer, cfg.grader):
            places[i] = wrong_step(chat, r, r.context, FORMATS[cfg.prompts])
        if r.reward and first_edit(chat.decode, r.sample.ids, r.context) == len(r.sample.ids):
            copied.append(i)
    rows = []
    for name in names:
        rows.append([name, *localise(rollouts, samples, advantages[name], places)])

    # A wrong attempt that was corrected, and a right one that was copied whole: the shortest one of
    # at least 3 steps, the first of which is right. Problems with both outcomes come first, because
    # GRPO learns from no others.
    grpo = sd.group_advantages(rollouts, None, replace(cfg, group_size=samples))
    find_steps = FORMATS[cfg.prompts].find_steps

    def rank(i: int) -> tuple:
        wanted = max(3, len(find_steps(copies[i].context)))
        complete = len(find_steps(rollouts[i].text)) >= wanted
        starts_wrong = i in places and places[i][0] == 0
        return grpo[i] == 0, starts_wrong or not complete, len(rollouts[i].sample.ids)

    examples = []
    for candidates in (places, copied):
        if candidates:
            i = min(candidates, key=rank)
            shown = {}
            # of the critique's styles only the first one is shown
            for name in names:
                if name == names[0] or name in sd.CONDITIONS:
                    shown[name] = (readers[name][i], advantages[name][i])
            examples.append(example(chat, shown, grpo[i], places.get(i), cfg))

    right = sum(rollouts[i].reward for i in complete)
    text = (
        f"{len(rollouts)} attempts of the base at {len(problems)} held-out problems, seed "
        f"{sd.EVAL_SEED}: {right:.0f} right, {len(places)} wrong with a critique that reaches the "
        f"right answer; {len(rollouts) - len(complete)} left out, without one of the contexts. "
        f"95 % bootstrap intervals over problems; A in nats\n\n"
        f"{markdown(['context', *MEASURES], rows)}\n"
    )
    numbers = {name: dict(zip(MEASURES, cells)) for name, *cells in rows}
    content = json.dumps({"numbers": numbers, "examples": examples}, indent=1)
    Path(folder, "tokens.md").write_text(text, "utf-8")
    Path(folder, "tokens.json").write_text(content, "utf-8")
    Path(folder, "tokens.html").write_text(page(examples, text), "utf-8")
    return f"{text}\nwrote {folder}/tokens.html, tokens.md and tokens.json"


def wrong_step(chat: sd.Chat, r: sd.Rollout, critique: str, prompt_format) -> tuple:
    """(start, end, edit) in tokens: the first wrong step, and the first token not copied from it.

    An attempt without steps is divided into its lines.
    """
    ids, text = r.sample.ids, chat.decode(r.sample.ids)
    edit = first_edit(chat.decode, ids, critique)
    if not text:
        return 0, len(ids), 0
    # characters up to the end of each token, and up to the departure
    ends = np.array([len(chat.decode(ids[: t + 1])) for t in range(len(ids))])
    place = min(ends[edit - 1], len(text) - 1) if edit else 0
    # a step goes up to where the next one starts; the answer, from the last step to the end
    # borders, in characters: where each step starts, where the last one ends, where the text ends
    borders, position = [0], 0
    for step in prompt_format.find_steps(text) or text.splitlines():
        position = text.index(step, position)
        borders.append(position)
        position += len(step)
    borders += [position, len(text)]
    first = max(border for border in borders if border <= place)
    last = min(border for border in borders if border > place)
    # the number of tokens before the wrong step, and before what follows it
    start, end = (ends <= first).sum(), (ends <= last).sum()
    return min(start, edit), max(end, edit + 1), edit


MEASURES = (
    "wrong: negative A before the first wrong step",
    "wrong: negative A on it",
    "wrong: negative A after it",
    "right: mean abs(A)",
    "right: tokens with A < −0.1",
    "right: most negative token",
)


def localise(rollouts, samples: int, advantages: dict, places: dict) -> list[str]:
    """Where one context's advantage falls: a cell for each of MEASURES.

    `advantages` and `places` go by the attempt's index, and `samples` attempts in a row belong to
    one problem.
    """
    # of wrong attempts: the negative A before, on and after the first wrong step
    blame = np.zeros((3, len(rollouts)))
    # of right attempts
    absolute, lowered, tokens, lowest, right = np.zeros((5, len(rollouts)))
    for i, a in advantages.items():
        if rollouts[i].reward:
            absolute[i], lowered[i], tokens[i] = np.abs(a).sum(), (a < -0.1).sum(), len(a)
            lowest[i], right[i] = a.min(), 1
        elif i in places:
            start, end, _ = places[i]
            negative = np.maximum(-a, 0)
            blame[:, i] = negative[:start].sum(), negative[start:end].sum(), negative[end:].sum()

    def ratio(top: np.ndarray, bottom: np.ndarray) -> tuple:
        return estimate(top.reshape(-1, samples), bottom.reshape(-1, samples))

    cells = [bracketed(ratio(part, blame.sum(0)), unit=" %") for part in blame]
    return cells + [
        bracketed(ratio(absolute, tokens), 1, ".2f"),
        bracketed(ratio(lowered, tokens), unit=" %"),
        bracketed(ratio(lowest, right), 1, ".2f"),
    ]


def example(chat, shown: dict, grpo: float, place: tuple | None, cfg: sd.Config) -> dict:
    """One attempt for the pictures. `shown`: by context, its reader and its advantages."""
    rows = {}
    for name, (r, a) in shown.items():
        teacher = likeliest_tokens(chat, r, cfg)
        rows[name] = {"advantage": a.tolist(), "context": r.context, "teacher": teacher}
    tokens = []
    for token in r.sample.ids:
        tokens.append("end" if token in chat.end_ids else chat.tokenizer.decode([token]))
    reward = "a reward for the whole attempt, eq (3)"
    rows["grpo"] = {"advantage": [grpo] * len(tokens), "context": reward, "teacher": []}
    return {
        "problem": r.problem.question,
        "answer": r.problem.answer,
        "right": bool(r.reward),
        "tokens": tokens,
        "edit": place[2] if place else None,
        "rows": rows,
    }


@torch.no_grad()
def likeliest_tokens(chat, r: sd.Rollout, cfg: sd.Config) -> list[str]:
    """The teacher's three likeliest tokens at each position, as text."""
    lines = []
    hidden = sd.response_hidden(chat, [r.teacher_prompt], [r.sample.ids])
    # in chunks, because (T, V) may not fit into memory
    for states in hidden.split(cfg.kl_chunk):
        q = sd.log_probs(states, chat.head, cfg.temperature).exp()
        for shares, ids in zip(*q.topk(3)):
            words = []
            for share, token in zip(shares, ids):
                words.append(f"{chat.tokenizer.decode([token])!r} {100 * share:.0f} %")
            lines.append(", ".join(words))
    return lines


FULL_COLOUR = 5.0  # nats at which a colour is saturated
UNDERLINED = -0.05  # nats below which a token is underlined, for readers who see no colours
LEGEND = (
    "red: the teacher raises the token's probability; blue, underlined: it lowers it; "
    "bar: the first token that the critique changes"
)


def shade(a: float) -> tuple[int, int, int]:
    """White at 0, red above and blue below: a pair that colour-blind readers can tell apart."""
    # the root makes small advantages visible
    strength = min(1.0, abs(a) / FULL_COLOUR) ** 0.5
    end = (214, 71, 58) if a > 0 else (67, 133, 214)
    return tuple(round(255 + strength * (c - 255)) for c in end)


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #111; background: #fff }
th { text-align: left; vertical-align: top; padding-right: 1em; white-space: nowrap }
td { font: 16px/2 monospace }
span { padding: .15em .1em; white-space: pre-wrap; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.lowered { text-decoration: underline 2px }
.edit { border-left: 3px solid #111 }
pre { white-space: pre-wrap; font-size: 13px }
"""

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Per-token advantage</title>
<style>{css}</style>
<h1>What each context does to every token of the same attempt</h1>
<p>A<sub>t</sub> = log π<sub>T</sub>(y<sub>t</sub>|x,c,y<sub>&lt;t</sub>) − log
π<sub>θ</sub>(y<sub>t</sub>|x,y<sub>&lt;t</sub>); {legend}. Full colour at {full:g} nats. Hover over
a token for its value and the teacher's three likeliest tokens; over a name for its context.</p>
{strips}<h2>Over all attempts</h2><pre>{numbers}</pre></html>
"""


def title(e: dict) -> str:
    outcome = "right" if e["right"] else "wrong"
    return f"{outcome} attempt at {e['problem']}"


def page(examples: list[dict], numbers: str) -> str:
    """A self-contained HTML page: no script, nothing fetched, every text of a model escaped."""
    strips = ""
    for e in examples:
        answer = html.escape(e["answer"])
        strips += f"<h2>{html.escape(title(e))} <small>(answer {answer})</small></h2><table>"
        for name, row in e["rows"].items():
            context = html.escape(row["context"])
            strips += f'<tr><th title="{context}">{html.escape(name)}</th><td>'
            for t in range(len(e["tokens"])):
                strips += token_span(e, row, t)
            strips += "</td></tr>"
        strips += "</table>"
    return PAGE.format(
        css=CSS, legend=LEGEND, full=FULL_COLOUR, strips=strips, numbers=html.escape(numbers)
    )


def token_span(e: dict, row: dict, t: int) -> str:
    """Token number t of an example, coloured by its advantage."""
    a = row["advantage"][t]
    hover = f"A = {a:+.3f} nats"
    if row["teacher"]:
        hover += f"\nteacher: {row['teacher'][t]}"
    classes = "lowered" if a < UNDERLINED else ""
    if t == e["edit"]:
        classes += " edit"
    text = html.escape(e["tokens"][t]).replace("\n", "⏎<br>") or "∅"
    style, hover = f"background:rgb{shade(a)}", html.escape(hover)
    return f'<span class="{classes}" style="{style}" title="{hover}">{text}</span>'


# ---- 4. Reproduction: each arm gets its own learning rate from the same sweep, then seeds. -------

# an arm's name in the table, and its flags of sd.py; first every condition, from the last to the
# first, so that critique is followed by its variants
ARMS = {
    **{condition: ["--condition", condition] for condition in reversed(sd.CONDITIONS)},
    "critique, first edit": ["--condition", "critique", "--stop-at-first-edit"],
    "critique, teacher‖student": ["--condition", "critique", "--kl", "teacher||student"],
    "critique, teacher‖student, first edit": [
        "--condition", "critique", "--kl", "teacher||student", "--stop-at-first-edit"
    ],
}  # fmt: skip

SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the preset's learning rate

# a run of an earlier call is used if it differs from the requested one in these fields alone
FREE_FIELDS = {
    "preset", "out", "resume", "sample_batch", "micro_batch", "kl_chunk",
    "gradient_checkpointing", "save_every", "show_every", "final_problems", "export", "device",
    "threads",
}  # fmt: skip


def main_arms(runs: dict) -> list[str]:
    """The arms that are a condition without other flags: they are compared in pairs and plotted."""
    return [arm for arm in sd.CONDITIONS if arm in runs]


def reproduce(root: Path, seeds: int, flags: list[str]) -> str:
    """Train all arms, or go on where an earlier call stopped. Writes table.md and table.json."""
    flags = flags or ["--preset", "toy"]  # also on a machine with CUDA
    cfg = sd.parse_config(flags)
    runs, rates = {}, {}
    for arm in ARMS:
        # the rate is chosen on the validation problems, so the test problems stay unseen
        swept = {}
        for factor in SWEEP:
            lr = cfg.lr * factor
            _, checks = read_log(train_once(root, arm, lr, 0, flags))
            swept[lr] = checks[-1]["validation_avg"]
        best = max(swept, key=swept.get)
        by_rate = ", ".join(f"{lr:g} → {100 * avg:.1f}" for lr, avg in swept.items())
        print(f"{arm}: validation Avg by learning rate {by_rate}", flush=True)
        rates[arm] = f"{best:g}"
        # a rate at the edge is marked, because a wider sweep might find a better one
        if best in (min(swept), max(swept)):
            rates[arm] += "*"
        runs[arm] = [train_once(root, arm, best, seed, flags) for seed in range(seeds)]

    groups, k = attempt_test(cfg), cfg.eval_samples
    base = mean_scores(groups)
    heading = (
        f"{len(groups)} test problems × {k} attempts, seeds 0–{seeds - 1}, {cfg.steps} steps of "
        f"{cfg.attempts_per_step} attempts; mean ± half of the 95 % t interval over seeds; * a "
        "rate at the edge of the sweep"
    )
    final = results_table("final", "checkpoint.pt", base, runs, rates, k)
    best = results_table("best on validation", "best.pt", base, runs, rates, k)
    text = "\n\n".join([heading, final, best, pairs_table(runs, k), costs_table(runs, k)]) + "\n"
    content = json.dumps({"rates": rates, "base": base, "runs": runs}, default=str)
    (root / "table.md").write_text(text, "utf-8")
    (root / "table.json").write_text(content, "utf-8")
    return text


def train_once(root: Path, arm: str, lr: float, seed: int, flags: list[str]) -> Path:
    """The folder of a run, which is trained, continued, or found finished."""
    # only letters, digits and dashes, for any file system
    name = "-".join(arm.replace(",", " ").replace("‖", " ").split())
    folder = root / f"{name}-lr{lr:g}-seed{seed}"
    cfg = sd.parse_config([*flags, *ARMS[arm]])
    every = cfg.eval_every or max(1, cfg.steps // 10)
    cfg = replace(
        cfg, lr=lr, seed=seed, out=str(folder), eval_every=every,
        show_every=0, final_problems=0, export=False,
    )  # fmt: skip
    sd.check_config(cfg)
    if every > cfg.steps:
        raise sd.UserError(
            "argument --eval-every: must be at most --steps, so that there is a curve"
        )
    if (folder / "checkpoint.pt").exists():
        checkpoint = sd.load_checkpoint(folder / "checkpoint.pt")
        for field in vars(cfg).keys() - FREE_FIELDS:
            if getattr(checkpoint["config"], field) != getattr(cfg, field):
                raise sd.UserError(
                    f"{folder} was trained with another {field}; choose another --out"
                )
        if checkpoint["state"]["step"] == cfg.steps:
            return folder
        cfg = replace(cfg, resume=True)
    print(f"training {folder}", flush=True)
    # a line for every step of every run would bury the table
    with contextlib.redirect_stdout(io.StringIO()):
        sd.train(cfg)
    return folder


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """(steps, validations) of a log. The last line of a running job may be incomplete."""
    steps, checks = [], []
    for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()[1:]:
        entry = sd.read_json(line)  # None: an incomplete line
        if entry and "validation_avg" in entry:
            checks.append(entry)
        elif entry:
            steps.append(entry)
    return steps, checks


def read_curves(folders: list) -> dict[str, np.ndarray]:
    """Validation accuracy on the way, and the tokens sampled so far: each (runs, points)."""
    curves = {"step": [], "avg": [], "solver": [], "critic": []}
    for folder in folders:
        steps, checks = read_log(folder)
        step = np.array([entry["step"] for entry in checks])
        curves["step"].append(step)
        curves["avg"].append([entry["validation_avg"] for entry in checks])
        # the log counts tokens by the step; a curve needs them from the start
        for name in ("solver", "critic"):
            spent = np.cumsum([entry[f"{name}_tokens"] for entry in steps])
            curves[name].append(spent[step - 1])
    curves = {name: np.array(rows) for name, rows in curves.items()}
    return {**curves, "sampled": curves["solver"] + curves["critic"]}


def test_scores(folders: list, name: str, metric: str) -> np.ndarray:
    """A metric of each run on the test problems, cached beside the checkpoint."""
    values = []
    for folder in folders:
        kept = folder / f"test-{name}.json"
        if not kept.exists():
            checkpoint = sd.load_checkpoint(folder / name)
            means = mean_scores(attempt_test(checkpoint["config"], checkpoint))
            kept.write_text(json.dumps(means), "utf-8")
        values.append(json.loads(kept.read_text("utf-8"))[metric])
    return np.array(values)


def over_seeds(values: np.ndarray, scale: int = 100) -> str:
    return f"{scale * values.mean():.1f} ± {half_width(scale * values):.1f}"


def results_table(title: str, checkpoint: str, base: dict, runs: dict, rates: dict, k: int) -> str:
    """Test scores of the base, and of each arm with that checkpoint."""
    metrics = ("Avg", "Pass", "Maj", "length")
    base_row = ["base", "-"]
    for metric in metrics:
        base_row.append(f"{METRICS[metric] * base[metric]:.1f}")
    rows = [base_row]
    for arm, folders in runs.items():
        rows.append([arm, rates[arm]])
        for metric in metrics:
            values = test_scores(folders, checkpoint, metric)
            rows[-1].append(over_seeds(values, METRICS[metric]))
    return markdown([title, "lr", *headings(k)[:4]], rows)


def pairs_table(runs: dict, k: int) -> str:
    """Differences between the main arms, paired by seed."""
    rows = []
    for one, other in itertools.combinations(main_arms(runs), 2):
        difference = test_scores(runs[one], "checkpoint.pt", "Avg")
        difference -= test_scores(runs[other], "checkpoint.pt", "Avg")
        rows.append([f"{one} − {other}", over_seeds(difference)])
    return markdown(["paired by seed, final", f"Avg@{k}"], rows)


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
    return markdown(head, rows)


# ---- 5. Figures. ---------------------------------------------------------------------------------


def load_pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise sd.UserError("figures need matplotlib: pip install matplotlib")
    plt.switch_backend("Agg")
    # told apart in print and by the colour-blind; "C0" is the first
    colours = ["#b2182b", "#2166ac", "#4d4d4d", "#e08214", "#1b7837", "#762a83"]
    plt.rcParams |= {
        "axes.prop_cycle": plt.cycler(color=colours),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.markersize": 3,
        "savefig.dpi": 150,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "sd",
        "text.parse_math": False,  # a token may be "$"
    }
    return plt


def save_figure(figure, out: Path) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    # without a date, equal data give equal files
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    return f"wrote {out}"


# what --plot draws of a run: title, names in log.jsonl, factor for display
PANELS = (
    ("accuracy, % (dots: validation)", ("accuracy", "validation_avg"), 100),
    ("loss, nats a token", ("loss",), 1),
    ("entropy, nats a token (dots: KL to the base)", ("entropy", "kl_base"), 1),
    ("tokens an attempt", ("length",), 1),
    ("critiques that failed", ("critic_failed",), 1),
    ("seconds a step", ("seconds",), 1),
)


def plot_runs(folders: list[str], out: Path) -> str:
    """Draw the logs of runs, finished or not. The suffix of `out` decides: PNG or SVG."""
    plt = load_pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for number, folder in enumerate(folders):
        steps, checks = read_log(folder)
        for entry in steps:
            cost = entry["cost"]
            entry["seconds"] = cost["sample_s"] + cost["critic_s"] + cost["train_s"]
        for axis, (label, names, scale) in zip(axes.flat, PANELS):
            # what is not measured at every step is drawn as dots
            for name, entries, style in zip(names, (steps, checks), (".-", "o:")):
                x = [entry["step"] for entry in entries]
                y = [scale * entry[name] for entry in entries]
                axis.plot(x, y, style, color=f"C{number}", label=folder)
            axis.set_title(label, loc="left", fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 1].legend(fontsize=8)
    return save_figure(figure, out)


def plot_curves(root: Path, out: Path) -> str:
    """Validation accuracy of the main arms, by steps and by sampled tokens, with t intervals."""
    plt = load_pyplot()
    runs = json.loads((root / "table.json").read_text("utf-8"))["runs"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    names = {"step": "step", "sampled": "sampled tokens (solver + critic)"}
    for axis, (name, label) in zip(axes, names.items()):
        for arm in main_arms(runs):
            curves = read_curves(runs[arm])
            x, y = curves[name].mean(0), 100 * curves["avg"]
            mean, half = y.mean(0), half_width(y)
            axis.plot(x, mean, "o-", label=arm)
            axis.fill_between(x, mean - half, mean + half, alpha=0.2, linewidth=0)
        axis.set(xlabel=label, ylim=(0, 102))
    axes[0].set_ylabel("validation accuracy, %")
    axes[0].legend()
    return save_figure(figure, out)


COLUMNS = 100  # characters of a line of tokens


def plot_tokens(study: Path, names: list[str] | None, out: Path) -> str:
    """Draw the examples of a token study as running text, once for each context, or named one."""
    plt = load_pyplot()
    examples = json.loads((study / "tokens.json").read_text("utf-8"))["examples"]
    for name in names or []:
        if any(name not in e["rows"] for e in examples):
            raise sd.UserError(f"argument --contexts: {study}/tokens.json has no {name!r}")
    figure = plt.figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    line = 0
    for e in examples:
        axis.text(0, line, textwrap.shorten(title(e), 105), va="center", fontsize=9)
        line += 1
        placed = flow(e["tokens"])
        _, _, last_line = placed[-1]
        for name in names or e["rows"]:
            # the name ends where the tokens begin
            axis.text(-1, line, name.split(" (")[0], ha="right", va="center", fontsize=9)
            for t, (text, x, y) in enumerate(placed):
                a = e["rows"][name]["advantage"][t]
                draw_token(plt, axis, text, x, line + y, a, t == e["edit"])
            line += last_line + 1
        line += 1
    axis.text(0, line, LEGEND, va="center", fontsize=9)
    figure.set_size_inches(9, 0.2 * (line + 1))
    axis.set(xlim=(-12, COLUMNS + 1), ylim=(line + 0.7, -0.7))
    return save_figure(figure, out)


def draw_token(plt, axis, text: str, x: int, y: int, a: float, is_edit: bool) -> None:
    colour = np.array(shade(a)) / 255
    axis.add_patch(plt.Rectangle((x, y - 0.45), len(text), 0.9, color=colour, lw=0))
    centre = x + len(text) / 2
    axis.text(centre, y, text, ha="center", va="center", fontsize=9.3, family="monospace")
    if a < UNDERLINED:
        axis.hlines(y + 0.4, x, x + len(text), color="black", lw=0.8)
    if is_edit:
        axis.vlines(x, y - 0.5, y + 0.5, color="black", lw=2)


def flow(tokens: list[str]) -> list[tuple[str, int, int]]:
    """(text, column, line) of each token, wrapped; line ends are marks, to save space."""
    placed, x, y = [], 0, 0
    for token in tokens:
        text = token.replace("\n\n", "\n").replace("\n", "⏎")
        if x + len(text) > COLUMNS:
            x, y = 0, y + 1
        placed.append((text, x, y))
        x += len(text)
    return placed


# ---- 6. Filter, after the paper's: keep the problems that the base solves, but rarely. -----------


def filter_pool(pool: str, out: Path, below: float, samples: int, flags: list[str]) -> str:
    """Write the kept rows to `out`. Scores are saved as they are computed: run again to resume."""
    if out.resolve() == Path(pool).resolve():
        raise sd.UserError("argument --out: the pool would be overwritten; name another file")
    cfg = sd.parse_config([*flags, "--data", pool, "--eval-samples", str(samples)])
    chat = sd.load_solver(cfg)
    rows, dropped = sd.read_problems(cfg, chat)
    out.parent.mkdir(parents=True, exist_ok=True)
    avg = score_pool(rows, Path(f"{out}.scores.jsonl"), chat, cfg)
    kept = [json.dumps(row) + "\n" for key, (_, row) in rows.items() if 0 < avg[key] < below]
    out.write_text("".join(kept), "utf-8")
    dropped["never solved"] = sum(avg[key] == 0 for key in rows)
    dropped[f"solved {below:g} or more of the time"] = sum(avg[key] >= below for key in rows)
    total = len(kept) + sum(dropped.values())
    return f"kept {len(kept)} of {total} rows in {out}; dropped: {sd.format_counts(dropped)}"


def score_pool(rows: dict, path: Path, chat: sd.Chat, cfg: sd.Config) -> dict[str, float]:
    """Avg of each problem, from the file at `path` if it is there, else sampled and added to it."""
    k = cfg.eval_samples
    # scores with other settings do not count
    settings = {name: getattr(cfg, name) for name in (*SHARED_FIELDS, "eval_samples")}
    avg = {}
    path.touch()
    for _, entry in sd.read_rows(path):
        # a line that was cut off is no dict; a problem's answer may have been corrected
        if isinstance(entry, dict) and entry["settings"] == settings:
            problem, _ = rows.get(entry["problem"], (None, None))
            if problem and problem.answer == entry["answer"]:
                avg[entry["problem"]] = entry["avg"]
    # random numbers follow from a problem's place in the pool, not from what is left
    todo = []
    for number, (key, (problem, _)) in enumerate(rows.items()):
        if key not in avg:
            todo.append((number, problem))
    # as many problems at once as fill a batch of the sampler
    at_once = max(1, cfg.sample_batch // k)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut off
        for start in sd.progress(range(0, len(todo), at_once), desc="problems"):
            part = todo[start : start + at_once]
            rewards = [r.reward for r in sd.attempt(chat, part, cfg, k, sd.EVAL_SEED)]
            for (_, problem), mean in zip(part, np.reshape(rewards, (-1, k)).mean(1)):
                key = normalise(problem.question)
                avg[key] = float(mean)
                line = {"problem": key, "answer": problem.answer, "avg": avg[key]}
                line["settings"] = settings
                file.write(json.dumps(line) + "\n")
            file.flush()  # a kill costs one batch
    return avg


# ---- 7. Preflight: is a long run worth starting? -------------------------------------------------


def preflight(cfg: sd.Config, count: int, samples: int) -> str:
    """Without training: solver, critic and teacher on validation problems, and a verdict.

    The critic is whoever writes the contexts of --condition; in grpo and reference, which have
    none, the one of critique.
    """
    chat = sd.load_solver(cfg)
    problems = sd.load_problems(cfg, chat).validation[:count]
    if len(problems) < 2:
        raise sd.UserError(
            "--preflight needs 2 validation problems: raise --problems or --validation-problems"
        )
    condition = sd.CONDITIONS[cfg.condition]
    if not condition.has_teacher or condition.write is sd.copy_solutions:
        condition = sd.CONDITIONS["critique"]
    critic = sd.load_critic(cfg, chat) if condition.asks_critic else None
    numbered, seconds = list(enumerate(problems)), {}
    with sd.timed(seconds, "sample"):
        rollouts = sd.attempt(chat, numbered, cfg, samples, sd.EVAL_SEED)
    with sd.timed(seconds, "critic"):
        critiques = condition.write(rollouts, critic, cfg)

    judged = judge(rollouts, critiques, samples, cfg)
    right, steps = judged.right, judged.steps
    wrong, every = 1 - right, np.ones(right.shape)
    shares = {
        "base: right": (right, every),
        "base: in the format asked for": (judged.formed, every),
        "base: cut at the cap": (judged.truncated, every),
        "critic: failed (empty, cut off, malformed)": (judged.failed, every),
        "critic: right answer on wrong attempts": (judged.corrected * wrong, wrong),
        "critic: copies right attempts whole": (judged.whole * right, right),
        "critic: steps copied from the attempt": (judged.copied, steps),
    }
    contexts = {
        "its critique": critiques,
        "the reference": [r.problem.solution for r in rollouts],
        # the control: a critique, but of another problem
        "another problem's critique": critiques[samples:] + critiques[:samples],
    }
    rows = []
    for name, (top, bottom) in shares.items():
        rows.append([name, bracketed(estimate(top, bottom), unit=" %"), f"{bottom.sum():.0f}"])
    gaps = {}
    for name, texts in contexts.items():
        accuracy, number, gaps[name] = teacher_gap(chat, rollouts, texts, samples, cfg)
        result = "-"
        if number:
            result = f"{100 * accuracy:.1f} %, gap {bracketed(gaps[name], form='+.1f')}"
        rows.append([f"teacher that reads {name}: right", result, str(number)])
    # a quarter of the problems, because a group has more attempts
    few = numbered[: max(1, len(problems) // 4)]
    rewards = [r.reward for r in sd.attempt(chat, few, cfg, cfg.group_size, sd.EVAL_SEED)]
    rewards = np.reshape(rewards, (-1, cfg.group_size))
    flat = rewards.min(1) == rewards.max(1)
    equal = bracketed(estimate(flat), unit=" %")
    rows.append(["grpo: groups with equal rewards", equal, str(len(flat))])
    rows += cost_rows(chat, rollouts, critiques, seconds, cfg)
    head = f"{len(problems)} validation problems × {samples} attempts; 95 % bootstrap intervals"
    table_text = markdown(["before training", "", "of"], rows)
    return "\n".join([head, "", table_text, *verdicts(judged, gaps, flat.mean())])


class Judged(NamedTuple):
    """Attempts and their critiques, each (problems, attempts). All but the last two are 0 or 1."""

    right: np.ndarray
    formed: np.ndarray  # in the format asked for
    truncated: np.ndarray
    failed: np.ndarray  # no valid critique
    corrected: np.ndarray  # the critique has the right answer
    whole: np.ndarray  # the critique is the attempt
    copied: np.ndarray  # steps of the critique that stand in the attempt
    steps: np.ndarray  # steps of the critique


def judge(rollouts: list, critiques: list, samples: int, cfg: sd.Config) -> Judged:
    rows = []
    for r, critique in zip(rollouts, critiques):
        text = critique or ""
        has_steps = FORMATS[cfg.prompts].find_steps(r.text) != []
        copied = sd.copied_steps(r.text, text, cfg)
        rows.append(
            Judged(
                right=r.reward,
                formed=has_steps and extract_answer(r.text) is not None,
                truncated=r.sample.truncated,
                failed=critique is None,
                corrected=sd.is_correct(text, r.problem.answer, cfg.grader),
                whole=critique is not None and trace(text, cfg) == trace(r.text, cfg),
                copied=sum(copied),
                steps=len(copied),
            )
        )
    values = np.array(rows, float).reshape(-1, samples, len(Judged._fields))
    return Judged(*values.transpose(2, 0, 1))


def trace(text: str, cfg: sd.Config) -> str:
    """For comparisons: without the words around the trace, which a critique never has."""
    return normalise(FORMATS[cfg.prompts].extract_trace(text) or text)


def teacher_gap(
    chat: sd.Chat, rollouts: list, contexts: list, samples: int, cfg: sd.Config
) -> tuple[float, int, tuple]:
    """(accuracy, number of attempts, estimate of the gap): the teacher attempts the same problems.

    The gap to the base is paired by problem. arXiv 2605.30070 reports that it predicts the final
    gain linearly.
    """
    readers = [replace(r, context=c, teacher_prompt=None) for r, c in zip(rollouts, contexts)]
    scored = sd.prepare(chat, readers, replace(cfg, condition="critique"))
    rng = np.random.default_rng(sd.EVAL_SEED)
    uniforms = rng.random((len(scored), cfg.max_new_tokens), np.float32)
    prompts = [r.teacher_prompt for r in scored]
    drawn = sd.generate(
        chat, prompts, cfg.max_new_tokens, uniforms, cfg.temperature, cfg.sample_batch
    )
    correct = []
    for r, sample in zip(scored, drawn):
        correct.append(sd.is_correct(chat.decode(sample.ids), r.problem.answer, cfg.grader))
    valid = np.array([r.teacher_prompt is not None for r in readers])
    gain = np.zeros(len(rollouts))
    gain[valid] = np.array(correct, float) - [r.reward for r in scored]
    gap = estimate(gain.reshape(-1, samples), valid.reshape(-1, samples))
    return sum(correct) / max(1, len(correct)), len(correct), gap


def cost_rows(chat, rollouts, critiques, seconds: dict, cfg: sd.Config) -> list:
    """Times of the parts, and what they add up to. One update is taken, at learning rate 0."""
    sd.add_adapters(chat.model, cfg)
    if cfg.gradient_checkpointing:
        chat.model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.0)
    cfg = replace(cfg, condition="critique")
    part = rollouts[: 2 * cfg.micro_batch]
    part = [replace(r, context=c or r.problem.solution) for r, c in zip(part, critiques)]
    scored = sd.prepare(chat, part, cfg)
    with sd.timed(seconds, "update"):
        sd.update(chat, optimizer, scored, cfg)
    n, each = len(rollouts), seconds["update"] / len(part)
    step = (seconds["sample"] + seconds["critic"]) / n + each
    step *= cfg.attempts_per_step
    tokens = {
        "sample": sum(len(r.sample.ids) for r in rollouts),
        "critic": sum(r.critic_tokens for r in rollouts),
    }
    rows = []
    for work, total in tokens.items():
        speed = total / max(seconds[work], 1e-3)
        rows.append([f"{work}: tokens each", f"{total / n:.0f}", str(n)])
        rows.append([f"{work}: tokens a second", f"{speed:.0f}", str(n)])
    return rows + [
        ["update: seconds an attempt", f"{each:.2f}", str(len(part))],
        ["a step of critique, estimated", f"{step:.0f} s", ""],
        [f"the run of {cfg.steps} steps, estimated", f"{cfg.steps * step / 3600:.1f} h", ""],
        ["peak memory", f"{sd.peak_memory(chat.model.device) / 1024:.1f} GiB", ""],
    ]


def verdicts(judged: Judged, gaps: dict, flat: float) -> list[str]:
    """One line for each condition, in words. The first reason that applies is given."""
    n, right, formed = judged.right.size, judged.right.sum(), judged.formed.sum()
    failed, wrong = judged.failed.sum(), judged.right == 0
    copied, corrected = judged.whole[wrong].sum(), judged.corrected[wrong].sum()
    other, stronger = "try other --prompts", "use a stronger one, or other --prompts"
    attempts = f"{wrong.sum()} wrong attempts"
    if formed < n / 2:
        critique = f"the base keeps to the format in {formed:.0f} of {n} attempts: {other}"
    elif failed > n / 2:
        critique = f"the critic fails on {failed:.0f} of {n} attempts: {stronger}"
    elif copied > wrong.sum() / 2:
        critique = f"the critic copies {copied:.0f} of {attempts} unchanged: {stronger}"
    elif corrected < wrong.sum() / 2:
        critique = f"the critic corrects {corrected:.0f} of {attempts}: {stronger}"
    else:
        critique = gap_verdict(gaps["its critique"])
    grpo = f"{flat:.0%} of the groups have equal rewards"
    if right in (0, n):
        grpo += f": with {right:.0f} of {n} attempts right there is nothing to compare"
    elif flat > 0.8:
        grpo += ": most groups carry no signal; use problems of another difficulty"
    else:
        grpo += ": the others carry a signal"
    return [
        f"critique: {critique}",
        f"reference: {gap_verdict(gaps['the reference'])}",
        f"grpo: {grpo}",
    ]


def gap_verdict(gap: tuple) -> str:
    mean, low, high = gap
    points = bracketed(gap, form="+.0f", unit=" points")
    if math.isnan(mean):
        return "no context is valid and fits the window"
    if low > 0:
        return f"can work: the teacher is better than the base by {points}"
    if high < 0:
        return f"is likely to do harm: the teacher is worse than the base, {points}"
    return f"undecided: the teacher's gain is {points}; use more --problems"


# ---- 8. Command line. ----------------------------------------------------------------------------


def positive(text: str) -> int:
    """The type of an option that must be at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = sd.Parser(
        prog="eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--reproduce and --filter pass what follows -- on to sd.py: "
        "eval.py --reproduce -- --model FOLDER --data FILE",
    )
    add = parser.add_argument
    add("runs", nargs="*", help="run folders to compare; or, after --, flags of sd.py")
    add("--tokens", metavar="RUN", help="A of every token, on the problems that RUN held out")
    add("--reproduce", action="store_true", help="train and evaluate every arm; can be interrupted")
    add(
        "--plot",
        action="store_true",
        help="draw the runs' logs [plot.png]; with --tokens RUN, the examples of its study "
        "[advantage.png]; without either, the curves of --reproduce [assets/curves.svg]",
    )
    add(
        "--preflight",
        action="store_true",
        help="no training: judge solver, critic and teacher; takes the flags of sd.py",
    )
    add("--filter", metavar="POOL", help="a problem file, as sd.py's --data")
    add("--checkpoint", default="checkpoint.pt", help="checkpoint.pt (the last) or best.pt")
    add(
        "--critic",
        metavar="URL",
        help="--tokens: repeat the address of RUN's http critic to allow it",
    )
    add(
        "--samples",
        type=positive,
        help="attempts per problem, k [the run's; --tokens 4; --filter 16; --preflight 2]",
    )
    add(
        "--problems",
        type=positive,
        help="number of problems, from the first on [all; --tokens 50; --preflight 32]",
    )
    add(
        "--contexts",
        help=f"--tokens: some of {', '.join(token_contexts())}; the first must copy the attempt "
        "[all]",
    )
    add("--seeds", type=positive, default=5, help="--reproduce: seeds of each arm [5]")
    add(
        "--below", type=float, default=0.3125,
        help="--filter: keep problems solved in a smaller share of attempts [5/16, the paper's]",
    )  # fmt: skip
    add(
        "--out",
        help="where to write: a folder [the runs' parent; --reproduce runs/reproduce] or a file "
        "[--filter hard.jsonl; --plot: see there]",
    )
    return parser


def run_command(argv: list[str] | None) -> str:
    """What the command prints in the end."""
    args, unknown = build_parser().parse_known_args(argv)
    if args.preflight:
        return run_preflight(argv)
    if unknown:
        raise sd.UserError(f"unknown argument {unknown[0]}; see --help")
    names = args.contexts.split(",") if args.contexts else None
    out = Path(args.out) if args.out else None
    count, k = args.problems, args.samples
    if args.reproduce:
        return reproduce(out or Path("runs/reproduce"), args.seeds, args.runs)
    if args.filter:
        return filter_pool(args.filter, out or Path("hard.jsonl"), args.below, k or 16, args.runs)
    if args.plot and args.tokens:
        return plot_tokens(Path(args.tokens), names, out or Path("advantage.png"))
    if args.plot and args.runs:
        return plot_runs(args.runs, out or Path("plot.png"))
    if args.plot:
        return plot_curves(Path("runs/reproduce"), out or Path("assets/curves.svg"))
    if args.tokens:
        return study_tokens(args.tokens, count or 50, k or 4, args.critic, names)
    if args.runs:
        return evaluate_runs(args.runs, args.checkpoint, count, k, out or Path(args.runs[0]).parent)
    raise sd.UserError(
        "name run folders, or --tokens, --reproduce, --plot, --preflight, --filter; see --help"
    )


def run_preflight(argv: list[str] | None) -> str:
    """All flags but these three are sd.py's, --critic as well."""
    parser = sd.Parser(allow_abbrev=False)
    parser.add_argument("--preflight", action="store_true")
    parser.add_argument("--problems", type=positive, default=32)
    parser.add_argument("--samples", type=positive, default=2)
    args, flags = parser.parse_known_args(argv)
    cfg = sd.parse_config([flag for flag in flags if flag != "--"])
    return preflight(cfg, args.problems, args.samples)


def guarded(program: str, job: Callable[[], str]) -> int:
    """Print what the job returns.

    Exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C, else 1.
    """
    sd.prepare_output()
    try:
        print(job())
        return 0
    except sd.UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "stopped; repeat the command: training and --filter go on from here"
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        code, message = 1, str(error)[:300]
    print(f"{program}: {sd.printable(message)}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    return guarded("eval.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
