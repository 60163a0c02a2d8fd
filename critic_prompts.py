"""What is said to a model and what is read out of it: prompts, traces and answers. The method is in sd.py.

Who sees what (each `*_student`, `*_teacher` and `*_critic` makes a list of chat messages; the model's template renders it):

    reader     problem   its own attempt   critique   worked solution
    student      yes           -              -              -
    teacher      yes           -       yes (critique)  yes (reference)      the context c of eq (1), one or the other
    critic       yes          yes             -        yes, unless --no-critic-sees-reference

The teacher reads both kinds of context through the same words, so that the conditions differ in c and in nothing else.
Two formats exist: "steps" for chat models, "toy" for the toy world. Each knows how to find the steps of a trace.
"""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple


# ---- 1. Answers. -------------------------------------------------------------------------------------------

def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def extract_answer(text: str) -> str | None:
    """The last <answer>…</answer>, else the last \\boxed{…}, else what follows the last ####; None if there is none.

    No regular expression scans the whole text: a hostile 10 MB answer costs a few searches.
    """
    for mark, end in (("<answer>", "</answer>"), ("\\boxed{", ""), ("####", "\n")):
        _, found, rest = text.rpartition(mark)
        rest = rest[:1000].lstrip()
        if found and mark == "\\boxed{":  # its own closing brace, or nothing
            depth = itertools.accumulate((c == "{") - (c == "}") for c in rest)
            return rest[: next((i for i, d in enumerate(depth) if d < 0), 0)].strip() or None
        if found:
            return rest.partition(end)[0].strip() or None
    return None


# ---- 2. Prompts. EDIT HERE (prompts): "steps", for chat models ---------------------------------------------

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
# Tried and given up, on SmolLM2-135M-Instruct as critic of its own GSM8K attempts, greedy, 6 attempts each:
# - the two examples inside one long message: 0 of 6 replies had steps and an answer; it went on with the list of cases.
#   The same examples as turns: 3 of 6.
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


TAG = r"<step_(\d{1,9})>"
STEP = re.compile(TAG + r"((?:(?!<step_).)*?)</step_\1>", re.DOTALL)  # stops at the next opening tag: linear


def steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in STEP.findall(text)]


def steps_trace(reply: str) -> str | None:
    start, end = re.search(TAG, reply), reply.rfind("</answer>")  # without "Here is the mended trace:"
    trace = reply[start.start() : end + len("</answer>")] if start and end >= 0 else ""
    numbers = [int(n) for n, _ in STEP.findall(trace)]
    return trace if numbers and numbers == sorted(set(numbers)) else None  # a loop or an echo counts twice


# ---- "toy": the language of toy/make.py. One character is one token and each step has six. ---------------

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


# ---- Formats: "steps" and "toy" side by side, and where a critique departs from an attempt. ----------------

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


def first_edit(decode: Callable[[list[int]], str], ids: list[int], critique: str) -> int:
    """Index of the first response token at which the critique departs from the attempt; len(ids) if it never does.

    Compares text, so it holds for any tokenizer; searches by halves, so it decodes log T prefixes and not T. A critique
    begins at its first step tag: what the attempt says before its own counts as copied.
    """
    tag = re.match(TAG, critique)
    lead = max(0, decode(ids).find(tag[0])) if tag else 0
    low, high = 0, len(ids)  # the first `low` tokens are copied, the first high + 1 are not
    while low < high:
        middle = (low + high + 1) // 2
        copied = decode(ids[:middle])[lead:].lstrip().rstrip("\ufffd")  # \ufffd: a letter cut between two tokens
        low, high = (middle, high) if critique.startswith(copied) else (low, middle - 1)
    return low


def strip_thinking(text: str) -> str:
    """Drop `<think>…</think>`; the opening may stand in the template, and a thought that was cut off never closes."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).split("</think>")[-1].strip()
