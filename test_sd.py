"""Tests in the order of sd.py: the method, then the plumbing, then eval.py, then a benchmark.

A docstring names the bug that makes its test fail. Conditions, divergences, prompt formats and arms
come from the tables of the code: a row that is added there is tested without a change here.

  python -m pytest -q       all tests: about a minute on two CPU cores
  python test_sd.py         the benchmark
  python test_sd.py --trace the memory that Qwen3-1.7B takes, traced without a GPU
"""

import os

# the tests are of the CPU, also on a machine that has more
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import errno
import importlib.util
import itertools
import json
import math
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import critic_prompts
import eval as evaluation
import sd

HERE = Path(__file__).resolve().parent
TOY = HERE / "toy"
LOSSES = {**sd.DIVERGENCES, "grpo": sd.GRPO_LOSS}
# (condition, kl): one step with each of the losses
STEPS = [("critique", kl) for kl in sd.DIVERGENCES] + [("grpo", "student||teacher")]
TRACE = "s7+6=3s3*3=9####9"  # a valid critique in the toy's format

torch.set_num_threads(1)


# ---- Helpers: a tiny model whose distributions are far from uniform, and rollouts of it. ---------


def byte_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A token is a byte, so any text is legal and a letter can be cut. The end token pads."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=(TOY / "chat_template.jinja").read_text(),
    )


def tiny_model(vocabulary: int, **changes) -> transformers.PreTrainedModel:
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    ends = dict(eos_token_id=0, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(vocab_size=vocabulary, **ends, **{**shape, **changes})
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A chat model's folder, with problems beside it."""
    path, tokenizer = tmp_path_factory.mktemp("tiny"), byte_tokenizer()
    model = tiny_model(len(tokenizer))
    # a model's own sampling defaults, which must not reach our sampler
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    lines = (TOY / "problems.jsonl").read_text().splitlines()
    (path / "problems.jsonl").write_text("\n".join(lines[:60]))
    return path


@pytest.fixture
def chat(folder) -> sd.Chat:
    return sd.load_model(str(folder))


@pytest.fixture(scope="session")
def toy() -> sd.Chat:
    """Not to be changed."""
    return sd.load_model(str(TOY))


def config(**changes) -> sd.Config:
    tiny = dict(
        prompts="toy",
        lora_rank=4,
        max_new_tokens=12,
        lr=1e-2,
        max_grad_norm=1.0,
        temperature=1.5,
        micro_batch=2,
        kl_chunk=5,
    )
    return sd.Config(**{**tiny, **changes})


def numbered_problems(count: int) -> list[tuple[int, sd.Problem]]:
    lines = (TOY / "problems.jsonl").read_text().splitlines()[:count]
    return [(number, sd.read_row(json.loads(line))) for number, line in enumerate(lines)]


def rollouts_of(chat, cfg, count=6) -> list[sd.Rollout]:
    """Rollouts of uneven length with contexts and advantages, prepared for cfg's condition."""
    rollouts = sd.attempt(chat, numbered_problems(count), cfg)
    for i, r in enumerate(rollouts):
        r.context = r.problem.solution
        r.advantage = (-1.0) ** i * (i + 1)
        length = max(1, len(r.sample.ids) - i)
        r.sample = r.sample._replace(ids=r.sample.ids[:length])
    return sd.prepare(chat, rollouts, cfg)


def adapt(chat, cfg, noise=0.0) -> sd.Chat:
    """Add adapters. With noise, B is not zero, so that student and teacher differ."""
    sd.add_adapters(chat.model, cfg)
    torch.manual_seed(1)
    for layer in chat.model.modules():
        if isinstance(layer, sd.LoRALinear) and noise:
            torch.nn.init.normal_(layer.B, std=noise)
    return chat


def sgd(chat, lr=0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(sd.adapters(chat.model).values(), lr=lr)


def copy_of_adapters(chat) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in sd.adapters(chat.model).items()}


def gradients(chat, rollouts, cfg) -> dict[str, torch.Tensor]:
    """Of one step, unclipped."""
    sd.update(chat, sgd(chat), rollouts, replace(cfg, max_grad_norm=0.0))
    return {name: p.grad.clone() for name, p in sd.adapters(chat.model).items()}


def assert_same(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ---- Loss. ---------------------------------------------------------------------------------------

# p = (3/4, 1/4), q = (1/2, 1/2): KL and its derivative by the first logit
BY_HAND = [
    ("student||teacher", 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.75 * 0.25 * math.log(3)),
    ("teacher||student", 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.75 - 0.5),
]


@pytest.mark.parametrize("kl, value, slope", BY_HAND)
def test_divergences_equal_numbers_worked_by_hand(kl, value, slope):
    """Eq (4) and (5). Fails if the two directions are exchanged."""
    log_p = torch.tensor([[0.75, 0.25]]).log()
    log_q = torch.tensor([[0.5, 0.5]]).log()
    loss, gradient = sd.DIVERGENCES[kl].fused(log_p, log_q, None, None)
    naive = sd.DIVERGENCES[kl].naive(log_p, log_q, None, None)
    assert loss.item() == pytest.approx(value)
    assert naive.item() == pytest.approx(value)
    assert gradient[0, 0].item() == pytest.approx(slope)


def loss_inputs(rows=13, width=8, vocabulary=31, dtype=torch.float32):
    """(h_student, h_teacher, head, ids, advantage). The middle advantage is 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width), (rows, width), (vocabulary, width)]
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    ids = torch.arange(rows) % vocabulary
    return *tensors, ids, torch.linspace(-1, 1, rows)


def naive_loss(loss, h_student, h_teacher, head, ids, advantage, temperature):
    """The loss of each row, for autograd, from float64 log-probabilities."""
    log_p = F.log_softmax(F.linear(h_student, head).double() / temperature, -1)
    log_q = F.log_softmax(F.linear(h_teacher, head).double() / temperature, -1)
    return loss.naive(log_p, log_q, ids, advantage.double())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "temperature, chunk, rows",
    [(1.0, 4, 13), (0.7, 5, 13), (1.6, 100, 13), (1.1, 1, 13), (1.0, 4, 0)],
)
def test_fused_loss_equals_the_naive_one(name, temperature, chunk, rows):
    """Fails if value or gradient of a row of DIVERGENCES is wrong, be it by a factor, or if the
    temperature, the last and shorter chunk, or the empty micro-batch is forgotten."""
    h_student, *others = loss_inputs(rows)
    h_student.requires_grad_(True)
    wanted = naive_loss(LOSSES[name], h_student, *others, temperature)
    wanted.sum().backward()
    value, gradient = sd.fused_loss(h_student, *others, LOSSES[name].fused, temperature, chunk)
    torch.testing.assert_close(value, wanted.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, h_student.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_small_losses_survive_bfloat16_and_a_large_vocabulary(name):
    """Fails if the softmax runs in bfloat16: over 50,000 tokens a small KL becomes negative; or if
    logits / temperature are rounded where the sampler rounds logits."""
    h_student, _, head, ids, advantage = loss_inputs(6, 32, 50_000, torch.bfloat16)
    h_teacher = h_student * 1.02
    inputs = (h_student.requires_grad_(True), h_teacher, head, ids, advantage)
    exact = naive_loss(LOSSES[name], *inputs, 1.1)
    exact.sum().backward()
    value, gradient = sd.fused_loss(*inputs, LOSSES[name].fused, 1.1, 4)
    torch.testing.assert_close(value.double(), exact, rtol=0.01, atol=1e-5)
    torch.testing.assert_close(gradient, h_student.grad, rtol=0.05, atol=0.01)


def test_the_sampled_token_form_is_kl_student_teacher_in_expectation():
    """Fails if the advantage of eq (2) is not held constant: its sign would flip."""
    h, h_teacher, head, _, _ = loss_inputs(rows=1, vocabulary=11)
    every = torch.arange(len(head))
    p = F.softmax(h @ head.T / 0.9, -1)[0]
    common = (h.expand(11, -1), h_teacher.expand(11, -1), head, every, torch.zeros(11))
    value, gradient = sd.fused_loss(*common, sd.DIVERGENCES["sampled"].fused, 0.9, 4)
    kl, exact = sd.fused_loss(*common, sd.DIVERGENCES["student||teacher"].fused, 0.9, 4)
    torch.testing.assert_close(p @ value, kl[0])
    torch.testing.assert_close(p @ gradient, exact[0])


class Watch(TorchDispatchMode):
    """Count matrix products, and remember the size of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.matmuls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.matmuls += op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_has_a_row_for_every_token_and_no_matmul_is_done_twice(name):
    """Fails if the chunks are concatenated, or logits are made again for the gradient."""
    inputs = loss_inputs(rows=40, vocabulary=300)
    with Watch() as watch:
        sd.fused_loss(*inputs, LOSSES[name].fused, 1.0, 8)
    assert watch.largest == 8 * 300
    assert watch.matmuls == 3 * 5


# ---- Step. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition, kl", STEPS)
def test_gradients_do_not_depend_on_the_micro_batch(chat, condition, kl):
    """Fails if each micro-batch is divided by its own number of tokens."""
    cfg = config(condition=condition, kl=kl)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    whole = gradients(chat, rollouts, replace(cfg, micro_batch=100, kl_chunk=1000))
    for micro_batch in (1, 2):
        parts = gradients(chat, rollouts, replace(cfg, micro_batch=micro_batch))
        assert_same(parts, whole, atol=1e-5, rtol=1e-4)


def row_log_probs(chat, prompt, ids, temperature) -> torch.Tensor:
    """(T, V) of one row, from the model's own logits."""
    logits = chat.model(input_ids=torch.tensor([prompt + ids])).logits[0]
    return F.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


@pytest.mark.parametrize("condition, kl", STEPS)
def test_a_step_equals_a_loop_over_rows_in_plain_autograd(chat, condition, kl):
    """Fails if checkpointing recomputes a block without the adapter, a target is off by one, or
    the mean is not over all tokens of the step."""
    cfg = config(condition=condition, kl=kl, micro_batch=1)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    chat.model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(chat, rollouts, cfg)
    chat.model.eval()  # here checkpointing is off
    chat.model.zero_grad()
    naive = sd.GRPO_LOSS.naive if condition == "grpo" else sd.DIVERGENCES[kl].naive
    losses = []
    for r in rollouts:
        ids = r.sample.ids
        log_p = row_log_probs(chat, r.prompt, ids, cfg.temperature)
        with torch.no_grad(), sd.adapters_off(chat.model):
            log_q = row_log_probs(chat, r.teacher_prompt or r.prompt, ids, cfg.temperature)
        losses.append(naive(log_p, log_q, torch.tensor(ids), torch.full((len(ids),), r.advantage)))
    torch.cat(losses).mean().backward()
    wanted = {name: p.grad for name, p in sd.adapters(chat.model).items()}
    assert_same(got, wanted, atol=1e-5, rtol=1e-4)
    for gradient in got.values():
        assert gradient.abs().sum() > 0


def test_no_tokenizer_is_needed_between_sampler_and_loss(chat):
    """Fails if a response is decoded and encoded again on its way into the loss."""
    cfg = config()
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    mute = sd.Chat(chat.model, None, chat.end_ids, chat.window)
    assert sd.update(mute, sgd(chat), rollouts, cfg)["loss"] > 0


def test_a_teacher_with_the_students_prompt_has_no_kl_and_no_gradient(chat):
    """Fails if the teacher's row is padded, cut or scored in another way than the student's."""
    cfg = config(micro_batch=3)
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    assert sd.update(chat, sgd(chat), rollouts, cfg)["loss"] > 0.01
    for r in rollouts:
        r.teacher_prompt = r.prompt
    same = sd.update(chat, sgd(chat), rollouts, cfg)
    assert same["loss"] == 0.0
    assert same["grad_norm"] < 1e-6


def test_float16_gradients_do_not_underflow(folder, monkeypatch):
    """Fails if 1 / (tokens of the step) enters a float16 gradient: below 6e-8 all is 0."""
    cfg = config(condition="grpo")
    rollouts = rollouts_of(sd.load_model(str(folder)), cfg, 2)
    total = 1 << 20  # as if other processes had the rest of a large step
    monkeypatch.setattr(sd, "all_sum", lambda value: total if isinstance(value, int) else value)
    found = {}
    for dtype in ("float32", "float16"):
        chat = adapt(sd.load_model(str(folder), dtype), cfg)
        gradient = gradients(chat, rollouts, cfg).values()
        found[dtype] = torch.cat([g.flatten() for g in gradient])
    assert found["float32"].abs().max() > 0
    assert F.cosine_similarity(found["float32"], found["float16"], dim=0) > 0.99


@pytest.mark.parametrize("dtype", sd.CHOICES["dtype"])
def test_training_lowers_the_loss_in_every_dtype(folder, dtype):
    """Fails if a tensor of another dtype is in the path, or a half-precision gradient overflows."""
    cfg = config()
    chat = adapt(sd.load_model(str(folder), dtype), cfg)
    rollouts = rollouts_of(chat, cfg)
    optimizer = torch.optim.AdamW(sd.adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
    losses = [sd.update(chat, optimizer, rollouts, cfg)["loss"] for _ in range(3)]
    assert 0 < losses[2] < losses[0] < math.inf


class Full:
    """A GPU that is full: raises at the calls of these numbers, once each."""

    def __init__(self, *numbers):
        self.numbers = set(numbers)
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls in self.numbers:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize("where", ["backward", "second micro-batch"])
def test_out_of_memory_begins_the_update_again(chat, where):
    """Fails if gradients or losses that were there before the error are counted twice, or half a
    backward stays."""
    cfg = config(micro_batch=3)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    wanted = sd.update(chat, sgd(chat), rollouts, cfg)
    if where == "backward":
        # the first layer's gradients come last
        first, *_ = sd.adapters(chat.model).values()
        first.register_hook(Full(1))
    else:
        # a micro-batch calls the model twice, for the student and for the teacher
        chat.model.base_model.register_forward_pre_hook(Full(3))
    assert sd.update(chat, sgd(chat), rollouts, cfg) == pytest.approx(wanted, rel=1e-5)
    assert chat.max_rows == {"rollouts": 1}


def test_a_step_without_signal_changes_nothing(chat):
    """Fails if equal rewards, or no rollouts at all, crash the backward or give NaN."""
    cfg = config(condition="grpo")
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg, 4)
    for r in rollouts:
        r.advantage = 0.0
    before = copy_of_adapters(chat)
    assert sd.update(chat, sgd(chat, lr=1.0), rollouts, cfg)["grad_norm"] == 0.0
    assert sd.update(chat, sgd(chat, lr=1.0), [], cfg)["loss"] == 0.0
    assert_same(copy_of_adapters(chat), before, atol=0, rtol=0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update(chat, monkeypatch, where):
    """Fails if the optimiser steps first and the check comes after."""
    real = sd.fused_loss

    def poisoned(*arguments):
        value, gradient = real(*arguments)
        (value if where == "loss" else gradient)[0] = math.nan
        return value, gradient

    cfg = config()
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    before = copy_of_adapters(chat)
    monkeypatch.setattr(sd, "fused_loss", poisoned)
    with pytest.raises(FloatingPointError):
        sd.update(chat, sgd(chat, lr=1.0), rollouts, cfg)
    assert_same(copy_of_adapters(chat), before, atol=0, rtol=0)


def test_group_advantages_equal_numbers_worked_by_hand():
    """Eq (3). Fails if groups mix, or std is the sample's (n − 1)."""

    def advantages(rewards: list[float], group_size: int) -> list[float]:
        rollouts = [answered("", reward) for reward in rewards]
        return sd.group_advantages(rollouts, None, config(group_size=group_size))

    root = math.sqrt(3)
    assert advantages([1, 0, 0, 0, 1, 1], 2) == [1, -1, 0, 0, 0, 0]
    assert advantages([1, 0, 0, 0], 4) == pytest.approx([root] + [-1 / root] * 3)


# ---- LoRA. ---------------------------------------------------------------------------------------


def test_an_adapter_adds_its_scaled_product():
    """y = W x + b + (alpha / rank) B A x. Fails if scale or bias is lost."""
    linear = torch.nn.Linear(3, 2)
    layer = sd.LoRALinear(linear, 4, 8.0, torch.Generator().manual_seed(0))
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), linear(x))  # B starts at zero
    torch.nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), linear(x) + 2.0 * x @ layer.A.T @ layer.B.T)


def test_adapters_off_is_the_original_bit_for_bit_after_training(chat):
    """Fails if training touches a frozen weight, or a part of the adapter stays on."""
    cfg = config()
    ids = torch.arange(20)[None]
    before = chat.model(input_ids=ids).logits
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    for _ in range(3):
        sd.update(chat, sgd(chat, lr=0.1), rollouts, cfg)
    with sd.adapters_off(chat.model):
        assert torch.equal(chat.model(input_ids=ids).logits, before)
    assert not torch.equal(chat.model(input_ids=ids).logits, before)


def test_adapters_are_float32_on_a_bfloat16_base_and_most_weights_move(folder):
    """Fails if adapters take the base's dtype: the updates of a small lr round to zero."""
    cfg = config(lr=5e-6)
    chat = adapt(sd.load_model(str(folder), dtype="bfloat16"), cfg, noise=0.3)
    rollouts, before = rollouts_of(chat, cfg), copy_of_adapters(chat)
    optimizer = torch.optim.AdamW(sd.adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0)
    sd.update(chat, optimizer, rollouts, cfg)
    moved = []
    for name, p in sd.adapters(chat.model).items():
        assert p.dtype == torch.float32
        moved.append((p != before[name]).float().mean().item())
    assert np.mean(moved) > 0.9
    assert chat.head.dtype == torch.bfloat16


# ---- Sampler. ------------------------------------------------------------------------------------


def random_numbers(*shape) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def asking(*texts) -> list[list[dict]]:
    """A conversation for each text."""
    return [[critic_prompts.user(text)] for text in texts]


def prompts_of(chat, *texts) -> list[list[int]]:
    return [chat.encode(messages) for messages in asking(*texts)]


def test_the_sampler_draws_from_the_full_softmax_at_its_temperature(chat):
    """4,000 draws of one token. Fails if another temperature, or the model's own top-k, shapes
    the draw."""
    (prompt,) = prompts_of(chat, "7+6*3")
    samples = sd.generate(chat, [prompt] * 4000, 1, random_numbers(4000, 1), 2.0, 4000)
    p = F.softmax(chat.model(input_ids=torch.tensor([prompt])).logits[0, -1].float() / 2.0, -1)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=len(p))
    common = 4000 * p > 5
    expected = 4000 * p[common]
    chi_square = ((counts[common] - expected) ** 2 / expected).sum().item()
    assert chi_square < 1.5 * common.sum()
    assert samples[0].entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_a_sample_depends_on_no_other_row(chat):
    """Fails if rows share random numbers, padding shifts positions, or a row that leaves takes
    another row's cache along."""
    chat.end_ids = list(range(0, 200, 9))  # so that rows end at different times
    prompts = prompts_of(chat, "7", "7+6*3*9", "1+4*2", "3*3")
    drawn = []
    for batch_size in (4, 1, 3):
        samples = sd.generate(chat, prompts, 20, random_numbers(4, 20), 1.5, batch_size)
        drawn.append([s.ids for s in samples])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({len(ids) for ids in drawn[0]}) > 1


def test_batched_generation_with_a_cache_equals_the_slow_loop():
    """Greedy, on GPT-2 with its absolute positions. Fails if padding or the cache shifts positions,
    or sampling leaves the model in train mode, with its dropout."""
    torch.manual_seed(0)
    shape = dict(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model_config = transformers.GPT2Config(initializer_range=0.5, **shape)
    gpt2 = transformers.GPT2LMHeadModel(model_config)
    prompts = [[5, 6, 7], [8] * 9, [9, 10]]
    samples = sd.generate(sd.Chat(gpt2.train(), None, [0], 64), prompts, 10)
    for prompt, sample in zip(prompts, samples):
        slow = list(prompt)
        for _ in sample.ids:
            logits = gpt2(input_ids=torch.tensor([slow])).logits
            slow.append(logits[0, -1].argmax().item())
        assert prompt + sample.ids == slow


def test_any_end_token_ends_a_row_and_a_cut_row_is_marked(chat):
    """Fails if only one end token ends, is dropped from the response, or a cut row counts as
    ended."""
    chat.end_ids = list(range(0, 200, 9))
    samples = sd.generate(chat, [[1, 5, 2]] * 64, 6, random_numbers(64, 6), 2.0)
    for s in samples:
        assert s.truncated == (s.ids[-1] not in chat.end_ids)
        assert len(s.ids) == 6 or not s.truncated
        assert not set(s.ids[:-1]) & set(chat.end_ids)
    assert len({s.ids[-1] for s in samples if not s.truncated}) > 1
    assert any(s.truncated for s in samples)


@pytest.mark.parametrize("uniforms", [None, random_numbers(2, 4)])
def test_nan_logits_stop_the_sampler(chat, uniforms):
    """Fails if NaN logits, greedy or not, are drawn from as if they were a distribution."""
    with torch.no_grad():
        chat.head[5] = math.nan
    with pytest.raises(FloatingPointError):
        sd.generate(chat, [[1, 5, 2]] * 2, 4, uniforms)


# ---- Two rows a rollout, and who reads what. -----------------------------------------------------


def test_the_first_end_token_is_scored_and_padding_never(chat):
    """Padding is the end token. Fails if a mask is made from token values."""
    prompts, responses = ([[1, 5, 0, 2], [1, 6, 7, 0, 2]], [[8, 0], [9, 10, 11, 12, 0]])
    hidden = sd.response_hidden(chat, prompts, responses)
    alone = []
    for prompt, response in zip(prompts, responses):
        states = chat.model.base_model(input_ids=torch.tensor([prompt + response]))
        alone.append(states.last_hidden_state[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", critic_prompts.FORMATS)
def test_both_rows_end_in_the_very_ids_that_were_drawn(chat, name, stop):
    """Watches what reaches the network. Fails if a prompt is rendered twice, a boundary moves, the
    headers differ, or --stop-at-first-edit scores more or less than the first edit."""
    cfg, prompt_format = (config(micro_batch=1, prompts=name), critic_prompts.FORMATS[name])
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    for r in rollouts:
        r.context = chat.decode(r.sample.ids[:3]) + "####9"
    cfg = replace(cfg, stop_at_first_edit=stop)
    rollouts, rows = sd.prepare(chat, rollouts, cfg), []
    chat.model.base_model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    sd.update(chat, sgd(chat), rollouts, cfg)
    for r, student_row, teacher_row in zip(rollouts, rows[::2], rows[1::2]):
        edit = critic_prompts.first_edit(chat.decode, r.sample.ids, r.context)
        scored = r.sample.ids[: edit + 1] if stop else r.sample.ids
        student = chat.encode(prompt_format.student(r.problem.question))
        teacher = chat.encode(prompt_format.teacher(r.problem.question, r.context))
        assert student[-2:] == teacher[-2:] == [0, 2]
        assert student_row == student + scored
        assert teacher_row == teacher + scored


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("ending", ["6€", "6€ more", "5€", "6£", "6", ""])
def test_the_first_edit_is_found_for_any_tokenizer(ending):
    """Against a scan over all prefixes, with letters cut between tokens. Fails if half a letter
    counts as an edit, or the search is off by one."""
    ids, decode = list("naïve: 2€ + 4€ = 6€".encode()), decode_bytes
    critique = f"naïve: 2€ + 4€ = {ending}"
    scan = 0
    while scan < len(ids) and critique.startswith(decode(ids[: scan + 1]).rstrip("\ufffd")):
        scan += 1
    assert critic_prompts.first_edit(decode, ids, critique) == scan > 15


def test_what_is_said_before_the_first_step_is_no_edit():
    """Fails if an attempt's opening sentence, which a critique leaves out, counts as the edit."""
    attempt = "First I add.\n<step_1>1 + 1 = 3</step_1>"
    critique = "<step_1>1 + 1 = 2</step_1>"
    ids = list(attempt.encode())
    edit = critic_prompts.first_edit(decode_bytes, ids, critique)
    assert edit == attempt.index("3")


def test_a_thinking_teacher_is_asked_for(chat):
    """Fails if --teacher-thinking does not reach the template, or the student thinks too."""
    chat.tokenizer.chat_template = "{{ messages[0].content }}|{{ enable_thinking }}|"
    cfg = config()
    for thinking in (False, True):
        r = rollouts_of(chat, replace(cfg, teacher_thinking=thinking), 1)[0]
        assert chat.decode(r.prompt).endswith("|False|")
        assert chat.decode(r.teacher_prompt).endswith(f"|{thinking}|")


def test_a_context_that_does_not_fit_is_left_out_whole(chat):
    """Fails if a prompt is cut, header included, or one that just fits is left out."""
    cfg = config()
    rollouts = rollouts_of(chat, cfg, 1)
    length = len(rollouts[0].teacher_prompt) + len(rollouts[0].sample.ids)
    for window, count in ((length, 1), (length - 1, 0)):
        assert len(sd.prepare(replace(chat, window=window), rollouts, cfg)) == count


def test_only_the_credit_differs_between_conditions(chat):
    """Fails if a condition gets another prompt, sampler or grader than the others."""
    adapt(chat, config())
    problems = sd.Split([problem for _, problem in numbered_problems(9)], [], [], {})
    drawn = {}
    for name in sd.CONDITIONS:
        cfg = config(condition=name, attempts_per_step=4, group_size=2)
        run = sd.Run(cfg, chat, problems, ScriptedCritic(TRACE), sgd(chat))
        _, rollouts = sd.take_step(run)
        # of a group, the first attempt
        for r in rollouts[:: cfg.attempts_per_problem]:
            told = (r.prompt, r.sample, r.text, r.reward)
            assert drawn.setdefault(r.problem, told) == told
    assert len(drawn) == 4


@pytest.mark.parametrize("style", critic_prompts.STYLES)
@pytest.mark.parametrize("solution", ["SOLUTION", None])
@pytest.mark.parametrize("name", critic_prompts.FORMATS)
def test_each_reader_is_told_what_it_may_see(name, solution, style):
    """Fails if a prompt loses its problem, attempt or context, or shows a hidden solution."""
    prompt_format = critic_prompts.FORMATS[name]
    critic = prompt_format.critic("QUESTION", "ATTEMPT", solution, "ANSWER", style)
    assert "QUESTION" in str(prompt_format.student("QUESTION"))
    teacher = str(prompt_format.teacher("QUESTION", "CONTEXT"))
    assert "QUESTION" in teacher and "CONTEXT" in teacher
    assert "QUESTION" in str(critic) and "ATTEMPT" in str(critic)
    assert ("SOLUTION" in str(critic)) == (solution is not None)
    assert "None" not in str(critic) and (solution or "ANSWER" not in str(critic))
    assert critic[-1]["role"] == "user"


def test_a_plain_critic_reads_both_answers_and_the_right_one_last():
    """Fails if one of them, or one of the example's, is left out or stands in the other's place."""
    critic = critic_prompts.FORMATS["plain"].critic
    example, _, task = critic("QUESTION", "So it is \\boxed{30}.", "SOLUTION", "11", "copy")
    for turn in (example, task):
        assert "Attempt, whose answer is 30:" in turn["content"]
        assert turn["content"].endswith("\n\nCorrected attempt, whose answer is 11:")
    (*_, task) = critic("QUESTION", "It is", None, "11", "copy")
    assert "Attempt, whose answer is missing:" in task["content"]
    assert task["content"].endswith("\n\nCorrected attempt:")


@pytest.mark.parametrize("sees", [True, False])
def test_the_solution_reaches_the_critic_only_if_it_may(chat, sees):
    """Fails if it reaches the student, the critique's teacher, or a critic that may not see it."""
    cfg = config(critic_sees_reference=sees)
    (r,) = rollouts_of(chat, cfg, 1)
    critic = ScriptedCritic()
    sd.write_contexts([r], critic, cfg)
    sd.prepare(chat, [r], cfg)
    assert (r.problem.solution in str(critic.heard)) == sees
    assert r.problem.solution not in chat.decode(r.prompt)
    assert r.problem.solution not in chat.decode(r.teacher_prompt)


# ---- Conditions and critics. ---------------------------------------------------------------------


class ScriptedCritic:
    """Gives the same answers every time, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers = itertools.cycle(answers or [TRACE])
        self.heard = []

    def __call__(self, conversations: list[list[dict]]) -> list[sd.Reply]:
        self.heard += conversations
        return [sd.Reply(next(self.answers), 5) for _ in conversations]


@pytest.mark.parametrize("name", sd.CONDITIONS)
def test_every_condition_trains_and_asks_a_critic_if_it_says_so(
    tmp_path, folder, monkeypatch, name
):
    """Fails if a row of CONDITIONS cannot be trained, asks a critic although asks_critic is False,
    or asks none although it is True; or if checkpointing loses the adapters' gradients."""
    condition, critic, loaded = sd.CONDITIONS[name], ScriptedCritic(), []
    monkeypatch.setattr(sd, "load_critic", lambda *_: loaded.append(critic) or critic)
    flags = ["--condition", name, "--steps", "2", "--show-every", "1", "--gradient-checkpointing"]
    assert run_in(tmp_path, folder, *flags) == 0
    assert bool(loaded) == bool(critic.heard) == condition.asks_critic
    entries = steps_of(tmp_path / "run")
    for entry in entries:
        assert entry["scored"] > 0 and entry["scored_tokens"] > 0
        assert (entry["critic_tokens"] > 0) == condition.asks_critic
        assert (entry["grad_norm"] > 0) == condition.has_teacher


def test_a_failed_critique_is_left_out_and_counted(chat):
    """Fails if an empty, cut, thinking-only or step-less reply reaches the teacher."""
    thought = f"<think>no</think>{TRACE}"
    bad = ["", None, "I cannot help", "####9", "s7+6=3", "<think>s7+6=3####3"]
    cfg = config()
    rollouts = sd.attempt(chat, numbered_problems(8), cfg)
    sd.write_contexts(rollouts, ScriptedCritic(TRACE, *bad, thought), cfg)
    scored = sd.prepare(chat, rollouts, cfg)
    assert [r.context for r in rollouts] == [TRACE] + [None] * 6 + [TRACE]
    assert scored == [rollouts[0], rollouts[7]]
    metrics = sd.measure(rollouts, cfg)
    assert (metrics["critic_failed"], metrics["critic_tokens"]) == (6, 40)


STEP_TRACE = "<step_1>1 + 1 = 2</step_1>\n<answer>2</answer>"


def test_small_talk_around_a_trace_is_dropped():
    """Fails if "here it is" is distilled."""
    extract = critic_prompts.FORMATS["steps"].extract_trace
    assert extract(f"Here it is: {STEP_TRACE} Well done!") == STEP_TRACE


@pytest.mark.parametrize(
    "reply",
    [
        "",
        STEP_TRACE[:-9],
        "<answer>2</answer>",
        STEP_TRACE.replace("</step_1>", ""),
        f"{STEP_TRACE} {STEP_TRACE}",
        "</answer> <step_1>x</step_1>",
        "<step_1>" * 25_000,
        "</step_1>" * 20_000,
        "<step_{0}>x</step_{0}></answer>".format("9" * 5000),
    ],
)
def test_what_is_no_trace_is_refused_at_once(reply):
    """Fails if a loop, an echo or half a trace is accepted, or a hostile reply holds the run up."""
    extract = critic_prompts.FORMATS["steps"].extract_trace
    start = time.process_time()
    assert extract(reply) is None
    extract(STEP_TRACE + reply)
    assert time.process_time() - start < 0.2


PLAIN_STEPS = {
    "numbered items": ("1. a = 1\n2) b = 2\n\nSo \\boxed{2}",
                       ["1. a = 1", "2) b = 2", "So \\boxed{2}"]),
    "paragraphs": ("First a.\n\nThen b,\nand c.\n \t\nEnd.",
                   ["First a.", "Then b,\nand c.", "End."]),
    "Markdown": ("**Step 1:** a\n\n- **b**\n- c", ["**Step 1:** a", "- **b**\n- c"]),
    "LaTeX": ("\\[ x = \\frac{1}{2} \\]\n\n\\boxed{\\frac{1}{2}}",
              ["\\[ x = \\frac{1}{2} \\]", "\\boxed{\\frac{1}{2}}"]),
    "Windows line ends": ("1. a\r\n2. b\r\n\r\nc\r\n", ["1. a", "2. b", "c"]),
    "no steps": ("\\boxed{2}", ["\\boxed{2}"]),
    "a number at the start of a line": ("It costs\n2.5 dollars", ["It costs\n2.5 dollars"]),
    "step tags": (STEP_TRACE, [STEP_TRACE]),
    "nothing": (" \n\n ", []),
}  # fmt: skip


@pytest.mark.parametrize("what", PLAIN_STEPS)
def test_steps_of_plain_text(what):
    """Fails if a paragraph or an item is cut in two, or two of them count as one step."""
    text, steps = PLAIN_STEPS[what]
    assert critic_prompts.plain_find(text) == steps


PLAIN = critic_prompts.PLAIN_EXAMPLE["copy"]
# a critic's reply, and the trace in it
PLAIN_REPLIES = {
    "a trace": (PLAIN, PLAIN),
    "a fraction": ("So \\boxed{\\frac{1}{2}}.", "So \\boxed{\\frac{1}{2}}."),
    "text after the answer": (f"{PLAIN}\n\nI corrected the second step.", PLAIN),
    "a label before it": (f"**Corrected attempt:**\n\n{PLAIN}", PLAIN),
    "a label in its line": (f"Corrected attempt: {PLAIN}", PLAIN),
    "the whole label": (f"Corrected attempt, whose answer is 11:\n{PLAIN}", PLAIN),
    "a sentence before it": (f"Sure! Here is the corrected attempt:\n\n{PLAIN}", PLAIN),
    "a displayed answer": ("So:\n\\[\n\\boxed{11}\n\\]\nDone.", "So:\n\\[\n\\boxed{11}\n\\]"),
    "an answer in three lines": ("So \\boxed{\n11\n}.\nDone.", "So \\boxed{\n11\n}."),
    "rules and a formula twice": ("---\n\n5 = 5\n\n---\n\n5 = 5\n\n\\boxed{5}",) * 2,
    "Windows line ends": (PLAIN.replace("\n", "\r\n"), PLAIN),
    "step tags and a box": (f"{STEP_TRACE} \\boxed{{2}}", f"{STEP_TRACE} \\boxed{{2}}"),
    "step tags without a box": (STEP_TRACE, None),
    "an echo of the request": (f"Problem: 6 + 5\n\nAttempt, whose answer is 30:\n{PLAIN}", None),
    "an echo of the instructions": (
        f"All of it agrees with the correct solution.\n\n{PLAIN}",
        None,
    ),
    "a loop": (f"{PLAIN}\n\n{PLAIN}", None),
    "no answer": ("1. The pens cost 6 dollars.", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("what", PLAIN_REPLIES)
def test_the_plain_trace_in_a_reply(what):
    """Fails if the critic's own words, an echo or a loop are distilled, or a trace is refused."""
    reply, trace = PLAIN_REPLIES[what]
    assert critic_prompts.plain_trace(reply) == trace


@pytest.mark.parametrize("text", ["\n", "!\n", "\r\n", " ", "1. ", "\\boxed{", "Attempt", "*"])
def test_a_hostile_plain_reply_is_cheap(text):
    """Fails if a pattern backtracks: 200,000 line ends in a row would hold the run up for hours."""
    reply = "a" + text * (20_000 // len(text)) + "\\boxed{1}"
    start = time.process_time()
    critic_prompts.plain_trace(reply)
    critic_prompts.plain_find(reply)
    assert time.process_time() - start < 0.2


def test_a_plain_critique_is_held_against_its_attempt(chat):
    """The worked example of the prompt. Fails if the first edit is not at the wrong sign, or a step
    that was changed counts as copied."""
    attempt = critic_prompts.PLAIN_EXAMPLE["attempt"]
    ids = chat.tokenizer(attempt)["input_ids"] + [0]
    edit = critic_prompts.first_edit(chat.decode, ids, PLAIN)
    assert edit == attempt.index("* 5 = 30")
    assert critic_prompts.first_edit(chat.decode, ids, attempt) == len(ids)
    r = replace(answered(attempt, 0.0), sample=sd.Sample(ids, False, 0.0), context=PLAIN)
    r.teacher_prompt = [1]
    assert sd.measure([r], config(prompts="plain"))["copied"] == pytest.approx(1 / 3)


def test_the_local_critic_is_the_base_and_drops_what_is_cut_off(chat):
    """Fails if the critic is asked with the adapter on, or half a critique is kept."""
    chat.end_ids = list(range(0, 200, 9))  # so that replies end
    toy_critic = critic_prompts.FORMATS["toy"].critic
    conversations = [toy_critic(text, TRACE, None, "", "copy") for text in "7135"]
    critic = sd.LocalCritic(chat, 60, 8)
    before = critic(conversations)
    adapt(chat, config(), noise=2.0)
    adapted = sd.generate(chat, [chat.encode(messages) for messages in conversations], 60)
    assert critic(conversations) == before
    assert [len(s.ids) for s in adapted] != [reply.tokens for reply in before]
    assert None not in [reply.text for reply in before]
    assert sd.LocalCritic(chat, 1, 8)(conversations[:1]) == [sd.Reply(None, 1)]


HOSTILE = ["s7+6=3", "####9", "</answer>", "<|end|>", "<|assistant|>", "\x00", "€", "", "nan"]


def random_config(rng) -> sd.Config:
    return config(
        condition=rng.choice(list(sd.CONDITIONS)),
        kl=rng.choice(list(sd.DIVERGENCES)),
        micro_batch=rng.randint(1, 4),
        kl_chunk=rng.randint(1, 9),
        group_size=2,
        max_new_tokens=rng.randint(1, 8),
        temperature=rng.choice([0.5, 1.0, 2.0]),
        stop_at_first_edit=rng.random() < 0.3,
    )


def test_200_random_steps_keep_the_invariants(chat):
    """Random configurations and hostile texts. Fails if ids change on their way to the loss, a text
    ends its own turn, a failed critique is scored, or a number is not finite."""
    adapt(chat, config(), noise=0.3)
    rng = random.Random(0)
    for _ in range(200):
        cfg = random_config(rng)
        chat.window = rng.choice([4096, 60])
        texts = ["".join(rng.choices(HOSTILE, k=rng.randrange(6))) for _ in range(5)]
        critic = ScriptedCritic(None, texts[0], TRACE)
        problems = [sd.Problem("7+6" + text, texts[3] or "s", "3") for text in texts[1:3]]
        rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, 2, rng.randrange(99))
        drawn = [list(r.sample.ids) for r in rollouts]
        sd.write_contexts(rollouts, critic, cfg)
        scored = sd.prepare(chat, rollouts, cfg)
        step = sd.update(chat, sgd(chat, lr=0.01), scored, cfg)
        assert [r.sample.ids for r in rollouts] == drawn
        assert all(map(math.isfinite, step.values()))
        for r in scored:
            assert 0 < len(r.scored_ids) <= len(r.sample.ids) <= cfg.max_new_tokens
            assert r.prompt.count(2) == 1 and r.prompt[-1] == 2
            if cfg.has_teacher:
                assert r.context and len(r.teacher_prompt) + len(r.sample.ids) <= chat.window
                assert r.teacher_prompt.count(2) == 1 and r.teacher_prompt[-1] == 2


# ==================================================================================================
#
# These were the tests of the method. What follows tests the plumbing.
#
# ==================================================================================================

# ---- Models. -------------------------------------------------------------------------------------


def no_template(model, tokenizer):
    tokenizer.chat_template = None
    return model


def no_end(model, tokenizer):
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def other_model(name: str, **changes) -> transformers.PreTrainedModel:
    shape = dict(vocab_size=259, hidden_size=16, intermediate_size=16, eos_token_id=0)
    layers = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model_config = transformers.AutoConfig.for_model(name, **shape, **layers, **changes)
    return transformers.AutoModelForCausalLM.from_config(model_config)


def soft_capped(model, tokenizer):
    return other_model("gemma2", head_dim=8)


def scaled(model, tokenizer):
    return other_model("cohere")


def changed_folder(folder, tmp_path, change) -> str:
    """A copy of the model's folder with one thing changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    change(model, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (no_template, "no chat template"),
        (no_end, "no end token"),
        (soft_capped, "caps"),
        (scaled, "scales"),
    ],
)
def test_a_model_that_would_train_wrongly_is_refused(folder, tmp_path, change, message):
    """Fails if a missing template falls back to bare text, or a head's arithmetic is ignored."""
    with pytest.raises(sd.UserError, match=message):
        sd.load_model(changed_folder(folder, tmp_path, change))


def with_dropout(model, tokenizer):
    model.config.attention_dropout = 0.5
    return model


def test_dropout_is_off_in_training(folder, tmp_path):
    """Fails if a model's dropout makes the student differ from itself."""
    chat = sd.load_model(changed_folder(folder, tmp_path, with_dropout))
    chat.model.train()
    ids = torch.arange(15)[None]
    assert torch.equal(chat.model(input_ids=ids).logits, chat.model(input_ids=ids).logits)


# ---- Memory: what does not fit is halved, and a GPU that is only traced. -------------------------


def limited(chat, rows: int) -> sd.Chat:
    """As on a GPU on which no more than so many rows fit."""

    def check(model, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError

    chat.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return chat


def halvings(work: str, flag: str, rows: int, limit: int) -> list[str]:
    """The warnings until no more than `limit` rows are left."""
    lines = []
    while rows > limit:
        what = f"out of memory with {rows} rows of {work}; continues with {flag} {rows // 2}"
        lines.append(f"WARNING: {what}")
        rows //= 2
    return lines


@pytest.mark.parametrize("name", sd.CONDITIONS)
def test_what_does_not_fit_is_halved_and_changes_no_result(tmp_path, monkeypatch, capfd, name):
    """The toy, its own critic, on a GPU with room for 2 rows. Fails if a batch is dropped or drawn
    with other random numbers, sampler, critic or update is not halved, or it is not said which
    flag was."""
    flags = ["--preset", "toy", "--condition", name, "--steps", "2", "--eval-every", "2"]
    sizes = dict(attempts_per_step=8, group_size=4, validation_problems=2, eval_samples=2)
    flags += ["--final-problems", "0", "--no-export", *as_flags(sizes)]
    assert sd.main([*flags, "--out", str(tmp_path / "all")]) == 0
    real = sd.load_model
    monkeypatch.setattr(sd, "load_model", lambda *arguments: limited(real(*arguments), 2))
    capfd.readouterr()
    assert sd.main([*flags, "--out", str(tmp_path / "few")]) == 0
    whole, halved = log_of(tmp_path / "all"), log_of(tmp_path / "few")
    for entry, other in zip(whole[1:], halved[1:], strict=True):
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-5)
    wanted = halvings("attempts", "--sample-batch", 8, 2)
    if sd.CONDITIONS[name].asks_critic:
        wanted += halvings("critiques", "--sample-batch", 8, 2)
    wanted += halvings("rollouts", "--micro-batch", whole[1]["scored"], 2)
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("WARNING")] == wanted


def test_a_single_row_that_does_not_fit_stops_the_run(chat):
    """Fails if 0 rows are tried again and again, a step goes on without it, or the adapter is left
    off."""
    cfg = config()
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    limited(chat, 0)
    with pytest.raises(sd.UserError, match="a single row of attempts"):
        sd.attempt(chat, numbered_problems(1), cfg)
    with pytest.raises(sd.UserError, match="critiques"):
        sd.LocalCritic(chat, 9, 8)(asking("7"))
    with pytest.raises(sd.UserError, match="rollouts"):
        sd.update(chat, sgd(chat), rollouts, cfg)
    for layer in chat.model.modules():
        assert getattr(layer, "enabled", True)


class MemoryTrace(TorchDispatchMode):
    """Bytes of the storages that are alive on the meta device, where tensors have no data.

    A number that is read is 1, and every row is found to be unfinished. A tensor of the CPU in the
    path raises, as it would on a GPU.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()
        for weight in model.parameters():
            self.add(weight)
        self.weights = self.now

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.is_meta and key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        inputs, aten = tensors_in((args, kwargs)), torch.ops.aten
        # a CPU tensor without dimensions is a number, which any device takes
        devices = {tensor.device.type for tensor in inputs if tensor.dim()}
        assert len(devices) < 2, f"{op} mixes {devices}"
        if op.overloadpacket in (aten._local_scalar_dense, aten.is_nonzero) and inputs[0].is_meta:
            return 1
        if op.overloadpacket is aten.nonzero:
            return inputs[0].new_empty(inputs[0].numel(), inputs[0].dim(), dtype=torch.long)
        out = op(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.add(tensor)
        return out


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def flash_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """CUDA's kernel. The meta device takes the plain one, which holds (L, L) matrices."""
    assert attn_mask is None
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]


def meta_chat(cfg, vocabulary: int, **shape) -> sd.Chat:
    """A Qwen3 without data: bfloat16 weights, float32 adapters."""
    with torch.device("meta"):
        model = tiny_model(vocabulary, **shape).to(torch.bfloat16).requires_grad_(False)
    chat = adapt(sd.Chat(model, None, [1], 4096), cfg)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return chat


def trace_update(chat, cfg, prompt: int, context: int) -> MemoryTrace:
    """Two steps of two micro-batches: gradients and AdamW's state are there at the peak."""
    sample = sd.Sample([5] * cfg.max_new_tokens, False, 0.0)
    r = sd.Rollout(sd.Problem("", "", ""), [3] * prompt, sample, "", 0.0)
    if cfg.has_teacher:
        r.teacher_prompt = [3] * (prompt + context)
    optimizer = torch.optim.AdamW(sd.adapters(chat.model).values(), weight_decay=0.0)
    with MemoryTrace(chat.model) as trace:
        for _ in range(2):
            sd.update(chat, optimizer, [r] * (2 * cfg.micro_batch), cfg)
    return trace


def trace_sampling(chat, rows: int, prompt: int, tokens: int, monkeypatch) -> MemoryTrace:
    """`tokens` tokens after a prompt; a cache of the prompt's length stands for the prompt."""
    shape = chat.model.config
    size = (rows, shape.num_key_value_heads, prompt - 1, shape.head_dim)
    uniforms = np.zeros((rows, tokens), np.float32)
    with monkeypatch.context() as patch, MemoryTrace(chat.model) as trace:
        cache = transformers.DynamicCache(config=shape)
        for layer in range(shape.num_hidden_layers):
            for_layer = [torch.empty(size, dtype=chat.head.dtype, device="meta") for _ in range(2)]
            cache.update(*for_layer, layer)
        del for_layer
        patch.setattr(transformers, "DynamicCache", lambda config: cache)
        # the only place that reads more than a number
        patch.setattr(torch.Tensor, "tolist", lambda numbers: np.ones(numbers.shape, int).tolist())
        sd.generate(chat, [[3]] * rows, tokens, uniforms, 1.1, rows)
    return trace


@pytest.mark.parametrize("condition, kl", STEPS)
def test_a_step_needs_no_cpu(condition, kl):
    """On the meta device. Fails on `.cpu()`, or on a tensor that is made without device=."""
    cfg = config(condition=condition, kl=kl)
    trace = trace_update(meta_chat(cfg, 259), cfg, 20, 60)
    assert trace.peak > trace.weights


def test_checkpointing_saves_memory_on_a_gpu(monkeypatch):
    """On the meta device. Fails if checkpointing is not asked for, or the step runs in eval mode,
    where it is silently off."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=32)
    peaks = {}
    for on in (True, False):
        cfg = config(gradient_checkpointing=on, max_new_tokens=40, kl_chunk=64)
        trace = trace_update(meta_chat(cfg, 259, **shape), cfg, 20, 60)
        peaks[on] = trace.peak - trace.weights
    assert 0 < peaks[True] < 0.5 * peaks[False]


def test_the_sampler_needs_no_cpu_and_holds_one_cache(monkeypatch):
    """On the meta device. Fails on a tensor that is made without device=, if the cache is copied as
    a whole, or if it is kept when the sampler is done."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    chat = meta_chat(config(), 259, num_hidden_layers=16)
    trace = trace_sampling(chat, 32, 500, 4, monkeypatch)
    cache = 32 * 504 * 16 * 2 * 8 * 2  # rows, tokens, layers, keys and values, width, bytes
    assert cache < trace.peak - trace.weights < 1.3 * cache
    assert trace.now - trace.weights < 0.1 * cache


# ---- Problems and reward. ------------------------------------------------------------------------

GRADES = [
    ("<answer>42</answer>", "42", True),
    ("", "42", False),
    ("the answer is 42", "42", False),
    ("<answer>42</answer> <answer>41</answer>", "42", False),
    (r"\boxed{42} then \boxed{1}", "42", False),
    (r"\boxed{42", "42", False),
    ("#### 42", "42", True),
    ("<answer> 42. </answer>", "42", True),
    ("<answer>41</answer> <answer>42</answer>", "42", True),
    (r"<answer>7</answer> \boxed{42}", "42", False),
    ("<answer>1,234</answer>", "1234", True),
    ("<answer>12,34</answer>", "1234", False),
    ("<answer>$5.50</answer>", "5.5", True),
    ("<answer>50%</answer>", "0.5", True),
    ("<answer>1/0</answer>", "1", False),
    ("<answer>0.5</answer>", "1/2", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    ("<answer>3.14</answer>", "3.1415", False),
    ("<answer>The Red  House</answer>", "the red house", True),
    (r"\boxed{2\text{ cm}}", "2", True),
    (r"<answer>2\frac{3}{4}</answer>", "23/4", False),
    ("<answer>11/2</answer>", "1 1/2", False),
    (r"\boxed{\$5}", "5", True),
    (r"\boxed{1{,}234}", "1234", True),
    ("<answer>1, 234</answer>", "1234", False),
    (r"\boxed{2\text{ hours }30\text{ minutes}}", "230", False),
    ("#### Step 2: add\n6 + 5 = 11", "step 2: add", False),
]


@pytest.mark.parametrize("text, answer, right", GRADES)
def test_grader(text, answer, right):
    """Fails if the first answer counts instead of the last, or a number is compared as text."""
    assert sd.is_correct(text, answer, "exact") == right


class FakeMathVerify:
    """Takes every pair of texts for equal, and remembers what it had to parse."""

    def __init__(self):
        self.parsed = []

    def parse(self, text: str) -> str:
        self.parsed.append(text)
        return text

    def verify(self, gold, response) -> bool:
        return True


def test_math_verify_is_asked_about_what_is_not_equal_as_text(monkeypatch):
    """Fails if --grader math-verify changes nothing, or overrules the comparison of numbers."""
    package = FakeMathVerify()
    monkeypatch.setitem(sys.modules, "math_verify", package)
    assert not sd.is_correct("<answer>1+x</answer>", "x+1", "exact")
    assert sd.is_correct("<answer>1+x</answer>", "x+1", "math-verify")
    assert not sd.is_correct("<answer>7</answer>", "8", "math-verify")


HOSTILE_ANSWERS = [
    "9**9**9",
    "9^{9^{9}}",
    "999999999!",
    "1" * 10**5,
    "{" * 10**5,
    "<answer>" * 10**5,
    "\\boxed{" * 10**5,
    "(" * 10**5,
    "1/" * 10**5,
    "\\frac{" * 10**5,
    ",".join(["111"] * 10**5),
]


@pytest.mark.parametrize("answer", HOSTILE_ANSWERS, ids=range(len(HOSTILE_ANSWERS)))
def test_hostile_answers_are_cheap(answer, monkeypatch):
    """Fails if anything is computed, here or by math-verify, or a pattern backtracks."""
    package = FakeMathVerify()
    monkeypatch.setitem(sys.modules, "math_verify", package)
    for text in (answer, f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", f"#### {answer}"):
        start = time.process_time()
        sd.is_correct(text, "x", "math-verify")
        sd.is_correct("<answer>x</answer>", answer, "math-verify")
        assert time.process_time() - start < 0.2
    for text in package.parsed:
        assert len(text) < 102 and not re.search(r"9\*\*9|9\^{9|9!", text)


ROW = '{"problem": "1+1", "solution": "s1+1=2####2", "answer": "2"}'
BAD_DATA = [
    ("", "0 distinct"),
    (ROW + "\n" + ROW.replace("1+1", " 1+1 "), "1 duplicate"),
    ('{"problem": "1', "line 1: is not a JSON object"),
    ("[1, 2]", "row 1: is not a JSON object"),
    (b"\xff\xfe{}", "not UTF-8"),
    ('{"problem": "1+1", "answer": "2"}', "'solution' is missing, empty or not text"),
    (ROW.replace('"2"', "true"), "'answer' is missing, empty or not text"),
    (ROW.replace("s1+1=2####2", ""), "1 without a solution"),
    (ROW + "\n{}", "line 2: field 'question' is missing"),
    ('{"question": "1+1", "answer": "x ####"}', "'#### ANSWER'"),
    (ROW.replace("1+1", "1+" * 3000), "window of 4096"),
    (ROW.replace("1+1", "\\ud800"), "surrogates"),
]


@pytest.mark.parametrize("content, message", BAD_DATA, ids=[message for _, message in BAD_DATA])
def test_bad_data_is_one_clear_line(chat, tmp_path, content, message):
    """Fails if a malformed file gives a traceback, or a message without file, place and field."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(sd.UserError) as error:
        sd.load_problems(config(data=str(path), test_problems=5), chat)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


NUMBER_ROWS = [{"problem": f"{i}+1", "solution": "s", "answer": i + 1} for i in range(8)]
GSM8K_ROW = {"question": "9+1", "answer": "9+1 #### 10"}
LINES = "\r\n".join(json.dumps(row) for row in [*NUMBER_ROWS, GSM8K_ROW])


@pytest.mark.parametrize(
    "text", ["\ufeff" + LINES, json.dumps([*NUMBER_ROWS, GSM8K_ROW]), LINES + "\r\n{}\r\n"]
)
def test_good_data_is_read_in_every_form(chat, tmp_path, text):
    """Fails on a byte-order mark, Windows line ends, an array, a number as answer, GSM8K's fields,
    or a bad row that is skipped."""
    path = tmp_path / "d.json"
    path.write_bytes(text.encode())
    held_out = dict(test_problems=2, validation_problems=2)
    split = sd.load_problems(config(data=str(path), skip_bad_rows=True, **held_out), chat)
    assert len(split.train) == 5
    assert split.dropped["bad"] == text.count("{}")
    assert "10" in [p.answer for p in split.train + split.validation + split.test]


def test_the_split_is_disjoint_and_depends_on_neither_order_nor_seed(chat, tmp_path):
    """Fails if a test problem can be trained on after the file is shuffled or the seed changed."""
    rows = []
    for i in range(40):
        rows.append(json.dumps({"problem": f"{i}+{i}", "solution": "s", "answer": "1"}))
    path, splits = tmp_path / "d.jsonl", []
    for seed, lines in enumerate((rows, rows[::-1] + rows[:7])):
        path.write_text("\n".join(lines))
        cfg = config(data=str(path), test_problems=10, validation_problems=5, seed=seed)
        splits.append(sd.load_problems(cfg, chat))
    assert splits[0][:3] == splits[1][:3]
    assert splits[1].dropped["duplicate"] == 7
    questions = [p.question for part in splits[0][:3] for p in part]
    assert len(set(questions)) == len(questions) == 40


def test_every_epoch_visits_every_problem_once():
    """Fails if a new epoch, or a resumed run, repeats or skips a problem."""
    problems = [sd.Problem(str(i), "", "") for i in range(10)]
    cfg, seen = config(condition="reference", attempts_per_step=4), []
    for step in range(5):
        seen += sd.next_problems(problems, 4 * step, cfg)
    names = [problem.question for _, problem in seen]
    assert sorted(names[:10]) == sorted(names[10:]) == sorted(set(names))
    assert names[:10] != names[10:]
    assert sd.next_problems(problems, 0, replace(cfg, attempts_per_step=20)) == seen


# ---- The critic behind a URL. --------------------------------------------------------------------

GOOD_REPLY = {
    "choices": [{"message": {"content": TRACE}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 7},
}
REPLIES = {
    "garbage": "<html>",
    "null": '{"choices": [{"message": {"content": null}}]}',
    "list": '{"choices": [{"message": {"content": []}}]}',
    "uncounted": '{"choices": [{"message": {"content": "ok"}}], "usage": null}',
    "cut": '{"choices": [{"message": {"content": "s7"}, "finish_reason": "length"}]}',
}


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose model name says how it misbehaves."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        calls, how = self.server.calls, body["model"]
        calls.append((self.path, body, self.headers.get("Authorization")))
        if how == "silent":
            time.sleep(1.0)
            return
        text = REPLIES.get(how, json.dumps(GOOD_REPLY))
        self.send_response(int(how) if how.isdigit() else 200)
        self.send_header("Content-Length", str(len(text)))
        if how == "302":
            self.send_header("Location", self.server.url.replace("127.0.0.1", "localhost"))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.server.calls.append((self.path, None, self.headers.get("Authorization")))
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


def http_critic(urls: list[str], model: str) -> sd.HTTPCritic:
    timeout = 0.1 if model == "silent" else 10.0
    return sd.HTTPCritic(urls, model, 9, parallel=2, timeout=timeout, tries=3, pause=0.01)


# how the server behaves → requests, and whether there is a text in the end
BEHAVIOURS = {
    "good": (1, True),
    "uncounted": (1, True),
    "cut": (1, False),
    "null": (1, False),
    "400": (3, False),
    "429": (3, False),
    "500": (3, False),
    "garbage": (3, False),
    "list": (3, False),
    "silent": (3, False),
}


@pytest.mark.parametrize("how", BEHAVIOURS)
def test_the_http_critic_tries_again_what_may_pass(server, how):
    """Fails if a failed request is not sent again, or a reply raises into the training loop."""
    (reply,) = http_critic([server.url + "/"], how)(asking("correct this"))
    assert (len(server.calls), reply.text is not None) == BEHAVIOURS[how]
    path, body, _ = server.calls[0]
    assert path == "/v1/chat/completions"
    assert body["max_tokens"] == 9 and body["messages"][0]["content"] == "correct this"


def test_a_dead_server_loses_nothing(server):
    """Fails if its requests are lost, or go to no other server."""
    critic = http_critic(["http://127.0.0.1:9/v1", server.url], "good")
    replies = critic(asking(*"123456"))
    assert replies == [sd.Reply(TRACE, 7)] * 6
    assert len(server.calls) == 6


def test_the_api_key_is_sent_and_kept_nowhere(server, monkeypatch, folder, tmp_path, capfd):
    """Fails if the key enters the config, the log or a message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    flags = ["--critic", server.url, "--critic-model", "400", "--steps", "1"]
    assert run_in(tmp_path, folder, *flags) == 0
    assert server.calls[0][2] == "Bearer sk-secret"
    written = "".join(capfd.readouterr())
    for path in tmp_path.rglob("*.*"):
        written += path.read_text(errors="ignore")
    assert "sk-secret" not in written


def test_the_api_key_follows_no_redirection(server, monkeypatch):
    """Fails if a server can pass the key on to another address."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    sd.HTTPCritic([server.url], "302", 9, tries=1)(asking("x"))
    assert [key for _, _, key in server.calls] == ["Bearer sk-secret", None]


# ---- Run folder: log, checkpoint, resume. --------------------------------------------------------


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return flags


def run_in(tmp_path, folder, *flags) -> int:
    """A short run of sd.py on the tiny model, in tmp_path/run."""
    common = dict(preset="toy", model=folder, data=folder / "problems.jsonl", out=tmp_path / "run")
    common |= dict(test_problems=5, validation_problems=4, final_problems=2, eval_samples=2)
    common |= dict(lora_rank=4, lora_alpha=8, attempts_per_step=4, group_size=2, max_new_tokens=12)
    return sd.main([*as_flags(common), *flags])


def log_of(run: Path) -> list[dict]:
    """Without what differs from run to run."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("cost", None)
        entry.pop("config", None)
    return entries


def steps_of(run: Path) -> list[dict]:
    return [entry for entry in log_of(run) if "loss" in entry]


def checkpoint_of(run: Path, name="checkpoint.pt") -> dict:
    return sd.load_checkpoint(run / name)


def assert_same_run(a: Path, b: Path):
    """Bit for bit."""
    assert log_of(a) == log_of(b)
    assert_same(checkpoint_of(a)["adapters"], checkpoint_of(b)["adapters"], atol=0, rtol=0)


def error_of(capture) -> str:
    """What was printed on stderr, which must be one line."""
    text = capture.readouterr().err
    lines = [line for line in text.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith(("sd.py: ", "eval.py: "))
    return text


@pytest.mark.parametrize("condition", ["reference", "grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, folder, condition):
    """Bit for bit. Fails if optimiser, random numbers, best score or the position in the data are
    not restored, or steps that were logged after the checkpoint stay in the log."""
    flags = ["--condition", condition, "--save-every", "2", "--eval-every", "3"]
    assert run_in(tmp_path / "a", folder, *flags, "--steps", "7") == 0
    assert run_in(tmp_path / "b", folder, *flags, "--steps", "4") == 0
    with open(tmp_path / "b/run/log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "co')  # killed in the middle of a line
    assert run_in(tmp_path / "b", folder, *flags, "--steps", "7", "--resume") == 0
    assert_same_run(tmp_path / "a/run", tmp_path / "b/run")
    assert [entry["step"] for entry in steps_of(tmp_path / "a/run")] == [1, 2, 3, 4, 5, 6, 7]


def test_kill_9_at_random_moments_loses_nothing(tmp_path, folder):
    """A checkpoint a step. Fails if a run that is killed cannot go on, or to other numbers. The
    processes are forked from one that has imported everything, for speed."""
    flags = ["--condition", "reference", "--save-every", "1", "--show-every", "0"]
    log, rng = tmp_path / "run/log.jsonl", random.Random(0)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3"])
    for _ in range(3):
        size = log.stat().st_size if log.exists() else 0
        resume = ["--resume"] if (tmp_path / "run/checkpoint.pt").exists() else []
        arguments = (tmp_path, folder, *flags, "--steps", "9999", *resume)
        child = forks.Process(target=run_in, args=arguments)
        child.start()
        while not log.exists() or log.stat().st_size <= size + 500:  # until it takes steps
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        child.kill()
        child.join()
    steps = str(checkpoint_of(tmp_path / "run")["state"]["step"] + 1)
    assert run_in(tmp_path, folder, *flags, "--resume", "--steps", steps) == 0
    assert run_in(tmp_path / "whole", folder, *flags, "--steps", steps) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole/run")


def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path, folder, monkeypatch):
    """Fails if an interrupt loses the step in flight, or leaves the checkpoint behind the log."""
    real = sd.take_step

    def interrupted(run):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run)

    monkeypatch.setattr(sd, "take_step", interrupted)
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "9") == 130
    assert checkpoint_of(tmp_path / "run")["state"]["step"] == len(steps_of(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    "error, advice", [(torch.OutOfMemoryError, "--micro-batch"), (FloatingPointError, "--lr")]
)
def test_a_run_can_be_resumed_before_its_first_step(
    tmp_path, folder, monkeypatch, capfd, error, advice
):
    """Fails if an error gives a traceback, or --resume, which it advises, finds no checkpoint."""

    def failing(run):
        raise error

    flags = ["--condition", "grpo", "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(sd, "take_step", failing)
        assert run_in(tmp_path, folder, *flags) == 1
    assert advice in error_of(capfd)
    assert run_in(tmp_path, folder, *flags, "--resume") == 0


def test_a_changed_flag_is_reported_on_resume(tmp_path, folder, capfd):
    """Fails if a run goes on with another number without a word, or with the old one."""
    flags = ["--condition", "reference", "--steps"]
    assert run_in(tmp_path, folder, *flags, "1") == 0
    before = checkpoint_of(tmp_path / "run")["adapters"]
    assert run_in(tmp_path, folder, *flags, "2", "--resume", "--lr", "0") == 0
    assert "resumed with lr 0.0" in capfd.readouterr().out
    after = checkpoint_of(tmp_path / "run")
    assert after["config"].lr == 0 and after["state"]["step"] == 2
    assert_same(before, after["adapters"], atol=0, rtol=0)


def test_another_preset_on_resume_is_one_line(tmp_path, folder, capfd):
    """Fails if a preset is named that is not in force, or the run's own is refused."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "0") == 0
    assert run_in(tmp_path, folder, "--resume") == 0
    assert run_in(tmp_path, folder, "--resume", "--preset", "qwen") == 2
    assert "--preset" in error_of(capfd)


def test_three_steps_without_a_critique_stop_the_run(tmp_path, folder, capfd):
    """The tiny model writes no critique. Fails if such a run goes on, silently, without training,
    be it after --resume."""
    flags = ["--condition", "critique", "--steps", "9"]
    assert run_in(tmp_path, folder, *flags) == 2
    printed = capfd.readouterr()
    assert "no valid context" in printed.err and "WARNING" in printed.out
    assert checkpoint_of(tmp_path / "run")["state"]["step"] == 3
    assert run_in(tmp_path, folder, *flags, "--resume") == 2


def test_best_pt_keeps_the_best_step(tmp_path, folder, monkeypatch):
    """Fails if a later, worse step replaces it, or the best score is forgotten on --resume."""
    scores = iter([(0.2, 0), (0.5, 0), (0.4, 0), (0.4, 0)])
    monkeypatch.setattr(sd, "accuracy", lambda groups: next(scores))
    flags = ["--condition", "grpo", "--eval-every", "1", "--final-problems", "0"]
    assert run_in(tmp_path, folder, *flags, "--steps", "3") == 0
    assert run_in(tmp_path, folder, *flags, "--steps", "4", "--resume") == 0
    assert checkpoint_of(tmp_path / "run", "best.pt")["state"]["step"] == 2


def test_a_second_run_moves_the_first_aside(tmp_path, folder):
    """Fails if starting again overwrites a finished run."""
    for _ in range(2):
        assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert (tmp_path / "run.1/checkpoint.pt").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, folder, capfd):
    """Fails if --out moves aside, or fills, somebody's other folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 2
    assert "not a run folder" in error_of(capfd)
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_last_checkpoint(
    tmp_path, folder, monkeypatch, capfd, number
):
    """Half of the file is written. Fails if the old checkpoint is touched, or a traceback shows."""
    flags = ["--condition", "grpo", "--save-every", "1"]
    assert run_in(tmp_path, folder, *flags, "--steps", "2") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    def failing(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        assert run_in(tmp_path, folder, *flags, "--steps", "3", "--resume") == 1
    assert os.strerror(number) in error_of(capfd)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert run_in(tmp_path, folder, *flags, "--steps", "3", "--resume") == 0


BROKEN = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "runs code": lambda content: b"cos\nsystem\n(S'touch owned'\ntR.",
    "of another version": lambda content: content.replace(b"temperature", b"temporature"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_line(tmp_path, folder, capfd, monkeypatch, what):
    """Fails on a traceback, or if code in the file is run."""
    monkeypatch.chdir(tmp_path)
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(BROKEN[what](path.read_bytes()))
    capfd.readouterr()
    assert run_in(tmp_path, folder, "--resume") == 2
    assert "cannot read" in error_of(capfd)
    assert not (tmp_path / "owned").exists()


def tamper(path: Path, **changes) -> None:
    """Change the config in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"] |= changes
    torch.save(checkpoint, path)


def test_a_checkpoints_config_is_checked_like_a_command_line(tmp_path, folder):
    """Fails if a run goes on with what a file says, however wrong."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    tamper(tmp_path / "run/checkpoint.pt", kl="../secret")
    with pytest.raises(sd.UserError, match="--kl"):
        checkpoint_of(tmp_path / "run")


def test_a_checkpoint_cannot_send_the_key_to_its_own_address(tmp_path, folder, server, capfd):
    """Fails if --resume asks the http critic that a file names."""
    assert run_in(tmp_path, folder, "--condition", "reference", "--steps", "1") == 0
    changes = dict(condition="critique", critic=server.url, critic_model="good")
    tamper(tmp_path / "run/checkpoint.pt", **changes)
    capfd.readouterr()
    assert sd.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert "--critic" in error_of(capfd)
    assert not server.calls


def test_the_log_says_what_was_run_and_how_far_the_policy_moved(tmp_path, folder, monkeypatch):
    """Fails if the log does not name code and grader, or kl_base is not between policy and base."""
    if (HERE / ".git").exists():
        assert re.search(r"[0-9a-f]{7}\+?$", sd.code_commit())
    monkeypatch.setattr(sd, "code_commit", lambda: "1234567+")
    flags = ["--condition", "reference", "--steps", "1", "--eval-every", "1"]
    for rate, name in (("0", "still"), ("0.01", "moved")):
        assert run_in(tmp_path / name, folder, *flags, "--lr", rate) == 0
    header, _, still = map(json.loads, open(tmp_path / "still/run/log.jsonl"))
    moved = log_of(tmp_path / "moved/run")[-1]
    assert header["config"]["grader"] == "exact"
    assert header["versions"]["torch"] == torch.__version__
    assert header["commit"] == "1234567+"
    assert still["kl_base"] == 0 < moved["kl_base"]


def test_kl_to_the_base_equals_the_naive_one(chat):
    """Fails if it is a mean of means, is taken the other way round, or leaves the adapter off."""
    cfg = config(micro_batch=4)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    found, losses = sd.kl_to_base(chat, rollouts, cfg), []
    for r in rollouts:
        row = (chat, r.prompt, r.sample.ids, cfg.temperature)
        log_p = row_log_probs(*row)
        with torch.no_grad(), sd.adapters_off(chat.model):
            log_q = row_log_probs(*row)
        losses.append(sd.kl_student_teacher_naive(log_p, log_q, None, None))
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


# steps that are left, seconds of the steps so far, and what is printed
TIMES = [
    (60, [100], "1 h 40"),
    (36, [100], "1 h 00"),
    (12, [60], "12 min"),
    (30, [1], "30 s"),
    (30, [1, 1, 500], "30 s"),
    (30, [500] * 50 + [1] * 20, "30 s"),
    (0, [100], "0 s"),
]


@pytest.mark.parametrize("left, seconds, text", TIMES)
def test_the_time_left_follows_the_median_step(left, seconds, text):
    """Fails if one slow step, or a slow beginning, counts for all that follow."""
    run = sd.Run(config(steps=left + 5), None, None, None, None, step=5, seconds=seconds)
    assert sd.time_left(run) == text


def test_export_is_a_plain_folder_with_the_merged_logits(tmp_path, folder):
    """Fails if the adapters are not merged, are merged twice, or the template is lost."""
    flags = ["--condition", "reference", "--steps", "2", "--lr", "0.05"]
    assert run_in(tmp_path, folder, *flags) == 0
    base, plain = (sd.load_model(str(folder)), sd.load_model(str(tmp_path / "run/model")))
    checkpoint, ids = checkpoint_of(tmp_path / "run"), torch.arange(15)[None]
    before = base.model(input_ids=ids).logits
    sd.add_adapters(base.model, checkpoint["config"])
    sd.load_adapters(base, checkpoint)
    trained = base.model(input_ids=ids).logits
    exported = plain.model(input_ids=ids).logits
    torch.testing.assert_close(exported, trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert plain.tokenizer.chat_template == base.tokenizer.chat_template


# ---- Processes. ----------------------------------------------------------------------------------


def run_all_conditions(tmp_path, folder):
    """Each in a folder of its name."""
    sd.load_critic = lambda *_: ScriptedCritic()
    for name in sd.CONDITIONS:
        flags = ["--condition", name, "--steps", "2", "--eval-every", "2", "--show-every", "0"]
        assert run_in(tmp_path / name, folder, *flags) == 0


RUN_ALL = """
import pathlib, sys
here, tmp_path, folder = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(here))
import test_sd
test_sd.run_all_conditions(tmp_path, folder)
"""


def test_two_processes_take_the_same_steps_as_one(tmp_path, folder, monkeypatch):
    """torchrun on gloo. Fails if a process draws other random numbers, divides by its own number of
    tokens, sees other rewards in its groups, or its gradient is left out."""
    one, two, program = tmp_path / "one", tmp_path / "two", tmp_path / "program.py"
    program.write_text(RUN_ALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", program, HERE, two, folder]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step    2/2") == len(sd.CONDITIONS)
    monkeypatch.setattr(sd, "load_critic", None)  # restored afterwards
    run_all_conditions(one, folder)
    for name in sd.CONDITIONS:
        a, b = one / name / "run", two / name / "run"
        for entry, other in zip(log_of(a)[1:], log_of(b)[1:], strict=True):
            assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)
        of_one, of_two = checkpoint_of(a)["adapters"], checkpoint_of(b)["adapters"]
        assert_same(of_one, of_two, atol=1e-4, rtol=1e-4)


# ---- Command line and README. --------------------------------------------------------------------

WRONG_VALUES = [
    ("--temperature nan", "--temperature"),
    ("--kl backward", "--kl"),
    ("--steps -1", "--steps"),
    ("--data /nowhere.jsonl", "/nowhere.jsonl"),
    ("--condition grpo --attempts-per-step 9", "--group-size"),
    ("--nonsense", "--nonsense"),
    ("--critic http://x/v1", "--critic-model"),
    ("--resume --out /nowhere", "/nowhere"),
    ("--eval-every 1 --validation-problems 0", "--validation-problems"),
    ("--device cud", "--device"),
    ("--prompts steps", "another --model, --prompts"),
    ("--critic-max-new-tokens 9999", "the critic's window"),
    ("--stop-at-first-edit --critic-style quote", "--critic-style"),
]


@pytest.mark.parametrize("flags, words", WRONG_VALUES)
def test_a_wrong_value_is_one_line_and_exit_2(flags, words, capfd, tmp_path):
    """Fails if a mistake ends in a traceback, a usage text, or a run with another value."""
    out = tmp_path / "run"
    assert sd.main(["--preset", "toy", "--out", str(out), *flags.split()]) == 2
    assert words in error_of(capfd)
    assert not out.exists()


@pytest.mark.parametrize("name", sd.CONDITIONS)
def test_the_first_edit_needs_a_critic(name, capfd):
    """Fails if --stop-at-first-edit is accepted where no context corrects the attempt."""
    flags = ["--condition", name, "--stop-at-first-edit"]
    if sd.CONDITIONS[name].asks_critic:
        assert sd.parse_config(flags).stop_at_first_edit
    else:
        with pytest.raises(sd.UserError, match=name):
            sd.parse_config(flags)


def test_math_verify_without_its_package_is_one_line(capfd, monkeypatch):
    """Fails if the missing package is found out at the first attempt."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sd.main(["--preset", "toy", "--grader", "math-verify"]) == 2
    assert "pip install math-verify" in error_of(capfd)


def test_help_names_every_knob_and_every_row_of_a_table(capsys):
    """Fails if a knob, condition, divergence, format or preset cannot be found by --help."""
    with pytest.raises(SystemExit):
        sd.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in sd.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    tables = (sd.CONDITIONS, sd.DIVERGENCES, sd.PRESETS, critic_prompts.FORMATS)
    for name in itertools.chain(*tables, critic_prompts.STYLES):
        assert name in text


def test_control_characters_reach_no_terminal(chat, capsys):
    """Fails if an attempt or a critique can move the reader's cursor."""
    cfg = config()
    (rollout,) = rollouts_of(adapt(chat, cfg), cfg, 1)
    rollout.text = rollout.context = "a\x1b[2Jb\u202e"
    rollout.problem = rollout.problem._replace(question="q\r\x1b]0;title\x07")
    sd.print_example(chat, rollout, cfg)
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed) and "problem" in printed


README = (HERE / "README.md").read_text("utf-8")


def test_the_readmes_step_by_hand_runs(capsys):
    """Fails if the block on the README's page no longer fits the code."""
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': ([\d.e-]+)", printed)]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert re.search(r"critique [sth]\d", printed)


OTHER_FLAGS = {"--nproc-per-node", "--shutdown-timeout"}  # torchrun's


def test_the_readme_names_only_flags_that_exist(capsys):
    """Fails if a flag of the README was renamed in the code."""
    for main in (sd.main, evaluation.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) > 10
    assert named <= known | OTHER_FLAGS


def test_the_readme_names_only_functions_that_exist():
    """Fails if a function in the README's table of equations was renamed in the code."""
    cells = re.findall(r"^\| \(\d\).*\| (.*) \|$", README, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", " ".join(cells)):
        assert hasattr(sd, name)
    assert cells


# ---- eval.py. ------------------------------------------------------------------------------------


def answered(text: str, reward: float) -> sd.Rollout:
    return sd.Rollout(sd.Problem("", "", ""), [], sd.Sample([0], False, 0.0), text, reward)


def test_scores_equal_numbers_worked_by_hand():
    """Fails if a problem's attempts are counted one by one, or Pass is not "at least once"."""
    right, wrong = answered("<answer>1</answer>", 1.0), answered("no idea", 0.0)
    seen = evaluation.scores([[right, wrong, wrong, wrong], [wrong] * 4])
    assert seen["Avg"].tolist() == [0.25, 0] and seen["Pass"].tolist() == [1, 0]
    assert seen["unparsable"].tolist() == [0.75, 1] and seen["length"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "answers, share",
    [
        ("1 2 1.0", 1.0),
        ("1 2", 0.5),
        ("2 2 1", 0.0),
        ("2 4/2 1", 0.0),
        ("none none 1", 1.0),
        ("none", 0.0),
    ],
)
def test_maj_at_k_equals_numbers_worked_by_hand(answers, share):
    """The right answer is 1. Fails if a tie goes to the first, no answer has a vote, or right
    answers that are written in two ways are two votes."""
    group = []
    for answer in answers.split():
        text = "no idea" if answer == "none" else f"<answer>{answer}</answer>"
        group.append(answered(text, float(answer in ("1", "1.0"))))
    assert evaluation.maj_at_k(group) == share


def test_the_bootstrap_interval_covers_and_repeats():
    """Fails if it is unseeded, or too narrow."""
    values = np.random.default_rng(1).random(200)
    mean, low, high = evaluation.estimate(values)
    assert (mean, low, high) == evaluation.estimate(values)
    error = values.std() / math.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < mean == values.mean() < high


def test_an_estimate_resamples_problems_and_not_attempts():
    """Fails if attempts at one problem count as independent, if a problem of which nothing counts
    pulls the ratio down, or if equal values get an interval."""
    hits = np.repeat([[0.0], [1.0]], 50, axis=1)  # (2 problems, 50 attempts)
    assert evaluation.bracketed(evaluation.estimate(hits), unit=" %") == "50.0 % [0.0, 100.0]"
    assert evaluation.bracketed(evaluation.estimate(hits[:1]), unit=" %") == "0.0 %"
    counts = hits.copy()
    counts[1, 10:] = 0
    assert evaluation.estimate(hits * counts, counts) == (1, 1, 1)
    assert evaluation.bracketed(evaluation.estimate(hits, 0 * hits)) == "-"


def test_the_gap_of_a_teacher_leaves_out_attempts_without_a_context(toy):
    """Fails if an attempt whose critique failed counts as one that gained nothing."""
    cfg = sd.parse_config(["--preset", "toy"])
    problems = sd.load_problems(cfg, toy).validation[:12]
    rollouts = sd.attempt(toy, list(enumerate(problems)), cfg, 2)
    contexts = [r.problem.solution if i % 3 else None for i, r in enumerate(rollouts)]
    accuracy, count, (gap, _, _) = evaluation.teacher_gap(toy, rollouts, contexts, 2, cfg)
    base = np.mean([r.reward for r, context in zip(rollouts, contexts) if context])
    assert count == 16
    assert gap == pytest.approx(accuracy - base)


def test_the_interval_over_seeds_equals_a_number_worked_by_hand():
    """1 and 3: mean 2, standard error 1, t 12.71. Fails if the deviation is divided by n."""
    assert evaluation.half_width(np.array([1.0, 3.0])) == pytest.approx(12.71)


def test_eval_compares_runs_with_their_base_and_repeats(tmp_path, folder, capsys):
    """Fails if base and run see other problems or random numbers: a run that was not trained must
    equal the base."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "0") == 0
    (tmp_path / "run").rename(tmp_path / "untrained")
    trained = ["--condition", "reference", "--steps", "2", "--lr", "0.1"]
    assert run_in(tmp_path, folder, *trained) == 0
    arguments, texts = ([str(tmp_path / "untrained"), str(tmp_path / "run"), "--samples", "3"], [])
    for _ in range(2):
        capsys.readouterr()
        assert evaluation.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    attempts = {"base": [], **{folder: [] for folder in arguments[:2]}}
    for line in (tmp_path / "eval.jsonl").read_text().splitlines():
        entry = json.loads(line)
        attempts[entry["run"]].append((entry["problem"], entry["text"]))
    assert attempts["base"] == attempts[arguments[0]] != attempts[arguments[1]]
    assert len(attempts["base"]) == 5 * 3


def test_a_run_cannot_take_the_place_of_the_base(tmp_path, folder, monkeypatch, capsys):
    """Fails if a run folder that is called base is evaluated under the name of the base."""
    assert run_in(tmp_path, folder, "--condition", "reference", "--steps", "1") == 0
    (tmp_path / "run").rename(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["base", "--samples", "1"]) == 2
    assert "write ./base" in error_of(capsys)
    assert evaluation.main(["./base", "--samples", "1"]) == 0
    assert "./base − base" in capsys.readouterr().out


def toy_rollout(toy, text: str, reward=0.0) -> sd.Rollout:
    ids = toy.tokenizer(text)["input_ids"] + [0]
    return replace(answered(text, reward), sample=sd.Sample(ids, False, 0.0))


@pytest.mark.parametrize(
    "critique, place",
    [
        ("s7+6=3s3*3=9s9+1=0####0", (6, 12, 11)),
        ("s7+6=3t3*3=9s9+1=0####0", (6, 12, 6)),
        ("s7+6=4s", (0, 6, 5)),
        ("s7+6=3s3*3=6s6+1=7####8", (18, 21, 19)),
        ("", (0, 6, 0)),
    ],
)
def test_the_first_wrong_step_is_the_one_in_which_the_critique_departs(toy, critique, place):
    """Fails if a step's bounds are off by a token, or an edit in the answer counts for a step."""
    rollout = toy_rollout(toy, "s7+6=3s3*3=6s6+1=7####7")
    assert evaluation.wrong_step(toy, rollout, critique, critic_prompts.FORMATS["toy"]) == place


def test_an_attempt_without_a_word_is_wrong_from_its_first_token(toy):
    """Fails if the token study stops at it."""
    place = evaluation.wrong_step(toy, toy_rollout(toy, ""), TRACE, critic_prompts.FORMATS["toy"])
    assert place == (0, 1, 0)


def numbers_in(cell: str) -> list[float]:
    """Value, low and high end of the interval."""
    return [float(number) for number in re.findall(r"-?\d+\.\d+", cell)]


def test_localisation_equals_numbers_worked_by_hand(toy):
    """Fails if positive A counts as negative, right and wrong attempts mix, or shares are means of
    shares."""
    wrong, right = toy_rollout(toy, TRACE), toy_rollout(toy, TRACE, reward=1.0)
    found = {0: [-1.0, 5.0, -3.0, -4.0], 1: [0.5, -0.5, 0.0, -1.0], 2: [-8.0, 0.0, 0.0]}
    found = {i: np.array(a) for i, a in found.items()}
    places = {0: (1, 3, 2), 2: (0, 1, 0)}
    cells = evaluation.localise([wrong, right, wrong, wrong], 2, found, places)
    values = [numbers_in(cell)[0] for cell in cells]
    assert values == pytest.approx([6.25, 68.75, 25.0, 0.5, 50.0, -1.0], abs=0.06)


def test_the_page_shows_what_a_model_wrote_as_text():
    """Fails if a response can run a script in the reader's browser."""
    evil = "<script>alert('x')</script>"
    row = {"advantage": [-1.0, 2.0], "context": evil, "teacher": [evil, evil]}
    example = {"problem": evil, "answer": evil, "right": False, "tokens": [evil, "b"], "edit": 0}
    text = evaluation.page([{**example, "rows": {evil: row}}], evil)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "lowered edit" in text


def test_the_token_study_measures_every_context(tmp_path, capsys):
    """Fails if a condition with a context of its own is left out, the study does not repeat, or
    critique and reference do not differ where the paper says that they do."""
    run = str(tmp_path / "run")
    toy_flags = ["--preset", "toy", "--steps", "0", "--final-problems", "0", "--out", run]
    assert sd.main(toy_flags) == 0
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert evaluation.main(["--tokens", run, "--problems", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    numbers = json.loads((tmp_path / "run/tokens.json").read_text())["numbers"]
    before = "wrong: negative A before the first wrong step"
    _, _, high = numbers_in(numbers["critique (copy)"][before])
    _, low, _ = numbers_in(numbers["reference"][before])
    assert high < low
    for style in critic_prompts.STYLES:
        assert f"critique ({style})" in numbers
    for name, condition in sd.CONDITIONS.items():
        assert name in numbers or condition.write in (sd.group_advantages, sd.write_critiques)


def test_the_token_study_sends_no_key_to_an_address_in_a_file(tmp_path, folder, server, capfd):
    """Fails if --tokens asks the http critic that a checkpoint names."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    tamper(tmp_path / "run/checkpoint.pt", critic=server.url, critic_model="good")
    capfd.readouterr()
    assert evaluation.main(["--tokens", str(tmp_path / "run")]) == 2
    assert "--critic" in error_of(capfd)
    assert not server.calls


def test_reproduce_trains_every_arm_and_goes_on_where_it_stopped(
    tmp_path, folder, monkeypatch, capsys
):
    """Fails if an arm cannot be trained, a finished run is trained again, or the table depends on
    when it was made."""
    monkeypatch.setattr(sd, "load_critic", lambda *_: ScriptedCritic())
    monkeypatch.setattr(evaluation, "SWEEP", (1.0,))
    train, take_step = sd.train, sd.take_step
    table, passed = (tmp_path / "r/table.md", dict(model=folder, data=folder / "problems.jsonl"))
    passed |= dict(preset="toy", steps=2, test_problems=5, validation_problems=4, eval_samples=2)
    passed |= dict(lora_rank=4, attempts_per_step=4, group_size=2, max_new_tokens=12, save_every=1)
    own = ["--reproduce", "--seeds", "2", "--out", str(tmp_path / "r"), "--"]

    def killed(run):
        if (run.cfg.condition, run.cfg.seed, run.step) == ("reference", 1, 1):
            raise RuntimeError("killed")
        return take_step(run)

    monkeypatch.setattr(sd, "take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        evaluation.main(own + as_flags(passed))
    monkeypatch.setattr(sd, "take_step", take_step)
    trained = []
    monkeypatch.setattr(sd, "train", lambda cfg: trained.append(cfg) or train(cfg))
    assert evaluation.main(own + as_flags(passed)) == 0
    unfinished = trained[0]
    assert (unfinished.condition, unfinished.seed, unfinished.resume) == ("reference", 1, True)
    assert not any(cfg.resume or cfg.condition == "grpo" for cfg in trained[1:])
    first = table.read_text()
    for arm in evaluation.ARMS:
        assert f"| {arm} |" in first
    monkeypatch.setattr(sd, "train", lambda cfg: pytest.fail("trained again"))
    for kept in (tmp_path / "r").rglob("test-*.json"):
        kept.unlink()
    assert evaluation.main(own + as_flags(passed)) == 0
    assert table.read_text() == first
    capsys.readouterr()
    assert evaluation.main(own + as_flags(passed | {"temperature": 0.5})) == 2
    assert "another temperature" in error_of(capsys)


def test_filter_keeps_what_is_seldom_solved_and_resumes(tmp_path, folder, monkeypatch, capsys):
    """Fails if never-solved or often-solved problems are kept, a row is changed, a second call
    samples again, or the pool itself can be overwritten."""
    rows = [{"problem": f"{i}+1", "solution": "s", "answer": "1", "extra": i} for i in range(5)]
    solved, asked = [0, 1, 1, 2, 4], []

    def attempt(chat, problems, cfg, samples, seed):
        rollouts = []
        for number, problem in problems:
            assert problem.question == f"{number}+1"
            asked.append(number)
            rollouts += [answered("", float(k < solved[number])) for k in range(samples)]
        return rollouts

    monkeypatch.setattr(sd, "attempt", attempt)
    pool, out = tmp_path / "pool.jsonl", tmp_path / "hard.jsonl"
    pool.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    own = ["--filter", str(pool), "--out", str(out), "--samples", "4"]
    for _ in range(2):
        assert evaluation.main([*own, "--", "--preset", "toy", "--model", str(folder)]) == 0
        assert [json.loads(line) for line in out.read_text().splitlines()] == rows[1:3]
        assert "1 never solved, 2 solved 0.3125" in capsys.readouterr().out
    assert asked == [0, 1, 2, 3, 4]
    # a line that was cut off, a corrected answer and other settings do not count
    scores = Path(f"{out}.scores.jsonl")
    scores.write_text(scores.read_text().rstrip()[:-30])
    pool.write_text("\n".join(map(json.dumps, [rows[0] | {"answer": "2"}, *rows[1:]])))
    for temperature, again in (("1.0", [0, 4]), ("1.0", []), ("0.5", [0, 1, 2, 3, 4])):
        asked.clear()
        passed = ["--preset", "toy", "--model", str(folder), "--temperature", temperature]
        assert evaluation.main([*own, "--", *passed]) == 0
        assert asked == again
    # the pool is not overwritten with a part of itself
    assert evaluation.main(["--filter", str(pool), "--out", f"{tmp_path}/./pool.jsonl"]) == 2


PREFLIGHT = ["--preflight", "--preset", "toy", "--problems", "16"]


def test_preflight_tells_a_critique_from_another_problems(capsys):
    """Fails if the control, a critique of another problem, reads its own, or a row is missing."""
    assert evaluation.main(PREFLIGHT) == 0
    text = capsys.readouterr().out
    gaps = {}
    for name, gap in re.findall(r"teacher that reads (.*): right \| .*gap ([+-][\d.]+)", text):
        gaps[name] = float(gap)
    control = gaps.pop("another problem's critique")
    for row in ("base: right", "cut at the cap", "critic: failed", "a step of critique"):
        assert row in text
    assert len(gaps) == 2 and control < 10 and min(gaps.values()) > 40
    assert "\ncritique: can work" in text
    assert "\nreference: can work" in text
    assert "\ngrpo: " in text


def test_preflight_judges_the_condition_that_it_is_given(monkeypatch, capsys):
    """Fails if another writer of contexts is judged, or a critic is loaded that nobody asks."""
    silent = sd.Condition(lambda rollouts, critic, cfg: [None] * len(rollouts), False)
    monkeypatch.setitem(sd.CONDITIONS, "silent", silent)
    assert evaluation.main([*PREFLIGHT, "--condition", "silent", "--critic", "/nowhere"]) == 0
    printed = capsys.readouterr().out
    assert "the critic fails on 32 of 32 attempts" in printed
    assert "| teacher that reads its critique: right | - | 0 |" in printed


# prompts, and an attempt with words before or behind its trace
WITH_WORDS = [
    ("steps", "I add them.\n<step_1>2 + 3 = 5</step_1>\n<answer>5</answer>"),
    ("plain", "2 + 3 = 5.\n\nSo it is \\boxed{5}.\n\nI hope this helps!"),
]


@pytest.mark.parametrize("prompts, text", WITH_WORDS)
def test_a_critique_is_a_copy_whatever_words_stand_around_the_trace(prompts, text):
    """Fails if a critic that copies all is said not to, as a critique has no words around it."""
    trace = critic_prompts.FORMATS[prompts].extract_trace(text)
    assert trace not in (None, text)
    for critique, whole in ((trace, 1), (trace.replace("5", "6"), 0), (None, 0)):
        judged = evaluation.judge([answered(text, 1.0)], [critique], 1, config(prompts=prompts))
        assert judged.whole.item() == whole


def copying_critic(conversations: list[list[dict]]) -> list[sd.Reply]:
    """Gives back the attempt, which stands between the bars of the toy's request."""
    attempts = [messages[0]["content"].split("|")[1] for messages in conversations]
    return [sd.Reply(attempt, 5) for attempt in attempts]


# a critic, and the reason that is given against it
BAD_CRITICS = [
    (ScriptedCritic("garbage"), "the critic fails on 32 of 32 attempts"),
    (ScriptedCritic(TRACE), "the critic corrects"),
    (copying_critic, "wrong attempts unchanged"),
]


@pytest.mark.parametrize("condition", sd.CONDITIONS)
@pytest.mark.parametrize("critic, verdict", BAD_CRITICS)
def test_preflight_advises_against_a_bad_critic(monkeypatch, capsys, condition, critic, verdict):
    """Fails if a useless critic passes, another reason is given, or --critic is not sd.py's; or if
    with a condition that asks no critic the solutions are judged as critiques."""

    def load_critic(cfg, chat):
        assert cfg.critic == "bad"
        return critic

    monkeypatch.setattr(sd, "load_critic", load_critic)
    assert evaluation.main([*PREFLIGHT, "--critic", "bad", "--condition", condition]) == 0
    (line,) = re.findall(r"^critique: .*$", capsys.readouterr().out, re.MULTILINE)
    assert verdict in line and "use a stronger one" in line


@pytest.mark.parametrize("name", critic_prompts.FORMATS)
def test_preflight_advises_against_a_format_that_is_not_kept(folder, capsys, name):
    """The tiny model keeps to none. Fails if the critic is blamed for what the base cannot do, or
    sd.py's flags do not arrive in their order."""
    flags = as_flags(dict(model=folder, data=folder / "problems.jsonl", prompts=name))
    flags += as_flags(dict(max_new_tokens=12, test_problems=5, validation_problems=9))
    assert evaluation.main([*PREFLIGHT, *flags]) == 0
    printed = capsys.readouterr().out
    assert "keeps to the format in 0 of 18 attempts: try other --prompts" in printed


def test_plot_draws_runs_that_are_short_or_still_writing(tmp_path, folder):
    """Fails if a panel is missing, or a run of one step or half a line at the end stops it."""
    plt = pytest.importorskip("matplotlib.pyplot")
    runs = []
    for steps in (3, 1, 3):
        flags = ["--condition", "reference", "--steps", str(steps), "--eval-every", "1"]
        place = tmp_path / str(len(runs))
        assert run_in(place, folder, *flags) == 0
        runs.append(str(place / "run"))
    log = Path(runs[2], "log.jsonl")
    log.write_text(log.read_text()[:-20])  # the last line is a validation
    for name in ("runs.png", "new/runs.svg"):
        assert evaluation.main(["--plot", *runs, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    panels = plt.gcf().axes
    assert [p.get_title(loc="left") for p in panels] == [label for label, _, _ in evaluation.PANELS]
    for panel in panels:
        assert len(panel.lines) >= len(runs)
    # accuracy in every step of each run, and on the validation problems, where one line was cut
    drawn = sorted(line.get_xdata().tolist() for line in panels[0].lines)
    assert drawn == [[1], [1], [1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    legend = panels[1].get_legend().get_texts()
    assert [entry.get_text() for entry in legend] == runs
    plt.close("all")


def test_plot_draws_the_examples_of_a_token_study(tmp_path, capsys):
    """Fails if a token is missing, or a context that is not in the study gives an empty figure."""
    plt = pytest.importorskip("matplotlib.pyplot")
    study = HERE / "assets/real"
    command = ["--plot", "--tokens", str(study), "--out", str(tmp_path / "tokens.png")]
    assert evaluation.main([*command, "--contexts", "reference"]) == 0
    texts = [text.get_text() for text in plt.gcf().axes[0].texts]
    examples = json.loads((study / "tokens.json").read_text())["examples"]
    tokens = [token for e in examples for token in e["tokens"]]
    # for each example its problem and the context's name, and one legend
    assert len(texts) == len(tokens) + 2 * len(examples) + 1
    assert texts.count("reference") == len(examples) and "scripted" not in texts
    assert evaluation.main([*command, "--contexts", "reference,nobody"]) == 2
    assert "no 'nobody'" in error_of(capsys)
    plt.close("all")


def test_plot_draws_the_curves_of_the_reproduction(tmp_path):
    """Fails if accuracy is drawn against the wrong step, or against one step's tokens."""
    plt = pytest.importorskip("matplotlib.pyplot")
    runs = {}
    for arm in ("grpo", "reference", "other"):
        runs[arm] = [str(tmp_path / f"{arm}{seed}") for seed in range(2)]
        for run, folder in enumerate(runs[arm]):
            lines = [{"config": {}}]
            for step in (1, 2):
                lines.append({"step": step, "solver_tokens": 100, "critic_tokens": 20})
                lines.append({"step": step, "validation_avg": (step + run) / 4})
            Path(folder).mkdir()
            Path(folder, "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "table.json").write_text(json.dumps({"runs": runs}))
    evaluation.plot_curves(tmp_path, tmp_path / "curves.svg")
    by_step, by_tokens = plt.gcf().axes
    for axis, x in ((by_step, [1, 2]), (by_tokens, [120, 240])):
        assert [line.get_label() for line in axis.lines] == ["reference", "grpo"]
        for line in axis.lines:
            assert line.get_xdata().tolist() == x
            assert line.get_ydata().tolist() == [37.5, 62.5]
    plt.close("all")


# ---- A fork: assets/real/svamp.py. ---------------------------------------------------------------


@pytest.fixture
def svamp(monkeypatch):
    """The program, whose two rows leave the table when the test is over."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = dict(sd.CONDITIONS)
    spec = importlib.util.spec_from_file_location("svamp", HERE / "assets/real/svamp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in sd.CONDITIONS.keys() - rows:
        del sd.CONDITIONS[name]


SHOP = sd.Problem("What does Tom pay?", "3 * 2 = 6\n6 + 5 = 11", "11.0")
SCRIPTED = [
    ("plain", "Pens: 2 × 3 = $6.\n\nAll: ", "6 * 5 = 30.\n\n\\boxed{30}"),
    ("plain", "Pens: 3 \\text{ pens} * 2 dollars = 6.\n\n", "6 + 5 = 12, so \\boxed{12}"),
    ("steps", "<step_1>3 * 2 = 6</step_1>\n<step_2>", "6 - 5 = 1</step_2>\n<answer>1</answer>"),
    ("plain", "First, ", "3 + 2 = 5, then 5 + 5 = 10: \\boxed{10}"),
    ("steps", "<step_1>3 * 2 = 6</step_1>\n", "6 - 5 = 1\n<answer>1</answer>"),
    # no equation: the number from nowhere, then the answer, in its whole sentence
    ("plain", "1. There are 3 pens.\n2. See step 9. ", "They cost 17 dollars: \\boxed{5}"),
    ("plain", "Pens cost 3 * 2 = 6. ", "That makes \\boxed{6}."),
    ("steps", "<step_1>3 * 2 = 6</step_1>\n", "<answer>6</answer>"),
    ("plain", "3 * 2 = 6. The bill:\n6.00 dollars and 5. ", "So 12 dollars: \\boxed{12}"),
    # a right equation may be stated again, and the end of a longer sum is no equation
    ("plain", "3 * 2 = 6. With these 3 * 2 = 6 ", "6 + 5 = 12 is right: \\boxed{12}"),
    ("plain", "3 * 2 = 6. ", "All in all 6 + 2 + 5 = 13: \\boxed{13}"),
    ("plain", "3 * 2 = 6. ", "All in all 6+2-5=3: \\boxed{4}"),
    ("plain", "3 * 2 = 6, so 3 \\times 2 + 5 = 11. Then ", "11 - 1 = 10: \\boxed{10}"),
    ("plain", "3 * 2 = 6. ", "All: $6 + $5 + $1 = $12: \\boxed{12}"),
]


@pytest.mark.parametrize("prompts, copied, wrong", SCRIPTED)
def test_the_scripted_critic_corrects_from_the_first_wrong_equation(svamp, prompts, copied, wrong):
    """Fails if a right equation is not copied, anything behind it is, or a step is not closed."""
    r = replace(answered(copied + wrong, 0.0), problem=SHOP)
    critique = svamp.correct(r, config(prompts=prompts))
    assert critique.startswith((copied + "3 * 2 = 6, 6 + 5 = 11", copied + "6 + 5 = 11"))
    assert critique.count("<step_1>") == critique.count("</step_1>")
    assert critic_prompts.FORMATS[prompts].extract_trace(critique) == critique
    assert sd.is_correct(critique, SHOP.answer, "exact")


def test_the_scripted_critic_leaves_alone_what_it_cannot_correct(svamp):
    """Fails if a right attempt is changed, if a finished one without an answer gets none, if one
    that was cut off before any error is called wrong, or if the copy holds a wrong answer, in words
    or boxed, or half of a block of code."""
    right = replace(answered("I see 5 * 5 = 9. \\boxed{11}", 1.0), problem=SHOP)
    assert svamp.correct(right, config()) == right.text
    unfinished = replace(answered("3 * 2 = 6, 6 + 5 = 11.", 0.0), problem=SHOP)
    critique = svamp.correct(unfinished, config(prompts="plain"))
    assert critique.startswith(unfinished.text) and critique.count("\\boxed{11}") == 1
    cut = replace(unfinished, sample=unfinished.sample._replace(truncated=True))
    assert svamp.correct(cut, config(prompts="plain")) is None
    for text in (
        "The total is 5.",
        "It is \\boxed{30}: 6 * 5 = 30.",
        "```python\nprint(6 * 5)\n```\n```output\n6 * 5 = 30",
    ):
        assert svamp.correct(replace(unfinished, text=text), config(prompts="plain")) is None


@pytest.mark.parametrize("opening, closing", [("\\[", "\\]"), ("\\(", "\\)")])
def test_the_scripted_critic_closes_the_formula_that_it_corrects(svamp, opening, closing):
    """Fails if the teacher reads, and so teaches, formulas that are left open."""
    text = f"{opening} 3 * 2 = 6 {closing} and {opening} 6 * 5 = 30 {closing}: \\boxed{{30}}"
    critique = svamp.correct(replace(answered(text, 0.0), problem=SHOP), config(prompts="plain"))
    assert critique.startswith(text[: text.index("6 * 5")] + f"6 + 5 = 11 {closing}.\n\n")
    assert critique.count(opening) == critique.count(closing) == 2


@pytest.mark.parametrize("samples", [1, 3])
def test_the_control_never_gets_its_own_critique(svamp, samples):
    """Fails if an attempt reads a critique of its own problem, be it of another attempt."""
    rollouts = []
    for number, name in enumerate("abcd"):
        problem = SHOP._replace(question=name)
        for _ in range(samples):
            r = replace(answered(f"{name}: nothing", float(number != 2)), problem=problem)
            # the third has no critique
            r.sample = r.sample._replace(truncated=number == 2)
            rollouts.append(r)
    critiques = svamp.write_shuffled(rollouts, None, config(prompts="plain"))
    assert len(critiques) == len(rollouts) and critiques.count(None) == samples
    for r, critique in zip(rollouts, critiques):
        assert critique is None or critique[0] in "abd".replace(r.problem.question, "")


# ---- Another fork: toy/critic_study.py. ----------------------------------------------------------


@pytest.fixture
def critic_study(monkeypatch):
    """The study, reduced to four kinds of error; what it adds to sd.py leaves with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(evaluation, "ARMS", dict(evaluation.ARMS))
    rows = dict(sd.CONDITIONS)
    spec = importlib.util.spec_from_file_location("critic_study", TOY / "critic_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds, lines = {}, {}
    for name in ("wrong value", "wrong value, all", "reference, wrong", "grpo, flipped"):
        kinds[name] = module.KINDS[name]._replace(shares=(50, 100))
        lines[name] = module.LINES[name]
    monkeypatch.setattr(module, "KINDS", kinds)
    monkeypatch.setattr(module, "LINES", lines)
    monkeypatch.setattr(module, "SHARES", (50, 100))
    monkeypatch.setattr(module, "PROBLEMS", 12)
    yield module
    for name in sd.CONDITIONS.keys() - rows:
        del sd.CONDITIONS[name]


@pytest.mark.filterwarnings("ignore:invalid value")  # two equal gains have no correlation
def test_the_critic_study_trains_every_arm_once(critic_study, tmp_path, monkeypatch):
    """Fails if an arm is left out of table or figure, or a second call trains or draws anew."""
    pytest.importorskip("matplotlib")
    sizes = dict(preset="toy", steps=2, test_problems=4, validation_problems=2, eval_samples=2)
    sizes |= dict(attempts_per_step=4, group_size=2)
    assets = tmp_path / "assets"
    own = ["--seeds", "1", "--out", str(tmp_path / "runs"), "--assets", str(assets), "--"]
    assert critic_study.main(own + as_flags(sizes)) == 0
    tables = (assets / "critic_study.md").read_text()
    for arm in ("critique", "reference", "wrong value 50", "wrong value 100"):
        assert f"| {arm} |" in tables
    for kind in critic_study.KINDS:
        assert f"| {kind} |" in tables
        for share in critic_study.SHARES:
            name = "-".join(kind.replace(",", "").split())
            (run,) = (tmp_path / "runs").glob(f"{name}-{share}-lr*")
            assert sd.load_checkpoint(run / "checkpoint.pt")["state"]["step"] == 2
    figure = (assets / "critic_study.svg").read_bytes()
    assert len(figure) > 1000
    monkeypatch.setattr(sd, "train", lambda cfg: pytest.fail("trained again"))
    assert critic_study.main(own + as_flags(sizes)) == 0
    assert (assets / "critic_study.md").read_text() == tables
    assert (assets / "critic_study.svg").read_bytes() == figure


def chain(text: str, question: str = "7+6*3+4+1+1*2") -> sd.Rollout:
    """An attempt at a toy problem; its right values are 3 9 3 4 5 0."""
    problem = sd.Problem(question, "h6+7=3h3*3=9h4+9=3h1+3=4h1+4=5h2*5=0####0", "0")
    right = text.endswith("####0")
    return sd.Rollout(problem, [], sd.Sample([0], False, 0.0), text, float(right))


RIGHT = "s7+6=3t3*3=9s9+4=3s3+1=4s1+4=5s5*2=0####0"
WRONG = "s7+6=3t3*3=6s6+4=0s0+1=1s1+1=2s2*2=4####4"


def test_an_error_of_the_study_is_the_one_that_it_is_named_after(critic_study):
    """Fails if an error is no error, stands in another step, is the attempt's own, or what follows
    is not worked out from it in the attempt's wording."""
    right, wrong = chain(RIGHT), chain(WRONG)
    assert critic_study.first_wrong_step(right) == 6 and critic_study.first_wrong_step(wrong) == 1
    first = critic_study.pick_first
    # the right value is 9, and the next one 0
    fixed = "s7+6=3t3*3=0s0+4=4s4+1=5s5+1=6s6*2=2####2"
    assert critic_study.wrong_value(wrong, first) == fixed
    assert critic_study.wrong_value(right, first) is None
    assert critic_study.wrong_place(wrong, first).startswith("s7+6=4t4*3=2")
    assert critic_study.wrong_place(right, first) is None
    assert critic_study.error_missed(wrong, first) == WRONG
    assert critic_study.right_attempt_spoilt(wrong, first) is None
    # the swapped operands of the right attempt's fifth step are kept
    assert critic_study.right_attempt_spoilt(right, first)[24:30] == "s1+7=8"
    assert critic_study.wrong_solution(wrong, first).startswith("h6+7=4h4*3=2h4+2=6")
    for number in range(50):
        pick = random.Random(number).choice
        values = critic_study.read_values(critic_study.wrong_value(wrong, pick))
        assert values[0] == 3 and values[1] not in (9, 6)
        values = critic_study.read_values(critic_study.wrong_place(wrong, pick))
        assert values[1] == 6 or values[0] != 3
        values = critic_study.read_values(critic_study.right_attempt_spoilt(right, pick))
        assert values != [3, 9, 3, 4, 5, 0]


def test_the_study_spoils_the_share_that_it_says(critic_study):
    """Fails if a share spoils nothing or everything, or if two shares spoil different attempts."""
    critic_study.add_rows()
    cfg = config()
    rollouts = [chain(WRONG) for _ in range(400)]
    solution = rollouts[0].problem.solution
    spoilt = {}
    for share in (25, 50, 100):
        write = critic_study.spoilt_writer(critic_study.KINDS["reference, wrong"], share)
        contexts = write(rollouts, None, cfg)
        spoilt[share] = {i for i, context in enumerate(contexts) if context != solution}
    assert 160 < len(spoilt[50]) < 240 and len(spoilt[100]) == 400
    assert 70 < len(spoilt[25]) < 130 and spoilt[25] < spoilt[50]
    assert len(set(contexts)) > 10
    # "all": of two errors each attempt gets the one that is possible in it
    attempts = [chain(RIGHT), chain(WRONG)]
    copies = [sd.Reply(r.text, 5) for r in attempts]
    write = sd.CONDITIONS["wrong value, all 100"].write
    contexts = write(attempts, lambda conversations: copies, cfg)
    assert contexts[0] != RIGHT and contexts[1] != WRONG
    # the same share of the rewards, and only for the advantages
    cfg = config(condition="grpo, flipped 100", group_size=2)
    group = [chain(RIGHT), chain(WRONG)]
    sd.write_contexts(group, None, cfg)
    assert [r.advantage for r in group] == [-1, 1] and [r.reward for r in group] == [1, 0]
    sd.write_contexts(group, None, config(condition="grpo", group_size=2))
    assert [r.advantage for r in group] == [1, -1]


def test_what_the_study_sees_before_training(critic_study):
    """Fails if blame or log-ratio are read at the wrong token, or a sign is wrong."""
    critic_study.add_rows()
    cfg = sd.parse_config(["--preset", "toy"])
    measured = critic_study.measure_arms(["critique", "wrong value 100"], cfg)
    true, spoilt = measured["critique"], measured["wrong value 100"]
    # the true critique puts nearly all blame on the first wrong step, and wants the right value
    assert true[critic_study.BLAME][0] > 80 and true[critic_study.RIGHT][0] == 100
    assert true["log-ratio of the right value"][0] > 0.5 > 0 > true["A of the first wrong value"][0]
    # both copy right attempts, and the teacher is surer of them than the student
    assert true[critic_study.PRAISE][0] == spoilt[critic_study.PRAISE][0] > 0.5
    assert spoilt[critic_study.RIGHT][0] < 50


# ---- Benchmark: python test_sd.py. ---------------------------------------------------------------
#
# Times are ratios of jobs that take turns in this very process, the median of 3 or more rounds.
# Peak memory is measured in a process of its own for each job.

SHAPES = [((2048, 576, 49_152), 128), ((512, 2048, 151_936), 64)]  # (N, H, V), chunk


def loss_job(form: str, shape: tuple, chunk: int):
    """Eq (4) with its gradient, as a call without arguments."""
    N, H, V = shape
    generator = torch.Generator().manual_seed(0)
    h_student = torch.randn(N, H, generator=generator) / H**0.5
    h_teacher = torch.randn(N, H, generator=generator) / H**0.5
    head = torch.randn(V, H, generator=generator)
    ids, advantage = torch.zeros(N, dtype=torch.long), torch.zeros(N)
    loss = sd.DIVERGENCES["student||teacher"]

    def naive():
        h = h_student.clone().requires_grad_(True)
        log_p = F.log_softmax(h @ head.T / 1.1, -1)
        log_q = F.log_softmax(h_teacher @ head.T / 1.1, -1)
        loss.naive(log_p, log_q, ids, advantage).sum().backward()

    def fused():
        sd.fused_loss(h_student, h_teacher, head, ids, advantage, loss.fused, 1.1, chunk)

    def matmuls():
        # through buffers that are allocated once, as in the fused form
        gradient, z = torch.empty(N, H), torch.empty(min(chunk, N), V)
        z_teacher = torch.empty_like(z)
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            n = len(ids[rows])
            torch.mm(h_student[rows], head.T, out=z[:n])
            torch.mm(h_teacher[rows], head.T, out=z_teacher[:n])
            torch.mm(z[:n], head, out=gradient[rows])

    return {"naive": naive, "fused": fused, "matmuls": matmuls}[form]


def checkpointing_job(on: bool):
    """One micro-batch of 8 rows of 256 tokens through 12 layers of width 256."""
    shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=12, head_dim=32)
    model = tiny_model(259, num_attention_heads=8, initializer_range=0.02, **shape)
    cfg = config(condition="grpo", micro_batch=8)
    chat = adapt(sd.Chat(model, None, [0], 512), cfg)
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    sample, problem = sd.Sample([3] * 224, False, 0.0), sd.Problem("", "", "")
    rollouts = [sd.Rollout(problem, [1] * 32, sample, "", 0.0, advantage=1.0) for _ in range(8)]
    return lambda: sd.update(chat, sgd(chat), rollouts, cfg)


JOBS = {"loss": loss_job, "checkpointing": checkpointing_job}


def print_peak(job: str, *arguments) -> None:
    job = JOBS[job](*arguments)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    job()
    # not ru_maxrss, which starts at the parent's
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10
    print((peak - before) / 2**20)


def peak(*job) -> float:
    """Extra memory of a job at its peak, MiB."""
    command = [sys.executable, __file__, "--peak", json.dumps(job)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def timed(jobs: dict, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each round. The first round warms up and does not count."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ratio(seconds: dict, one: str, other: str) -> str:
    return f"{np.median(seconds[one] / seconds[other]):.2f}"


def print_row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def benchmark_loss(shape: tuple, chunk: int) -> None:
    jobs = {form: loss_job(form, shape, chunk) for form in ("naive", "fused", "matmuls")}
    seconds = timed(jobs, 3)
    fused, naive = (peak("loss", "fused", shape, chunk), peak("loss", "naive", shape, chunk))
    name = " × ".join(f"{size:,}" for size in shape) + f", {chunk} rows a chunk"
    print_row(
        f"fused / naive, {name}", ratio(seconds, "fused", "naive"), f"{fused:.0f} / {naive:.0f}"
    )
    print_row("fused / its three bare matmuls", ratio(seconds, "fused", "matmuls"), "")
    if chunk <= shape[0] // 2:
        half = peak("loss", "fused", (shape[0] // 2, *shape[1:]), chunk)
        print_row("fused, with N halved", "", f"{half:.0f}")


def benchmark_sampler(name: str, end_ids: list[int]) -> None:
    """Ours and model.generate, 128 rows, both from the full softmax with the same end tokens."""
    chat, seeds = sd.load_model(str(TOY)), itertools.count()
    chat.end_ids = end_ids
    prompts = [
        chat.encode(sd.FORMATS["toy"].student(p.question)) for _, p in numbered_problems(128)
    ]
    ids, tokens = torch.tensor(prompts), {"ours": [], "generate": []}
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
    settings |= dict(eos_token_id=end_ids, pad_token_id=0, attention_mask=torch.ones_like(ids))

    def ours():
        noise = np.random.default_rng(next(seeds)).random((128, 64), np.float32)
        samples = sd.generate(chat, prompts, 64, noise, 1.0, 128)
        tokens["ours"].append(sum(len(s.ids) for s in samples))

    def generate():
        out = chat.model.generate(ids, **settings)[:, ids.shape[1] :]
        is_end = torch.isin(out, torch.tensor(end_ids))
        # the tokens up to the first end token, and this one
        tokens["generate"].append(int((is_end.cumsum(1) - is_end.int() == 0).sum()))

    seconds = timed({"ours": ours, "generate": generate}, 20)
    for form in seconds:
        seconds[form] /= np.array(tokens[form][1:])
    print_row(
        f"tokens a second, sampler / generate, {name}", ratio(seconds, "generate", "ours"), ""
    )


def benchmark_step() -> None:
    """Where the time of a toy step goes, from the log of a run."""
    out = Path(tempfile.mkdtemp(), "run")
    command = [sys.executable, HERE / "sd.py", "--preset", "toy", "--steps", "20", "--out", out]
    subprocess.run(command, capture_output=True, check=True)
    lines = (out / "log.jsonl").read_text().splitlines()[1:]
    costs = [json.loads(line)["cost"] for line in lines]
    for part in ("sample_s", "critic_s", "train_s"):
        seconds = np.median([cost[part] for cost in costs])
        print_row(f"a toy step, {part}", f"{seconds:.3f}", "")


def benchmark() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| what | time | peak extra memory, MiB |\n|---|---|---|")
    for shape, chunk in SHAPES:
        benchmark_loss(shape, chunk)
        benchmark_loss(shape, sd.Config().kl_chunk)
    benchmark_sampler("toy, 128 uneven rows (a 9 is an end token)", [0, 14])
    benchmark_sampler("toy, 128 rows of 39 tokens", [0])
    seconds = timed({"on": checkpointing_job(True), "off": checkpointing_job(False)}, 5)
    on, off = peak("checkpointing", True), peak("checkpointing", False)
    print_row("checkpointing on / off", ratio(seconds, "on", "off"), f"{on:.0f} / {off:.0f}")
    benchmark_step()


# ---- Trace: python test_sd.py --trace. -----------------------------------------------------------

QWEN3_1_7B = dict(
    vocabulary=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
PROMPT, CONTEXT = 300, 2400  # tokens; the preset gives those of a response


def traced_row(what: str, *sizes: float) -> None:
    print_row(what, *(f"{size / 2**30:.1f}" for size in sizes))


def print_trace() -> None:
    """What the qwen preset holds at its peak: no allocator's fragments, no kernel's workspace."""
    patch = pytest.MonkeyPatch()
    patch.setattr(F, "scaled_dot_product_attention", flash_attention)
    cfg = sd.Config(**sd.PRESETS["qwen"])
    print("| Qwen3-1.7B, traced, GiB | peak | of it weights and adapters |\n|---|---|---|")
    for rows in (cfg.micro_batch, 2, 1):
        for on in (True, False):
            own = replace(cfg, micro_batch=rows, gradient_checkpointing=on)
            trace = trace_update(meta_chat(own, **QWEN3_1_7B), own, PROMPT, CONTEXT)
            checkpointing = "with checkpointing" if on else "without"
            what = f"update, --micro-batch {rows}, {checkpointing}"
            traced_row(what, trace.peak, trace.weights)
    chat = meta_chat(cfg, **QWEN3_1_7B)
    # in a run the adapters' gradients and AdamW's two moments are there as well
    state = 3 * 4 * sum(p.numel() for p in sd.adapters(chat.model).values())
    lengths = {
        "attempts": PROMPT + cfg.max_new_tokens,
        "critiques": PROMPT + CONTEXT + 2 * cfg.max_new_tokens,
    }
    for work, length in lengths.items():
        for rows in (cfg.sample_batch, cfg.sample_batch // 2, cfg.sample_batch // 4):
            # the last two tokens: that is where the cache is longest
            trace = trace_sampling(chat, rows, length - 2, 2, patch)
            what = f"{work} of {length:,} tokens, --sample-batch {rows}"
            traced_row(what, trace.peak + state, trace.weights)
    patch.undo()


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*json.loads(sys.argv[2]))
    elif sys.argv[1:] == ["--trace"]:
        print_trace()
    else:
        torch.set_num_threads(os.cpu_count())
        benchmark()
