"""A critic that is a program, for word problems whose solution is a list of equations (SVAMP).

It copies an attempt word for word up to the first equation that contradicts the solution, writes
the right equation in its place, and finishes. So it shows what a faithful critic does to a language
model, whatever language models of the same size can do as critics. It is also an example of a fork:
two rows more in the table of conditions, and nothing else changes.

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
from critic_prompts import extract_answer  # noqa: E402

NUMBER = r"[$€]?\s*(-?\d[\d,]*(?:\.\d+)?)"
# a unit may stand behind each number: 3 pens * 2 dollars = 6
UNIT = r"(?:\s*\\text\{[^{}]*\}|\s*[A-Za-z$]+){0,3}\s*"
OPERATOR = r"(\+|-|−|–|\*|×|/|÷|\\times|\\div|\\cdot)"
EQUATION = re.compile(NUMBER + UNIT + OPERATOR + r"\s*" + NUMBER + UNIT + r"=\s*" + NUMBER)
SIGNS = {"−": "-", "–": "-", "×": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/"}


def read_equation(match: re.Match) -> tuple:
    """(left, sign, right, result), with the smaller number first where the order is free."""
    left, sign, right, result = match.groups()
    left, right, result = (float(number.replace(",", "")) for number in (left, right, result))
    sign = SIGNS.get(sign, sign)
    if sign in "+*" and left > right:
        left, right = right, left
    return left, sign, right, result


def correct(r: sd.Rollout, cfg: sd.Config) -> str | None:
    """The attempt, corrected; None if no equation of a wrong attempt contradicts the solution."""
    if r.reward:
        return r.text
    lines = [line for line in r.problem.solution.split("\n") if EQUATION.search(line)]
    wanted = [read_equation(EQUATION.search(line)) for line in lines]
    for match in EQUATION.finditer(r.text):
        equation = read_equation(match)
        if equation in wanted:
            # what has been shown is not needed again
            position = wanted.index(equation)
            del wanted[position], lines[position]
            continue
        rest = ", ".join(lines) or r.problem.solution.split("\n")[-1]
        copied = r.text[: match.start(1)]
        return f"{copied}{rest}.{ending(copied, r.problem.answer, cfg)}"
    return None


def ending(copied: str, answer: str, cfg: sd.Config) -> str:
    """What follows the right equation, in the attempt's format."""
    number = sd.as_number(answer)
    answer = str(int(number)) if number is not None and number.denominator == 1 else answer
    if cfg.prompts == "plain":
        return f"\n\nTherefore, the answer is \\boxed{{{answer}}}."
    tags = re.findall(r"<(step_\d+)>", copied)
    end = f"</{tags[-1]}>" if tags else ""
    return f"{end}\n<answer>{answer}</answer>"


def write_scripted(rollouts, critic, cfg: sd.Config) -> tuple[list, int]:
    return [correct(r, cfg) for r in rollouts], 0


def write_shuffled(rollouts, critic, cfg: sd.Config) -> tuple[list, int]:
    """The next problem's critique; None where that has none."""
    critiques, _ = write_scripted(rollouts, critic, cfg)
    shuffled = []
    for i, r in enumerate(rollouts):
        others = critiques[i:] + critiques[:i]
        problems = rollouts[i:] + rollouts[:i]
        # the attempts at one problem stand side by side
        k = next(k for k, other in enumerate(problems) if other.problem != r.problem)
        shuffled.append(others[k])
    return shuffled, 0


sd.CONDITIONS["scripted"] = sd.Condition(write_scripted, asks_critic=False)
sd.CONDITIONS["shuffled"] = sd.Condition(write_shuffled, asks_critic=False)

if __name__ == "__main__":
    program = {"sd.py": sd, "eval.py": evaluation}[sys.argv[1]]
    sys.exit(program.main(sys.argv[2:]))
