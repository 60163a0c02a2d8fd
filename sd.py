"""Self-distillation from critique, in one file (the method of arXiv 2606.11173).

A solver attempts a problem. A frozen critic answers with the solver's own trace, copied step by step and mended at
the first failure. The same network that also reads this critique is the teacher, and the solver learns to match the
teacher's token distribution on its own attempt. If you know GRPO, this is what differs:

  1. One attempt a problem: credit needs no group to be compared with, so a step's attempts are distinct problems.
  2. Credit is a distribution at every token, not one number a rollout: it can blame one step and spare the rest.
  3. Credit comes from the network itself: the teacher is the initial policy (LoRA adapter off) with a context c in
     its prompt that the student does not see. No reward model, no second copy of the weights, no moving target.
  4. Whether the answer is right never reaches the loss. It is graded for the log.

The equations, with p = student and q = teacher over the vocabulary at one token, z the student's logits:

  (1)  L_SD = E_{y ~ π_θ(·|x)} [ 1/|y| Σ_t D( π_θ(·|x,y_<t), sg π_T(·|x,c,y_<t) ) ]         sg = stop-gradient
  (2)  A_t  = log π_T(y_t|x,c,y_<t) − log π_θ(y_t|x,y_<t)                                   per-token advantage
  (3)  GRPO:  A_i = (r_i − mean r) / std r                                     one number for all of rollout i
  (4)  D = KL(p‖q) = Σ_v p (log p − log q)       ∂D/∂z = p (log p − log q − D)             "student||teacher"
  (5)  D = KL(q‖p) = Σ_v q (log q − log p)       ∂D/∂z = p − q                             "teacher||student"

Shapes: B rollouts, T response tokens of one, N scored tokens of a micro-batch, D hidden width, V vocabulary.

  python sd.py --condition critique                              no GPU, no hub: a toy world, in about a minute
  python sd.py --condition critique --model Qwen/Qwen3-1.7B --data problems.jsonl
  python eval.py runs/critique runs/reference runs/grpo          the table
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import huggingface_hub
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from critic_prompts import FORMATS, STYLES, ToyLanguage, strip_thinking, user


class Refusal(Exception):
    """Something the user can mend. `main` prints it as one line and exits with 2."""


# ------------------------------------------------------------------------------------------------------------
# 0. Config: every knob, once. The command line is generated from it.


def knob(default, text: str, choices: Callable = lambda: None, low: float | None = None):
    """A Config field. `low`: the smallest legal value. `choices` is called late: it may name a later table."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's, else those of OPSD (its parent), else ours ("untuned"). PRESETS override them."""

    condition: str = knob("critique", "who writes what the teacher reads", lambda: CONDITIONS)
    preset: str = knob("auto", "numbers to start from; auto is toy without CUDA and --model", lambda: ("auto", *PRESETS))
    model: str = knob("Qwen/Qwen3-1.7B", "the solver: hub name, folder, or toy (paper)")
    data: str = knob(
        "hub:agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json", ".json[l] file, hub:owner/name/file, or toy"
    )
    prompts: str = knob("steps", "format in critic_prompts.py", lambda: FORMATS)
    test_problems: int = knob(100, "problems held out for eval.py", low=1)
    validation_problems: int = knob(50, "problems held out to choose best.pt", low=0)
    skip_bad_rows: bool = knob(False, "count malformed rows of --data instead of stopping")
    critic: str = knob("self", "self (adapter off), a model, or http(s)://…/v1 (paper: QwQ-32B)")
    critic_model: str = knob("", "name of the model behind an http critic")
    critic_sees_reference: bool = knob(True, "show the critic the worked solution (paper: yes)")
    critic_style: str = knob("copy", "copy and mend, quote the error, or omit what is right", lambda: STYLES)
    critic_max_new_tokens: int = knob(0, "cap of a critique, tokens; 0: twice an attempt's (untuned)", low=0)
    critic_parallel: int = knob(16, "http requests at once (untuned)", low=1)
    critic_timeout: float = knob(600.0, "seconds for one http reply (untuned)", low=0.01)
    kl: str = knob("student||teacher", "eq (4), eq (5), or eq (2) at the drawn token", lambda: (*KL, "sampled"))
    stop_at_first_edit: bool = knob(False, "critique only: score no token past the first that was mended (ours)")
    teacher_thinking: bool = knob(False, "teacher's template thinks, student's does not (paper: yes)")
    max_prompt_tokens: int = knob(0, "cap of the teacher's prompt, tokens; 0: the model's window", low=0)
    steps: int = knob(62, "optimiser steps (paper: 7 epochs of 282 problems)", low=0)
    attempts_per_step: int = knob(32, "rollouts a step, in every condition (paper)", low=1)
    group_size: int = knob(8, "grpo only: rollouts a problem (paper)", low=2)
    lr: float = knob(5e-6, "AdamW's, constant (paper)", low=0)
    max_grad_norm: float = knob(0.1, "clip of the gradient's norm; 0: off (OPSD)", low=0)
    lora_rank: int = knob(64, "on all attention and MLP projections (paper)", low=1)
    lora_alpha: float = knob(128.0, "adapter output is scaled by alpha / rank (paper)", low=0)
    temperature: float = knob(1.1, "of sampling and of the loss alike (paper)", low=1e-3)
    max_new_tokens: int = knob(2048, "cap of an attempt, tokens (paper)", low=1)
    sample_batch: int = knob(64, "rows that generate at once; memory, not results", low=1)
    micro_batch: int = knob(4, "rows of one forward and backward; memory, not results", low=1)
    kl_chunk: int = knob(512, "rows of logits that exist at once; memory, not results", low=1)
    gradient_checkpointing: bool = knob(True, "recompute activations in backward; memory, not results")
    dtype: str = knob(
        "auto", "of frozen weights; auto is bfloat16 on CUDA, else float32", lambda: ("auto", "bfloat16", "float32")
    )
    device: str = knob("auto", "auto: cuda if there is one, else cpu")
    eval_every: int = knob(0, "steps between evaluations that choose best.pt; 0: never", low=0)
    eval_samples: int = knob(12, "attempts a problem in every evaluation (paper)", low=1)
    final_problems: int = knob(8, "test problems of the closing before → after; 0: none", low=0)
    save_every: int = knob(10, "steps between checkpoints; 0: only the last (paper)", low=0)
    show_every: int = knob(10, "steps between printed examples; 0: never", low=0)
    export: bool = knob(True, "at the end, write OUT/model: adapters merged, for from_pretrained")
    seed: int = knob(0, "of data order, adapters and sampling", low=0)
    out: str = knob("", "run folder; empty: runs/CONDITION")
    resume: bool = knob(False, "go on from OUT's checkpoint, with its config")


PRESETS = {
    "toy": dict(
        model="toy", data="toy", prompts="toy", steps=50, lr=2e-3, max_grad_norm=1.0, lora_rank=16, lora_alpha=32.0,
        temperature=1.0, max_new_tokens=64, sample_batch=1024, micro_batch=32, gradient_checkpointing=False,
        final_problems=100,
    ),
    "qwen": {},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# 1. Problems and reward. EDIT HERE (problems and reward)


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str  # worked out, by the data set's author
    answer: str


def read_row(row: object) -> Problem:
    """Two schemas, told apart by their fields: problem, solution, answer; and GSM8K's question, answer (… #### 42)."""
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    gsm8k = "problem" not in row
    texts = []
    for name in ("question", "answer") if gsm8k else ("problem", "solution", "answer"):
        value = row.get(name)
        if name == "answer" and type(value) in (int, float):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            what = "missing" if name not in row else "empty" if isinstance(value, str) else "not text"
            raise ValueError(f"field {name!r} is {what}")
        value.encode()  # half of a surrogate pair is a ValueError here, not a crash of the tokenizer in mid-run
        texts.append(value.strip())
    if gsm8k:
        if "####" not in texts[1]:
            raise ValueError("field 'answer' has no '#### ANSWER' at its end, and there is no field 'problem'")
        texts.append(texts[1].rpartition("####")[2].strip())
        if not texts[2]:
            raise ValueError("field 'answer' has nothing after its '####'")
    return Problem(*texts)


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a .json array or a .jsonl file; a line that is not JSON comes as a ValueError."""
    try:
        text = path.read_text("utf-8-sig")  # -sig: a byte-order mark is not data
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}; give --data a .json or .jsonl file") from None
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{path}: not JSON ({error}); is the file cut off?") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", ValueError(f"is not JSON ({error})")


def find_data(name: str) -> Path:
    """The local path of --data; `hub:owner/name/path` is fetched once, into the hub's own cache."""
    if name == "toy":
        return toy_world() / "problems.jsonl"
    if not name.startswith("hub:"):
        return Path(name)
    owner, repo, file = (name[4:].split("/", 2) + ["", ""])[:3]
    offline = not hub_answers()
    try:
        return Path(
            huggingface_hub.hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset", local_files_only=offline)
        )
    except Exception as error:  # the hub's client raises a dozen unrelated types, which mean the same to the user
        reason = "the hub does not answer" if offline else type(error).__name__
        raise Refusal(f"cannot fetch {name} ({reason}); give --data a local .jsonl file, or --preset toy") from None


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


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


class Split(NamedTuple):
    """Problems by use. No two share a normalised text, within a part or across."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    dropped: dict[str, int]  # rows, by reason


def read_problems(cfg: Config, chat: "Chat") -> tuple[dict[str, tuple[Problem, dict]], dict[str, int]]:
    """({normalised text: (problem, its row)}, rows dropped by reason). A Refusal names file, line and field of a bad row."""
    found, dropped = {}, {"duplicate": 0, "without a solution": 0, "bad": 0}
    if cfg.max_new_tokens >= chat.window:
        raise Refusal(
            f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a problem in the model's window of {chat.window}"
        )
    for where, row in read_rows(find_data(cfg.data)):
        if isinstance(row, dict) and row.get("solution") == "":  # DeepScaleR holds many: no mistake of the user's
            dropped["without a solution"] += 1
            continue
        try:
            problem = read_row(row)
            check_length(problem, chat, cfg)
        except ValueError as error:
            if not cfg.skip_bad_rows:
                raise Refusal(f"{where}: {error}; mend the row or pass --skip-bad-rows") from None
            dropped["bad"] += 1
            continue
        key = normalise(problem.question)
        dropped["duplicate"] += key in found
        found.setdefault(key, (problem, row))
    return found, dropped


def load_problems(cfg: Config, chat: "Chat") -> Split:
    """Read and split --data. The split is a function of the texts alone: neither order nor seed moves a problem."""
    found, dropped = read_problems(cfg, chat)
    test, held_out = cfg.test_problems, cfg.test_problems + cfg.validation_problems
    if len(found) <= held_out:
        raise Refusal(
            f"{cfg.data}: {len(found)} distinct problems (dropped: {spell(dropped)}) leave none to train on beside {held_out} "
            f"held out; add problems or lower --test-problems and --validation-problems"
        )
    keys = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    problems = [found[key][0] for key in keys]
    return Split(problems[held_out:], problems[test:held_out], problems[:test], dropped)


def spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def check_length(problem: Problem, chat: "Chat", cfg: Config) -> None:
    room = chat.window - cfg.max_new_tokens
    size = len(problem.question.encode())  # a token spells at least a byte and, to be sure, at most 64
    if size > room // 2 and (
        size > 64 * room or len(chat.encode(FORMATS[cfg.prompts].student(problem.question))) > room
    ):
        raise ValueError(
            f"does not fit the model's window of {chat.window} tokens beside --max-new-tokens {cfg.max_new_tokens}"
        )


def extract_answer(text: str) -> str | None:
    """The last <answer>…</answer>, else the last \\boxed{…}, else what follows the last ####; None if there is none.

    No regular expression scans the whole text: a hostile 10 MB answer costs a few searches.
    """
    start = text.rfind("<answer>")
    if start >= 0:
        return text[start + 8 :][:1000].split("</answer>")[0].strip() or None
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i, letter in enumerate(text[start + 6 : start + 1006]):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return text[start + 7 : start + 6 + i].strip() or None
        return None
    start = text.rfind("####")
    return text[start + 4 : start + 1004].strip().partition("\n")[0].strip() or None if start >= 0 else None


def as_number(text: str) -> Fraction | None:
    """`1,234`, `-3/4`, `\\frac{3}{4}`, `$5.50`, `12%`: the exact number, else None. Nothing is ever evaluated."""
    text = re.sub(r"\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[!,;: ]|[\s$]|\\text\{[^{}]*\}", "", text).rstrip(".")
    share = 100 if text.endswith("%") else 1
    text = text.removesuffix("%").removesuffix("\\")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[-+]?(\d{1,40}(\.\d{1,40})?|\.\d{1,40}|\d{1,40}/\d{1,40})", text):
        return None
    try:
        return Fraction(text) / share
    except ZeroDivisionError:
        return None


@functools.cache
def math_verify():
    """The optional package math-verify, which knows that \\sqrt{8} = 2\\sqrt{2}; None where it is not installed."""
    try:
        import math_verify as package
    except ImportError:
        return None
    return package


def is_correct(text: str, answer: str) -> bool:
    """Whether the response ends in this answer: the one grader of reward and evaluation."""
    found = extract_answer(text)
    if found is None:
        return False
    if normalise(found) == normalise(answer):
        return True
    number, wanted = as_number(found), as_number(answer)
    if number is not None and wanted is not None:
        return number == wanted
    # math-verify computes what it reads: towers, factorials, long numbers and deep nesting would hang it
    tame = len(found) < 100 and not re.search(r"\^.*\^|\*\*|!|\d{16}|\^\{?-?\d{3}", found)
    if tame and sum(map(found.count, "({[")) < 12 and math_verify():
        parse = math_verify().parse
        return bool(math_verify().verify(parse(f"${answer}$"), parse(f"${found}$")))
    return False


# ------------------------------------------------------------------------------------------------------------
# 2. The model: any decoder-only chat model, with an adapter that can be switched off: off, it is the teacher.


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x with W frozen, A (rank, in) and B (out, rank) trained, in float32.

    B starts at zero, so the student starts as the teacher. float32 whatever W is: bfloat16 keeps 8 bits of a number,
    and updates of 5e-6 would round away.
    """

    enabled = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        a = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) / math.sqrt(linear.in_features)
        self.A = nn.Parameter(a.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.enabled:  # the casts give the base's speed; gradients accumulate in float32
            y = y + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return y

    @torch.no_grad()
    def merge(self) -> None:
        self.weight.copy_(self.weight.float() + self.scale * self.B @ self.A)
        self.B.zero_()


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze the model and put a LoRALinear in place of every projection but the head."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                setattr(parent, name, LoRALinear(child, rank, alpha, generator))
    if not adapters(model):
        raise Refusal(f"{type(model).__name__} has no nn.Linear projection for LoRA; choose another --model")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, and until `merge`, the model is the initial policy, bit for bit. Run no backward in here: checkpointing recomputes blocks
    during backward, and would recompute them without the adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


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
            safe, tokenize=False, add_generation_prompt=header, enable_thinking=thinking
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special ones

    def defuse(self, text: str) -> str:
        """A special token's name inside a problem or an attempt is text: a space in it keeps it from ending a turn."""
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


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Chat:
    """A frozen chat model, from a folder or the hub. A Refusal says why a model can't be used, in one line."""
    name = str(toy_world()) if name == "toy" else name
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    offline = not os.path.isdir(name) and not hub_answers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), local_files_only=offline
        ).to(device)
    except Exception as error:  # OSError, ValueError, network errors: all say that there is no such model here
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:150]
        reason = "there is no such folder, and the hub does not answer" if offline else reason
        raise Refusal(f"cannot load model {name} ({reason}); give a local folder, or --preset toy") from None
    if not tokenizer.chat_template:
        raise Refusal(f"{name} has no chat template; choose an instruction-tuned model")
    text_config = model.config.get_text_config()
    stops = [getattr(c, "eos_token_id", None) for c in (tokenizer, text_config, model.generation_config)]
    end_ids = {i for stop in stops for i in (stop if isinstance(stop, list) else [stop]) if i is not None}
    if not end_ids:
        raise Refusal(f"{name} names no end token, so no attempt would stop; set eos_token in tokenizer_config.json")
    for module in model.modules():  # dropout would tell the student from the teacher by noise
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    window = getattr(text_config, "max_position_embeddings", 1 << 20)
    chat = Chat(model.requires_grad_(False), tokenizer, sorted(end_ids), window)
    check_head(chat, name)
    return chat


def check_head(chat: Chat, name: str) -> None:
    """Refuse a head that is not logits = h Wᵀ, as the fused losses assume."""
    head, config = chat.model.get_output_embeddings(), chat.model.config.get_text_config()
    reason = ""
    if getattr(config, "final_logit_softcapping", None):
        reason = "soft-caps its logits (final_logit_softcapping)"
    elif any(getattr(config, scale, 1.0) not in (None, 1.0) for scale in ("logit_scale", "logits_scaling")):
        reason = "scales its logits"
    elif not isinstance(head, nn.Linear) or head.bias is not None:
        reason = "has a head with a bias, or no linear head"
    else:
        with torch.no_grad():  # a head may hide its arithmetic in its forward: ask it
            ids = torch.tensor([chat.end_ids[:1] * 4], device=chat.model.device)
            plain = F.linear(chat.model.base_model(input_ids=ids).last_hidden_state, head.weight)
            if not torch.allclose(chat.model(input_ids=ids).logits, plain, rtol=0.02, atol=0.02):
                reason = "computes its logits in a way of its own"
    if reason:
        raise Refusal(f"{name} {reason}, which the fused loss does not compute; choose another --model")


# ------------------------------------------------------------------------------------------------------------
# 3. Sample. Ids in, ids out: text is for people and for the critic.


class Sample(NamedTuple):
    ids: list[int]  # as drawn, end token included: the student must learn to stop
    truncated: bool
    entropy: float  # of the distributions drawn from, mean over tokens, nats


@torch.no_grad()
def generate(
    chat: Chat,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator=None,
    batch: int = 64,
) -> list[Sample]:
    """One response for each prompt. Temperature 0 is greedy; else the full softmax is drawn from, since the loss scores
    the full softmax: no top-k, no top-p, whatever the model's generation config says.

    Each row has uniforms of its own, drawn on the CPU: its randomness depends neither on its neighbours nor on the device.
    """
    uniform = torch.rand(len(prompts), max_new_tokens if temperature else 0, generator=generator)
    chat.model.eval()
    samples = []
    with tqdm(total=len(prompts), desc="generate", unit="row", leave=False, delay=5, disable=None) as bar:
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            samples += generate_batch(chat, prompts[rows], uniform[rows], max_new_tokens, temperature, bar)
    return samples


def generate_batch(
    chat: Chat, prompts: list[list[int]], uniform: Tensor, max_new_tokens: int, temperature: float, bar: tqdm
) -> list[Sample]:
    device, width, B = chat.model.device, max(map(len, prompts)), len(prompts)
    ids = torch.tensor([chat.end_ids[:1] * (width - len(p)) + p for p in prompts], device=device)  # left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, width)
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # a padded row's first real token stands at position 0
    uniform, ends = uniform.to(device), torch.tensor(chat.end_ids, device=device)
    rows = torch.arange(B, device=device)  # the prompt that each row of the shrinking batch belongs to
    drawn = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    entropy = torch.zeros(B, device=device)
    cache = transformers.DynamicCache(config=chat.model.config)
    for t in range(max_new_tokens):
        hidden = chat.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = F.linear(hidden[:, -1], chat.head).float()  # (rows, V)
        if temperature:
            log_p = F.log_softmax(logits / temperature, -1)
            p = log_p.exp()
            entropy[rows] -= (p * log_p).sum(-1)
            cdf = p.cumsum(-1)  # inverse-CDF: one uniform a row
            token = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)[:, 0]
            token = token.clamp(max=cdf.shape[1] - 1)
        else:
            token = logits.argmax(-1)
        drawn[rows, t] = token
        done = torch.isin(token, ends)
        if done.any():  # finished rows leave, their keys and values with them
            length[rows[done]], ended[rows[done]] = t + 1, True
            keep = (~done).nonzero()[:, 0]
            bar.update(len(rows) - len(keep))
            if len(keep) == 0:
                break
            cache.reorder_cache(keep)  # not batch_select_indices, which linear-attention layers lack
            rows, token, position, mask = rows[keep], token[keep], position[keep], mask[keep]
        ids, position, mask = token[:, None], position[:, -1:] + 1, F.pad(mask, (0, 1), value=1)
    bar.update(B - int(ended.sum()))
    columns = zip(drawn.tolist(), length.tolist(), ended.tolist(), (entropy / length).tolist())
    return [Sample(row[:n], not end, mean) for row, n, end, mean in columns]


@dataclass
class Rollout:
    """One attempt, and all that becomes of it."""

    problem: Problem
    prompt: list[int]  # the student's
    sample: Sample
    text: str
    reward: float  # 1 if right, else 0
    context: str | None = None  # c of eq (1); None: no teacher, or no critique
    scored_length: int | None = None  # response tokens that are scored; None: all
    teacher_prompt: list[int] | None = None
    advantage: float | None = None  # eq (3)

    @property
    def scored(self) -> list[int]:
        return self.sample.ids[: self.scored_length]


def attempt(chat: Chat, problems: list[Problem], cfg: Config, generator: torch.Generator) -> list[Rollout]:
    prompts = [chat.encode(FORMATS[cfg.prompts].student(problem.question)) for problem in problems]
    options = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, batch=cfg.sample_batch)
    rollouts = []
    for problem, prompt, sample in zip(problems, prompts, generate(chat, prompts, generator=generator, **options)):
        text = chat.decode(sample.ids)
        rollouts.append(Rollout(problem, prompt, sample, text, float(is_correct(text, problem.answer))))
    return rollouts


# ------------------------------------------------------------------------------------------------------------
# 4. Critic: a frozen language model, in this process or behind a URL.


class Reply(NamedTuple):
    text: str | None  # None: failed or cut off
    tokens: int  # generated, as far as is known


class Critic(Protocol):
    def __call__(self, conversations: list[list[dict]]) -> list[Reply]: ...


@dataclass
class LocalCritic:
    """Greedy decoding by a model in this process. `--critic self` is the solver's own, adapter off."""

    chat: Chat
    max_new_tokens: int
    batch: int

    def __call__(self, conversations: list[list[dict]]) -> list[Reply]:
        prompts = [self.chat.encode(messages) for messages in conversations]
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) + self.max_new_tokens <= self.chat.window]
        replies = [Reply(None, 0)] * len(prompts)
        with adapters_off(self.chat.model):
            samples = generate(
                self.chat, [prompts[i] for i in fit], max_new_tokens=self.max_new_tokens, batch=self.batch
            )
        for i, sample in zip(fit, samples):
            replies[i] = Reply(None if sample.truncated else self.chat.decode(sample.ids), len(sample.ids))
        return replies


@dataclass
class HTTPCritic:
    """OpenAI-compatible chat completions: vLLM, SGLang, llama.cpp, transformers serve, a hosted API."""

    url: str
    model: str
    max_new_tokens: int
    parallel: int
    timeout: float
    tries: int = 4
    pause: float = 1.0  # seconds before the second try; doubles
    last_error: str = ""

    def __call__(self, conversations: list[list[dict]]) -> list[Reply]:
        with ThreadPoolExecutor(self.parallel) as pool:
            replies = pool.map(self.ask, conversations)
            return list(tqdm(replies, total=len(conversations), desc="critic", leave=False, delay=5, disable=None))

    def ask(self, messages: list[dict]) -> Reply:
        """429, 5xx, time-outs and broken replies are tried again; any other 4xx is not."""
        for k in range(self.tries):
            time.sleep(k and self.pause * 2 ** (k - 1))
            try:
                return self.post(messages)
            except urllib.error.HTTPError as error:
                self.last_error = f"HTTP {error.code}"
                if error.code != 429 and error.code < 500:
                    break
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                self.last_error = f"{type(error).__name__}: {error}"[:100]
        return Reply(None, 0)

    def post(self, messages: list[dict]) -> Reply:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_new_tokens}
        headers = {"Content-Type": "application/json"}
        # read here and kept nowhere: no config, log or message holds it; http.client would quote one with a line end
        if key := "".join(os.environ.get("OPENAI_API_KEY", "").split()):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError("content is not text")
        tokens = int(usage.get("completion_tokens") or 0)
        return Reply(None if choice.get("finish_reason") == "length" else text, tokens)


def load_critic(cfg: Config, chat: Chat) -> Critic:
    length = cfg.critic_max_new_tokens or 2 * cfg.max_new_tokens
    if is_url(cfg.critic):
        return HTTPCritic(cfg.critic, cfg.critic_model, length, cfg.critic_parallel, cfg.critic_timeout)
    frozen = chat if cfg.critic == "self" else load_model(cfg.critic, cfg.dtype, cfg.device)
    return LocalCritic(frozen, cfg.critic_max_new_tokens or min(length, frozen.window // 2), cfg.sample_batch)


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def query_critic(rollouts: list[Rollout], critic: Critic, cfg: Config) -> tuple[list[str | None], int]:
    """(a critique or None for each rollout, tokens that the critic generated). Empty, cut off, or without steps and an
    answer is None: half a trace or an error message in the teacher's prompt would be distilled like any other text."""
    fmt, conversations = FORMATS[cfg.prompts], []
    for r in rollouts:
        solution = r.problem.solution if cfg.critic_sees_reference else None
        conversations.append(fmt.critic(r.problem.question, r.text, solution, cfg.critic_style))
    replies = critic(conversations)
    traces = [fmt.trace(strip_thinking(reply.text or "")[:200_000]) for reply in replies]
    return [t if t and extract_answer(t) else None for t in traces], sum(reply.tokens for reply in replies)


# ------------------------------------------------------------------------------------------------------------
# 5. Contexts: the three conditions. EDIT HERE (condition)


def read_solution(rollouts: list[Rollout], critic: Critic, cfg: Config) -> tuple[list[str | None], int]:
    return [rollout.problem.solution for rollout in rollouts], 0


# Who writes c for the teacher. Sampler, packer, denominator, optimiser and evaluation are shared.
CONDITIONS = {
    "critique": query_critic,  # the critic, who sees problem, attempt and worked solution: the attempt, mended
    "reference": read_solution,  # the data set: its worked solution, in its author's words
    "grpo": None,  # nobody: there is no teacher, and one binary reward blames or praises all tokens, eq (3)
}


def group_advantages(rewards: list[float], group_size: int) -> list[float]:
    """Eq (3) within consecutive groups. Equal rewards carry no signal: 0, not 0 / 0."""
    r = np.array(rewards).reshape(-1, group_size)  # (problems, G)
    spread = r.std(1, keepdims=True)
    return ((r - r.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)).reshape(-1).tolist()


def write_contexts(rollouts: list[Rollout], critic: Critic, cfg: Config) -> int:
    """Give each rollout its context, or in grpo its advantage. Returns the tokens that the critic generated."""
    author = CONDITIONS[cfg.condition]
    if author is None:
        for r, advantage in zip(rollouts, group_advantages([r.reward for r in rollouts], cfg.group_size)):
            r.advantage = advantage
        return 0
    contexts, tokens = author(rollouts, critic, cfg)
    for r, context in zip(rollouts, contexts):
        r.context = context
    return tokens


# ------------------------------------------------------------------------------------------------------------
# 6. Pack. Student row = student prompt + response; teacher row = teacher prompt + the very same ids.


def teacher_prompt(chat: Chat, question: str, context: str, cfg: Config) -> list[int] | None:
    """The teacher's prompt within the window. An over-long context loses its own middle: question, format and header
    stay whole. None if they alone do not fit."""
    room = min(chat.window - cfg.max_new_tokens, cfg.max_prompt_tokens or chat.window)
    render = lambda text: chat.encode(FORMATS[cfg.prompts].teacher(question, text), cfg.teacher_thinking)
    ids = render(context)
    if len(ids) <= room:
        return ids
    words = chat.tokenizer(context, add_special_tokens=False)["input_ids"]
    keep = len(words)
    while len(ids) > room and keep > 0:
        keep = max(0, keep - (len(ids) - room))
        front = chat.decode(words[: keep - keep // 2])
        ids = render(front + " … " + chat.decode(words[len(words) - keep // 2 :]))
    return ids if len(ids) <= room else None


def pack(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Rollout]:
    """The rollouts that will be scored, each with its teacher's prompt; in grpo there is none, and all are scored."""
    if CONDITIONS[cfg.condition] is None:
        return rollouts
    for r in rollouts:
        r.teacher_prompt = None if r.context is None else teacher_prompt(chat, r.problem.question, r.context, cfg)
        if r.teacher_prompt and not cfg.teacher_thinking:  # else token 0 would differ, whatever the context says
            n = chat.header_length
            assert r.teacher_prompt[-n:] == r.prompt[-n:], "prompts end in different generation headers"
        if r.teacher_prompt and cfg.stop_at_first_edit and cfg.condition == "critique":
            r.scored_length = first_edit(chat, r.sample.ids, r.context) + 1
    return [r for r in rollouts if r.teacher_prompt]


def first_edit(chat: Chat, ids: list[int], critique: str) -> int:
    """Index of the first response token at which the critique departs from the attempt; len(ids) if it never does.

    Compares text, so it holds for any tokenizer; searches by halves, so it decodes log T prefixes and not T.
    """
    low, high = 0, len(ids)  # the first `low` tokens are copied, the first high + 1 are not
    while low < high:
        middle = (low + high + 1) // 2
        copied = chat.decode(ids[:middle]).lstrip().rstrip("\ufffd")  # \ufffd: a letter cut between two tokens
        low, high = (middle, high) if critique.startswith(copied) else (low, middle - 1)
    return low


def response_hidden(chat: Chat, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The hidden states that predict each response token: (N, D), in the order of the concatenated responses.

    Rows are right-padded. A causal model never looks ahead, so no padding reaches a scored position, and no mask is
    made from token values: padding is often the end token, which must be scored.
    """
    width = max(len(p) + len(r) for p, r in zip(prompts, responses))
    rows = [p + r + chat.end_ids[:1] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)]
    ids = torch.tensor(rows, device=chat.model.device)
    hidden = chat.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, D)
    # the state at t predicts token t + 1: the prompt's last one scores the first response token. Off by one still
    # trains, on the wrong targets
    return torch.cat([h[len(p) - 1 : len(p) - 1 + len(r)] for h, p, r in zip(hidden, prompts, responses)])


def teacher_hidden(chat: Chat, rollouts: list[Rollout], responses: list[list[int]]) -> Tensor:
    """The same of the teacher: adapter off, context in the prompt, no gradient."""
    with torch.no_grad(), adapters_off(chat.model):
        return response_hidden(chat, [r.teacher_prompt for r in rollouts], responses)


# ------------------------------------------------------------------------------------------------------------
# 7. Loss: the slow twin first, then the fused form, which never holds an (N, V) tensor.
#
# Gradients by hand. With p = softmax(z): ∂ log p_v / ∂z_k = 1[v=k] − p_k and ∂p_v / ∂z_k = p_v (1[v=k] − p_k).
#   eq (4), KL(p‖q) = Σ_v p_v d_v, where d_v = log p_v − log q_v:
#     ∂/∂z_k = Σ_v p_v (1[v=k] − p_k) d_v + Σ_v p_v (1[v=k] − p_k) = p_k (d_k − KL) + 0
#   eq (5), KL(q‖p) = Σ_v q_v (log q_v − log p_v):
#     ∂/∂z_k = −Σ_v q_v (1[v=k] − p_k) = p_k − q_k
#   sampled token, −A log p_y with A = log q_y − log p_y held constant:
#     ∂/∂z_k = −A (1[y=k] − p_k), whose mean over y ~ p is eq (4)'s gradient
# And z = h Wᵀ / temperature, so ∂/∂h = (∂/∂z) W / temperature. A row's gradient is linear in the row's weight, so it is
# made in the forward pass, while the row's logits exist, and the backward pass only scales it.


def kl_naive(student_logits: Tensor, teacher_logits: Tensor, kl: str, temperature: float) -> Tensor:
    """Eq (4) or (5) for each row: (N, V) logits → (N,). Autograd differentiates it: the oracle of the tests."""
    log_p = F.log_softmax(student_logits / temperature, -1)
    log_q = F.log_softmax(teacher_logits / temperature, -1)
    if kl == "student||teacher":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kl == "teacher||student":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    raise ValueError(f"kl is 'student||teacher' or 'teacher||student', not {kl!r}")


def kl_student_teacher(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Eq (4) of each row and its gradient wrt z, made inside the two buffers it is given."""
    d = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    p_d = d.mul_(p)
    kl = p_d.sum(-1)
    return kl, p_d.addcmul_(p, kl[:, None], value=-1)


def kl_teacher_student(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Eq (5) of each row and its gradient wrt z, inside the two buffers and a third."""
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q.sub_(log_p))
    return kl, log_p.exp_().sub_(q)


KL = {"student||teacher": kl_student_teacher, "teacher||student": kl_teacher_student}


def log_softmax_of(h: Tensor, lm_head: Tensor, temperature: float) -> Tensor:
    """log softmax(h Wᵀ / temperature), (rows, V), float32 from the logits on: a bfloat16 log-softmax over 150,000
    entries makes small divergences negative."""
    logits = F.linear(h, lm_head)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature), -1)


class FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, lm_head, row_weight, kl, temperature, chunk):
        per_row = h_student.new_empty(len(h_student), dtype=torch.promote_types(h_student.dtype, torch.float32))
        grad = torch.empty_like(h_student)
        for start in range(0, len(h_student), chunk):
            rows = slice(start, start + chunk)
            log_p = log_softmax_of(h_student[rows], lm_head, temperature)
            log_q = log_softmax_of(h_teacher[rows], lm_head, temperature)
            per_row[rows], grad_z = KL[kl](log_p, log_q)
            grad_z.mul_(row_weight[rows, None] / temperature)
            grad[rows] = grad_z.to(lm_head.dtype) @ lm_head
        ctx.save_for_backward(grad)
        loss, per_row = (row_weight * per_row).sum(), per_row.float()
        ctx.mark_non_differentiable(per_row)
        return loss, per_row

    @staticmethod
    def backward(ctx, grad_loss, _):
        return ctx.saved_tensors[0] * grad_loss, None, None, None, None, None, None


def fused_kl(
    h_student: Tensor,
    h_teacher: Tensor,
    lm_head: Tensor,
    row_weight: Tensor,
    *,
    kl: str,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(Σ row_weight·KL, KL of each row): eq (1) with D of eq (4) or (5), `chunk` rows of logits at a time.

    h_student and h_teacher (N, D); lm_head (V, D), frozen; row_weight (N,). The loss is differentiable in h_student
    alone; the second result, (N,) float32 in nats, is detached, for the log. Three matmuls, as in naive autograd:
    student logits, teacher logits, gradient. Raises ValueError for an unknown kl.
    """
    if kl not in KL:
        raise ValueError(f"kl is one of {list(KL)}, not {kl!r}")
    return FusedKL.apply(h_student, h_teacher.detach(), lm_head.detach(), row_weight, kl, temperature, chunk)


class FusedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, lm_head, ids, temperature, chunk):
        logprob = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            log_p = log_softmax_of(h[rows], lm_head, temperature)
            logprob[rows] = log_p.gather(1, ids[rows, None])[:, 0]
            if (
                grad is not None
            ):  # ∂ log p_y / ∂z = 1[y=v] − p_v, in float32: W_y − Σ_v p_v W_v would cancel in bfloat16
                y = ids[rows, None]
                grad_z = log_p.exp_().neg_().scatter_add_(1, y, torch.ones_like(y, dtype=log_p.dtype))
                grad[rows] = grad_z.div_(temperature).to(lm_head.dtype) @ lm_head
        ctx.save_for_backward(grad)
        return logprob

    @staticmethod
    def backward(ctx, grad_logprob):
        (grad,) = ctx.saved_tensors
        return (grad * grad_logprob[:, None]).to(grad.dtype), None, None, None, None


def fused_logprob(h: Tensor, lm_head: Tensor, ids: Tensor, *, temperature: float, chunk: int) -> Tensor:
    """log p of each drawn token, (N,), float32, differentiable in h (N, D); lm_head (V, D) is frozen, ids (N,)."""
    return FusedLogprob.apply(h, lm_head.detach(), ids, temperature, chunk)


# ------------------------------------------------------------------------------------------------------------
# 8. Step.


def micro_loss(chat: Chat, rollouts: list[Rollout], total: int, cfg: Config) -> tuple[Tensor, float]:
    """(this micro-batch's share of the step's loss, the sum of its tokens' KL).

    Eq (1) with one denominator, `total`, the step's scored tokens: a mean of means, over rollouts or micro-batches,
    would weigh a token by the company it keeps.
    """
    options = dict(temperature=cfg.temperature, chunk=cfg.kl_chunk)
    responses = [r.scored for r in rollouts]
    ids = torch.tensor(sum(responses, []), device=chat.model.device)  # (N,)
    h_student = response_hidden(chat, [r.prompt for r in rollouts], responses)  # (N, D)
    if CONDITIONS[cfg.condition] is None:  # one update from fresh samples: the importance ratio is 1
        log_p = fused_logprob(h_student, chat.head, ids, **options)
        a = torch.tensor([r.advantage for r in rollouts for _ in r.scored], device=log_p.device)  # eq (3)
        return -(a * log_p).sum() / total, 0.0
    h_teacher = teacher_hidden(chat, rollouts, responses)
    if cfg.kl == "sampled":
        log_p = fused_logprob(h_student, chat.head, ids, **options)
        a = fused_logprob(h_teacher, chat.head, ids, **options) - log_p.detach()  # eq (2), a constant weight
        return -(a * log_p).sum() / total, -a.sum().item()
    weight = torch.full((len(ids),), 1 / total, device=h_student.device)
    loss, per_row = fused_kl(h_student, h_teacher, chat.head, weight, kl=cfg.kl, **options)  # eq (1)
    return loss, per_row.sum().item()


def train_step(chat: Chat, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], cfg: Config) -> dict:
    """One update from the packed rollouts: {loss, kl (nats a scored token), grad_norm (before the clip)}.

    Raises FloatingPointError, before anything changes, if they are not finite. Without rollouts nothing changes.
    """
    total = sum(len(r.scored) for r in rollouts)
    if total == 0:
        return {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0}
    chat.model.train()  # in eval mode gradient checkpointing is silently off; dropout is zero in both
    optimizer.zero_grad()
    loss_sum = kl_sum = 0.0
    for start in range(0, len(rollouts), cfg.micro_batch):
        loss, kl = micro_loss(chat, rollouts[start : start + cfg.micro_batch], total, cfg)
        loss.backward()
        loss_sum, kl_sum = loss_sum + loss.item(), kl_sum + kl
    norm = nn.utils.clip_grad_norm_(adapters(chat.model).values(), cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(loss_sum + norm):
        raise FloatingPointError(f"loss {loss_sum}, gradient norm {norm}")
    optimizer.step()
    return {"loss": loss_sum, "kl": kl_sum / total, "grad_norm": norm}


@torch.no_grad()
def token_advantages(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Tensor]:
    """Eq (2) for every response token of each packed rollout: a list of (T,), in nats. For people, not for the loss."""
    responses = [r.sample.ids for r in rollouts]
    ids = torch.tensor(sum(responses, []), device=chat.model.device)
    options = dict(temperature=cfg.temperature, chunk=cfg.kl_chunk)
    chat.model.eval()
    student = fused_logprob(response_hidden(chat, [r.prompt for r in rollouts], responses), chat.head, ids, **options)
    teacher = fused_logprob(teacher_hidden(chat, rollouts, responses), chat.head, ids, **options)
    return list((teacher - student).split(list(map(len, responses))))


# ------------------------------------------------------------------------------------------------------------
# 9. Log and checkpoint.


def measure(rollouts: list[Rollout], scored: list[Rollout], cfg: Config) -> dict:
    """What a step's rollouts show. The README's glossary says what alarm looks like."""
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    find, critique = FORMATS[cfg.prompts].steps, cfg.condition == "critique"
    copied = [step in find(r.text) for r in scored if critique for step in find(r.context)]
    groups = np.array([r.reward for r in rollouts]).reshape(-1, attempts_per_problem(cfg))
    return {
        "accuracy": mean([r.reward for r in rollouts]),
        "length": mean([len(r.sample.ids) for r in rollouts]),
        "truncated": mean([r.sample.truncated for r in rollouts]),
        "entropy": mean([r.sample.entropy for r in rollouts]),
        "scored": len(scored),
        "scored_tokens": sum(len(r.scored) for r in scored),
        "critic_failed": len(rollouts) - len(scored) if critique else 0,
        "copied": mean(copied),  # share of the critiques' steps that stand word for word in the attempt
        "zero_variance": mean(groups.std(1) == 0) if groups.shape[1] > 1 else 0.0,
        "solver_tokens": sum(len(r.sample.ids) for r in rollouts),
    }


def peak_memory(device: torch.device) -> float:
    """MiB: the CUDA allocator's peak, or the process's on CPU; 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def log_line(m: dict, steps: int) -> str:
    seconds = "+".join(f"{m['cost'][name]:.2f}" for name in ("sample_s", "critic_s", "train_s"))
    return (
        f"step {m['step']:4d}/{steps} loss {m['loss']:8.4f} kl {m['kl']:7.4f} grad {m['grad_norm']:6.3f} "
        f"acc {m['accuracy']:4.0%} len {m['length']:6.1f} trunc {m['truncated']:4.0%} entropy {m['entropy']:5.3f} "
        f"failed {m['critic_failed']:2d} copied {m['copied']:4.0%} flat {m['zero_variance']:4.0%} "
        f"{seconds} s {m['cost']['peak_mib']:.0f} MiB"
    )


def show(chat: Chat, rollout: Rollout, cfg: Config) -> None:
    """One problem, attempt and context, and the five tokens whose probability the teacher would move most."""
    verdict = "right" if rollout.reward else "wrong"
    print(f"  problem    {rollout.problem.question}   [answer {rollout.problem.answer}]")
    print(f"  attempt    {rollout.text}   [{verdict}]")
    if rollout.advantage is not None:
        print(f"  advantage  {rollout.advantage:+.2f} for each of its {len(rollout.sample.ids)} tokens   [eq (3)]")
        return
    print(f"  {cfg.condition:10s} {rollout.context or 'none: the critic failed'}")
    if rollout.teacher_prompt:
        a = token_advantages(chat, [rollout], cfg)[0]
        top = sorted(a.abs().topk(min(5, len(a))).indices.tolist())
        tokens = (f"{chat.tokenizer.decode([rollout.sample.ids[t]])!r} at {t} {a[t]:+.2f}" for t in top)
        print(f"  moved      {', '.join(tokens)}   [A_t of eq (2), nats]")


def load_checkpoint(path: Path) -> dict:
    """{config, step, seen, best, adapters, optimizer, rng}: tensors and plain values, nothing that could run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("config", "step", "seen", "best", "adapters", "optimizer", "rng")}
    except FileNotFoundError:
        raise Refusal(f"{path}: no checkpoint there; name a run folder that holds one") from None
    except Exception as error:
        raise Refusal(f"{path}: not a checkpoint of sd.py ({type(error).__name__}); train the run anew") from None


def load_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = adapters(model)
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in weights.items()}:
        raise Refusal("the checkpoint's adapters do not fit the model; was --model's folder changed?")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


class Run:
    """A run folder and the state that a resumed run needs: log.jsonl, checkpoint.pt (the last), best.pt, model/."""

    def __init__(self, cfg: Config, chat: Chat):
        self.cfg, self.chat, self.folder = cfg, chat, Path(cfg.out)
        self.optimizer = torch.optim.AdamW(adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.step, self.seen, self.best = 0, 0, -1.0  # `seen` problems: the position in the data
        if cfg.resume:
            self.restore()
            return
        old_run = (self.folder / "log.jsonl").exists()
        if self.folder.exists() and not old_run and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise Refusal(f"--out {self.folder} is there and is no run folder; name another")
        if old_run:  # never overwrite a run
            old = next(p for n in itertools.count(1) if not (p := Path(f"{self.folder}.{n}")).exists())
            self.folder.rename(old)
            print(f"{self.folder} was there; moved to {old}")
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
        grader = "exact + number" + (" + math-verify" if math_verify() else "")
        self.log({"config": asdict(cfg), "versions": versions, "grader": grader})

    def log(self, entry: dict) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, name: str = "checkpoint.pt") -> None:
        """Atomic: a kill at any moment leaves the old file or the new one."""
        state = {"config": asdict(self.cfg), "step": self.step, "seen": self.seen, "best": self.best}
        state["adapters"] = {name: p.detach().cpu() for name, p in adapters(self.chat.model).items()}
        state |= {"optimizer": self.optimizer.state_dict(), "rng": self.generator.get_state()}
        torch.save(state, self.folder / f"{name}.tmp")
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def restore(self) -> None:
        state = load_checkpoint(self.folder / "checkpoint.pt")
        load_adapters(self.chat.model, state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["rng"])
        self.step, self.seen, self.best = state["step"], state["seen"], state["best"]
        log = self.folder / "log.jsonl"  # steps past the checkpoint will be written again; a kill may have cut a line
        lines = [line for line in log.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line).get("step", 0) <= self.step]
        log.with_suffix(".tmp").write_text("".join(kept), "utf-8")
        os.replace(log.with_suffix(".tmp"), log)

    def export(self) -> None:
        """OUT/model: a plain folder for from_pretrained. Call it last: it merges the adapters into the weights, and to
        bfloat16 weights the sum is rounded, so that OUT/model is close to the trained policy and not equal to it."""
        for layer in self.chat.model.modules():
            if isinstance(layer, LoRALinear):
                layer.merge()
        trained = adapters(self.chat.model)
        own = {name: w for name, w in self.chat.model.state_dict().items() if name not in trained}
        self.chat.model.save_pretrained(self.folder / "model", state_dict=own)
        self.chat.tokenizer.save_pretrained(self.folder / "model")


# ------------------------------------------------------------------------------------------------------------
# 10. The toy world: a language model with a misconception, pre-trained while you wait. It becomes a Hugging Face folder
# and a problem file; from `load_model` on, nothing knows that it is a toy. Its language is in critic_prompts.py.

TOY_MODEL = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
TOY_JOBS = {"solve": 16, "follow": 28, "criticise": 20}  # rows of a pre-training batch
TOY_STEPS, TOY_PROBLEMS = 1000, 2000


def toy_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A token a character, but for the special ones and "####". Padding is the end token, as in many real models."""
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = {token: i for i, token in enumerate([*special, "####", *ToyLanguage.CHARACTERS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("####|."), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(special)
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unknown|>",
        chat_template=template + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )  # fmt: skip


def toy_loss(chat: Chat, examples: list[tuple[list[dict], str, str]]) -> Tensor:
    """Cross entropy of every token of the replies, (N,)."""
    text = lambda words: chat.tokenizer(words)["input_ids"]
    prompts = [chat.encode(messages) + text(given) for messages, given, _ in examples]
    replies = [text(reply) + chat.end_ids for _, _, reply in examples]
    logits = F.linear(response_hidden(chat, prompts, replies), chat.head)
    return F.cross_entropy(logits, torch.tensor(sum(replies, []), device=logits.device), reduction="none")


def pretrain_toy(chat: Chat, language: ToyLanguage, held_out: set[str], steps: int) -> None:
    """Next-token loss on the replies of the three jobs. Muon on the matrices needs half of AdamW's steps."""
    model = chat.model.train().requires_grad_(True)
    inner = lambda name, p: p.ndim == 2 and ".layers." in name
    matrices = [p for name, p in model.named_parameters() if inner(name, p)]
    others = [p for name, p in model.named_parameters() if not inner(name, p)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
    optimizers = [muon, torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    shape = lambda step: min(1, (step + 1) / 30, 2 * (steps - step) / steps)  # warm up, hold, decay from the middle
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    fresh = (problem for problem in iter(language.problem, None) if problem not in held_out)
    for _ in tqdm(range(steps), desc="pre-train the toy model, once", disable=None):
        losses = [
            toy_loss(chat, [language.example(job, next(fresh)) for _ in range(rows)])
            for job, rows in TOY_JOBS.items()
        ]
        torch.cat(losses).mean().backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()


def toy_world(steps: int = TOY_STEPS, root: Path = Path("runs/.toy")) -> Path:
    """The toy's folder: model, tokenizer, problems.jsonl. Built on first use; its name is a hash of what shapes it."""
    makers = (ToyLanguage, *FORMATS["toy"], toy_tokenizer, toy_loss, pretrain_toy, toy_world)
    source = "".join(map(inspect.getsource, makers)) + f"{TOY_MODEL} {TOY_JOBS} {TOY_PROBLEMS} {steps}"
    key = hashlib.sha256(f"{source} {torch.__version__} {transformers.__version__}".encode()).hexdigest()[:12]
    if (root / key).exists():
        return root / key
    language, tokenizer = ToyLanguage(seed=0), toy_tokenizer()
    problems = {problem: language.row(problem) for problem in (language.problem() for _ in range(TOY_PROBLEMS))}
    end = tokenizer.eos_token_id
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, bos_token_id=None, **TOY_MODEL
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chat = Chat(transformers.Qwen3ForCausalLM(config), tokenizer, [end], config.max_position_embeddings)
    pretrain_toy(chat, language, set(problems), steps)
    partial = root / f"{key}.{os.getpid()}"
    chat.model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems.values()))
    with contextlib.suppress(OSError):  # another process was first, and its world is the same
        partial.rename(root / key)  # atomic: an interrupted build is never taken for a finished one
    return root / key


# ------------------------------------------------------------------------------------------------------------
# 11. Main.


def attempts_per_problem(cfg: Config) -> int:
    return cfg.group_size if CONDITIONS[cfg.condition] is None else 1


def next_problems(problems: list[Problem], seen: int, cfg: Config) -> list[Problem]:
    """The step's problems, one entry an attempt: a shuffle an epoch, by the seed and the position in the data alone."""
    chosen = []
    for i in range(seen, seen + cfg.attempts_per_step // attempts_per_problem(cfg)):
        epoch, k = divmod(i, len(problems))
        chosen += [problems[shuffle(len(problems), f"{cfg.seed} {epoch}")[k]]] * attempts_per_problem(cfg)
    return chosen


@functools.lru_cache(maxsize=2)
def shuffle(n: int, seed: str) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(n), n))


@contextlib.contextmanager
def clock(cost: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    cost[name] = round(time.perf_counter() - start, 3)


def take_step(run: Run, problems: list[Problem], critic: Critic) -> tuple[dict, list[Rollout]]:
    """The algorithm, once: problems → rollouts → contexts → pack → update. Returns the step's log entry."""
    cfg, chat, cost = run.cfg, run.chat, {}
    chosen = next_problems(problems, run.seen, cfg)
    with clock(cost, "sample_s"):
        rollouts = attempt(chat, chosen, cfg, run.generator)
    with clock(cost, "critic_s"):
        critic_tokens = write_contexts(rollouts, critic, cfg)
    with clock(cost, "train_s"):
        scored = pack(chat, rollouts, cfg)
        update = train_step(chat, run.optimizer, scored, cfg)
    run.step, run.seen = run.step + 1, run.seen + len(chosen) // attempts_per_problem(cfg)
    cost["peak_mib"] = round(peak_memory(chat.model.device), 1)
    measured = measure(rollouts, scored, cfg)
    return {"step": run.step, **update, **measured, "critic_tokens": critic_tokens, "cost": cost}, rollouts


def warn(m: dict, critic: Critic, cfg: Config) -> None:
    if m["truncated"] > 0.5:
        print(
            f"WARNING: {m['truncated']:.0%} of the attempts were cut at --max-new-tokens {cfg.max_new_tokens} and read as wrong"
        )
    if 2 * m["critic_failed"] > cfg.attempts_per_step:
        error = getattr(critic, "last_error", "") or "empty, cut off, or without steps and an answer"
        print(f"WARNING: {m['critic_failed']} of {cfg.attempts_per_step} critiques failed and are left out ({error})")


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Inside, the first Ctrl-C only fills the list, so that the step in flight is finished and saved."""
    pressed: list[bool] = []

    def handler(*_):
        if pressed:  # not an exception: a thread pool would first wait for its requests
            print("sd.py: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
            os._exit(130)
        pressed.append(True)
        print("finishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(cfg: Config) -> None:
    """Train to cfg.steps: log, show, evaluate and save on the way. Ctrl-C, or a critic that only fails, ends it saved."""
    from eval import closing_report, evaluate, scores  # eval.py imports this file: by now it is loaded

    chat = load_model(cfg.model, cfg.dtype, cfg.device)
    problems = load_problems(cfg, chat)
    asked = cfg if cfg.condition == "critique" else replace(cfg, critic="self")  # no 32B model for nobody to ask
    critic = load_critic(asked, chat)
    add_adapters(chat.model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if cfg.gradient_checkpointing:  # the reentrant kind loses the adapters' gradients, silently
        chat.model.activation_checkpointing_enable({"use_reentrant": False})
    run = Run(cfg, chat)
    trained = sum(p.numel() for p in adapters(chat.model).values())
    print(
        f"{sum(p.numel() for p in chat.model.parameters()) - trained:,} frozen and {trained:,} trained parameters on "
        f"{chat.model.device} | {len(problems.train)} train, {len(problems.validation)} validation, {len(problems.test)} "
        f"test problems (dropped: {spell(problems.dropped)})"
    )
    failed_steps = 0
    with deferred_interrupt() as interrupted:
        while run.step < cfg.steps and failed_steps < 3 and not interrupted:
            metrics, rollouts = take_step(run, problems.train, critic)
            run.log(metrics)
            print(log_line(metrics, cfg.steps), flush=True)
            warn(metrics, critic, cfg)
            failed_steps = 0 if metrics["scored"] else failed_steps + 1
            if cfg.show_every and (run.step == 1 or run.step % cfg.show_every == 0):
                show(chat, next((r for r in rollouts if not r.reward), rollouts[0]), cfg)
            if cfg.eval_every and run.step % cfg.eval_every == 0:
                score = float(scores(evaluate(chat, problems.validation, cfg))["Avg"].mean())
                run.log({"step": run.step, "validation_avg": score})
                print(f"validation Avg@{cfg.eval_samples} {100 * score:.1f}")
                if score > run.best:
                    run.best = score
                    run.save("best.pt")
            if cfg.save_every and run.step % cfg.save_every == 0:
                run.save()
    run.save()
    if interrupted:
        raise KeyboardInterrupt
    if failed_steps == 3:
        raise Refusal(
            f"every critique failed for 3 steps, or fits no prompt; saved in {cfg.out}. Mend --critic, then add --resume"
        )
    if cfg.final_problems:
        print(closing_report(chat, problems.test[: cfg.final_problems], cfg))
    if cfg.export:
        run.export()


def parse_config(argv: list[str] | None) -> tuple[Config, str]:
    """(config, why this preset). Flags beat the preset, or with --resume the saved config, which beats the defaults."""
    parser = argparse.ArgumentParser(
        prog="sd.py", usage="python sd.py [--flag VALUE …]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Train a solver on a critic's mended copies of its own attempts.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=130),
    )  # fmt: skip
    parser.error = refuse
    for f in fields(Config):
        rule, flag = f.metadata, "--" + f.name.replace("_", "-")
        defaults = "; ".join(
            [str(f.default) or "empty"] + [f"{n} {p[f.name]}" for n, p in PRESETS.items() if f.name in p]
        )
        choices = rule["choices"]() and tuple(rule["choices"]())
        text = rule["help"] + (": " + ", ".join(choices) if choices else "") + f" [{defaults}]"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            letter = f.type.__name__[0].upper()
            parser.add_argument(flag, type=f.type, choices=choices, metavar=letter, help=text)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return resume_config(given)
    name, why = given.get("preset", "auto"), "as asked"
    if name == "auto":
        own = given.get("model", "toy") != "toy"
        real = "--model is given" if own else "CUDA is there" if torch.cuda.is_available() else None
        name, why = ("qwen", real) if real else ("toy", "neither CUDA nor --model")
    cfg = replace(Config(), **{**PRESETS[name], **given, "preset": name})
    return check(replace(cfg, out=cfg.out or f"runs/{cfg.condition}")), why


# what may change when a run goes on: nothing that shapes its numbers, but for the critic, which may need mending
RESUMABLE = {"resume", "out", "preset", "steps", "save_every", "show_every", "final_problems", "export", "device", "critic",
             "critic_model", "critic_parallel", "critic_timeout", "critic_max_new_tokens", "sample_batch", "micro_batch",
             "kl_chunk", "gradient_checkpointing"}  # fmt: skip


def resume_config(given: dict) -> tuple[Config, str]:
    """The saved config with the given flags on top."""
    out = given.get("out") or f"runs/{given.get('condition', 'critique')}"
    saved = load_checkpoint(Path(out) / "checkpoint.pt")["config"]
    for name in given.keys() - RESUMABLE:
        if saved.get(name) != given[name]:
            raise Refusal(
                f"{out} was trained with {name} {saved.get(name)!r}, not {given[name]!r}; drop the flag, or --resume"
            )
    try:
        return check(
            Config(**{**saved, **given, "preset": saved["preset"], "out": out})
        ), f"of the run in {out}, resumed"
    except TypeError:
        raise Refusal(f"{out} was written by another version of sd.py; train the run anew") from None


def check(cfg: Config) -> Config:
    for f in fields(Config):
        value, low = getattr(cfg, f.name), f.metadata["low"]
        if low is not None and not low <= value < math.inf:
            refuse(f"argument --{f.name.replace('_', '-')}: {value} is out of range; the least is {low}")
    if cfg.attempts_per_step % attempts_per_problem(cfg):
        refuse(
            f"argument --attempts-per-step: {cfg.attempts_per_step} is not a multiple of --group-size {cfg.group_size}"
        )
    if cfg.eval_every and not cfg.validation_problems:
        refuse("argument --eval-every: needs --validation-problems of at least 1")
    if is_url(cfg.critic) and not cfg.critic_model:
        refuse("argument --critic: a URL needs --critic-model, the name of the model it serves")
    return cfg


def refuse(message: str):
    raise Refusal(message)


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        cfg, why = parse_config(argv)
        print(f"preset {cfg.preset} ({why}): {cfg.condition}, model {cfg.model}, data {cfg.data} → {cfg.out}")
        train(cfg)
        return 0
    except Refusal as refusal:
        print(f"sd.py: {refusal}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "sd.py: out of GPU memory; lower --sample-batch, --micro-batch or --kl-chunk and add --resume",
            file=sys.stderr,
        )
        return 1
    except OSError as error:  # disk full, folder not writable
        print(f"sd.py: {error}", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(
            f"sd.py: not finite: {error}; nothing was updated, the last checkpoint stands. Lower --lr?",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("sd.py: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    import sd  # eval.py imports this file as `sd`: run that copy, so that its classes exist once

    sys.exit(sd.main())
