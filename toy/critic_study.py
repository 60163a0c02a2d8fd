"""What must a critic get right? Spoils contexts on purpose and measures what they still teach.

It is also the example of a fork: rows are added to sd.py's table of conditions, and nothing else
changes. Each row spoils a share of the contexts. Where its error is impossible, the true context is
kept. A step is wrong if its value is not the problem's value at that place.

  wrong value           in wrong attempts: the first wrong step gets another wrong value
  wrong place           in wrong attempts: a different step gets a wrong value
  error missed          in wrong attempts: nothing is changed, the attempt is copied
  right attempt spoilt  in right attempts: some step gets a wrong value
  …, all                in all attempts: it is combined with "right attempt spoilt"
  …, fixed              not at random: right value + 1 (+ 2 if the attempt has that), and the first
                        step that is possible
  another problem       the critique of another problem
  answer only           the right answer without steps
  reference, wrong      the data set's solution, in which some step gets a wrong value
  grpo, flipped         no context: reward 0 for a right attempt, and 1 for a wrong one

What follows a wrong value is worked out from it. All arms train at the preset's learning rate.

  python toy/critic_study.py --seeds 5     50 minutes on one core; goes on where it was stopped
"""

import argparse
import contextlib
import io
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import eval as evaluation  # noqa: E402
import make  # noqa: E402
import sd  # noqa: E402

language = make.ToyLanguage(seed=0)
find_steps = sd.FORMATS["toy"].find_steps
LENGTH, STEP = language.LENGTH, make.STEP  # steps of an attempt, tokens of a step

# ---- 1. Errors: (rollout, how to pick from a list) → the spoilt context, None if not possible. ---


def read_values(text: str) -> list[int]:
    """The result of each step."""
    return [int(step[-1]) for step in find_steps(text)]


def first_wrong_step(r: sd.Rollout) -> int:
    """Its index; LENGTH if no step is wrong."""
    return make.first_difference(read_values(r.text), language.values(r.problem.question))


def wording(r: sd.Rollout, text: str) -> list[make.Phrasing]:
    phrasings = []
    for step, (_, digit) in zip(find_steps(text), make.operations(r.problem.question)):
        first, second = step[1], step[3]
        swapped = first == digit and second != digit
        phrasings.append(make.Phrasing(step[0], swapped))
    return phrasings


def change(r: sd.Rollout, text: str, place: int, pick: Callable) -> str:
    """The text with a wrong value at `place`, different from its own, and the rest recomputed."""
    question, values = r.problem.question, read_values(text)
    before = values[place - 1] if place else int(question[0])
    right = make.apply(make.operations(question)[place], before)
    others = [(right + distance) % 10 for distance in range(1, 10)]
    wrong = pick([value for value in others if value != values[place]])
    changed = language.values(question, start=[*values[:place], wrong])
    return make.trace(question, changed, wording(r, text))


def wrong_value(r: sd.Rollout, pick: Callable) -> str | None:
    place = first_wrong_step(r)
    return change(r, r.text, place, pick) if place < LENGTH else None


def wrong_place(r: sd.Rollout, pick: Callable) -> str | None:
    wrong = first_wrong_step(r)
    places = [place for place in range(LENGTH) if place != wrong]
    return change(r, r.text, pick(places), pick) if wrong < LENGTH else None


def error_missed(r: sd.Rollout, pick: Callable) -> str:
    return r.text


def right_attempt_spoilt(r: sd.Rollout, pick: Callable) -> str | None:
    is_right = first_wrong_step(r) == LENGTH
    return change(r, r.text, pick(range(LENGTH)), pick) if is_right else None


def another_problem(r: sd.Rollout, pick: Callable) -> str:
    question = str(pick(range(10)))
    for _ in range(LENGTH):
        question += pick(language.OPERATIONS)
    return make.trace(question, language.values(question), wording(r, r.text))


def answer_only(r: sd.Rollout, pick: Callable) -> str:
    return f"####{r.problem.answer}"


def wrong_solution(r: sd.Rollout, pick: Callable) -> str:
    return change(r, r.problem.solution, pick(range(LENGTH)), pick)


def pick_first(choices: list):
    return choices[0]


# ---- 2. Rows for the table of conditions. --------------------------------------------------------

SHARES = (25, 50, 75, 100)  # of the attempts, %


class Kind(NamedTuple):
    base: str  # the condition without errors
    errors: tuple[Callable, ...] = ()  # the first that is possible; (): rewards are flipped instead
    fixed: bool = False
    shares: tuple[int, ...] = SHARES


KINDS = {
    "wrong value": Kind("critique", (wrong_value,)),
    "wrong value, fixed": Kind("critique", (wrong_value,), fixed=True),
    "wrong place": Kind("critique", (wrong_place,)),
    "error missed": Kind("critique", (error_missed,)),
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


def spoilt_writer(kind: Kind, share: int) -> Callable:
    """A `write` for a Condition: it spoils this share of the contexts, or flips rewards.

    The random numbers follow from seed, place and problem: a run that was stopped goes on alike,
    and a problem that is spoilt at one share is spoilt at every larger one.
    """

    def write(rollouts: list[sd.Rollout], critic, cfg: sd.Config) -> list:
        picks = {}
        for i, r in enumerate(rollouts):
            rng = random.Random(f"{cfg.seed} {i} {r.problem.question}")
            if 100 * rng.random() < share and len(find_steps(r.text)) == LENGTH:
                picks[i] = pick_first if kind.fixed else rng.choice
        if not kind.errors:
            rollouts = list(rollouts)
            for i in picks:
                rollouts[i] = replace(rollouts[i], reward=1 - rollouts[i].reward)
        values = sd.CONDITIONS[kind.base].write(rollouts, critic, cfg)
        for i, pick in picks.items():
            for error in kind.errors:
                context = error(rollouts[i], pick)
                if context is not None:
                    values[i] = context
                    break
        return values

    return write


def arm_name(kind: str, share: int) -> str:
    return f"{kind} {share}" if share else KINDS[kind].base


def add_rows() -> list[str]:
    """Add every arm to sd.CONDITIONS and evaluation.ARMS; their names."""
    arms = ["critique", "reference", "grpo"]
    for name, kind in KINDS.items():
        for share in kind.shares:
            arm = arm_name(name, share)
            write = spoilt_writer(kind, share)
            sd.CONDITIONS[arm] = sd.CONDITIONS[kind.base]._replace(write=write)
            evaluation.ARMS[arm] = ["--condition", arm]
            arms.append(arm)
    return arms


# ---- 3. Before training: what a context does to attempts of the base. ----------------------------

PROBLEMS = 300  # training problems, with one attempt at each
RIGHT, GAP = "right answers, %", "preflight gap, points"
BLAME, PRAISE = "blame on the first wrong step, %", "A of a right attempt's values, nats"


WRONG_VALUE, RIGHT_VALUE = "A of the first wrong value", "log-ratio of the right value"
OTHER_VALUES, ELSEWHERE = "of the other eight", "A of other steps"
MEASURES = (RIGHT, BLAME, PRAISE, WRONG_VALUE, RIGHT_VALUE, OTHER_VALUES, ELSEWHERE)


@torch.no_grad()
def measure(chat: sd.Chat, r: sd.Rollout, cfg: sd.Config) -> dict[str, tuple]:
    """What its context does to an attempt: numerator and denominator of each of MEASURES.

    Blame is negative A. A log-ratio is of the teacher's probability to the student's, in nats. What
    is not defined for an attempt is 0 / 0, which does not count.
    """
    log_probs = []
    # there is no adapter yet: student and teacher differ in their prompts alone
    for prompt in (r.prompt, r.teacher_prompt):
        hidden = sd.response_hidden(chat, [prompt], [r.sample.ids])
        log_probs.append(sd.log_probs(hidden, chat.head, cfg.temperature).cpu())  # (T, V)
    log_ratio = log_probs[1] - log_probs[0]
    a = sd.of_drawn(log_ratio, torch.tensor(r.sample.ids))  # (T,), eq (2)
    # a token is a character; the last one of each step is its value
    values = slice(STEP - 1, STEP * LENGTH, STEP)
    place = first_wrong_step(r)
    row = dict.fromkeys(MEASURES, (0, 0))
    row[RIGHT] = 100 * sd.is_correct(r.context, r.problem.answer, cfg.grader), 1
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


def measure_arm(
    arm: str, chat: sd.Chat, rollouts: list, critic, cfg: sd.Config
) -> dict[str, tuple]:
    """The numbers of an arm, each with its bootstrap interval over problems."""
    contexts = sd.CONDITIONS[arm].write(rollouts, critic, cfg)
    _, _, gap = evaluation.teacher_gap(chat, rollouts, contexts, 1, cfg)
    readers = [replace(r, context=context) for r, context in zip(rollouts, contexts)]
    rows = [measure(chat, r, cfg) for r in sd.prepare(chat, readers, cfg)]
    numbers = {GAP: tuple(100 * number for number in gap)}
    for name in MEASURES:
        top, bottom = np.array([row[name] for row in rows], float).T
        numbers[name] = evaluation.estimate(top, bottom)
    return numbers


def measure_arms(arms: list[str], cfg: sd.Config) -> dict[str, dict]:
    """{arm: {measure: its estimate}}, for every arm that has a teacher."""
    chat = sd.load_solver(cfg)
    critic = sd.load_critic(cfg, chat)
    problems = list(enumerate(sd.load_problems(cfg, chat).train[:PROBLEMS]))
    attempts = sd.attempt(chat, problems, cfg, seed=sd.EVAL_SEED)
    rollouts = [r for r in attempts if len(find_steps(r.text)) == LENGTH]
    measured = {}
    for arm in sd.progress(arms, desc="before training"):
        if sd.CONDITIONS[arm].has_teacher:
            measured[arm] = measure_arm(arm, chat, rollouts, critic, cfg)
    return measured


# ---- 4. Training, tables, figure. ----------------------------------------------------------------


def train_all(arms: list[str], root: Path, seeds: int, flags: list[str]) -> dict[str, np.ndarray]:
    """Avg of each arm on the test problems, (seeds,). A run that is finished in `root` is read."""
    cfg = sd.parse_config(flags)
    flags = [*flags, "--eval-every", str(cfg.steps)]  # accuracy on the way is not needed
    avg = {arm: [] for arm in arms}
    runs = list(itertools.product(range(seeds), arms))
    for seed, arm in sd.progress(runs, desc="runs", unit="run"):
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each run would break the bar
            folder = evaluation.train_once(root, arm, cfg.lr, seed, flags)
        avg[arm] += evaluation.test_scores([folder], "checkpoint.pt", "Avg").tolist()
    return {arm: np.array(values) for arm, values in avg.items()}


def shares_table(title: str, values: dict[str, np.ndarray]) -> str:
    rows = []
    for kind in KINDS:
        rows.append([kind])
        for share in (0, *SHARES):
            arm = arm_name(kind, share)
            rows[-1].append(evaluation.over_seeds(values[arm]) if arm in values else "")
    shares = [f"{share} %" for share in (0, *SHARES)]
    return evaluation.markdown([title, *shares], rows)


def measures_table(measured: dict[str, dict], gains: dict[str, np.ndarray]) -> str:
    rows = []
    for arm, numbers in measured.items():
        texts = []
        for number in numbers.values():
            texts.append(evaluation.bracketed(number, 1, ".2f"))
        rows.append([arm, evaluation.over_seeds(gains[arm]), *texts])
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
            rows[-1].append(f"{np.mean(r):.2f} ± {evaluation.half_width(np.array(r)):.2f}")
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
    halves = [100 * evaluation.half_width(y) for y in ys]
    axis.errorbar(x, means, halves, linewidth=1, **style)


def study(root: Path, assets: Path, seeds: int, flags: list[str]) -> str:
    """Train, measure, and write critic_study.md and critic_study.svg. Returns the tables."""
    plt = evaluation.load_pyplot()  # fails before the training if matplotlib is missing
    cfg = sd.parse_config(flags)
    arms = add_rows()
    avg = train_all(arms, root, seeds, flags)
    measured = measure_arms(arms, cfg)
    groups = evaluation.attempt_test(cfg)
    base = evaluation.mean_scores(groups)["Avg"]
    gains = {arm: values - base for arm, values in avg.items()}
    heading = (
        f"{len(groups)} test problems × {cfg.eval_samples} attempts; the base: {100 * base:.1f}. "
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
    parser.add_argument("--seeds", type=evaluation.positive, default=5)
    parser.add_argument("--out", type=Path, default="runs/critic_study", help="folder of the runs")
    parser.add_argument("--assets", type=Path, default="assets", help="folder of table and figure")
    parser.add_argument("flags", nargs="*", help="after --: flags of sd.py")
    args = parser.parse_args(argv)
    flags = args.flags or ["--preset", "toy"]
    return evaluation.guarded(
        "critic_study.py", lambda: study(args.out, args.assets, args.seeds, flags)
    )


if __name__ == "__main__":
    sys.exit(main())
