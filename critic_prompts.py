"""Every word that a model reads. No torch, no model call: strings in, strings out.

Who sees what (each function below makes a list of chat messages; the model's own template renders it):

    reader     problem   its own attempt   critique   worked solution
    student      yes           -              -              -
    teacher      yes           -       yes (critique)  yes (reference)      the context c of eq (1), one or the other
    critic       yes          yes             -        yes, unless --no-critic-sees-reference

The teacher reads both kinds of context through the same words, so that the conditions differ in c and in nothing else.
Two formats exist: "steps" for chat models, "toy" for the toy world. Each knows how to find the steps of a trace.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# EDIT HERE (prompts): "steps", for chat models

FORMAT = """Write one step at a time. Put each step inside numbered tags and only the final answer inside answer tags:
<step_1>first step</step_1>
<step_2>second step</step_2>
<answer>final answer</answer>"""

STUDENT = """Solve this problem.

{problem}

{format}"""

# the question comes first and the format last, as in STUDENT: an over-long context is cut in its own middle, between them
TEACHER = """Solve this problem.

{problem}

Here is a worked solution to go by. Follow it, and write your own solution out in full without mentioning it:

{context}

{format}"""

# The critic's three ways of quoting, `--critic-style`. A transformer copies what its context holds: so, in the paper's
# account, a wrong line that is quoted is reinforced even when it is refuted, a right line that is left out is
# discouraged, and only the faithful scribe's copy moves the tokens of the mistake and no others.
COPY = """Copy a worked trace and mend it: write the whole trace again, in numbered step tags, as its author should \
have written it.
A. If everything is right, copy it exactly, word for word.
B. If the answer is right but a step is missing, copy it and insert the step where it belongs.
C. If it breaks off before the answer, copy its good part more briefly and finish it.
D. If something is wrong, copy every step before the first mistake exactly, word for word. Write the mistaken step \
anew, correctly, and continue from there to the answer.
Keep the author's notation, wording and size of steps. Never write down the mistaken line, never say that there was a \
mistake, never mention the notes, and write nothing but the trace."""

QUOTE = """Correct a worked trace: write it again in numbered step tags. Copy every step before the first mistake. In the \
mistaken step quote the wrong words first, say that they are wrong, then write it correctly, and continue from there to \
the answer. If everything is right, copy the trace exactly."""

OMIT = """Correct a worked trace, in numbered step tags. Leave out every step before the first mistake: they are fine. \
Write the mistaken step anew, correctly, and continue from there to the answer. If everything is right, write only its \
last step and the answer."""

STYLES = {"copy": COPY, "quote": QUOTE, "omit": OMIT}

CRITIC_TASK = """Problem: {problem}
{notes}
Trace:
{attempt}

Mended trace:"""

NOTES = """
Notes, for checking only: {solution}
"""

# Two worked examples, as turns of the conversation: a mistake (case D) and a trace that breaks off (case C).
EXAMPLES = [
    {
        "problem": "Tom buys 3 pens at $2 each and a book at $5. What does he pay?",
        "notes": "Pens: 2 * 3 = $6. Total: 6 + 5 = $11.",
        "trace": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
        "<step_2>with the book that is 6 + 5 = 12 dollars</step_2>\n<answer>12</answer>",
        "copy": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
        "<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
        "quote": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n<step_2>it is wrong that 'with the book that is 6 + 5 = 12 "
        "dollars': with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
        "omit": "<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
    },
    {
        "problem": "A train covers 120 km in 2 hours, then 90 km in 1 hour. How far does it go in all?",
        "notes": "It travels 120 + 90 = 210 km.",
        "trace": "The distances add up.\n<step_1>first part: 120 km; second part: 90",
        "copy": "<step_1>first part: 120 km; second part: 90 km</step_1>\n"
        "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
        "quote": "<step_1>first part: 120 km; second part: 90 km</step_1>\n"
        "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
        "omit": "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
    },
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def steps_student(problem: str) -> list[dict]:
    return [user(STUDENT.format(problem=problem, format=FORMAT))]


def steps_teacher(problem: str, context: str) -> list[dict]:
    return [user(TEACHER.format(problem=problem, context=context, format=FORMAT))]


def steps_critic(problem: str, attempt: str, solution: str | None, style: str) -> list[dict]:
    turns = []
    for e in EXAMPLES:
        turns.append(user(critic_task(e["problem"], e["trace"], e["notes"] if solution else None)))
        turns.append({"role": "assistant", "content": e[style]})
    turns.append(user(critic_task(problem, attempt, solution)))
    turns[0]["content"] = STYLES[style] + "\n\n" + turns[0]["content"]  # some templates have no system turn
    return turns


def critic_task(problem: str, attempt: str, solution: str | None) -> str:
    notes = NOTES.format(solution=solution) if solution else ""
    return CRITIC_TASK.format(problem=problem, attempt=attempt, notes=notes)


def steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in re.findall(r"<step_(\d+)>(.*?)</step_\1>", text, re.DOTALL)]


def steps_trace(reply: str) -> str | None:
    found = re.search(r"<step_\d+>.*</answer>", reply, re.DOTALL)  # without "Here is the mended trace:"
    numbers = [int(n) for n in re.findall(r"<step_(\d+)>.*?</step_\1>", found[0], re.DOTALL)] if found else []
    return found[0] if numbers and numbers == sorted(set(numbers)) else None  # a loop or an echo counts twice


# ---------------------------------------------------------------------------------------------------------------------
# "toy": the language of the toy world. One character is one token and each step has six.


def toy_student(problem: str) -> list[dict]:
    return [user(problem)]


def toy_teacher(problem: str, context: str) -> list[dict]:
    return [user(f"{problem}|{context}")]


TOY_MARKS = {"copy": "?", "quote": "!", "omit": "~"}  # a mark, not words, tells the toy critic its style


def toy_critic(problem: str, attempt: str, solution: str | None, style: str) -> list[dict]:
    return [user(f"{TOY_MARKS[style]}{problem}|{attempt}|{solution or ''}")]


def toy_find(text: str) -> list[str]:
    return re.findall(r"[sth]\d[+*]\d=\d", text)


def toy_trace(reply: str) -> str | None:
    return reply if re.fullmatch(r"([sth]\d[+*]\d=\d!?)+####\d", reply) else None


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
            return (
                toy_student(problem),
                "",
                self.trace(problem, self.values(problem, misread=True), self.style("solver")),
            )
        if job == "follow":
            shown, own = self.style(self.rng.choice(["solver", "author"])), self.style("solver")
            context = self.critique(problem, self.values(problem, misread=style != "copy"), shown, style)
            keeps = lambda theirs, mine: theirs if self.rng.random() < self.KEEPS_STYLE else mine
            kept = [(keeps(s[0], o[0]), keeps(s[1], o[1])) for s, o in zip(shown, own)]
            if self.rng.random() >= self.SLIPS:
                return toy_teacher(problem, context), "", self.trace(problem, right, kept)
            # a reader who has slipped carries on from the own number, as it would have alone
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


class Format(NamedTuple):
    """One way of talking to a model. The first three make messages, the last two read text."""

    student: Callable[[str], list[dict]]  # of the problem
    teacher: Callable[[str, str], list[dict]]  # of problem, context
    critic: Callable[[str, str, str | None, str], list[dict]]  # of problem, attempt, worked solution, style
    steps: Callable[[str], list[str]]  # the steps in a text, in order
    trace: Callable[[str], str | None]  # the trace in a critic's reply; None if it is malformed


FORMATS = {
    "steps": Format(steps_student, steps_teacher, steps_critic, steps_find, steps_trace),
    "toy": Format(toy_student, toy_teacher, toy_critic, toy_find, toy_trace),
}


def strip_thinking(text: str) -> str:
    """Drop `<think>…</think>`; the opening may stand in the template, and a thought that was cut off never closes."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).split("</think>")[-1].strip()


# Tried and given up, on SmolLM2-135M-Instruct as critic of its own GSM8K attempts, greedy, 6 attempts each:
# - the two examples inside one long message: 0 of 6 replies had steps and an answer; it went on with the list of cases.
#   The same examples as turns: 3 of 6.
