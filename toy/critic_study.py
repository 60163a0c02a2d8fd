"""What must a critic get right? Contexts and rewards are spoilt, and what they still teach is seen.

It is also the example of a fork: it adds rows to the table of conditions and changes nothing else.
A share of the attempts gets a spoilt context. Where an error is not possible, the true context
stays. A step is wrong if its value is not the problem's value at that place.

  wrong value           a wrong attempt is corrected at its first wrong step, to another wrong value
  wrong place           an attempt, right or wrong, is changed in a step that is not its first wrong
  …, fixed              no chance: right value + 1 each time, and the first step that is possible
  right attempt spoilt  a right attempt gets a wrong value in some step
  error missed          a wrong attempt is copied unchanged
  another problem       the critique of another problem
  answer only           the right answer without steps
  reference, wrong      the data set's solution, with a wrong value in some step
  grpo, flipped         the reward of a right attempt is 0, and that of a wrong one is 1

What follows a wrong value is worked out from it. All arms train at the preset's learning rate.

  python toy/critic_study.py --seeds 5       half an hour on one core; goes on where it was stopped
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

# ---- 1. Errors. Each takes a rollout, and a way to pick from a list. -----------------------------


def read_values(text: str) -> list[int]:
    """The result of each step."""
    return [int(step[-1]) for step in find_steps(text)]


def first_wrong_step(r: sd.Rollout) -> int:
    """Its index; LENGTH if no step is wrong."""
    return make.first_difference(read_values(r.text), language.values(r.problem.question))


def wording(r: sd.Rollout, text: str) -> list[make.Phrasing]:
    phrasings = []
    for step, (_, digit) in zip(find_steps(text), make.operations(r.problem.question)):
        phrasings.append(make.Phrasing(step[0], swapped=step[1] == digit != step[3]))
    return phrasings


def change(r: sd.Rollout, text: str, place: int, pick: Callable) -> str:
    """`text` up to that step, then a wrong value that is new, and the rest worked out from it."""
    operations, values = make.operations(r.problem.question), read_values(text)
    before = values[place - 1] if place else int(r.problem.question[0])
    right = make.apply(operations[place], before)
    others = [(right + distance) % 10 for distance in range(1, 10)]
    wrong = pick([value for value in others if value != values[place]])
    changed = language.values(r.problem.question, start=[*values[:place], wrong])
    return make.trace(r.problem.question, changed, wording(r, text))


def wrong_value(r: sd.Rollout, pick: Callable) -> str | None:
    place = first_wrong_step(r)
    return None if place == LENGTH else change(r, r.text, place, pick)


def wrong_place(r: sd.Rollout, pick: Callable) -> str:
    places = [place for place in range(LENGTH) if place != first_wrong_step(r)]
    return change(r, r.text, pick(places), pick)


def right_attempt_spoilt(r: sd.Rollout, pick: Callable) -> str | None:
    return wrong_place(r, pick) if first_wrong_step(r) == LENGTH else None


def error_missed(r: sd.Rollout, pick: Callable) -> str:
    return r.text


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


class Kind(NamedTuple):
    base: str  # the condition without errors
    spoil: Callable | None = None  # (rollout, pick) → context, or None: the true one stays
    fixed: bool = False


KINDS = {
    "wrong value": Kind("critique", wrong_value),
    "wrong place": Kind("critique", wrong_place),
    "wrong value, fixed": Kind("critique", wrong_value, fixed=True),
    "wrong place, fixed": Kind("critique", wrong_place, fixed=True),
    "right attempt spoilt": Kind("critique", right_attempt_spoilt),
    "error missed": Kind("critique", error_missed),
    "another problem": Kind("critique", another_problem),
    "answer only": Kind("critique", answer_only),
    "reference, wrong": Kind("reference", wrong_solution),
    "grpo, flipped": Kind("grpo"),
}
SHARES = (25, 50, 75, 100)  # %


def draw(i: int, r: sd.Rollout, share: int, cfg: sd.Config) -> tuple[bool, random.Random]:
    """Whether attempt i of a step gets an error, and the random numbers of the error.

    They follow from seed, place and problem: a run that was stopped goes on alike, and what is
    spoilt at one share is spoilt at every larger one.
    """
    rng = random.Random(f"{cfg.seed} {i} {r.problem.question}")
    well_formed = len(find_steps(r.text)) == LENGTH
    return 100 * rng.random() < share and well_formed, rng


def spoilt_writer(kind: Kind, share: int) -> Callable:
    def write(rollouts: list[sd.Rollout], critic, cfg: sd.Config) -> list[str | None]:
        contexts = sd.CONDITIONS[kind.base].write(rollouts, critic, cfg)
        for i, r in enumerate(rollouts):
            spoilt, rng = draw(i, r, share, cfg)
            if spoilt:
                contexts[i] = kind.spoil(r, pick_first if kind.fixed else rng.choice) or contexts[i]
        return contexts

    return write


def flipped_writer(share: int) -> Callable:
    def write(rollouts: list[sd.Rollout], critic, cfg: sd.Config) -> list[float]:
        judged = []
        for i, r in enumerate(rollouts):
            spoilt, _ = draw(i, r, share, cfg)
            judged.append(replace(r, reward=1 - r.reward) if spoilt else r)
        return sd.group_advantages(judged, critic, cfg)

    return write


def arm_name(kind: str, share: int) -> str:
    return f"{kind} {share}" if share else KINDS[kind].base


def add_rows() -> list[str]:
    """All arms. They become rows of sd.py's table of conditions, and of eval.py's table of arms."""
    arms = ["critique", "reference", "grpo"]
    for name, kind in KINDS.items():
        for share in SHARES:
            arm = arm_name(name, share)
            base = sd.CONDITIONS[kind.base]
            write = spoilt_writer(kind, share) if base.has_teacher else flipped_writer(share)
            sd.CONDITIONS[arm] = base._replace(write=write)
            evaluation.ARMS[arm] = ["--condition", arm]
            arms.append(arm)
    return arms


# ---- 3. Before training: what a context does to attempts of the base. ----------------------------

PROBLEMS = 300  # training problems, with one attempt at each
RIGHT, GAP, BLAME = "right answers", "preflight gap", "blame on the first wrong step"


@torch.no_grad()
def look(arm: str, chat: sd.Chat, rollouts: list, critic, cfg: sd.Config) -> dict[str, tuple]:
    """Each number with its text. Blame is negative A, of right and wrong attempts, summed.

    Log-ratios, teacher to student, are those of the values that could stand in the first wrong
    step. The pull is −∂D/∂z of eq (4). There is no adapter yet: only the prompts differ.
    """
    contexts = sd.CONDITIONS[arm].write(rollouts, critic, cfg)
    _, (gap, low, high) = evaluation.teacher_row(chat, rollouts, contexts, 1, cfg)
    for r, context in zip(rollouts, contexts):
        r.context = context
    digits = chat.tokenizer.convert_tokens_to_ids(list("0123456789"))
    of_all, of_wrong = [], []
    for r in sd.prepare(chat, rollouts, cfg):
        log_p = response_log_probs(chat, r.prompt, r, cfg)  # (T, V)
        log_q = response_log_probs(chat, r.teacher_prompt, r, cfg)
        a = sd.of_drawn(log_q - log_p, torch.tensor(r.sample.ids))  # (T,), eq (2)
        blame = -a.clamp(max=0)
        place = first_wrong_step(r)
        step = slice(STEP * place, STEP * (place + 1))  # a token is a character
        on_step = 100 * blame[step].sum() if place < LENGTH else 0
        is_right = sd.is_correct(r.context, r.problem.answer, cfg.grader)
        of_all.append((100 * is_right, blame.sum(), on_step))
        if place < LENGTH:
            value = step.stop - 1
            right = language.values(r.problem.question)[place]
            ratios = (log_q - log_p)[value, digits]  # (10,)
            rivals = (ratios.sum() - ratios[right] - a[value]) / 8
            elsewhere = (a.sum() - a[step].sum()) / (len(a) - STEP)
            _, gradient = sd.kl_student_teacher(log_p, log_q, None, None)
            pull = -gradient[value, digits[right]]
            of_wrong.append((a[value], elsewhere, ratios[right], rivals, pull))
    is_right, blame, on_step = np.array(of_all, float).T
    drawn, elsewhere, right, rivals, pull = np.array(of_wrong, float).T
    return {
        RIGHT: number(is_right),
        GAP: (100 * gap, f"{100 * gap:.2f} [{100 * low:.2f}, {100 * high:.2f}]"),
        BLAME: number(on_step, blame),
        "A of its value": number(drawn),
        "A of other steps": number(elsewhere),
        "right value": number(right),
        "other eight": number(rivals),
        "pull to the right value": number(pull),
    }


def number(top: np.ndarray, bottom: float | np.ndarray = 1.0) -> tuple[float, str]:
    """Σ top / Σ bottom, and its text with the bootstrap interval over problems."""
    ratio = top.sum() / np.broadcast_to(bottom, top.shape).sum()
    return ratio, evaluation.cell(top, bottom, scale=1, digits=2)


def response_log_probs(chat: sd.Chat, prompt: list[int], r: sd.Rollout, cfg: sd.Config):
    hidden = sd.response_hidden(chat, [prompt], [r.sample.ids])
    return sd.log_probs(hidden, chat.head, cfg.temperature)


def look_at_all(arms: list[str], cfg: sd.Config) -> dict[str, dict]:
    """Of each arm that has a teacher."""
    chat = sd.load_solver(cfg)
    critic = sd.load_critic(cfg, chat)
    problems = list(enumerate(sd.load_problems(cfg, chat).train[:PROBLEMS]))
    attempts = sd.attempt(chat, problems, cfg, seed=sd.EVAL_SEED)
    rollouts = [r for r in attempts if len(find_steps(r.text)) == LENGTH]
    looks = {}
    for arm in sd.progress(arms, desc="before training"):
        if sd.CONDITIONS[arm].has_teacher:
            looks[arm] = look(arm, chat, rollouts, critic, cfg)
    return looks


# ---- 4. Training, tables, figure. ----------------------------------------------------------------


def train_all(
    arms: list[str], root: Path, seeds: int, flags: list[str], lr: float
) -> dict[str, np.ndarray]:
    """Avg of each arm on the test problems, (seeds,). A run that is finished in `root` is read."""
    avg = {arm: [] for arm in arms}
    runs = list(itertools.product(range(seeds), arms))
    for seed, arm in sd.progress(runs, desc="runs", unit="run"):
        with contextlib.redirect_stdout(io.StringIO()):  # a line a run would break the bar
            folder = evaluation.train_once(root, arm, lr, seed, flags)
        avg[arm] += evaluation.test_scores([folder], "checkpoint.pt", "Avg").tolist()
    return {arm: np.array(values) for arm, values in avg.items()}


def shares_table(avg: dict[str, np.ndarray], k: int) -> str:
    rows = []
    for kind in KINDS:
        rows.append([kind])
        for share in (0, *SHARES):
            rows[-1].append(evaluation.over_seeds(avg[arm_name(kind, share)]))
    shares = [f"{share} %" for share in (0, *SHARES)]
    return evaluation.markdown([f"Avg@{k} by share of errors", *shares], rows)


def looks_table(looks: dict[str, dict], gains: dict[str, np.ndarray]) -> str:
    rows = []
    for arm, numbers in looks.items():
        texts = [text for _, text in numbers.values()]
        rows.append([arm, evaluation.over_seeds(gains[arm]), *texts])
    return evaluation.markdown(["", "gain", *next(iter(looks.values()))], rows)


def ranks(x: np.ndarray) -> np.ndarray:
    """Ties share a rank."""
    return (x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)


def correlations_table(looks: dict[str, dict], gains: dict[str, np.ndarray]) -> str:
    """Over the arms, for each seed; then the mean over seeds."""
    rows = []
    for name in next(iter(looks.values())):
        x = np.array([numbers[name][0] for numbers in looks.values()])
        spearman, pearson = [], []
        for y in np.array([gains[arm] for arm in looks]).T:
            spearman.append(np.corrcoef(ranks(x), ranks(y))[0, 1])
            pearson.append(np.corrcoef(x, y)[0, 1])
        rows.append([name])
        for r in (np.array(spearman), np.array(pearson)):
            rows[-1].append(f"{r.mean():.2f} ± {evaluation.half_width(r):.2f}")
    return evaluation.markdown(["gain against", "Spearman", "Pearson"], rows)


LINES = {"wrong value": "o", "wrong place": "s", "reference, wrong": "D", "grpo, flipped": "v"}


def draw_figure(plt, looks: dict[str, dict], gains: dict[str, np.ndarray]):
    """Gain against the share of errors, and against three numbers that are known beforehand."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharey=True, layout="constrained")
    for (kind, marker), colour in zip(LINES.items(), evaluation.COLOURS):
        ys = [gains[arm_name(kind, share)] for share in (0, *SHARES)]
        draw_points(axes[0, 0], (0, *SHARES), ys, marker=marker, color=colour, label=kind)
    axes[0, 0].set_xlabel("share of errors, %")
    axes[0, 0].legend(frameon=False)
    for axis, name in zip(axes.flat[1:], (RIGHT, BLAME, GAP)):
        for arm, numbers in looks.items():
            colour = evaluation.COLOURS[2 if arm.startswith("reference") else 0]
            draw_points(axis, [numbers[name][0]], [gains[arm]], marker="o", color=colour)
        axis.set_xlabel(name + ", %")
    for axis in axes.flat:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("gain, points")
    return figure


def draw_points(axis, x, ys: list[np.ndarray], **style) -> None:
    """Means over seeds with intervals."""
    means = [100 * y.mean() for y in ys]
    halves = [100 * evaluation.half_width(y) for y in ys]
    axis.errorbar(x, means, halves, markersize=4, linewidth=1, **style)


def study(root: Path, assets: Path, seeds: int, flags: list[str]) -> str:
    plt = evaluation.load_pyplot()  # if it is missing, that is said before the training
    cfg = sd.parse_config(flags)
    arms = add_rows()
    avg = train_all(arms, root, seeds, [*flags, "--eval-every", str(cfg.steps)], cfg.lr)
    looks = look_at_all(arms, cfg)
    groups = evaluation.attempt_test(cfg)
    base = evaluation.mean_scores(groups)["Avg"]
    gains = {arm: values - base for arm, values in avg.items()}
    text = "\n\n".join([
        f"{len(groups)} test problems × {cfg.eval_samples} attempts; the base: {100 * base:.1f}. "
        f"Seeds 0–{seeds - 1}, {cfg.steps} steps, lr {cfg.lr:g}; mean ± half of the 95 % t interval "
        "over seeds.",
        shares_table(avg, cfg.eval_samples),
        f"Before training, {PROBLEMS} attempts of the base; 95 % bootstrap intervals over problems.",
        looks_table(looks, gains),
        correlations_table(looks, gains),
    ])  # fmt: skip
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "critic_study.md").write_text(text + "\n", "utf-8")
    draw_figure(plt, looks, gains).savefig(assets / "critic_study.svg", metadata={"Date": None})
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=evaluation.positive, default=5)
    parser.add_argument("--out", type=Path, default="runs/critic_study", help="folder of the runs")
    parser.add_argument("--assets", type=Path, default="assets", help="folder of table and figure")
    parser.add_argument("flags", nargs="*", help="after --: flags of sd.py")
    args = parser.parse_args(argv)
    try:
        print(study(args.out, args.assets, args.seeds, args.flags or ["--preset", "toy"]))
        return 0
    except sd.UserError as error:
        print(f"critic_study.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
