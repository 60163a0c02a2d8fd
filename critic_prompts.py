"""The words of the method: what each reader is told, and how steps and answers are found in a text.

Who sees what. `student`, `teacher` and `critic` of a Format make the chat messages for that reader:

    reader    problem   its own attempt   critique          worked solution
    student     yes           -              -                    -
    teacher     yes           -        yes (critique)      yes (reference)    c of eq (1): either
    critic      yes          yes             -             yes, unless --no-critic-sees-reference

The teacher reads both kinds of context in the same sentence, so the conditions differ in c alone.
A format is one row of FORMATS: "steps" (numbered tags) and "plain" (paragraphs and \\boxed{}) are
for chat models, "toy" for the small model in toy/.
Standard library only. The method itself is in sd.py.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

# ---- 1. "steps", for chat models: numbered step tags and an answer tag. --------------------------

# the format that solver, teacher and critic are asked for
STEPS_FORMAT = """\
Write one step at a time. Put each step inside numbered tags and only the final answer inside \
answer tags:
<step_1>first step</step_1>
<step_2>second step</step_2>
<answer>final answer</answer>"""

STUDENT = """\
Solve this problem.

{problem}

{format}"""

# The question stands first and the format last, as in STUDENT.
TEACHER = """\
Solve this problem.

{problem}

Here is a worked solution to go by. Follow it, and write your own solution out in full without \
mentioning it:

{context}

{format}"""

# The critic's instructions, one row for each value of --critic-style. A transformer copies what its
# context holds. So, in the paper's account, a wrong line that is quoted is reinforced even when it
# is refuted, a correct line that is left out is discouraged, and only a faithful copy with the
# first wrong step corrected moves the tokens of the mistake and no others.

# the paper's four cases, A to D
COPY = """\
Correct a worked trace. Write the whole trace again, in numbered step tags, as its author should \
have written it.
A. If everything is right, copy it exactly, word for word.
B. If the answer is right but a step is missing, copy the trace and insert the missing step.
C. If the trace stops before the answer, copy its correct part more briefly and finish it.
D. If a step is wrong, copy every step before the first wrong one exactly, word for word. Write \
the wrong step again, correctly, and continue from there to the answer.
Keep the author's notation, wording and step size. Never write down the wrong line, never say that \
there was a mistake, never mention the notes, and write nothing but the corrected trace.

"""

QUOTE = """\
Correct a worked trace. Write it again, in numbered step tags. Copy every step before the first \
wrong one. In the wrong step, quote the wrong words first, say that they are wrong, then write the \
step correctly, and continue from there to the answer. If everything is right, copy the trace \
exactly.

"""

OMIT = """\
Correct a worked trace, in numbered step tags. Leave out every step before the first wrong one: \
they are fine. Write the wrong step again, correctly, and continue from there to the answer. If \
everything is right, write only its last step and the answer.

"""

STYLES = {"copy": COPY, "quote": QUOTE, "omit": OMIT}

CRITIC_TASK = """\
Problem: {problem}
{notes}
Trace:
{attempt}

Corrected trace:"""

NOTES = """
Notes, for checking only: {solution}
"""

# Two worked examples, given as earlier turns of the conversation: a wrong step (case D) and a trace
# that stops early (case C). As turns they work better than inside one long message: as critic of
# six of its own GSM8K attempts SmolLM2-135M-Instruct wrote 3 valid critiques instead of none.
EXAMPLES = [
    {
        "problem": "Tom buys 3 pens at $2 each and a book at $5. What does he pay?",
        "solution": "Pens: 2 * 3 = $6. Total: 6 + 5 = $11.",
        "answer": "11",
        "attempt": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
        "<step_2>with the book that is 6 + 5 = 12 dollars</step_2>\n<answer>12</answer>",
        "copy": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
        "<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
        "quote": "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
        "<step_2>it is wrong that 'with the book that is 6 + 5 = 12 dollars': "
        "with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
        "omit": "<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
    },
    {
        "problem": "A train covers 120 km in 2 hours, then 90 km in 1 hour. How far does it go?",
        "solution": "It travels 120 + 90 = 210 km.",
        "answer": "210",
        "attempt": "The distances add up.\n<step_1>first part: 120 km; second part: 90",
        "copy": "<step_1>first part: 120 km; second part: 90 km</step_1>\n"
        "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
        "quote": "<step_1>first part: 120 km; second part: 90 km</step_1>\n"
        "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
        "omit": "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>",
    },
]


TAG = r"<step_(\d{1,9})>"
# a step ends before the next opening tag, which keeps the search linear in the length of the text
STEP = re.compile(TAG + r"((?:(?!<step_).)*?)</step_\1>", re.DOTALL)


def steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in STEP.findall(text)]


def steps_trace(reply: str) -> str | None:
    """From the first step tag to the last answer tag: without "Here is the corrected trace:"."""
    start = re.search(TAG, reply)
    end = reply.rfind("</answer>")
    if start is None or end < start.start():
        return None
    trace = reply[start.start() : end + len("</answer>")]
    numbers = [int(number) for number, _ in STEP.findall(trace)]
    # a looping reply, or one that repeats the attempt before correcting it, has a step twice
    if not numbers or numbers != sorted(set(numbers)):
        return None
    return trace


# ---- 2. "plain", for chat models that ignore tags: paragraphs and \boxed{}. ----------------------

PLAIN_FORMAT = "Reason step by step, and put your final answer within \\boxed{}."

PLAIN_STUDENT = """\
{problem}

{format}"""

PLAIN_TEACHER = """\
{problem}

Here is a worked solution to go by. Follow it, and write your own solution out in full without \
mentioning it:

{context}

{format}"""

PLAIN_COPY = """\
A student's attempt at a problem may go wrong. Write the attempt again so that it reaches the \
correct answer. Copy its text word for word as long as it agrees with the correct solution. From \
the first statement that does not agree, write what the student should have written instead, in \
the student's own wording, and end with the correct answer in \\boxed{}. If the attempt is right, \
copy all of it.

"""

PLAIN_QUOTE = """\
A student's attempt at a problem may go wrong. Copy its text word for word as long as it agrees \
with the correct solution. Quote the first statement that does not agree, say that it is wrong, \
write it again correctly, and continue to the correct answer in \\boxed{}. If the attempt is \
right, copy all of it.

"""

PLAIN_OMIT = """\
A student's attempt at a problem may go wrong. Leave out its text as long as it agrees with the \
correct solution. Write the first statement that does not agree again, correctly, and continue to \
the correct answer in \\boxed{}. If the attempt is right, write only its last line with the answer.

"""

PLAIN_STYLES = {"copy": PLAIN_COPY, "quote": PLAIN_QUOTE, "omit": PLAIN_OMIT}

# Both answers are named, and the correct one again at the very end, because small critics tend to
# copy a wrong attempt unchanged; assets/real/README.md has the numbers.
PLAIN_TASK = """\
Problem: {problem}
{notes}
Attempt, whose answer is {found}:
{attempt}

Corrected attempt{goal}:"""

PLAIN_NOTES = """
Correct solution: {solution}
Correct answer: {answer}
"""

PLAIN_GOAL = ", whose answer is {answer}"

# one worked example: half the prompt of two, and the wrong step is the case that matters
PLAIN_EXAMPLE = {
    "problem": "Tom buys 3 pens at $2 each and a book at $5. What does he pay?",
    "solution": "3 * 2 = 6\n6 + 5 = 11",
    "answer": "11",
    "attempt": "1. The pens cost 3 * 2 = 6 dollars.\n\n2. With the book that is 6 * 5 = 30 dollars."
    "\n\nTom pays \\boxed{30} dollars.",
    "copy": "1. The pens cost 3 * 2 = 6 dollars.\n\n2. With the book that is 6 + 5 = 11 dollars."
    "\n\nTom pays \\boxed{11} dollars.",
    "quote": "1. The pens cost 3 * 2 = 6 dollars.\n\n2. It is wrong that 'with the book that is "
    "6 * 5 = 30 dollars': with the book that is 6 + 5 = 11 dollars."
    "\n\nTom pays \\boxed{11} dollars.",
    "omit": "2. With the book that is 6 + 5 = 11 dollars.\n\nTom pays \\boxed{11} dollars.",
}


def plain_find(text: str) -> list[str]:
    """A step is a paragraph, or a numbered item of a list."""
    steps = []
    for part in re.split(r"\r?\n(?=[ \t]*\d{1,3}[.)]\s)|\r?\n[ \t]*\r?\n", text):
        if part.strip():
            steps.append(part.strip())
    return steps


# "Here is the corrected attempt:"
LABEL = re.compile(r"\A[^\n]*corrected attempt[^:\n]*:\**\s*", re.IGNORECASE)
# words of the critic's request: a reply that contains them is taken for an echo of it
ECHO = re.compile(r"^Attempt, whose answer is|agrees with the correct solution", re.MULTILINE)


def plain_trace(reply: str) -> str | None:
    """The reply up to the line of its last answer; None without an answer, or if it is an echo."""
    trace = LABEL.sub("", reply.replace("\r\n", "\n")).strip()
    before, mark, rest = trace.rpartition("\\boxed{")
    if not mark or ECHO.search(trace):
        return None
    # the line of the answer, and a line that closes its formula
    inside = before_closing_brace(rest[:1000])
    after = re.match(r"[^\n]*(\n[ \t]*(\\\]|\$\$)\.?(?=\s|\Z))?", rest[len(inside) :])
    trace = before + mark + inside + after[0]
    # A looping reply, or one that repeats the attempt before correcting it, has a step twice. Rules
    # and formulas may be repeated
    steps = [step for step in plain_find(trace) if len(step) > 40]
    return trace if len(steps) == len(set(steps)) else None


# ---- 3. "toy", for the model in toy/: one character is one token, and each step has six. ---------

# the toy critic reads a mark instead of instructions
TOY_MARKS = {"copy": "?", "quote": "!", "omit": "~"}


def toy_find(text: str) -> list[str]:
    return re.findall(r"[sth]\d[+*]\d=\d", text)


def toy_trace(reply: str) -> str | None:
    return reply if re.fullmatch(r"([sth]\d[+*]\d=\d!?)+####\d", reply) else None


# ---- 4. The table of formats. --------------------------------------------------------------------


class Format(NamedTuple):
    """One way of talking to a model: texts with gaps, and two functions that read its replies."""

    answer_format: str  # what solver and teacher are asked for
    student_text: str  # with {problem} and {format}
    teacher_text: str  # with {problem}, {context} and {format}
    styles: dict[str, str]  # the critic's instructions, for each --critic-style
    task: str  # the critic's: {problem}, {notes}, {attempt}, the answer {found} in it, {goal}
    notes: str  # with {solution} and {answer}
    goal: str  # with {answer}
    examples: list[dict]  # worked examples of the critic's task
    find_steps: Callable  # (text) → its steps, in order
    extract_trace: Callable  # (critic's reply) → the trace in it, or None if it is malformed

    def student(self, problem: str) -> list[dict]:
        return [user(self.student_text.format(problem=problem, format=self.answer_format))]

    def teacher(self, problem: str, context: str) -> list[dict]:
        text = self.teacher_text.format(problem=problem, context=context, format=self.answer_format)
        return [user(text)]

    def critic(
        self, problem: str, attempt: str, solution: str | None, answer: str, style: str
    ) -> list[dict]:
        """Instructions, worked examples and the attempt.

        Without a solution the critic is told neither it nor the answer.
        """
        turns = []
        for example in self.examples:
            shown = example["solution"] if solution else None
            task = self.fill_task(example["problem"], example["attempt"], shown, example["answer"])
            turns += [user(task), {"role": "assistant", "content": example[style]}]
        turns.append(user(self.fill_task(problem, attempt, solution, answer)))
        # in the first user turn, because some chat templates have no system turn
        turns[0]["content"] = self.styles[style] + turns[0]["content"]
        return turns

    def fill_task(self, problem: str, attempt: str, solution: str | None, answer: str) -> str:
        notes = goal = ""
        if solution:
            notes = self.notes.format(solution=solution, answer=answer)
            goal = self.goal.format(answer=answer)
        found = extract_answer(attempt) or "missing"
        return self.task.format(
            problem=problem, notes=notes, attempt=attempt, found=found, goal=goal
        )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


FORMATS = {
    "steps": Format(
        answer_format=STEPS_FORMAT,
        student_text=STUDENT,
        teacher_text=TEACHER,
        styles=STYLES,
        task=CRITIC_TASK,
        notes=NOTES,
        goal="",
        examples=EXAMPLES,
        find_steps=steps_find,
        extract_trace=steps_trace,
    ),
    "plain": Format(
        answer_format=PLAIN_FORMAT,
        student_text=PLAIN_STUDENT,
        teacher_text=PLAIN_TEACHER,
        styles=PLAIN_STYLES,
        task=PLAIN_TASK,
        notes=PLAIN_NOTES,
        goal=PLAIN_GOAL,
        examples=[PLAIN_EXAMPLE],
        find_steps=plain_find,
        extract_trace=plain_trace,
    ),
    "toy": Format(
        answer_format="",
        student_text="{problem}",
        teacher_text="{problem}|{context}",
        styles=TOY_MARKS,
        task="{problem}|{attempt}|{notes}",
        notes="{solution}",
        goal="",
        examples=[],
        find_steps=toy_find,
        extract_trace=toy_trace,
    ),
}


# ---- 5. Reading what a model wrote. --------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """The last <answer>…</answer>, else the last \\boxed{…}, else a last line after ####.

    None if there is no answer. The closing tag may be cut off. No regular expression scans the
    whole text, so a response of 10 MB costs a few searches.
    """
    _, mark, rest = text.rpartition("<answer>")
    if mark:
        return rest[:1000].partition("</answer>")[0].strip() or None
    _, mark, rest = text.rpartition("\\boxed{")
    if mark:
        return before_closing_brace(rest[:1000]).strip() or None
    _, mark, rest = text.rpartition("####")
    answer = rest[:1000].strip()
    # a heading is no answer: nothing may follow in another line
    return answer if mark and answer and "\n" not in answer else None


def before_closing_brace(text: str) -> str:
    """The text up to the brace that closes one opened before it; empty if none does."""
    depth = 1
    for position, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[:position]
    return ""


def normalise(text: str) -> str:
    """Lower case and single spaces: the form in which texts are compared."""
    return " ".join(text.lower().split())


def strip_thinking(text: str) -> str:
    """Drop <think>…</think>. The opening tag may be in the prompt, the closing one cut off."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    return text.split("</think>")[-1].strip()


def first_edit(decode: Callable[[list[int]], str], ids: list[int], critique: str) -> int:
    """Index of the first response token that the critique does not copy; len(ids) if it copies all.

    Texts are compared, so any tokenizer will do. A binary search decodes log T prefixes, not T.
    """
    # a critique begins at its first step tag: what the attempt says before its own counts as copied
    tag = re.match(TAG, critique)
    lead = max(0, decode(ids).find(tag[0])) if tag else 0
    low, high = 0, len(ids)  # the first `low` tokens are copied, the first high + 1 are not
    while low < high:
        middle = (low + high + 1) // 2
        # a character that is cut between two tokens decodes to \ufffd
        copied = decode(ids[:middle])[lead:].lstrip().rstrip("\ufffd")
        if critique.startswith(copied):
            low = middle
        else:
            high = middle - 1
    return low
