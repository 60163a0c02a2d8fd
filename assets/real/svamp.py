"""A critic that is a program, for word problems whose solution is a list of equations (SVAMP).

It copies an attempt word for word up to the first equation that contradicts the solution, writes
the right equation in its place, and finishes. If no equation does, the error is taken to be the
sentence with the first number found in neither question nor solution, else the one with the answer.
This separates two questions: what a faithful critique teaches a language model, and whether a model
of its size can write one. It is also an example of a fork: four more rows in the table of
contexts, and for `edits` a wrapper of `add_teacher_prompts`.

An equation contradicts the solution if it is not one of the solution's, so a right attempt at
another route to the answer is left alone, and a wrong one is corrected where it leaves that route.

  python assets/real/svamp.py sd.py --condition scripted --prompts plain --model FOLDER …
  python assets/real/svamp.py eval.py --tokens RUN --critic self --contexts scripted,copy

scripted   the program's critique of the attempt
shuffled   the program's critique of another problem's attempt: a control
edits      scripted, but only the tokens from the first edit on are scored, and no right attempt is
filtered   the critique of --critic, left out if its answer is wrong
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as evaluation  # noqa: E402
import sd  # noqa: E402
from critic_prompts import as_number, extract_answer, is_correct  # noqa: E402

# a minus sign that follows a digit is an operator
NUMBER = r"[$€]?\s*((?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?)"
# a unit may follow each number: 3 pens * 2 dollars = 6
UNIT = r"(?:\s*\\,)?(?:\s*\\text\{[^{}]*\}|\s*[A-Za-z$]+){0,3}\s*"
OPERATOR = r"(\+|-|−|–|\*|×|/|÷|\\times|\\div|\\cdot)"
EQUATION = re.compile(
    r"(?<![\d.,])" + NUMBER + UNIT + OPERATOR + r"\s*" + NUMBER + UNIT + r"=\s*" + NUMBER
)
# what comes before the tail of a longer sum: 12 + 5 + 3 = 20 has no equation of two numbers
INSIDE = re.compile(OPERATOR + r"\s*\\?[$€]?\s*$")
SIGNS = {"−": "-", "–": "-", "×": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/"}
# numbers that count steps: "2." at the start of a line, "step 2"
COUNTER = re.compile(r"^\W*\d+[.:)](?!\d)|\bstep[ _]\d+", re.MULTILINE | re.IGNORECASE)


def as_float(text: str) -> float:
    return float(text.replace(",", ""))


def read_equation(match: re.Match) -> tuple:
    """(left, sign, right, result); the operands of + and * are sorted."""
    left, right, result = as_float(match[1]), as_float(match[3]), as_float(match[4])
    sign = SIGNS.get(match[2], match[2])
    if sign in "+*" and left > right:
        left, right = right, left
    return left, sign, right, result


def find_equations(text: str) -> list[re.Match]:
    found = []
    for match in EQUATION.finditer(text):
        if not INSIDE.search(text[: match.start(1)]):
            found.append(match)
    return found


def read_equations(text: str) -> set[tuple]:
    return {read_equation(match) for match in find_equations(text)}


def find_unknown_number(r) -> int | None:
    """Where the attempt states a number that neither the question nor the solution holds."""
    known = set()
    for match in re.finditer(NUMBER, f"{r.problem.question}\n{r.problem.solution}"):
        known.add(as_float(match[1]))
    # numbers that only count steps are blanked out: every other character stays where it is
    text = COUNTER.sub(lambda match: " " * len(match[0]), r.text)
    for match in re.finditer(NUMBER, text):
        if as_float(match[1]) not in known:
            return match.start(1)
    return None


def correct(r, cfg) -> str | None:
    """The attempt, corrected; None if the program cannot do it.

    It cannot if it does not see where the attempt goes wrong, or if the answer comes before the
    error, or the error is inside a block of code.
    """
    if r.reward:
        return r.text
    wrong = find_first_error(r)
    if wrong is None:
        # only an attempt that holds all equations lacks nothing but the answer
        complete = read_equations(r.problem.solution) <= read_equations(r.text)
        if r.truncated or not complete:
            return None
        return r.text.rstrip() + ending(r.text, r.problem.answer, cfg)
    copied, lines = r.text[:wrong], r.problem.solution.split("\n")
    if extract_answer(copied) is not None or copied.count("```") % 2:
        return None
    missing = [line for line in lines if not read_equations(line) <= read_equations(copied)]
    equations = ", ".join(missing) or lines[-1]
    end = ending(copied, r.problem.answer, cfg)
    return f"{copied}{equations}{closing_bracket(copied)}.{end}"


def find_first_error(r) -> int | None:
    """Where a wrong attempt goes wrong."""
    right = read_equations(r.problem.solution)
    for match in find_equations(r.text):
        if read_equation(match) not in right:
            return match.start(1)
    # no equation is wrong: the sentence with an unknown number, else the one with the answer
    wrong = find_unknown_number(r)
    if wrong is None:
        wrong = max(r.text.rfind("\\boxed"), r.text.rfind("<answer>"))
    return None if wrong < 0 else start_of_sentence(r.text, wrong)


def start_of_sentence(text: str, position: int) -> int:
    """Where the sentence or line begins that holds `position`."""
    starts = re.finditer(r"^|\. ", text[:position], re.MULTILINE)
    return [match.end() for match in starts][-1]


def closing_bracket(copied: str) -> str:
    """What closes the LaTeX formula in which the copy ends."""
    for opening, closing in (("\\[", " \\]"), ("\\(", " \\)")):
        if copied.rfind(opening) > copied.rfind(closing.strip()):
            return closing
    return ""


def ending(copied: str, answer: str, cfg) -> str:
    """What follows the right equation, in the attempt's format."""
    number = as_number(answer)
    answer = str(int(number)) if number is not None and number.denominator == 1 else answer
    if cfg.prompts == "plain":
        return f"\n\nTherefore, the answer is \\boxed{{{answer}}}."
    # close the step that is open
    tags = re.findall(r"<(/?step_\d+)>", copied)
    end = f"</{tags[-1]}>" if tags and not tags[-1].startswith("/") else ""
    return f"{end}\n<answer>{answer}</answer>"


def write_scripted(rollouts, critic, cfg) -> list[str | None]:
    return [correct(r, cfg) for r in rollouts]


def write_shuffled(rollouts, critic, cfg) -> list[str | None]:
    """The next problem's critique; None where that has none."""
    critiques, n = write_scripted(rollouts, critic, cfg), len(rollouts)
    shuffled = []
    for i, r in enumerate(rollouts):
        # the attempts at one problem stand side by side
        others = [k % n for k in range(i, i + n) if rollouts[k % n].problem != r.problem]
        shuffled.append(critiques[others[0]] if others else None)
    return shuffled


def write_edits(rollouts, critic, cfg) -> list[str | None]:
    """The program's critiques of the attempts that it changes."""
    critiques = write_scripted(rollouts, critic, cfg)
    return [c if c != r.text else None for c, r in zip(critiques, rollouts)]


def write_filtered(rollouts, critic, cfg) -> list[str | None]:
    """The model's critiques that reach the right answer."""
    critiques = sd.write_critiques(rollouts, critic, cfg)
    filtered = []
    for c, r in zip(critiques, rollouts):
        right = c is not None and is_correct(c, r.problem.answer, cfg.grader)
        filtered.append(c if right else None)
    return filtered


def first_edit(chat, r) -> int:
    """Where the first token stands that the context does not copy; at most the last token."""
    edit = 0
    # the end of a cut character decodes to \ufffd
    while r.context.startswith(chat.decode(r.ids[: edit + 1]).rstrip("\ufffd")):
        edit += 1
        if edit == len(r.ids) - 1:
            break
    return edit


add_all_teacher_prompts = sd.add_teacher_prompts


def add_teacher_prompts(chat, rollouts, cfg) -> list:
    """In `edits` the tokens before the first edit join both prompts, so they are not scored."""
    scored = add_all_teacher_prompts(chat, rollouts, cfg)
    if cfg.condition != "edits":
        return scored
    shortened = []
    for r in scored:
        edit = first_edit(chat, r)
        shared = r.ids[:edit]
        prompts = {"prompt": r.prompt + shared, "teacher_prompt": r.teacher_prompt + shared}
        # a new rollout: the log measures the whole one
        shortened.append(replace(r, ids=r.ids[edit:], **prompts))
    return shortened


sd.add_teacher_prompts = add_teacher_prompts

# scripted stands first, because eval.py --tokens takes the first context for a copy of the attempt
sd.CONTEXTS = {
    "scripted": write_scripted,
    **sd.CONTEXTS,
    "shuffled": write_shuffled,
    "edits": write_edits,
    "filtered": write_filtered,
}
sd.NO_CRITIC |= {"scripted", "shuffled", "edits"}

if __name__ == "__main__":
    program = {"sd.py": sd, "eval.py": evaluation}[sys.argv[1]]
    sys.exit(program.main(sys.argv[2:]))
