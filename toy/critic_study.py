"""What must a critic get right? Spoils contexts on purpose and measures what they still teach.

It is also the example of a fork: rows are added to sd.py's table of contexts, and nothing else
changes. Each row spoils a share of the contexts. Where its error is impossible, the true context is
kept. A step is wrong if its value is not the problem's value at that place.

  wrong value           in wrong attempts: the first wrong step gets another wrong value
  wrong place           in wrong attempts: a different step gets a wrong value
  copy                  nothing is changed: the attempt is copied, be it right or wrong
  right attempt spoilt  in right attempts: some step gets a wrong value
  …, all                in all attempts: it is combined with "right attempt spoilt"
  …, fixed              not at random: right value + 1 (+ 2 if the attempt has that), and the first
                        step that is possible
  another problem       the critique of another problem
  answer only           the right answer without steps
  reference, wrong      the data set's solution, in which some step gets a wrong value
  grpo, flipped         no context: reward 0 for a right attempt, and 1 for a wrong one

What follows a wrong value is worked out from it. All arms train at the preset's learning rate. Of
"copy" 100 % is the control of reproduce.py: its context is the attempt itself.

  python toy/critic_study.py --seeds 3     25 minutes on one core; goes on where it was stopped
"""

import argparse
import contextlib
import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import eval as evaluation  # noqa: E402
import make  # noqa: E402
import reproduce  # noqa: E402
import sd  # noqa: E402
from critic_prompts import FORMATS, is_correct  # noqa: E402

language = make.ToyLanguage(seed=0)
find_steps = FORMATS["toy"].find_steps
LENGTH, STEP = language.LENGTH, make.STEP  # steps of an attempt, tokens of a step

# ---- 1. Errors: (rollout, how to pick from a list) → the spoilt context, None if not possible. ---


def read_values(text: str) -> list[int]:
    """The result of each step."""
    return [int(step[-1]) for step in find_steps(text)]


def first_wrong_step(r) -> int:
    """Its index; LENGTH if no step is wrong."""
    return make.first_difference(read_values(r.text), language.values(r.problem.question))


def wording(r, text: str) -> list[make.Phrasing]:
    phrasings = []
    for step, (_, digit) in zip(find_steps(text), make.operations(r.problem.question)):
        first, second = step[1], step[3]
        swapped = first == digit and second != digit
        phrasings.append(make.Phrasing(step[0], swapped))
    return phrasings


def change(r, text: str, place: int, pick) -> str:
    """The text with a wrong value at `place`, different from its own, and the rest recomputed."""
    question, values = r.problem.question, read_values(text)
    before = values[place - 1] if place else int(question[0])
    right = make.apply(make.operations(question)[place], before)
    others = [(right + distance) % 10 for distance in range(1, 10)]
    wrong = pick([value for value in others if value != values[place]])
    changed = language.values(question, start=[*values[:place], wrong])
    return make.trace(question, changed, wording(r, text))


def wrong_value(r, pick) -> str | None:
    place = first_wrong_step(r)
    return change(r, r.text, place, pick) if place < LENGTH else None


def wrong_place(r, pick) -> str | None:
    wrong = first_wrong_step(r)
    places = [place for place in range(LENGTH) if place != wrong]
    return change(r, r.text, pick(places), pick) if wrong < LENGTH else None


def copied(r, pick) -> str:
    return r.text


def right_attempt_spoilt(r, pick) -> str | None:
    is_right = first_wrong_step(r) == LENGTH
    return change(r, r.text, pick(range(LENGTH)), pick) if is_right else None


def another_problem(r, pick) -> str:
    question = str(pick(range(10)))
    for _ in range(LENGTH):
        question += pick(language.OPERATIONS)
    return make.trace(question, language.values(question), wording(r, r.text))


def answer_only(r, pick) -> str:
    return f"####{r.problem.answer}"


def wrong_solution(r, pick) -> str:
    return change(r, r.problem.solution, pick(range(LENGTH)), pick)


def pick_first(choices: list):
    return choices[0]


# ---- 2. Rows for the table of contexts. ----------------------------------------------------------

SHARES = (25, 100)  # of the attempts, %
AVG = "Avg@{k}"  # the metric by which arms are compared


class Kind(NamedTuple):
    base: str  # the condition without errors; of grpo the rewards are flipped
    errors: tuple[Callable, ...] = ()  # the first that is possible
    fixed: bool = False
    shares: tuple[int, ...] = SHARES


KINDS = {
    "wrong value": Kind("critique", (wrong_value,)),
    "wrong value, fixed": Kind("critique", (wrong_value,), fixed=True),
    "wrong place": Kind("critique", (wrong_place,)),
    "copy": Kind("critique", (copied,)),
    "right attempt spoilt": Kind("critique", (right_attempt_spoilt,)),
    "wrong value, all": Kind("critique", (wrong_value, right_attempt_spoilt)),
    "wrong value, all, fixed": Kind("critique", (wrong_value, right_attempt_spoilt), fixed=True),
    "wrong place, all": Kind("critique", (wrong_place, right_attempt_spoilt)),
    "wrong place, all, fixed": Kind("critique", (wrong_place, right_attempt_spoilt), fixed=True),
    "another problem": Kind("critique", (another_problem,), shares=(100,)),
    "answer only": Kind("critique", (answer_only,), shares=(100,)),
    "reference, wrong": Kind("reference", (wrong_solution,)),
    "grpo, flipped": Kind("grpo"),
}


def pick_spoilt(rollouts, share: int, seed: int) -> dict[int, random.Random]:
    """The rollouts to spoil, each with its own random numbers.

    These follow from seed, place and problem: a run that was stopped goes on alike, and a problem
    that is spoilt at one share is spoilt at every larger one.
    """
    spoilt = {}
    for i, r in enumerate(rollouts):
        rng = random.Random(f"{seed} {i} {r.problem.question}")
        if 100 * rng.random() < share and len(find_steps(r.text)) == LENGTH:
            spoilt[i] = rng
    return spoilt


def spoilt_writer(kind: Kind, share: int) -> Callable:
    """A row for CONTEXTS: it spoils this share of the true contexts."""

    def write(rollouts, critic, cfg) -> list[str | None]:
        contexts = sd.CONTEXTS[kind.base](rollouts, critic, cfg)
        for i, rng in pick_spoilt(rollouts, share, cfg.seed).items():
            pick = pick_first if kind.fixed else rng.choice
            for error in kind.errors:
                context = error(rollouts[i], pick)
                if context is not None:
                    contexts[i] = context
                    break
        return contexts

    return write


@contextlib.contextmanager
def flipped_rewards(share: int) -> Iterator[None]:
    """Inside, the advantages of grpo are those of other rewards. It has no context to be spoilt."""
    true = sd.group_advantages

    def flipped(rollouts, cfg) -> list[float]:
        rollouts = list(rollouts)
        for i in pick_spoilt(rollouts, share, cfg.seed):
            rollouts[i] = replace(rollouts[i], reward=1 - rollouts[i].reward)
        return true(rollouts, cfg)

    sd.group_advantages = flipped
    try:
        yield
    finally:
        sd.group_advantages = true


def arm_name(kind: str, share: int) -> str:
    return f"{kind} {share}" if share else KINDS[kind].base


def add_rows() -> dict[str, int]:
    """Add every arm to sd.CONTEXTS and reproduce.ARMS. {arm: the share of rewards that it flips}"""
    arms = {"critique": 0, "reference": 0, "grpo": 0}
    for name, kind in KINDS.items():
        for share in kind.shares:
            arm = arm_name(name, share)
            if kind.base == "grpo":
                reproduce.ARMS[arm] = ["--condition", "grpo"]
                arms[arm] = share
            else:
                sd.CONTEXTS[arm] = spoilt_writer(kind, share)
                reproduce.ARMS[arm] = ["--condition", arm]
                arms[arm] = 0
    return arms


# ---- 3. Before training: what a context does to attempts of the base. ----------------------------

PROBLEMS = 300  # training problems, with one attempt at each
RIGHT, GAP = "right answers, %", "preflight gap, points"
BLAME, PRAISE = "blame on the first wrong step, %", "A of a right attempt's values, nats"


WRONG_VALUE, RIGHT_VALUE = "A of the first wrong value", "log-ratio of the right value"
OTHER_VALUES, ELSEWHERE = "of the other eight", "A of other steps"
MEASURES = (RIGHT, BLAME, PRAISE, WRONG_VALUE, RIGHT_VALUE, OTHER_VALUES, ELSEWHERE)


@torch.no_grad()
def measure(chat, r, cfg) -> dict[str, tuple]:
    """What its context does to an attempt: numerator and denominator of each of MEASURES.

    Blame is negative A. A log-ratio is of the teacher's probability to the student's, in nats. What
    is not defined for an attempt is 0 / 0, which does not count.
    """
    log_probs = []
    # there is no adapter yet: student and teacher differ in their prompts alone
    for prompt in (r.prompt, r.teacher_prompt):
        hidden = sd.response_hidden(chat, [prompt], [r.ids])
        log_probs.append(sd.log_probs(hidden, chat.head, cfg.temperature).cpu())  # (T, V)
    log_ratio = log_probs[1] - log_probs[0]
    a = sd.of_drawn(log_ratio, torch.tensor(r.ids))  # (T,), eq (2)
    # a token is a character; the last one of each step is its value
    values = slice(STEP - 1, STEP * LENGTH, STEP)
    place = first_wrong_step(r)
    row = dict.fromkeys(MEASURES, (0, 0))
    row[RIGHT] = 100 * is_correct(r.context, r.problem.answer, cfg.grader), 1
    blame = -a.clamp(max=0)
    wrong_step = slice(STEP * place, STEP * (place + 1))
    on_step = blame[wrong_step].sum() if place < LENGTH else 0.0
    row[BLAME] = 100 * on_step, blame.sum()
    if place == LENGTH:
        row[PRAISE] = a[values].sum(), 1
        return row
    step = a[wrong_step]
    digits = chat.tokenizer.convert_tokens_to_ids(list("0123456789"))
    ratios = log_ratio[values, digits][place]  # (10,)
    right = ratios[language.values(r.problem.question)[place]]
    row[WRONG_VALUE] = step[-1], 1
    row[RIGHT_VALUE] = right, 1
    row[OTHER_VALUES] = (ratios.sum() - right - step[-1]) / 8, 1
    row[ELSEWHERE] = (a.sum() - step.sum()) / (len(a) - STEP), 1
    return row


def measure_arm(arm: str, chat, rollouts, critic, cfg) -> dict[str, tuple]:
    """The numbers of an arm, each with its bootstrap interval over problems."""
    contexts = sd.CONTEXTS[arm](rollouts, critic, cfg)
    gap = evaluation.teacher_gap(chat, rollouts, contexts, cfg)
    readers = [replace(r, context=context) for r, context in zip(rollouts, contexts)]
    rows = [measure(chat, r, cfg) for r in sd.add_teacher_prompts(chat, readers, cfg)]
    numbers = {GAP: tuple(100 * number for number in gap)}
    for name in MEASURES:
        top, bottom = np.array([row[name] for row in rows], float).T
        numbers[name] = evaluation.estimate(top, bottom)
    return numbers


def measure_arms(arms, cfg) -> dict[str, dict]:
    """{arm: {measure: its estimate}}, for every arm that has a teacher."""
    chat = sd.load_model(cfg.model, cfg)
    critic = sd.load_critic(cfg, chat)
    problems = list(enumerate(sd.load_problems(cfg, chat).train[:PROBLEMS]))
    attempts = sd.attempt(chat, problems, cfg, seed=sd.EVAL_SEED)
    rollouts = [r for r in attempts if len(find_steps(r.text)) == LENGTH]
    measured = {}
    for arm in sd.progress(arms, desc="before training"):
        if arm in sd.CONTEXTS:
            measured[arm] = measure_arm(arm, chat, rollouts, critic, cfg)
    return measured


# ---- 4. Training, tables, figure. ----------------------------------------------------------------


def train_all(arms: dict, root: Path, seeds: int, flags: list[str]) -> dict[str, np.ndarray]:
    """Avg of each arm on the test problems, (seeds,). A run that is finished in `root` is read."""
    cfg = sd.parse_config(flags)
    flags = [*flags, "--eval-every", str(cfg.steps)]  # accuracy on the way is not needed
    avg = {arm: [] for arm in arms}
    runs = list(itertools.product(range(seeds), arms.items()))
    for seed, (arm, share) in sd.progress(runs, desc="runs", unit="run"):
        # a line for each run would break the bar
        with contextlib.redirect_stdout(io.StringIO()), flipped_rewards(share):
            folder = reproduce.train_once(root, arm, cfg.lr, seed, flags)
        avg[arm] += reproduce.test_scores([folder], "checkpoint.pt", AVG).tolist()
    return {arm: np.array(values) for arm, values in avg.items()}


def shares_table(title: str, values: dict[str, np.ndarray]) -> str:
    rows = []
    for kind in KINDS:
        rows.append([kind])
        for share in (0, *SHARES):
            arm = arm_name(kind, share)
            rows[-1].append(reproduce.over_seeds(values[arm]) if arm in values else "")
    shares = [f"{share} %" for share in (0, *SHARES)]
    return evaluation.markdown([title, *shares], rows)


def measures_table(measured: dict[str, dict], gains: dict[str, np.ndarray]) -> str:
    rows = []
    for arm, numbers in measured.items():
        texts = []
        for number in numbers.values():
            texts.append(evaluation.bracketed(number, 1, ".2f"))
        rows.append([arm, reproduce.over_seeds(gains[arm]), *texts])
    return evaluation.markdown(["", "gain", *numbers], rows)


def ranks(x: np.ndarray) -> np.ndarray:
    """Twice the rank, less one; ties share the mean of theirs. A correlation is the same."""
    return (x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)


def correlations_table(measured: dict[str, dict], gains: dict[str, np.ndarray]) -> str:
    """Over arms, for each seed; then the mean over seeds."""
    ys = np.array([gains[arm] for arm in measured]).T
    rows = []
    for name in measured["critique"]:
        x = np.array([numbers[name][0] for numbers in measured.values()])
        rows.append([name])
        for form in (ranks, np.array):  # Spearman's, and Pearson's as they are
            r = [np.corrcoef(form(x), form(y))[0, 1] for y in ys]
            rows[-1].append(f"{np.mean(r):.2f} ± {reproduce.half_width(np.array(r)):.2f}")
    return evaluation.markdown(["gain against", "Spearman", "Pearson"], rows)


# the kinds that are drawn as lines, with their markers
LINES = {
    "wrong value": "o",
    "wrong value, all": "s",
    "wrong place, all": "^",
    "reference, wrong": "D",
    "grpo, flipped": "v",
}


def draw_figure(plt, measured: dict[str, dict], gains: dict[str, np.ndarray]):
    """Gain against the share of errors, and against four numbers measured before training."""
    figure, axes = plt.subplot_mosaic(
        [["shares", RIGHT, BLAME], ["shares", GAP, PRAISE]],
        figsize=(10, 5), width_ratios=(1.4, 1, 1), sharey=True, layout="constrained",
    )  # fmt: skip
    for kind, marker in LINES.items():
        ys = [gains[arm_name(kind, share)] for share in (0, *SHARES)]
        draw_points(axes["shares"], (0, *SHARES), ys, fmt=f"{marker}-", label=kind)
    axes["shares"].set(xlabel="share of errors, %", ylabel="gain over the base, points")
    axes["shares"].legend()
    for name in (RIGHT, BLAME, GAP, PRAISE):
        axes[name].set_xlabel(name)
        for base, style in {"critique": "oC2", "reference": "DC3"}.items():
            is_reference = base == "reference"
            arms = [arm for arm in measured if arm.startswith("reference") == is_reference]
            x = [measured[arm][name][0] for arm in arms]
            ys = [gains[arm] for arm in arms]
            draw_points(axes[name], x, ys, fmt=style, label=f"every arm of {base}")
    axes[RIGHT].legend(fontsize=8, loc=(0.4, 0.2))
    for axis in axes.values():
        axis.axhline(0, color="black", linewidth=0.8)
        axis.tick_params(labelleft=True)
    return figure


def draw_points(axis, x, ys: list[np.ndarray], **style) -> None:
    """Means over seeds with intervals."""
    means = [100 * y.mean() for y in ys]
    halves = [100 * reproduce.half_width(y) for y in ys]
    axis.errorbar(x, means, halves, linewidth=1, **style)


def study(root: Path, assets: Path, seeds: int, flags: list[str]) -> str:
    """Train, measure, and write critic_study.md and critic_study.svg. Returns the tables."""
    plt = evaluation.load_pyplot()  # fails before the training if matplotlib is missing
    cfg = sd.parse_config(flags)
    arms = add_rows()
    avg = train_all(arms, root, seeds, flags)
    measured = measure_arms(arms, cfg)
    base = reproduce.mean_scores(cfg, None)[AVG]
    gains = {arm: values - base for arm, values in avg.items()}
    heading = (
        f"{cfg.test_problems} test problems × {cfg.eval_samples} attempts; the base: "
        f"{100 * base:.1f}. "
        f"Seeds 0–{seeds - 1}, {cfg.steps} steps of {cfg.attempts_per_step} attempts, lr "
        f"{cfg.lr:g}; mean ± half of the 95 % t interval over seeds"
    )
    changes = {}
    for kind, share in itertools.product(KINDS, SHARES):
        arm = arm_name(kind, share)
        if arm in avg:
            changes[arm] = avg[arm] - avg[KINDS[kind].base]
    text = "\n\n".join([
        heading,
        shares_table(f"Avg@{cfg.eval_samples} by share of errors", avg),
        shares_table("change against 0 %, paired by seed", changes),
        f"before training, the well-formed of {PROBLEMS} attempts; 95 % bootstrap intervals over "
        "problems; nats",
        measures_table(measured, gains),
        correlations_table(measured, gains),
    ]) + "\n"  # fmt: skip
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "critic_study.md").write_text(text, "utf-8")
    evaluation.save_figure(draw_figure(plt, measured, gains), assets / "critic_study.svg")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default="runs/critic_study", help="folder of the runs")
    parser.add_argument("--assets", type=Path, default="assets", help="folder of table and figure")
    parser.add_argument("flags", nargs="*", help="after --: flags of sd.py")
    args = parser.parse_args(argv)
    flags = ["--preset", "toy", *args.flags]
    return evaluation.guarded(
        "critic_study.py", lambda: study(args.out, args.assets, args.seeds, flags)
    )


if __name__ == "__main__":
    sys.exit(main())
