"""Every word that a model reads. No torch, no model call: strings in, strings out.

Who sees what (each function below renders one user message; the chat template adds the rest):

    reader     problem   its own attempt   critique   worked solution
    student      yes           -              -              -
    teacher      yes           -       yes (critique)  yes (reference)      the context c of eq (1), one or the other
    critic       yes          yes             -        yes, unless --no-critic-sees-reference

The teacher reads both kinds of context through the same words, so that the conditions differ in c and in nothing else.
Two formats exist: "steps" for chat models, "toy" for the toy world. Each knows how to find the steps of a trace.
"""
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
CRITIC = """You copy a worked trace and mend it. Write the whole trace again, in numbered step tags, as its author should have \
written it. Do not comment on it.

Decide which case it is, silently, then write only the trace:
A. Everything is right: copy it exactly, word for word.
B. The answer is right but a step is missing: copy it, and insert the step where it belongs.
C. It breaks off before the answer: copy the good part more briefly, and finish it.
D. Something is wrong: copy every step before the first mistake exactly, word for word. Write the mistaken step anew, \
correctly. Continue from there to the answer.

Keep the author's notation, wording and size of steps. Never write down the mistaken line, never say that there was a \
mistake, and never mention these instructions or the notes.

Example, case D
Problem: Tom buys 3 pens at $2 each and a book at $5. What does he pay?
Trace:
<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>
<step_2>with the book that is 6 + 5 = 12 dollars</step_2>
<answer>12</answer>
Mended trace:
<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>
<step_2>with the book that is 6 + 5 = 11 dollars</step_2>
<answer>11</answer>

Example, case A
Problem: A train covers 120 km in 2 hours. How fast is it?
Trace:
<step_1>speed = distance / time = 120 / 2 = 60 km/h</step_1>
<answer>60</answer>
Mended trace:
<step_1>speed = distance / time = 120 / 2 = 60 km/h</step_1>
<answer>60</answer>

Now this one.
Problem: {problem}
{notes}Trace:
{attempt}
Mended trace:"""

NOTES = """Notes, for checking only; the trace keeps its own way of solving:
{solution}
"""


def _steps_student(problem: str) -> str:
    return STUDENT.format(problem=problem)


def _steps_teacher(problem: str, context: str) -> str:
    return TEACHER.format(problem=problem, context=context)


def _steps_critic(problem: str, attempt: str, solution: str | None) -> str:
    notes = NOTES.format(solution=solution) if solution else ""
    return CRITIC.format(problem=problem, attempt=attempt, notes=notes)


def _steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in re.findall(r"<step_(\d+)>(.*?)</step_\1>", text, re.DOTALL)]


# ---------------------------------------------------------------------------------------------------------------------
# "toy": one character is one token and each step has six, e.g. `7+6*3` is solved by `s7+6=3s3*3=9####9`. A mark at the
# front, not words, tells the toy model which of its three jobs is asked for.


def _toy_student(problem: str) -> str:
    return problem


def _toy_teacher(problem: str, context: str) -> str:
    return f"{problem}|{context}"


def _toy_critic(problem: str, attempt: str, solution: str | None) -> str:
    return f"?{problem}|{attempt}|{solution or ''}"


def _toy_find(text: str) -> list[str]:
    return re.findall(r"[sth]\d[+*]\d=\d", text)


class Format(NamedTuple):
    """One way of talking to a model. `critic` takes None for a solution that the critic may not see."""

    student: Callable[[str], str]
    teacher: Callable[[str, str], str]
    critic: Callable[[str, str, str | None], str]
    find_steps: Callable[[str], list[str]]  # the steps of a trace, in order; empty if it has none


FORMATS = {
    "steps": Format(_steps_student, _steps_teacher, _steps_critic, _steps_find),
    "toy": Format(_toy_student, _toy_teacher, _toy_critic, _toy_find),
}


def strip_thinking(text: str) -> str:
    """Drop `<think>…</think>`, and everything up to a `</think>` whose opening the template had written."""
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).split("</think>")[-1].strip()
