"""Makes the toy: a language with a misconception, and a small model that is pre-trained on it.

The result is an ordinary Hugging Face folder with a problem file. From there on nothing knows that
it is a toy. The files beside this one are what it wrote.

The language. A problem is a chain of operations modulo 10, and a solution works through it one step
at a time. A step has six characters: a connective (s, t or h: so, then, hence), the running value,
the operation, an equals sign and the result:

  problem   7+6*3*9+4*2+1
  solution  s7+6=3s3*3=9s9*9=1s1+4=5s5*2=0s0+1=1####1

The three jobs. One model learns all of them, because self-distillation asks them of one model. The
prompts are the ones that sd.py writes, from critic_prompts.py.

  solve       problem                       → a solution, with the misconception
  follow      problem, worked solution      → this solution, mostly in its wording, right or wrong
  criticise   problem, attempt, reference   → the attempt in its own wording, with right values

The misconception. Half of the time the solver takes *3, *7 and *9 for +3, +7 and +9. So its most
likely answer is wrong, and to make it surer of itself does not help. If its errors were random, the
most likely answer would be right, and it would need no teacher.

The readers. Half of those who follow a solution have a right one, a reference or a critique. The
others have an attempt that nobody corrected. All of them write what they read. So a teacher knows
no more than its context: a copy of the attempt teaches nothing, and a critique teaches what it
corrects. If readers met right solutions only, they would learn that whoever is given a context has
no misconception, and a copy would teach nearly as much as a critique.

The authors. Which connective a step begins with, and which operand stands first (s7+6=3 or s6+7=3),
carry no mathematics, and authors differ in them as people differ in phrasing. The reference
solutions are by another author than the solver. A teacher that reads one prefers that author's
phrasing, so it blames correct tokens too. A critique keeps the attempt's phrasing, so a teacher
that reads one blames the mistake only.

To make another world, edit a constant of ToyLanguage and write the world into a folder of its own:

  python toy/make.py --out world               three minutes on one core
  python sd.py --preset toy --model world --data world/problems.jsonl
  python toy/make.py --check                   make the committed world anew, and compare the two
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # sd.py and critic_prompts.py are one folder up

import sd  # noqa: E402
from critic_prompts import FORMATS  # noqa: E402

prompts = FORMATS["toy"]

# ---- 1. The language. ----------------------------------------------------------------------------

STEP = 6  # characters of a step


class Phrasing(NamedTuple):
    """What an author chooses freely in one step."""

    connective: str  # s, t or h
    swapped: bool  # the operation's digit stands first: s6+7=3


class Example(NamedTuple):
    """A pre-training example. Only the reply is learnt."""

    messages: list[dict]
    given: str  # the start of the reply, read but not learnt
    reply: str


class ToyLanguage:
    """Draws problems, solutions, critiques and pre-training examples.

    All of them follow from the seed and from the order of the draws. To get the committed problems
    and weights again, change neither.
    """

    CHARACTERS = "0123456789+*=sth|?!~"
    OPERATIONS = ("+1", "+3", "+4", "+6", "*2", "*3", "*7", "*9")
    LENGTH = 6  # operations of a problem

    # the misconception
    MISREAD = {"*3": "+3", "*7": "+7", "*9": "+9"}
    MISREAD_SHARE = 0.5  # of these operations, in the solver's solutions
    RIGHT_SHARE = 0.25  # the other results are random digits
    NOISE = 0.1  # share of random digits in attempts that are worse than the solver's

    # for each author: the weights of the connectives s, t, h, and the share of swapped operands
    STYLES = {
        "solver": ((80, 15, 5), 0.05),
        "author": ((10, 10, 80), 0.95),  # of the reference solutions
        "anyone": ((1, 1, 1), 0.5),
    }
    KEEPS_STYLE = 0.92  # how often a reader of a solution keeps a choice of its phrasing
    UNCORRECTED = 0.5  # share of readers that read an uncorrected attempt
    SLIPS = 0.5  # share of readers that are shown after a slip

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def problem(self) -> str:
        start = str(self.rng.randrange(10))
        return start + "".join(self.rng.choices(self.OPERATIONS, k=self.LENGTH))

    def fresh_problem(self, held_out: set[str]) -> str:
        """A problem that is not held out."""
        problem = self.problem()
        while problem in held_out:
            problem = self.problem()
        return problem

    def values(
        self, problem: str, misread: bool = False, noise: float = 0.0, start: Sequence[int] = ()
    ) -> list[int]:
        """The running value after each operation; `start` holds the first ones, if they are given.

        `misread`: by someone who has the misconception. `noise`: the share of random digits.
        """
        values = list(start)
        for operation in operations(problem)[len(values) :]:
            before = values[-1] if values else int(problem[0])
            value = self.result(operation, before, misread)
            if self.rng.random() < noise:
                value = self.rng.randrange(10)
            values.append(value)
        return values

    def result(self, operation: str, value: int, misread: bool) -> int:
        u = self.rng.random()
        if not misread or operation not in self.MISREAD or u < self.RIGHT_SHARE:
            return apply(operation, value)
        if u < self.RIGHT_SHARE + self.MISREAD_SHARE:
            return apply(self.MISREAD[operation], value)
        return self.rng.randrange(10)

    def phrasings(self, author: str) -> list[Phrasing]:
        """One for each step."""
        weights, swapped_share = self.STYLES[author]
        phrasings = []
        for _ in range(self.LENGTH):
            connective = self.rng.choices("sth", weights)[0]
            swapped = self.rng.random() < swapped_share
            phrasings.append(Phrasing(connective, swapped))
        return phrasings

    def row(self, problem: str) -> dict[str, str]:
        """A row of the data set."""
        values = self.values(problem)
        solution = trace(problem, values, self.phrasings("author"))
        return {"problem": problem, "solution": solution, "answer": str(values[-1])}

    def critique(
        self, problem: str, attempted: list[int], phrasings: list[Phrasing], style: str
    ) -> str:
        """What a perfect critic writes about an attempt with these values and phrasings.

        `style` is a value of --critic-style.
        """
        right = self.values(problem)
        corrected = trace(problem, right, phrasings)
        wrong = first_difference(attempted, right)
        if style == "omit":
            # if nothing is wrong, only the last step
            return corrected[STEP * min(wrong, self.LENGTH - 1) :]
        if style == "quote" and wrong < self.LENGTH:
            here = STEP * wrong
            wrong_step = trace(problem, attempted, phrasings)[here : here + STEP]
            return corrected[:here] + wrong_step + "!" + corrected[here:]
        return corrected

    def solve(self, problem: str) -> Example:
        values = self.values(problem, misread=True)
        reply = trace(problem, values, self.phrasings("solver"))
        return Example(prompts.student(problem), "", reply)

    def follow(self, problem: str) -> Example:
        """The reader of a critique, of a solution, or of an attempt that nobody corrected.

        Some readers have slipped: the start of their reply ends in a value that they did not read.
        Such a reader carries on from its own number, as it would have done alone. So a teacher
        learns to blame the step in which an attempt went wrong, and not all the steps that follow
        from it.
        """
        shown = self.phrasings(self.rng.choice(["solver", "author"]))
        written = self.mix(shown, self.phrasings("solver"))
        attempted = self.values(problem, misread=True, noise=self.NOISE)
        if self.rng.random() < self.UNCORRECTED:
            read, context = attempted, trace(problem, attempted, shown)
        else:
            read = self.values(problem)
            context = self.critique(problem, attempted, shown, self.critic_style())
        messages = prompts.teacher(problem, context)
        if self.rng.random() >= self.SLIPS:
            return Example(messages, "", trace(problem, read, written))
        step = self.rng.randrange(self.LENGTH)
        slip = self.rng.choice([value for value in range(10) if value != read[step]])
        values = self.values(problem, misread=True, start=[*read[:step], slip])
        reply = trace(problem, values, written)
        after = STEP * (step + 1)
        return Example(messages, reply[:after], reply[after:])

    def mix(self, shown: list[Phrasing], own: list[Phrasing]) -> list[Phrasing]:
        """Each choice as it was shown, with probability KEEPS_STYLE, or else the reader's own."""
        mixed = []
        for theirs, mine in zip(shown, own):
            keeps_connective = self.rng.random() < self.KEEPS_STYLE
            keeps_order = self.rng.random() < self.KEEPS_STYLE
            connective = theirs.connective if keeps_connective else mine.connective
            swapped = theirs.swapped if keeps_order else mine.swapped
            mixed.append(Phrasing(connective, swapped))
        return mixed

    def criticise(self, problem: str) -> Example:
        """The critic. It practises on harder attempts than it will meet.

        Half of them are like the solver's, the others have more errors and any phrasing.
        """
        hard = self.rng.random() < 0.5
        phrasings = self.phrasings("anyone" if hard else "solver")
        attempted = self.values(problem, misread=True, noise=self.NOISE if hard else 0.0)
        attempt = trace(problem, attempted, phrasings)
        row = self.row(problem)
        style = self.critic_style()
        messages = prompts.critic(problem, attempt, row["solution"], row["answer"], style)
        return Example(messages, "", self.critique(problem, attempted, phrasings, style))

    def critic_style(self) -> str:
        return self.rng.choices(["copy", "quote", "omit"], (6, 1, 1))[0]


def operations(problem: str) -> list[str]:
    return re.findall(r"[+*]\d", problem)


def apply(operation: str, value: int) -> int:
    sign, digit = operation[0], int(operation[1])
    result = value + digit if sign == "+" else value * digit
    return result % 10


def trace(problem: str, values: list[int], phrasings: list[Phrasing]) -> str:
    """The text of a solution."""
    value, text = problem[0], ""
    for operation, result, phrasing in zip(operations(problem), values, phrasings):
        sign, digit = operation
        left, right = (digit, value) if phrasing.swapped else (value, digit)
        text += f"{phrasing.connective}{left}{sign}{right}={result}"
        value = result
    return f"{text}####{value}"


def first_difference(a: list[int], b: list[int]) -> int:
    """The first index at which they differ; their length if they are equal."""
    for index, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return index
    return len(a)


# ---- 2. The model, and its pre-training. ---------------------------------------------------------

MODEL = dict(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
# rows of a batch
JOBS = {ToyLanguage.solve: 16, ToyLanguage.follow: 28, ToyLanguage.criticise: 20}
STEPS = 1000
PROBLEMS = 2000  # in problems.jsonl, before duplicates are merged; held out from pre-training
THREADS = 1  # fixed, because float sums can depend on it, and so the weights' last bits


def toy_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A character is a token, apart from the special ones and "####".

    Padding is the end token, as in many real models.
    """
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    tokens = [*special, "####", *ToyLanguage.CHARACTERS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>")
    core = tokenizers.Tokenizer(words)
    pattern = tokenizers.Regex("####|.")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(special)
    turns = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    header = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|unknown|>",
        chat_template=turns + header,
    )


def untrained() -> sd.Chat:
    """The model with random weights. Its end token is token 0."""
    tokenizer = toy_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=None, **MODEL
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    return sd.make_chat(model, tokenizer)


def pretrain(chat: sd.Chat, language: ToyLanguage, held_out: set[str], steps: int) -> None:
    """Next-token prediction of the replies of the three jobs.

    Muon trains the matrices inside the layers: AdamW alone needs twice the steps.
    """
    matrices, others = [], []
    for name, p in chat.model.named_parameters():
        if p.ndim == 2 and ".layers." in name:
            matrices.append(p)
        else:
            others.append(p)
    muon = torch.optim.Muon(
        matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
    )
    adamw = torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)

    def rate(step: int) -> float:
        """Warm up for 30 steps, hold, and decay linearly over the second half."""
        return min(1, (step + 1) / 30, 2 * (steps - step) / steps)

    muon_rate = torch.optim.lr_scheduler.LambdaLR(muon, rate)
    adamw_rate = torch.optim.lr_scheduler.LambdaLR(adamw, rate)

    chat.model.train()
    # no bar where the output is not a terminal
    for _ in tqdm(range(steps), desc="pre-train", disable=None):
        losses = []
        for job, rows in JOBS.items():
            examples = [job(language, language.fresh_problem(held_out)) for _ in range(rows)]
            losses.append(reply_loss(chat, examples))
        torch.cat(losses).mean().backward()
        muon.step()
        adamw.step()
        muon_rate.step()
        adamw_rate.step()
        chat.model.zero_grad()


def reply_loss(chat: sd.Chat, examples: list[Example]) -> Tensor:
    """Cross entropy of each token of the replies, (N,)."""
    rows, labels = [], []
    for messages, given, reply in examples:
        prompt = chat.encode(messages) + ids_of(chat, given)
        response = ids_of(chat, reply) + chat.end_ids
        rows.append(prompt + response)
        labels.append([-100] * len(prompt) + response)
    ids = sd.pad(rows, chat.end_ids[0], "right")
    logits = chat.model(input_ids=ids).logits[:, :-1]  # (rows, width, V)
    targets = sd.pad(labels, -100, "right")[:, 1:]  # (rows, width)
    learnt = targets >= 0
    return F.cross_entropy(logits[learnt], targets[learnt], reduction="none")


def ids_of(chat: sd.Chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def make(folder: Path, steps: int = STEPS) -> None:
    """Write model, tokenizer and problems.jsonl into the folder."""
    language = ToyLanguage(seed=0)
    rows = {}
    for _ in range(PROBLEMS):
        problem = language.problem()
        rows[problem] = language.row(problem)
    chat = untrained()
    pretrain(chat, language, set(rows), steps)
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    with open(folder / "problems.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for row in rows.values():
            file.write(json.dumps(row) + "\n")


# ---- 3. The check: does this file still make the world that is committed beside it? --------------


class Wanted(NamedTuple):
    """What a measure must be, %."""

    low: float
    high: float
    # between the two worlds: another processor sums in another order, and after a thousand steps
    # the weights differ visibly
    tolerance: float


# A gap is the accuracy of a teacher that reads this, less that of the base.
WANTED = {
    "base: right attempts": Wanted(12, 35, 6),
    "critic: critiques with the right answer": Wanted(90, 100, 3),
    "gap with the critique": Wanted(60, 100, 6),
    "gap with the reference": Wanted(60, 100, 6),
    "gap with a copy of the attempt": Wanted(-10, 3, 3),  # a copy must not teach
    "gap with another problem's critique": Wanted(-100, 0, 6),
}
SAMPLES = 4  # attempts at each of the 100 test problems


def measure(folder: Path) -> dict[str, float]:
    """The measures of WANTED, in its order, %."""
    settings = {**sd.PRESETS["toy"], "data": str(folder / "problems.jsonl"), "device": "cpu"}
    cfg = sd.Config(**settings)
    chat = sd.load_model(str(folder), cfg)
    problems = sd.load_problems(cfg, chat).test
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, SAMPLES)
    critiques = sd.write_critiques(rollouts, sd.load_critic(cfg, chat), cfg)
    solutions = [r.problem.solution for r in rollouts]
    copies = [r.text for r in rollouts]
    # the attempts at one problem stand side by side
    of_another_problem = critiques[SAMPLES:] + critiques[:SAMPLES]

    base = percent([r.reward for r in rollouts])
    right = percent([is_right(critique or "", r) for r, critique in zip(rollouts, critiques)])
    values = [base, right]
    for contexts in (critiques, solutions, copies, of_another_problem):
        values.append(teacher_accuracy(chat, rollouts, contexts, cfg) - base)
    return dict(zip(WANTED, values))


def teacher_accuracy(
    chat: sd.Chat, rollouts: list[sd.Rollout], contexts: list[str | None], cfg: sd.Config
) -> float:
    """How often the teacher's most likely answer is right when it reads these contexts, %."""
    for r, context in zip(rollouts, contexts):
        r.context = context
    readers = sd.add_teacher_prompts(chat, rollouts, cfg)
    caps = [cfg.max_new_tokens] * len(readers)
    replies = sd.generate(chat, [r.teacher_prompt for r in readers], caps, cfg.sample_batch)
    return percent([is_right(chat.decode(ids), r) for r, (ids, _) in zip(readers, replies)])


def is_right(text: str, r: sd.Rollout) -> bool:
    return sd.is_correct(text, r.problem.answer, "exact")


def percent(values: list[float]) -> float:
    return 100 * sum(values) / max(1, len(values))


def check(steps: int) -> int:
    """Make the world anew, compare it with the committed one, and return the exit status."""
    with tempfile.TemporaryDirectory() as name:
        fresh = Path(name)
        make(fresh, steps)
        same_weights = same_file(fresh, "model.safetensors")
        same_problems = same_file(fresh, "problems.jsonl")
        committed, anew = measure(HERE), measure(fresh)

    print(f"weights equal bit for bit: {'yes' if same_weights else 'no (need not be)'}")
    print(f"problems.jsonl equal: {'yes' if same_problems else 'NO'}")
    print(f"{'%':40} committed    anew  tolerance       wanted")
    passed = same_problems
    for what, (low, high, tolerance) in WANTED.items():
        old, new = committed[what], anew[what]
        inside = low <= min(old, new) and max(old, new) <= high
        good = inside and abs(new - old) <= tolerance
        verdict = "ok" if good else "FAILED"
        wanted = f"{low} to {high}"
        print(f"{what:40} {old:9.1f} {new:7.1f} {tolerance:10.1f} {wanted:>12}  {verdict}")
        passed = passed and good
    return 0 if passed else 1


def same_file(folder: Path, name: str) -> bool:
    return (folder / name).read_bytes() == (HERE / name).read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="FOLDER", help="write a world into a new folder")
    task.add_argument("--check", action="store_true", help="compare a new world with this one")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        return check(args.steps)
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a new folder")
    make(args.out, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
