"""The toy world: a language with a misconception, and a model of it that is pre-trained while you wait.

It becomes a Hugging Face folder and a problem file; from there on, nothing knows that it is a toy. The ones beside this
file are what it wrote.

  python toy/make.py           writes them anew, in a minute or two
  python toy/make.py FOLDER    writes them there
"""

import functools
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from critic_prompts import toy_critic, toy_student, toy_teacher  # noqa: E402


class ToyLanguage:
    """Chains modulo 10: `7+6*3` is solved by `s7+6=3s3*3=9####9`, a connective (s, t or h: so, then, hence), the
    running value, the operation, its result.

    The connective and the order of the operands (`s6+7=3`) carry no mathematics, and authors differ in them, as people
    do in phrasing. The solver has a misconception: it mostly takes `*3 *7 *9` for `+3 +7 +9`, so that its likeliest
    answer is wrong and sharpening it does not help. Reading a solution it can follow it; as a critic it can mend one.
    """

    CHARACTERS = "0123456789+*=sth|?!~"
    OPERATIONS = ("+1", "+3", "+4", "+6", "*2", "*3", "*7", "*9")
    MISREAD = {"*3": "+3", "*7": "+7", "*9": "+9"}
    MISREAD_SHARE, RIGHT_SHARE = 0.5, 0.25  # of those operations in its own solutions; the rest are random digits
    STYLES = {  # weights of the connectives s, t, h; share of swapped operands
        "solver": ((80, 15, 5), 0.05),
        "author": ((10, 10, 80), 0.95),
        "anyone": ((1, 1, 1), 0.5),
    }
    KEEPS_STYLE = 0.92  # so often a reader of a solution keeps each of its surface choices
    SLIPS = 0.5  # share of readers that are shown to have slipped
    LENGTH = 6  # operations of a problem

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    @staticmethod
    def apply(operation: str, value: int) -> int:
        return (value + int(operation[1:]) if operation[0] == "+" else value * int(operation[1:])) % 10

    def problem(self) -> str:
        return str(self.rng.randrange(10)) + "".join(self.rng.choices(self.OPERATIONS, k=self.LENGTH))

    def values(self, problem: str, misread: bool = False, noise: float = 0.0, start: Sequence[int] = ()) -> list[int]:
        """The running value after each operation: by the rules, or with the misconception and some noise. The first
        values may be given."""
        values = list(start)
        value = values[-1] if values else int(problem[0])
        for operation in re.findall(r"[+*]\d", problem)[len(values) :]:
            result, u = self.apply(operation, value), self.rng.random()
            if misread and operation in self.MISREAD and u >= self.RIGHT_SHARE:
                known = u < self.RIGHT_SHARE + self.MISREAD_SHARE
                result = self.apply(self.MISREAD[operation], value) if known else self.rng.randrange(10)
            value = self.rng.randrange(10) if self.rng.random() < noise else result
            values.append(value)
        return values

    def style(self, author: str) -> list[tuple[str, bool]]:
        """(connective, operands swapped) of each step."""
        weights, swaps = self.STYLES[author]
        return [(self.rng.choices("sth", weights)[0], self.rng.random() < swaps) for _ in range(self.LENGTH)]

    def trace(self, problem: str, values: list[int], style: list[tuple[str, bool]]) -> str:
        value, text = problem[0], ""
        for operation, result, (connective, swapped) in zip(re.findall(r"[+*]\d", problem), values, style):
            left, right = (operation[1], value) if swapped else (value, operation[1])
            text += f"{connective}{left}{operation[0]}{right}={result}"
            value = str(result)
        return f"{text}####{value}"

    def row(self, problem: str) -> dict[str, str]:
        """A row of the data set; its worked solution is by another author than the solver."""
        values = self.values(problem)
        solution = self.trace(problem, values, self.style("author"))
        return {"problem": problem, "solution": solution, "answer": str(values[-1])}

    def critique(self, problem: str, attempted: list[int], surface: list[tuple[str, bool]], style: str) -> str:
        """What a perfect critic writes about an attempt with these values and this surface."""
        right = self.values(problem)
        wrong = next((k for k, (a, b) in enumerate(zip(attempted, right)) if a != b), None)
        mended, own = self.trace(problem, right, surface), self.trace(problem, attempted, surface)
        if style == "quote" and wrong is not None:
            return mended[: 6 * wrong] + own[6 * wrong : 6 * wrong + 6] + "!" + mended[6 * wrong :]
        if style == "omit":
            return mended[6 * (self.LENGTH - 1 if wrong is None else wrong) :]
        return mended

    def example(self, job: str, problem: str) -> tuple[list[dict], str, str]:
        """(messages, given, reply) of a pre-training example for one of the model's three jobs. `given` is the start of
        the reply, read but not learnt."""
        right, style = self.values(problem), self.rng.choices(["copy", "quote", "omit"], (6, 1, 1))[0]
        if job == "solve":
            reply = self.trace(problem, self.values(problem, misread=True), self.style("solver"))
            return toy_student(problem), "", reply
        if job == "follow":
            shown, own = self.style(self.rng.choice(["solver", "author"])), self.style("solver")
            context = self.critique(problem, self.values(problem, misread=style != "copy"), shown, style)
            keeps = lambda theirs, mine: theirs if self.rng.random() < self.KEEPS_STYLE else mine
            kept = [(keeps(s[0], o[0]), keeps(s[1], o[1])) for s, o in zip(shown, own)]
            if self.rng.random() >= self.SLIPS:
                return toy_teacher(problem, context), "", self.trace(problem, right, kept)
            # a reader who has slipped carries on from its own number, as it would have alone
            k = self.rng.randrange(self.LENGTH)
            slip = self.rng.choice([value for value in range(10) if value != right[k]])
            reply = self.trace(problem, self.values(problem, misread=True, start=[*right[:k], slip]), kept)
            return toy_teacher(problem, context), reply[: 6 * k + 6], reply[6 * k + 6 :]
        # half of the attempts are noisier than the solver's and in any surface: a critic must know more than it meets
        hard = self.rng.random() < 0.5
        surface = self.style("anyone" if hard else "solver")
        attempted = self.values(problem, misread=True, noise=0.1 * hard)
        messages = toy_critic(problem, self.trace(problem, attempted, surface), self.row(problem)["solution"], style)
        return messages, "", self.critique(problem, attempted, surface, style)


TOY_MODEL = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
TOY_JOBS = {"solve": 16, "follow": 28, "criticise": 20}  # rows of a pre-training batch
TOY_STEPS, TOY_PROBLEMS = 1000, 2000


def toy_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A token a character, but for the special ones and "####". Padding is the end token, as in many real models."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = {token: i for i, token in enumerate([*special, "####", *ToyLanguage.CHARACTERS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("####|."), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(special)
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unknown|>",
        chat_template=template + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )  # fmt: skip


def toy_loss(model, tokenizer, examples: list[tuple[list[dict], str, str]]) -> Tensor:
    """Cross entropy of every token of the replies, (N,)."""
    rows, labels = [], []
    for messages, given, reply in examples:
        prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + given)
        own = tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt["input_ids"] + own))
        labels.append(torch.tensor([-100] * len(prompt["input_ids"]) + own))
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    logits = model(input_ids=pad(rows)).logits[:, :-1]  # (rows, width, V)
    targets = pad(labels, padding_value=-100)[:, 1:]
    return F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none")


def pretrain_toy(model, tokenizer, language: ToyLanguage, held_out: set[str], steps: int) -> None:
    """Next-token loss on the replies of the three jobs. Muon on the matrices needs half of AdamW's steps."""
    model.train()
    inner = lambda name, p: p.ndim == 2 and ".layers." in name
    matrices = [p for name, p in model.named_parameters() if inner(name, p)]
    others = [p for name, p in model.named_parameters() if not inner(name, p)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
    optimizers = [muon, torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    shape = lambda step: min(1, (step + 1) / 30, 2 * (steps - step) / steps)  # warm up, hold, decay from the middle
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    fresh = (problem for problem in iter(language.problem, None) if problem not in held_out)
    for _ in tqdm(range(steps), desc="pre-train the toy model, once", disable=None):
        losses = torch.cat([toy_loss(model, tokenizer, [language.example(job, next(fresh)) for _ in range(rows)])
                            for job, rows in TOY_JOBS.items()])  # fmt: skip
        losses.mean().backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()


def make(folder: Path, steps: int = TOY_STEPS) -> None:
    """Write model, tokenizer and problems.jsonl into the folder."""
    language, tokenizer = ToyLanguage(seed=0), toy_tokenizer()
    problems = {problem: language.row(problem) for problem in (language.problem() for _ in range(TOY_PROBLEMS))}
    end = tokenizer.eos_token_id
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, bos_token_id=None, **TOY_MODEL
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    pretrain_toy(model, tokenizer, language, set(problems), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems.values()))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
