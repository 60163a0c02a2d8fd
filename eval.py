"""Evaluate runs of sd.py on problems that they never saw, and show why they differ.

  python eval.py runs/critique runs/reference runs/grpo     compare runs with the base
  python eval.py --tokens runs/critique                     what each context does to every token
  python eval.py --preflight --model FOLDER --data FILE     before a long run: can it work?
  python eval.py --filter pool.jsonl --out hard.jsonl       keep what the base solves, but rarely
  python eval.py --plot runs/critique runs/grpo             draw runs, finished or not

Avg@k is the mean accuracy, Pass@k the share of problems solved at least once, and Maj@k the share
whose most frequent answer is right. Intervals are 95 %, by a bootstrap over problems. Base and runs
sample with the same random numbers, so their differences are paired by problem.
"""

import argparse
import bisect
import html
import itertools
import json
import math
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import sd
from critic_prompts import FORMATS, STYLES, extract_answer, is_correct, normalise, strip_thinking

# ---- 1. Compare runs with their base. ------------------------------------------------------------

# The knobs in which runs must agree to share a table. Their --data may differ in the solutions: the
# fingerprint says whether the questions are the same.
SHARED = (
    "model", "prompts", "grader", "dtype", "test_problems", "temperature", "max_new_tokens",
)  # fmt: skip


def compare(folders, name, count, k, out, given) -> str:
    """The table of the base and the runs. Writes each attempt to eval.jsonl, the table to eval.md.

    name: checkpoint.pt or best.pt. count: how many of the test problems. k: attempts at each.
    given: knobs of sd.py that replace those of the runs.
    """
    checkpoints = [sd.load_checkpoint(Path(folder, name)) for folder in folders]
    first = checkpoints[0]["config"]
    cfg = replace(first, **given)
    cfg = replace(cfg, eval_samples=k or cfg.eval_samples)
    problems = sd.load_problems(cfg, sd.load_model(cfg.model, cfg))
    for folder, checkpoint in zip(folders, checkpoints):
        for knob in SHARED:
            if getattr(checkpoint["config"], knob) != getattr(first, knob):
                raise sd.UserError(f"{folder} and {folders[0]} differ in {knob}: use two tables")
        # it may have trained on these test problems
        if checkpoint["fingerprint"] != problems.fingerprint:
            raise sd.UserError(f"{folder} was trained when {cfg.data} held other problems")

    out.mkdir(parents=True, exist_ok=True)
    results = []
    with open(out / "eval.jsonl", "w", encoding="utf-8") as file:
        for run, checkpoint in zip(["base", *folders], [None, *checkpoints]):
            groups = attempt_test(cfg, problems, checkpoint, count)
            results.append((run, scores(groups, cfg.grader)))
            for r in itertools.chain(*groups):
                entry = {
                    "run": run,
                    "problem": r.problem.question,
                    "wanted": r.problem.answer,
                    "text": r.text,
                    "correct": bool(r.reward),
                }
                file.write(json.dumps(entry) + "\n")
    text = (
        f"{len(groups)} held-out problems × {cfg.eval_samples} attempts, {name}, seed "
        f"{sd.EVAL_SEED}; 95 % bootstrap intervals over problems\n\n"
        f"{comparison_table(results, cfg.eval_samples)}\n"
    )
    (out / "eval.md").write_text(text, "utf-8")
    return text


def attempt_test(cfg, problems, checkpoint=None, count=None) -> list[list[sd.Rollout]]:
    """Attempts at the first `count` test problems, by the base or by a checkpoint."""
    chat = sd.load_model(cfg.model, cfg)
    if checkpoint:
        sd.add_adapters(chat.model, checkpoint["config"])
        sd.load_adapters(chat, checkpoint, problems)
    return sd.evaluate(chat, problems.test[:count], cfg)


# Each metric, as the heading of its column, and the factor for display. A share has 100.
METRICS = {
    "Avg@{k}": 100, "Pass@{k}": 100, "Maj@{k}": 100,
    "length": 1, "truncated, %": 100, "unparsable, %": 100,
}  # fmt: skip


def comparison_table(results, k) -> str:
    """A row for each (name, scores), base first, then their differences, paired by problem."""
    rows = [scores_row(name, values, 0) for name, values in results]
    for (first, before), (second, after) in itertools.combinations(results, 2):
        rows.append(scores_row(f"{second} − {first}", after - before, -1))
    head = [metric.format(k=k) for metric in METRICS]
    return markdown(["", *head], rows)


def scores_row(name, values, lowest) -> list[str]:
    """lowest: the least that a share, or a difference of two shares, can be."""
    cells = [name]
    for metric, scale in zip(values, METRICS.values()):
        limits = (lowest, 1) if scale == 100 else None
        cells.append(bracketed(estimate(metric, limits=limits), scale))
    return cells


def markdown(head, rows) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def scores(groups, grader) -> np.ndarray:
    """(len(METRICS), problems). A group is the attempts at one problem."""
    rows = []
    for group in groups:
        counts = []
        for r in group:
            counts.append((r.reward, len(r.ids), r.truncated, find_answer(r) is None))
        right, *rest = np.mean(counts, axis=0)
        rows.append([right, right > 0, majority(group, grader), *rest])
    return np.array(rows).T


def find_answer(r) -> str | None:
    """As the grader reads it: what stands in a thought is no answer."""
    return extract_answer(strip_thinking(r.text))


def majority(group, grader) -> float:
    """1 if the most frequent answer is right; in a tie, the share of the tied answers that are.

    Two answers are one vote if the grader takes one for the other.
    """
    right = 0
    votes = {}  # how often each wrong answer was given, under the form that came first
    for r in group:
        answer = find_answer(r)
        if r.reward:
            right += 1
        elif answer is not None:
            for known in votes:
                if is_correct(r.text, known, grader):
                    answer = known
                    break
            votes[answer] = votes.get(answer, 0) + 1
    counts = [right, *votes.values()]
    tied = counts.count(max(counts))
    return 1 / tied if 0 < right == max(counts) else 0.0


def estimate(top, bottom=1.0, limits=None) -> tuple[float, float, float]:
    """(Σ top / Σ bottom, low, high), by a percentile bootstrap; by default the mean of top.

    Both are (problems,) or (problems, attempts). Problems are resampled, because the attempts at
    one problem are not independent. A problem whose bottom is 0 is left out.

    Where all problems have the same value, a bootstrap has no width, be they 2 or 1,000. If the
    value has limits, Wilson's interval says how many problems might have another one.
    """
    bottom = np.broadcast_to(bottom, top.shape)
    top, bottom = np.atleast_2d(top.T).sum(0), np.atleast_2d(bottom.T).sum(0)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    n = len(top)
    if n == 0:
        return math.nan, math.nan, math.nan
    value = top.sum() / bottom.sum()
    if limits and np.ptp(top / bottom) == 0:
        others = 1.96**2 / (n + 1.96**2)  # the upper end for 0 of n
        lowest, highest = limits
        return value, value - others * (value - lowest), value + others * (highest - value)
    # seeded, so that a table repeats to the digit
    picks = np.random.default_rng(0).integers(n, size=(10_000, n))
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    return value, *np.percentile(ratios, [2.5, 97.5])


def bracketed(numbers, scale=100, form=".1f", unit="") -> str:
    """An estimate as `value [low, high]`; without an interval that has no width; "-": no data."""
    value, low, high = (scale * number for number in numbers)
    if math.isnan(value):
        return "-"
    text = f"{value:{form}}{unit}"
    return text if low == high else f"{text} [{low:{form}}, {high:{form}}]"


# ---- 2. Token study: the paper's argument as numbers and as pictures. ----------------------------
#
# The base attempts the problems once. Each context in turn is put into the teacher's prompt, and
# A_t of eq (2) is computed at every token of the same attempts. A context is good if the negative A
# of a wrong attempt falls on its first wrong step, and if a right attempt is left alone.


def study_tokens(folder, count, samples, wanted, given) -> str:
    """The table of contexts. Writes tokens.md, .json, .html and .svg into the run's folder.

    The first context must copy the attempt, because it says where the first wrong step is.
    """
    rows = context_rows()
    names = wanted.split(",") if wanted else list(rows)
    if set(names) - set(rows):
        raise sd.UserError(f"argument --contexts: choose from {', '.join(rows)}")
    cfg = sd.load_checkpoint(Path(folder, "checkpoint.pt"))["config"]
    if sd.is_url(cfg.critic) and "critic" not in given:
        raise sd.UserError("name the http --critic again; it will get your API key")
    cfg = replace(cfg, **given, group_size=samples)
    chat = sd.load_model(cfg.model, cfg)
    test = list(enumerate(sd.load_problems(cfg, chat).test[:count]))
    rollouts = sd.attempt(chat, test, cfg, samples, sd.EVAL_SEED)
    for r, advantage in zip(rollouts, sd.group_advantages(rollouts, cfg)):
        r.advantage = advantage
    critic, contexts = sd.load_critic(cfg, chat), {}
    for name in names:
        write, style = rows[name]
        contexts[name] = write(rollouts, critic, replace(cfg, critic_style=style))

    sums = np.zeros((len(contexts), len(rollouts), 6))
    studied = []
    for i, r in enumerate(sd.progress(rollouts, desc="score")):
        readers = [replace(r, context=texts[i]) for texts in contexts.values()]
        # all contexts are measured on the same attempts: those for which each is valid and fits
        if len(sd.add_teacher_prompts(chat, readers, cfg)) < len(readers):
            continue
        step, advantages = wrong_step(chat, readers[0], cfg), []
        for context, reader in enumerate(readers):
            a = sd.token_advantages(chat, reader, cfg).cpu().numpy()
            sums[context, i] = localise(r.reward, a, step)
            advantages.append(a)
        if step:
            studied.append((readers, advantages, step))

    examples = []
    for reward in (0, 1):
        fit = [case for case in studied if case[0][0].reward == reward]
        if fit:
            examples.append(example(chat, names, *min(fit, key=rank), cfg))
    numbers = {name: measures(part, samples) for name, part in zip(contexts, sums)}
    wrong, right = np.count_nonzero(sums[0, :, :3].sum(1)), np.count_nonzero(sums[0, :, 5])
    head = (
        f"{len(rollouts)} attempts of the base at {len(test)} held-out problems, seed "
        f"{sd.EVAL_SEED}: {right} right, {wrong} wrong with a critique that reaches the right "
        "answer; 95 % bootstrap intervals over problems; A in nats"
    )
    table = markdown(["context", *MEASURES], [[name, *row] for name, row in numbers.items()])
    files = {
        "md": f"{head}\n\n{table}\n",
        "json": json.dumps({"numbers": numbers, "examples": examples}, indent=1),
        "html": page(examples, head, numbers),
    }
    if examples:
        # for a README: the wrong attempt under three contexts
        three = names[0], "reference", "grpo"
        files["svg"] = strips(examples[0], [name for name in three if name in examples[0]["rows"]])
    for suffix, content in files.items():
        Path(folder, f"tokens.{suffix}").write_text(content, "utf-8")
    return f"{head}\n\n{table}\n\nwrote {folder}/tokens.md, .json, .html and .svg"


def context_rows() -> dict[str, tuple]:
    """{context: (its function of CONTEXTS, the style of the critic)}; a row for each style."""
    rows = {}
    for name, write in sd.CONTEXTS.items():
        if name == "critique":
            for style in STYLES:
                rows[f"critique ({style})"] = write, style
        else:
            rows[name] = write, "copy"
    return rows


def wrong_step(chat, r, cfg) -> tuple[int, int] | None:
    """(start, end) in tokens of the first step of a wrong attempt that its critique does not copy.

    If it copies all steps, what follows them, with the answer. An attempt without steps is divided
    into its lines. (0, 0) for a right attempt that is copied. None if the critique is not as good.
    """
    if r.reward:
        return (0, 0) if is_copy(r.context, r.text, cfg) else None
    if not is_correct(r.context, r.problem.answer, cfg.grader):
        return None
    find_steps, text = FORMATS[cfg.prompts].find_steps, chat.decode(r.ids)
    steps = find_steps(text) or text.splitlines()
    corrected = find_steps(r.context) or r.context.splitlines()
    end = 0  # in characters
    for step, other in itertools.zip_longest(steps, corrected[: len(steps)], fillvalue=""):
        start = text.index(step, end)
        end = start + len(step)
        if normalise(step) != normalise(other):
            break
    else:
        start, end = end, len(text)
    # in tokens
    ends = [len(chat.decode(r.ids[: t + 1])) for t in range(len(r.ids))]
    first = min(bisect.bisect(ends, start), len(ends) - 1)
    return first, max(bisect.bisect(ends, end), first + 1)


def is_copy(context, attempt, cfg) -> bool:
    """Whether a critique changes nothing. It never has the words around the attempt's trace."""
    trace = FORMATS[cfg.prompts].extract_trace(attempt) or attempt
    return context is not None and normalise(context) == normalise(trace)


MEASURES = (
    "wrong: negative A before the first wrong step",
    "wrong: negative A on it",
    "wrong: negative A after it",
    "right: mean abs(A)",
    "right: tokens with A < −0.1",
)


def localise(reward, a, step) -> list[float]:
    """Six sums over the tokens of one attempt; what does not apply is 0.

    Negative A before, on and after the step, if it is wrong; if it is right, abs(A), the number of
    lowered tokens, and the number of tokens.
    """
    if reward:
        return [0, 0, 0, np.abs(a).sum(), (a < -0.1).sum(), len(a)]
    if step is None:
        return [0] * 6
    parts = np.split(np.maximum(-a, 0), step)
    return [part.sum() for part in parts] + [0] * 3


def measures(sums, samples) -> list[str]:
    """MEASURES of one context, from `localise` of all attempts, (attempts, 6)."""
    *blame, absolute, lowered, tokens = sums.T.reshape(6, -1, samples)
    cells = [bracketed(estimate(part, sum(blame), (0, 1)), unit=" %") for part in blame]
    cells.append(bracketed(estimate(absolute, tokens), 1, ".2f"))
    cells.append(bracketed(estimate(lowered, tokens, (0, 1)), unit=" %"))
    return cells


def rank(case: tuple) -> tuple:
    """The best example has a GRPO advantage, does not start with the wrong step, and is short."""
    readers, _, (start, end) = case
    return readers[0].advantage == 0, start == 0 < end, len(readers[0].ids)


def example(chat, names, readers, advantages, step, cfg) -> dict:
    """One attempt for the pictures."""
    r, rows = readers[0], {}
    tokens = [token_text(chat, i) for i in r.ids]
    for name, reader, a in zip(names, readers, advantages):
        note = explain(chat, reader, a, cfg)
        rows[name] = {"context": reader.context, "advantage": a.tolist(), "note": note}
    note = f"no teacher; {r.advantage:+.2f} for every token, by eq (3)"
    rows["grpo"] = {"context": "", "advantage": [r.advantage] * len(tokens), "note": note}
    critic = sd.critic_messages(r, replace(cfg, critic_style="copy"))
    find_steps = FORMATS[cfg.prompts].find_steps
    steps = zip(find_steps(r.text), find_steps(r.context))
    corrected = [mended for attempted, mended in steps if attempted != mended]
    return {
        "problem": r.problem.question,
        "answer": r.problem.answer,
        "outcome": "right" if r.reward else "wrong",
        "tokens": tokens,
        "step": step,
        "corrected": corrected[0] if corrected else "",
        "critic_prompt": "\n\n".join(message["content"] for message in critic),
        "teacher_prompt": chat.tokenizer.decode(r.teacher_prompt),
        "rows": rows,
    }


def token_text(chat, i: int) -> str:
    return " end" if i in chat.end_ids else chat.tokenizer.decode([i]) or "∅"


@torch.no_grad()
def explain(chat, r, a, cfg) -> str:
    """The token that a context lowers most, and what its teacher expects there."""
    t = int(a.argmin())
    if a[t] > -0.1:
        return "no token falls by more than 0.1 nats"
    hidden = sd.response_hidden(chat, [r.teacher_prompt], [r.ids])
    likeliest = int(sd.log_probs(hidden[t], chat.head, cfg.temperature).argmax())
    lowered, expected = token_text(chat, r.ids[t]), token_text(chat, likeliest)
    return f"{lowered!r} falls by {-a[t]:.1f} nats; {expected!r} is expected"


# ---- 3. Pictures of the token study: strips of coloured tokens, and a page around them. ----------

COLUMNS, CELL, LINE = 48, 10, 28  # characters of a line; width and height of a character, pixels
FULL_COLOUR = 5.0  # nats at which a colour is saturated
LEGEND = "blue, underlined: the token becomes less likely; red: more likely"


def strips(e, names) -> str:
    """An example as SVG: its tokens once for each context. Text stays text.

    A white ground makes it readable on a dark page as well.
    """
    caption = textwrap.shorten(f"This attempt at {e['problem']}", 180) + f" is {e['outcome']}."
    if e["outcome"] == "wrong":
        caption += " The bar marks its first wrong step."
        if e["corrected"]:
            caption += " It should be " + textwrap.shorten(e["corrected"], 90) + "."
    parts, y = [], 0
    for line in textwrap.wrap(caption, 62):
        y += 20
        parts.append(svg_text(y, line))
    for name in names:
        row = e["rows"][name]
        y += 32
        parts.append(svg_text(y, f"{name}: {row['note']}"))
        y += 16
        drawn, lines = svg_tokens(e["tokens"], row["advantage"], e["step"], y)
        parts += drawn
        y += LINE * lines
    parts.append(svg_text(y + 24, LEGEND))
    width, height = COLUMNS * CELL + 8, y + 36
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#111">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def svg_text(y: int, text: str) -> str:
    return f'<text x="4" y="{y}">{html.escape(sd.printable(text))}</text>'


def svg_tokens(tokens, advantage, step, y) -> tuple[list[str], int]:
    """(tokens on their colours, wrapped, the first line at y; number of lines).

    A bar stands over the wrong step. A lowered token is underlined, for readers who see no colours.
    """
    parts, column, line = [], 0, 0
    for t, (token, a) in enumerate(zip(tokens, advantage)):
        # a line end is a mark, to save space; SVG would drop plain spaces
        text = sd.printable(token.replace("\n\n", "\n"))[:COLUMNS].replace(" ", "\xa0")
        if column + len(text) > COLUMNS:
            column, line = 0, line + 1
        x, top, width = 4 + CELL * column, y + LINE * line, CELL * len(text)
        column += len(text)
        parts.append(
            f'<rect x="{x}" y="{top}" width="{width}" height="22" fill="{colour(a)}"/>'
            f'<text x="{x + width / 2:g}" y="{top + 16}" textLength="{width}" text-anchor="middle" '
            f'font-family="monospace" font-size="16">{html.escape(text)}</text>'
        )
        if a < -0.05:
            parts.append(f'<path d="M{x} {top + 20}h{width}" stroke="#111" stroke-width="1.5"/>')
        if step[0] <= t < step[1]:
            parts.append(f'<path d="M{x} {top - 3}h{width}" stroke="#111" stroke-width="3"/>')
    return parts, line + 1


def colour(a: float) -> str:
    """White at 0, red above and blue below: a pair that colour-blind readers can tell apart."""
    # the root makes small advantages visible
    strength = min(1.0, abs(a) / FULL_COLOUR) ** 0.5
    full = np.array((214, 71, 58) if a > 0 else (67, 133, 214))
    red, green, blue = 255 + strength * (full - 255)
    return f"rgb({red:.0f},{green:.0f},{blue:.0f})"


PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What each context teaches, token by token</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1.15rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: .25rem solid gray;
  padding-left: .75rem; font-size: 1rem }}
svg {{ width: 100%; break-inside: avoid }}
table {{ border-collapse: collapse; font-size: 1rem }}
th, td {{ border: 1px solid gray; padding: .25rem .5rem; text-align: left; vertical-align: top }}
td {{ white-space: nowrap }}
.wide {{ overflow-x: auto }}
</style>
<h1>What each context teaches, token by token</h1>
<p>A model attempts a problem. A teacher then reads the attempt and scores each of its tokens. The
teacher is the same model, but its prompt also holds a context: a critique of the attempt, or the
solution of the data set. Training lowers a token that is less likely for the teacher than for the
model, and raises one that is more likely.</p>
<p>A = log(teacher's probability) − log(model's probability), in nats. Colours: {LEGEND}. A colour
is full at {FULL_COLOUR:g} nats. In GRPO there is no teacher: all tokens of an attempt get the same
number.</p>
"""


def page(examples, head, numbers) -> str:
    """One HTML file for a classroom: no script, nothing fetched, all text of a model escaped."""
    parts = [PAGE]
    for e in examples:
        parts.append(f"<h2>A {e['outcome']} attempt</h2>")
        parts.append(block("The problem", f"{e['problem']}\n\nIts answer is {e['answer']}."))
        parts.append(block(f"The attempt, which is {e['outcome']}", "".join(e["tokens"])))
        first, *others = e["rows"]
        if first.startswith("critique"):
            parts.append(block("What the critic reads", e["critic_prompt"]))
        parts.append(block("What the critic writes", e["rows"][first]["context"]))
        parts.append(block("The teacher's prompt, with this inside", e["teacher_prompt"]))
        for name in others[:-1]:
            parts.append(block(f"Another context: {name}", e["rows"][name]["context"]))
        parts.append("<h3>The same attempt under each context</h3>" + strips(e, list(e["rows"])))
    parts.append(f"<h2>Over all attempts</h2><p>{html.escape(head)}</p>")
    parts.append('<div class="wide"><table>' + html_row(["", *numbers]))
    for row in zip(MEASURES, *numbers.values()):
        parts.append(html_row(row))
    return "\n".join(parts) + "</table></div></html>\n"


def html_row(cells) -> str:
    """The first cell is a heading."""
    return "<tr><th>" + "<td>".join(map(html.escape, cells))


def block(heading: str, text: str) -> str:
    return f"<h3>{html.escape(heading)}</h3><pre>{html.escape(text)}</pre>"


# ---- 4. Preflight: is a long run worth starting? -------------------------------------------------


def preflight(cfg, count: int) -> str:
    """Without training: solver, critic and teacher on validation problems, and a line of advice.

    The critic is whoever writes the contexts of --condition; for reference, copy and grpo, which
    have none, the one of critique.
    """
    chat = sd.load_model(cfg.model, cfg)
    problems = sd.load_problems(cfg, chat).validation[:count]
    name = "critique" if cfg.condition in ("reference", "copy", "grpo") else cfg.condition
    write = sd.CONTEXTS[name]
    critic = sd.load_critic(cfg, chat)
    clock = [time.perf_counter()]
    groups = sd.attempt(chat, list(enumerate(problems)), cfg, cfg.group_size, sd.EVAL_SEED)
    clock.append(time.perf_counter())
    rollouts = groups[:: cfg.group_size]  # one attempt at each problem gets a critique
    critiques = write(rollouts, critic, cfg)
    clock.append(time.perf_counter())

    right, formed, cut, failed, mended, copied = judge(rollouts, critiques, cfg)
    wrong = 1 - right
    rewards = np.reshape([r.reward for r in groups], (-1, cfg.group_size))
    shares = {
        "base: right": (right, 1),
        "base: in the format asked for": (formed, 1),
        "base: cut at the cap": (cut, 1),
        "critic: failed (empty, cut off, malformed)": (failed, 1),
        "critic: reaches the right answer from a wrong attempt": (mended * wrong, wrong),
        "critic: copies a wrong attempt unchanged": (copied * wrong, wrong),
        "critic: copies a right attempt unchanged": (copied * right, right),
        "grpo: groups with equal rewards": (np.ptp(rewards, 1) == 0, 1),
    }
    rows = []
    for name, (top, bottom) in shares.items():
        rows.append([name, bracketed(estimate(top, bottom, (0, 1)), unit=" %")])
    contexts = {
        "critique": critiques,
        "reference": [r.problem.solution for r in rollouts],
        "a copy of the attempt (control)": [r.text for r in rollouts],
        "another problem's critique (control)": critiques[1:] + critiques[:1],
    }
    gaps = {}
    for name, texts in contexts.items():
        gaps[name] = teacher_gap(chat, rollouts, texts, cfg)
        rows.append([f"teacher − base: {name}", bracketed(gaps[name], form="+.1f", unit=" points")])
    drawn = sum(len(r.ids) for r in groups) / len(groups)
    written = sum(r.critic_tokens for r in rollouts) / len(rollouts)
    sampling, criticism = np.diff(clock) / (len(groups), len(rollouts))
    rows.append(["base: an attempt", f"{drawn:.0f} tokens, {sampling:.2f} s"])
    rows.append(["critic: a critique", f"{written:.0f} tokens, {criticism:.2f} s"])

    head = f"{len(problems)} validation problems; 95 % intervals"
    lines = [head, "", markdown(["before training", ""], rows), ""]
    for name in ("critique", "reference"):
        lines.append(f"{name}: {advice(gaps[name], len(problems))}")
    lines.append("grpo: learns nothing from groups with equal rewards")
    if critic.last_error:
        lines.append(f"critic: {critic.last_error}")
    return "\n".join(lines)


def judge(rollouts, critiques, cfg) -> np.ndarray:
    """(6, attempts), 0 or 1: the attempt is right, in the format asked for, cut off; its critique
    failed, has the right answer, is the attempt itself."""
    judged = []
    for r, critique in zip(rollouts, critiques):
        formed = FORMATS[cfg.prompts].find_steps(r.text) and find_answer(r)
        mended = is_correct(critique or "", r.problem.answer, cfg.grader)
        copied = is_copy(critique, r.text, cfg)
        judged.append([r.reward, bool(formed), r.truncated, critique is None, mended, copied])
    return np.array(judged, float).T


def teacher_gap(chat, rollouts, contexts, cfg) -> tuple[float, float, float]:
    """The teacher's accuracy minus the base's, an estimate: it attempts the same problems.

    arXiv 2605.30070 reports that it predicts the final gain linearly. An attempt without a context
    does not count.
    """
    readers = [replace(r, context=c, teacher_prompt=None) for r, c in zip(rollouts, contexts)]
    scored = sd.add_teacher_prompts(chat, readers, cfg)
    rng = np.random.default_rng(sd.EVAL_SEED)
    uniforms = rng.random((len(scored), cfg.max_new_tokens), np.float32)
    prompts = [r.teacher_prompt for r in scored]
    caps = [cfg.max_new_tokens] * len(prompts)
    drawn = sd.generate(chat, prompts, caps, cfg.sample_batch, uniforms, cfg.temperature)
    gains = []
    for r, (ids, _) in zip(scored, drawn):
        gains.append(is_correct(chat.reply(ids), r.problem.answer, cfg.grader) - r.reward)
    return estimate(np.array(gains), limits=(-1, 1))


def advice(gap, count) -> str:
    value, low, high = gap
    if math.isnan(value):
        return "no context is valid and fits the window"
    if count < 8:
        return "no advice from fewer than 8 problems; raise --problems, or --test-problems"
    if low > 0:
        return "can work: the teacher is better than the base"
    if high < 0:
        return "is likely to do harm: the teacher is worse than the base"
    return "undecided: raise --problems, or try another --critic or other --prompts"


# ---- 5. Filter, after the paper's: keep the problems that the base solves, but rarely. -----------


def filter_pool(cfg, out, below, k) -> str:
    """Write the kept rows to `out`, after the last problem: after a kill the work begins again."""
    if out.resolve() == Path(cfg.data).resolve():
        raise sd.UserError("argument --out: the pool would be overwritten; name another file")
    chat = sd.load_model(cfg.model, cfg)
    split = sd.load_problems(cfg, chat)
    pool = list(enumerate([*split.test, *split.validation, *split.train]))
    rows = {sd.read_row(row): row for row in sd.read_rows(cfg.data)}
    lines = []
    at_once = max(1, cfg.sample_batch // k)  # problems that fill a batch of the sampler
    for start in sd.progress(range(0, len(pool), at_once), desc="filter"):
        part = pool[start : start + at_once]
        rollouts = sd.attempt(chat, part, cfg, k, sd.EVAL_SEED)
        shares = np.reshape([r.reward for r in rollouts], (-1, k)).mean(1)
        for (_, problem), share in zip(part, shares):
            if 0 < share < below:
                lines.append(json.dumps(rows[problem]) + "\n")
    out.write_text("".join(lines), "utf-8")
    return f"kept {len(lines)} of {len(pool)} problems in {out}; dropped before: {split.dropped}"


# ---- 6. Plot logs. -------------------------------------------------------------------------------

# what is drawn of a run: title, names in log.jsonl, factor for display
PANELS = (
    ("accuracy, % (dots: validation)", ("accuracy", "validation_avg"), 100),
    ("loss, nats a token", ("loss",), 1),
    ("entropy, nats a token (dots: KL to the base)", ("entropy", "kl_base"), 1),
    ("tokens an attempt", ("length",), 1),
    ("attempts left out", ("unscored",), 1),
    ("seconds of sampling a step", ("sample_s",), 1),
)


def plot_runs(folders: list[str], out: Path) -> str:
    """Draw the logs of runs. The suffix of `out` decides: PNG or SVG."""
    plt = load_pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for number, folder in enumerate(folders):
        logs = read_log(folder)
        for axis, (label, names, scale) in zip(axes.flat, PANELS):
            axis.set_title(label, loc="left", fontsize=10)
            # what is not measured at every step is drawn as dots
            for name, entries, style in zip(names, logs, (".-", "o:")):
                x = [entry["step"] for entry in entries]
                y = [scale * entry.get(name, math.nan) for entry in entries]
                axis.plot(x, y, style, color=f"C{number}", label=folder)
    axes[0, 1].legend(fontsize=8)
    return save_figure(figure, out)


def read_log(folder) -> tuple[list[dict], list[dict]]:
    """(steps, validations) of a log. After --resume a step may stand there twice: the last counts.

    The last line of a running job, or of one that was killed, may be incomplete.
    """
    steps, checks = {}, {}
    for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "step" in entry:
            kind = checks if "validation_avg" in entry else steps
            kind[entry["step"]] = entry
    return list(steps.values()), list(checks.values())


def load_pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise sd.UserError("figures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    # text stays text, and equal data give equal files
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sd", "legend.frameon": False}
    return plt


def save_figure(figure, out: Path) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, metadata=metadata, dpi=150)
    return f"wrote {out}"


# ---- 7. Command line. ----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Run folders and flags of sd.py are left over, in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python eval.py [RUN …] [--flag VALUE …] [flags of sd.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Flags of sd.py replace its defaults, or what a run was trained with.",
    )
    add = parser.add_argument
    add("--tokens", metavar="RUN", help="what each context does to every token")
    add("--contexts", metavar="A,B,…", help="of --tokens; the first must copy the attempt [all]")
    add("--preflight", action="store_true", help="judge solver, critic and teacher")
    add("--filter", metavar="POOL", help="keep the problems of a file that are seldom solved")
    add("--below", type=float, default=0.3125, help="keep what is solved less often [5/16, paper]")
    add("--plot", action="store_true", help="draw the runs' logs")
    add("--checkpoint", default="checkpoint.pt", help="checkpoint.pt (the last) or best.pt")
    add("--samples", type=int, help="attempts per problem [the run's; 4 with --tokens; "
        "16 with --filter]")  # fmt: skip
    add("--problems", type=int, help="from the first on [all; 50 with --tokens; "
        "32 with --preflight]")  # fmt: skip
    add("--out", type=Path, help="a folder [the runs' parent]; with --filter or --plot a file "
        "[hard.jsonl, plot.png]")  # fmt: skip
    return parser


def run_command(argv: list[str] | None) -> str:
    """What the command prints in the end."""
    args, rest = build_parser().parse_known_args(argv)
    runs = list(itertools.takewhile(lambda text: not text.startswith("-"), rest))
    count, k, out = args.problems, args.samples, args.out
    if args.preflight:
        return preflight(sd.parse_config(rest), count or 32)
    if args.filter:
        # nothing is held out, but a split of the pool needs some test problems
        cfg = sd.parse_config([*rest, "--data", args.filter, "--test-problems", "2"])
        return filter_pool(cfg, out or Path("hard.jsonl"), args.below, k or 16)
    given = vars(sd.build_parser().parse_args(rest[len(runs) :]))
    if args.tokens:
        return study_tokens(args.tokens, count or 50, k or 4, args.contexts, given)
    if not runs:
        raise sd.UserError("name run folders, or --tokens, --preflight, --filter; see --help")
    if args.plot:
        return plot_runs(runs, out or Path("plot.png"))
    return compare(runs, args.checkpoint, count, k, out or Path(runs[0]).parent, given)


def guarded(program: str, job) -> int:
    """Print what the job returns. Exit code: 0, or 2 for a mistake of the user's."""
    sd.prepare_output()
    try:
        print(job())
    except sd.UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded("eval.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
