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
from collections.abc import Callable
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# EDIT HERE (prompts): "steps", for chat models

FORMAT = """Write one step at a time. Put each step inside numbered tags and only the final answer inside answer tags:
<step_1>first step</step_1>
<step_2>second step</step_2>
<answer>final answer</answer>"""

STUDENT = """Solve this problem.

{problem}

""" + FORMAT

# the question comes first and the format last, as in STUDENT: an over-long context is cut in its own middle, between them
TEACHER = """Solve this problem.

{problem}

Here is a worked solution to go by. Follow it, and write your own solution out in full without mentioning it:

{context}

""" + FORMAT

# The faithful scribe. Its output is the teacher's context, and a transformer copies what its context holds: a wrong
# line that is quoted, even to be refuted, is reinforced; a right line that is left out is discouraged.
CRITIC = """Copy a worked trace and mend it: write the whole trace again, in numbered step tags, as its author should have \
written it.
A. If everything is right, copy it exactly, word for word.
B. If the answer is right but a step is missing, copy it and insert the step where it belongs.
C. If it breaks off before the answer, copy its good part more briefly and finish it.
D. If something is wrong, copy every step before the first mistake exactly, word for word. Write the mistaken step anew, \
correctly, and continue from there to the answer.
Keep the author's notation, wording and size of steps. Never write down the mistaken line, never say that there was a \
mistake, never mention the notes, and write nothing but the trace."""

CRITIC_TASK = """Problem: {problem}
{notes}
Trace:
{attempt}

Mended trace:"""

NOTES = """
Notes, for checking only: {solution}
"""

# Two worked examples, as turns of the conversation: case D and case C. (problem, notes, trace, mended trace)
CRITIC_EXAMPLES = [
    (
        "Tom buys 3 pens at $2 each and a book at $5. What does he pay?",
        "Pens: 2 * 3 = $6. Total: 6 + 5 = $11.",
        "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n<step_2>with the book that is 6 + 5 = 12 dollars</step_2>\n<answer>12</answer>",
        "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
    ),
    (
        "A train covers 120 km in 2 hours, then 90 km in 1 hour. How far does it go in all?",
        "It travels 120 + 90 = 210 km.",
        "The distances add up.\n<step_1>first part: 120 km; second part: 90",
        "<step_1>first part: 120 km; second part: 90 km</step_1>\n<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
    ),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def steps_student(problem: str) -> list[dict]:
    return [user(STUDENT.format(problem=problem))]


def steps_teacher(problem: str, context: str) -> list[dict]:
    return [user(TEACHER.format(problem=problem, context=context))]


def steps_critic(problem: str, attempt: str, solution: str | None) -> list[dict]:
    turns = []
    for question, notes, trace, mended in CRITIC_EXAMPLES:
        turns += [user(critic_task(question, trace, notes if solution else None)), {"role": "assistant", "content": mended}]
    turns.append(user(critic_task(problem, attempt, solution)))
    turns[0] = user(CRITIC + "\n\n" + turns[0]["content"])  # not a system turn: some templates have none
    return turns


def critic_task(problem: str, attempt: str, solution: str | None) -> str:
    return CRITIC_TASK.format(problem=problem, attempt=attempt, notes=NOTES.format(solution=solution) if solution else "")


def steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in re.findall(r"<step_(\d+)>(.*?)</step_\1>", text, re.DOTALL)]


# ---------------------------------------------------------------------------------------------------------------------
# "toy": the language of the toy world. One character is one token and each step has six.


def toy_student(problem: str) -> list[dict]:
    return [user(problem)]


def toy_teacher(problem: str, context: str) -> list[dict]:
    return [user(f"{problem}|{context}")]


def toy_critic(problem: str, attempt: str, solution: str | None) -> list[dict]:
    return [user(f"?{problem}|{attempt}|{solution or ''}")]  # a mark, not words, says which job is asked for


def toy_find(text: str) -> list[str]:
    return re.findall(r"[sth]\d[+*]\d=\d", text)


class ToyLanguage:
    """Chains modulo 10: `7+6*3` is solved by `s7+6=3s3*3=9####9`, a connective (s, t or h: so, then, hence), the
    running value, the operation, its result.

    The connective and the order of the operands (`s6+7=3`) carry no mathematics, and authors differ in them, as people
    do in phrasing. The solver has a misconception: it mostly takes `*3 *7 *9` for `+3 +7 +9`, so that its likeliest
    answer is wrong and sharpening it does not help. Reading a solution it can follow it; as a critic it can mend one.
    """

    CHARACTERS = "0123456789+*=sth|?"
    OPERATIONS = ("+1", "+3", "+4", "+6", "*2", "*3", "*7", "*9")
    MISREAD = {"*3": "+3", "*7": "+7", "*9": "+9"}
    MISREAD_SHARE, RIGHT_SHARE = 0.5, 0.25  # of those operations in its own solutions; the rest are random digits
    STYLES = {  # weights of the connectives s, t, h; share of swapped operands
        "solver": ((80, 15, 5), 0.05),
        "author": ((10, 10, 80), 0.95),
        "anyone": ((1, 1, 1), 0.5),
    }
    KEEPS_STYLE = 0.92  # so often a reader of a solution keeps each of its surface choices
    LENGTH = 4  # operations of a problem

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    @staticmethod
    def apply(operation: str, value: int) -> int:
        return (value + int(operation[1:]) if operation[0] == "+" else value * int(operation[1:])) % 10

    def problem(self) -> str:
        return str(self.rng.randrange(10)) + "".join(self.rng.choices(self.OPERATIONS, k=self.LENGTH))

    def values(self, problem: str, misread: bool = False, noise: float = 0.0) -> list[int]:
        """The running value after each operation: by the rules, or with the misconception and some noise."""
        value, values = int(problem[0]), []
        for operation in re.findall(r"[+*]\d", problem):
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

    def row(self) -> dict[str, str]:
        """One row of the data set; its worked solution is by another author than the solver."""
        problem = self.problem()
        values = self.values(problem)
        solution = self.trace(problem, values, self.style("author"))
        return {"problem": problem, "solution": solution, "answer": str(values[-1])}

    def example(self, job: str, problem: str) -> tuple[list[dict], str]:
        """(messages, reply) of a pre-training example for one of the model's three jobs."""
        right = self.values(problem)
        if job == "solve":
            return toy_student(problem), self.trace(problem, self.values(problem, misread=True), self.style("solver"))
        if job == "follow":
            shown, own = self.style(self.rng.choice(["solver", "author"])), self.style("solver")
            keeps = lambda theirs, mine: theirs if self.rng.random() < self.KEEPS_STYLE else mine
            kept = [(keeps(s[0], o[0]), keeps(s[1], o[1])) for s, o in zip(shown, own)]
            return toy_teacher(problem, self.trace(problem, right, shown)), self.trace(problem, right, kept)
        # half of the attempts are noisier than the solver's and in any style: a critic must know more than it meets
        hard = self.rng.random() < 0.5
        style = self.style("anyone" if hard else "solver")
        attempt = self.trace(problem, self.values(problem, misread=True, noise=0.1 * hard), style)
        solution = self.trace(problem, right, self.style("author"))
        return toy_critic(problem, attempt, solution), self.trace(problem, right, style)


class Format(NamedTuple):
    """One way of talking to a model. `critic` takes None for a solution that the critic may not see."""

    student: Callable[[str], list[dict]]  # of the problem
    teacher: Callable[[str, str], list[dict]]  # of problem, context
    critic: Callable[[str, str, str | None], list[dict]]  # of problem, attempt, worked solution
    find_steps: Callable[[str], list[str]]  # the steps of a trace, in order; empty if it has none


FORMATS = {
    "steps": Format(steps_student, steps_teacher, steps_critic, steps_find),
    "toy": Format(toy_student, toy_teacher, toy_critic, toy_find),
}


def strip_thinking(text: str) -> str:
    """Drop `<think>…</think>`; the opening may stand in the template, and a thought that was cut off never closes."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).split("</think>")[-1].strip()


# Tried and given up, on SmolLM2-135M-Instruct as critic of its own GSM8K attempts, greedy, 6 attempts each:
# - the two examples inside one long message: 0 of 6 replies had steps and an answer; it went on with the list of cases.
#   The same examples as turns: 3 of 6.
