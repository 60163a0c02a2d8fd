"""Self-distillation from critique, in one file (the method of arXiv 2606.11173).

A solver attempts a problem. A frozen critic answers with the solver's own trace, copied step by step and mended at the
first failure. The same network that also reads this critique is the teacher, and the solver learns to match the
teacher's token distribution on its own attempt. If you know GRPO, this is what differs:

  1. One attempt a problem. Credit needs no group to be compared with, so all attempts of a step are distinct problems.
  2. Credit is a whole distribution at every token, not one number a rollout: it can blame one wrong step and spare the rest.
  3. Credit comes from the network itself: the teacher is the initial policy (LoRA adapter off) with a context c in its
     prompt that the student does not see. No reward model, no second copy of the weights, no moving target.
  4. The answer's correctness never reaches the loss. It is graded for the log alone.

The equations, with p = student and q = teacher over the vocabulary at one token, z the student's logits:

  (1)  L_SD = E_{y ~ π_θ(·|x)} [ 1/|y| Σ_t D( π_θ(·|x,y_<t), sg π_T(·|x,c,y_<t) ) ]             sg = stop-gradient
  (2)  A_t  = log π_T(y_t|x,c,y_<t) − log π_θ(y_t|x,y_<t)                                      per-token advantage
  (3)  GRPO:  A_i = (r_i − mean r) / std r                                                     one for all of rollout i
  (4)  D = KL(p‖q) = Σ_v p (log p − log q)      ∂D/∂z = p (log p − log q − D)                  "student||teacher"
  (5)  D = KL(q‖p) = Σ_v q (log q − log p)      ∂D/∂z = p − q                                  "teacher||student"

Shapes: B rollouts, T response tokens of one rollout, N scored tokens of a micro-batch, D hidden width, V vocabulary.

  python sd.py --condition critique                                    no GPU, no hub: a toy world, in minutes
  python sd.py --condition critique --model Qwen/Qwen3-1.7B --data problems.jsonl
  python eval.py runs/critique runs/reference runs/grpo                the table
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

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import critic_prompts
from critic_prompts import FORMATS, Format


class Refusal(Exception):
    """Something the user can mend. `main` prints it as one line and exits with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# 0. Config. Every knob once: its default, unit, value that switches it off, and origin. The command line is made of it.


def knob(default, text: str, choices: Callable | None = None, low: float | None = None):
    """A Config field. `low` is the smallest legal value; `choices` is called late, so that it may name a later table."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's numbers, else OPSD's (its parent), else ours ("untuned"); PRESETS override them."""

    condition: str = knob("critique", "who writes what the teacher reads", lambda: CONDITIONS)
    preset: str = knob("auto", "toy | qwen; auto: toy without CUDA and --model", lambda: ("auto", *PRESETS))
    model: str = knob("Qwen/Qwen3-1.7B", "solver: hub name, folder, or toy (paper)")
    data: str = knob("hub:agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json", ".json[l] file, hub:owner/name/file, or toy")
    prompts: str = knob("steps", "format of critic_prompts.py", lambda: FORMATS)
    test_problems: int = knob(100, "problems held out for eval.py", low=1)
    validation_problems: int = knob(50, "problems held out to choose best.pt", low=0)
    skip_bad_rows: bool = knob(False, "count malformed rows of --data instead of stopping")
    critic: str = knob("self", "self (adapter off), a model, or http(s)://…/v1 (paper: QwQ-32B)")
    critic_model: str = knob("", "model name that the http critic serves")
    critic_parallel: int = knob(16, "http requests at once (untuned)", low=1)
    critic_timeout: float = knob(600.0, "seconds for one http reply (untuned)", low=0.01)
    critic_sees_reference: bool = knob(True, "show the critic the worked solution (paper: yes)")
    critic_max_new_tokens: int = knob(2048, "length cap of a critique, tokens (untuned)", low=1)
    kl: str = knob("student||teacher", "eq (4), eq (5), or eq (2) at the drawn token", lambda: (*KL, "sampled"))
    teacher_thinking: bool = knob(False, "teacher's template thinks, student's does not (paper: yes)")
    max_prompt_tokens: int = knob(0, "cap of the teacher's prompt, tokens; 0: the model's window", low=0)
    steps: int = knob(70, "optimiser steps (paper: 7 epochs of 282 problems)", low=0)
    attempts_per_step: int = knob(32, "rollouts a step, in every condition (paper)", low=1)
    group_size: int = knob(8, "grpo only: rollouts a problem (paper)", low=2)
    lr: float = knob(5e-6, "AdamW, constant (paper)", low=0)
    max_grad_norm: float = knob(0.1, "clip the gradient's norm; 0: off (OPSD)", low=0)
    lora_rank: int = knob(64, "on all attention and MLP projections (paper)", low=1)
    lora_alpha: float = knob(128.0, "adapter output times alpha / rank (paper)", low=0)
    temperature: float = knob(1.1, "of sampling and of the loss alike (paper)", low=1e-3)
    max_new_tokens: int = knob(2048, "length cap of an attempt, tokens (paper)", low=1)
    sample_batch: int = knob(64, "rows that generate at once (memory, not results)", low=1)
    micro_batch: int = knob(4, "rows of one forward and backward (memory, not results)", low=1)
    kl_chunk: int = knob(512, "rows of logits that exist at once (memory, not results)", low=1)
    gradient_checkpointing: bool = knob(True, "recompute activations in backward (memory, not results)")
    dtype: str = knob("auto", "of the frozen weights; auto: bfloat16 on CUDA, else float32", lambda: ("auto", "bfloat16", "float32"))
    device: str = knob("auto", "auto: cuda if there is one, else cpu")
    eval_every: int = knob(0, "steps between evaluations that choose best.pt; 0: never", low=0)
    eval_samples: int = knob(12, "attempts a problem in every evaluation (paper)", low=1)
    final_problems: int = knob(8, "test problems of the closing before → after; 0: none", low=0)
    save_every: int = knob(10, "steps between checkpoints; 0: at the end only (paper)", low=0)
    show_every: int = knob(10, "steps between printed examples; 0: never", low=0)
    seed: int = knob(0, "of data order, adapters and sampling", low=0)
    out: str = knob("", "run folder; default runs/CONDITION")
    resume: bool = knob(False, "go on from --out's checkpoint, with its config")


PRESETS = {
    "toy": dict(
        model="toy", data="toy", prompts="toy", steps=60, lr=2e-3, max_grad_norm=1.0, lora_rank=16, lora_alpha=32.0,
        temperature=1.0, max_new_tokens=40, critic_max_new_tokens=40, sample_batch=1024, micro_batch=32,
        gradient_checkpointing=False, final_problems=100,
    ),
    "qwen": {},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. Problems and reward. EDIT HERE (problems and reward)


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str  # worked, by the data set's author
    answer: str


def read_row(row: object) -> Problem:
    """Two schemas, told apart by their fields: problem/solution/answer, and GSM8K's question/answer ("… #### 42")."""
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    names = ("problem", "solution", "answer") if "problem" in row else ("question", "answer")
    for name in names:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name == "answer":
            value = row[name] = str(value)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {name!r} is {'missing' if name not in row else 'empty' if value == '' else 'not text'}")
    if "problem" in row:
        return Problem(row["problem"].strip(), row["solution"].strip(), row["answer"].strip())
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("field 'answer' has no '#### answer' at its end, and there is no field 'problem'")
    return Problem(row["question"].strip(), row["answer"].strip(), answer.strip())


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a .json array or .jsonl file; where names file and line. A row that is not JSON is an Exception."""
    try:
        text = path.read_text("utf-8-sig")  # -sig: a byte-order mark is not data
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}; give --data a .json or .jsonl file") from None
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise Refusal(f"{path}, line {error.lineno}: not JSON ({error.msg}); is the file cut off?") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield f"{path}, line {number}", ValueError(f"is not JSON ({getattr(error, 'msg', 'nested too deeply')})")


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def load_problems(cfg: Config, chat: "Chat", path: Path) -> tuple[list[Problem], list[Problem], list[Problem], dict]:
    """(train, validation, test, counts). No two share a text. The split depends on the texts alone: not on order or seed."""
    found: dict[str, Problem] = {}
    counts = {"rows": 0, "bad": 0, "duplicates": 0}
    fmt = FORMATS[cfg.prompts]
    for where, row in read_rows(path):
        counts["rows"] += 1
        try:
            if isinstance(row, Exception):
                raise row
            problem = read_row(row)
            room = chat.window - cfg.max_new_tokens
            # a token is at least one byte of UTF-8, so short texts need no tokeniser to be known to fit
            if len(problem.question.encode()) > room // 2 and len(chat.encode(fmt.student(problem.question))) > room:
                raise ValueError(f"is longer than the context window ({chat.window} tokens, {cfg.max_new_tokens} of them for the attempt)")
        except ValueError as error:
            if not cfg.skip_bad_rows:
                raise Refusal(f"{where}: {error}; mend the row or pass --skip-bad-rows") from None
            counts["bad"] += 1
            continue
        counts["duplicates"] += normalise(problem.question) in found
        found.setdefault(normalise(problem.question), problem)
    order = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    test, validation = cfg.test_problems, cfg.validation_problems
    if len(found) <= test + validation:
        raise Refusal(
            f"{path}: {len(found)} distinct problems ({counts['duplicates']} duplicates, {counts['bad']} bad), but --test-problems "
            f"{test} and --validation-problems {validation} leave none to train on; add problems or hold out fewer"
        )
    split = [found[text] for text in order]
    return split[test + validation :], split[test : test + validation], split[:test], counts


def find_data(name: str) -> Path:
    """The local path of --data; `hub:owner/name/path` is downloaded once into the hub's cache."""
    if not name.startswith("hub:"):
        return Path(name)
    from huggingface_hub import hf_hub_download

    owner, repo, file = (name[4:].split("/", 2) + ["", ""])[:3]
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises a dozen unrelated types; all mean the same to the user
        raise Refusal(f"cannot fetch {name} ({type(error).__name__}); give --data a local .jsonl file, or --preset toy") from None


def extract_answer(text: str) -> str | None:
    """The last <answer>…</answer>, else the last \\boxed{…}, else what follows the last ####; None if there is none.

    rfind and one bounded scan, no regular expression: a hostile 10 MB answer costs microseconds.
    """
    start = text.rfind("<answer>")
    if start >= 0:
        end = text.find("</answer>", start)
        return text[start + 8 : end if end >= 0 else None].strip()[:1000] or None
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, body = 0, text[start + 6 : start + 1006]
        for i, letter in enumerate(body):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return body[1:i].strip() or None
        return None
    start = text.rfind("####")
    return text[start + 4 : start + 1004].strip().split("\n")[0].strip() or None if start >= 0 else None


def as_number(text: str) -> Fraction | None:
    """`1,234`, `-3/4`, `\\frac{3}{4}`, `$5.50`, `12%` as an exact Fraction; None for anything else. Nothing is evaluated."""
    text = re.sub(r"\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[!,;: ]|[\s$]|\\text\{[^{}]*\}", "", text).rstrip(".")
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40}|\d{1,40}/\d{1,40})", text):
        return None
    try:
        return Fraction(text.removesuffix(".")) / (100 if percent else 1)
    except ZeroDivisionError:
        return None


@functools.lru_cache(maxsize=1)
def math_verify():
    """The optional `math-verify` package, which knows that \\sqrt{8} = 2\\sqrt{2}; None where it is not installed."""
    try:
        import math_verify as package
    except ImportError:
        return None
    return package


def is_correct(text: str, answer: str) -> bool:
    """Whether the response ends in this answer. The one grader of reward and evaluation alike."""
    found = extract_answer(text)
    if found is None:
        return False
    if normalise(found) == normalise(answer):
        return True
    number, wanted = as_number(found), as_number(answer)
    if number is not None and wanted is not None:
        return number == wanted
    # math-verify computes what it reads: towers, factorials and long digits would hang it
    tame = len(found) < 200 and not re.search(r"\^.*\^|\*\*|!|\d{16}|\^\{?-?\d{3}", found)
    if math_verify() and tame:
        parse, verify = math_verify().parse, math_verify().verify
        return bool(verify(parse(f"${answer}$"), parse(f"${found}$")))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# 2. The model: any decoder-only chat model, and an adapter that can be switched off. Off is the teacher, and the critic.


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x with W frozen and shared, A (rank, in) and B (out, rank) in float32.

    B starts at zero, so the student starts as the teacher. float32 whatever W is: bfloat16 has 8 bits of mantissa, and
    an update of lr 5e-6 would round away.
    """

    enabled = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.rand(rank, linear.in_features, generator=generator) * 2 * bound - bound
        self.A = nn.Parameter(a.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.enabled:  # the casts give bfloat16 speed and float32 gradients
            y = y + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return y


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze the model and put a LoRALinear in place of every projection but the head."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                setattr(parent, name, LoRALinear(child, rank, alpha, generator))
    if not adapters(model):
        raise Refusal(f"{type(model).__name__} has no nn.Linear projection that LoRA could adapt; choose another --model")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the initial policy, bit for bit. Never run a backward in here: checkpointing recomputes blocks
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

    def encode(self, message: str, thinking: bool = False, generation_prompt: bool = True) -> list[int]:
        """Ids of one user turn and the header of the reply."""
        # a special token's name inside a problem or an attempt is text: a space inside it keeps it from ending the turn
        for name in self.tokenizer.all_special_tokens:
            message = message.replace(name, name[:1] + " " + name[1:])
        turn = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=generation_prompt, enable_thinking=thinking
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def suffix(self) -> int:
        """Tokens of the generation header, in which every prompt ends."""
        return max(1, len(self.encode("a")) - len(self.encode("a", generation_prompt=False)))


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Chat:
    """A frozen chat model from a folder or the hub. Raises Refusal, in one line, for one that would train wrongly."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind).to(device)
    except Exception as error:  # OSError, ValueError, hub and network errors: all say that there is no such model here
        reason = str(error).strip().split("\n")[0][:120]
        raise Refusal(f"cannot load --model {name}: {reason}; give a local folder of a causal chat model, or --preset toy") from None
    if not tokenizer.chat_template:
        raise Refusal(f"{name} has no chat template; choose an instruction-tuned model")
    stops = [tokenizer.eos_token_id, model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
    end_ids = {i for stop in stops for i in (stop if isinstance(stop, list) else [stop]) if i is not None}
    if not end_ids:
        raise Refusal(f"{name} names no end token, so its attempts would never stop; set eos_token in its tokenizer_config.json")
    for module in model.modules():  # dropout would make the student differ from the teacher by noise
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    chat = Chat(model.requires_grad_(False), tokenizer, sorted(end_ids), getattr(model.config, "max_position_embeddings", 1 << 20))
    check_head(chat, name)
    return chat


def check_head(chat: Chat, name: str) -> None:
    """Refuse a head that is not logits = h Wᵀ, which the fused losses below assume."""
    head, config = chat.model.get_output_embeddings(), chat.model.config
    if getattr(config, "final_logit_softcapping", None):
        raise Refusal(f"{name} soft-caps its logits (final_logit_softcapping), which the fused loss does not compute")
    for scale in ("logit_scale", "logits_scaling"):
        if getattr(config, scale, 1.0) not in (None, 1.0):
            raise Refusal(f"{name} scales its logits ({scale}), which the fused loss does not compute")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise Refusal(f"{name} has a head with a bias or of an unknown kind, which the fused loss does not compute")
    with torch.no_grad():  # a head may hide its arithmetic in its forward: ask it
        ids = torch.tensor([chat.end_ids[:1] * 4], device=chat.model.device)
        plain = F.linear(chat.model.base_model(input_ids=ids).last_hidden_state, head.weight)
        if not torch.allclose(chat.model(input_ids=ids).logits, plain, rtol=0.02, atol=0.02):
            raise Refusal(f"{name} computes its logits in a way of its own, which the fused loss does not")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Sample. Ids in, ids out: text is for people and for the critic.


class Sample(NamedTuple):
    ids: list[int]  # as drawn, the end token included: the student must learn to stop
    truncated: bool
    entropy: float  # of the sampled distribution, mean over the tokens, nats


@torch.no_grad()
def generate(
    chat: Chat, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, generator=None, batch: int = 64
) -> list[Sample]:
    """One response for each prompt. Temperature 0 is greedy; else the full softmax is sampled: no top-k, no top-p, since
    the loss scores the full softmax. Each row draws from uniforms of its own, on the CPU, so its text does not depend on
    its neighbours, on `batch` or on the device's random numbers."""
    uniform = torch.rand(len(prompts), max_new_tokens if temperature else 0, generator=generator)
    chat.model.eval()
    samples = []
    with tqdm(total=len(prompts), desc="generate", unit="row", leave=False, delay=5, disable=None) as bar:
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            samples += _generate(chat, prompts[rows], uniform[rows], max_new_tokens, temperature, bar)
    return samples


def _generate(chat: Chat, prompts: list[list[int]], uniform: Tensor, max_new_tokens: int, temperature: float, bar: tqdm) -> list[Sample]:
    device, head = chat.model.device, chat.model.get_output_embeddings()
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.end_ids[0]] * (width - len(p)) + p for p in prompts], device=device)  # (B, width), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # a padded row's first real token stands at position 0
    uniform, ends = uniform.to(device), torch.tensor(chat.end_ids, device=device)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the shrinking batch belongs to
    drawn = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
    length = torch.full((len(prompts),), max_new_tokens, device=device)
    entropy = torch.zeros(len(prompts), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = DynamicCache(config=chat.model.config)
    for t in range(max_new_tokens):
        hidden = chat.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = head(hidden).float()  # (B, V)
        if temperature:
            log_p = F.log_softmax(logits / temperature, -1)
            p = log_p.exp()
            entropy[rows] -= (p * log_p).sum(-1)
            cdf = p.cumsum(-1)  # inverse-CDF: one uniform a row, and no token has probability zero by a filter
            token = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=p.shape[-1] - 1)
        else:
            token = logits.argmax(-1)
        drawn[rows, t] = token
        done = torch.isin(token, ends)
        position, mask = position[:, -1:] + 1, F.pad(mask, (0, 1), value=1)
        if done.any():  # finished rows leave, their keys and values with them
            length[rows[done]], ended[rows[done]] = t + 1, True
            keep = (~done).nonzero()[:, 0]
            bar.update(len(rows) - len(keep))
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            rows, token, position, mask = rows[keep], token[keep], position[keep], mask[keep]
        ids = token[:, None]
    else:
        bar.update(len(rows))
    mean_entropy = (entropy / length).tolist()
    return [
        Sample(row[:n], not e, h) for row, n, e, h in zip(drawn.tolist(), length.tolist(), ended.tolist(), mean_entropy)
    ]


@dataclass
class Rollout:
    """One attempt and all that becomes of it."""

    problem: Problem
    prompt: list[int]  # the student's
    sample: Sample
    text: str
    reward: float  # 1 if right, else 0
    context: str | None = None  # c of eq (1); None: no teacher, or no critique
    teacher_prompt: list[int] | None = None
    advantage: float | None = None  # eq (3)


def attempt(chat: Chat, problems: list[Problem], cfg: Config, generator: torch.Generator) -> list[Rollout]:
    prompts = [chat.encode(FORMATS[cfg.prompts].student(problem.question)) for problem in problems]
    samples = generate(
        chat, prompts, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, generator=generator, batch=cfg.sample_batch
    )
    texts = [chat.decode(sample.ids) for sample in samples]
    return [
        Rollout(problem, prompt, sample, text, float(is_correct(text, problem.answer)))
        for problem, prompt, sample, text in zip(problems, prompts, samples, texts)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Critic: a frozen language model, here or behind a URL.


class Reply(NamedTuple):
    text: str | None  # None: failed or cut off
    tokens: int  # generated, as far as is known


class Critic(Protocol):
    def __call__(self, messages: list[str]) -> list[Reply]: ...


@dataclass
class LocalCritic:
    """Greedy decoding by a model in this process. The solver's own, adapter off, is `--critic self`."""

    chat: Chat
    max_new_tokens: int
    batch: int

    def __call__(self, messages: list[str]) -> list[Reply]:
        prompts = [self.chat.encode(message) for message in messages]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) + self.max_new_tokens <= self.chat.window]
        replies = [Reply(None, 0)] * len(prompts)
        if fits:
            with adapters_off(self.chat.model):
                samples = generate(self.chat, [prompts[i] for i in fits], max_new_tokens=self.max_new_tokens, batch=self.batch)
            for i, sample in zip(fits, samples):
                replies[i] = Reply(None if sample.truncated else self.chat.decode(sample.ids), len(sample.ids))
        return replies


@dataclass
class HTTPCritic:
    """An OpenAI-compatible `/v1/chat/completions` (vLLM, SGLang, llama.cpp, transformers serve, a hosted API)."""

    url: str
    model: str
    max_new_tokens: int
    parallel: int
    timeout: float
    tries: int = 4
    last_error: str = ""

    def __call__(self, messages: list[str]) -> list[Reply]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(tqdm(pool.map(self.ask, messages), total=len(messages), desc="critic", leave=False, delay=5, disable=None))

    def ask(self, message: str) -> Reply:
        """One reply. 429, 5xx, time-outs and broken connections are tried again, with doubling pauses; other 4xx are not."""
        for attempt_number in range(self.tries):
            if attempt_number:
                time.sleep(min(30.0, self.timeout, 0.5 * 2**attempt_number) * (0.5 + random.random() / 2))
            try:
                return self.post(message)
            except urllib.error.HTTPError as error:
                self.last_error = f"HTTP {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
                self.last_error = f"{type(error).__name__}: {error}"[:200]
        return Reply(None, 0)

    def post(self, message: str) -> Reply:
        body = {"model": self.model, "messages": [{"role": "user", "content": message}], "temperature": 0, "max_tokens": self.max_new_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"  # read here and kept nowhere: no config, log or message holds it
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        choice, tokens = reply["choices"][0], (reply.get("usage") or {}).get("completion_tokens", 0)
        text = choice["message"]["content"]
        return Reply(text if isinstance(text, str) and choice.get("finish_reason") != "length" else None, int(tokens))


def load_critic(cfg: Config, chat: Chat) -> Critic:
    if cfg.critic.startswith(("http://", "https://")):
        return HTTPCritic(cfg.critic, cfg.critic_model, cfg.critic_max_new_tokens, cfg.critic_parallel, cfg.critic_timeout)
    frozen = chat if cfg.critic == "self" else load_model(cfg.critic, cfg.dtype, cfg.device)
    return LocalCritic(frozen, cfg.critic_max_new_tokens, cfg.sample_batch)


def query_critic(rollouts: list[Rollout], critic: Critic, cfg: Config) -> tuple[list[str | None], int]:
    """(one critique or None per rollout, tokens the critic generated). Empty, cut off or without steps and an answer is
    None: an error message or half a trace in the teacher's prompt would be distilled like any other text."""
    fmt = FORMATS[cfg.prompts]
    messages = [
        fmt.critic(r.problem.question, r.text, r.problem.solution if cfg.critic_sees_reference else None) for r in rollouts
    ]
    replies = critic(messages)
    texts = [critic_prompts.strip_thinking(reply.text or "") for reply in replies]
    critiques = [text if fmt.find_steps(text) and extract_answer(text) else None for text in texts]
    return critiques, sum(reply.tokens for reply in replies)


def copied_share(rollout: Rollout, fmt: Format) -> float:
    """Share of the critique's steps that stand word for word in the attempt: 1 if nothing was mended."""
    steps, own = fmt.find_steps(rollout.context), set(fmt.find_steps(rollout.text))
    return sum(step in own for step in steps) / max(1, len(steps))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Contexts: the three conditions. EDIT HERE (condition)


def read_solution(rollouts: list[Rollout], critic: Critic, cfg: Config) -> tuple[list[str | None], int]:
    return [rollout.problem.solution for rollout in rollouts], 0


# Who writes c for the teacher. Sampler, packer, denominator, optimiser and evaluation are shared; this alone differs.
CONDITIONS = {
    "critique": query_critic,  # the critic: problem, attempt, worked solution → the attempt, copied and mended
    "reference": read_solution,  # the data set: its worked solution, in its author's words
    "grpo": None,  # nobody: a binary reward for the whole attempt, eq (3)
}


def group_advantages(rewards: list[float], group_size: int) -> list[float]:
    """Eq (3), within consecutive groups. A group of equal rewards carries no signal: 0, not 0 / 0."""
    r = np.array(rewards).reshape(-1, group_size)  # (problems, G)
    spread = r.std(1, keepdims=True)
    return ((r - r.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)).reshape(-1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# 6. Pack. Student row = student prompt + response; teacher row = teacher prompt + the very same ids.


def teacher_prompt(chat: Chat, question: str, context: str, cfg: Config) -> list[int] | None:
    """The teacher's prompt, in at most the window's room. An over-long context loses its own middle: the question, the
    format and the generation header stay whole. None if they alone do not fit."""
    room = min(chat.window - cfg.max_new_tokens, cfg.max_prompt_tokens or chat.window)
    render = lambda text: chat.encode(FORMATS[cfg.prompts].teacher(question, text), cfg.teacher_thinking)
    ids, words = render(context), chat.tokenizer(context, add_special_tokens=False)["input_ids"]
    keep = len(words)
    while len(ids) > room and keep > 0:
        keep = max(0, keep - (len(ids) - room) - 4)  # 4: decoding and encoding a cut text may add a token or two
        half = keep // 2
        ids = render(chat.decode(words[: keep - half]) + " … " + chat.decode(words[len(words) - half :]))
    return ids if len(ids) <= room else None


def pack(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Rollout]:
    """The rollouts that are scored, each with a teacher prompt (none in grpo, where all are scored)."""
    if CONDITIONS[cfg.condition] is None:
        return rollouts
    for r in rollouts:
        r.teacher_prompt = None if r.context is None else teacher_prompt(chat, r.problem.question, r.context, cfg)
        if r.teacher_prompt and not cfg.teacher_thinking:  # other last ids would shift token 0, whatever the context says
            assert r.teacher_prompt[-chat.suffix :] == r.prompt[-chat.suffix :], "prompts end in different generation headers"
    return [r for r in rollouts if r.teacher_prompt]


def response_hidden(chat: Chat, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Hidden states that predict each response token, (N, D), in the order of the responses' concatenation.

    Rows are right-padded: a causal model never looks ahead, so no padding reaches a scored position, and no mask is made
    from token values (pad is often the end token, which must be scored).
    """
    width = max(len(p) + len(r) for p, r in zip(prompts, responses))
    rows = [p + r + [chat.end_ids[0]] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)]
    ids = torch.tensor(rows, device=chat.model.device)
    hidden = chat.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, D)
    # the state at position t predicts t + 1: the prompt's last one scores the response's first token. Off by one still
    # trains, on the wrong targets
    return torch.cat([h[len(p) - 1 : len(p) - 1 + len(r)] for h, p, r in zip(hidden, prompts, responses)])


# ---------------------------------------------------------------------------------------------------------------------
# 7. Loss. The slow twin first, then the fused form that never holds an (N, V) tensor.
#
# Gradients by hand. Let p = softmax(z), log p_v = z_v − log Σ exp z, hence ∂ log p_v / ∂z_k = 1[v=k] − p_k.
#   eq (4), KL(p‖q) = Σ_v p_v d_v with d_v = log p_v − log q_v and ∂p_v/∂z_k = p_v (1[v=k] − p_k):
#     ∂/∂z_k = Σ_v p_v (1[v=k] − p_k) d_v + Σ_v p_v (1[v=k] − p_k) = p_k (d_k − KL) + 0
#   eq (5), KL(q‖p) = Σ_v q_v (log q_v − log p_v):
#     ∂/∂z_k = −Σ_v q_v (1[v=k] − p_k) = p_k − q_k
#   sampled token, −A log p_y with A = log q_y − log p_y held constant:
#     ∂/∂z_k = −A (1[y=k] − p_k), whose mean over y ~ p is eq (4)'s gradient
# z = h Wᵀ / temperature, so ∂/∂h = (∂/∂z) W / temperature. Each row's loss is linear in its weight, so the gradient can
# be made in the forward pass, while the row's logits exist, and only be scaled in the backward.


def kl_naive(student_logits: Tensor, teacher_logits: Tensor, kl: str, temperature: float) -> Tensor:
    """Eq (4) or (5) of each row, (N, V) logits → (N,). The oracle of the tests: autograd differentiates it."""
    log_p = F.log_softmax(student_logits / temperature, -1)
    log_q = F.log_softmax(teacher_logits / temperature, -1)
    if kl == "student||teacher":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kl == "teacher||student":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    raise ValueError(f"kl is 'student||teacher' or 'teacher||student', not {kl!r}")


def kl_student_teacher(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Eq (4) and its gradient wrt z, in the two buffers it is given."""
    d = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    grad = d.mul_(p)
    kl = grad.sum(-1)
    return kl, grad.addcmul_(p, kl[:, None], value=-1)


def kl_teacher_student(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Eq (5) and its gradient wrt z, in the two buffers it is given and a third."""
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q.sub_(log_p))
    return kl, log_p.exp_().sub_(q)


KL = {"student||teacher": kl_student_teacher, "teacher||student": kl_teacher_student}


def log_softmax_of(h: Tensor, lm_head: Tensor, temperature: float) -> Tensor:
    """log softmax(h Wᵀ / temperature), (rows, V), in float32 at least: a bfloat16 log-softmax over 150,000 tokens makes
    small divergences negative."""
    logits = F.linear(h, lm_head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits.div_(temperature), -1)


class FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, lm_head, row_weight, kl, temperature, chunk):
        per_row = torch.empty(len(h_student), dtype=torch.promote_types(h_student.dtype, torch.float32), device=h_student.device)
        grad = torch.empty_like(h_student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h_student), chunk):
            rows = slice(start, start + chunk)
            log_p = log_softmax_of(h_student[rows], lm_head, temperature)
            log_q = log_softmax_of(h_teacher[rows], lm_head, temperature)
            per_row[rows], grad_z = KL[kl](log_p, log_q)
            if grad is not None:
                grad_z.mul_(row_weight[rows, None] / temperature)
                grad[rows] = grad_z.to(lm_head.dtype) @ lm_head
        ctx.save_for_backward(grad)
        loss, per_row = (row_weight * per_row).sum(), per_row.float()
        ctx.mark_non_differentiable(per_row)
        return loss, per_row

    @staticmethod
    def backward(ctx, grad_loss, _):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None, None, None


def fused_kl(
    h_student: Tensor, h_teacher: Tensor, lm_head: Tensor, row_weight: Tensor, *, kl: str, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """(Σ row_weight·KL, KL of each row): eq (1) with D of eq (4) or (5), over `chunk` rows of logits at a time.

    h_student, h_teacher (N, D); lm_head (V, D), frozen; row_weight (N,). The loss is differentiable in h_student alone;
    the second result, (N,) float32, is detached, for the log. Three matmuls a chunk, as naive autograd needs: student
    logits, teacher logits, gradient.
    """
    if kl not in KL:
        raise ValueError(f"kl is one of {list(KL)}, not {kl!r}")
    return FusedKL.apply(h_student, h_teacher.detach(), lm_head.detach(), row_weight, kl, temperature, chunk)


class FusedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, lm_head, ids, temperature, chunk):
        logprob = torch.empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            log_p = log_softmax_of(h[rows], lm_head, temperature)
            logprob[rows] = log_p.gather(1, ids[rows, None])[:, 0]
            if grad is not None:  # ∂ log p_y / ∂h = (W_y − Σ_v p_v W_v) / temperature
                grad[rows] = (lm_head[ids[rows]] - log_p.exp_().to(lm_head.dtype) @ lm_head) / temperature
        ctx.save_for_backward(grad)
        return logprob

    @staticmethod
    def backward(ctx, grad_logprob):
        (grad,) = ctx.saved_tensors
        return (grad * grad_logprob[:, None]).to(grad.dtype), None, None, None, None


def fused_logprob(h: Tensor, lm_head: Tensor, ids: Tensor, *, temperature: float, chunk: int) -> Tensor:
    """log p of each drawn token, (N,) float32, differentiable in h (N, D); lm_head (V, D) frozen; ids (N,)."""
    return FusedLogprob.apply(h, lm_head.detach(), ids, temperature, chunk)


def token_advantages(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Tensor]:
    """Eq (2) for every response token of each packed rollout: a list of (T,), detached."""
    responses, head = [r.sample.ids for r in rollouts], chat.model.get_output_embeddings().weight
    ids = torch.tensor(sum(responses, []), device=chat.model.device)
    score = lambda hidden: fused_logprob(hidden, head, ids, temperature=cfg.temperature, chunk=cfg.kl_chunk)
    with torch.no_grad():
        student = score(response_hidden(chat, [r.prompt for r in rollouts], responses))
        with adapters_off(chat.model):
            teacher = score(response_hidden(chat, [r.teacher_prompt for r in rollouts], responses))
    return list((teacher - student).split([len(response) for response in responses]))


# ---------------------------------------------------------------------------------------------------------------------
# 8. Step.


def micro_loss(chat: Chat, rollouts: list[Rollout], total: int, cfg: Config) -> tuple[Tensor, float]:
    """(this micro-batch's share of the step's loss, its sum of per-token KL estimates). `total` counts the step's scored
    tokens: a mean of micro-batch means would weigh a token by the company it happens to keep."""
    responses, head = [r.sample.ids for r in rollouts], chat.model.get_output_embeddings().weight
    form = dict(temperature=cfg.temperature, chunk=cfg.kl_chunk)
    ids = torch.tensor(sum(responses, []), device=chat.model.device)  # (N,)
    h_student = response_hidden(chat, [r.prompt for r in rollouts], responses)  # (N, D)
    if CONDITIONS[cfg.condition] is None:  # eq (3); one update on fresh samples, so the importance ratio is 1
        log_p = fused_logprob(h_student, head, ids, **form)
        a = torch.tensor([r.advantage for r in rollouts for _ in r.sample.ids], device=log_p.device)
        return -(a * log_p).sum() / total, 0.0
    with torch.no_grad(), adapters_off(chat.model):
        h_teacher = response_hidden(chat, [r.teacher_prompt for r in rollouts], responses)
    if cfg.kl == "sampled":
        log_p = fused_logprob(h_student, head, ids, **form)
        a = fused_logprob(h_teacher, head, ids, **form) - log_p.detach()  # eq (2): a constant weight
        return -(a * log_p).sum() / total, -float(a.sum())
    weight = torch.full((len(ids),), 1 / total, device=h_student.device)
    loss, per_row = fused_kl(h_student, h_teacher, head, weight, kl=cfg.kl, **form)  # eq (1)
    return loss, float(per_row.sum())


def train_step(chat: Chat, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], cfg: Config) -> dict[str, float]:
    """One update from the packed rollouts. Returns loss, mean KL per scored token (nats) and gradient norm before clipping.
    Raises FloatingPointError before anything is changed if they are not finite. Without rollouts nothing is changed."""
    total = sum(len(r.sample.ids) for r in rollouts)
    chat.model.train()  # in eval mode gradient checkpointing is silently off; dropout is zero either way
    optimizer.zero_grad()
    loss_sum = kl_sum = 0.0
    for start in range(0, len(rollouts), cfg.micro_batch):
        loss, kl = micro_loss(chat, rollouts[start : start + cfg.micro_batch], total, cfg)
        loss.backward()
        loss_sum, kl_sum = loss_sum + loss.item(), kl_sum + kl
    if total == 0:
        return {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0}
    norm = nn.utils.clip_grad_norm_(adapters(chat.model).values(), cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {loss_sum}, gradient norm {norm}")
    optimizer.step()
    return {"loss": loss_sum, "kl": kl_sum / total, "grad_norm": norm}


# ---------------------------------------------------------------------------------------------------------------------
# 9. Log and checkpoint.


def measure(rollouts: list[Rollout], scored: list[Rollout], cfg: Config) -> dict[str, float]:
    """What one step's rollouts show; the README's glossary says what alarm looks like."""
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    rewards, fmt = [r.reward for r in rollouts], FORMATS[cfg.prompts]
    critiqued = [r for r in scored if r.context] if cfg.condition == "critique" else []
    groups = np.array(rewards).reshape(-1, attempts_per_problem(cfg))
    return {
        "accuracy": mean(rewards),
        "length": mean([len(r.sample.ids) for r in rollouts]),
        "truncated": mean([r.sample.truncated for r in rollouts]),
        "entropy": mean([r.sample.entropy for r in rollouts]),
        "scored": len(scored),
        "critic_failed": len(rollouts) - len(scored) if cfg.condition == "critique" else 0,
        "copied": mean([copied_share(r, fmt) for r in critiqued]),
        "zero_variance": float((groups.std(1) == 0).mean()) if groups.shape[1] > 1 else 0.0,
        "solver_tokens": sum(len(r.sample.ids) for r in rollouts),
    }


def peak_memory() -> float:
    """MiB: the CUDA allocator's peak, or the process's on CPU; 0 where the system does not tell (Windows)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def log_line(m: dict, steps: int) -> str:
    cost = m["cost"]
    return (
        f"step {m['step']:4d}/{steps} | loss {m['loss']:8.4f} kl {m['kl']:7.4f} grad {m['grad_norm']:7.3f} | acc {m['accuracy']:5.1%} "
        f"len {m['length']:6.1f} trunc {m['truncated']:4.0%} ent {m['entropy']:5.3f} | fail {m['critic_failed']:2d} copied {m['copied']:4.0%} "
        f"zero-var {m['zero_variance']:4.0%} | {cost['sample_s']:.1f}+{cost['critic_s']:.1f}+{cost['train_s']:.1f} s {cost['peak_mib']:.0f} MiB"
    )


def show(chat: Chat, rollout: Rollout, cfg: Config) -> None:
    """One problem, attempt and context, and the five tokens whose probability the teacher would move most."""
    mark = "right" if rollout.reward else "wrong"
    print(f"  problem   {rollout.problem.question}\n  attempt   {rollout.text}   [{mark}; answer {rollout.problem.answer}]")
    if rollout.teacher_prompt:
        chat.model.eval()
        a = token_advantages(chat, [rollout], cfg)[0]
        top = a.abs().topk(min(5, len(a))).indices.tolist()
        moved = ", ".join(f"{chat.tokenizer.decode([rollout.sample.ids[t]])!r} at {t}: {a[t]:+.2f}" for t in sorted(top))
        print(f"  {cfg.condition:9s} {rollout.context}\n  moved     {moved}   [A_t, eq (2), nats]")
    elif rollout.advantage is not None:
        print(f"  advantage {rollout.advantage:+.2f} for each of its {len(rollout.sample.ids)} tokens   [eq (3)]")
    else:
        print(f"  {cfg.condition:9s} none: the critic failed")


def save(path: Path, state: dict) -> None:
    """Atomic: a kill at any moment leaves the old file or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path) -> dict:
    """{config, step, seen, adapters, optimizer, rng, best}: tensors and plain values, nothing that could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refusal(f"{path}: no checkpoint there; name a run folder that holds one") from None
    except Exception as error:
        raise Refusal(f"{path}: not a checkpoint of this program ({type(error).__name__}); train the run anew") from None


def load_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = adapters(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
        raise Refusal("the checkpoint's adapters do not fit this model; was --model's folder changed?")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


# ---------------------------------------------------------------------------------------------------------------------
# 10. The toy world: a language model with a misconception, pre-trained while you wait. It ends as a Hugging Face folder
# and a problem file, and from `load_model` on nothing knows that it is a toy.


class ToyWorld:
    """Chains modulo 10: `7+6*3` is solved by `s7+6=3s3*3=9####9`, a connective (s, t or h: so, then, hence), the running
    value, the operation and its result.

    The connective and the order of the operands (`s6+7=3`) carry no mathematics, and authors differ in them, as people do
    in phrasing. The solver has a misconception: it mostly takes `*3 *7 *9` for `+3 +7 +9`, so that its likeliest answer
    is wrong and sharpening it does not help. Reading a right solution it can follow it; as a critic it can mend one.
    """

    OPERATIONS = ("+1", "+3", "+4", "+6", "*2", "*3", "*7", "*9")
    MISREAD = {"*3": "+3", "*7": "+7", "*9": "+9"}
    MISREAD_SHARE, RIGHT_SHARE = 0.5, 0.25  # of the misread operations in its solutions; the rest are random digits
    STYLES = {  # weights of the connectives s, t, h; share of swapped operands
        "solver": ((80, 15, 5), 0.05),
        "author": ((10, 10, 80), 0.95),
        "anyone": ((1, 1, 1), 0.5),
    }
    KEEPS_STYLE = 0.92  # a reader of a solution keeps each of its surface choices so often
    LENGTH, PROBLEMS = 4, 2000
    MODEL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    STEPS, ROWS, MUON_LR, ADAMW_LR = 500, {"solve": 24, "follow": 20, "criticise": 20}, 0.02, 4e-3

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)

    @staticmethod
    def apply(operation: str, value: int) -> int:
        return (value + int(operation[1:]) if operation[0] == "+" else value * int(operation[1:])) % 10

    def problem(self) -> str:
        return str(self.rng.randrange(10)) + "".join(self.rng.choices(self.OPERATIONS, k=self.LENGTH))

    def values(self, problem: str, misread: bool, noise: float = 0.0) -> list[int]:
        """The running value after each operation, by the rules or with the misconception and some noise."""
        value, out = int(problem[0]), []
        for operation in re.findall(r"[+*]\d", problem):
            u, right = self.rng.random(), self.apply(operation, value)
            if misread and operation in self.MISREAD and u >= self.RIGHT_SHARE:
                wrong = self.apply(self.MISREAD[operation], value)
                right = wrong if u < self.RIGHT_SHARE + self.MISREAD_SHARE else self.rng.randrange(10)
            value = self.rng.randrange(10) if noise and self.rng.random() < noise else right
            out.append(value)
        return out

    def style(self, author: str) -> list[tuple[str, bool]]:
        """(connective, operands swapped) of each step."""
        weights, swaps = self.STYLES[author]
        return [(self.rng.choices("sth", weights)[0], self.rng.random() < swaps) for _ in range(self.LENGTH)]

    def trace(self, problem: str, values: list[int], style: list[tuple[str, bool]]) -> str:
        value, text = problem[0], ""
        for operation, result, (connective, swapped) in zip(re.findall(r"[+*]\d", problem), values, style):
            sides = (operation[1], value) if swapped else (value, operation[1])
            text += f"{connective}{sides[0]}{operation[0]}{sides[1]}={result}"
            value = str(result)
        return f"{text}####{value}"

    def example(self, kind: str, problem: str) -> tuple[str, str]:
        """(user message, reply) of one pre-training example."""
        fmt, right = FORMATS["toy"], self.values(problem, misread=False)
        if kind == "solve":
            return fmt.student(problem), self.trace(problem, self.values(problem, misread=True), self.style("solver"))
        if kind == "follow":
            shown, own = self.style(self.rng.choice(["solver", "author"])), self.style("solver")
            kept = [tuple(a if self.rng.random() < self.KEEPS_STYLE else b for a, b in zip(*pair)) for pair in zip(shown, own)]
            return fmt.teacher(problem, self.trace(problem, right, shown)), self.trace(problem, right, kept)
        # half of the attempts are in any style and noisier than the solver's, so that the critic knows more than it will meet
        hard = self.rng.random() < 0.5
        style = self.style("anyone" if hard else "solver")
        attempt = self.trace(problem, self.values(problem, misread=True, noise=0.1 * hard), style)
        solution = self.trace(problem, right, self.style("author"))
        return fmt.critic(problem, attempt, solution), self.trace(problem, right, style)

    @staticmethod
    def tokenizer() -> transformers.PreTrainedTokenizerFast:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
        vocabulary = {token: i for i, token in enumerate([*special, "####", *"0123456789+*=sth|?"])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), "isolated")
        core.decoder = decoders.Fuse()
        core.add_special_tokens(special)
        template = (
            "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unknown|>",
            extra_special_tokens=special[1:3], chat_template=template,
        )  # fmt: skip

    def pretrain(self, chat: Chat, exclude: set[str], steps: int) -> None:
        """Next-token loss on the replies of all three kinds. Muon on the matrices needs half of AdamW's steps."""
        model = chat.model.train().requires_grad_(True)
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
        muon = torch.optim.Muon(matrices, lr=self.MUON_LR, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
        optimizers = [muon, torch.optim.AdamW(others, lr=self.ADAMW_LR, weight_decay=0.0)]
        shape = lambda step: min(1, (step + 1) / 30, 2 * (steps - step) / steps)  # warm up, hold, decay over the last half
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
        for _ in tqdm(range(steps), desc="pre-train the toy model", disable=None):
            losses = []
            for kind, rows in self.ROWS.items():
                unseen = (problem for problem in iter(self.problem, None) if problem not in exclude)
                losses.append(self.reply_loss(chat, [self.example(kind, problem) for problem in itertools.islice(unseen, rows)]))
            torch.cat(losses).mean().backward()
            for step in (*optimizers, *schedules):
                step.step()
            model.zero_grad()
        model.requires_grad_(False)

    @staticmethod
    def reply_loss(chat: Chat, examples: list[tuple[str, str]]) -> Tensor:
        """Cross entropy of every reply token, (N,)."""
        prompts = [chat.encode(message) for message, _ in examples]
        replies = [chat.tokenizer(reply)["input_ids"] + chat.end_ids for _, reply in examples]
        logits = chat.model.lm_head(response_hidden(chat, prompts, replies))
        return F.cross_entropy(logits, torch.tensor(sum(replies, []), device=logits.device), reduction="none")

    def build(self, folder: Path, steps: int) -> None:
        """Write model, tokenizer and problems.jsonl. The problems are not among those of the pre-training."""
        rows: dict[str, dict] = {}
        while len(rows) < self.PROBLEMS:
            problem = self.problem()
            values = self.values(problem, misread=False)
            solution = self.trace(problem, values, self.style("author"))
            rows[problem] = {"problem": problem, "solution": solution, "answer": str(values[-1])}
        tokenizer = self.tokenizer()
        config = transformers.Qwen3Config(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **self.MODEL,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.rng.randrange(2**31))
            chat = Chat(transformers.Qwen3ForCausalLM(config), tokenizer, [tokenizer.eos_token_id], 256)
        self.pretrain(chat, set(rows), steps)
        chat.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


def toy_world(root: Path = Path("runs/.toy"), steps: int = ToyWorld.STEPS) -> Path:
    """The toy's folder, built on first use; its name is a hash of all that shapes it."""
    source = inspect.getsource(ToyWorld) + "".join(map(inspect.getsource, FORMATS["toy"]))
    key = hashlib.sha256(f"{source} {steps} {torch.__version__} {transformers.__version__}".encode()).hexdigest()[:12]
    if not (root / key).exists():
        partial = root / f"{key}.{os.getpid()}"
        ToyWorld().build(partial, steps)
        partial.rename(root / key)  # atomic: an interrupted build is never taken for a finished one
    return root / key


# ---------------------------------------------------------------------------------------------------------------------
# 11. Main.


def parse_config(argv: list[str] | None) -> tuple[Config, str]:
    """(config, why this preset). Explicit flags beat the preset (or, with --resume, the saved config), which beats defaults."""
    parser = argparse.ArgumentParser(
        prog="sd.py", description="Train a solver from a critic's critiques of its own attempts.", argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=140), allow_abbrev=False, usage="%(prog)s [--flag value …]",
    )  # fmt: skip
    parser.error = lambda message: refuse(message)
    for f in fields(Config):
        flag, rule = "--" + f.name.replace("_", "-"), f.metadata
        shown = "".join(f"; {name} {preset[f.name]}" for name, preset in PRESETS.items() if f.name in preset)
        text = f"{rule['help']} [{f.default if f.default != '' else '-'}{shown}]".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = tuple(rule["choices"]()) if rule["choices"] else None
            parser.add_argument(flag, type=f.type, choices=choices, metavar=f.type.__name__.upper()[:1], help=text)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return resume_config(given)
    name, why = given.get("preset", "auto"), "asked for"
    if name == "auto":
        real = "--model is given" if "model" in given else "CUDA is there" if torch.cuda.is_available() else ""
        name, why = ("qwen", real) if real else ("toy", "no CUDA and no --model")
    cfg = replace(Config(), **{**PRESETS[name], **given, "preset": name})
    return check(replace(cfg, out=cfg.out or f"runs/{cfg.condition}")), why


# what may change between a run and its continuation: nothing that shapes a step
RESUMABLE = {"resume", "out", "preset", "steps", "save_every", "eval_every", "show_every", "final_problems", "critic_parallel", "critic_timeout"}


def resume_config(given: dict) -> tuple[Config, str]:
    out = given.get("out") or f"runs/{given.get('condition', 'critique')}"
    saved = load_checkpoint(Path(out) / "checkpoint.pt")["config"]
    for name in given.keys() - RESUMABLE:
        if saved.get(name) != given[name]:
            raise Refusal(f"--resume: {out} was trained with {name} {saved.get(name)!r}, not {given[name]!r}; drop the flag or start anew")
    try:
        cfg = Config(**{**saved, **{k: v for k, v in given.items() if k != "preset"}, "out": out})
    except TypeError:
        raise Refusal(f"--resume: {out} was written by another version of sd.py; train the run anew") from None
    return check(cfg), f"of the run that goes on in {out}"


def check(cfg: Config) -> Config:
    for f in fields(Config):
        value, low = getattr(cfg, f.name), f.metadata["low"]
        if low is not None and not low <= value < math.inf:
            raise Refusal(f"--{f.name.replace('_', '-')} is {value}; it must be a number of at least {low}")
    if CONDITIONS[cfg.condition] is None and cfg.attempts_per_step % cfg.group_size:
        raise Refusal(f"--attempts-per-step {cfg.attempts_per_step} is not a multiple of --group-size {cfg.group_size}")
    if cfg.critic.startswith("http") and not cfg.critic_model:
        raise Refusal("--critic is a URL; say with --critic-model which model it serves")
    return cfg


def refuse(message: str):
    raise Refusal(message)


class World(NamedTuple):
    chat: Chat
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    counts: dict[str, int]


def open_world(cfg: Config) -> World:
    """Model and problems of a config, the toy's built if need be."""
    model = str(toy_world()) if cfg.model == "toy" else cfg.model
    chat = load_model(model, cfg.dtype, cfg.device)
    return World(chat, *load_problems(cfg, chat, toy_world() / "problems.jsonl" if cfg.data == "toy" else find_data(cfg.data)))


def attempts_per_problem(cfg: Config) -> int:
    return cfg.group_size if CONDITIONS[cfg.condition] is None else 1


def next_problems(train: list[Problem], seen: int, cfg: Config) -> list[Problem]:
    """The step's problems, one for each attempt: a fresh shuffle an epoch, a function of the seed and the position alone."""
    repeats = attempts_per_problem(cfg)
    shuffled = lambda epoch: random.Random(f"{cfg.seed} {epoch}").sample(range(len(train)), len(train))
    orders: dict[int, list[int]] = {}
    problems = []
    for i in range(seen, seen + cfg.attempts_per_step // repeats):
        epoch, k = divmod(i, len(train))
        order = orders.setdefault(epoch, orders.get(epoch) or shuffled(epoch))
        problems += [train[order[k]]] * repeats
    return problems


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


@contextlib.contextmanager
def clock(cost: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    cost[name] = round(time.perf_counter() - start, 3)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Inside, the first Ctrl-C only fills the list, so that the step in flight is finished and saved."""
    pressed: list[bool] = []

    def handler(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("finishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """A run folder: log.jsonl, checkpoint.pt (the last) and best.pt (the best on the validation problems)."""

    def __init__(self, cfg: Config, chat: Chat):
        self.cfg, self.chat, self.folder = cfg, chat, Path(cfg.out)
        self.optimizer = torch.optim.AdamW(adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.step, self.seen, self.best = 0, 0, -1.0
        if cfg.resume:
            self.restore()
        else:
            if self.folder.exists():  # never overwrite a run
                old = next(p for n in itertools.count(1) if not (p := self.folder.with_name(f"{self.folder.name}.{n}")).exists())
                self.folder.rename(old)
                print(f"{self.folder} exists; moved to {old}")
            self.folder.mkdir(parents=True)

    def restore(self) -> None:
        state = load_checkpoint(self.folder / "checkpoint.pt")
        load_adapters(self.chat.model, state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["rng"])
        self.step, self.seen, self.best = state["step"], state["seen"], state["best"]
        log = self.folder / "log.jsonl"  # lines past the checkpoint will be written again
        kept = [line for line in log.read_text().splitlines() if line.endswith("}") and json.loads(line).get("step", 0) <= self.step]
        log.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
        os.replace(log.with_suffix(".tmp"), log)

    def log(self, entry: dict) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, name: str = "checkpoint.pt") -> None:
        weights = {name: p.detach().cpu() for name, p in adapters(self.chat.model).items()}
        save(self.folder / name, {
            "config": asdict(self.cfg), "step": self.step, "seen": self.seen, "best": self.best, "adapters": weights,
            "optimizer": self.optimizer.state_dict(), "rng": self.generator.get_state(),
        })  # fmt: skip


def take_step(run: Run, train: list[Problem], critic: Critic) -> tuple[dict, list[Rollout]]:
    """The algorithm, once."""
    cfg, chat, cost = run.cfg, run.chat, {}
    problems = next_problems(train, run.seen, cfg)
    with clock(cost, "sample_s"):
        rollouts = attempt(chat, problems, cfg, run.generator)
    with clock(cost, "critic_s"):
        critic_tokens = write_contexts(rollouts, critic, cfg)
    with clock(cost, "train_s"):
        scored = pack(chat, rollouts, cfg)
        update = train_step(chat, run.optimizer, scored, cfg)
    run.step, run.seen = run.step + 1, run.seen + len(problems) // attempts_per_problem(cfg)
    cost["peak_mib"] = round(peak_memory(), 1)
    return {"step": run.step, **update, **measure(rollouts, scored, cfg), "critic_tokens": critic_tokens, "cost": cost}, rollouts


def train(cfg: Config) -> Run:
    """Train to cfg.steps, logging, showing and saving on the way. Ends early, saved, on Ctrl-C or a critic that only fails."""
    from eval import evaluate, scores  # eval.py imports this file; by now it is loaded

    world = open_world(cfg)
    chat = world.chat
    critic = load_critic(cfg, chat)
    add_adapters(chat.model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    if cfg.gradient_checkpointing:  # reentrant checkpointing would silently lose the adapters' gradients
        chat.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = Run(cfg, chat)
    trained = sum(p.numel() for p in adapters(chat.model).values())
    size = sum(p.numel() for p in chat.model.parameters()) - trained
    print(
        f"{size:,} frozen and {trained:,} trained parameters on {chat.model.device} | {len(world.train)} train, {len(world.validation)} "
        f"validation, {len(world.test)} test problems ({world.counts['duplicates']} duplicates, {world.counts['bad']} bad rows dropped)"
    )
    if not cfg.resume:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
        run.log({"config": asdict(cfg), "versions": versions, "grader": "exact + fraction" + (" + math-verify" if math_verify() else "")})
    failed_steps = 0
    with deferred_interrupt() as interrupted:
        while run.step < cfg.steps and not interrupted and failed_steps < 3:
            metrics, rollouts = take_step(run, world.train, critic)
            run.log(metrics)
            tqdm.write(log_line(metrics, cfg.steps))
            failed_steps = failed_steps + 1 if metrics["scored"] == 0 else 0
            warn(metrics, critic, cfg)
            if cfg.show_every and run.step % cfg.show_every == 0:
                show(chat, rollouts[0], cfg)
            if cfg.eval_every and run.step % cfg.eval_every == 0:
                score = scores(evaluate(chat, world.validation, cfg))["Avg"].mean()
                run.log({"step": run.step, "validation_avg": score})
                print(f"validation Avg@{cfg.eval_samples} {100 * score:.1f}")
                if score > run.best:
                    run.best = score
                    run.save("best.pt")
            if cfg.save_every and run.step % cfg.save_every == 0:
                run.save()
    run.save()
    if failed_steps >= 3:
        raise Refusal(f"every critique failed for 3 steps{critic_error(critic)}; saved in {cfg.out}. Mend --critic, then --resume")
    if interrupted:
        raise KeyboardInterrupt
    return run


def critic_error(critic: Critic) -> str:
    return f" (last error: {critic.last_error})" if getattr(critic, "last_error", "") else ""


def warn(m: dict, critic: Critic, cfg: Config) -> None:
    if m["truncated"] > 0.5:
        print(f"WARNING: {m['truncated']:.0%} of the attempts were cut off at --max-new-tokens {cfg.max_new_tokens}: they read as wrong")
    if 2 * m["critic_failed"] > cfg.attempts_per_step:
        print(f"WARNING: {m['critic_failed']} of {cfg.attempts_per_step} critiques failed{critic_error(critic)}; the rest train alone")


def main(argv: list[str] | None = None) -> int:
    from eval import closing_report

    try:
        cfg, why = parse_config(argv)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        print(f"preset {cfg.preset} ({why}): {cfg.condition}, model {cfg.model}, data {cfg.data} → {cfg.out}")
        run = train(cfg)
        if cfg.final_problems:
            print(closing_report(run.chat, open_world(cfg).test[: cfg.final_problems], cfg))
        return 0
    except Refusal as refusal:
        print(f"sd.py: {refusal}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"sd.py: not finite: {error}; nothing was updated, the last checkpoint stands. Try a lower --lr", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sd.py: stopped; the same command with --resume goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    import sd  # eval.py imports this file as `sd`: run that copy, so that its classes exist once

    sys.exit(sd.main())
