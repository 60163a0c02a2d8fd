"""Self-distillation from critique, the method of arXiv 2606.11173 in one file.

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
Prompts are in critic_prompts.py; runs are compared in eval.py.

  python sd.py --condition critique                              no GPU, no hub: a toy world, in a minute or two
  python sd.py --condition critique --model Qwen/Qwen3-1.7B --data problems.jsonl
  python eval.py runs/critique runs/reference runs/grpo          the table
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from critic_prompts import FORMATS, STYLES, extract_answer, first_edit, normalise, strip_thinking, user


# ---- 0. Config: every knob, once. The command line is generated from it. -----------------------------------

def knob(default, text: str, choices: Callable = lambda: None, low: float | None = None):
    """A Config field. `low`: the smallest legal value. `choices` is called late: it may name a later table."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's, else those of OPSD (its parent), else ours ("untuned"). PRESETS override them."""

    condition: str = knob("critique", "who writes what the teacher reads", lambda: CONDITIONS)
    preset: str = knob("auto", "auto is toy without CUDA and --model", lambda: ("auto", *PRESETS))
    model: str = knob("Qwen/Qwen3-1.7B", "the solver: hub name or folder (paper)")
    data: str = knob("hub:agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json", ".json[l] or hub:…")
    prompts: str = knob("steps", "format in critic_prompts.py", lambda: FORMATS)
    test_problems: int = knob(100, "problems held out for eval.py", low=1)
    validation_problems: int = knob(50, "problems held out to choose best.pt", low=0)
    skip_bad_rows: bool = knob(False, "count malformed rows of --data instead of stopping")
    critic: str = knob("self", "self (adapter off), a model, or http(s)://…/v1[,…] (paper: QwQ-32B)")
    critic_model: str = knob("", "name of the model behind an http critic")
    critic_sees_reference: bool = knob(True, "show the critic the worked solution (paper: yes)")
    critic_style: str = knob("copy", "copy and mend, quote the error, or omit what is right", lambda: STYLES)
    critic_max_new_tokens: int = knob(0, "cap of a critique, tokens; 0: twice an attempt's (untuned)", low=0)
    critic_parallel: int = knob(16, "http requests at once (untuned)", low=1)
    critic_timeout: float = knob(600.0, "seconds for one http reply (untuned)", low=0.01)
    kl: str = knob("student||teacher", "eq (4), eq (5), or eq (2) at the drawn token", lambda: [k for k in LOSSES if k != "grpo"])
    stop_at_first_edit: bool = knob(False, "critique only: score no token past the first mended one (ours)")
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
    dtype: str = knob("auto", "of frozen weights; auto: bfloat16 on CUDA", lambda: ("auto", "bfloat16", "float16", "float32"))
    device: str = knob("auto", "auto: cuda if there is one, else cpu")
    eval_every: int = knob(0, "steps between evaluations that choose best.pt; 0: never", low=0)
    patience: int = knob(0, "evaluations in a row without a new best that end the run; 0: off", low=0)
    eval_samples: int = knob(12, "attempts a problem in every evaluation (paper)", low=1)
    final_problems: int = knob(8, "test problems of the closing before → after; 0: none", low=0)
    save_every: int = knob(10, "steps between checkpoints; 0: only the last (paper)", low=0)
    show_every: int = knob(10, "steps between printed examples; 0: never", low=0)
    export: bool = knob(True, "at the end, write OUT/model: adapters merged, for from_pretrained")
    seed: int = knob(0, "of data order, adapters and sampling", low=0)
    out: str = knob("", "run folder; empty: runs/CONDITION")
    resume: bool = knob(False, "go on from OUT's checkpoint, with its config")

    teacher = property(lambda cfg: CONDITIONS[cfg.condition] is not None)  # is there one?
    asks_critic = property(lambda cfg: cfg.condition not in ("reference", "grpo"))
    attempts_per_problem = property(lambda cfg: 1 if cfg.teacher else cfg.group_size)


TOY = Path(__file__).resolve().parent / "toy"

PRESETS = {
    "toy": dict(
        model=str(TOY), data=str(TOY / "problems.jsonl"), prompts="toy", steps=50, lr=2e-3, max_grad_norm=1.0, lora_rank=16,
        lora_alpha=32.0, temperature=1.0, max_new_tokens=64, sample_batch=1024, micro_batch=32,
        gradient_checkpointing=False, final_problems=100,
    ),
    "qwen": {},
}  # fmt: skip


# ---- What the parts pass on: problems, replies, and a model with its tokenizer. ----------------------------

class Problem(NamedTuple):
    question: str
    solution: str  # worked out, by the data set's author
    answer: str


class Reply(NamedTuple):
    text: str | None  # None: failed or cut off
    tokens: int  # generated, as far as is known


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


# ---- Processes: one, or many under torchrun. With one, none of these does a thing: read on at 1. -----------

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def join() -> None:
    """Under torchrun, meet the others; rank 0 alone prints. A group must outlive a slow rank's whole rollout."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=2))
        if rank():
            sys.stdout = open(os.devnull, "w")


def share(items: list) -> list:
    """This process's part."""
    return items[rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gathered(items: list) -> list:
    """All parts, in the order that they had before `share`."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [x for row in itertools.zip_longest(*parts) for x in row if x is not None]


def summed(*values: float):
    """Each number, summed over the processes; an int stays an int."""
    totals = [sum(column) for column in zip(*gathered([values]))]
    return totals[0] if len(totals) == 1 else totals


def sum_gradients(weights: list[nn.Parameter]) -> None:
    """One all-reduce of all gradients, as one flat vector."""
    if dist.is_initialized():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
        dist.all_reduce(flat)
        for p, part in zip(weights, flat.split([p.numel() for p in weights])):
            p.grad = part.view_as(p)


def leader_first(make: Callable):
    """make() on rank 0, then on the others, which find what it built or fetched."""
    made = None if rank() else make()
    if dist.is_initialized():
        dist.barrier()
    return make() if rank() else made


# ---- 1. Problems. Their files, and the reward `is_correct`, are in the plumbing. ---------------------------

def next_problems(problems: list[Problem], seen: int, cfg: Config) -> list[tuple[int, Problem]]:
    """The step's (position, problem): a shuffle an epoch, by the seed and the position in the data alone."""
    n, positions = len(problems), range(seen, seen + cfg.attempts_per_step // cfg.attempts_per_problem)
    order = {epoch: random.Random(f"{cfg.seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in positions}}
    return [(i, problems[order[i // n][i % n]]) for i in positions]


# ---- 2. LoRA: an adapter that can be switched off. Off, the model is the initial policy: the teacher. ------

class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x with W frozen, A (rank, in) and B (out, rank) trained, in float32.

    B starts at zero, so the student starts as the teacher. float32 whatever W is: in bfloat16 updates of 5e-6 round away.
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


def add_adapters(model: nn.Module, cfg: Config) -> None:
    """Freeze the model and put a LoRALinear in place of every projection but the head."""
    generator = torch.Generator().manual_seed(cfg.seed)
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                setattr(parent, name, LoRALinear(child, cfg.lora_rank, cfg.lora_alpha, generator))
    if not adapters(model):
        raise Refusal(f"{type(model).__name__} has no nn.Linear projection for LoRA; choose another --model")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the initial policy, bit for bit. Run no backward in here: checkpointing recomputes
    blocks during backward, and would recompute them without the adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and module.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# ---- 3. Sample. Ids in, ids out: text is for people and for the critic. ------------------------------------

class Sample(NamedTuple):
    ids: list[int]  # as drawn, end token included: the student must learn to stop
    truncated: bool
    entropy: float  # of the distributions drawn from, mean over tokens, nats


@torch.inference_mode()  # on a small model a tenth faster than no_grad
def generate(chat: Chat, prompts: list[list[int]], max_new_tokens: int, *, uniforms: np.ndarray | None = None,
             temperature: float = 1.0, batch: int = 64) -> list[Sample]:
    """One response for each prompt; greedy without `uniforms`, float32 in [0, 1), (rows, max_new_tokens).

    The full softmax is drawn from, since the loss scores the full softmax: no top-k, no top-p, whatever the model's
    generation config says. A row's randomness is its own: it depends neither on its neighbours nor on the device.
    """
    chat.model.eval()
    samples = []
    with progress(total=len(prompts), desc="generate", unit="row") as bar:
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            own = None if uniforms is None else torch.from_numpy(uniforms[rows]).to(chat.model.device)
            samples += generate_batch(chat, prompts[rows], own, max_new_tokens, temperature, bar)
    return samples


def generate_batch(chat: Chat, prompts: list[list[int]], uniforms: Tensor | None, max_new_tokens: int,
                   temperature: float, bar: tqdm) -> list[Sample]:
    """Rows that have ended leave the batch, their keys and values with them. NaN logits are a FloatingPointError."""
    device, width, B = chat.model.device, max(map(len, prompts)), len(prompts)
    ids = torch.tensor([chat.end_ids[:1] * (width - len(p)) + p for p in prompts], device=device)  # left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, width)
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # a padded row's first real token stands at position 0
    mask = mask if min(map(len, prompts)) < width else None  # one that hides nothing costs the model a fifth of its time
    ends, rows = torch.tensor(chat.end_ids, device=device), torch.arange(B, device=device)
    drawn, entropy = torch.full((B, max_new_tokens), -1, device=device), torch.zeros(B, device=device)
    cache = transformers.DynamicCache(config=chat.model.config)
    for t in range(max_new_tokens):
        hidden = chat.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        p = F.softmax(F.linear(hidden[:, -1], chat.head).float() / temperature, -1)  # (rows, V)
        entropy[rows] += torch.special.entr(p).sum(-1)
        if uniforms is None:
            token = p.argmax(-1)
        else:  # inverse CDF: one uniform a row
            cdf = p.cumsum(-1)
            token = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True)[:, 0]
            token = token.clamp(max=cdf.shape[1] - 1)
        drawn[rows, t] = token
        keep = torch.isin(token, ends, invert=True).nonzero()[:, 0]
        if len(keep) < len(rows):
            bar.update(len(rows) - len(keep))
            if len(keep) == 0:
                break
            cache.reorder_cache(keep)  # not batch_select_indices, which linear-attention layers lack
            rows, token, position = rows[keep], token[keep], position[keep]
            mask = mask if mask is None else mask[keep]
        ids, position = token[:, None], position[:, -1:] + 1
        mask = mask if mask is None else F.pad(mask, (0, 1), value=1)
    else:
        bar.update(len(rows))
    if not entropy.isfinite().all():
        raise FloatingPointError(f"logits while sampling row {entropy.isfinite().long().argmin()} of the batch")
    responses = [[i for i in row if i >= 0] for row in drawn.tolist()]
    return [Sample(r, r[-1] not in chat.end_ids, e / len(r)) for r, e in zip(responses, entropy.tolist())]


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
    advantage: float = 0.0  # eq (3)

    @property
    def scored(self) -> list[int]:
        return self.sample.ids[: self.scored_length]


def attempt(chat: Chat, problems: list[tuple[int, Problem]], cfg: Config, samples: int = 1,
            seed: int | None = None) -> list[Rollout]:
    """`samples` attempts at each (number, problem). The k-th draws from random numbers that follow from
    (seed, number, k) alone, so that neither batch nor process decides what is drawn. `seed` is cfg's by default."""
    seed, T = cfg.seed if seed is None else seed, cfg.max_new_tokens
    keys = [(number, problem, k) for number, problem in problems for k in range(samples)]
    draws = [np.random.default_rng((seed, number, k)).random(T, np.float32) for number, _, k in keys]
    prompts = [chat.encode(FORMATS[cfg.prompts].student(problem.question)) for _, problem, _ in keys]
    drawn = generate(chat, prompts, T, uniforms=np.array(draws).reshape(-1, T), temperature=cfg.temperature,
                     batch=cfg.sample_batch)
    texts = [chat.decode(sample.ids) for sample in drawn]
    return [Rollout(problem, prompt, sample, text, float(is_correct(text, problem.answer)))
            for (_, problem, _), prompt, sample, text in zip(keys, prompts, drawn, texts)]


# ---- 4. Critic: a frozen language model, in this process or behind a URL. ----------------------------------

Critic = Callable[[list[list[dict]]], list[Reply]]  # conversations in, a reply to each out


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
            samples = generate(self.chat, [prompts[i] for i in fit], self.max_new_tokens, batch=self.batch)
        for i, sample in zip(fit, samples):
            replies[i] = Reply(None if sample.truncated else self.chat.decode(sample.ids), len(sample.ids))
        return replies


def load_critic(cfg: Config, chat: Chat) -> Critic:
    length = cfg.critic_max_new_tokens or 2 * cfg.max_new_tokens
    if is_url(cfg.critic):
        urls = [url.strip() for url in cfg.critic.split(",")]
        return HTTPCritic(urls, cfg.critic_model, length, cfg.critic_parallel, cfg.critic_timeout)
    frozen = chat if cfg.critic == "self" else load_model(cfg.critic, cfg.dtype, cfg.device)
    return LocalCritic(frozen, cfg.critic_max_new_tokens or min(length, frozen.window // 2), cfg.sample_batch)


def query_critic(rollouts: list[Rollout], critic: Critic, cfg: Config) -> tuple[list[str | None], int]:
    """(a critique or None for each rollout, tokens that the critic generated). Empty, cut off, or without steps and
    an answer is None: half a trace or an error message in the teacher's prompt would be distilled like any text."""
    fmt, conversations = FORMATS[cfg.prompts], []
    for r in rollouts:
        solution = r.problem.solution if cfg.critic_sees_reference else None
        conversations.append(fmt.critic(r.problem.question, r.text, solution, cfg.critic_style))
    replies = critic(conversations)
    traces = [fmt.trace(strip_thinking(reply.text or "")[:200_000]) for reply in replies]
    return [t if t and extract_answer(t) else None for t in traces], sum(reply.tokens for reply in replies)


# ---- 5. Contexts: the three conditions. EDIT HERE (condition) ----------------------------------------------

# Who writes c for the teacher. Sampler, packer, denominator, optimiser and evaluation are shared.
CONDITIONS = {
    # the critic, who sees problem, attempt and worked solution: the attempt, mended
    "critique": query_critic,
    # the data set: its worked solution, in its author's words
    "reference": lambda rollouts, critic, cfg: ([r.problem.solution for r in rollouts], 0),
    # nobody: there is no teacher, and one binary reward blames or praises all tokens, eq (3)
    "grpo": None,
}


def group_advantages(rewards: list[float], group_size: int) -> list[float]:
    """Eq (3) within consecutive groups. Equal rewards carry no signal: 0, not 0 / 0."""
    r = np.array(rewards).reshape(-1, group_size)  # (problems, G)
    spread = r.std(1, keepdims=True)
    return ((r - r.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)).reshape(-1).tolist()


def write_contexts(rollouts: list[Rollout], critic: Critic, cfg: Config) -> int:
    """Give each rollout its context, or in grpo its advantage. Returns the tokens that the critic generated."""
    if not cfg.teacher:
        for r, advantage in zip(rollouts, group_advantages([r.reward for r in rollouts], cfg.group_size)):
            r.advantage = advantage
        return 0
    contexts, tokens = CONDITIONS[cfg.condition](rollouts, critic, cfg)
    for r, context in zip(rollouts, contexts):
        r.context = context
    return tokens


# ---- 6. Pack. Student row = student prompt + response; teacher row = teacher prompt + the very same ids. ----

def teacher_prompt(chat: Chat, question: str, context: str, cfg: Config) -> list[int] | None:
    """The teacher's prompt within the window. An over-long context loses its own middle: question, format and
    header stay whole. None if they alone do not fit."""
    room = min(chat.window - cfg.max_new_tokens, cfg.max_prompt_tokens or chat.window)
    render = lambda text: chat.encode(FORMATS[cfg.prompts].teacher(question, text), cfg.teacher_thinking)
    ids = render(context)
    if len(ids) <= room:
        return ids
    words = chat.tokenizer(context, add_special_tokens=False)["input_ids"]
    keep = len(words)
    while len(ids) > room and keep > 0:
        keep = max(0, keep - (len(ids) - room))
        back = chat.decode(words[len(words) - keep // 2 :])
        ids = render(chat.decode(words[: keep - keep // 2]) + " … " + back)
    return ids if len(ids) <= room else None


def pack(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Rollout]:
    """The rollouts to be scored, each with its teacher's prompt; in grpo there is none, and all are scored."""
    if not cfg.teacher:
        return rollouts
    for r in rollouts:
        r.teacher_prompt = None if r.context is None else teacher_prompt(chat, r.problem.question, r.context, cfg)
        if r.teacher_prompt and not cfg.teacher_thinking:  # else token 0 would differ, whatever the context says
            n = chat.header_length
            assert r.teacher_prompt[-n:] == r.prompt[-n:], "prompts end in different generation headers"
        if r.teacher_prompt and cfg.stop_at_first_edit and cfg.asks_critic:
            r.scored_length = first_edit(chat.decode, r.sample.ids, r.context) + 1
    return [r for r in rollouts if r.teacher_prompt]


def response_hidden(chat: Chat, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The hidden states that predict each response token: (N, D), in the order of the concatenated responses.

    Rows are right-padded. A causal model never looks ahead, so no padding reaches a scored position, and no mask is
    made from token values: padding is often the end token, which must be scored.
    """
    width = max(len(p) + len(r) for p, r in zip(prompts, responses))
    rows = [p + r + chat.end_ids[:1] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)]
    ids = torch.tensor(rows, device=chat.model.device)
    hidden = chat.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, D)
    # the state at t predicts token t + 1, the prompt's last one the first of the response; off by one trains on wrong targets
    return torch.cat([h[len(p) - 1 : len(p) - 1 + len(r)] for h, p, r in zip(hidden, prompts, responses)])


def teacher_hidden(chat: Chat, rollouts: list[Rollout], responses: list[list[int]]) -> Tensor:
    """The same of the teacher: adapter off, context in the prompt, no gradient."""
    with torch.no_grad(), adapters_off(chat.model):
        return response_hidden(chat, [r.teacher_prompt for r in rollouts], responses)


# ---- 7. Loss: the slow twin first, then the fused form, which never holds an (N, V) tensor. ----------------
#
# Gradients by hand. With p = softmax(z): ∂ log p_v / ∂z_k = 1[v=k] − p_k and ∂p_v / ∂z_k = p_v (1[v=k] − p_k).
#   eq (4), KL(p‖q) = Σ_v p_v d_v, where d_v = log p_v − log q_v:
#     ∂/∂z_k = Σ_v p_v (1[v=k] − p_k) d_v + Σ_v p_v (1[v=k] − p_k) = p_k (d_k − KL) + 0
#   eq (5), KL(q‖p) = Σ_v q_v (log q_v − log p_v):
#     ∂/∂z_k = −Σ_v q_v (1[v=k] − p_k) = p_k − q_k
#   drawn token, −A log p_y with A held constant, eq (3), or A = log q_y − log p_y, eq (2):
#     ∂/∂z_k = A (p_k − 1[y=k]), for eq (2) the gradient of eq (4) in the mean over y ~ p
# And z = h Wᵀ / temperature, so ∂/∂h = (∂/∂z) W / temperature. A row's gradient is linear in the row's weight, so
# it is made in the forward pass, while the row's logits exist, and the backward pass only scales it.


def kl_naive(student_logits: Tensor, teacher_logits: Tensor, kl: str, temperature: float) -> Tensor:
    """Eq (4) or (5) for each row: (N, V) logits → (N,). Autograd differentiates it: the oracle of the tests."""
    log_p = F.log_softmax(student_logits / temperature, -1)
    log_q = F.log_softmax(teacher_logits / temperature, -1)
    a, b = {"student||teacher": (log_p, log_q), "teacher||student": (log_q, log_p)}[kl]
    return (a.exp() * (a - b)).sum(-1)


# Each of LOSSES returns the loss of every row and writes its gradient wrt z into grad_z, (rows, V). It may overwrite log_p
# and log_q; grad_z may be log_p, and log_q is log_p where there is no teacher. ids: the drawn tokens, a: their advantages.


def kl_student_teacher(log_p: Tensor, log_q: Tensor, ids: Tensor, a: Tensor, grad_z: Tensor) -> Tensor:
    d = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    kl = torch.linalg.vecdot(p, d)
    torch.mul(p, d.sub_(kl[:, None]), out=grad_z)
    return kl


def kl_teacher_student(log_p: Tensor, log_q: Tensor, ids: Tensor, a: Tensor, grad_z: Tensor) -> Tensor:
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q.sub_(log_p))
    torch.sub(log_p.exp_(), q, out=grad_z)
    return kl


def policy_gradient(log_p: Tensor, log_q: Tensor, ids: Tensor, a: Tensor, grad_z: Tensor) -> Tensor:
    loss = -a * log_p.gather(1, ids[:, None])[:, 0]
    torch.mul(log_p.exp_().scatter_add_(1, ids[:, None], -torch.ones_like(log_p[:, :1])), a[:, None], out=grad_z)  # p − 1[y]
    return loss


def kl_sampled(log_p: Tensor, log_q: Tensor, ids: Tensor, a: Tensor, grad_z: Tensor) -> Tensor:
    a = (log_q.gather(1, ids[:, None]) - log_p.gather(1, ids[:, None]))[:, 0]  # eq (2)
    policy_gradient(log_p, log_q, ids, a, grad_z)
    return -a  # one token's estimate of eq (4)


LOSSES = {"student||teacher": kl_student_teacher, "teacher||student": kl_teacher_student, "sampled": kl_sampled,
          "grpo": policy_gradient}  # fmt: skip


def log_softmax_of(h: Tensor, lm_head: Tensor, temperature: float, z: Tensor | None = None,
                   out: Tensor | None = None) -> Tensor:
    """log softmax(h Wᵀ / temperature), (rows, V). The buffers z and out, if given, may be the same tensor. float32 from
    the logits on: a bfloat16 log-softmax over 150,000 entries makes small divergences negative."""
    wide = torch.promote_types(h.dtype, torch.float32)
    z = torch.addmm(h.new_zeros(1), h, lm_head.T, beta=0, alpha=1 / temperature if h.dtype == wide else 1, out=z)
    if h.dtype != wide:  # rounded where the sampler rounds, at the logits: else the drawn tokens are another policy's
        z = (z.to(wide) if out is None else out.copy_(z)).div_(temperature)
    return torch.log_softmax(z, -1, out=out)


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, lm_head, row_weight, ids, advantage, kl, temperature, chunk):
        N, V, wide = len(h_student), len(lm_head), torch.promote_types(h_student.dtype, torch.float32)
        mixed = h_student.dtype != wide  # if not, logits become log-softmaxes, and those the gradient, in place
        z = h_student.new_empty(min(chunk, N), V)  # the buffers of one chunk: nothing of size (N, V) exists
        log_p = torch.empty_like(z, dtype=wide) if mixed else z
        log_q = None if h_teacher is None else torch.empty_like(log_p)
        z_q = z if mixed else log_q
        per_row, grad = h_student.new_empty(N, dtype=wide), torch.empty_like(h_student)
        for start in range(0, N, chunk):
            rows, n = slice(start, start + chunk), min(chunk, N - start)
            p = log_softmax_of(h_student[rows], lm_head, temperature, z[:n], log_p[:n])
            q = p if h_teacher is None else log_softmax_of(h_teacher[rows], lm_head, temperature, z_q[:n], log_q[:n])
            # in eighths, so that what a divergence allocates besides stays small
            for value, *eighth in zip(*(x.chunk(8) for x in (per_row[rows], p, q, ids[rows], advantage[rows], z[:n]))):
                value.copy_(LOSSES[kl](*eighth))
            grad[rows] = (row_weight[rows, None] / temperature) * (z[:n] @ lm_head)
        ctx.save_for_backward(grad)
        loss, per_row = (row_weight * per_row).sum(), per_row.float()
        ctx.mark_non_differentiable(per_row)
        return loss, per_row

    @staticmethod
    def backward(ctx, grad_loss, _):
        return ctx.saved_tensors[0] * grad_loss, *[None] * 8


def fused_loss(h_student: Tensor, h_teacher: Tensor | None, lm_head: Tensor, row_weight: Tensor, *, kl: str,
               temperature: float, chunk: int, ids: Tensor | None = None, advantage: Tensor | None = None):
    """(Σ row_weight · D, D of each row): eq (1), `chunk` rows of logits at a time. kl: a key of LOSSES.

    h_student, h_teacher (N, D); lm_head (V, D), frozen; row_weight, ids, advantage (N,). `sampled` needs the drawn ids,
    `grpo` ids and eq (3)'s advantage but no teacher. The loss is differentiable in h_student alone; the second result
    is detached, float32, nats. Three matmuls, as in naive autograd: student logits, teacher logits, gradient.
    """
    ids, advantage = (row_weight.new_zeros(len(row_weight)) if x is None else x for x in (ids, advantage))
    return FusedLoss.apply(h_student, h_teacher, lm_head, row_weight, ids.long(), advantage, kl, temperature, chunk)


# ---- 8. Step. ----------------------------------------------------------------------------------------------

def micro_loss(chat: Chat, rollouts: list[Rollout], divisor: float, cfg: Config) -> tuple[Tensor, Tensor]:
    """(Σ D / divisor, D of each scored token): eq (1), or −A log π in grpo, whose importance ratio is 1.

    One divisor for all micro-batches of a step, its scored tokens: a mean of means, over rollouts or micro-batches, would
    weigh a token by the company it keeps.
    """
    responses, like = [r.scored for r in rollouts], dict(device=chat.model.device)
    ids = torch.tensor(sum(responses, []), **like)  # (N,)
    a = torch.tensor([r.advantage for r in rollouts for _ in r.scored], **like)  # (N,), eq (3)
    h_student = response_hidden(chat, [r.prompt for r in rollouts], responses)  # (N, D)
    h_teacher = teacher_hidden(chat, rollouts, responses) if cfg.teacher else None
    return fused_loss(h_student, h_teacher, chat.head, torch.full((len(ids),), 1 / divisor, **like), ids=ids, advantage=a,
                      kl=cfg.kl if cfg.teacher else "grpo", temperature=cfg.temperature, chunk=cfg.kl_chunk)


def train_step(chat: Chat, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], cfg: Config) -> dict:
    """One update from the packed rollouts: {loss, kl (nats a scored token), grad_norm (before the clip)}.

    Raises FloatingPointError, before anything changes, if they are not finite. Without rollouts nothing changes.
    """
    total = summed(sum(len(r.scored) for r in rollouts))
    if total == 0:
        return {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0}
    chat.model.train()  # in eval mode gradient checkpointing is silently off; dropout is zero in both
    loss = summed(backward(chat, optimizer, rollouts, total, cfg))
    weights = list(adapters(chat.model).values())
    sum_gradients(weights)
    norm = nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(loss + norm):  # score the rows one by one, to name the first that is to blame
        bad = (i for i, r in enumerate(rollouts) if not math.isfinite(backward(chat, optimizer, [r], total, cfg)
               + sum(p.grad.abs().sum().item() for p in weights if p.grad is not None)))  # fmt: skip
        raise FloatingPointError(f"row {next(bad, 'of another process')}: loss {loss}, gradient norm {norm}; nothing was updated")
    optimizer.step()
    return {"loss": loss, "kl": loss if cfg.teacher else 0.0, "grad_norm": norm}


def backward(chat: Chat, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], total: int, cfg: Config) -> float:
    """Fill the gradients, micro-batch by micro-batch; returns the loss. float16 cannot hold the gradients of a mean over
    65,536 tokens: they flow times a power of two near `total`, which rounds nothing, and are divided again in float32."""
    optimizer.zero_grad()
    scale, loss_sum = 2.0 ** round(math.log2(total)), 0.0
    for start in range(0, len(rollouts), cfg.micro_batch):
        loss, _ = micro_loss(chat, rollouts[start : start + cfg.micro_batch], total / scale, cfg)
        loss.backward()
        loss_sum += loss.item() / scale
    for p in adapters(chat.model).values():
        p.grad = None if p.grad is None else p.grad / scale
    return loss_sum


@torch.no_grad()
def token_advantages(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Tensor]:
    """Eq (2) for every response token of each packed rollout: a list of (T,), in nats. For people, not for the loss."""
    chat.model.eval()
    whole = [replace(r, scored_length=None) for r in rollouts]
    estimate = micro_loss(chat, whole, 1.0, replace(cfg, condition="critique", kl="sampled"))[1]
    return list((-estimate).split([len(r.sample.ids) for r in rollouts]))


# ---- 9. Train. ---------------------------------------------------------------------------------------------

def take_step(run: "Run", problems: list[Problem], critic: Critic) -> tuple[dict, list[Rollout]]:
    """The algorithm, once: problems → rollouts → contexts → pack → update."""
    cfg, chat, cost = run.cfg, run.chat, {}
    chosen = next_problems(problems, run.seen, cfg)
    with clock(cost, "sample_s"):
        rollouts = attempt(chat, share(chosen), cfg, cfg.attempts_per_problem)
    with clock(cost, "critic_s"):
        critic_tokens = write_contexts(rollouts, critic, cfg)
    with clock(cost, "train_s"):
        scored = pack(chat, rollouts, cfg)
        update = train_step(chat, run.optimizer, scored, cfg)
    run.step, run.seen = run.step + 1, run.seen + len(chosen)
    return {"step": run.step, **update, "critic_tokens": critic_tokens, "cost": cost}, rollouts


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C only fills the list, so that the step in flight is finished and saved (torchrun waits for
    it only as long as its --shutdown-timeout says). The second kills, for an exception would wait for http requests."""
    pressed: list[int] = []
    def handler(number, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        pressed.append(number)
        if not rank():
            print("finishing this step, then saving; Ctrl-C again stops at once", file=sys.__stderr__)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(cfg: Config) -> None:
    """Train to cfg.steps: log, show, evaluate and save on the way. Ctrl-C, or a critic that only fails, ends it saved."""
    chat = leader_first(lambda: load_model(cfg.model, cfg.dtype, cfg.device))
    problems = load_problems(cfg, chat)
    critic = load_critic(cfg if cfg.asks_critic else replace(cfg, critic="self"), chat)  # load none that nobody asks
    add_adapters(chat.model, cfg)
    if cfg.gradient_checkpointing:  # the reentrant kind loses the adapters' gradients, silently
        chat.model.activation_checkpointing_enable({"use_reentrant": False})
    run, failed_steps, stop = Run(cfg, chat), 0, 0
    print(opening(chat, problems))
    with deferred_interrupt() as interrupted:
        while run.step < cfg.steps and failed_steps < 3 and not stop and not 0 < cfg.patience <= run.stale:
            try:
                update, rollouts = take_step(run, problems.train, critic)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {run.step + 1}, {error}") from None
            metrics = measure(chat, update, rollouts, cfg)
            run.log(metrics)
            step(chat, metrics, rollouts, critic, cfg)
            failed_steps = 0 if metrics["scored"] else failed_steps + 1
            if cfg.eval_every and run.step % cfg.eval_every == 0:
                validate(run, problems.validation)
            if cfg.save_every and run.step % cfg.save_every == 0:
                run.save()
            stop = summed(len(interrupted))  # all processes stop, or none
    run.save()
    summed(0)  # torchrun ends all processes when one fails: none fails before rank 0 has saved
    if stop:
        raise KeyboardInterrupt
    if failed_steps == 3:
        what, mend = ("critique failed, or", "Mend --critic") if cfg.asks_critic else ("solution", "Raise --max-prompt-tokens")
        raise Refusal(f"every {what} fits no prompt, for 3 steps; saved in {cfg.out}. {mend}, then add --resume")
    if cfg.final_problems:
        print(closing(chat, problems.test[: cfg.final_problems], cfg))
    if cfg.export:
        run.export()


# ---- What follows is plumbing: files, models, the critic's wire, run folders, printing, the command line. --

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


# ---- Problems and answers. EDIT HERE (problems and reward) -------------------------------------------------

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


# ---- Models. -----------------------------------------------------------------------------------------------

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


# ---- A critic behind a URL. --------------------------------------------------------------------------------

def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


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


# ---- Run folders, and how a run goes on from one. ----------------------------------------------------------

def leader(function: Callable) -> Callable:
    """Decorator: rank 0 alone runs it; the others get None."""
    return functools.wraps(function)(lambda *args: None if rank() else function(*args))


def load_checkpoint(path: Path) -> dict:
    """{config, step, seen, best, stale, adapters, optimizer}. The file may be anybody's: nothing in it can run code,
    and its config is checked as a command line is."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Refusal(f"{path}: no checkpoint there; name a run folder that holds one") from None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        numbers = {name: kind(state[name]) for name, kind in Run.STATE.items()}
        weights = {name: torch.as_tensor(w) for name, w in state["adapters"].items()}
        state = {"config": Config(**state["config"]), **numbers, "adapters": weights, "optimizer": state["optimizer"]}
    except Exception as error:
        reason = f"cut off, or of another version: {type(error).__name__}"
        raise Refusal(f"{path}: not a checkpoint of sd.py ({reason}); train the run anew") from None
    check(state["config"])
    return state


def load_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = adapters(model)
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in weights.items()}:
        raise Refusal("the checkpoint's adapters do not fit the model; was --model's folder changed?")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


class Run:
    """A run folder and the state that a resumed run needs: log.jsonl, checkpoint.pt (the last), best.pt, model/, .lock."""

    # steps taken, position in the data, best validation score, evaluations since then
    STATE = {"step": int, "seen": int, "best": float, "stale": int}

    def __init__(self, cfg: Config, chat: Chat):
        self.cfg, self.chat, self.folder = cfg, chat, Path(cfg.out)
        self.optimizer = torch.optim.AdamW(adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
        self.step, self.seen, self.best, self.stale = 0, 0, -1.0, 0
        if not cfg.resume:
            make_folder(self.folder)
        self.lock = claim(self.folder)
        if cfg.resume:
            self.restore()
            return
        versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
        self.log({"config": asdict(cfg), "versions": versions, "grader": grader()})
        self.save()

    @leader
    def log(self, entry: dict) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @leader
    def save(self, name: str = "checkpoint.pt") -> None:
        """Atomic: a kill or a full disk at any moment leaves the old file or the new one."""
        state = {"config": asdict(self.cfg)} | {name: getattr(self, name) for name in self.STATE}
        state["adapters"] = {name: p.detach().cpu() for name, p in adapters(self.chat.model).items()}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, file := io.BytesIO())
        write_atomic(self.folder / name, file.getvalue())

    def restore(self) -> None:
        state = load_checkpoint(self.folder / "checkpoint.pt")
        try:
            load_adapters(self.chat.model, state["adapters"])
            self.optimizer.load_state_dict(state["optimizer"])
            # steps past the checkpoint will be written again; a kill may have cut a line
            lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines(keepends=True)
            kept = [s for s in lines if s.endswith("\n") and json.loads(s).get("step", 0) <= state["step"]]
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Refusal(f"{self.folder}: checkpoint or log do not fit ({type(error).__name__}); train anew") from None
        self.step, self.seen, self.best, self.stale = (state[name] for name in self.STATE)
        write_atomic(self.folder / "log.jsonl", "".join(kept).encode())

    @leader
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


@leader
def make_folder(folder: Path) -> None:
    """A new run folder; an old run is moved aside, never overwritten."""
    if (folder / "log.jsonl").exists():
        old = next(p for n in itertools.count(1) if not (p := Path(f"{folder}.{n}")).exists())
        with claim(folder):  # until it is moved
            folder.rename(old)
        print(f"{folder} was there; moved to {old}")
    elif folder.exists() and not (folder.is_dir() and all(path.name == ".lock" for path in folder.iterdir())):
        raise Refusal(f"--out {folder} is there and is no run folder; name another")
    folder.mkdir(parents=True, exist_ok=True)


@leader
def claim(folder: Path):
    """An open file; while it lives, no other run can claim the folder, wherever it is moved. (Windows
    and some network file systems have no such locks.)"""
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()  # there, an open file would keep the folder from being moved
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(f"another run is at work in {folder}; name another --out") from None
    except OSError:  # no locks on this file system
        pass
    return file


@leader
def write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    os.replace(partial, path)


# what may change when a run goes on: nothing that shapes its numbers, but for the critic and the room for what it writes, which may need mending
RESUMABLE = set("resume out preset steps save_every show_every final_problems export device patience critic critic_model "
                "critic_parallel critic_timeout critic_max_new_tokens max_prompt_tokens sample_batch micro_batch kl_chunk "
                "gradient_checkpointing".split())  # fmt: skip


def resumed_config(given: dict) -> tuple[Config, str]:
    """The saved config with the given flags on top."""
    out = given.get("out") or f"runs/{given.get('condition', 'critique')}"
    saved = load_checkpoint(Path(out) / "checkpoint.pt")["config"]
    for name in given.keys() - RESUMABLE:
        if getattr(saved, name) != given[name]:
            raise Refusal(f"{out} was trained with {name} {getattr(saved, name)!r}, not {given[name]!r}; drop the flag, "
                          "or --resume")  # fmt: skip
    if is_url(saved.critic) and "critic" not in given:
        raise Refusal("argument --critic: name the http critic again; the API key goes to no address out of a file")
    return check(replace(saved, **{**given, "preset": saved.preset, "out": out})), f"of the run in {out}, resumed"


# ---- Evaluation: sample, score, compare. -------------------------------------------------------------------

METRICS = {"Avg": 100, "Pass": 100, "Maj": 100, "length": 1, "truncated": 100, "unparsable": 100}  # name: factor for display
SEED = 1_000_003  # of every evaluation, so that base and runs draw from the same uniforms; not a training seed


def evaluate(chat: Chat, problems: list[Problem], cfg: Config, numbers=None) -> list[list[dict]]:
    """cfg.eval_samples attempts at each problem: a list for each problem of {text, answer, correct, length, truncated}.
    A problem's draws follow from SEED and its number, by default its place in the list."""
    numbered = list(zip(range(len(problems)) if numbers is None else numbers, problems))
    rollouts = attempt(chat, share(numbered), cfg, cfg.eval_samples, SEED)
    records = [
        {
            "text": r.text, "answer": extract_answer(r.text), "correct": bool(r.reward),
            "length": len(r.sample.ids), "truncated": r.sample.truncated,
        }
        for r in rollouts
    ]  # fmt: skip
    return gathered([records[i : i + cfg.eval_samples] for i in range(0, len(records), cfg.eval_samples)])


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased share of k-subsets of n attempts that hold a correct one (Chen et al. 2021): 1 − C(n−c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(attempts: list[dict]) -> float:
    """1 if the most frequent answer is right; a tie counts by the share of tied answers that are right. No answer, no vote."""
    votes: dict[object, list[bool]] = defaultdict(list)
    for a in attempts:
        if a["answer"] is not None:
            number = as_number(a["answer"])
            votes[normalise(a["answer"]) if number is None else number].append(a["correct"])
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([own[0] for own in votes.values() if len(own) == most])) if votes else 0.0


def scores(attempts: list[list[dict]]) -> dict[str, np.ndarray]:
    """Each metric as one value a problem, (problems,); its mean is the metric, its spread the interval."""
    share = lambda of: np.array([np.mean([of(a) for a in own]) for own in attempts])
    return {
        "Avg": share(lambda a: a["correct"]),
        "Pass": np.array([pass_at_k(len(own), sum(a["correct"] for a in own), len(own)) for own in attempts]),
        "Maj": np.array([maj_at_k(own) for own in attempts]),
        "length": share(lambda a: a["length"]),
        "truncated": share(lambda a: a["truncated"]),
        "unparsable": share(lambda a: a["answer"] is None),
    }


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, over the first axis; seeded, so that a table repeats to the digit."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def cell(values: np.ndarray, scale: float) -> str:
    low, high = interval(values)
    return f"{scale * values.mean():.1f} [{scale * low:.1f}, {scale * high:.1f}]"


# ---- What a run prints: at its start, after each step, at its end. -----------------------------------------

def opening(chat: Chat, problems: Split) -> str:
    trained = sum(p.numel() for p in adapters(chat.model).values())
    parts = zip(("train", "validation", "test"), map(len, problems))
    return (f"{sum(p.numel() for p in chat.model.parameters()) - trained:,} frozen and {trained:,} trained parameters on "
            f"{chat.model.device} | {', '.join(f'{n} {name}' for name, n in parts)} problems "
            f"(dropped: {spell(problems.dropped)})")  # fmt: skip


def measure(chat: Chat, m: dict, rollouts: list[Rollout], cfg: Config) -> dict:
    """The log entry of a step: m, and what its rollouts show. The README's glossary says what alarm looks like."""
    find, asks_critic = FORMATS[cfg.prompts].steps, cfg.asks_critic
    scored = [r for r in rollouts if r.teacher_prompt or not cfg.teacher]
    copied = [step in own for r in scored if asks_critic for own in [find(r.text)] for step in find(r.context)]
    groups = np.array([r.reward for r in rollouts]).reshape(-1, cfg.attempts_per_problem)
    sums = {
        "rollouts": len(rollouts), "right": sum(r.reward for r in rollouts), "cut": sum(r.sample.truncated for r in rollouts),
        "tokens": sum(len(r.sample.ids) for r in rollouts), "entropy": sum(r.sample.entropy for r in rollouts),
        "scored": len(scored), "scored_tokens": sum(len(r.scored) for r in scored), "critic_tokens": m["critic_tokens"],
        "steps": len(copied), "copied": sum(copied), "groups": len(groups), "flat": float((groups.std(1) == 0).sum()),
    }  # fmt: skip
    t = dict(zip(sums, summed(*sums.values())))  # totals of all processes
    n = t["rollouts"]
    return {
        **m, "cost": {**m["cost"], "peak_mib": round(peak_memory(chat.model.device), 1)},
        "accuracy": t["right"] / n, "length": t["tokens"] / n, "truncated": t["cut"] / n, "entropy": t["entropy"] / n,
        "scored": t["scored"], "scored_tokens": t["scored_tokens"], "critic_failed": n - t["scored"] if asks_critic else 0,
        "copied": t["copied"] / max(1, t["steps"]),  # share of the critiques' steps that stand word for word in the attempt
        "zero_variance": t["flat"] / t["groups"] if cfg.attempts_per_problem > 1 else 0.0,
        "solver_tokens": t["tokens"], "critic_tokens": t["critic_tokens"],
    }  # fmt: skip


@contextlib.contextmanager
def clock(cost: dict[str, float], name: str) -> Iterator[None]:
    """Seconds spent inside, into cost[name]."""
    start = time.perf_counter()
    yield
    cost[name] = round(time.perf_counter() - start, 3)


def peak_memory(device: torch.device) -> float:
    """MiB: the CUDA allocator's peak, or the process's on CPU; 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@leader
def step(chat: Chat, m: dict, rollouts: list[Rollout], critic: Critic, cfg: Config) -> None:
    """One line a step, a warning where one is due, and now and then an example."""
    seconds = "+".join(f"{m['cost'][name]:.2f}" for name in ("sample_s", "critic_s", "train_s"))
    print(
        f"step {m['step']:4d}/{cfg.steps} loss {m['loss']:8.4f} kl {m['kl']:7.4f} grad {m['grad_norm']:6.3f} "
        f"acc {m['accuracy']:4.0%} len {m['length']:6.1f} trunc {m['truncated']:4.0%} entropy {m['entropy']:5.3f} "
        f"failed {m['critic_failed']:2d} copied {m['copied']:4.0%} flat {m['zero_variance']:4.0%} "
        f"{seconds} s {m['cost']['peak_mib']:.0f} MiB",
        flush=True,
    )
    if m["truncated"] > 0.5:
        print(f"WARNING: {m['truncated']:.0%} of the attempts were cut at --max-new-tokens {cfg.max_new_tokens} and "
              "mostly read as wrong")  # fmt: skip
    if 2 * m["critic_failed"] > cfg.attempts_per_step:
        error = getattr(critic, "last_error", "") or "empty, cut off, or without steps and an answer"
        print(f"WARNING: {m['critic_failed']} of {cfg.attempts_per_step} critiques failed and are left out "
              f"({printable(error)})")  # fmt: skip
    if rollouts and cfg.show_every and (m["step"] == 1 or m["step"] % cfg.show_every == 0):
        show(chat, next((r for r in rollouts if not r.reward), rollouts[0]), cfg)


def show(chat: Chat, rollout: Rollout, cfg: Config) -> None:
    """One problem, attempt and context, and the five tokens whose probability the teacher would move most."""
    lines = [
        f"problem    {rollout.problem.question}   [answer {rollout.problem.answer}]",
        f"attempt    {rollout.text}   [{'right' if rollout.reward else 'wrong'}]",
    ]
    if not cfg.teacher:
        lines.append(f"advantage  {rollout.advantage:+.2f} for each of its {len(rollout.sample.ids)} tokens   [eq (3)]")
    else:
        lines.append(f"{cfg.condition:10s} {rollout.context or 'none: the critic failed'}")
    if rollout.teacher_prompt:
        a = token_advantages(chat, [rollout], cfg)[0]
        top = sorted(a.abs().topk(min(5, len(a))).indices.tolist())
        tokens = (f"{chat.tokenizer.decode([rollout.sample.ids[t]])!r} at {t} {a[t]:+.2f}" for t in top)
        lines.append(f"moved      {', '.join(tokens)}   [A_t of eq (2), nats]")
    for line in lines:
        print("  " + printable(line))


def validate(run: Run, problems: list[Problem]) -> None:
    """Score the validation problems, and keep the adapters in best.pt if they never did better."""
    score = float(scores(evaluate(run.chat, problems, run.cfg))["Avg"].mean())
    run.log({"step": run.step, "validation_avg": score})
    print(f"validation Avg@{run.cfg.eval_samples} {100 * score:.1f}")
    run.best, run.stale = (score, 0) if score > run.best else (run.best, run.stale + 1)
    if run.stale == 0:
        run.save("best.pt")


def closing(chat: Chat, problems: list[Problem], cfg: Config) -> str:
    """What sd.py prints at its end: base (adapter off) → trained, on held-out problems, same seeds."""
    with adapters_off(chat.model):
        before = scores(evaluate(chat, problems, cfg))
    after = scores(evaluate(chat, problems, cfg))
    k = cfg.eval_samples
    lines = [f"held out: {len(problems)} problems × {k} attempts; 95 % bootstrap intervals over problems; seed {SEED}"]
    for name, scale in METRICS.items():
        label = f"{name}@{k}" if name in ("Avg", "Pass", "Maj") else name
        lines.append(
            f"{label} {scale * before[name].mean():.1f} → {scale * after[name].mean():.1f}   "
            f"{cell(before[name], scale)} → {cell(after[name], scale)}, paired {cell(after[name] - before[name], scale)}"
        )
    return "\n".join(lines)


# ---- The command line. -------------------------------------------------------------------------------------

def parse_config(argv: list[str] | None) -> tuple[Config, str]:
    """(config, why this preset). Flags beat the preset, or with --resume the saved config, which beats the defaults."""
    parser = argparse.ArgumentParser(
        prog="sd.py", usage="python sd.py [--flag VALUE …]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Train a solver on a critic's mended copies of its own attempts.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=130),
    )  # fmt: skip
    parser.error = refuse
    for f in fields(Config):
        choices = f.metadata["choices"]()
        defaults = [str(f.default) or "empty"] + [f"{n} {p[f.name]}" for n, p in PRESETS.items() if f.name in p]
        text = f.metadata["help"] + (": " + ", ".join(choices) if choices else "") + f" [{'; '.join(defaults)}]"
        kind = dict(type=f.type, choices=choices and tuple(choices), metavar=f.type.__name__[0].upper())
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return resumed_config(given)
    name, why = given.get("preset", "auto"), "as asked"
    if name == "auto":
        real = "--model is given" if "model" in given else "CUDA is there" if torch.cuda.is_available() else None
        name, why = ("qwen", real) if real else ("toy", "neither CUDA nor --model")
    cfg = replace(Config(), **{**PRESETS[name], **given, "preset": name})
    return check(replace(cfg, out=cfg.out or f"runs/{cfg.condition}")), why


def check(cfg: Config) -> Config:
    for f in fields(Config):
        value, low, choices = getattr(cfg, f.name), f.metadata["low"], f.metadata["choices"]()
        flag = f"argument --{f.name.replace('_', '-')}"
        if not isinstance(value, (int, float) if f.type is float else f.type) or choices and value not in choices:
            refuse(f"{flag}: {value!r} is no {f.type.__name__} that it takes")
        if low is not None and not low <= value < math.inf:
            refuse(f"{flag}: {value} is out of range; the least is {low}")
    if cfg.attempts_per_step % cfg.attempts_per_problem:
        refuse(f"argument --attempts-per-step: {cfg.attempts_per_step} is no multiple of --group-size {cfg.group_size}")
    if (cfg.eval_every or cfg.patience) and not (cfg.validation_problems and cfg.eval_every):
        refuse("argument --eval-every: --patience needs it, and it needs --validation-problems of at least 1")
    if is_url(cfg.critic) and not cfg.critic_model:
        refuse("argument --critic: a URL needs --critic-model, the name of the model it serves")
    return cfg


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    code = 1
    try:
        cfg, why = parse_config(argv)
        join()
        print(printable(f"preset {cfg.preset} ({why}): {cfg.condition}, model {cfg.model}, data {cfg.data} → {cfg.out}"))
        train(cfg)
        return 0
    except Refusal as refusal:
        code, message = 2, str(refusal)
    except torch.OutOfMemoryError:
        message = "out of GPU memory; lower --sample-batch, --micro-batch or --kl-chunk and add --resume"
    except OSError as error:  # disk full, folder not writable
        message = f"{error}; mend it, then add --resume, if the run had begun"
    except FloatingPointError as error:
        message = f"not finite in {error}; the last checkpoint is finite. Train anew with a lower --lr?"
    except KeyboardInterrupt:
        code, message = 130, "stopped; the same command with --resume goes on from the last checkpoint"
    except RuntimeError as error:
        if not (dist.is_initialized() and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))):
            raise
        reason = str(error).split("\n")[0][:150]
        message = f"another process of this run has ended ({reason}); --resume goes on, with any number of them"
    print(f"sd.py: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
