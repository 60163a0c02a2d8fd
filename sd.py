"""Self-distillation from critique, the method of arXiv 2606.11173, in one file.

A solver attempts a problem. A frozen critic answers with the solver's own trace: the correct steps
copied word for word, the first wrong step corrected, and the rest finished from there. The teacher
is the same network with this critique in its prompt. The solver learns to match the teacher's token
distribution on its own attempt. If you know GRPO, this is what differs:

  1. One attempt per problem. There is no group baseline, so each attempt of a step is at a
     different problem.
  2. Credit is a distribution at every token, not one number per rollout, so it can fall on a single
     token.
  3. Credit comes from the network's own initial weights (LoRA adapter off), with a context c in the
     prompt that the student does not see. There is no reward model, no second copy of the weights,
     and the teacher never changes.
  4. Whether the answer is right never reaches the loss. It is graded for the log.

The equations, with p = student and q = teacher over the vocabulary at one token, z the student's
logits divided by the temperature, sg the stop-gradient:

  (1)  L_SD = E_{y ~ π_θ(·|x)} [ 1/|y| Σ_t D( π_θ(·|x,y_<t), sg π_T(·|x,c,y_<t) ) ]
  (2)  A_t  = log π_T(y_t|x,c,y_<t) − log π_θ(y_t|x,y_<t)            the advantage of one token
  (3)  GRPO:  A_i = (r_i − mean r) / std r             one for all of rollout i; std divides by n
  (4)  D = KL(p‖q) = Σ_v p (log p − log q)      ∂D/∂z = p (log p − log q − D)   "student||teacher"
  (5)  D = KL(q‖p) = Σ_v q (log q − log p)      ∂D/∂z = p − q                   "teacher||student"

One difference from (1): `update` divides by the number of scored tokens of the whole step, not by
|y| for each rollout and then by the number of rollouts. A mean of means would over-weight the
tokens of short attempts. No gradient flows through the sampling: y is held fixed.

Start reading at `take_step`. It calls, in this order:

  attempt           y ~ π_θ(·|x): sample the rollouts
  write_contexts    c: ask the critic, or copy the solution; for GRPO, the advantages of eq (3)
  prepare           the teacher's prompt, with c inside
  update            both forward passes, the loss and its gradient, one step of AdamW

Shapes: B prompts of a batch, G rollouts of a group, T tokens of a response, N scored tokens of a
micro-batch, H hidden width, V vocabulary. The prompts are in critic_prompts.py; tables and figures
are made by eval.py.

  python sd.py --condition critique                without a GPU: a toy model, half a minute
  python sd.py --condition critique --model Qwen/Qwen3-1.7B --data problems.jsonl
  python eval.py runs/critique runs/reference runs/grpo        compare runs, with intervals
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
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

from critic_prompts import (
    FORMATS, STYLES, extract_answer, first_edit, normalise, strip_thinking,
)  # fmt: skip

# ---- 1. Config: every knob, once. The command line is generated from it. -------------------------


def knob(default, text: str, low: float | None = None):
    """A field of Config. `text` is its --help, `low` the smallest legal value."""
    return field(default=default, metadata={"help": text, "low": low})


@dataclass(frozen=True)
class Config:
    """Where a default comes from: (paper); (OPSD), the method it builds on; unmarked: our choice.

    A preset overrides the defaults, a flag overrides both.
    """

    # what is trained
    condition: str = knob("critique", "who writes the teacher's context")
    preset: str = knob("auto", "auto: toy without CUDA and without --model, else qwen")
    # model and problems
    model: str = knob("Qwen/Qwen3-1.7B", "the solver: a hub name or a folder (paper)")
    data: str = knob(
        "hub:agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
        "problems: a .json or .jsonl file, or hub:owner/name/file",
    )
    prompts: str = knob("steps", "prompt format, from critic_prompts.py")
    grader: str = knob("exact", "exact: equal text or number; math-verify: equivalent LaTeX too")
    test_problems: int = knob(100, "problems held out for eval.py", low=1)
    validation_problems: int = knob(50, "problems held out to choose best.pt", low=0)
    skip_bad_rows: bool = knob(False, "count malformed rows of --data instead of stopping")
    critic: str = knob("self", "self (adapter off), a model, or http://…/v1[,…] (paper: QwQ-32B)")
    critic_model: str = knob("", "name of the model behind an http critic")
    critic_sees_reference: bool = knob(True, "tell the critic solution and answer (paper: yes)")
    critic_style: str = knob("copy", "copy and correct, quote the error, or omit what is right")
    critic_max_new_tokens: int = knob(0, "cap of a critique; 0: twice an attempt's", low=0)
    # the loss
    kl: str = knob("student||teacher", "eq (4), eq (5), or one sampled token with eq (2)")
    stop_at_first_edit: bool = knob(False, "score no token past the first corrected one (ours)")
    teacher_thinking: bool = knob(False, "thinking mode in the teacher's template (paper: yes)")
    # optimisation
    steps: int = knob(62, "optimiser steps (paper: 7 epochs of 282 problems)", low=0)
    attempts_per_step: int = knob(32, "rollouts per step, in every condition (paper)", low=1)
    group_size: int = knob(8, "grpo only: rollouts per problem (paper)", low=2)
    lr: float = knob(5e-6, "learning rate of AdamW, constant (paper)", low=0)
    max_grad_norm: float = knob(0.1, "clip of the gradient's norm; 0: off (OPSD)", low=0)
    lora_rank: int = knob(64, "of the adapter on every linear layer but the head (paper)", low=1)
    lora_alpha: float = knob(128.0, "the adapter's output is scaled by alpha / rank (paper)", low=0)
    # sampling
    temperature: float = knob(1.1, "of sampling and of the loss alike (paper)", low=1e-3)
    max_new_tokens: int = knob(2048, "cap of an attempt, tokens (paper)", low=1)
    # memory and speed: these change results by rounding alone, and dtype most
    sample_batch: int = knob(64, "rows that generate at once; memory, not results", low=1)
    micro_batch: int = knob(4, "rows of one forward and backward; memory, not results", low=1)
    kl_chunk: int = knob(512, "rows of logits that exist at once; memory, not results", low=1)
    gradient_checkpointing: bool = knob(True, "recompute activations; memory, not results")
    dtype: str = knob("auto", "of the frozen weights; auto: bfloat16 on CUDA, else float32")
    device: str = knob("auto", "auto: cuda if there is one, else cpu")
    threads: int = knob(0, "CPU threads of torch; 0: its own choice, all cores", low=0)
    # evaluation, checkpoints, output
    eval_every: int = knob(0, "steps between evaluations; best.pt keeps the best; 0: never", low=0)
    eval_samples: int = knob(12, "attempts per problem in every evaluation (paper)", low=1)
    final_problems: int = knob(
        8, "test problems of the final before/after comparison; 0: none", low=0
    )
    save_every: int = knob(10, "steps between checkpoints; 0: only the last (paper)", low=0)
    show_every: int = knob(10, "steps between printed examples; 0: never", low=0)
    export: bool = knob(True, "at the end, write OUT/model: adapters merged, for from_pretrained")
    seed: int = knob(0, "of data order, adapters and sampling", low=0)
    out: str = knob("", "run folder; empty: runs/CONDITION")
    resume: bool = knob(False, "continue from OUT's checkpoint, with its config")

    @property
    def has_teacher(self) -> bool:
        return CONDITIONS[self.condition].has_teacher

    @property
    def attempts_per_problem(self) -> int:
        return 1 if self.has_teacher else self.group_size


TOY = Path(__file__).resolve().parent / "toy"

PRESETS = {
    # toy/ is a model folder and a problem file like any other
    "toy": dict(
        model=str(TOY), data=str(TOY / "problems.jsonl"), prompts="toy",
        steps=50, lr=2e-3, max_grad_norm=1.0, lora_rank=16, lora_alpha=32.0, temperature=1.0,
        max_new_tokens=64, sample_batch=1024, micro_batch=32, gradient_checkpointing=False,
        final_problems=100,
        # small kernels wait for the slowest thread: next to another busy process, two threads are
        # three times slower than one
        threads=1,
    ),
    # the defaults above; --grader math-verify is better where answers are LaTeX
    "qwen": dict(grader="exact"),
}  # fmt: skip


# ---- 2. Records. ---------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can correct. `main` prints it as one line and exits with 2."""


class Problem(NamedTuple):
    question: str
    solution: str  # worked out, by the data set's author
    answer: str


class Sample(NamedTuple):
    """One response as it was drawn."""

    ids: list[int]  # with the end token, so that stopping is trained as well
    truncated: bool  # cut at the cap, without an end token
    entropy: float  # mean entropy of the sampled distributions, nats per token


class Reply(NamedTuple):
    """What a critic answered."""

    text: str | None  # None: the request failed, it was too long, or the reply was cut off
    tokens: int  # generated; 0 if a server does not say


@dataclass
class Rollout:
    """One attempt, and everything that is added to it on the way to the loss."""

    problem: Problem
    prompt: list[int]  # the student's
    sample: Sample
    text: str
    reward: float  # 1 if right, else 0
    context: str | None = None  # c of eq (1); None: no teacher, or no valid critique
    critic_tokens: int = 0  # that the critic generated
    teacher_prompt: list[int] | None = None
    scored_length: int | None = None  # response tokens that are scored; None: all
    advantage: float = 0.0  # eq (3)

    @property
    def scored_ids(self) -> list[int]:
        return self.sample.ids[: self.scored_length]


@dataclass
class Chat:
    """A causal language model with its tokenizer."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    end_ids: list[int]  # any of them ends a response; the first one also pads
    window: int  # tokens of prompt and response together
    # by kind of batch: rows that fit into memory, see halve_rows
    max_rows: dict[str, int] = field(default_factory=dict)

    @property
    def head(self) -> Tensor:
        """(V, H): logits = hidden @ head.T."""
        return self.model.get_output_embeddings().weight

    def encode(self, messages: list[dict], thinking: bool = False) -> list[int]:
        """Ids of a conversation, up to and including the header of the reply."""
        safe = [{**m, "content": self.escape(m["content"])} for m in messages]
        text = self.tokenizer.apply_chat_template(
            safe, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        # the template has already written the special tokens
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # a tokenizer without byte fallback maps every unknown character to one token
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and unknown not in self.end_ids:
            raise UserError(
                f"the tokenizer has no tokens for {text[:80]!r}; choose another --model, --prompts "
                "or --data"
            )
        return ids

    def escape(self, text: str) -> str:
        """Put a space into the names of special tokens, so that a text cannot end its own turn."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, token.content[:1] + " " + token.content[1:])
        return text

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@dataclass
class Run:
    """A training run: what `take_step` works with, and where the run stands."""

    cfg: Config
    chat: Chat
    problems: "Split"
    critic: "Critic | None"
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimiser steps taken
    seen: int = 0  # position in the training problems
    best: float = -1.0  # best validation accuracy
    seconds: list[float] = field(default_factory=list)  # per step since this process started


# ---- 3. LoRA: an adapter that can be switched off. Off, the model is the initial policy. ---------


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen and A (rank, in), B (out, rank) trained.

    B starts at zero, so the student starts with the teacher's weights. A and B are float32 whatever
    W is: at lr 5e-6 a bfloat16 update rounds to zero.
    """

    enabled = True  # switched by adapters_off

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        # the names of nn.Linear, so that the keys of the state dict do not change
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        device = linear.weight.device
        # uniform in ±1 / sqrt(in); drawn on the CPU, so that every device starts alike
        a = 2 * torch.rand(rank, linear.in_features, generator=generator) - 1
        self.A = nn.Parameter((a / math.sqrt(linear.in_features)).to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        # The matmul adds the delta while it still sums in float32. Added afterwards, to a bfloat16
        # output that is rounded already, a delta below half a step of that grid would be lost.
        rows = x.flatten(0, -2)
        delta = rows @ self.A.to(x.dtype).T @ (self.scale * self.B).to(x.dtype).T
        y = torch.addmm(delta, rows, self.weight.T)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def add_adapters(model: nn.Module, cfg: Config) -> None:
    """Freeze the model, and put a LoRALinear in place of every projection but the head."""
    # its own generator, so that the adapters do not depend on other random draws
    generator = torch.Generator().manual_seed(cfg.seed)
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # the fused loss multiplies by the head's own weight, so the head gets no adapter
            if type(child) is nn.Linear and child is not head:
                adapted = LoRALinear(child, cfg.lora_rank, cfg.lora_alpha, generator)
                setattr(parent, name, adapted)
    if not adapters(model):
        raise UserError(f"{type(model).__name__} has no nn.Linear for LoRA; choose another --model")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the initial policy, bit for bit.

    Do not call backward inside: gradient checkpointing would recompute the student's blocks without
    the adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# All three frozen roles use the initial weights. They have separate names so that a fork can change
# one. A teacher that averages past adapters, for example, is a context manager that swaps p.data,
# an update of the average after optimizer.step(), and an entry in the checkpoint.
teacher_weights = adapters_off  # q of the equations
critic_weights = adapters_off  # of `--critic self`
base_weights = adapters_off  # of the closing comparison, and of the KL to the base


# ---- 4. Sample. ----------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    chat: Chat,
    prompts: list[list[int]],
    max_new_tokens: int,
    uniforms: np.ndarray | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
    work: str = "attempts",
) -> list[Sample]:
    """One response for each prompt. Greedy without `uniforms`.

    uniforms: float32 in [0, 1), (len(prompts), max_new_tokens). Each row has its own random
    numbers, so up to rounding a sample depends neither on the other rows nor on the batch size. The
    full softmax is drawn from, since the loss scores the full softmax: no top-k and no top-p,
    whatever the model's generation config says.
    """
    # in train mode gradient checkpointing would switch the KV cache off
    chat.model.eval()
    samples = []

    def sample_rest(rows: int) -> None:
        while len(samples) < len(prompts):
            part = slice(len(samples), len(samples) + rows)
            numbers = None if uniforms is None else uniforms[part]
            drawn = generate_batch(chat, prompts[part], max_new_tokens, numbers, temperature)
            samples.extend(drawn)

    halve_rows(sample_rest, chat, work, min(batch_size, len(prompts)), "--sample-batch")
    return samples


def generate_batch(chat, prompts, max_new_tokens, uniforms, temperature) -> list[Sample]:
    """All prompts at once. Finished rows are dropped from the batch and from the KV cache.

    Raises FloatingPointError, after the last token, if any distribution held NaN.
    """
    device, B = chat.model.device, len(prompts)
    # padded on the left, so that the next token of every row is in the same column
    ids = pad(prompts, chat.end_ids[0], "left").to(device)  # (B, width)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, "left").to(device)
    # the first real token of a padded row has position 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    if mask.all():
        mask = None  # an all-ones mask slows the forward pass by 20 % (toy, CPU)
    if uniforms is not None:
        uniforms = torch.from_numpy(uniforms).to(device)
    ends = torch.tensor(chat.end_ids, device=device)
    # the prompt that each row of the shrinking batch belongs to
    alive = torch.arange(B, device=device)
    # -1: nothing drawn
    drawn = torch.full((B, max_new_tokens), -1, device=device)
    entropy = torch.zeros(B, device=device)
    cache = transformers.DynamicCache(config=chat.model.config)

    for t in progress(range(max_new_tokens), desc="generate", unit="token"):
        hidden = chat.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
            past_key_values=cache,  # from transformers 5.24 on: cache=cache
        ).last_hidden_state  # fmt: skip
        # only the last position predicts; float32 from the logits on, as in the loss
        logits = F.linear(hidden[:, -1], chat.head).float().div_(temperature)
        p = F.softmax(logits, -1)  # (rows, V)
        entropy[alive] += torch.special.entr(p).sum(-1)
        if uniforms is None:
            token = p.argmax(-1)  # greedy, for the critic
        else:
            # inverse CDF: the first token whose cumulative probability exceeds the uniform number
            cdf = p.cumsum(-1)
            u = uniforms[alive, t, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)[:, 0]
            # NaN gives index V; it is reported below
            token = token.clamp(max=cdf.shape[1] - 1)
        drawn[alive, t] = token
        unfinished = torch.isin(token, ends, invert=True).nonzero()[:, 0]
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(alive):
            # named for beam search, but it selects rows in every kind of cache
            cache.reorder_cache(unfinished)
            alive, token, position = alive[unfinished], token[unfinished], position[unfinished]
            mask = None if mask is None else mask[unfinished]
        ids, position = token[:, None], position[:, -1:] + 1
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=1)

    if not entropy.isfinite().all():
        raise FloatingPointError("the logits are not finite while sampling")
    samples = []
    for row, total in zip(drawn.tolist(), entropy.tolist()):
        response = [i for i in row if i >= 0]
        truncated = response[-1] not in chat.end_ids
        samples.append(Sample(response, truncated, total / len(response)))
    return samples


def attempt(
    chat: Chat, problems: list[tuple[int, Problem]], cfg: Config, samples: int = 1, seed=None
) -> list[Rollout]:
    """`samples` attempts at each (number, problem), graded.

    Attempt k uses random numbers that depend on (seed, number, k) alone, so neither batching nor
    the number of processes affects it. `seed` is cfg's by default.
    """
    seed = cfg.seed if seed is None else seed
    repeated, prompts, uniforms = [], [], []
    for number, problem in problems:
        prompt = chat.encode(FORMATS[cfg.prompts].student(problem.question))
        for k in range(samples):
            rng = np.random.default_rng((seed, number, k))
            repeated.append(problem)
            prompts.append(prompt)
            uniforms.append(rng.random(cfg.max_new_tokens, np.float32))
    drawn = generate(
        chat, prompts, cfg.max_new_tokens, np.array(uniforms), cfg.temperature, cfg.sample_batch
    )
    rollouts = []
    for problem, prompt, sample in zip(repeated, prompts, drawn):
        # the text is for the critic, the grader and the reader; the loss uses the ids
        text = chat.decode(sample.ids)
        reward = float(is_correct(text, problem.answer, cfg.grader))
        rollouts.append(Rollout(problem, prompt, sample, text, reward))
    return rollouts


# ---- 5. Critic: a frozen language model, in this process or behind a URL. ------------------------

# conversations in, one reply to each out
Critic = Callable[[list[list[dict]]], list[Reply]]


@dataclass
class LocalCritic:
    """Greedy decoding by a model in this process; for --critic self the solver, adapter off."""

    chat: Chat
    max_new_tokens: int
    batch_size: int

    def __call__(self, conversations: list[list[dict]]) -> list[Reply]:
        # a prompt that leaves no room for the reply gets none
        room = self.chat.window - self.max_new_tokens
        fitting = {}
        for i, messages in enumerate(conversations):
            prompt = self.chat.encode(messages)
            if len(prompt) <= room:
                fitting[i] = prompt
        with critic_weights(self.chat.model):
            samples = generate(
                self.chat, list(fitting.values()), self.max_new_tokens,
                batch_size=self.batch_size, work="critiques",
            )  # fmt: skip
        replies = [Reply(None, 0)] * len(conversations)
        for i, sample in zip(fitting, samples):
            text = None if sample.truncated else self.chat.decode(sample.ids)
            replies[i] = Reply(text, len(sample.ids))
        return replies


# ---- 6. Conditions: who writes the context c. ----------------------------------------------------


def write_critiques(rollouts: list[Rollout], critic: Critic, cfg: Config) -> list[str | None]:
    """c is the attempt, corrected by the critic.

    A reply that is cut off, or that lacks steps or an answer, becomes None: half a trace or an
    error message in the teacher's prompt would be distilled like any other text.
    """
    prompt_format, conversations = FORMATS[cfg.prompts], []
    for r in rollouts:
        question, solution, answer = r.problem
        shown = solution if cfg.critic_sees_reference else None
        messages = prompt_format.critic(question, r.text, shown, answer, cfg.critic_style)
        conversations.append(messages)
    critiques = []
    for r, reply in zip(rollouts, critic(conversations)):
        r.critic_tokens = reply.tokens
        # without the critic's thinking and the words around its trace; the limit bounds the time
        # that regular expressions take on a runaway reply
        trace = prompt_format.extract_trace(strip_thinking(reply.text or "")[:200_000])
        valid = trace is not None and extract_answer(trace) is not None
        critiques.append(trace if valid else None)
    return critiques


def copy_solutions(rollouts: list[Rollout], critic, cfg: Config) -> list[str]:
    """c is the data set's worked solution, in its author's words."""
    return [r.problem.solution for r in rollouts]


def group_advantages(rollouts: list[Rollout], critic, cfg: Config) -> list[float]:
    """Eq (3). The G attempts at one problem follow one another."""
    rewards = np.array([r.reward for r in rollouts]).reshape(-1, cfg.group_size)  # (problems, G)
    spread = rewards.std(1, keepdims=True)
    # equal rewards carry no signal: 0, not 0 / 0
    advantages = (rewards - rewards.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return advantages.flatten().tolist()


class Condition(NamedTuple):
    # (rollouts, critic, cfg) → one context per rollout, or None to leave it out; without a teacher
    # one advantage per rollout, which is the same for all of its tokens
    write: Callable
    asks_critic: bool  # else no critic is loaded
    has_teacher: bool = True


# All conditions share sampler, denominator, optimiser and evaluation. critique and reference differ
# in c alone; grpo has no c, and a different loss.
CONDITIONS = {
    "critique": Condition(write_critiques, asks_critic=True),
    "reference": Condition(copy_solutions, asks_critic=False),
    "grpo": Condition(group_advantages, asks_critic=False, has_teacher=False),
}


def write_contexts(rollouts: list[Rollout], critic: Critic | None, cfg: Config) -> None:
    """Set the context of each rollout, or in grpo its advantage."""
    values = CONDITIONS[cfg.condition].write(rollouts, critic, cfg)
    for r, value in zip(rollouts, values):
        if cfg.has_teacher:
            r.context = value
        else:
            r.advantage = value


# ---- 7. Teacher prompts, and the hidden states of the response. ----------------------------------


def prepare(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Rollout]:
    """The rollouts that are scored, each with its teacher's prompt; in grpo all, without one.

    A rollout without a context is left out, and so is one whose context does not fit the window.
    """
    if not cfg.has_teacher:
        return rollouts
    scored = []
    for r in rollouts:
        if r.context is None:
            continue
        # problem and context; the attempt itself is not shown to the teacher
        messages = FORMATS[cfg.prompts].teacher(r.problem.question, r.context)
        prompt = chat.encode(messages, cfg.teacher_thinking)
        if len(prompt) + len(r.sample.ids) > chat.window:
            continue
        r.teacher_prompt = prompt
        if cfg.stop_at_first_edit:
            # up to and including the first token that the critique changes
            r.scored_length = first_edit(chat.decode, r.sample.ids, r.context) + 1
        scored.append(r)
    return scored


def pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    """(rows, width of the longest)."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side=side
    )


def response_hidden(chat: Chat, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The hidden states that predict each response token, (N, H), responses one after the other.

    Rows are padded on the right, so no mask is needed: a causal model never attends to a later
    position. A mask made from token values would be wrong, because the end token often pads, and it
    must be scored.
    """
    # ids in, ids out: a response is never decoded and encoded again
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    ids = pad(rows, chat.end_ids[0], "right").to(chat.model.device)
    hidden = chat.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    predicting = []
    for states, prompt, response in zip(hidden, prompts, responses):
        # the state at position t predicts token t + 1: the prompt's last state predicts y_1
        first = len(prompt) - 1
        predicting.append(states[first : first + len(response)])
    return torch.cat(predicting)


# ---- 8. Loss: each divergence with its gradient, worked out by hand. -----------------------------
#
# With p = softmax(z):  ∂ log p_v / ∂z_k = 1[v=k] − p_k   and   ∂p_v / ∂z_k = p_v (1[v=k] − p_k).
#
#   eq (4), KL(p‖q) = Σ_v p_v d_v with d_v = log p_v − log q_v:
#     ∂/∂z_k = Σ_v p_v (1[v=k] − p_k) d_v + Σ_v p_v (1[v=k] − p_k) = p_k (d_k − KL) + 0
#   eq (5), KL(q‖p) = Σ_v q_v (log q_v − log p_v):
#     ∂/∂z_k = −Σ_v q_v (1[v=k] − p_k) = p_k − q_k
#   one drawn token y, −A log p_y with A held constant:
#     ∂/∂z_k = A (p_k − 1[y=k])
#   With A of eq (2) the last is, in expectation over y ~ p, the gradient of eq (4).
#
# Each function takes log p and log q (tokens, V), the drawn ids and the advantages of eq (3), both
# (tokens,). It returns the loss of each token, (tokens,) in nats, and its gradient wrt z, (tokens,
# V).


def kl_student_teacher(log_p, log_q, ids, advantage):  # eq (4)
    p = log_p.exp()
    log_ratio = log_p - log_q
    kl = torch.linalg.vecdot(p, log_ratio)
    return kl, p * (log_ratio - kl[:, None])


def kl_teacher_student(log_p, log_q, ids, advantage):  # eq (5)
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q - log_p)
    return kl, log_p.exp() - q


def policy_gradient(log_p, log_q, ids, advantage):
    """−A log p_y.

    The rollouts are the current policy's, so the importance ratio is 1 and a clip of it would do
    nothing. There is no KL to a reference policy: the adapter starts at zero and training is short,
    so the policy stays near it.
    Like every loss here it is averaged over all scored tokens of the step.
    """
    # p − 1[y]: subtract one at the drawn token
    gradient = log_p.exp()
    gradient.scatter_add_(1, ids[:, None], -torch.ones_like(gradient[:, :1]))
    return -advantage * of_drawn(log_p, ids), gradient * advantage[:, None]


def kl_sampled(log_p, log_q, ids, advantage):
    a = of_drawn(log_q, ids) - of_drawn(log_p, ids)  # eq (2)
    _, gradient = policy_gradient(log_p, log_q, ids, a)
    return -a, gradient  # −A is one token's estimate of eq (4)


def of_drawn(x: Tensor, ids: Tensor) -> Tensor:
    """(tokens, V) → (tokens,): the entries of the drawn tokens."""
    return x.gather(1, ids[:, None])[:, 0]


# The same losses for autograd.


def kl_student_teacher_naive(log_p, log_q, ids, advantage):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_teacher_student_naive(log_p, log_q, ids, advantage):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def policy_gradient_naive(log_p, log_q, ids, advantage):
    return -advantage * of_drawn(log_p, ids)


def kl_sampled_naive(log_p, log_q, ids, advantage):
    a = (of_drawn(log_q, ids) - of_drawn(log_p, ids)).detach()
    surrogate = -a * of_drawn(log_p, ids)
    return surrogate + (-a - surrogate).detach()  # value −A, gradient of the surrogate


class Loss(NamedTuple):
    fused: Callable  # (loss, gradient wrt z)
    naive: Callable  # the loss alone, for autograd: the tests compare the two


# The choices of --kl. "Forward" and "reverse" KL are used both ways, so a name is the formula.
DIVERGENCES = {
    "student||teacher": Loss(kl_student_teacher, kl_student_teacher_naive),
    "teacher||student": Loss(kl_teacher_student, kl_teacher_student_naive),
    "sampled": Loss(kl_sampled, kl_sampled_naive),
}
GRPO_LOSS = Loss(policy_gradient, policy_gradient_naive)


def log_probs(
    hidden: Tensor, head: Tensor, temperature: float, out: Tensor | None = None
) -> Tensor:
    """log softmax(h Wᵀ / temperature), (tokens, V), in float32; into `out` if it is given.

    The logits are rounded to the model's dtype, as in the sampler. The rest is float32: a bfloat16
    log-softmax over 150,000 entries makes small divergences negative.
    """
    if out is None:
        out = head.new_empty(len(hidden), len(head), dtype=torch.float32)
    if head.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.T)  # converts half precision to float32
    # in place, since (tokens, V) tensors are the largest in the program
    out.div_(temperature)
    return torch.log_softmax(out, -1, out=out)


@torch.no_grad()
def fused_loss(
    h_student: Tensor,
    h_teacher: Tensor | None,
    head: Tensor,
    ids: Tensor,
    advantage: Tensor,
    loss_fn: Callable,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each token, (N,) float32, and the gradient of their sum wrt h_student, (N, H).

    h_student, h_teacher (N, H); head (V, H), frozen; ids, advantage (N,). Logits exist for `chunk`
    tokens at a time, and the gradient is computed while they exist: z = h Wᵀ / temperature, so it
    is (∂loss/∂z) W / temperature. These are three matmuls (student's logits, teacher's logits,
    gradient), as many as plain autograd needs. No torch.autograd.Function is needed, since nothing
    follows the loss: the caller goes on with h_student.backward(gradient).
    """
    N = len(h_student)
    losses = torch.empty(N, device=h_student.device)
    gradient = torch.empty_like(h_student)
    # buffers that all chunks use: on a CPU, fresh memory for each takes 10 % longer
    grad_z = head.new_empty(min(chunk, N), len(head))
    log_p = torch.empty_like(grad_z, dtype=torch.float32)
    # without a teacher any tensor will do: policy_gradient ignores log q
    log_q = log_p if h_teacher is None else torch.empty_like(log_p)
    few = math.ceil(chunk / 16)
    for start in range(0, N, chunk):
        tokens = slice(start, start + chunk)
        n = len(ids[tokens])
        log_probs(h_student[tokens], head, temperature, out=log_p[:n])
        if h_teacher is not None:
            log_probs(h_teacher[tokens], head, temperature, out=log_q[:n])
        # a few tokens at a time, because loss_fn makes several more tensors of this size
        for first in range(0, n, few):
            part = slice(first, min(first + few, n))
            losses[tokens][part], grad_z[part] = loss_fn(
                log_p[part], log_q[part], ids[tokens][part], advantage[tokens][part]
            )
        gradient[tokens] = grad_z[:n] @ head / temperature
    return losses, gradient


# ---- 9. Step. ------------------------------------------------------------------------------------


def score(
    chat: Chat,
    rollouts: list[Rollout],
    loss_fn: Callable,
    cfg: Config,
    weights: Callable,
):
    """Both forward passes and the loss of one micro-batch: (h_student, its losses, its gradient).

    `weights` are the teacher's: a context manager, as adapters_off.
    """
    device = chat.model.device
    # both sequences of a rollout end in the ids that were drawn
    responses = [r.scored_ids for r in rollouts]
    h_student = response_hidden(chat, [r.prompt for r in rollouts], responses)  # (N, H)
    # the teacher: other weights, another prompt, and no gradient, the sg of eq (1)
    h_teacher = None
    if rollouts[0].teacher_prompt is not None:
        with torch.no_grad(), weights(chat.model):
            h_teacher = response_hidden(chat, [r.teacher_prompt for r in rollouts], responses)
    # one entry per scored token, in the order of the hidden states
    ids = torch.tensor([i for r in rollouts for i in r.scored_ids], device=device)  # (N,)
    advantage = torch.tensor([r.advantage for r in rollouts for _ in r.scored_ids], device=device)
    losses, gradient = fused_loss(
        h_student, h_teacher, chat.head, ids, advantage, loss_fn, cfg.temperature, cfg.kl_chunk
    )
    return h_student, losses, gradient


def update(
    chat: Chat, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], cfg: Config
) -> dict[str, float]:
    """One optimiser step: {loss (mean over scored tokens, nats), grad_norm (before the clip)}.

    Raises FloatingPointError, before any weight changes, if they are not finite.
    """
    loss_fn = DIVERGENCES[cfg.kl].fused if cfg.has_teacher else GRPO_LOSS.fused
    # the denominator of eq (1), for all micro-batches and processes
    total = all_sum(sum(len(r.scored_ids) for r in rollouts))
    if total == 0:
        return {"loss": 0.0, "grad_norm": 0.0}
    chat.model.train()  # in eval mode gradient checkpointing is silently off; dropout is 0 in both
    # Dividing by `total` before the backward pass would underflow in float16. So the gradient is
    # multiplied by scale / total (about 1) before it, and divided by scale (a power of 2) after it.
    scale = 2.0 ** round(math.log2(total))

    def accumulate(rows: int) -> float:
        """Add up the gradients, `rows` rollouts at a time. The sum of all tokens' losses."""
        optimizer.zero_grad()
        loss_sum = 0.0
        for start in range(0, len(rollouts), rows):
            part = rollouts[start : start + rows]
            h_student, losses, gradient = score(chat, part, loss_fn, cfg, teacher_weights)
            h_student.backward(gradient * (scale / total))
            loss_sum += losses.sum().item()
        return loss_sum

    rows = max(1, min(cfg.micro_batch, len(rollouts)))
    loss_sum = halve_rows(accumulate, chat, "rollouts", rows, "--micro-batch")
    mean_loss = all_sum(loss_sum) / total
    weights = list(adapters(chat.model).values())
    sum_gradients(weights)
    for p in weights:
        p.grad /= scale
    norm = nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(mean_loss + norm):
        raise FloatingPointError(f"loss {mean_loss}, gradient norm {norm}; nothing was updated")
    optimizer.step()
    return {"loss": mean_loss, "grad_norm": norm}


def take_step(run: Run) -> tuple[dict, list[Rollout]]:
    """The algorithm, once: problems → rollouts → contexts → update. (log entry, rollouts)."""
    cfg, chat, cost = run.cfg, run.chat, {}
    # 32 problems; in grpo 4, with 8 attempts each. Processes share out problems, not attempts, so
    # that a group stays in one process
    chosen = next_problems(run.problems.train, run.seen, cfg)
    with timed(cost, "sample_s"):
        rollouts = attempt(chat, share(chosen), cfg, cfg.attempts_per_problem)
    with timed(cost, "critic_s"):
        write_contexts(rollouts, run.critic, cfg)
    with timed(cost, "train_s"):
        scored = prepare(chat, rollouts, cfg)
        losses = update(chat, run.optimizer, scored, cfg)
    # where the next step begins, and what a checkpoint stores
    run.step += 1
    run.seen += len(chosen)
    run.seconds.append(sum(cost.values()))
    metrics = measure(rollouts, cfg)
    cost["peak_mib"] = round(peak_memory(chat.model.device), 1)
    return {"step": run.step, **losses, **metrics, "cost": cost}, rollouts


def train(cfg: Config) -> None:
    """Train to cfg.steps; log, evaluate and save on the way. Ctrl-C saves, then stops."""
    chat = load_solver(cfg)
    problems = load_problems(cfg, chat)
    critic = load_critic(cfg, chat) if CONDITIONS[cfg.condition].asks_critic else None
    add_adapters(chat.model, cfg)
    if cfg.gradient_checkpointing:
        # the reentrant kind gives no gradient where its input, the embeddings, requires none
        chat.model.activation_checkpointing_enable({"use_reentrant": False})
    # no weight decay: it would pull the adapter, and with it the policy, towards the base
    optimizer = torch.optim.AdamW(adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
    run = Run(cfg, chat, problems, critic, optimizer)
    open_folder(run)  # a new run folder; with --resume the one that is there, and its state
    print_opening(run)

    stop = empty_steps = 0
    with deferred_interrupt() as interrupted:
        while run.step < cfg.steps and not stop:
            entry, rollouts = take_step(run)
            write_log(run, entry)
            print_step(run, entry, rollouts)
            empty_steps = 0 if entry["scored"] else empty_steps + 1
            if is_due(run.step, cfg.eval_every):
                validate(run, rollouts)
            if is_due(run.step, cfg.save_every):
                save_checkpoint(run, "checkpoint.pt")
            # all processes stop, or none does
            stop = all_sum(len(interrupted) + (empty_steps == 3))
    save_checkpoint(run, "checkpoint.pt")
    if empty_steps == 3:
        raise UserError(NOTHING_SCORED)
    if stop:
        raise KeyboardInterrupt
    if cfg.final_problems:
        print_closing(run)
    if cfg.export:
        export(run)
    barrier()  # no process ends while rank 0 still writes


# ==================================================================================================
#
# The method ends here. What follows is plumbing: processes, problem files and reward, loading of
# models, log and checkpoint, what is printed, the command line.
#
# ==================================================================================================


# ---- 10. Processes: one, or several under torchrun. With one, these functions change nothing. ----


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes() -> None:
    """Under torchrun, join the others. Only rank 0 prints."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # a process may have to wait for another one's whole rollout
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    # a process that exits with the group open may abort
    atexit.register(dist.destroy_process_group)
    # only rank 0 prints; errors of every rank still reach stderr
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def share(items: list) -> list:
    """This process's part."""
    return items[rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(items: list) -> list:
    """The items of all processes, one process after the other."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return list(itertools.chain(*parts))


def all_sum(value: float) -> float:
    """The sum of all processes' values; an int stays an int."""
    return sum(gather([value]))


def barrier() -> None:
    """Wait for all processes."""
    all_sum(0)


def sum_gradients(weights: list[nn.Parameter]) -> None:
    """Add up the gradients of all processes. A process without rollouts adds zeros."""
    for p in weights:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if dist.is_initialized():
            dist.all_reduce(p.grad)


# ---- 11. Problems: files, split, order. ----------------------------------------------------------


def read_row(row: object) -> Problem:
    """Fields `problem, solution, answer`, or GSM8K's `question, answer` with `#### 42` at its end.

    Raises ValueError with what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if "problem" in row:
        return Problem(*(read_text(row, name) for name in ("problem", "solution", "answer")))
    question, worked = read_text(row, "question"), read_text(row, "answer")
    _, mark, answer = worked.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("field 'answer' does not end in '#### ANSWER' and there is no 'problem'")
    return Problem(question, worked, answer.strip())


def read_text(row: dict, name: str) -> str:
    value = row.get(name)
    # answers are often written as bare numbers
    if type(value) in (int, float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is missing, empty or not text")
    value.encode()  # half of a surrogate pair fails here, not hours later in the tokenizer
    return value.strip()


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a .json array or .jsonl file. A line that is not JSON yields None."""
    try:
        text = path.read_text("utf-8-sig")  # -sig: without a byte-order mark
        # one array, or one object per line
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else text.split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --data a .json or .jsonl file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not UTF-8, or not JSON ({error}); is the file cut off?") from None
    for number, row in enumerate(rows, 1):
        if whole:
            yield f"{path}, row {number}", row
        elif row.strip():
            yield f"{path}, line {number}", read_json(row)


def read_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find_data(name: str) -> Path:
    """The local path of --data; hub:owner/name/file is downloaded once, into the hub's cache."""
    if not name.startswith("hub:"):
        return Path(name)
    owner, repo, file = (name[4:].split("/", 2) + ["", ""])[:3]
    try:
        path = huggingface_hub.hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset")
    except Exception as error:  # the hub's client raises a dozen types
        raise UserError(
            f"cannot load {name} ({first_line(error)}); give --data a local file"
        ) from None
    return Path(path)


def read_problems(
    cfg: Config, chat: Chat
) -> tuple[dict[str, tuple[Problem, dict]], dict[str, int]]:
    """({normalised question: (problem, its row)}, rows dropped by reason)."""
    found = {}
    dropped = {"duplicate": 0, "without a solution": 0, "bad": 0}
    for where, row in progress(read_rows(find_data(cfg.data)), desc="read"):
        if isinstance(row, dict) and row.get("solution") == "":
            dropped["without a solution"] += 1  # DeepScaleR has many
            continue
        try:
            problem = read_row(row)
            prompt = chat.encode(FORMATS[cfg.prompts].student(problem.question))
            if len(prompt) + cfg.max_new_tokens > chat.window:
                raise ValueError(f"and --max-new-tokens exceed the model's window of {chat.window}")
        except (ValueError, UserError) as error:
            if not cfg.skip_bad_rows:
                raise UserError(
                    f"{where}: {error}; correct the row or add --skip-bad-rows"
                ) from None
            dropped["bad"] += 1
            continue
        # the same question twice would leak from training into the test
        key = normalise(problem.question)
        if key in found:
            dropped["duplicate"] += 1
        else:
            found[key] = (problem, row)
    return found, dropped


class Split(NamedTuple):
    """Problems by use. No two have the same normalised question, within a part or across."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    dropped: dict[str, int]  # rows, by reason


def load_problems(cfg: Config, chat: Chat) -> Split:
    """Read and split --data. The split follows from the set of questions, not from their order."""
    found, dropped = read_problems(cfg, chat)
    test, held_out = cfg.test_problems, cfg.test_problems + cfg.validation_problems
    if len(found) <= held_out:
        raise UserError(
            f"{cfg.data}: {len(found)} distinct problems (dropped: {format_counts(dropped)}) leave "
            f"none to train on beside {held_out} held out; lower --test-problems"
        )
    keys = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    problems = [found[key][0] for key in keys]
    return Split(problems[held_out:], problems[test:held_out], problems[:test], dropped)


def next_problems(problems: list[Problem], seen: int, cfg: Config) -> list[tuple[int, Problem]]:
    """The step's (position, problem). Each epoch is a shuffle that follows from the seed alone."""
    chosen = []
    # positions count through the epochs, so a resumed run goes on where it was
    for position in range(seen, seen + cfg.attempts_per_step // cfg.attempts_per_problem):
        epoch, index = divmod(position, len(problems))
        order = epoch_order(len(problems), cfg.seed, epoch)
        chosen.append((position, problems[order[index]]))
    return chosen


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


# ---- 12. Reward. ---------------------------------------------------------------------------------


def as_number(text: str) -> Fraction | None:
    """`1,234`, `-3/4`, `\\frac{3}{4}`, `$5.50`, `12%`: the exact number; else None.

    Units in \\text{} are ignored.
    """
    # a unit becomes a space; \$ and {,} are LaTeX for $ and ,
    text = re.sub(r"\\text\{[^{}]*\}", " ", text[:1001]).strip()
    text = text.replace("\\$", "").replace("{,}", ",")
    # 1 1/2 is not 11/2, and 1, 234 is not 1234
    if len(text) > 1000 or re.search(r"\d\s*\\[dt]?frac|\d,?\s+\d", text):
        return None
    # LaTeX fractions become a/b
    text = re.sub(r"\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[!,;: ]|[\s$]", "", text).rstrip(".")
    divisor = 100 if text.endswith("%") else 1
    text = text.removesuffix("%").removesuffix("\\")
    # 1,234 is a number, 12,34 is not
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    number = r"[-+]?(\d{1,40}(\.\d{1,40})?|\.\d{1,40}|\d{1,40}/0*[1-9]\d{0,39})"
    return Fraction(text) / divisor if re.fullmatch(number, text) else None


def is_correct(text: str, answer: str, grader: str) -> bool:
    """Whether a response ends in this answer. Reward and evaluation use it alike."""
    found = extract_answer(text)
    if found is None:
        return False
    if normalise(found) == normalise(answer):
        return True
    # 0.5, 1/2 and 50% are equal
    number, wanted = as_number(found), as_number(answer)
    if number is not None and wanted is not None:
        return number == wanted
    if grader == "exact" or not (is_tame(found) and is_tame(answer)):
        return False
    import math_verify  # optional; check_config has made sure that it is installed

    gold, response = math_verify.parse(f"${answer}$"), math_verify.parse(f"${found}$")
    return bool(math_verify.verify(gold, response))


def is_tame(text: str) -> bool:
    """math-verify computes what it reads: power towers, large factorials, deep nesting hang it."""
    brackets = text.count("(") + text.count("{") + text.count("[")
    # a power of a power; a power in an exponent; a long exponent, factorial or number
    wild = re.search(r"\^[\d(){}]*\^|\^\{[^{}]*\^|\*\*|\^\{?-?\d{4}|\d{3}!|!!|\)!|\d{16}", text)
    return len(text) < 100 and brackets < 12 and wild is None


# ---- 13. Models. ---------------------------------------------------------------------------------


def load_solver(cfg: Config) -> Chat:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return load_model(cfg.model, cfg.dtype, cfg.device)


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Chat:
    """A frozen chat model from a folder or the hub. A UserError says why a model cannot be used."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"argument --device: {device}: {first_line(error)}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except Exception as error:  # the hub's client raises a dozen types
        raise UserError(
            f"cannot load model {name} ({first_line(error)}); name a local folder, or --preset toy"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template; choose an instruction-tuned model")
    # a chat model often has two end tokens, named in different files
    config = model.config.get_text_config()
    end_ids = set()
    for source in (tokenizer, config, model.generation_config):
        stop = getattr(source, "eos_token_id", None)
        end_ids.update(stop if isinstance(stop, list) else [stop])
    end_ids.discard(None)
    if not end_ids:
        raise UserError(f"{name} names no end token; set eos_token in its tokenizer_config.json")
    # dropout would make the student differ from the teacher by noise
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    # some models have no limit
    window = getattr(config, "max_position_embeddings", 1 << 20)
    # frozen: gradients reach only what add_adapters adds
    chat = Chat(model.to(device).requires_grad_(False), tokenizer, sorted(end_ids), window)
    if not has_plain_head(chat):
        raise UserError(
            f"{name} caps, scales or biases its logits, which the fused loss does not; choose "
            "another --model"
        )
    return chat


@torch.no_grad()
def has_plain_head(chat: Chat) -> bool:
    """Whether logits = h Wᵀ, as the fused loss assumes."""
    if getattr(chat.model.config.get_text_config(), "final_logit_softcapping", None):
        return False
    ids = torch.arange(4, device=chat.model.device)[None]
    # the head may be scaled or biased
    plain = chat.model.base_model(input_ids=ids).last_hidden_state @ chat.head.T
    # bfloat16 has three digits
    tolerance = 0.02 * plain.abs().max().item()
    return torch.allclose(chat.model(input_ids=ids).logits, plain, rtol=0.02, atol=tolerance)


def halve_rows(job: Callable, chat: Chat, work: str, rows: int, flag: str):
    """Run job(rows). If memory runs out, halve the rows and retry: only rounding changes."""
    rows = min(rows, chat.max_rows.get(work, rows))
    while True:
        try:
            return job(rows)
        except torch.OutOfMemoryError:
            pass  # the exception holds the job's tensors until this block is left
        if rows == 1:
            raise UserError(
                f"out of memory with a single row of {work}; lower --max-new-tokens, --kl-chunk or "
                "--critic-max-new-tokens and add --resume, or start again with a smaller model"
            )
        print(
            f"WARNING: out of memory with {rows} rows of {work}; continues with {flag} {rows // 2}"
        )
        rows //= 2
        chat.max_rows[work] = rows
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:150]


def load_critic(cfg: Config, chat: Chat) -> Critic:
    """The critic that --critic names. `chat` is the solver, for `self`."""
    length = cfg.critic_max_new_tokens or 2 * cfg.max_new_tokens
    if is_url(cfg.critic):
        urls = [url.strip() for url in cfg.critic.split(",")]
        return HTTPCritic(urls, cfg.critic_model, length)
    frozen = chat if cfg.critic == "self" else load_model(cfg.critic, cfg.dtype, cfg.device)
    if not cfg.critic_max_new_tokens:
        length = min(length, frozen.window // 2)  # the other half is for the prompt
    if length >= frozen.window:
        raise UserError(
            f"argument --critic-max-new-tokens: must be below the critic's window, {frozen.window}"
        )
    return LocalCritic(frozen, length, cfg.sample_batch)


@dataclass
class HTTPCritic:
    """OpenAI-compatible chat completions (vLLM, SGLang, a hosted API), on one or more servers."""

    urls: list[str]
    model: str
    max_new_tokens: int
    parallel: int = 16  # requests at once
    timeout: float = 600.0  # seconds for one reply
    tries: int = 4  # in all with one server; each further server adds one
    pause: float = 1.0  # seconds before the first retry of a failed server; doubles each time
    last_error: str = ""

    def __call__(self, conversations: list[list[dict]]) -> list[Reply]:
        self.last_error = ""
        with ThreadPoolExecutor(self.parallel) as pool:
            replies = pool.map(self.ask, itertools.count(), conversations)
            return list(progress(replies, total=len(conversations), desc="critic"))

    def ask(self, number: int, messages: list[dict]) -> Reply:
        """Request `number` starts at server number `number`, and goes on to the next if that fails.

        A reply can be anything, so any exception in reading it counts as a failure of that reply.
        """
        servers = len(self.urls)
        for k in range(servers + self.tries - 1):
            if k >= servers:
                time.sleep(self.pause * 2 ** (k - servers))
            try:
                return self.post(self.urls[(number + k) % servers], messages)
            except Exception as failure:
                error = failure
        self.last_error = first_line(error)
        return Reply(None, 0)

    def post(self, url: str, messages: list[dict]) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_new_tokens,
        }
        request = urllib.request.Request(
            url.rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # The key is read here and stored nowhere: no config, log or message holds it. A line end in
        # it would be quoted in an error. An unredirected header is not sent on to another address.
        key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError("content is not text")
        if choice.get("finish_reason") == "length":
            text = None  # cut off
        return Reply(text, int(usage.get("completion_tokens") or 0))


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


# ---- 14. Run folder: log.jsonl, checkpoint.pt (the last), best.pt, model/. -----------------------

NOTHING_SCORED = (
    "for 3 steps there was no valid context that fits the window, so nothing was learnt; the run "
    "is saved. Change --critic (for reference: --data), then add --resume"
)


STATE = ("step", "seen", "best")  # of a Run, in its checkpoint


def open_folder(run: Run) -> None:
    """A new run folder; with --resume the one that is there, whose state goes into `run`."""
    if run.cfg.resume:
        restore(run)
        return
    if rank() == 0:
        make_folder(Path(run.cfg.out))
    # what a reader needs to repeat the run
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    write_log(run, {"config": asdict(run.cfg), "versions": versions, "commit": code_commit()})
    save_checkpoint(run, "checkpoint.pt")  # so that --resume works from the first step on


def code_commit() -> str | None:
    """The commit of this file if it is in a git repository, with a + if anything was changed."""
    # --exclude: tags are ignored, so that it is always the hash
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    git += ["describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_folder(folder: Path) -> None:
    """An old run is moved aside. Any other folder that is not empty is an error."""
    if (folder / "log.jsonl").exists():
        number = 1
        while Path(f"{folder}.{number}").exists():
            number += 1
        folder.rename(f"{folder}.{number}")
        print(f"{folder} existed and was moved to {folder}.{number}")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder} exists and is not a run folder; name another")
    folder.mkdir(parents=True, exist_ok=True)


def write_log(run: Run, entry: dict) -> None:
    if rank() == 0:
        with open(Path(run.cfg.out, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def save_checkpoint(run: Run, file_name: str) -> None:
    """Atomic: a kill or a full disk at any moment leaves the old file or the new one."""
    if rank() == 0:
        state = {
            "config": asdict(run.cfg),
            "state": {name: getattr(run, name) for name in STATE},
            "adapters": adapters(run.chat.model),
            "optimizer": run.optimizer.state_dict(),
            "log_size": Path(run.cfg.out, "log.jsonl").stat().st_size,
        }
        # serialised in memory first: on a full disk torch.save raises no OSError
        buffer = io.BytesIO()
        torch.save(state, buffer)
        partial = Path(run.cfg.out, file_name + ".tmp")
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, Path(run.cfg.out, file_name))
    barrier()  # if another process failed now, torchrun would kill this one while it writes


def load_checkpoint(path: Path) -> dict:
    """{config, state, adapters, optimizer, log_size}. The file may be anyone's.

    weights_only: nothing in it can run code. Its config is checked like a command line.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # a knob that this version does not know is an error
        checkpoint["config"] = Config(**checkpoint["config"])
        check_config(checkpoint["config"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path} ({first_line(error)})") from None
    return checkpoint


def load_adapters(chat: Chat, checkpoint: dict) -> None:
    """Copy a checkpoint's adapters into the model."""
    saved, trained = checkpoint["adapters"], adapters(chat.model)
    shapes = [{name: p.shape for name, p in weights.items()} for weights in (saved, trained)]
    if shapes[0] != shapes[1]:
        raise UserError("the checkpoint's adapters do not fit; were --model or --lora-rank others?")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(saved[name])


def restore(run: Run) -> None:
    """Continue from the last checkpoint. There is no other random state, so the run repeats."""
    checkpoint = load_checkpoint(Path(run.cfg.out, "checkpoint.pt"))
    load_adapters(run.chat, checkpoint)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for group in run.optimizer.param_groups:
        group["lr"] = run.cfg.lr  # load_state_dict brings the old one, but --lr may be new
    for name in STATE:
        setattr(run, name, checkpoint["state"][name])
    if rank() == 0:
        # the steps after the checkpoint are taken, and logged, once more
        os.truncate(Path(run.cfg.out, "log.jsonl"), checkpoint["log_size"])


def export(run: Run) -> None:
    """OUT/model, for from_pretrained. Call it last: it adds the adapters to the weights.

    With bfloat16 weights the sum is rounded, so OUT/model is close to the policy, not equal to it.
    """
    if rank():
        return
    model, folder = run.chat.model, Path(run.cfg.out, "model")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.weight.copy_(layer.weight.float() + layer.scale * layer.B @ layer.A)
                layer.B.zero_()
    # the rest has the names and shapes of the loaded model
    weights = model.state_dict()
    for name in adapters(model):
        del weights[name]
    model.save_pretrained(folder, state_dict=weights)
    run.chat.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C only fills the list: the step in flight is finished and saved."""
    pressed = []
    before = signal.getsignal(signal.SIGINT)

    def handler(number, frame):
        # a second Ctrl-C kills at once: KeyboardInterrupt would wait for the http threads
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        pressed.append(number)
        if rank() == 0:
            print("finishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- 15. Measure and evaluate. -------------------------------------------------------------------

EVAL_SEED = 1_000_003  # of every evaluation: base and runs draw the same random numbers


def evaluate(chat: Chat, problems: list[Problem], cfg: Config) -> list[list[Rollout]]:
    """cfg.eval_samples attempts at each problem, a list for each.

    A problem's random numbers follow from EVAL_SEED and its place in the list. Under torchrun each
    process evaluates a share of the problems, and their order changes.
    """
    rollouts = attempt(chat, share(list(enumerate(problems))), cfg, cfg.eval_samples, EVAL_SEED)
    groups = []
    for start in range(0, len(rollouts), cfg.eval_samples):
        groups.append(rollouts[start : start + cfg.eval_samples])
    return gather(groups)


def accuracy(groups: list[list[Rollout]]) -> tuple[float, float]:
    """(Avg, Pass): the mean accuracy, and the share of problems that were solved at least once."""
    right = np.array([[r.reward for r in group] for group in groups])  # (problems, attempts)
    return float(right.mean()), float(right.max(1).mean())


def validate(run: Run, rollouts: list[Rollout]) -> None:
    """Evaluate on the validation problems; best.pt keeps the best adapters so far."""
    avg, _ = accuracy(evaluate(run.chat, run.problems.validation, run.cfg))
    drift = kl_to_base(run.chat, rollouts, run.cfg)
    write_log(run, {"step": run.step, "validation_avg": avg, "kl_base": drift})
    print(f"validation Avg@{run.cfg.eval_samples} {100 * avg:.1f}, KL to the base {drift:.4f}")
    if avg > run.best:
        run.best = avg
        save_checkpoint(run, "best.pt")


@torch.no_grad()
def kl_to_base(chat: Chat, rollouts: list[Rollout], cfg: Config) -> float:
    """Mean KL(policy‖base), nats per token, over the attempts of the step just taken.

    Both read the student's prompt. A sudden rise is the usual first sign of a collapse.
    """
    total, tokens = 0.0, 0
    rows = min(cfg.micro_batch, chat.max_rows.get("rollouts", cfg.micro_batch))
    for start in range(0, len(rollouts), rows):
        part = rollouts[start : start + rows]
        same = [replace(r, teacher_prompt=r.prompt, scored_length=None) for r in part]
        _, kl, _ = score(chat, same, kl_student_teacher, cfg, base_weights)
        total += kl.sum().item()
        tokens += len(kl)
    return all_sum(total) / max(1, all_sum(tokens))


def measure(rollouts: list[Rollout], cfg: Config) -> dict[str, float]:
    """What a step's rollouts show, for the log. The README's glossary explains each name."""
    rollouts = gather(rollouts)
    n, tokens = len(rollouts), sum(len(r.sample.ids) for r in rollouts)
    scored = [r for r in rollouts if r.teacher_prompt or not cfg.has_teacher]
    copied = []
    if CONDITIONS[cfg.condition].asks_critic:
        for r in scored:
            copied += copied_steps(r.text, r.context, cfg)
    # binary rewards: an advantage is 0 only where all rewards of its group are equal
    flat = 0 if cfg.has_teacher else sum(r.advantage == 0 for r in rollouts)
    return {
        "accuracy": sum(r.reward for r in rollouts) / n,
        "length": tokens / n,
        "truncated": sum(r.sample.truncated for r in rollouts) / n,
        "entropy": sum(r.sample.entropy for r in rollouts) / n,
        "scored": len(scored),
        "scored_tokens": sum(len(r.scored_ids) for r in scored),
        "critic_failed": n - len(scored),
        "copied": sum(copied) / max(1, len(copied)),
        "zero_variance": flat / n,
        "solver_tokens": tokens,
        "critic_tokens": sum(r.critic_tokens for r in rollouts),
    }


def copied_steps(text: str, critique: str, cfg: Config) -> list[bool]:
    """For each step of a critique: is it an exact copy of a step of the attempt?"""
    find_steps = FORMATS[cfg.prompts].find_steps
    attempted = find_steps(text)
    return [step in attempted for step in find_steps(critique)]


@contextlib.contextmanager
def timed(cost: dict[str, float], name: str) -> Iterator[None]:
    """Seconds spent inside, into cost[name]."""
    start = time.perf_counter()
    yield
    cost[name] = round(time.perf_counter() - start, 3)


def peak_memory(device: torch.device) -> float:
    """MiB: the CUDA allocator's peak, or the process's; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    # bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---- 16. What is printed. ------------------------------------------------------------------------


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def progress(items, **options) -> tqdm:
    """A progress bar: on a terminal, after 5 s, by rank 0."""
    return tqdm(items, leave=False, delay=5, disable=True if rank() else None, **options)


def printable(text: str) -> str:
    """Without the control characters that a model or a file may hold."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))


def print_opening(run: Run) -> None:
    trained = sum(p.numel() for p in adapters(run.chat.model).values())
    frozen = sum(p.numel() for p in run.chat.model.parameters()) - trained
    train, validation, test, dropped = run.problems
    print(
        f"{frozen:,} frozen and {trained:,} trained parameters on {run.chat.model.device} | "
        f"{len(train)} train, {len(validation)} validation, {len(test)} test problems "
        f"(dropped: {format_counts(dropped)})"
    )


def print_step(run: Run, entry: dict, rollouts: list[Rollout]) -> None:
    """One line a step, a warning where one is due, and now and then an example."""
    if rank():
        return
    m, cost, cfg = entry, entry["cost"], run.cfg
    print(
        f"step {m['step']:4d}/{cfg.steps} loss {m['loss']:8.4f} "
        f"grad {m['grad_norm']:6.3f} acc {m['accuracy']:4.0%} len {m['length']:6.1f} "
        f"trunc {m['truncated']:4.0%} entropy {m['entropy']:5.3f} failed {m['critic_failed']:2d} "
        f"copied {m['copied']:4.0%} flat {m['zero_variance']:4.0%} "
        f"{cost['sample_s']:.2f}+{cost['critic_s']:.2f}+{cost['train_s']:.2f} s "
        f"{cost['peak_mib']:.0f} MiB, {time_left(run)} left",
        flush=True,
    )
    if m["truncated"] > 0.5:
        print(
            f"WARNING: {m['truncated']:.0%} of the attempts were cut at --max-new-tokens "
            f"{cfg.max_new_tokens}, and most of those count as wrong"
        )
    if 2 * m["critic_failed"] > cfg.attempts_per_step:
        reason = getattr(run.critic, "last_error", "") or "empty, cut off, no answer, or too long"
        print(
            f"WARNING: {m['critic_failed']} of {cfg.attempts_per_step} contexts are left out "
            f"({printable(reason)})"
        )
    if rollouts and cfg.show_every and (m["step"] == 1 or is_due(m["step"], cfg.show_every)):
        wrong = [r for r in rollouts if not r.reward]
        print_example(run.chat, (wrong or rollouts)[0], cfg)


def time_left(run: Run) -> str:
    """From the median of the last steps, so that one slow step does not count."""
    left = (run.cfg.steps - run.step) * np.median(run.seconds[-20:])
    if left >= 3600:
        return f"{left // 3600:.0f} h {left % 3600 // 60:02.0f}"
    return f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"


def print_example(chat: Chat, r: Rollout, cfg: Config) -> None:
    """One problem, attempt and context, and the five tokens with the largest |A_t|."""
    outcome = "right" if r.reward else "wrong"
    lines = [
        f"problem    {r.problem.question}   [answer {r.problem.answer}]",
        f"attempt    {r.text}   [{outcome}]",
    ]
    if cfg.has_teacher:
        lines.append(f"{cfg.condition:10s} {r.context or 'none that is valid'}")
    else:
        lines.append(
            f"advantage  {r.advantage:+.2f} for each of its {len(r.sample.ids)} tokens [eq (3)]"
        )
    if r.teacher_prompt:
        a = token_advantages(chat, [r], cfg)[0]
        moved = []
        # in the order in which they stand in the attempt
        for t in sorted(a.abs().topk(min(5, len(a))).indices.tolist()):
            moved.append(f"{chat.tokenizer.decode([r.sample.ids[t]])!r} at {t} {a[t]:+.2f}")
        lines.append(f"moved      {', '.join(moved)}   [A_t of eq (2), nats]")
    for line in lines:
        print("  " + printable(line))


@torch.no_grad()
def token_advantages(chat: Chat, rollouts: list[Rollout], cfg: Config) -> list[Tensor]:
    """Eq (2) at every response token of each rollout, a list of (T,), nats. For display only."""
    chat.model.eval()
    # with the tokens after the first edit
    whole = [replace(r, scored_length=None) for r in rollouts]
    _, estimate, _ = score(chat, whole, kl_sampled, cfg, teacher_weights)  # −A at each token
    return list((-estimate).split([len(r.sample.ids) for r in rollouts]))


def print_closing(run: Run) -> None:
    """Base → trained on held-out problems, both with the same random numbers."""
    cfg, problems = run.cfg, run.problems.test[: run.cfg.final_problems]
    with base_weights(run.chat.model):
        before = accuracy(evaluate(run.chat, problems, cfg))
    after = accuracy(evaluate(run.chat, problems, cfg))
    print(f"held out: {len(problems)} problems × {cfg.eval_samples} attempts")
    for name, low, high in zip(("Avg", "Pass"), before, after):
        print(f"{name}@{cfg.eval_samples} {100 * low:.1f} → {100 * high:.1f}")
    print(f"with intervals: python eval.py {cfg.out}")


# ---- 17. Command line. ---------------------------------------------------------------------------

CHOICES = {
    "condition": CONDITIONS,
    "preset": ("auto", *PRESETS),
    "prompts": FORMATS,
    "grader": ("exact", "math-verify"),
    "critic_style": STYLES,
    "kl": DIVERGENCES,
    "dtype": ("auto", "bfloat16", "float16", "float32"),
}


class Parser(argparse.ArgumentParser):
    """A mistake is one line instead of a usage text."""

    def error(self, message: str):
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        usage="python sd.py [--flag VALUE …]",
        description="Train a model on a critic's corrections of its own attempts.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for knob_field in fields(Config):
        name, text = knob_field.name, knob_field.metadata["help"]
        if name in CHOICES:
            text += ": " + ", ".join(CHOICES[name])
        text += f" [{knob_field.default}"
        for preset, values in PRESETS.items():
            if name in values:
                text += f"; {preset}: {values[name]}"
        options = {"help": text.replace("%", "%%") + "]"}
        if knob_field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = knob_field.type
            options["metavar"] = knob_field.type.__name__.upper()
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def parse_config(argv: list[str] | None) -> Config:
    """A flag beats the preset, which beats the default. With --resume: see resumed_config."""
    given = vars(build_parser().parse_args(argv))
    if given.get("resume"):
        return resumed_config(given)
    # a model of the user's own, or a GPU, asks for the paper's numbers
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "qwen" if "model" in given or torch.cuda.is_available() else "toy"
    cfg = replace(Config(), **{**PRESETS.get(preset, {}), **given, "preset": preset})
    check_config(cfg)
    return replace(cfg, out=cfg.out or f"runs/{cfg.condition}")


def resumed_config(given: dict) -> Config:
    """The saved config with the given flags on top; a flag that differs from it is reported."""
    out = given.get("out") or f"runs/{given.get('condition', 'critique')}"
    saved = load_checkpoint(Path(out, "checkpoint.pt"))["config"]
    if given.get("preset", saved.preset) != saved.preset:
        raise UserError("argument --preset: a run keeps its preset; give single flags instead")
    if is_url(saved.critic) and "critic" not in given:
        raise UserError(
            "argument --critic: name the http critic again; the API key is sent to no address that "
            "only a file names"
        )
    cfg = replace(saved, **{**given, "out": out})
    check_config(cfg)
    # the user may change anything, but sees what changed
    for name in given:
        if getattr(saved, name) != getattr(cfg, name) and name != "resume":
            change = f"{name} {getattr(cfg, name)}, before it was {getattr(saved, name)}"
            print(printable(f"resumed with {change}"))
    return cfg


def check_config(cfg: Config) -> None:
    """UserError for a value that is out of range, or that does not go with another."""
    for knob_field in fields(Config):
        name, low = knob_field.name, knob_field.metadata["low"]
        value = getattr(cfg, name)
        flag = "argument --" + name.replace("_", "-")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{flag}: {value!r} is not one of {', '.join(CHOICES[name])}")
        # nan and inf are out of range as well
        if low is not None and not low <= value < math.inf:
            raise UserError(f"{flag}: must be at least {low}, not {value}")
    if cfg.attempts_per_step % cfg.attempts_per_problem:
        raise UserError(
            f"argument --attempts-per-step: must be a multiple of --group-size {cfg.group_size}"
        )
    if cfg.eval_every and not cfg.validation_problems:
        raise UserError("argument --eval-every: needs --validation-problems of at least 1")
    if cfg.stop_at_first_edit and not CONDITIONS[cfg.condition].asks_critic:
        raise UserError(
            f"argument --stop-at-first-edit: --condition {cfg.condition} asks no critic"
        )
    if cfg.stop_at_first_edit and cfg.critic_style != "copy":
        raise UserError("argument --stop-at-first-edit: needs --critic-style copy")
    if is_url(cfg.critic) and not cfg.critic_model:
        raise UserError(
            "argument --critic: a URL needs --critic-model, the name of the model it serves"
        )
    if cfg.grader == "math-verify" and not importlib.util.find_spec("math_verify"):
        raise UserError("argument --grader: pip install math-verify, or use --grader exact")


def prepare_output() -> None:
    """Silence transformers, and replace characters that the output's encoding lacks."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        # a notebook's streams have none
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C, else 1."""
    prepare_output()
    code = 1
    try:
        start_processes()
        cfg = parse_config(argv)
        opening = f"preset {cfg.preset}: {cfg.condition}, model {cfg.model}, data {cfg.data}"
        print(printable(f"{opening} → {cfg.out}"))
        train(cfg)
        return 0
    except UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code = 130
        message = "stopped; if training had begun, the same command with --resume continues"
    except torch.OutOfMemoryError:
        message = "out of memory; lower --sample-batch, --micro-batch or --kl-chunk, and --resume"
    except FloatingPointError as error:
        message = f"not finite: {error}. The last checkpoint is intact; use a lower --lr"
    except OSError as error:  # disk full, folder not writable
        message = f"{error}; if training had begun, continue with --resume"
    print(f"sd.py: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
