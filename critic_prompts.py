"""The words of the method: what each reader is told, and how its replies are read and graded.

Who sees what. `student`, `teacher` and `critic` of a Format make the chat messages for that reader:

    reader    problem   its own attempt   critique          worked solution
    student     yes           -              -                    -
    teacher     yes           -        yes (critique)      yes (reference)    c of eq (1): either
    critic      yes          yes             -             yes, unless --no-critic-sees-reference

The teacher reads both kinds of context in the same sentence, so the conditions differ in c alone.
A format is one row of FORMATS, the table at the end: "steps" (numbered tags) and "plain"
(paragraphs and \\boxed{}) are for chat models, "toy" for the small model in toy/.
Standard library only. The method itself is in sd.py.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


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

    def critic(self, problem: str, attempt: str, solution: str | None, answer: str, style: str):
        """Instructions, examples, the attempt; without a solution neither it nor the answer."""
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


# ---- 1. "steps", for chat models: numbered step tags and an answer tag. --------------------------

SOLVE = "Solve this problem.\n\n"
# the question stands first and the format last, for student and teacher alike
STUDENT = "{problem}\n\n{format}"

TEACHER = """\
{problem}

Here is a worked solution to go by. Follow it, and write your own solution out in full without \
mentioning it:

{context}

{format}"""

STEPS_FORMAT = """\
Write one step at a time. Put each step inside numbered tags and only the final answer inside \
answer tags:
<step_1>first step</step_1>
<step_2>second step</step_2>
<answer>final answer</answer>"""

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
there was a mistake, never mention the notes, and write nothing but the corrected trace.\n\n"""

QUOTE = """\
Correct a worked trace. Write it again, in numbered step tags. Copy every step before the first \
wrong one. In the wrong step, quote the wrong words first, say that they are wrong, then write the \
step correctly, and continue from there to the answer. If everything is right, copy the trace \
exactly.\n\n"""

OMIT = """\
Correct a worked trace, in numbered step tags. Leave out every step before the first wrong one: \
they are fine. Write the wrong step again, correctly, and continue from there to the answer. If \
everything is right, write only its last step and the answer.\n\n"""

STYLES = {"copy": COPY, "quote": QUOTE, "omit": OMIT}

# Two worked examples, given as earlier turns of the conversation: a wrong step (case D) and a trace
# that stops early (case C). As turns small critics follow them better than inside one long message.
PENS = "<step_1>3 pens cost 3 * 2 = 6 dollars</step_1>\n"
BILL = "<step_2>with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>"
TRIP = "<step_1>first part: 120 km; second part: 90 km</step_1>\n"
SUM = "<step_2>in all 120 + 90 = 210 km</step_2>\n<answer>210</answer>"
EXAMPLES = [
    {
        "problem": "Tom buys 3 pens at $2 each and a book at $5. What does he pay?",
        "solution": "Pens: 2 * 3 = $6. Total: 6 + 5 = $11.",
        "answer": "11",
        "attempt": PENS
        + "<step_2>with the book that is 6 + 5 = 12 dollars</step_2>\n<answer>12</answer>",
        "copy": PENS + BILL,
        "quote": PENS + "<step_2>it is wrong that 'with the book that is 6 + 5 = 12 dollars': "
        "with the book that is 6 + 5 = 11 dollars</step_2>\n<answer>11</answer>",
        "omit": BILL,
    },
    {
        "problem": "A train covers 120 km in 2 hours, then 90 km in 1 hour. How far does it go?",
        "solution": "It travels 120 + 90 = 210 km.",
        "answer": "210",
        "attempt": "The distances add up.\n<step_1>first part: 120 km; second part: 90",
        "copy": TRIP + SUM,
        "quote": TRIP + SUM,
        "omit": SUM,
    },
]

# ---- 2. "plain", for chat models that ignore tags: paragraphs and \boxed{}. ----------------------

PLAIN_FORMAT = "Reason step by step, and put your final answer within \\boxed{}."

PLAIN_COPY = """\
A student's attempt at a problem may go wrong. Write the attempt again so that it reaches the \
correct answer. Copy its text word for word as long as it agrees with the correct solution. From \
the first statement that does not agree, write what the student should have written instead, in \
the student's own wording, and end with the correct answer in \\boxed{}. If the attempt is right, \
copy all of it.\n\n"""

PLAIN_QUOTE = """\
A student's attempt at a problem may go wrong. Copy its text word for word as long as it agrees \
with the correct solution. Quote the first statement that does not agree, say that it is wrong, \
write it again correctly, and continue to the correct answer in \\boxed{}. If the attempt is \
right, copy all of it.\n\n"""

PLAIN_OMIT = """\
A student's attempt at a problem may go wrong. Leave out its text as long as it agrees with the \
correct solution. Write the first statement that does not agree again, correctly, and continue to \
the correct answer in \\boxed{}. If the attempt is right, write only its last line with the \
answer.\n\n"""

# Both answers are named, and the correct one again at the very end, because small critics tend to
# copy a wrong attempt unchanged; assets/real/README.md has the numbers.
PLAIN_TASK = (
    "Problem: {problem}\n{notes}\nAttempt, whose answer is {found}:\n{attempt}\n\n"
    "Corrected attempt{goal}:"
)

# one worked example: half the prompt of two, and the wrong step is the case that matters
PLAIN_PENS = "1. The pens cost 3 * 2 = 6 dollars.\n\n"
PLAIN_BILL = "With the book that is 6 + 5 = 11 dollars.\n\nTom pays \\boxed{11} dollars."
PLAIN_EXAMPLE = {
    "problem": EXAMPLES[0]["problem"],
    "solution": "3 * 2 = 6\n6 + 5 = 11",
    "answer": "11",
    "attempt": PLAIN_PENS
    + "2. With the book that is 6 * 5 = 30 dollars.\n\nTom pays \\boxed{30} dollars.",
    "copy": PLAIN_PENS + "2. " + PLAIN_BILL,
    "quote": PLAIN_PENS + "2. It is wrong that 'with the book that is 6 * 5 = 30 dollars': "
    + PLAIN_BILL.replace("With", "with"),
    "omit": "2. " + PLAIN_BILL,
}

# ---- 3. Reading what a model wrote. --------------------------------------------------------------

# the marks around a thought
THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",  # Mistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Cohere
    "<|begin_of_thought|>": "<|end_of_thought|>",  # OpenThinker
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel>": "<channel|>",  # Gemma
    "<|channel|>": "<|channel|>final<|message|>",  # GPT-OSS: every channel but the last is thought
    "<|channel|>analysis": "assistantfinal",  # the same, from a server that drops special tokens
}


def strip_thinking(text: str) -> str:
    """What follows the last thought; nothing if that thought never ends.

    Expects a text decoded with its special tokens, because most of the marks are special tokens.
    If the prompt itself ends in an opening mark, the caller puts that mark before the text.
    """
    start = 0
    for mark in THOUGHTS.values():
        if mark in text:
            start = max(start, text.rfind(mark) + len(mark))
    rest = text[start:]
    return "" if any(mark in rest for mark in THOUGHTS) else rest.strip()


# everything up to the last box, or answer tag, in which there is more than dots
LAST_BOX = re.compile(r".*\\(?:boxed|fbox)\s*\{(?![\s.]*\})", re.DOTALL)
LAST_TAG = re.compile(r".*<answer>(?![\s.]*</answer>)", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """The last <answer>…</answer>, else the last \\boxed{…}, else a last line after ####.

    None if there is no answer. A box inside the tag wins. The closing tag may be cut off.
    """
    tag = LAST_TAG.match(text)
    if tag:
        text = text[tag.end() :].partition("</answer>")[0]
    box = LAST_BOX.match(text)
    if box:
        return before_closing_brace(text[box.end() :][:1000]).strip() or None
    if tag:
        return text[:1000].strip() or None
    _, mark, rest = text.rpartition("####")
    answer = rest[:1000].strip()
    # a heading is no answer: nothing may follow in another line
    return answer if mark and answer and "\n" not in answer else None


def before_closing_brace(text: str) -> str:
    """The text up to the brace that closes one opened before it; empty if none does."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return ""


def normalise(text: str) -> str:
    """Lower case and single spaces: the form in which texts are compared."""
    return " ".join(text.lower().split())


TAG = r"<step_(\d{1,9})>"
# a step ends before the next opening tag, which keeps the search linear in the length of the text
STEP = re.compile(TAG + r"((?:(?!<step_).)*?)</step_\1>", re.DOTALL)


def steps_find(text: str) -> list[str]:
    return [body.strip() for _, body in STEP.findall(text)]


def steps_trace(reply: str) -> str | None:
    """From the first whole step to the end of the answer, without the words around them."""
    step, answer = STEP.search(reply), LAST_TAG.match(reply)
    end = reply.find("</answer>", answer.end()) if answer else -1
    if step is None or end < step.end():
        return None
    small_talk, trace = reply[: step.start()], reply[step.start() : end + len("</answer>")]
    numbers = [int(number) for number, _ in STEP.findall(trace)]
    # a step that is opened in the small talk, and whole nowhere, was never finished
    named = {int(number) for number in re.findall(TAG, small_talk)}
    # a looping reply, or one that repeats the attempt before correcting it, has a step twice
    return trace if named <= set(numbers) and numbers == sorted(set(numbers)) else None


def plain_find(text: str) -> list[str]:
    """A step is a paragraph, or a numbered item of a list."""
    parts = re.split(r"\r?\n(?=[ \t]*\d{1,3}[.)]\s)|\r?\n[ \t]*\r?\n", text)
    return [part.strip() for part in parts if part.strip()]


SMALL_TALK = re.compile(
    r"""(?:(?:sure|certainly|of\ course|okay|absolutely)(?:[!.]|,(?=\ here['’\ ][si]))\s*  # "Sure!"
    | \**here(?:['’]s|\ is)\ [^\n]{1,200}:\**[ ]*\n\s*  # "Here is the trace:"
    | [^\n]{0,200}corrected\ attempt[^:\n]{0,200}:\**\s*  # "Corrected attempt:"
    | (?:\#{1,6}\ [^\d\n]+|\*\*[^\d\n*]+\*\*)\n\s*  # a heading, unless it numbers a step
    | ```\w*\s*\n\s*)*""",
    re.IGNORECASE | re.VERBOSE,
)
# words of the critic's request: a reply that contains them is taken for an echo of it
ECHO = re.compile(r"^Attempt, whose answer is|agrees with the correct solution", re.MULTILINE)
# the rest of the answer's line, and a line that closes its formula
LINE_END = re.compile(r"[^\n]*(\n[ \t]*(\\\]|\$\$)\.?(?=\s|\Z))?")


def plain_trace(reply: str) -> str | None:
    """The reply up to the line of its last answer; None without an answer, or if it is an echo."""
    reply = reply.replace("\r\n", "\n").strip()
    reply = reply[SMALL_TALK.match(reply).end() :]
    box = LAST_BOX.match(reply)
    if box is None or ECHO.search(reply):
        return None
    inside = before_closing_brace(reply[box.end() :][:1000])
    trace = reply[: LINE_END.match(reply, box.end() + len(inside)).end()]
    # A looping reply, or one that repeats the attempt before correcting it, has a step twice. Rules
    # and formulas may be repeated
    steps = [step for step in plain_find(trace) if len(step) > 40]
    return trace if len(steps) == len(set(steps)) else None


TOY_STEP = re.compile(r"[sth]\d[+*]\d=\d")


def toy_trace(reply: str) -> str | None:
    """The whole reply, as the toy critic adds no words. It marks a step that it refutes by "!"."""
    return reply if re.fullmatch(r"([sth]\d[+*]\d=\d!?)+####\d", reply) else None


# ---- 4. Grading an answer: the reward, and every evaluation. -------------------------------------

# Words that may follow a number. Any other is part of the answer: "5 million" is not 5. So "m" is
# not listed, which may be metre or million
UNITS = set(
    """dollar cent euro pound usd percent point degree second minute hour day week month year old
    mm cm km inch inches foot feet yard mile meter metre mg g kg gram kilogram ounce lb ml l
    liter litre cup gallon square cubic sq ft per h hr min sec s mph""".split()
)
UNITS |= {unit + "s" for unit in UNITS}
# what data sets write where a problem has no answer; NuminaMath does so in one row of six
NO_ANSWER = {"", "notfound", "not found", "proof", "see solution", "none", "null", "nan", "n/a"}
NUMBER = re.compile(r"[-+]? *(\d+ */ *0*[1-9]\d*|[1-9]\d{0,2}(,\d{3})+(\.\d+)?|\d+\.?\d*|\.\d+)")
# money, percent, degrees, LaTeX's spaces, set braces; what stands in km/h, cm^2 and sq. ft
NOISE = re.compile(
    r"\\?[$€£%]|\^\{?\\circ\}?|°|\\(left|right)\b|\\[,;:! {}]|(?<=[a-zA-Z])(\^\{?[23]\}?|[²³./])"
)


def unwrap(text: str) -> str:
    """An answer without box, bold and math signs around it. The words in \\text{…} stay."""
    text = (extract_answer(text) or text)[:1000].replace("{,}", ",")
    text = re.sub(r"\\(?:text\w*|math(?:rm|bf|it|sf)|[hm]box)\s*(?:\{([^{}]*)\})?", r"\1", text)
    text = text.replace("−", "-").replace("~", " ")
    return re.sub(r"^([\s*`\"$]|\\[(\[])+|([\s*`\"$.]|\\[)\]])+$", "", text)


def as_number(text: str) -> Fraction | None:
    """`**1,234**`, `-\\frac{3}{4}`, `$5.50`, `12%`, `5\\text{ cm}`: the number; else None."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r" \1/\2", unwrap(text))
    # LaTeX's thin spaces in 1,234
    text = re.sub(r"(?<=\d),?\\[,!](?=\d{3})", ",", text)
    # a space, because 1 234 is no number
    text = NOISE.sub(" ", text).strip()
    number = NUMBER.match(text)
    if number and set(text[number.end() :].lower().split()) <= UNITS:
        return Fraction(re.sub("[, ]", "", number[0]))
    return None


def is_correct(text: str, answer: str, grader: str) -> bool:
    """Whether a response ends in this answer. Reward and evaluation use it alike."""
    found = extract_answer(strip_thinking(text))
    if found is None:
        return False
    number, wanted = as_number(found), as_number(answer)
    if number is not None and wanted is not None:
        # 50% is 50, where a percentage is asked for, and 0.5
        parts = [100 if "%" in side else 1 for side in (found, answer)]
        if number == wanted or number / parts[0] == wanted / parts[1]:
            return True
    if normalise(unwrap(found)) == normalise(unwrap(answer)):
        return True
    # math-verify skips words: it takes "5 million" and "not 5" for 5
    if grader == "exact" or not words(found) - words(answer) <= UNITS:
        return False
    import math_verify  # optional

    gold = math_verify.parse(f"${unwrap(answer)}$", parsing_timeout=1)
    response = math_verify.parse(f"${unwrap(found)}$", parsing_timeout=1)
    return bool(math_verify.verify(gold, response, timeout_seconds=1))


def words(text: str) -> set[str]:
    """Its words of three letters or more, LaTeX commands apart; a sign of negation is "not"."""
    text = re.sub(r"\\(neq?|not|neg|lnot)(?![a-z])|≠", " not ", text.lower())
    return set(re.findall(r"(?<![\\a-z])[a-z]{3,}", text)) - {"and"}


def gradable(answer: str, grader: str) -> bool:
    """Whether the grader can judge a gold answer. `exact` judges numbers and words, no formulas."""
    text = unwrap(answer)
    if len(answer) > 1000 or normalise(text) in NO_ANSWER:
        return False
    plain = not re.search(r"[^\w\s,.'’()-]|[\d_]", text)
    return grader != "exact" or plain or as_number(text) is not None


def check_math_verify() -> None:
    """ValueError where math-verify is missing, or finds nothing equal, as on Windows."""
    try:
        works = is_correct("\\boxed{1+x}", "x+1", "math-verify")
    except ImportError:
        raise ValueError("--grader math-verify needs: pip install math-verify") from None
    if not works:
        raise ValueError("math-verify does not find 1+x equal to x+1 here; use --grader exact")


# ---- 5. The table of formats. --------------------------------------------------------------------

# fmt: off
FORMATS = {
    "steps": Format(
        answer_format=STEPS_FORMAT, student_text=SOLVE + STUDENT, teacher_text=SOLVE + TEACHER,
        styles=STYLES, examples=EXAMPLES,
        task="Problem: {problem}\n{notes}\nTrace:\n{attempt}\n\nCorrected trace:",
        notes="\nNotes, for checking only: {solution}\n", goal="",
        find_steps=steps_find, extract_trace=steps_trace,
    ),
    "plain": Format(
        answer_format=PLAIN_FORMAT, student_text=STUDENT, teacher_text=TEACHER,
        styles={"copy": PLAIN_COPY, "quote": PLAIN_QUOTE, "omit": PLAIN_OMIT},
        examples=[PLAIN_EXAMPLE], task=PLAIN_TASK,
        notes="\nCorrect solution: {solution}\nCorrect answer: {answer}\n",
        goal=", whose answer is {answer}",
        find_steps=plain_find, extract_trace=plain_trace,
    ),
    # one character is one token, each step has six, and the critic reads a mark, not instructions
    "toy": Format(
        answer_format="", student_text="{problem}", teacher_text="{problem}|{context}",
        styles={"copy": "?", "quote": "!", "omit": "~"}, examples=[],
        task="{problem}|{attempt}|{notes}", notes="{solution}", goal="",
        find_steps=TOY_STEP.findall, extract_trace=toy_trace,
    ),
}
