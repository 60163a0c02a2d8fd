"""What goes into a model and what is read out of it: problem files, answers, chat templates, prompts, the critic's
wire. The method is in sd.py.

Who sees what (each `*_student`, `*_teacher` and `*_critic` makes a list of chat messages; the model's template renders it):

    reader     problem   its own attempt   critique   worked solution
    student      yes           -              -              -
    teacher      yes           -       yes (critique)  yes (reference)      the context c of eq (1), one or the other
    critic       yes          yes             -        yes, unless --no-critic-sees-reference

The teacher reads both kinds of context through the same words, so that the conditions differ in c and in nothing else.
Two formats exist: "steps" for chat models, "toy" for the toy world. Each knows how to find the steps of a trace.
"""

import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm


class Refusal(Exception):
    """Something the user can mend. `main` prints it as one line and exits with 2."""


def refuse(message: str):
    raise Refusal(message)


def spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def printable(text: str) -> str:
    """For a terminal: a control character of a model's or a file's reaches nobody's screen."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def progress(items=None, **options) -> tqdm:
    """A bar on work over 5 s, on a terminal, by one process."""
    other = torch.distributed.is_initialized() and torch.distributed.get_rank()
    return tqdm(items, leave=False, delay=5, disable=True if other else None, **options)


# ---- 1. Problems and answers. EDIT HERE (problems and reward) ----------------------------------------------

class Problem(NamedTuple):
    question: str
    solution: str  # worked out, by the data set's author
    answer: str


def read_row(row: object) -> Problem:
    """Two schemas, told apart by their fields: problem, solution, answer; and GSM8K's question, answer (… #### 42)."""
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    texts = {}
    for name in ("problem", "solution", "answer") if "problem" in row else ("question", "answer"):
        text = texts[name] = str(row[name]) if type(row.get(name)) in (int, float) else row.get(name)
        if not isinstance(text, str) or not text.strip():
            what = "missing" if name not in row else "empty" if isinstance(text, str) else "not text"
            raise ValueError(f"field {name!r} is {what}")
        text.encode()  # half of a surrogate pair is a ValueError here, not a crash of the tokenizer in mid-run
    _, mark, answer = texts["answer"].rpartition("####")
    if "question" in texts and not (mark and answer.strip()):
        raise ValueError("field 'answer' does not end in '#### ANSWER', and there is no field 'problem'")
    return Problem(*(text.strip() for text in (*texts.values(), *[answer] * ("question" in texts))))


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a .json array or a .jsonl file; a line that is not JSON comes as a ValueError."""
    try:
        text = path.read_text("utf-8-sig")  # -sig: a byte-order mark is not data
        array = json.loads(text) if text.lstrip().startswith("[") else None
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}; give --data a .json or .jsonl file") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not UTF-8, or not JSON ({error}); is the file cut off?") from None
    if array is not None:
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(array, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", ValueError(f"is not JSON ({error})")


def find_data(name: str) -> Path:
    """The local path of --data; `hub:owner/name/path` is fetched once, into the hub's own cache."""
    if not name.startswith("hub:"):
        return Path(name)
    owner, repo, file = (name[4:].split("/", 2) + ["", ""])[:3]
    get = functools.partial(huggingface_hub.hf_hub_download, f"{owner}/{repo}", file, repo_type="dataset")
    return Path(fetch(name, "--data a local .jsonl file", False, get))


def read_problems(cfg, chat: "Chat") -> tuple[dict[str, tuple[Problem, dict]], dict[str, int]]:
    """({normalised text: (problem, its row)}, rows dropped by reason), from sd.py's config. A Refusal names file, line, field."""
    found, dropped, room = {}, {"duplicate": 0, "without a solution": 0, "bad": 0}, chat.window - cfg.max_new_tokens
    if room <= 0:
        raise Refusal(f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a problem in the window of {chat.window}")
    student = FORMATS[cfg.prompts].student
    for where, row in read_rows(find_data(cfg.data)):
        if isinstance(row, dict) and row.get("solution") == "":  # DeepScaleR holds many: no mistake of the user's
            dropped["without a solution"] += 1
            continue
        try:
            problem = read_row(row)
            size = len(problem.question.encode())  # a token spells 1 to 64 bytes: tokenise only what might not fit
            if size > 64 * room or size > room // 2 and len(chat.encode(student(problem.question))) > room:
                raise ValueError(f"does not fit the model's window of {chat.window} tokens beside --max-new-tokens "
                                 f"{cfg.max_new_tokens}")  # fmt: skip
        except ValueError as error:
            if not cfg.skip_bad_rows:
                raise Refusal(f"{where}: {error}; mend the row or pass --skip-bad-rows") from None
            dropped["bad"] += 1
            continue
        key = normalise(problem.question)
        dropped["duplicate"] += key in found
        found.setdefault(key, (problem, row))
    return found, dropped


class Split(NamedTuple):
    """Problems by use. No two share a normalised text, within a part or across."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    dropped: dict[str, int]  # rows, by reason


def load_problems(cfg, chat: "Chat") -> Split:
    """Read and split --data. The split is a function of the texts alone: neither order nor seed moves a problem."""
    found, dropped = read_problems(cfg, chat)
    test, held_out = cfg.test_problems, cfg.test_problems + cfg.validation_problems
    if len(found) <= held_out:
        raise Refusal(f"{cfg.data}: {len(found)} distinct problems (dropped: {spell(dropped)}) leave none to train on "
                      f"beside {held_out} held out; lower --test-problems and --validation-problems")  # fmt: skip
    keys = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    problems = [found[key][0] for key in keys]
    return Split(problems[held_out:], problems[test:held_out], problems[:test], dropped)


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


def as_number(text: str) -> Fraction | None:
    """`1,234`, `-3/4`, `\\frac{3}{4}`, `$5.50`, `12%`: the exact number, else None. Nothing is ever evaluated."""
    if len(text) > 1000 or re.search(r"\d\s*\\[dt]?frac|\d\s+\d+\s*/", text):  # a mixed number: 1 1/2 is not 11/2
        return None
    text = re.sub(r"\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[!,;: ]|[\s$]|\\text\{[^{}]*\}", "", text).rstrip(".")
    share = 100 if text.endswith("%") else 1
    text = text.removesuffix("%").removesuffix("\\")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    plain = re.fullmatch(r"[-+]?(\d{1,40}(\.\d{1,40})?|\.\d{1,40}|\d{1,40}/0*[1-9]\d{0,39})", text)
    return Fraction(text) / share if plain else None


@functools.cache
def math_verify():
    """The optional package math-verify, which knows that \\sqrt{8} = 2\\sqrt{2}; None where it is not installed."""
    with contextlib.suppress(ImportError):
        import math_verify as package

        return package


def is_correct(text: str, answer: str) -> bool:
    """Whether the response ends in this answer: the one grader of reward and evaluation."""
    found = extract_answer(text)
    if found is None or normalise(found) == normalise(answer):
        return found is not None
    number, wanted = as_number(found), as_number(answer)
    if number is not None and wanted is not None:
        return number == wanted
    # math-verify computes what it reads: towers, factorials, long numbers and deep nesting would hang it
    tame = lambda s: (len(s) < 100 and sum(map(s.count, "({[")) < 12
                      and not re.search(r"\^.*\^|\*\*|!|\d{16}|\^\{?-?\d{3}", s))  # fmt: skip
    if tame(found) and tame(answer) and math_verify():
        parse = math_verify().parse
        return bool(math_verify().verify(parse(f"${answer}$"), parse(f"${found}$")))
    return False


def grader() -> str:
    return "exact + number" + (" + math-verify" if math_verify() else "")


# ---- 2. Chat: a model and its tokenizer. Nothing but ids leaves for the sampler and the loss. --------------

@dataclass
class Chat:
    """A causal language model with the tokenizer that speaks to it."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    end_ids: list[int]  # any of them ends a turn
    window: int  # tokens of prompt and response together

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # (V, D)

    def encode(self, messages: list[dict], thinking: bool = False, header: bool = True) -> list[int]:
        """Ids of a conversation and of the header of the reply."""
        safe = [{**m, "content": self.defuse(m["content"])} for m in messages]
        text = self.tokenizer.apply_chat_template(
            safe, tokenize=False, add_generation_prompt=header, enable_thinking=thinking)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special ones

    def defuse(self, text: str) -> str:
        """A special token's name in a problem or an attempt is text: a space in it keeps it from ending a turn."""
        for name in self.special:
            text = text.replace(name, name[:1] + " " + name[1:])
        return text

    @functools.cached_property
    def special(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @functools.cached_property
    def header_length(self) -> int:
        """Tokens of the generation header, in which every prompt ends."""
        return max(1, len(self.encode([user("a")])) - len(self.encode([user("a")], header=False)))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@functools.cache
def hub_answers() -> bool:
    """Asked once, so that a machine without a hub hears so at once and not after the client's many retries."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def fetch(what: str, mend: str, local: bool, get: Callable):
    """get(local_files_only=…), or a Refusal: the hub's clients raise a dozen types, all of which mean `not there`."""
    offline = not local and not hub_answers()
    try:
        return get(local_files_only=local or offline)
    except Exception as error:
        reason = "the hub does not answer" if offline else f"{type(error).__name__}: {error}".split("\n")[0][:150]
        raise Refusal(f"cannot load {what} ({reason}); give {mend}, or --preset toy") from None


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Chat:
    """A frozen chat model, from a folder or the hub. A Refusal says why a model can't be used, in one line."""
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=own_gpu if device == "auto" else device).device
    except (AssertionError, RuntimeError) as error:
        raise Refusal(f"argument --device: {device} is not there ({str(error).splitlines()[0][:100]})") from None
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    load = lambda **where: (transformers.AutoTokenizer.from_pretrained(name, **where),
                            transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **where))
    tokenizer, model = fetch(f"model {name}", "a local folder", os.path.isdir(name), load)
    if not tokenizer.chat_template:
        raise Refusal(f"{name} has no chat template; choose an instruction-tuned model")
    config = model.config.get_text_config()
    stops = [getattr(c, "eos_token_id", None) for c in (tokenizer, config, model.generation_config)]
    end_ids = {i for stop in stops for i in (stop if isinstance(stop, list) else [stop]) if i is not None}
    if not end_ids:
        raise Refusal(f"{name} names no end token, so no attempt would stop; set eos_token in tokenizer_config.json")
    for module in model.modules():  # dropout would tell the student from the teacher by noise
        for rate in {"p", "attention_dropout"} & vars(module).keys():
            setattr(module, rate, 0.0)
    window = getattr(config, "max_position_embeddings", 1 << 20)
    chat = Chat(model.to(device).requires_grad_(False), tokenizer, sorted(end_ids), window)
    check_head(chat, name)
    return chat


@torch.no_grad()
def check_head(chat: Chat, name: str) -> None:
    """Refuse a head that is not logits = h Wᵀ, as the fused loss assumes."""
    head, config = chat.model.get_output_embeddings(), chat.model.config.get_text_config()
    ids = torch.arange(4, device=chat.model.device)[None]
    fused = type(head) is nn.Linear and head.bias is None and not getattr(config, "final_logit_softcapping", None)
    if fused:  # a head may hide its arithmetic in the model's forward: ask it
        plain = F.linear(chat.model.base_model(input_ids=ids).last_hidden_state, head.weight)
        fused = torch.allclose(chat.model(input_ids=ids).logits, plain, rtol=0.02, atol=0.02 * plain.abs().max())
    if not fused:
        raise Refusal(f"{name} caps, scales or biases its logits, which the fused loss does not; choose another --model")


# ---- 3. Prompts. EDIT HERE (prompts): "steps", for chat models ---------------------------------------------

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


def first_edit(chat: Chat, ids: list[int], critique: str) -> int:
    """Index of the first response token at which the critique departs from the attempt; len(ids) if it never does.

    Compares text, so it holds for any tokenizer; searches by halves, so it decodes log T prefixes and not T. A critique
    begins at its first step tag: what the attempt says before its own counts as copied.
    """
    tag = re.match(TAG, critique)
    lead = max(0, chat.decode(ids).find(tag[0])) if tag else 0
    low, high = 0, len(ids)  # the first `low` tokens are copied, the first high + 1 are not
    while low < high:
        middle = (low + high + 1) // 2
        copied = chat.decode(ids[:middle])[lead:].lstrip().rstrip("\ufffd")  # \ufffd: a letter cut between two tokens
        low, high = (middle, high) if critique.startswith(copied) else (low, middle - 1)
    return low


def strip_thinking(text: str) -> str:
    """Drop `<think>…</think>`; the opening may stand in the template, and a thought that was cut off never closes."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).split("</think>")[-1].strip()


# ---- 4. A critic behind a URL. -----------------------------------------------------------------------------

def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class Reply(NamedTuple):
    text: str | None  # None: failed or cut off
    tokens: int  # generated, as far as is known


@dataclass
class HTTPCritic:
    """OpenAI-compatible chat completions: vLLM, SGLang, llama.cpp, transformers serve, a hosted API; one or a fleet."""

    urls: list[str]
    model: str
    max_new_tokens: int
    parallel: int
    timeout: float
    tries: int = 4
    pause: float = 1.0  # seconds before the second try; doubles
    rest: float = 30.0  # seconds for which a server that failed is passed over, while others stand
    last_error: str = ""

    def __post_init__(self):
        self.turn, self.back = itertools.count(), dict.fromkeys(self.urls, 0.0)  # when each may be asked again

    def __call__(self, conversations: list[list[dict]]) -> list[Reply]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(progress(pool.map(self.ask, conversations), total=len(conversations), desc="critic"))

    def ask(self, messages: list[dict]) -> Reply:
        """429, 5xx, time-outs and broken replies are tried again, elsewhere if there is another server; any other
        4xx is not. A reply can be anything, so any exception that reading it raises is a failure of that reply."""
        for k in range(self.tries):
            up = [url for url in self.urls if self.back[url] <= time.monotonic()]
            time.sleep(k and not up and self.pause * 2 ** (k - 1))  # at once where another server stands
            url = (up or self.urls)[next(self.turn) % len(up or self.urls)]
            try:
                return self.post(url, messages)
            except Exception as error:
                code = getattr(error, "code", 500)
                self.last_error = f"HTTP {code}" if hasattr(error, "code") else f"{type(error).__name__}: {error}"[:100]
                if code != 429 and code < 500:
                    break
                self.back[url] = time.monotonic() + self.rest
        return Reply(None, 0)

    def post(self, url: str, messages: list[dict]) -> Reply:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_new_tokens}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        # read here and kept nowhere: no config, log, message or redirection holds it; an error would quote a line end
        if key := "".join(os.environ.get("OPENAI_API_KEY", "").split()):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError("content is not text")
        return Reply(None if choice.get("finish_reason") == "length" else text, int(usage.get("completion_tokens") or 0))
