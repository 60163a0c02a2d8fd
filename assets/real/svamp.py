"""A critic that is a program, for word problems whose solution is a list of equations (SVAMP).

It copies an attempt word for word up to the first equation that contradicts the solution, writes
the right equation in its place, and finishes. Where no equation does, the attempt goes wrong at the
first number that neither the question nor the solution holds, else at its answer. This shows what a
faithful critic does to a language model, whatever language models of the same size can do as
critics. It is also an example of a fork: two rows more in the table of conditions, and nothing else
changes.

  python assets/real/svamp.py sd.py --condition scripted --model FOLDER --data svamp.jsonl …
  python assets/real/svamp.py eval.py --tokens RUN --contexts scripted,reference,shuffled

scripted   the program's critique of the attempt
shuffled   the program's critique of another problem's attempt: the control
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as evaluation  # noqa: E402
import sd  # noqa: E402

NUMBER = r"[$€]?\s*(-?\d[\d,]*(?:\.\d+)?)"
# a unit may stand behind each number: 3 pens * 2 dollars = 6
UNIT = r"(?:\s*\\,)?(?:\s*\\text\{[^{}]*\}|\s*[A-Za-z$]+){0,3}\s*"
OPERATOR = r"(\+|-|−|–|\*|×|/|÷|\\times|\\div|\\cdot)"
EQUATION = re.compile(NUMBER + UNIT + OPERATOR + r"\s*" + NUMBER + UNIT + r"=\s*" + NUMBER)
SIGNS = {"−": "-", "–": "-", "×": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/"}
# numbers that count steps: "2." at the start of a line, "step 2"
COUNTER = re.compile(r"^\W*\d+[.:)]|\bstep[ _]\d+", re.MULTILINE | re.IGNORECASE)


def as_float(text: str) -> float:
    return float(text.replace(",", ""))


def read_equation(match: re.Match) -> tuple:
    """(left, sign, right, result), with the smaller number first where the order is free."""
    left, right, result = as_float(match[1]), as_float(match[3]), as_float(match[4])
    sign = SIGNS.get(match[2], match[2])
    if sign in "+*" and left > right:
        left, right = right, left
    return left, sign, right, result


def find_unknown_number(r: sd.Rollout) -> int | None:
    """Where the attempt states a number that neither the question nor the solution holds."""
    known = set()
    for match in re.finditer(NUMBER, f"{r.problem.question}\n{r.problem.solution}"):
        known.add(as_float(match[1]))
    for match in re.finditer(NUMBER, COUNTER.sub(blank, r.text)):
        if as_float(match[1]) not in known:
            return match.start(1)
    return None


def blank(match: re.Match) -> str:
    """As many spaces: every other character stays where it is."""
    return " " * len(match[0])


def correct(r: sd.Rollout, cfg: sd.Config) -> str | None:
    """The attempt, corrected; None if the program does not see where a wrong attempt goes wrong."""
    if r.reward:
        return r.text
    wrong, missing = find_first_error(r)
    if wrong is None and r.sample.truncated:
        return None
    if wrong is None:
        # finished, but without an answer
        return r.text.rstrip() + ending(r.text, r.problem.answer, cfg)
    copied = r.text[:wrong]
    return f"{copied}{missing}.{ending(copied, r.problem.answer, cfg)}"


def find_first_error(r: sd.Rollout) -> tuple[int | None, str]:
    """(where a wrong attempt goes wrong, the solution's equations that are still missing there)."""
    lines = [line for line in r.problem.solution.split("\n") if EQUATION.search(line)]
    equations = [read_equation(EQUATION.search(line)) for line in lines]
    wrong = None
    for match in EQUATION.finditer(r.text):
        equation = read_equation(match)
        if equation not in equations:
            wrong = match.start(1)
            break
        # what has been shown is not needed again
        position = equations.index(equation)
        del equations[position], lines[position]
    missing = ", ".join(lines) or r.problem.solution.split("\n")[-1]
    if wrong is not None:
        return wrong, missing
    # no equation is wrong: the sentence with a number from nowhere, else the one with the answer
    wrong = find_unknown_number(r)
    if wrong is None and "\\boxed" in r.text:
        wrong = r.text.rindex("\\boxed")
    return None if wrong is None else start_of_sentence(r.text, wrong), missing


def start_of_sentence(text: str, position: int) -> int:
    """Where the sentence or line begins that holds `position`."""
    ends = [0] + [match.end() for match in re.finditer(r"\n|\. ", text[:position])]
    return ends[-1]


def ending(copied: str, answer: str, cfg: sd.Config) -> str:
    """What follows the right equation, in the attempt's format."""
    number = sd.as_number(answer)
    answer = str(int(number)) if number is not None and number.denominator == 1 else answer
    if cfg.prompts == "plain":
        return f"\n\nTherefore, the answer is \\boxed{{{answer}}}."
    # close the step that is open
    tags = re.findall(r"<(/?step_\d+)>", copied)
    end = f"</{tags[-1]}>" if tags and not tags[-1].startswith("/") else ""
    return f"{end}\n<answer>{answer}</answer>"


def write_scripted(rollouts, critic, cfg: sd.Config) -> list[str | None]:
    return [correct(r, cfg) for r in rollouts]


def write_shuffled(rollouts, critic, cfg: sd.Config) -> list[str | None]:
    """The next problem's critique; None where that has none."""
    critiques = write_scripted(rollouts, critic, cfg)
    shuffled = []
    for i, r in enumerate(rollouts):
        others = critiques[i:] + critiques[:i]
        problems = rollouts[i:] + rollouts[:i]
        # the attempts at one problem stand side by side
        k = next((k for k, other in enumerate(problems) if other.problem != r.problem), None)
        shuffled.append(None if k is None else others[k])
    return shuffled


sd.CONDITIONS["scripted"] = sd.Condition(write_scripted, asks_critic=False)
sd.CONDITIONS["shuffled"] = sd.Condition(write_shuffled, asks_critic=False)

if __name__ == "__main__":
    program = {"sd.py": sd, "eval.py": evaluation}[sys.argv[1]]
    sys.exit(program.main(sys.argv[2:]))
