"""Self-distillation from critique, the method of arXiv 2606.11173, in one file.

A solver attempts a problem. A frozen critic answers with the solver's own trace: the correct steps
copied word for word, the first wrong step corrected, and the rest finished from there. The teacher
is the same network as it was before training, with this critique in its prompt. The solver learns
to match the teacher's token distribution on its own attempt, so the help stays when the critique is
gone.

  problem    Tom buys 3 pens at $2 each and a book at $5. What does he pay?
  attempt    The pens cost 3 * 2 = 6 dollars. With the book that is 6 + 5 = 12 dollars.
  critique   The pens cost 3 * 2 = 6 dollars. With the book that is 6 + 5 = 11 dollars.
  teacher    It reads the problem and the critique, and gives a distribution at every token of the
             attempt. It agrees with all of them, apart from "12", where it expects "11".
  update     The student's probability of "12" falls and that of "11" rises.

If you know GRPO, this is what differs:

  1. One attempt per problem, without a group baseline.
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

  attempt               y ~ π_θ(·|x): sample the rollouts
  CONTEXTS              c: the critic's critique, the data set's solution, or a control
  add_teacher_prompts   the teacher's prompt, with c inside
  update                both forward passes, the loss and its gradient, one step of AdamW

Shapes: B prompts of a batch, G rollouts of a group, T tokens of a response, N scored tokens of a
micro-batch, H hidden width, V vocabulary. The prompts are in critic_prompts.py; eval.py compares
runs and draws figures.

  python sd.py --condition critique                without a GPU: a toy model, half a minute
  python sd.py --condition critique --model Qwen/Qwen3-1.7B --critic Qwen/Qwen3-4B-Instruct-2507
  python eval.py runs/critique runs/reference runs/grpo        compare runs, with intervals
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import InferenceClient, get_session, hf_hub_download, set_client_factory
from huggingface_hub.utils import enable_progress_bars
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from critic_prompts import (
    FORMATS, STYLES, check_math_verify, extract_answer, gradable, is_correct, strip_thinking, user,
)  # fmt: skip

# ---- 1. Config: every knob, once. The command line is generated from it. -------------------------


def knob(default, text: str, low: float | None = None):
    """A field of Config. `text` is its --help, `low` the smallest legal value."""
    return field(default=default, metadata={"help": text, "low": low})


@dataclass(frozen=True)
class Config:
    """Where a default comes from: (paper); (OPSD), its parent, arXiv 2601.18734; else our choice.

    A preset overrides the defaults, a flag overrides both.
    """

    # what is trained
    condition: str = knob("critique", "what the teacher reads; copy: a control; grpo: no teacher")
    preset: str = knob("auto", "auto: toy without CUDA and without --model, else qwen")
    # model and problems
    model: str = knob("Qwen/Qwen3-1.7B", "the solver: a hub name or a folder (paper)")
    data: str = knob(
        "hub:agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
        "problems: a .json or .jsonl file, or hub:owner/name/file",
    )
    prompts: str = knob("steps", "prompt format, from critic_prompts.py")
    grader: str = knob("exact", "exact: equal text or number; math-verify: equivalent LaTeX too")
    test_problems: int = knob(100, "held out for eval.py; half as many more for validation", low=2)
    critic: str = knob(
        # a 1.7B model copies most of its wrong attempts unchanged, so it is not its own critic
        "Qwen/Qwen3-4B-Instruct-2507",
        "a model, http://host/v1, or self: the solver with its adapter off (paper: QwQ-32B)",
    )
    critic_model: str = knob("", "name of the model behind an http critic")
    critic_params: str = knob("{}", "http critic: JSON to merge into each request; null: leave out")
    critic_sees_reference: bool = knob(True, "tell the critic solution and answer (paper: yes)")
    critic_style: str = knob("copy", "copy and correct, quote the error, or omit what is right")
    # the loss
    kl: str = knob("student||teacher", "eq (4), eq (5), or one sampled token with eq (2)")
    teacher_thinking: bool = knob(False, "thinking mode in the teacher's template (paper: yes)")
    # optimisation
    steps: int = knob(62, "optimiser steps (paper: 7 epochs of 282 problems, about 62)", low=0)
    attempts_per_step: int = knob(32, "rollouts per step, in every condition (paper)", low=1)
    group_size: int = knob(8, "grpo only: rollouts per problem (paper)", low=2)
    lr: float = knob(5e-6, "learning rate of AdamW, constant (paper)", low=0)
    max_grad_norm: float = knob(0.1, "clip of the gradient's norm; 0: off (OPSD)", low=0)
    lora_rank: int = knob(64, "of the adapter on every linear layer but the head (paper)", low=1)
    lora_alpha: float = knob(128.0, "the adapter's output is scaled by alpha / rank (paper)", low=0)
    # sampling
    temperature: float = knob(1.1, "of sampling and of the loss alike (paper)", low=1e-3)
    max_new_tokens: int = knob(2048, "cap of an attempt, tokens (paper)", low=1)
    # memory and speed: they change results by rounding alone, and dtype most
    sample_batch: int = knob(64, "rows that generate at once, at most", low=1)
    micro_batch: int = knob(4, "rows of one forward and backward", low=1)
    gradient_checkpointing: bool = knob(True, "recompute activations")
    dtype: str = knob("auto", "of the frozen weights; auto: bfloat16 on CUDA, else float32")
    device: str = knob("auto", "auto: cuda if there is one, else cpu")
    # evaluation and output
    eval_every: int = knob(0, "steps between validations; best.pt keeps the best; 0: never", low=0)
    eval_samples: int = knob(12, "attempts per problem in every evaluation (paper)", low=1)
    closing_problems: int = knob(8, "test problems of the closing comparison; 0: none", low=0)
    seed: int = knob(0, "of data order, adapters and sampling", low=0)
    out: str = knob("", "run folder; empty: runs/CONDITION")
    resume: bool = knob(False, "continue from OUT's checkpoint, with its config")


PRESETS = {
    # toy/ is a model folder and a problem file like any other
    "toy": dict(
        model="toy", data="toy", prompts="toy", critic="self",
        steps=50, lr=2e-3, max_grad_norm=1.0, lora_rank=16, lora_alpha=32.0, temperature=1.0,
        max_new_tokens=64, sample_batch=1024, micro_batch=32, gradient_checkpointing=False,
        closing_problems=100,
    ),
    "qwen": dict(),  # the defaults above
}  # fmt: skip


# ---- 2. Records. ---------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can correct. `main` prints it as one line and exits with 2."""


class Problem(NamedTuple):
    question: str
    solution: str  # worked out, by the data set's author
    answer: str


@dataclass
class Rollout:
    """One attempt, and everything that is added to it on the way to the loss."""

    problem: Problem
    prompt: list[int]  # the student's
    ids: list[int]  # of the response as drawn; its end token as well, so that stopping is trained
    text: str
    truncated: bool  # cut at the cap, without an end token
    entropy: float  # mean entropy of the sampled distributions, nats per token
    reward: float  # 1 if right, else 0
    context: str | None = None  # c of eq (1); None: no teacher, or no valid critique
    critic_tokens: int = 0  # that the critic generated
    teacher_prompt: list[int] | None = None
    advantage: float = 0.0  # eq (3)


# ---- 3. Train: the loop, a step, an update. ------------------------------------------------------


def train(cfg) -> None:
    """Train to cfg.steps. Every step is logged and saved, so an interruption costs one step."""
    chat = load_model(cfg.model, cfg)  # model and tokenizer
    if cfg.teacher_thinking and chat.render([user("x")], True) == chat.render([user("x")]):
        raise UserError(f"--teacher-thinking: {cfg.model}'s template has no thinking mode")
    problems = load_problems(cfg, chat)
    critic = None if cfg.condition in NO_CRITIC else load_critic(cfg, chat)
    add_adapters(chat.model, cfg)
    # no weight decay: it would pull the adapter, and with it the policy, towards the base
    optimizer = torch.optim.AdamW(adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
    run = open_run(cfg, chat, optimizer, problems)
    print_opening(chat, problems)
    if cfg.preset != "toy":
        print("the first line comes after a whole step, which may take minutes")

    steps_without_context = 0
    while run.step < cfg.steps:
        entry, rollouts = take_step(chat, problems.train, critic, optimizer, run.seen, cfg)
        run.step += 1
        run.seen += entry["problems"]
        run.write({"step": run.step, **entry})
        print_step(chat, run.step, entry, rollouts, critic, cfg)
        if cfg.eval_every and run.step % cfg.eval_every == 0:
            validate(run, chat, rollouts, problems.validation)
        run.save("checkpoint.pt")
        steps_without_context = 0 if entry["scored"] else steps_without_context + 1
        if steps_without_context == 3:
            raise UserError("no valid context in 3 steps: nothing is learnt; change critic or data")
    if cfg.closing_problems:
        print_closing(chat, problems.test[: cfg.closing_problems], cfg)
    export(chat, cfg)
    all_sum(0)  # a barrier: no process ends while rank 0 still writes


def take_step(chat, problems, critic, optimizer, seen, cfg) -> tuple[dict, list[Rollout]]:
    """The algorithm, once: problems → rollouts → contexts or advantages → update.

    `seen` counts the training problems of the steps before. Returns (log entry, rollouts).
    """
    clock = [time.perf_counter()]
    # one attempt at each of 32 problems; in grpo 8 at each of 4
    group = cfg.group_size if cfg.condition == "grpo" else 1
    chosen = next_problems(problems, seen, cfg.attempts_per_step // group, cfg.seed)
    # y ~ π_θ(·|x), for this process's share of the problems
    rollouts = attempt(chat, share(chosen), cfg, group)
    clock.append(time.perf_counter())
    if cfg.condition == "grpo":
        for r, advantage in zip(rollouts, group_advantages(rollouts, cfg)):
            r.advantage = advantage  # eq (3)
        scored = rollouts
    else:
        contexts = CONTEXTS[cfg.condition](rollouts, critic, cfg)
        for r, context in zip(rollouts, contexts, strict=True):
            r.context = context  # c of eq (1)
        scored = add_teacher_prompts(chat, rollouts, cfg)
    clock.append(time.perf_counter())
    losses = update(chat, optimizer, scored, cfg)
    clock.append(time.perf_counter())
    seconds = dict(zip(("sample_s", "context_s", "update_s"), np.diff(clock).round(3).tolist()))
    return {"problems": len(chosen), **losses, **measure(rollouts, cfg), **seconds}, rollouts


def update(chat, optimizer, rollouts, cfg) -> dict[str, float]:
    """One optimiser step: {loss (mean over scored tokens, nats), grad_norm (before the clip)}.

    Raises FloatingPointError, before any weight changes, if they are not finite.
    """
    loss_fn = policy_gradient if cfg.condition == "grpo" else DIVERGENCES[cfg.kl]
    # the denominator: one for the whole step, over all micro-batches and processes
    total = all_sum(sum(len(r.ids) for r in rollouts))
    if total == 0:
        return {"loss": 0.0, "grad_norm": 0.0}
    set_training(chat.model, True)
    optimizer.zero_grad()
    loss_sum = 0.0
    for start in range(0, len(rollouts), cfg.micro_batch):
        part = rollouts[start : start + cfg.micro_batch]
        h_student, h_teacher, ids, advantage = forward(chat, part)
        # the loss and its gradient by hand, down to the hidden states; autograd does the rest
        losses, gradient = fused_loss(
            h_student, h_teacher, chat.head, ids, advantage, loss_fn, cfg.temperature
        )
        h_student.backward(gradient / total)
        loss_sum += losses.sum().item()
    weights = list(adapters(chat.model).values())
    sum_gradients(weights)
    loss = all_sum(loss_sum) / total
    norm = nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm or math.inf).item()
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}; nothing was updated")
    optimizer.step()
    return {"loss": loss, "grad_norm": norm}


# ---- 4. Sample. ----------------------------------------------------------------------------------


def attempt(chat, problems, cfg, samples=1, seed=None) -> list[Rollout]:
    """`samples` attempts at each (number, problem), graded; the attempts at one problem together.

    Attempt k uses random numbers that follow from (seed, number, k) alone, so neither batching nor
    the number of processes affects it, and a resumed run draws what it would have drawn. In
    training the number counts the problems seen so far. `seed` is cfg's by default.
    """
    seed = cfg.seed if seed is None else seed
    attempts = [(number, problem, k) for number, problem in problems for k in range(samples)]
    prompts, uniforms = [], []
    for number, problem, k in attempts:
        prompts.append(chat.encode(FORMATS[cfg.prompts].student(problem.question)))
        rng = np.random.default_rng((seed, number, k))
        uniforms.append(rng.random(cfg.max_new_tokens, np.float32))
    caps = [cfg.max_new_tokens] * len(prompts)
    drawn = generate(chat, prompts, caps, cfg.sample_batch, np.array(uniforms), cfg.temperature)
    rollouts = []
    for (_, problem, _), prompt, (ids, entropy) in zip(attempts, prompts, drawn):
        # texts are for the critic, the grader and the reader; the loss uses the ids
        text, without_thinking = chat.decode(ids), chat.reply(ids)
        reward = float(is_correct(without_thinking, problem.answer, cfg.grader))
        truncated = ids[-1] not in chat.end_ids
        rollouts.append(Rollout(problem, prompt, ids, text, truncated, entropy, reward))
    return rollouts


def generate(chat, prompts, caps, rows, uniforms=None, temperature=1.0):
    """One response for each prompt: (its ids, the mean entropy of its distributions in nats).

    caps: the most tokens of each response. rows: the most rows at once. uniforms: float32 in
    [0, 1), (len(prompts), at least the largest cap); without them decoding is greedy. Each row has
    its own random numbers, so up to rounding a sample depends on no other row; torch.multinomial
    would draw from one stream for all rows. The full softmax is drawn from, since the loss scores
    the full softmax: no top-k and no top-p, whatever the model's generation config says.
    """
    if not prompts:
        return []
    rows = min(rows, rows_that_fit(chat, max(map(len, prompts)) + max(caps)))
    set_training(chat.model, False)
    responses = []
    with torch.inference_mode(), cast_adapters(chat.model):
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            numbers = None if uniforms is None else uniforms[part]
            responses += generate_batch(chat, prompts[part], caps[part], numbers, temperature)
    return responses


def generate_batch(chat, prompts, caps, uniforms, temperature):
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
    longest = max(caps)
    caps = torch.tensor(caps, device=device)
    # the prompt that each row of the shrinking batch belongs to
    alive = torch.arange(B, device=device)
    drawn = torch.full((B, longest), -1, device=device)  # -1: nothing drawn
    entropy = torch.zeros(B, device=device)
    cache = transformers.DynamicCache(config=chat.model.config)

    for t in progress(range(longest), desc="generate", unit="token"):
        hidden = chat.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
            past_key_values=cache,
        ).last_hidden_state  # fmt: skip
        # only the last position predicts
        p = log_probs(hidden[:, -1], chat.head, temperature).exp_()  # (rows, V)
        entropy[alive] += torch.special.entr(p).sum(-1)
        if uniforms is None:
            token = p.argmax(-1)
        else:
            # inverse CDF: the first token whose cumulative probability exceeds the uniform number,
            # which is scaled, because the float32 sum over all tokens is only nearly 1
            cdf = p.cumsum(-1)
            u = uniforms[alive, t, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)[:, 0]
            # NaN gives index V; it is reported below
            token = token.clamp(max=cdf.shape[1] - 1)
        drawn[alive, t] = token
        goes_on = torch.isin(token, ends, invert=True) & (t + 1 < caps[alive])
        unfinished = goes_on.nonzero()[:, 0]
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
    responses = []
    for row, total in zip(drawn.tolist(), entropy.tolist()):
        response = [i for i in row if i >= 0]
        responses.append((response, total / len(response)))
    return responses


def pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    """(rows, width of the longest)."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side=side
    )


def rows_that_fit(chat, tokens: int) -> int:
    """How many rows of so many tokens a GPU has memory for; on a CPU there is no limit."""
    if chat.model.device.type != "cuda":
        return sys.maxsize
    config = chat.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.num_hidden_layers * heads * width * chat.head.element_size()
    row = keys_and_values * tokens + 6 * 4 * len(chat.head)  # and the sampler's float32 (V,)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(chat.model.device)
    return max(1, int(0.6 * free) // row)  # growing caches leave gaps that nothing fits into


# ---- 5. Contexts, and the critic that writes critiques. ------------------------------------------
#
# A critic is called with conversations, and with the length of each attempt in tokens. It returns
# for each conversation (reply, tokens generated). The reply is None if it was cut off, or if the
# request failed. In critic_prompts.py a row of FORMATS makes the messages for each reader, and its
# `extract_trace` finds the corrected attempt in a reply: None if steps repeat or have no end, or if
# there is no answer.


def write_critiques(rollouts, critic, cfg) -> list[str | None]:
    """c is the attempt, corrected by the critic.

    A reply that is cut off, or is no whole trace with an answer, becomes None: half a trace or an
    error message in the teacher's prompt would be distilled like any other text.
    """
    conversations = [critic_messages(r, cfg) for r in rollouts]
    replies = critic(conversations, [len(r.ids) for r in rollouts])
    critiques = []
    for r, (reply, tokens) in zip(rollouts, replies):
        r.critic_tokens = tokens
        trace = FORMATS[cfg.prompts].extract_trace(strip_thinking(reply or "")) or ""
        # a text of more than twice this length is not a trace, but the critic's thinking, say
        length = max(len(r.text), len(r.problem.solution), 200)
        valid = extract_answer(trace) is not None and len(trace) <= 2 * length
        critiques.append(trace if valid else None)
    return critiques


def critic_messages(r, cfg) -> list[dict]:
    """What the critic reads. Without the solution, the format does not show the answer either."""
    question, solution, answer = r.problem
    shown = solution if cfg.critic_sees_reference else None
    return FORMATS[cfg.prompts].critic(question, r.text, shown, answer, cfg.critic_style)


def copy_solutions(rollouts, critic, cfg) -> list[str]:
    """c is the data set's worked solution, in its author's words."""
    return [r.problem.solution for r in rollouts]


def copy_attempts(rollouts, critic, cfg) -> list[str | None]:
    """A control: c is the attempt, with nothing corrected. A critique must teach more than this."""
    return [r.text if extract_answer(r.text) else None for r in rollouts]


# The conditions that have a teacher: (rollouts, critic, cfg) → a context for each rollout, or None
# to leave it out. They differ in c alone. A fourth context is one function and one row.
CONTEXTS = {"critique": write_critiques, "reference": copy_solutions, "copy": copy_attempts}
NO_CRITIC = {"reference", "copy", "grpo"}  # conditions that load none


@dataclass
class LocalCritic:
    """Greedy decoding by a model in this process; for --critic self the solver, adapter off."""

    chat: Chat
    rows: int  # that generate at once
    last_error: str = ""  # only a server has one

    def __call__(self, conversations, lengths) -> list[tuple[str | None, int]]:
        prompts, caps = [], []
        for messages, length in zip(conversations, lengths):
            # a prompt that is too long is cut and leaves one token, so its reply counts as cut off
            prompt = self.chat.encode(messages)[: self.chat.window - 1]
            prompts.append(prompt)
            # a corrected attempt is about as long; one that loops would hold up all others
            caps.append(min(length * 3 // 2 + 256, self.chat.window - len(prompt)))
        with adapters_off(self.chat.model):
            drawn = generate(self.chat, prompts, caps, self.rows)
        replies = []
        for ids, _ in drawn:
            complete = ids[-1] in self.chat.end_ids
            replies.append((self.chat.reply(ids) if complete else None, len(ids)))
        return replies


class HTTPCritic:
    """OpenAI-compatible chat completions: vLLM, SGLang, `transformers serve`, a hosted API."""

    patience = 120.0  # seconds from its start in which a request is sent again
    pause = 1.0  # seconds before the second try; doubles with each further one
    timeout = 600.0  # seconds for one reply

    def __init__(self, address: str, model: str, max_new_tokens: int, extra: dict):
        self.address, self.model = address, model
        # the client leaves out what is None
        self.parameters = {"temperature": 0, "max_tokens": max_new_tokens, **extra}
        # without a key, or with an empty one, the client would send the user's hub token
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split()) or "no-key"
        # the hub's own session would ask a proxy for localhost, and refuse all under HF_HUB_OFFLINE
        local = ("all://localhost", "all://127.0.0.1", "all://[::1]", "all://0.0.0.0")
        no_proxy = dict.fromkeys(local)  # None: without a proxy
        session = type(get_session())
        set_client_factory(lambda: session(follow_redirects=True, timeout=None, mounts=no_proxy))
        self.has_worked = False
        self.last_error = ""

    def __call__(self, conversations, lengths) -> list[tuple[str | None, int]]:
        self.errors, sent = [], len(conversations)
        with ThreadPool(16) as pool:  # its threads are daemons: Ctrl-C does not wait for replies
            replies = list(progress(pool.imap(self.ask, conversations), total=sent, desc="critic"))
        lost = len(self.errors)
        self.last_error = f"{lost} of {sent} requests failed, {self.errors[-1]}" if lost else ""
        self.has_worked = self.has_worked or lost < sent
        if lost and not self.has_worked:  # a wrong address, key, model or parameter
            raise UserError(self.last_error)
        return replies

    def ask(self, messages: list[dict]) -> tuple[str | None, int]:
        """Send one request, and send it again while its failure may pass."""
        deadline = time.monotonic() + self.patience
        for tries in itertools.count():
            try:
                return self.post(messages)
            except Exception as failure:  # a server may answer anything
                error = failure
            # the server's refusal; if the client fails to read it, it is that failure's __context__
            response = getattr(error, "response", getattr(error.__context__, "response", None))
            wait, may_pass, words = self.pause * 2**tries, True, f"{type(error).__name__}: {error}"
            if response is not None:
                words = f"{response.status_code} {response.reason_phrase}: {response.text}"
                may_pass = response.status_code in (408, 429) or response.status_code >= 500
                told = response.headers.get("Retry-After", "")
                wait = max(wait, float(told) if told.isdecimal() else 0)
            if not may_pass or time.monotonic() + wait > deadline:
                words = " ".join(words.split()).replace(self.key, "***")
                self.errors.append(f"{self.address}: {words[:300]}")
                return None, 0
            time.sleep(wait)

    def post(self, messages: list[dict]) -> tuple[str | None, int]:
        client = InferenceClient(self.address, api_key=self.key, timeout=self.timeout)
        reply = client.chat_completion(messages, model=self.model, extra_body=self.parameters)
        text, tokens = reply.choices[0].message.content, 0
        if reply.usage:  # not every server counts
            tokens = reply.usage.completion_tokens or 0
        whole = isinstance(text, str) and reply.choices[0].finish_reason != "length"
        if not whole or text != text.encode(errors="ignore").decode():  # half a surrogate pair
            text = None
        return text, tokens


def load_critic(cfg, chat):
    """The critic that --critic names. `chat` is the solver, for `self`."""
    if is_url(cfg.critic):
        extra = json.loads(cfg.critic_params)
        return HTTPCritic(cfg.critic, cfg.critic_model, 2 * cfg.max_new_tokens, extra)
    frozen = chat if cfg.critic == "self" else load_model(cfg.critic, cfg)
    return LocalCritic(frozen, cfg.sample_batch)


def group_advantages(rollouts, cfg) -> list[float]:
    """Eq (3), for grpo, which has no teacher and no context: one advantage for each rollout."""
    rewards = np.array([r.reward for r in rollouts]).reshape(-1, cfg.group_size)  # (problems, G)
    spread = rewards.std(1, keepdims=True)
    # equal rewards carry no signal: 0, not 0 / 0
    advantages = (rewards - rewards.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return advantages.flatten().tolist()


# ---- 6. The teacher's prompt, and the hidden states of the response. -----------------------------


def add_teacher_prompts(chat, rollouts, cfg) -> list[Rollout]:
    """The rollouts that are scored, each with its teacher's prompt.

    A rollout without a context is left out, and so is one whose context does not fit the window.
    """
    scored = []
    for r in rollouts:
        if r.context is None:
            continue
        # the problem and the context; `forward` appends the tokens of the attempt
        messages = FORMATS[cfg.prompts].teacher(r.problem.question, r.context)
        prompt = chat.encode(messages, cfg.teacher_thinking)
        if len(prompt) + len(r.ids) <= chat.window:
            r.teacher_prompt = prompt
            scored.append(r)
    return scored


def forward(chat, rollouts) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(h_student, h_teacher) (N, H) of the response tokens of a micro-batch, (ids, advantage) (N,).

    The teacher has the initial weights, another prompt and no gradient, which is the sg of eq (1).
    Both sequences end in the very ids that were drawn. In grpo there is no teacher: None.
    """
    responses = [r.ids for r in rollouts]
    h_student = response_hidden(chat, [r.prompt for r in rollouts], responses)
    h_teacher = None
    if rollouts[0].teacher_prompt is not None:
        with torch.no_grad(), teacher_weights(chat.model):
            h_teacher = response_hidden(chat, [r.teacher_prompt for r in rollouts], responses)
    # one entry for each token, in the order of the hidden states
    ids = torch.tensor([i for r in rollouts for i in r.ids], device=h_student.device)
    advantage = torch.tensor([r.advantage for r in rollouts for _ in r.ids], device=ids.device)
    return h_student, h_teacher, ids, advantage


def response_hidden(chat, prompts, responses) -> Tensor:
    """The hidden states that predict each response token, (N, H), responses one after the other.

    Rows are padded on the right, so no attention mask is needed: a causal model never attends to a
    later position. Nor is a loss mask: the slices pick the response and its end token. A mask made
    from token values would leave out an end token that pads as well.
    """
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    ids = pad(rows, chat.end_ids[0], "right").to(chat.model.device)
    hidden = chat.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    predicting = []
    for states, prompt, response in zip(hidden, prompts, responses):
        # the state at position t predicts token t + 1: the prompt's last state predicts y_1
        first = len(prompt) - 1
        predicting.append(states[first : first + len(response)])
    return torch.cat(predicting)


# ---- 7. Loss: each divergence with its gradient, worked out by hand. -----------------------------

CHUNK = 4_000_000  # entries of a (tokens, V) tensor, of which about six exist at once


@torch.no_grad()
def fused_loss(h_student, h_teacher, head, ids, advantage, loss_fn, temperature):
    """The loss of each token, (N,) float32, and the gradient of their sum wrt h_student, (N, H).

    h_student, h_teacher (N, H); head (V, H), frozen; ids, advantage (N,). Logits exist for a few
    tokens at a time, and the gradient is computed while they exist: z = h Wᵀ / temperature, so it
    is (∂loss/∂z) W / temperature. These are three matmuls (student's logits, teacher's logits,
    gradient), as many as plain autograd needs. No torch.autograd.Function is needed, since nothing
    follows the loss: the caller goes on with h_student.backward(gradient).
    """
    losses = torch.empty(len(ids), device=h_student.device)
    gradient = torch.empty_like(h_student)
    tokens = max(1, CHUNK // len(head))
    for start in range(0, len(ids), tokens):
        part = slice(start, start + tokens)
        log_p, log_q = log_probs(h_student[part], head, temperature), None
        if h_teacher is not None:
            log_q = log_probs(h_teacher[part], head, temperature)
        losses[part], grad_z = loss_fn(log_p, log_q, ids[part], advantage[part])
        gradient[part] = grad_z.to(head.dtype) @ head / temperature
    return losses, gradient


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
# (tokens,), of which it uses what it needs. It returns the loss of each token, (tokens,) in nats,
# and its gradient wrt z, (tokens, V).


def kl_student_teacher(log_p, log_q, ids, advantage):  # eq (4)
    p = log_p.exp()
    log_ratio = log_p - log_q
    kl = torch.linalg.vecdot(p, log_ratio)
    return kl, p * (log_ratio - kl[:, None])


def kl_teacher_student(log_p, log_q, ids, advantage):  # eq (5)
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q - log_p)
    return kl, log_p.exp() - q


def kl_sampled(log_p, log_q, ids, advantage):
    a = of_drawn(log_q, ids) - of_drawn(log_p, ids)  # eq (2)
    _, gradient = policy_gradient(log_p, log_q, ids, a)
    return -a, gradient  # −A is one token's estimate of eq (4)


def policy_gradient(log_p, log_q, ids, advantage):
    """−A log p_y, the loss of grpo.

    The rollouts are the current policy's, so the importance ratio is 1 and a clip of it would do
    nothing. There is no KL to a reference policy: the adapter starts at zero and training is short,
    so the policy stays near it.
    """
    # p − 1[y]: subtract one at the drawn token
    gradient = log_p.exp()
    gradient.scatter_add_(1, ids[:, None], -torch.ones_like(gradient[:, :1]))
    return -advantage * of_drawn(log_p, ids), gradient * advantage[:, None]


# The choices of --kl. "Forward" and "reverse" KL are used both ways, so a name is the formula. The
# default is eq (4), which has the order of arguments of eq (1). They differ where the teacher only
# copies: a critique holds the attempt, so the teacher expects the very token y that was drawn,
# q ≈ (1 − ε) 1[y] + ε p. Averaged over y ~ p this q is p, and the gradient of eq (5) is 0: copying
# leaves noise, on which AdamW takes full steps all the same. Under eq (4) a token that was not
# drawn has log p − log q ≈ −log ε, however well it is predicted; on average this lowers the entropy
# of p. Neither effect is due to a correction, so compare a critique with --condition copy.
DIVERGENCES = {
    "student||teacher": kl_student_teacher,
    "teacher||student": kl_teacher_student,
    "sampled": kl_sampled,
}


def of_drawn(x: Tensor, ids: Tensor) -> Tensor:
    """(tokens, V) → (tokens,): the entries of the drawn tokens."""
    return x.gather(1, ids[:, None])[:, 0]


def log_probs(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """log softmax(h Wᵀ / temperature), (tokens, V) float32: for the sampler and for the loss.

    A bfloat16 log-softmax over 150,000 entries would make small divergences negative.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ head.T).float()  # a CPU matmul has no out_dtype
    return torch.log_softmax(logits.div_(temperature), -1)


# ---- 8. LoRA: an adapter that can be switched off. Off, the model is the initial policy. ---------


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen and A (rank, in), B (out, rank) trained.

    B starts at zero, so the student starts with the teacher's weights. A and B are float32 whatever
    W is: at lr 5e-6 a bfloat16 update rounds to zero.
    """

    enabled = True  # switched by adapters_off
    cast = None  # Aᵀ and (alpha / rank) Bᵀ in the dtype of W, while tokens are generated

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

    def factors(self) -> tuple[Tensor, Tensor]:
        dtype = self.weight.dtype
        return self.A.T.to(dtype), (self.scale * self.B).T.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        A, B = self.cast or self.factors()
        rows = x.flatten(0, -2)
        # The matmul sums W x + delta in float32 and rounds once. Added to a bfloat16 output that is
        # rounded already, a delta below half a step of that grid would always be lost.
        y = torch.addmm(rows @ A @ B, rows, self.weight.T)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def add_adapters(model: nn.Module, cfg) -> None:
    """Freeze the model, and put a LoRALinear in place of every nn.Linear of its decoder."""
    # its own generator, so that the adapters do not depend on other random draws
    generator = torch.Generator().manual_seed(cfg.seed)
    model.requires_grad_(False)
    # the head is outside of the decoder: the fused loss multiplies by the head's own weight
    for parent in list(model.get_decoder().modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                adapted = LoRALinear(child, cfg.lora_rank, cfg.lora_alpha, generator)
                setattr(parent, name, adapted)
    if not adapters(model):
        raise UserError(f"{type(model).__name__} has no nn.Linear for LoRA; choose another --model")


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the initial policy, bit for bit.

    Do not call backward inside: gradient checkpointing would recompute the student's blocks without
    the adapter.
    """
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# The weights of q in `forward`. A fork whose teacher averages past adapters puts here a context
# manager that swaps p.data, updates the average after optimizer.step(), saves it in `save`, and
# loads it in `open_run`.
teacher_weights = adapters_off


@contextlib.contextmanager
def cast_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters are cast once, not at every token. Their weights must not change."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.cast = layer.factors()
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def set_training(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing, which works in layers that are in train mode.

    All other modules stay in eval mode, because in train mode many models add dropout or other
    noise, by which student and teacher would differ.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = on and module.gradient_checkpointing


# ==== The method ends here. The rest is plumbing. =================================================


# ---- 9. Processes: one, or several under torchrun. With one, these functions change nothing. -----


def start_processes() -> None:
    """Under torchrun, join the others. Only rank 0 prints."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        # a process may have to wait for another one's whole rollout
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        # a process that ends with gloo's threads alive may abort after its last line
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(items: list) -> list:
    """This process's part. A problem's attempts stay together, so a GRPO group does."""
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


def sum_gradients(weights: list[nn.Parameter]) -> None:
    """Add up the gradients of all processes. A process without rollouts adds zeros."""
    if dist.is_initialized():
        for p in weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


# ---- 10. Problems: file, split, order. -----------------------------------------------------------


class Split(NamedTuple):
    """Problems by use. No two have the same question, within a part or across."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    dropped: str  # how many rows, and why
    fingerprint: str  # of all that the split follows from


def load_problems(cfg, chat) -> Split:
    """Read and split --data. The split follows from the set of questions, not from their order."""
    found, dropped = {}, Counter()
    for number, row in enumerate(progress(read_rows(cfg.data), desc="read"), 1):
        try:
            problem = read_row(row)
            prompt = chat.encode(FORMATS[cfg.prompts].student(problem.question))
        except (ValueError, UserError) as error:
            raise UserError(f"{cfg.data}, row {number}: {error}") from None
        # the same question twice would leak from training into the test
        key = "".join(problem.question.lower().split())
        if not problem.solution:
            dropped["without a solution"] += 1  # DeepScaleR has many
        elif not gradable(problem.answer, cfg.grader):
            dropped[f"not for --grader {cfg.grader}"] += 1
        elif len(prompt) + cfg.max_new_tokens > chat.window:
            dropped["too long"] += 1
        elif key in found:
            dropped["duplicate"] += 1
        else:
            found[key] = problem
    dropped = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    test, validation = cfg.test_problems, cfg.test_problems // 2
    held_out = test + validation
    if len(found) <= held_out:
        raise UserError(
            f"{cfg.data}: {len(found)} problems leave none to train on beside {held_out} held out "
            f"(dropped: {dropped}); lower --test-problems"
        )
    keys = sorted(found, key=digest)
    problems = [found[key] for key in keys]
    return Split(
        train=problems[held_out:],
        validation=problems[test:held_out],
        test=problems[:test],
        dropped=dropped,
        fingerprint=digest("\n".join([str(test), *keys])),
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(name: str) -> list:
    """The rows of a .json array or a .jsonl file. Numbers stay the text that stands in the file."""
    path = TOY / "problems.jsonl" if name == "toy" else name
    try:
        if name.startswith("hub:"):
            owner, repo, file = name[4:].split("/", 2)
            path = hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset")
        text = Path(path).read_text("utf-8-sig").strip()  # -sig: without a byte-order mark
        if not text.startswith("["):
            # one array of all lines, so that an error names the line
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, too
        raise UserError(f"--data takes a .json or .jsonl file; {name}: {error}") from None


def read_row(row: object) -> Problem:
    """Fields `problem, solution, answer`, or GSM8K's `question, answer` with `#### 42` at its end.

    Raises ValueError with what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if "problem" in row:
        texts = row["problem"], row.get("solution") or "", row.get("answer")
    else:
        worked = row.get("answer")
        texts = row.get("question"), worked, str(worked).rpartition("####")[2]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("needs the texts problem, solution, answer; or question, answer")
    problem = Problem(*[text.strip() for text in texts])
    if not problem.question or not problem.answer:
        raise ValueError("has no question, or no answer (GSM8K's stands behind ####)")
    "".join(problem).encode()  # half of a surrogate pair fails here, not later in the tokenizer
    return problem


def next_problems(problems, seen, count, seed) -> list[tuple[int, Problem]]:
    """The step's (number, problem). Each epoch is a shuffle that follows from the seed alone.

    Numbers count through the epochs, so a resumed run goes on where it was.
    """
    chosen = []
    for number in range(seen, seen + count):
        epoch, index = divmod(number, len(problems))
        chosen.append((number, problems[epoch_order(len(problems), seed, epoch)[index]]))
    return chosen


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


# ---- 11. Models. ---------------------------------------------------------------------------------

TOY = Path(__file__).resolve().parent / "toy"

# a template that writes today's date would change every prompt at midnight
FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}"


@dataclass
class Chat:
    """A causal language model with its tokenizer."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    template: str
    end_ids: list[int]  # any of them ends a response; the first one also pads
    window: int  # tokens of prompt and response together
    reserved: re.Pattern  # matches the first character of each token that only the template writes
    opens_thought: bool  # the template's header of a reply has begun a thought

    @property
    def head(self) -> Tensor:
        """(V, H): logits = hidden @ head.T."""
        return self.model.get_output_embeddings().weight

    def render(self, messages: list[dict], thinking: bool = False, reply: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False,
            add_generation_prompt=reply, enable_thinking=thinking,
        )  # fmt: skip

    def encode(self, messages: list[dict], thinking: bool = False) -> list[int]:
        """Ids of a conversation, up to and including the header of the reply."""
        # a space inside the name of a special token keeps a text from ending its own turn
        safe = [{**m, "content": self.reserved.sub(r"\g<0> ", m["content"])} for m in messages]
        text = self.render(safe, thinking)
        # the template has already written the special tokens
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # a tokenizer without byte fallback maps every unknown character to one token
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and unknown not in self.end_ids:
            raise UserError(f"the tokenizer of --model has no tokens for {text[:80]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def reply(self, ids: list[int]) -> str:
        """What follows the model's thinking, whose marks may be special tokens."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = strip_thinking("<think>" + text if self.opens_thought else text)
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()


def load_model(name: str, cfg) -> Chat:
    """A frozen chat model from a folder or the hub. A UserError says why a model cannot be used."""
    if cfg.preset == "toy":
        torch.set_num_threads(1)  # its kernels are too small to share
    # cuDNN's attention plans anew for every length on H100, and padded rows can give NaN
    torch.backends.cuda.enable_cudnn_sdp(False)
    device, dtype = cfg.device, cfg.dtype
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    folder = TOY if name == "toy" else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
    except Exception as error:  # the hub's client raises a dozen types
        raise UserError(f"cannot load model {name} ({first_line(error)})") from None
    try:
        # frozen: gradients reach only what add_adapters adds
        chat = make_chat(model.to(device).requires_grad_(False), tokenizer)
        if cfg.gradient_checkpointing:
            # the reentrant kind gives no gradient where its input, the embeddings, requires none
            model.activation_checkpointing_enable({"use_reentrant": False})
        check_model(chat)
    except (ValueError, RuntimeError, FloatingPointError, AssertionError) as error:
        raise UserError(f"cannot use model {name}: {error}") from None
    return chat


def make_chat(model: nn.Module, tokenizer) -> Chat:
    """Read template and end tokens. ValueError if the template does not say all that it is told."""
    if not tokenizer.chat_template:
        raise ValueError("it has no chat template; choose an instruction-tuned model")
    config = model.config.get_text_config()
    template = FIXED_DATE + tokenizer.get_chat_template()
    # end_ids, reserved and opens_thought are found below
    chat = Chat(model, tokenizer, template, [], window_of(config), re.compile("(?!)"), False)
    probe = [user("first 1 < 2"), {"role": "assistant", "content": "second"}, user("third\nline")]
    try:
        text, turn = chat.render(probe), chat.render(probe[:2], reply=False)
    except Exception as error:  # whatever the template raises
        raise ValueError(f"its chat template fails ({first_line(error)})") from None
    if any(message["content"] not in text for message in probe):
        raise ValueError("its chat template drops or changes a message")

    # is what follows the header of a reply part of a thought?
    chat.opens_thought = strip_thinking(text + "x") == ""
    # a chat model often has several end tokens, named in different files or only in its template
    end_ids = set()
    for source in (tokenizer, config, model.generation_config):
        stop = getattr(source, "eos_token_id", None)
        end_ids.update(stop if isinstance(stop, list) else [stop])
    added = tokenizer.added_tokens_decoder
    behind = tokenizer(turn.rpartition("second")[2], add_special_tokens=False)["input_ids"]
    end_ids.update(i for i in behind[:1] if i in added)
    chat.end_ids = sorted(end_ids - {None})
    if not chat.end_ids:
        raise ValueError("it names no end token")
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    names = []
    for i, token in added.items():
        if token.content.strip() and (token.special or i in written):
            names.append(re.escape(token.content))
    if names:
        chat.reserved = re.compile(f"(?={'|'.join(names)}).")
    return chat


def window_of(config) -> int:
    """The longest row. Some rotary embeddings change for all rows where one is longer than this."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        own = getattr(config, "original_max_position_embeddings", None)
        return rope.get("original_max_position_embeddings") or own or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None) or 1 << 20  # some have no limit


@torch.no_grad()
def check_model(chat) -> None:
    """ValueError unless the model fits the fused loss, the sampler and the adapters.

    Its logits must be h Wᵀ, and the sampler must draw from what the training pass scores: without
    that a run would go on and be wrong.
    """
    model, head = chat.model, chat.model.get_output_embeddings()
    if model.base_model is model or head is None:
        raise ValueError("it has no decoder apart from its head")
    if getattr(head, "bias", None) is not None:
        raise ValueError("its head has a bias, which the fused loss does not know")
    parameters = [id(p) for _, p in model.get_decoder().named_parameters(remove_duplicate=False)]
    if len(set(parameters)) < len(parameters):
        # in the export each would get the adapters of all
        raise ValueError("some of its layers share their weights")

    ids = torch.arange(4, device=model.device)[None]
    own = model(input_ids=ids).logits.float()
    plain = (model.base_model(input_ids=ids).last_hidden_state @ chat.head.T).float()
    # a mean over all logits, so that rounding in bfloat16 does not hide a factor of 0.99
    slope = (own * plain).sum() / (plain * plain).sum()
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if capped or not abs(slope - 1) < 0.002:
        raise ValueError("it caps or scales its logits, which the fused loss does not know")

    # left padding, positions and cache on one side; right padding, no cache on the other
    prompts = [[0, 1, 2, 3], list(range(10))]
    uniforms = np.random.default_rng(0).random((2, 8), np.float32)
    drawn = generate(chat, prompts, [8, 8], 2, uniforms)
    set_training(model, True)
    hidden = response_hidden(chat, prompts, [ids for ids, _ in drawn])
    entropy = torch.special.entr(log_probs(hidden, chat.head, 1.0).exp()).sum(-1)
    scored = [part.mean().item() for part in entropy.split([len(ids) for ids, _ in drawn])]
    tolerance = 1e-3 if chat.head.dtype == torch.float32 else 0.05
    if not np.allclose(scored, [sampled for _, sampled in drawn], rtol=0, atol=tolerance):
        raise ValueError("its cached decoding differs from its training pass")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:150]


# ---- 12. Run folder: log.jsonl, checkpoint.pt (the last), best.pt, and at the end two exports. ---


@dataclass
class Run:
    """Where a run stands, and its folder."""

    cfg: Config
    model: nn.Module
    optimizer: torch.optim.Optimizer
    fingerprint: str  # of the problems
    log: object = None  # log.jsonl, opened and locked by rank 0
    step: int = 0  # optimiser steps taken
    seen: int = 0  # training problems seen
    best: float = -1.0  # best validation accuracy

    def write(self, entry: dict) -> None:
        """A line of the log. After --resume a step may stand there twice: the last counts."""
        if rank() == 0:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()

    def save(self, name: str) -> None:
        """Atomic: a kill or a full disk at any moment leaves the old file or the new one."""
        if rank() == 0:
            state = {
                "config": asdict(self.cfg),
                "fingerprint": self.fingerprint,
                "state": (self.step, self.seen, self.best),
                "adapters": adapters(self.model),
                "optimizer": self.optimizer.state_dict(),
            }
            path = Path(self.cfg.out, name)
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        all_sum(0)  # a barrier: torchrun would kill this process if another one failed now


def open_run(cfg, chat, optimizer, problems) -> Run:
    """A new run folder; with --resume the one that is there, and its state."""
    run = Run(cfg, chat.model, optimizer, problems.fingerprint)
    folder = Path(cfg.out)
    if cfg.resume:
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        load_adapters(chat, checkpoint, problems)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr  # load_state_dict brings the old one, but --lr may be new
        run.step, run.seen, run.best = checkpoint["state"]
    if rank() == 0:
        if (folder / "log.jsonl").exists():
            lock(folder / "log.jsonl").close()
            if not cfg.resume:
                number = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
                folder.rename(f"{folder}.{number}")
                print(f"{folder} existed and was moved to {folder}.{number}")
        elif not cfg.resume and folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder} exists and is not a run folder; name another")
        folder.mkdir(parents=True, exist_ok=True)
        run.log = lock(folder / "log.jsonl")
        if cfg.resume:
            run.log.write("\n")  # ends a line that a kill cut off
    # what a reader needs to repeat the run
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    run.write({"config": asdict(cfg), "versions": versions})
    run.save("checkpoint.pt")  # so that --resume works from the first step on
    return run


def lock(path: Path):
    """Open a log for a run, unless another process is writing it."""
    file = open(path, "a", encoding="utf-8")
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise UserError(f"a run is going on in {path.parent}; name another --out") from None
    return file


def load_checkpoint(path: Path) -> dict:
    """{config, fingerprint, state, adapters, optimizer}. The file may be anyone's.

    weights_only: nothing in it can run code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # a knob that this version does not know is an error
        checkpoint["config"] = Config(**checkpoint["config"])
    except Exception as error:
        raise UserError(f"cannot read {path} ({first_line(error)})") from None
    check_config(checkpoint["config"])
    return checkpoint


def load_adapters(chat, checkpoint: dict, problems) -> None:
    """Copy a checkpoint's adapters into the model; UserError if model or problems are others."""
    if checkpoint["fingerprint"] != problems.fingerprint:
        # --data, --test-problems, --grader, --prompts and --max-new-tokens decide
        raise UserError("other problems than the run's: it might test on what it trained on")
    if checkpoint["adapters"].keys() != adapters(chat.model).keys():
        raise UserError("the checkpoint's adapters do not fit; was --model another?")
    chat.model.load_state_dict(checkpoint["adapters"], strict=False)


@torch.no_grad()
def export(chat, cfg) -> None:
    """OUT/adapter in PEFT's format, and OUT/model, float32 and merged, for from_pretrained.

    Call it last: it adds the adapters to the weights. Merged into bfloat16 weights, a small adapter
    would be rounded away.
    """
    if rank():
        return
    layers, factors = lora_layers(chat.model), {}
    for name, layer in layers.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = layer.A.detach().cpu()
        factors[f"base_model.model.{name}.lora_B.weight"] = layer.B.detach().cpu()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.model,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "target_modules": list(layers),
    }
    folder = Path(cfg.out, "adapter")
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1), "utf-8")

    chat.model.float()
    for layer in layers.values():
        layer.weight += layer.scale * layer.B @ layer.A
    # the rest has the names and shapes of the loaded model
    trained = adapters(chat.model)
    weights = {name: w for name, w in chat.model.state_dict().items() if name not in trained}
    chat.model.save_pretrained(Path(cfg.out, "model"), state_dict=weights)
    chat.tokenizer.save_pretrained(Path(cfg.out, "model"))


# ---- 13. Measure and evaluate. -------------------------------------------------------------------

EVAL_SEED = 1_000_003  # of every evaluation: base and runs draw the same random numbers


def evaluate(chat, problems, cfg) -> list[list[Rollout]]:
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


def validate(run: Run, chat, rollouts, problems) -> None:
    """Evaluate on the validation problems; best.pt keeps the best adapters so far.

    Logged as well: the mean KL(policy‖base) over the step's attempts, nats per token, where both
    read the student's prompt. A sudden rise is the usual first sign of a collapse.
    """
    avg, _ = accuracy(evaluate(chat, problems, run.cfg))
    kl, tokens = 0.0, 0
    for r in rollouts:
        with torch.no_grad():
            h_policy = response_hidden(chat, [r.prompt], [r.ids])
            with adapters_off(chat.model):
                h_base = response_hidden(chat, [r.prompt], [r.ids])
        ids = torch.tensor(r.ids, device=h_policy.device)
        unused = torch.zeros_like(ids)  # advantages
        losses, _ = fused_loss(
            h_policy, h_base, chat.head, ids, unused, kl_student_teacher, run.cfg.temperature
        )
        kl, tokens = kl + losses.sum().item(), tokens + len(ids)
    kl = all_sum(kl) / all_sum(tokens)
    run.write({"step": run.step, "validation_avg": avg, "kl_base": kl})
    print(f"validation Avg@{run.cfg.eval_samples} {100 * avg:.1f}, KL to the base {kl:.4f}")
    if avg > run.best:
        run.best = avg
        run.save("best.pt")


def measure(rollouts, cfg) -> dict[str, float]:
    """What a step's rollouts show, for the log. The README explains the names that it prints."""
    rollouts = gather(rollouts)
    n, tokens = len(rollouts), sum(len(r.ids) for r in rollouts)
    scored = [r for r in rollouts if r.teacher_prompt or cfg.condition == "grpo"]
    # binary rewards: an advantage is 0 only where all rewards of its group are equal
    flat = sum(r.advantage == 0 for r in rollouts) if cfg.condition == "grpo" else 0
    return {
        "accuracy": sum(r.reward for r in rollouts) / n,
        "length": tokens / n,
        "truncated": sum(r.truncated for r in rollouts) / n,
        "entropy": sum(r.entropy for r in rollouts) / n,
        "scored": len(scored),
        "unscored": n - len(scored),
        "zero_variance": flat / n,
        "solver_tokens": tokens,
        "critic_tokens": sum(r.critic_tokens for r in rollouts),
    }


@torch.no_grad()
def token_advantages(chat, r, cfg) -> Tensor:
    """Eq (2) at every token of a response, (T,) nats, with what is in r.teacher_prompt."""
    h_student, h_teacher, ids, _ = forward(chat, [r])
    advantages = []
    # 64 tokens at a time: (T, V) may be gigabytes
    for hs, ht, y in zip(h_student.split(64), h_teacher.split(64), ids.split(64)):
        log_p = log_probs(hs, chat.head, cfg.temperature)
        log_q = log_probs(ht, chat.head, cfg.temperature)
        advantages.append(of_drawn(log_q - log_p, y))
    return torch.cat(advantages)


# ---- 14. What is printed. ------------------------------------------------------------------------


def progress(items, **options) -> tqdm:
    """A progress bar: on a terminal, after 5 s, by rank 0."""
    return tqdm(items, leave=False, delay=5, disable=True if rank() else None, **options)


def print_opening(chat, problems) -> None:
    trained = sum(p.numel() for p in adapters(chat.model).values())
    adapted = sum(layer.weight.numel() for layer in lora_layers(chat.model).values())
    frozen = sum(p.numel() for p in chat.model.get_decoder().parameters()) - trained
    frozen -= chat.model.get_input_embeddings().weight.numel()
    print(
        f"{trained:,} trained parameters adapt {adapted / frozen:.0%} of {frozen:,} on "
        f"{chat.model.device} | {len(problems.train)} train, {len(problems.validation)} "
        f"validation, {len(problems.test)} test problems "
        f"(dropped: {problems.dropped})"
    )
    if adapted < 0.8 * frozen:
        print("WARNING: the other weights are no nn.Linear, and are not trained")


def print_step(chat, step: int, m: dict, rollouts, critic, cfg) -> None:
    """One line a step, a warning where one is due, and now and then an example."""
    print(
        f"step {step:4d}/{cfg.steps} loss {m['loss']:8.4f} grad {m['grad_norm']:6.3f} "
        f"acc {m['accuracy']:4.0%} len {m['length']:6.1f} trunc {m['truncated']:4.0%} "
        f"entropy {m['entropy']:5.3f} failed {m['unscored']:2d} "
        f"flat {m['zero_variance']:4.0%} "
        f"{m['sample_s']:.2f}+{m['context_s']:.2f}+{m['update_s']:.2f} s"
    )
    if m["truncated"] > 0.5:
        print(f"WARNING: {m['truncated']:.0%} of the attempts were cut at --max-new-tokens")
    if critic and critic.last_error:
        print(f"WARNING: {printable(critic.last_error)}")
    if rollouts and (step == 1 or step % 10 == 0):
        wrong = [r for r in rollouts if not r.reward]
        print_example(chat, (wrong or rollouts)[0], cfg)


def print_example(chat, r, cfg) -> None:
    """One problem, attempt and context, and the five tokens with the largest |A_t|."""
    print(f"  problem    {printable(r.problem.question)}   [answer {printable(r.problem.answer)}]")
    print(f"  attempt    {printable(r.text)}   [{'right' if r.reward else 'wrong'}]")
    if cfg.condition == "grpo":
        print(f"  advantage  {r.advantage:+.2f} for each of its {len(r.ids)} tokens   [eq (3)]")
    else:
        print(f"  {cfg.condition:10s} {printable(r.context or 'none that is valid')}")
    if r.teacher_prompt:
        a = token_advantages(chat, r, cfg)
        moved = []
        # in the order in which they stand in the attempt
        for t in sorted(a.abs().topk(min(5, len(a))).indices.tolist()):
            moved.append(f"{chat.tokenizer.decode([r.ids[t]])!r} at {t} {a[t]:+.2f}")
        print(f"  moved      {', '.join(moved)}   [A_t of eq (2) after the step, nats]")


def printable(text: str) -> str:
    """On one line, and without the control characters that a model or a file may hold."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))


def print_closing(chat, problems, cfg) -> None:
    """Base → trained on held-out problems, both with the same random numbers."""
    with adapters_off(chat.model):
        before = accuracy(evaluate(chat, problems, cfg))
    after = accuracy(evaluate(chat, problems, cfg))
    print(f"held out: {len(problems)} problems × {cfg.eval_samples} attempts")
    for name, low, high in zip(("Avg", "Pass"), before, after):
        print(f"{name}@{cfg.eval_samples} {100 * low:.1f} → {100 * high:.1f}")
    print(f"with intervals: python eval.py {cfg.out}")


# ---- 15. Command line. ---------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python sd.py [--flag VALUE …]",
        description="Train a model on a critic's corrections of its own attempts.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    choices = {
        "condition": [*CONTEXTS, "grpo"],
        "preset": ["auto", *PRESETS],
        "prompts": FORMATS,
        "grader": ["exact", "math-verify"],
        "critic_style": STYLES,
        "kl": DIVERGENCES,
        "dtype": ["auto", "bfloat16", "float32"],
    }
    for knob_field in fields(Config):
        name, default = knob_field.name, knob_field.default
        text = f"{knob_field.metadata['help']} [{default}"
        for preset, values in PRESETS.items():
            if name in values:
                text += f"; {preset}: {values[name]}"
        options = {"help": text.replace("%", "%%") + "]"}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = type(default)
            options["choices"] = choices.get(name)
            options["metavar"] = None if name in choices else type(default).__name__.upper()
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def parse_config(argv: list[str] | None) -> Config:
    """A flag beats the preset, which beats the default; with --resume, the saved config."""
    given = vars(build_parser().parse_args(argv))
    if given.get("resume"):
        out = given.get("out") or f"runs/{given.get('condition', 'critique')}"
        saved = load_checkpoint(Path(out, "checkpoint.pt"))["config"]
        asks = saved.condition not in NO_CRITIC
        if asks and is_url(saved.critic) and "critic" not in given:
            raise UserError("--resume: name the http --critic again; it will get your API key")
        cfg = replace(saved, **{**given, "out": out})
        for name in ("preset", "condition", "model", "lora_rank", "lora_alpha"):
            if getattr(cfg, name) != getattr(saved, name):
                raise UserError(f"--resume: a run keeps its {name}, {getattr(saved, name)}")
    else:
        # a model of the user's own, or a GPU, asks for the paper's numbers
        preset = given.get("preset", "auto")
        if preset == "auto":
            preset = "qwen" if "model" in given or torch.cuda.is_available() else "toy"
        cfg = replace(Config(), **{**PRESETS.get(preset, {}), **given, "preset": preset})
        cfg = replace(cfg, out=cfg.out or f"runs/{cfg.condition}")
    check_config(cfg)
    return cfg


def check_config(cfg) -> None:
    """UserError for a value that is out of range, or that does not go with another."""
    for knob_field in fields(Config):
        low, value = knob_field.metadata["low"], getattr(cfg, knob_field.name)
        # nan and inf are out of range as well
        if low is not None and not low <= value < math.inf:
            raise UserError(f"{knob_field.name}: must be at least {low}, not {value}")
    if cfg.condition == "grpo" and cfg.attempts_per_step % cfg.group_size:
        raise UserError("--attempts-per-step must be a multiple of --group-size")
    if is_url(cfg.critic) and not cfg.critic_model:
        raise UserError("--critic: a URL needs --critic-model, the name of the model it serves")
    if not isinstance(read_json(cfg.critic_params), dict):
        raise UserError(f"--critic-params is no JSON object: {cfg.critic_params}")
    if cfg.grader == "math-verify":
        try:
            check_math_verify()
        except ValueError as error:
            raise UserError(str(error)) from None


def read_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return None


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def prepare_output() -> None:
    """Silence transformers, but not downloads; print each line at once, in any encoding."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    enable_progress_bars()  # a download of gigabytes must be seen
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 2 for a mistake of the user's; 1 if memory ran out."""
    prepare_output()
    try:
        start_processes()
        cfg = parse_config(argv)
        print(f"preset {cfg.preset}: {cfg.condition} on {cfg.model}, data {cfg.data} → {cfg.out}")
        if cfg.preset == "qwen" and not torch.cuda.is_available():
            print("WARNING: no GPU was found; on a CPU this preset takes days")
        train(cfg)
    except UserError as error:
        print(f"sd.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "sd.py: out of memory; lower --micro-batch or --sample-batch, and add --resume",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
