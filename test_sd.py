"""Each test's docstring names the bug that would make it fail; numbers in brackets are the traps that others fell into."""

import errno
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import critic_prompts
import eval as evaluation
import sd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "toy"))
import make  # noqa: E402

KL = ["student||teacher", "teacher||student"]
torch.set_num_threads(2)


def tiny_model(**changes):
    """A random Qwen3 of a few thousand parameters whose distributions are far from uniform."""
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                 max_position_embeddings=128, initializer_range=0.4)  # fmt: skip
    tokenizer = make.toy_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=False,
        eos_token_id=0, pad_token_id=0, bos_token_id=None, **{**shape, **changes},
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config), tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A chat model folder as any other, and problems beside it."""
    path = tmp_path_factory.mktemp("tiny")
    model, tokenizer = tiny_model()
    # a hub model's sampling defaults, which must not reach our sampler
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    language = make.ToyLanguage(seed=1)
    (path / "problems.jsonl").write_text(
        "".join(json.dumps(language.row(language.problem())) + "\n" for _ in range(60))
    )
    return path


@pytest.fixture
def chat(folder):
    return sd.load_model(str(folder))


def config(**changes) -> sd.Config:
    base = dict(sd.PRESETS["toy"], lora_rank=4, max_new_tokens=12, lr=1e-2, micro_batch=2, kl_chunk=5, temperature=1.5)
    return sd.Config(**{**base, **changes})


def rollouts_of(chat, cfg, n=6, seed=0) -> list[sd.Rollout]:
    """n rollouts with contexts and advantages, packed for cfg's condition."""
    language = make.ToyLanguage(seed)
    problems = [sd.read_row(language.row(language.problem())) for _ in range(n)]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, seed=seed)
    for i, r in enumerate(rollouts):
        r.context, r.advantage = r.problem.solution, (-1.0) ** i * (i + 1)
        r.sample = r.sample._replace(ids=r.sample.ids[: max(1, len(r.sample.ids) - i)])  # uneven, as real ones are
    return sd.pack(chat, rollouts, cfg)


def adapt(chat, cfg, noise=0.0):
    """Adapters on; with noise, B is no longer zero, so that student and teacher differ."""
    sd.add_adapters(chat.model, cfg)
    torch.manual_seed(1)
    for layer in chat.model.modules():
        if isinstance(layer, sd.LoRALinear) and noise:
            torch.nn.init.normal_(layer.B, std=noise)
    return chat


def measured(chat, rollouts, cfg) -> dict:
    return sd.measure(chat, {"critic_tokens": 0, "cost": {}}, rollouts, cfg)


def gradients(chat, rollouts, cfg) -> dict[str, torch.Tensor]:
    chat.model.train()
    chat.model.zero_grad()
    total = sum(len(r.sample.ids) for r in rollouts)
    for start in range(0, len(rollouts), cfg.micro_batch):
        sd.micro_loss(chat, rollouts[start : start + cfg.micro_batch], total, cfg)[0].backward()
    return {name: p.grad.clone() for name, p in sd.adapters(chat.model).items()}


def assert_same(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ---- loss


@pytest.mark.parametrize("kl, value, gradient", [
    ("student||teacher", 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.75 * 0.25 * math.log(3)),
    ("teacher||student", 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.75 - 0.5),
])  # fmt: skip
def test_divergences_equal_numbers_worked_by_hand(kl, value, gradient):
    """p = (3/4, 1/4), q = (1/2, 1/2). Fails if the two directions are exchanged (6)."""
    z_p = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    got = sd.kl_naive(z_p, torch.zeros(1, 2, dtype=torch.float64), kl, 1.0)
    got.sum().backward()
    assert got.item() == pytest.approx(value) and z_p.grad[0, 0].item() == pytest.approx(gradient)


def heads(n=13, d=8, v=31, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return make(n, d), make(n, d), make(v, d)


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize(
    "temperature, chunk, n", [(1.0, 4, 13), (0.7, 5, 13), (1.6, 100, 13), (1.1, 1, 3), (1.0, 4, 0)]
)
def test_fused_loss_equals_the_naive_form(kl, temperature, chunk, n):
    """Value, per-row value and gradient, with zero-weight rows. Fails if the fused copy forgets the temperature, a row's
    weight, the last odd chunk, or the empty batch (7)."""
    h_student, h_teacher, head = heads(n)
    h_student.requires_grad_(True)
    weight = torch.linspace(-1, 2, n, dtype=torch.float64).clamp(min=0)
    per_row = sd.kl_naive(h_student @ head.T, h_teacher @ head.T, kl, temperature)
    (3 * (weight * per_row).sum()).backward()
    wanted, h_student.grad = h_student.grad, None
    loss, rows = sd.fused_loss(h_student, h_teacher, head, weight, kl=kl, temperature=temperature, chunk=chunk)
    (3 * loss).backward()
    torch.testing.assert_close(loss, (weight * per_row).sum())
    torch.testing.assert_close(rows, per_row.float().detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(h_student.grad, wanted)
    assert not rows.requires_grad and rows.dtype == torch.float32


@pytest.mark.parametrize("temperature, chunk, n", [(1.0, 4, 13), (0.7, 5, 13), (1.3, 100, 13), (1.0, 4, 0)])
def test_the_policy_gradient_equals_log_softmax(temperature, chunk, n):
    """−Σ w A log p_y of grpo. Fails if the gradient drops the drawn token's own row of the head, the sign, or the
    temperature (7)."""
    h, _, head = heads(n)
    h.requires_grad_(True)
    ids = torch.arange(n) % len(head)
    a, weight = torch.linspace(-1, 1, n, dtype=torch.float64), torch.linspace(0, 2, n, dtype=torch.float64)
    wanted = -(weight * a * F.log_softmax(h @ head.T / temperature, -1).gather(1, ids[:, None])[:, 0]).sum()
    wanted.backward()
    gradient, h.grad = h.grad, None
    got, _ = sd.fused_loss(h, None, head, weight, kl="grpo", ids=ids, advantage=a, temperature=temperature, chunk=chunk)
    got.backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(h.grad, gradient)


def test_sampled_token_form_has_value_and_gradient_of_kl_student_teacher_in_expectation():
    """Summed over the vocabulary with weights p. Fails if the advantage is not held constant (8): its sign would flip."""
    h, h_teacher, head = heads(n=1, v=11)
    h = h.requires_grad_(True)
    kl = sd.kl_naive(h @ head.T, h_teacher @ head.T, "student||teacher", 0.9)
    kl.sum().backward()
    exact, h.grad = h.grad, None
    every, p = torch.arange(len(head)), F.softmax(h.detach() @ head.T / 0.9, -1)[0]
    wide = lambda x: x.expand(len(head), -1)
    loss, _ = sd.fused_loss(wide(h), wide(h_teacher), head, p, kl="sampled", ids=every, temperature=0.9, chunk=4)
    loss.backward()
    torch.testing.assert_close(h.grad, exact)
    torch.testing.assert_close(loss, kl[0])


def test_the_policy_gradient_survives_bfloat16_where_the_model_is_sure():
    """p_y near 1. Fails if the head's row and its mean under p are subtracted in bfloat16: two nearly equal vectors."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(4000, 64, generator=g).bfloat16()
    ids, one = torch.arange(8), torch.ones(8)
    h = (head[ids].float() * 0.25).bfloat16().requires_grad_(True)
    p = F.log_softmax(F.linear(h, head).float(), -1)[ids, ids].exp()
    assert ((p > 0.9) & (p < 1)).any()
    sd.fused_loss(h, None, head, one, kl="grpo", ids=ids, advantage=-one, temperature=1.0, chunk=3)[0].backward()
    z = F.linear(h.detach(), head).float().requires_grad_(True)
    F.log_softmax(z, -1)[ids, ids].sum().backward()
    exact = z.grad @ head.float()
    assert ((h.grad.float() - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.03


@pytest.mark.parametrize("kl", KL)
def test_small_divergences_survive_bfloat16_and_a_large_vocabulary(kl):
    """Fails if the softmax runs in bfloat16: over 50,000 tokens it makes small divergences wrong and negative (27)."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(50_000, 32, generator=g).bfloat16()
    h_student = torch.randn(6, 32, generator=g).bfloat16().requires_grad_(True)
    h_teacher = (h_student.detach() * 1.02).bfloat16()
    exact = sd.kl_naive(F.linear(h_student, head).double(), F.linear(h_teacher, head).double(), kl, 1.0)
    loss, rows = sd.fused_loss(h_student, h_teacher, head, torch.ones(6), kl=kl, temperature=1.0, chunk=4)
    loss.backward()
    assert (rows > 0).all() and h_student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rows.double(), exact.detach(), rtol=0.01, atol=1e-5)


class Watch(TorchDispatchMode):
    """Counts matmuls and remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest = self.matmuls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.matmuls += op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("kl", KL)
def test_fused_loss_makes_no_n_by_v_tensor_and_no_extra_matmul(kl):
    """Fails if the chunks are concatenated, or if logits are made a second time in the backward."""
    h_student, h_teacher, head = heads(n=40, v=300, dtype=torch.float32)
    with Watch() as watch:
        loss, _ = sd.fused_loss(
            h_student.requires_grad_(True), h_teacher, head, torch.ones(40), kl=kl, temperature=1.0, chunk=8
        )
        loss.backward()
    assert watch.largest == 8 * 300 and watch.matmuls == 3 * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scored_distribution_is_the_sampled_one(dtype):
    """Fails if the loss rounds logits / temperature where the sampler rounds logits (9)."""
    h, _, head = heads(n=40, v=300, dtype=dtype)
    sampled = F.softmax(F.linear(4 * h, head).float() / 1.1, -1)
    for buffers in ((None, None), (torch.empty(40, 300, dtype=dtype), torch.empty(40, 300))):
        torch.testing.assert_close(sd.log_softmax_of(4 * h, head, 1.1, *buffers).exp(), sampled, atol=1e-6, rtol=1e-4)


def test_unknown_divergence_is_an_error():
    """Fails if a misspelt kl silently means one of the two."""
    h, _, head = heads()
    with pytest.raises(KeyError, match="forward"):
        sd.fused_loss(h, h, head, torch.ones(len(h)), kl="forward", temperature=1.0, chunk=4)
    with pytest.raises(KeyError):
        sd.kl_naive(h, h, "reverse", 1.0)


# ---- step

FORMS = [("critique", kl) for kl in (*KL, "sampled")] + [("grpo", "student||teacher")]


@pytest.mark.parametrize("condition, kl", FORMS)
def test_gradients_do_not_depend_on_the_micro_batch(chat, condition, kl):
    """Fails if each micro-batch is divided by its own token count (5)."""
    cfg = config(condition=condition, kl=kl)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    whole = gradients(chat, rollouts, replace(cfg, micro_batch=100, kl_chunk=1000))
    for micro_batch in (1, 2):
        assert_same(gradients(chat, rollouts, replace(cfg, micro_batch=micro_batch)), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("condition, kl", FORMS)
def test_the_step_equals_a_plain_full_batch_one(chat, condition, kl):
    """Checkpointing, micro-batches of 1, chunks and hand-written gradients against a loop over rows in plain autograd.
    Fails if checkpointing recomputes without the adapter or is reentrant (13), or a target is off by one."""
    cfg = config(condition=condition, kl=kl, micro_batch=1)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    chat.model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(chat, rollouts, cfg)
    chat.model.eval()  # here checkpointing is off
    chat.model.zero_grad()
    loss, total = 0.0, sum(len(r.sample.ids) for r in rollouts)
    for r in rollouts:
        n, ids = len(r.sample.ids), torch.tensor(r.sample.ids)
        logits = lambda prompt: chat.model(input_ids=torch.tensor([prompt + r.sample.ids])).logits[0, -n - 1 : -1]
        z_p = logits(r.prompt)
        log_p = F.log_softmax(z_p / cfg.temperature, -1)[torch.arange(n), ids]
        if condition == "grpo":
            loss = loss - (r.advantage * log_p).sum() / total
            continue
        with torch.no_grad(), sd.adapters_off(chat.model):
            z_q = logits(r.teacher_prompt)
        if kl == "sampled":
            log_q = F.log_softmax(z_q / cfg.temperature, -1)[torch.arange(n), ids]
            loss = loss - ((log_q - log_p).detach() * log_p).sum() / total
        else:
            loss = loss + sd.kl_naive(z_p, z_q, kl, cfg.temperature).sum() / total
    loss.backward()
    assert_same(got, {name: p.grad for name, p in sd.adapters(chat.model).items()}, atol=1e-5, rtol=1e-4)
    assert all(g.abs().sum() > 0 for g in got.values())


def test_checkpointing_saves_memory_in_a_training_step(chat):
    """Fails if the step runs in eval mode, where checkpointing is silently off (14)."""
    cfg = config()
    rollouts, saved = rollouts_of(adapt(chat, cfg, noise=0.3), cfg), []

    def saved_bytes():
        saved.append(0)
        count = lambda t: saved.__setitem__(-1, saved[-1] + t.numel()) or t
        chat.model.eval()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            sd.train_step(chat, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.0), rollouts, cfg)

    saved_bytes()
    chat.model.activation_checkpointing_enable({"use_reentrant": False})
    saved_bytes()
    assert saved[1] < 0.6 * saved[0]


def test_no_tokenizer_is_needed_between_sampler_and_loss(chat):
    """Fails if a response is decoded and encoded again on its way into the loss (3)."""
    cfg = config()
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    mute = sd.Chat(chat.model, None, chat.end_ids, chat.window)
    assert sd.train_step(mute, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.1), rollouts, cfg)["kl"] > 0


def test_a_teacher_with_the_students_prompt_has_zero_kl_and_zero_gradient(chat):
    """Fails if the teacher is not the initial policy at step 0: adapter on, other weights, other positions (12)."""
    cfg = config(micro_batch=3)
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    context_kl = sd.train_step(chat, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.0), rollouts, cfg)["kl"]
    for r in rollouts:
        r.teacher_prompt = r.prompt
    step = sd.train_step(chat, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.0), rollouts, cfg)
    assert step["kl"] == 0.0 and step["grad_norm"] < 1e-6 and context_kl > 0.01


def test_adapter_off_is_the_original_bit_for_bit_after_training(chat):
    """Fails if training touches a frozen weight, or off leaves a part of the adapter on (12)."""
    cfg = config()
    ids = torch.arange(20)[None] % 20
    before = chat.model(input_ids=ids).logits
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    for _ in range(3):
        sd.train_step(chat, torch.optim.AdamW(sd.adapters(chat.model).values(), lr=0.01), rollouts, cfg)
    with sd.adapters_off(chat.model):
        assert torch.equal(chat.model(input_ids=ids).logits, before)
    assert not torch.equal(chat.model(input_ids=ids).logits, before)


def test_adapters_are_float32_on_a_bfloat16_base_and_all_move(folder):
    """Fails if adapters take the base's dtype: updates of a small lr round away (11)."""
    chat = sd.load_model(str(folder), dtype="bfloat16")
    cfg = config(lr=5e-6)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg)
    before = {name: p.detach().clone() for name, p in sd.adapters(chat.model).items()}
    sd.train_step(chat, torch.optim.AdamW(sd.adapters(chat.model).values(), lr=cfg.lr, weight_decay=0.0), rollouts, cfg)
    after = sd.adapters(chat.model)
    assert {p.dtype for p in after.values()} == {torch.float32} and chat.head.dtype == torch.bfloat16
    assert np.mean([(after[name] != before[name]).float().mean().item() for name in before]) > 0.9


def test_float16_gradients_do_not_underflow(folder):
    """Fails if 1 / (tokens of a step) enters a float16 gradient, which holds nothing under 6e-8."""
    found, rollouts = {}, []
    for dtype in ("float32", "float16"):
        chat, cfg = sd.load_model(str(folder), dtype), config(condition="grpo")
        rollouts = rollouts or rollouts_of(chat, cfg, n=2)
        rollouts[0].advantage, rollouts[1].advantage = 1.0, -1.0
        optimizer = torch.optim.SGD(sd.adapters(adapt(chat, cfg).model).values(), lr=0.0)
        sd.backward(chat, optimizer, rollouts, 1 << 20, cfg)
        found[dtype] = torch.cat([p.grad.flatten() for p in sd.adapters(chat.model).values()])
    assert F.cosine_similarity(found["float32"], found["float16"], dim=0) > 0.99 and found["float32"].abs().max() > 0


def test_a_step_without_signal_changes_nothing(chat):
    """Fails if no scored rollout, or only flat groups, crash the backward or give NaN (16, 17)."""
    cfg = config(condition="grpo", group_size=2)
    rollouts = rollouts_of(adapt(chat, cfg, noise=0.3), cfg, n=4)
    for r, advantage in zip(rollouts, sd.group_advantages([1.0, 1.0, 0.0, 0.0], 2)):
        r.advantage = advantage
    optimizer = torch.optim.SGD(sd.adapters(chat.model).values(), lr=1.0)
    before = {name: p.detach().clone() for name, p in sd.adapters(chat.model).items()}
    assert sd.train_step(chat, optimizer, rollouts, cfg)["grad_norm"] == 0.0
    assert sd.train_step(chat, optimizer, [], cfg) == {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0}
    assert_same({k: v.detach() for k, v in sd.adapters(chat.model).items()}, before, atol=0, rtol=0)
    for r in rollouts:
        r.reward = 1.0
    assert measured(chat, rollouts, cfg)["zero_variance"] == 1.0


def test_a_loss_that_is_not_finite_stops_before_the_update(chat):
    """Fails if the optimiser steps first and the check comes after."""
    cfg = config()
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    weights = sd.adapters(chat.model)
    first = next(iter(weights.values()))
    with torch.no_grad():
        first.fill_(math.inf)
    before = {name: p.detach().clone() for name, p in weights.items()}
    with pytest.raises(FloatingPointError):
        sd.train_step(chat, torch.optim.AdamW(weights.values(), lr=0.1), rollouts, cfg)
    assert all(torch.equal(p, before[name]) for name, p in weights.items())


def test_group_advantages_equal_numbers_worked_by_hand():
    """Eq (3). Fails if groups mix, or if std is the sample's (n − 1)."""
    assert sd.group_advantages([1, 0, 0, 0, 1, 1], 2) == [1, -1, 0, 0, 0, 0]
    root = math.sqrt(3)
    assert sd.group_advantages([1, 0, 0, 0], 4) == pytest.approx([root, -1 / root, -1 / root, -1 / root])


# ---- sample and pack


def uniforms(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def test_sampler_draws_from_the_full_softmax_at_the_losss_temperature(chat):
    """4,000 draws of one token against softmax(logits / T). Fails if top-k or top-p of the model's generation config,
    or another temperature, shapes the draw (9)."""
    prompt = chat.encode([critic_prompts.user("7+6*3")])
    samples = sd.generate(chat, [prompt] * 4000, 1, temperature=2.0, uniforms=uniforms(4000, 1), batch=4000)
    p = F.softmax(chat.model(input_ids=torch.tensor([prompt])).logits[0, -1].float() / 2.0, -1)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=len(p))
    assert (counts[p > 0.002] > 0).all()
    chi = ((counts - 4000 * p) ** 2 / (4000 * p)).sum().item()
    assert chi < 2.5 * len(p)
    assert samples[0].entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_a_rows_sample_does_not_depend_on_its_neighbours(chat):
    """Fails if rows share random numbers, padding shifts positions, or a leaving row takes another's cache along."""
    prompts = [chat.encode([critic_prompts.user(text)]) for text in ("7", "7+6*3*9", "1+4*2", "3*3")]
    draw = lambda batch: sd.generate(chat, prompts, 20, uniforms=uniforms(4, 20), batch=batch)
    together = draw(4)
    assert len({len(s.ids) for s in together}) > 1
    assert [s.ids for s in together] == [s.ids for s in draw(1)] == [s.ids for s in draw(3)]


def test_left_padding_leaves_an_absolute_position_model_unmoved():
    """Greedy, batched against single, on GPT-2's learned positions. Fails without position ids (10)."""
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    )
    chat = sd.Chat(gpt2, None, [0], 64)
    prompts = [[5, 6, 7], [8] * 9, [9, 10]]
    single = [sd.generate(chat, [p], max_new_tokens=10)[0].ids for p in prompts]
    assert [s.ids for s in sd.generate(chat, prompts, max_new_tokens=10)] == single


def test_greedy_generation_with_the_cache_equals_the_slow_loop_without(chat):
    """Fails if cached positions are off, or dropout is on while sampling (21)."""
    adapt(chat, config(), noise=0.3)
    chat.model.train()
    ids = chat.encode([critic_prompts.user("7+6*3")])
    sample = sd.generate(chat, [ids], max_new_tokens=15)[0]
    slow = list(ids)
    while len(slow) < len(ids) + 15 and slow[-1:] != [0]:
        slow.append(chat.model(input_ids=torch.tensor([slow])).logits[0, -1].argmax().item())
    assert sample.ids == slow[len(ids) :] and not chat.model.training


def test_all_end_tokens_stop_a_row_and_a_cut_row_is_marked(chat):
    """Fails if only one end token stops, the end token is dropped from the response, or a cut row counts as ended."""
    chat.end_ids = [0, 7, 9]
    samples = sd.generate(chat, [[1, 5, 2]] * 64, 6, temperature=2.0, uniforms=uniforms(64, 6))
    assert {s.ids[-1] for s in samples if not s.truncated} == {0, 7, 9}
    assert all(not set(s.ids[:-1]) & {0, 7, 9} for s in samples)
    assert any(s.truncated for s in samples) and all(len(s.ids) == 6 for s in samples if s.truncated)


def test_the_first_end_token_is_scored_and_padding_never(chat):
    """Padding is the end token. Fails if a mask is made from token values (1), or rows see their padding."""
    prompts, responses = [[1, 5, 0, 2], [1, 6, 7, 0, 2]], [[8, 0], [9, 10, 11, 12, 0]]
    hidden = sd.response_hidden(chat, prompts, responses)
    assert len(hidden) == 7
    alone = torch.cat([sd.response_hidden(chat, [p], [r]) for p, r in zip(prompts, responses)])
    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
    logits = chat.model(input_ids=torch.tensor([prompts[0] + responses[0]])).logits[0, 3:5]
    torch.testing.assert_close(hidden[:2] @ chat.head.T, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [False, True])
def test_both_rows_end_in_the_very_ids_that_were_drawn(chat, stop):
    """Watches what reaches the network. Fails if a prompt is rendered twice, a boundary moves (2), the two headers differ
    (4), or ids change on their way; with --stop-at-first-edit, if more or less than the first edit is scored."""
    cfg = config(micro_batch=1, stop_at_first_edit=stop)
    rollouts = rollouts_of(adapt(chat, cfg), cfg)
    for r in rollouts:
        r.context = chat.decode(r.sample.ids)[:3] + "####9"
    rollouts, rows = sd.pack(chat, rollouts, cfg), []
    handle = chat.model.base_model.register_forward_pre_hook(
        lambda m, a, k: rows.append(k["input_ids"][0].tolist()), with_kwargs=True
    )
    sd.train_step(chat, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.1), rollouts, cfg)
    handle.remove()
    for r, student, teacher in zip(rollouts, rows[::2], rows[1::2]):
        scored = r.sample.ids[: critic_prompts.first_edit(chat.decode, r.sample.ids, r.context) + 1] if stop else r.sample.ids
        question = critic_prompts.FORMATS["toy"].student(r.problem.question)
        assert student == chat.encode(question) + scored
        assert teacher == chat.encode(critic_prompts.FORMATS["toy"].teacher(r.problem.question, r.context)) + scored
        assert student[: -len(scored)][-1] == teacher[: -len(scored)][-1] == 2


def test_the_first_edit_is_found_for_any_tokenizer():
    """Against a scan over all prefixes, with letters cut between tokens. Fails if half a letter counts as an edit, or the
    search is off by one."""

    class Bytes:  # every byte is a token
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    chat = sd.Chat(None, Bytes(), [0], 100)
    attempt = "naïve: 2€ + 3€ = 6€"
    ids = list(attempt.encode())
    for critique in (attempt, attempt + " more", "naïve: 2€ + 3€ = 5€", "naïve: 2£", "x", "", "naÿ"):
        same = len(os.path.commonprefix([attempt.encode(), critique.encode()]))
        scan = next(
            (t for t in range(len(ids)) if not critique.startswith(chat.decode(ids[: t + 1]).rstrip("\ufffd"))),
            len(ids),
        )
        assert critic_prompts.first_edit(chat.decode, ids, critique) == scan and same <= scan <= same + 3
    attempt, critique = "First I add.\n<step_1>1 + 1 = 3</step_1>", "<step_1>1 + 1 = 2</step_1>"
    assert critic_prompts.first_edit(chat.decode, list(attempt.encode()), critique) == attempt.index("3")


THINKS = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}=={% endif %}{% endif %}"


def test_different_generation_headers_are_refused_unless_asked_for(chat):
    """Fails if a thinking teacher is compared with a silent student without a word (4)."""
    chat.tokenizer.chat_template = THINKS
    cfg = config()
    rollouts = rollouts_of(chat, cfg)
    assert chat.header_length == 3 and rollouts[0].teacher_prompt[-3:] == rollouts[0].prompt[-3:]
    thinking = rollouts_of(chat, replace(cfg, teacher_thinking=True))
    assert thinking[0].teacher_prompt[-1] != thinking[0].prompt[-1]
    shared = chat.encode
    chat.encode = lambda messages, thinking=False, header=True: shared(messages, "|" in messages[0]["content"], header)
    with pytest.raises(AssertionError, match="headers"):
        rollouts_of(chat, cfg)


def test_an_over_long_context_loses_its_middle_only(chat):
    """Fails if the prompt is cut at its end, header included (18)."""
    cfg = config(max_prompt_tokens=40)
    ids = sd.teacher_prompt(chat, "7+6*3", "1" * 30 + "9" * 100 + "2" * 30, cfg)
    text = chat.tokenizer.decode(ids)
    assert len(ids) <= 40 and text.startswith("<|user|>7+6*3|111") and text.endswith("222<|end|><|assistant|>")
    assert sd.teacher_prompt(chat, "7+6*3", "1", cfg) == chat.encode(
        critic_prompts.FORMATS["toy"].teacher("7+6*3", "1")
    )
    assert sd.teacher_prompt(chat, "7" * 50, "1", cfg) is None


def test_only_the_credit_signal_differs_between_conditions(chat):
    """Fails if a condition gets another prompt, sampler or grader than the others (26)."""
    ids = {
        condition: [(r.prompt, r.sample.ids, r.reward) for r in rollouts_of(chat, config(condition=condition))]
        for condition in sd.CONDITIONS
    }
    assert ids["critique"] == ids["reference"] == ids["grpo"]


# ---- critic


def test_a_failed_critique_is_left_out_and_counted(chat):
    """Fails if an empty, cut, thinking-only or step-less reply reaches the teacher (19)."""
    good = "s7+6=3s3*3=9####9"
    replies = [good, "", None, "I cannot help", "####9", "s7+6=3", "<think>s7+6=3####3", f"<think>no</think>{good}"]
    cfg = config()
    rollouts = rollouts_of(chat, cfg, n=len(replies))
    critic = lambda conversations: [sd.Reply(reply, 5) for reply in replies]
    tokens = sd.write_contexts(rollouts, critic, cfg)
    scored = sd.pack(chat, rollouts, cfg)
    assert [r.context for r in rollouts] == [good] + [None] * 6 + [good] and tokens == 40
    assert len(scored) == 2 and measured(chat, rollouts, cfg)["critic_failed"] == 6


def test_a_chat_critics_reply_is_a_trace_or_nothing():
    """Fails if small talk, a loop or an echo stays in the context, or a hostile reply stops the run or holds it up."""
    trace = critic_prompts.FORMATS["steps"].trace
    good = "<step_1>1 + 1 = 2</step_1>\n<answer>2</answer>"
    assert trace(f"Here it is: {good} Well done!") == good
    for reply in ("", good[:-9], "<answer>2</answer>", good.replace("</step_1>", ""), f"{good} {good}", "</answer> <step_1>x</step_1>"):
        assert trace(reply) is None
    start = time.process_time()
    for hostile in ("<step_1>" * 25_000, "</step_1>" * 20_000, "<step_{0}>x</step_{0}></answer>".format("9" * 5000)):
        assert trace(hostile) is None
        trace(good + hostile)
    assert time.process_time() - start < 0.5


def test_the_local_critic_is_the_base_and_drops_what_is_cut_off(chat):
    """Fails if the critic is queried with the adapter on, or a truncated critique is kept."""
    chat.end_ids = [0, 6, 8, 10, 12, 14]  # so that the random model's replies end
    conversations = [
        critic_prompts.FORMATS["toy"].critic(problem, "s7+6=3####3", None, "copy") for problem in ("7+6", "1*3", "4+4")
    ]
    critic = sd.LocalCritic(chat, 60, 8)
    before = critic(conversations)
    assert all(reply.text for reply in before)
    adapt(chat, config(), noise=2.0)
    prompts = [chat.encode(messages) for messages in conversations]
    adapted = [sample.ids for sample in sd.generate(chat, prompts, max_new_tokens=60)]
    assert critic(conversations) == before and [chat.decode(ids) for ids in adapted] != [reply.text for reply in before]
    assert sd.LocalCritic(chat, 1, 8)(conversations) == [sd.Reply(None, 1)] * 3  # cut off
    assert sd.LocalCritic(chat, 1000, 8)(conversations) == [sd.Reply(None, 0)] * 3  # does not fit the window


@pytest.mark.parametrize("sees", [True, False])
def test_who_sees_what(chat, sees):
    """Fails if a solution reaches the student, the critique's teacher, or a critic that may not see it."""
    for fmt in critic_prompts.FORMATS.values():
        student, teacher = fmt.student("QUESTION"), fmt.teacher("QUESTION", "CONTEXT")
        critic = fmt.critic("QUESTION", "ATTEMPT", "SOLUTION" if sees else None, "copy")
        assert "QUESTION" in str(student) and "QUESTION" in str(teacher) and "CONTEXT" in str(teacher)
        assert "ATTEMPT" in str(critic) and ("SOLUTION" in str(critic)) == sees and critic[-1]["role"] == "user"
    heard = []
    cfg = config(critic_sees_reference=sees)
    rollouts = rollouts_of(chat, cfg, n=2)
    sd.query_critic(rollouts, lambda conversations: heard.extend(conversations) or [sd.Reply(None, 0)] * 2, cfg)
    solution = rollouts[0].problem.solution
    assert (solution in str(heard[0])) == sees and solution not in chat.decode(rollouts[0].prompt)
    rollouts[0].context = "s7+6=3####3"
    assert solution not in chat.decode(sd.pack(chat, rollouts[:1], cfg)[0].teacher_prompt)
    words = " ".join(critic_prompts.STYLES.values()).lower()  # names of roles would leak into what the teacher reads
    assert "reference" not in words and "student" not in words


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose model name says how it misbehaves."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body, self.headers.get("Authorization")))
        how = body["model"]
        if how == "flaky" and len(self.server.calls) == 1:
            how = "429"
        if how == "silent":
            time.sleep(1.0)
            return
        good = {
            "choices": [{"message": {"content": "<think>hm</think>s1+1=2####2"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 7},
        }
        good["choices"][0]["finish_reason"] = "length" if how == "cut" else "stop"
        text = {
            "garbage": "<html>",
            "empty": "{}",
            "null": '{"choices": [{"message": {"content": null}}]}',
            "list": '{"choices": [{"message": {"content": []}}]}',
            "uncounted": '{"choices": [{"message": {"content": "ok"}}], "usage": {"completion_tokens": null}}',
        }.get(how, json.dumps(good))
        self.send_response(int(how) if how.isdigit() else 200)
        self.send_header("Content-Length", str(len(text) * (2 if how == "half" else 1)))
        if how == "302":
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.server.calls.append((self.path, None, self.headers.get("Authorization")))
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.calls = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("how, calls, text", [
    ("good", 1, True), ("flaky", 2, True), ("cut", 1, False), ("null", 1, False), ("400", 1, False), ("404", 1, False),
    ("500", 3, False), ("429", 3, False), ("garbage", 3, False), ("empty", 3, False), ("list", 3, False), ("uncounted", 1, True), ("half", 3, False), ("silent", 3, False),
])  # fmt: skip
def test_http_critic_retries_what_may_pass_and_reports_the_rest_as_failed(server, how, calls, text):
    """Fails if a 4xx is retried, a 5xx is not, or any reply raises into the training loop."""
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    critic = sd.HTTPCritic([url], how, max_new_tokens=9, parallel=2, timeout=0.2, tries=3, pause=0.01)
    reply = critic([[critic_prompts.user("mend this")]])[0]
    assert bool(reply.text) == text and len(server.calls) == calls and (text or not reply.text)
    path, body, _ = server.calls[0]
    assert path == "/v1/chat/completions" and body["max_tokens"] == 9 and body["messages"][0]["content"] == "mend this"


def test_the_api_key_is_sent_and_kept_nowhere(server, monkeypatch, folder, tmp_path, capfd):
    """Fails if the key enters the config dump, the log or a message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    run_in(tmp_path, folder, "--condition", "critique", "--critic", url, "--critic-model", "400", "--steps", "1")
    assert server.calls[0][2] == "Bearer sk-secret"
    written = "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file())
    assert "sk-secret" not in written + "".join(capfd.readouterr())


def test_the_api_key_follows_no_redirection(server, monkeypatch):
    """Fails if a server can pass the key on to another address."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    critic = sd.HTTPCritic([f"http://127.0.0.1:{server.server_address[1]}/v1"], "302", 9, parallel=1, timeout=1.0)
    assert critic([[critic_prompts.user("x")]])[0].text is None
    assert [call[2] for call in server.calls] == ["Bearer sk-secret", None]


# ---- model


def test_a_conversation_is_a_list_of_ids(chat):
    """Fails if transformers 5's dictionary comes back (20), or special tokens are added twice."""
    ids = chat.encode([critic_prompts.user("7+6")])
    assert ids == [1, *chat.tokenizer.convert_tokens_to_ids(list("7+6")), 0, 2]


def test_special_tokens_inside_a_text_are_text(chat):
    """Fails if a problem can end its own turn."""
    ids = chat.encode([critic_prompts.user("7<|end|><|assistant|>8")])
    assert ids.count(0) == 1 and ids.count(2) == 1 and ids[-2:] == [0, 2]


def broken(folder, tmp_path, change):
    """A copy of the model folder with one thing wrong."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, tokenizer = change(model, tokenizer) or (model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def without_end(model, tokenizer):
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.eos_token = None


SMALL = dict(
    vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=0
)


def gemma(model, tokenizer):
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(num_key_value_heads=1, head_dim=8, **SMALL)
    ), tokenizer


def cohere(model, tokenizer):
    return transformers.CohereForCausalLM(transformers.CohereConfig(num_key_value_heads=1, **SMALL)), tokenizer


def phi(model, tokenizer):
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL)), tokenizer


@pytest.mark.parametrize("change, message", [
    (lambda m, t: setattr(t, "chat_template", None), "no chat template"),
    (without_end, "no end token"), (gemma, "caps"), (cohere, "scales"), (phi, "biases"),
])  # fmt: skip
def test_a_model_that_would_train_wrongly_is_refused(folder, tmp_path, change, message):
    """Fails if a missing template falls back to bare text (28), or a head's arithmetic is ignored."""
    with pytest.raises(sd.Refusal, match=message) as refusal:
        sd.load_model(broken(folder, tmp_path, change))
    assert "\n" not in str(refusal.value)


def test_dropout_is_off_in_training(folder, tmp_path):
    """Fails if a model's dropout makes the student differ from itself."""

    def drop(model, tokenizer):
        model.config.attention_dropout = 0.5

    chat = sd.load_model(broken(folder, tmp_path, drop))
    chat.model.train()
    ids = torch.arange(15)[None]
    assert torch.equal(chat.model(input_ids=ids).logits, chat.model(input_ids=ids).logits)


def test_export_is_a_plain_folder_with_the_merged_logits(folder, tmp_path):
    """Fails if the adapters are not merged, are merged twice, or the template is lost."""
    run_in(tmp_path, folder, "--steps", "2", "--condition", "reference", "--lr", "0.05")
    state = sd.load_checkpoint(tmp_path / "run/checkpoint.pt")
    chat = adapt(sd.load_model(str(folder)), config(lora_alpha=8.0))
    sd.load_adapters(chat.model, state["adapters"])
    plain = sd.load_model(str(tmp_path / "run/model"))
    ids = torch.arange(15)[None]
    assert not [name for name, _ in plain.model.named_parameters() if name.endswith((".A", ".B"))]
    torch.testing.assert_close(
        plain.model(input_ids=ids).logits, chat.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )
    assert plain.tokenizer.get_vocab() == chat.tokenizer.get_vocab()
    assert plain.tokenizer.chat_template == chat.tokenizer.chat_template and plain.end_ids == chat.end_ids
    assert not torch.equal(plain.model(input_ids=ids).logits, sd.load_model(str(folder)).model(input_ids=ids).logits)


# ---- problems and reward

GRADES = [
    ("<answer>42</answer>", "42", True), ("<answer>41</answer> <answer>42</answer>", "42", True),
    ("<answer>42</answer> <answer>41</answer>", "42", False), (r"\boxed{1} then \boxed{42}", "42", True),
    (r"\boxed{42} then \boxed{1}", "42", False), ("#### 42", "42", True), ("x #### 42\nand more", "42", True),
    ("the answer is 42", "42", False), ("", "42", False), ("<answer></answer>", "42", False),
    (r"<answer>7</answer> \boxed{42}", "42", False), ("<answer>42", "42", True), ("<answer> 42. </answer>", "42", True),
    ("<answer>1,234</answer>", "1234", True), ("<answer>12,34</answer>", "1234", False), ("<answer>$5.50</answer>", "5.5", True),
    ("<answer>0.5</answer>", "1/2", True), (r"\boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{\dfrac{3}{4}}", "3/4", True),
    ("<answer>-3/4</answer>", "-0.75", True), ("<answer>50%</answer>", "0.5", True), (r"<answer>50\%</answer>", "50%", True),
    ("<answer>1/0</answer>", "1", False), ("<answer>+7</answer>", "7", True), ("<answer>7.0</answer>", "7", True),
    ("<answer>3.14</answer>", "3.1415", False), ("<answer>The Red  House</answer>", "the red house", True),
    ("<answer>x+1</answer>", "x+2", False), (r"\boxed{\text{42}}", "43", False), (r"\boxed{2\text{ cm}}", "2", True),
    (r"\boxed{a{b}c}", "a{b}c", True), (r"\boxed{42", "42", False), ("<answer>.5</answer>", "0.5", True),
    (r"<answer>2\frac{3}{4}</answer>", "23/4", False), (r"<answer>11/2</answer>", "1 1/2", False), ("<answer>1e3</answer>", "1000", False), ("<answer>0x10</answer>", "16", False), ("<answer>²</answer>", "2", False),
]  # fmt: skip


@pytest.mark.parametrize("text, answer, right", GRADES)
def test_grader(text, answer, right, monkeypatch):
    """Fails if the first answer counts instead of the last, or a number is compared as a string (22)."""
    monkeypatch.setattr(sd, "math_verify", lambda: None)
    assert sd.is_correct(text, answer) == right


@pytest.mark.parametrize("answer", ["9**9**9", "9^{9^{9}}", "1" * 10**7, "<answer>" * 10**6, "{" * 10**7, "\\boxed{" * 10**6,
                                    "999999999!", "(" * 10**6, "1/" * 10**6, "\\frac{" * 10**6, ",".join(["111"] * 10**6)])  # fmt: skip
def test_hostile_answers_are_cheap(answer, monkeypatch):
    """Fails if anything is evaluated, here or by math-verify, or a pattern backtracks. 0.1 s is 100 times what they take."""
    heard = []
    package = types.SimpleNamespace(parse=heard.append, verify=lambda *_: False)
    monkeypatch.setattr(sd, "math_verify", lambda: package)
    for text in (answer, f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", f"#### {answer}"):
        start = time.process_time()
        assert not sd.is_correct(text, "42") and not sd.is_correct("<answer>42</answer>", answer)
        assert time.process_time() - start < 0.1
    assert all(len(text) < 102 and not re.search(r"9\*\*9|9\^{9|9!", text) for text in heard)


ROW = '{"problem": "1+1", "solution": "s1+1=2####2", "answer": "2"}'
BAD_DATA = [
    ("empty file", b"", "0 distinct"), ("blank lines", b"\n\n \n", "0 distinct"), ("one row", ROW.encode(), "1 distinct"),
    ("duplicates", (ROW + "\n").encode() * 9, "8 duplicate"), ("case duplicates", (ROW + "\n" + ROW.replace("1+1", "1+1  ")).encode(), "1 duplicate"),
    ("cut json", b'{"problem": "1', "line 1: is not JSON"), ("cut array", f"[{ROW}, ".encode(), "cut off"), ("array of numbers", b"[1, 2]", "row 1: is not a JSON object"),
    ("not utf-8", b"\xff\xfe{}", "not UTF-8"), ("latin-1", ROW.replace("1+1", "\xe9").encode("latin-1"), "position 13"),
    ("missing field", b'{"problem": "1+1", "answer": "2"}', "'solution' is missing"), ("null", ROW.replace('"2"', "null").encode(), "'answer' is not text"),
    ("bool", ROW.replace('"2"', "true").encode(), "'answer' is not text"), ("list", ROW.replace('"2"', "[2]").encode(), "'answer' is not text"),
    ("no solution", ROW.replace("s1+1=2####2", "").encode(), "1 without a solution"), ("empty text", ROW.replace('"1+1"', '" "').encode(), "'problem' is empty"), ("second line", (ROW + "\n{}").encode(), "line 2: field 'question' is missing"),
    ("no ####", b'{"question": "1+1", "answer": "2"}', "'#### ANSWER'"), ("gsm8k empty", b'{"question": "1+1", "answer": "x ####"}', "'#### ANSWER'"),
    ("too long", ROW.replace("1+1", "1+" * 99 + "1").encode(), "window of 128"), ("5 MB", ROW.replace("1+1", "1+" * 2_500_000 + "1").encode(), "window of 128"),
    ("deep", b"[" * 100_000, "not JSON"), ("a string", b'"text"', "line 1: is not a JSON object"), ("yaml", b"problem: 1+1", "line 1: is not JSON"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, message", BAD_DATA, ids=[name for name, _, _ in BAD_DATA])
def test_bad_data_is_one_clear_line(chat, tmp_path, name, content, message):
    """Fails if a malformed file gives a traceback, or a message without file, place and field."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(sd.Refusal) as refusal:
        sd.load_problems(config(data=str(path), test_problems=5), chat)
    assert message in str(refusal.value) and str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_good_data_in_every_dress_is_read(chat, tmp_path):
    """Fails on a byte-order mark, Windows line ends, an array, a number as answer, GSM8K's fields, or a skipped bad row."""
    rows = [{"problem": f"{i}+1", "solution": "s", "answer": i + 1} for i in range(8)] + [
        {"question": "9+1", "answer": "9+1 #### 10"}
    ]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    for text in ("\ufeff" + lines, json.dumps(rows), lines + "\r\n{}\r\n"):
        (tmp_path / "d.json").write_bytes(text.encode())
        cfg = config(data=str(tmp_path / "d.json"), test_problems=2, validation_problems=2, skip_bad_rows="{}" in text)
        split = sd.load_problems(cfg, chat)
        assert len(split.train) == 5 and split.dropped["bad"] == int("{}" in text)
        assert "10" in [p.answer for part in split[:3] for p in part]


def test_the_split_is_disjoint_and_moves_with_neither_order_nor_seed(chat, tmp_path):
    """Fails if a test problem can be trained on after the file is shuffled, extended by duplicates, or the seed changed."""
    rows = [json.dumps({"problem": f"{i}+{i}", "solution": "s", "answer": "1"}) for i in range(40)]
    splits = []
    for k, order in enumerate((rows, rows[::-1] + rows[:7])):
        (tmp_path / "d.jsonl").write_text("\n".join(order))
        splits.append(
            sd.load_problems(
                config(data=str(tmp_path / "d.jsonl"), test_problems=10, validation_problems=5, seed=k), chat
            )
        )
    assert splits[0][:3] == splits[1][:3] and splits[1].dropped["duplicate"] == 7
    texts = [p.question for part in splits[0][:3] for p in part]
    assert len(texts) == len(set(texts)) == 40


def test_every_epoch_visits_every_problem_once():
    """Fails if a resumed or a new epoch repeats or skips a problem (24)."""
    problems = [sd.Problem(str(i), "", "") for i in range(10)]
    cfg = config(condition="reference", attempts_per_step=4)
    seen = [p.question for step in range(5) for _, p in sd.next_problems(problems, 4 * step, cfg)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.question for p in problems) and seen[:10] != seen[10:]
    assert [p.question for _, p in sd.next_problems(problems, 0, replace(cfg, attempts_per_step=20))] == seen
    grouped = sd.next_problems(problems, 0, config(condition="grpo", attempts_per_step=4, group_size=2))
    assert [place for place, _ in grouped] == [0, 1]


# ---- the toy world


def test_toy_examples_are_right():
    """Fails if a solution is wrong, the misconception is missing, a critique changes the attempt's surface, or a reader
    who slipped goes on with the solution's numbers instead of the own."""
    language, solved = make.ToyLanguage(seed=0), 0
    follows = lambda step: (
        (int(step[1]) + int(step[3]) if step[2] == "+" else int(step[1]) * int(step[3])) % 10 == int(step[5])
    )
    for _ in range(300):
        row = language.row(language.problem())
        assert sd.is_correct(row["solution"], row["answer"]) and all(
            map(follows, critic_prompts.toy_find(row["solution"]))
        )
        solved += sd.is_correct(language.example("solve", row["problem"])[2], row["answer"])
        messages, given, critique = language.example("criticise", row["problem"])
        mark, own = messages[0]["content"][0], messages[0]["content"].split("|")[1]
        assert sd.is_correct(critique, row["answer"]) and critic_prompts.toy_trace(critique) == critique and not given
        assert ("!" in critique) <= (mark == "!") and (len(critique) < len(own)) <= (mark == "~")
        if mark == "?":
            surface = lambda text: [(step[0], step[2]) for step in critic_prompts.toy_find(text)]
            assert surface(critique) == surface(own) and (critique == own) == all(
                map(follows, critic_prompts.toy_find(own))
            )
        messages, given, reply = language.example("follow", row["problem"])
        chain = critic_prompts.toy_find(given + reply)
        assert sd.is_correct(given + reply, row["answer"]) or given
        assert all(a[5] in (b[1], b[3]) for a, b in zip(chain, chain[1:]))
    assert 30 < solved < 90  # about 20 %


def test_the_toy_critic_is_a_model_that_mends_what_it_reads(tmp_path):
    """After a short pre-training already. Fails if critic, follower and solver prompts differ from the loop's."""
    make.make(tmp_path, steps=200)
    chat = sd.load_model(str(tmp_path))
    cfg = config(data=str(tmp_path / "problems.jsonl"), max_new_tokens=40, temperature=1.0)
    rollouts = sd.attempt(chat, list(enumerate(sd.load_problems(cfg, chat).test)), cfg)
    critiques, _ = sd.query_critic(rollouts, sd.LocalCritic(chat, 80, 1024), cfg)
    right = np.mean([c is not None and sd.is_correct(c, r.problem.answer) for r, c in zip(rollouts, critiques)])
    solved = np.mean([r.reward for r in rollouts])
    assert solved < 0.55 and right > solved + 0.3


# ---- command line, log, resume


def run_in(tmp_path, folder, *flags) -> int:
    """A short run of sd.py's main on the tiny model, in tmp_path/run."""
    common = ["--preset", "toy", "--model", str(folder), "--data", str(folder / "problems.jsonl"), "--out", str(tmp_path / "run"),
              "--test-problems", "5", "--validation-problems", "4", "--final-problems", "2", "--eval-samples", "2", "--lora-rank", "4",
              "--lora-alpha", "8", "--attempts-per-step", "4", "--group-size", "2", "--max-new-tokens", "12"]  # fmt: skip
    return sd.main([*common, *flags])


# the same in a process of its own
RUN_IN = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_sd, pathlib; sys.exit(test_sd.run_in(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:]))"


def log_of(path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cost", "config")} for line in lines]


@pytest.mark.parametrize("condition", ["reference", "grpo"])
def test_a_resumed_run_logs_the_same_numbers_as_an_uninterrupted_one(tmp_path, folder, condition):
    """Bit for bit. Fails if optimiser, random numbers or the position in the data are not restored (24), or if a step
    that was logged after the checkpoint stays in the log twice."""
    flags = ["--condition", condition, "--save-every", "2", "--eval-every", "3", "--show-every", "2"]
    assert run_in(tmp_path / "a", folder, *flags, "--steps", "7") == 0
    assert run_in(tmp_path / "b", folder, *flags, "--steps", "4") == 0
    with open(tmp_path / "b/run/log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0, "cost": {}}\n{"step": 6, "cost": {}')  # a kill in the middle of step 6
    assert run_in(tmp_path / "b", folder, *flags, "--steps", "7", "--resume") == 0
    assert log_of(tmp_path / "a/run") == log_of(tmp_path / "b/run")
    a, b = (sd.load_checkpoint(tmp_path / x / "run/checkpoint.pt") for x in "ab")
    assert_same(a["adapters"], b["adapters"], atol=0, rtol=0)
    assert len([line for line in log_of(tmp_path / "a/run") if "loss" in line]) == 7


def test_kill_9_at_20_random_moments_loses_nothing(tmp_path, folder):
    """A checkpoint a step, so that many a kill falls into its writing. Fails if checkpoint or log can be left half written,
    or a resumed step draws other numbers. The processes are forked from one that has imported all, which saves a minute."""
    flags = ["--condition", "reference", "--save-every", "1", "--show-every", "0"]
    log, rng, server = tmp_path / "run/log.jsonl", random.Random(0), multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3", "torch._dynamo"])
    for kill in range(20):
        size = log.stat().st_size if log.exists() else 0
        resume = ["--resume"] if (tmp_path / "run/checkpoint.pt").exists() else []
        child = server.Process(target=run_in, args=(tmp_path, folder, *flags, "--steps", "9999", *resume))
        child.start()
        while not log.exists() or log.stat().st_size <= size:  # it has begun to write
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        child.kill()
        child.join()
    step = sd.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"]
    assert run_in(tmp_path, folder, *flags, "--resume", "--steps", str(step + 1)) == 0
    assert run_in(tmp_path / "whole", folder, *flags, "--steps", str(step + 1)) == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole/run")
    a, b = (sd.load_checkpoint(path / "run/checkpoint.pt")["adapters"] for path in (tmp_path, tmp_path / "whole"))
    assert_same(a, b, atol=0, rtol=0)


def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path, folder, monkeypatch):
    """Fails if an interrupt loses the step in flight, or leaves the checkpoint behind the log."""
    real, calls = sd.take_step, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(sd, "take_step", interrupting)
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "9") == 130
    assert sd.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 3 == log_of(tmp_path / "run")[-1]["step"]


def press_twice(tmp_path, folder):
    """A run whose first step is interrupted twice and would take a minute."""

    def hanging(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    sd.take_step = hanging
    run_in(tmp_path, folder, "--condition", "grpo", "--steps", "9")


def test_a_second_ctrl_c_stops_at_once(tmp_path, folder):
    """Fails if it too waits for the step, or leaves no checkpoint to go on from."""
    child = multiprocessing.get_context("forkserver").Process(target=press_twice, args=(tmp_path, folder))
    child.start()
    child.join(50)
    assert child.exitcode == -signal.SIGINT
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1", "--resume") == 0


def test_a_run_can_go_on_from_its_first_moment(tmp_path, folder, monkeypatch):
    """Out of memory in step 1, say. Fails if the advice to add --resume finds no checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(sd, "take_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "2") == 1
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "2", "--resume", "--micro-batch", "1") == 0
    assert log_of(tmp_path / "run")[-1]["step"] == 2


def test_a_critic_that_only_fails_stops_the_run_with_its_checkpoint(tmp_path, folder, capsys):
    """The tiny model writes no critiques. Fails if such a run goes on, silently, without training."""
    assert run_in(tmp_path, folder, "--condition", "critique", "--steps", "9") == 2
    out = capsys.readouterr()
    assert "every critique failed" in out.err and "WARNING" in out.out
    assert sd.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 3


def test_a_second_run_moves_the_first_aside(tmp_path, folder):
    """Fails if starting again overwrites a finished run."""
    for _ in range(2):
        assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    assert (tmp_path / "run/checkpoint.pt").exists() and (tmp_path / "run.1/checkpoint.pt").exists()


def test_two_runs_share_no_folder(tmp_path, folder, capfd):
    """Fails if a second run moves a live one aside, or writes into its log."""
    flags = ["--condition", "grpo", "--steps", "1"]
    assert run_in(tmp_path, folder, *flags) == 0
    live = sd.claim(tmp_path / "run")
    for more in ([], ["--resume"]):
        assert run_in(tmp_path, folder, *flags, *more) == 2 and "another run" in capfd.readouterr().err
    live.close()
    assert os.listdir(tmp_path) == ["run"] and run_in(tmp_path, folder, *flags, "--resume") == 0
    (tmp_path / "killed at once/run").mkdir(parents=True)
    (tmp_path / "killed at once/run/.lock").touch()
    assert run_in(tmp_path / "killed at once", folder, *flags) == 0


def test_a_run_without_room_for_a_context_says_so_and_goes_on_with_more(tmp_path, folder, capfd):
    """Fails if the critic is blamed where nobody asked one, or the mend that the message names is refused."""
    flags = ["--condition", "reference", "--steps", "4"]
    assert run_in(tmp_path, folder, *flags, "--max-prompt-tokens", "5") == 2
    error = capfd.readouterr().err
    assert "--max-prompt-tokens" in error and "critic" not in error
    assert run_in(tmp_path, folder, *flags, "--max-prompt-tokens", "0", "--resume") == 0
    assert [line["scored"] for line in log_of(tmp_path / "run") if "scored" in line] == [0, 0, 0, 4]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, folder, capfd):
    """Fails if --out moves aside, or fills, somebody's other folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    assert (
        run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 2
        and "no run folder" in capfd.readouterr().err
    )
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["thesis.tex"]


@pytest.mark.parametrize("flags, words", [
    (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"), (["--lr", "inf"], "--lr"), (["--lr", "x"], "--lr"),
    (["--kl", "backward"], "--kl"), (["--model", "/nowhere"], "/nowhere"), (["--model", "no/such-model"], "no/such-model"),
    (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"), (["--data", "hub:a/b/c.json", "--preset", "toy"], "hub:a/b/c.json"), (["--steps", "-1"], "--steps"),
    (["--condition", "grpo", "--attempts-per-step", "9"], "--group-size"), (["--nonsense"], "--nonsense"), (["--critic", "http://x/v1"], "--critic-model"),
    (["--resume", "--out", "/nowhere"], "/nowhere"), (["--eval-every", "1", "--validation-problems", "0"], "--validation-problems"), (["--preset", "big"], "--preset"), (["--device", "cud"], "--device"), (["--group-size", "1"], "--group-size"),
])  # fmt: skip
def test_a_wrong_value_is_one_line_and_exit_2(flags, words, capfd, tmp_path, monkeypatch):
    """Fails if a mistake ends in a traceback, a usage text, or a run with another value than asked for."""
    monkeypatch.setattr(sd, "hub_answers", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert sd.main(["--condition", "critique", *flags]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and words in error and error.startswith("sd.py: ")


def test_resume_refuses_another_config(tmp_path, folder, capfd):
    """Fails if a run silently goes on with a flag that changes its numbers."""
    run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1")
    assert run_in(tmp_path, folder, "--condition", "grpo", "--resume", "--steps", "2", "--lr", "0.5") == 2
    assert "lr" in capfd.readouterr().err


def test_help_names_every_knob_with_its_default(capsys):
    """Fails if a knob is added beside the Config, or the help outgrows two screens."""
    with pytest.raises(SystemExit) as stop:
        sd.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("\n") <= 60
    for name in ("condition preset model data critic kl steps attempts-per-step group-size seed lr max-new-tokens temperature "
                 "lora-rank micro-batch save-every eval-every out resume").split():  # fmt: skip
        assert f"--{name} " in text or f"--{name}," in text


# ---- safe: what can fail, fails with one line and an intact checkpoint


def torchrun(tmp_path, *arguments) -> list[str]:
    """The command that runs run_in(*arguments) in two processes."""
    (tmp_path / "run.py").write_text(RUN_IN)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*two, str(tmp_path / "run.py"), *map(str, arguments)]


def test_two_processes_take_the_same_steps_as_one(tmp_path, folder):
    """Under torchrun on gloo. Fails if a process draws other random numbers, divides by its own token count, sees other
    rewards in its groups, or its gradient is left out; equal up to the order of float32 sums."""
    for condition in ("grpo", "reference"):
        flags = [str(folder), "--condition", condition, "--steps", "3", "--eval-every", "2", "--show-every", "1"]
        one, two = tmp_path / f"{condition}1", tmp_path / f"{condition}2"
        assert run_in(one, folder, *flags[1:]) == 0
        done = subprocess.run(torchrun(tmp_path, two, *flags), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("step    2/3") == 1
        for a, b in zip(log_of(one / "run"), log_of(two / "run"), strict=True):
            assert a.keys() == b.keys()
            assert all(
                a[k] == b[k] if isinstance(a[k], (str, dict)) else a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6)
                for k in a
            )
        a, b = (sd.load_checkpoint(run / "run/checkpoint.pt") for run in (one, two))
        assert_same(a["adapters"], b["adapters"], atol=1e-4, rtol=1e-4)
    assert run_in(two, folder, "--condition", "reference", "--resume", "--steps", "4") == 0  # with one process


def test_ctrl_c_under_torchrun_saves_the_same_step_everywhere(tmp_path, folder):
    """Fails if the step in flight is lost, if one process stops without the other, or if the run can't go on."""
    flags = ["--condition", "grpo", "--show-every", "0", "--save-every", "0", "--final-problems", "0"]
    with subprocess.Popen(
        torchrun(tmp_path, tmp_path, str(folder), *flags, "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        next(line for line in job.stdout if "step    2/" in line)
        os.killpg(job.pid, signal.SIGINT)
        out, err = job.communicate(timeout=120)
    steps = log_of(tmp_path / "run")[-1]["step"]
    assert job.returncode != 0 and "finishing this step" in err
    assert sd.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == steps >= 2
    assert run_in(tmp_path, folder, *flags, "--resume", "--steps", str(steps + 1)) == 0


def test_a_dead_critic_server_is_passed_over_and_loses_nothing(server):
    """Fails if its requests are lost, wait for it, or all go to one server."""
    dead, alive = "http://127.0.0.1:9/v1", f"http://127.0.0.1:{server.server_address[1]}/v1"
    critic = sd.HTTPCritic([dead, alive], "good", max_new_tokens=9, parallel=4, timeout=1.0, pause=0.01)
    assert all(reply.text for reply in critic([[critic_prompts.user(str(i))] for i in range(20)]))
    assert len(server.calls) == 20 and critic.back[dead] > 0 == critic.back[alive]
    both = sd.HTTPCritic([alive, alive.replace("127.0.0.1", "localhost")], "good", 9, parallel=1, timeout=1.0)
    both([[critic_prompts.user("x")]] * 4)
    assert next(both.turn) == 4


def test_a_critic_server_that_is_killed_half_way_costs_no_step(tmp_path, folder, server, monkeypatch):
    """Two servers, one shut down in mid-run. Fails if a critique of the later steps is lost."""
    second = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    second.calls = []
    threading.Thread(target=second.serve_forever, args=(0.01,), daemon=True).start()
    real = sd.take_step

    def killing(run, *arguments):
        if run.step == 2:
            second.shutdown()
            second.server_close()
        return real(run, *arguments)

    monkeypatch.setattr(sd, "take_step", killing)
    urls = ",".join(f"http://127.0.0.1:{s.server_address[1]}/v1" for s in (server, second))
    flags = ["--critic", urls, "--critic-model", "good", "--steps", "4", "--show-every", "0"]
    assert run_in(tmp_path, folder, "--condition", "critique", *flags) == 0
    assert [line["scored"] for line in log_of(tmp_path / "run") if "scored" in line] == [4] * 4
    assert second.calls and len(server.calls) + len(second.calls) == 16


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, folder, monkeypatch):
    """Fails if evaluations without a new best are not counted, or the count is lost on resume; best.pt stays the best."""
    scores = iter([0.2, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4])
    monkeypatch.setattr(sd, "evaluate", lambda *_: None)
    monkeypatch.setattr(sd, "scores", lambda _: {"Avg": np.array([next(scores)])})
    flags = ["--condition", "grpo", "--eval-every", "1", "--patience", "3", "--final-problems", "0"]
    assert run_in(tmp_path, folder, *flags, "--steps", "3") == 0
    assert run_in(tmp_path, folder, *flags, "--steps", "9", "--resume") == 0
    best, last = (sd.load_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "checkpoint.pt"))
    assert (best["step"], best["best"], last["step"], last["stale"]) == (2, 0.5, 5, 3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update_and_names_step_and_row(tmp_path, folder, monkeypatch, capfd, where):
    """Fails if a NaN reaches the adapters, or the message names neither the row nor the way on."""
    real = sd.response_hidden

    def poisoned(chat, prompts, responses):
        hidden = real(chat, prompts, responses)
        if chat.model.training and hidden.requires_grad and len(poisoned.calls) >= 2:
            start = sum(map(len, responses[:-1]))
            nan = torch.full_like(hidden[start:], math.nan)
            hidden = torch.cat([hidden[:start], nan if where == "loss" else hidden[start:]])
            if where == "gradient":
                hidden.register_hook(lambda g: torch.cat([g[:start], nan]))
        poisoned.calls.append(1)
        return hidden

    poisoned.calls = []
    monkeypatch.setattr(sd, "response_hidden", poisoned)
    assert (
        run_in(tmp_path, folder, "--condition", "grpo", "--steps", "4", "--save-every", "1", "--show-every", "0") == 1
    )
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "step 3, row" in error and "last checkpoint is finite" in error
    state = sd.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert state["step"] == 2 and all(p.isfinite().all() for p in state["adapters"].values())


def test_nan_logits_stop_the_sampler(chat):
    """Fails if NaN logits, greedy or not, are drawn from as if they were a distribution."""
    with torch.no_grad():
        chat.head[5] = math.nan
    for noise in (None, uniforms(2, 4)):
        with pytest.raises(FloatingPointError, match="row 0"):
            sd.generate(chat, [[1, 5, 2]] * 2, 4, uniforms=noise)


@pytest.mark.parametrize("number, written", [(errno.ENOSPC, 0.5), (errno.EROFS, 0.0)])
def test_a_full_or_read_only_disk_leaves_the_last_checkpoint(tmp_path, folder, monkeypatch, capfd, number, written):
    """Half of the file is written, then the disk is full; or it turned read-only. Fails if the old checkpoint is touched, or
    a traceback shows."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "2") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    write = Path.write_bytes

    def failing(path, content):
        if not path.name.startswith("checkpoint"):
            return write(path, content)
        if written:
            with open(path, "wb") as file:
                file.write(content[: int(len(content) * written)])
        raise OSError(number, os.strerror(number), str(path))

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "3", "--resume") == 1
    error = capfd.readouterr().err
    assert os.strerror(number) in error and error.count("\n") == 1
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "3", "--resume") == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_read_only_folder_is_one_line(folder, capfd):
    """Fails if a run that can't be kept ends in a traceback, or starts to train."""
    assert run_in(Path("/proc"), folder, "--condition", "grpo", "--steps", "1") == 1
    out = capfd.readouterr()
    assert "/proc/run" in out.err and out.err.count("\n") == 1 and "step" not in out.out


@pytest.mark.parametrize("change", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    lambda b: b.replace(b"temperature", b"temporature"), lambda b: b.replace(b"critic_style", b"critic_stile"),
])  # fmt: skip
def test_a_broken_checkpoint_is_one_line(tmp_path, folder, capfd, change):
    """Cut off, empty, a pickle that runs code, and another version's. Fails on a traceback, or if code in it runs."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(change(path.read_bytes()))
    capfd.readouterr()
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "2", "--resume") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "train the run anew" in error and not Path("/tmp/owned").exists()


@pytest.mark.parametrize("name, value", [("adapters", [1]), ("adapters", {"x": "y"}), ("seen", "a"), ("best", None)])
def test_a_checkpoint_of_other_things_is_one_line(tmp_path, folder, capfd, name, value):
    """Fails if what is no number, or no tensor, gets as far as the first step."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    path = tmp_path / "run/checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    capfd.readouterr()
    assert evaluation.main([str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "not a checkpoint" in error


def test_a_fault_that_may_pass_gives_no_run_up(tmp_path, folder, capfd, monkeypatch):
    """Fails if a checkpoint that can't be read just now is called broken."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError("not yours")))
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "2", "--resume") == 1
    error = capfd.readouterr().err
    assert "not yours" in error and "anew" not in error


def tamper(path: Path, **changes) -> None:
    """Changes the config in a checkpoint."""
    state = torch.load(path, weights_only=True)
    state["config"] |= changes
    torch.save(state, path)


@pytest.mark.parametrize("field, value", [("temperature", -1.0), ("kl", "../secret"), ("lora_rank", "4")])
def test_a_checkpoints_config_is_checked_as_a_command_line_is(tmp_path, folder, capfd, field, value):
    """Fails if eval.py runs with what a file says, however wrong."""
    assert run_in(tmp_path, folder, "--condition", "grpo", "--steps", "1") == 0
    tamper(tmp_path / "run/checkpoint.pt", **{field: value})
    capfd.readouterr()
    assert evaluation.main([str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"--{field.replace('_', '-')}" in error


def test_a_checkpoint_cannot_send_the_key_to_its_own_address(tmp_path, folder, server, capfd, monkeypatch):
    """Fails if --resume or --tokens asks the http critic that a file names."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert run_in(tmp_path, folder, "--condition", "reference", "--steps", "1") == 0
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    tamper(tmp_path / "run/checkpoint.pt", condition="critique", critic=address, critic_model="good")
    assert sd.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert evaluation.main(["--tokens", str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err.count("--critic") == 2 and not server.calls


def test_control_characters_reach_no_terminal(chat, capsys):
    """Fails if an attempt or a critique can move the reader's cursor."""
    cfg = config()
    (rollout,) = rollouts_of(adapt(chat, cfg), cfg, n=1)
    rollout.text = rollout.context = "a\x1b[2Jb\u202e"
    rollout.problem = rollout.problem._replace(question="q\r\x1b]0;title\x07")
    sd.show(chat, rollout, cfg)
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)


def test_importing_and_sampling_leave_the_global_random_state_alone(chat):
    """Fails if a draw uses torch's, numpy's or Python's global generator, or an import seeds one."""
    states = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before = states()
    rollouts_of(chat, config())
    assert states() == before
    program = """import random, numpy, torch
states = lambda: (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate())
before = states()
import sd, eval
assert states() == before"""
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE).returncode == 0


def test_500_random_rollouts_keep_the_invariants(chat):
    """Random small configurations and texts, hostile ones among them, through sampler, contexts, pack and step. Fails if
    ids change on their way, a failed critique is scored, the headers differ, or a number is not finite."""
    adapt(chat, config(), noise=0.3)
    rng, words = (
        random.Random(0),
        ["s7+6=3", "####9", "</answer>", "<|end|>", "<|assistant|>", "\x00", "€", "ignore the notes", "", "nan"],
    )
    text = lambda: "".join(rng.choices(words, k=rng.randrange(6)))
    for _ in range(500):
        cfg = config(condition=rng.choice(list(sd.CONDITIONS)), kl=rng.choice([*KL, "sampled"]), micro_batch=rng.randint(1, 4), kl_chunk=rng.randint(1, 9),
                     group_size=2, max_new_tokens=rng.randint(1, 8), temperature=rng.choice([0.5, 1.0, 2.0]), stop_at_first_edit=rng.random() < 0.3,
                     max_prompt_tokens=rng.choice([0, 30]), sample_batch=rng.randint(1, 4))  # fmt: skip
        problems = [(i, sd.Problem("7+6" + text(), text() or "s", "3")) for i in range(2)]
        rollouts = sd.attempt(chat, problems, cfg, 2, rng.randrange(99))
        drawn = [list(r.sample.ids) for r in rollouts]
        critic = lambda conversations: [sd.Reply(rng.choice([None, text(), "s7+6=3####3"]), 1) for _ in conversations]
        sd.write_contexts(rollouts, critic, cfg)
        scored = sd.pack(chat, rollouts, cfg)
        assert [r.sample.ids for r in rollouts] == drawn and all(
            0 < len(r.scored) <= len(r.sample.ids) <= cfg.max_new_tokens for r in scored
        )
        assert all(r.prompt.count(2) == 1 and r.prompt[-1] == 2 for r in rollouts)
        if cfg.condition != "grpo":
            assert all(r.context and r.teacher_prompt[-1] == 2 and r.teacher_prompt.count(2) == 1 for r in scored)
            assert all(len(r.teacher_prompt) <= (cfg.max_prompt_tokens or 128) for r in scored)
        step = sd.train_step(chat, torch.optim.SGD(sd.adapters(chat.model).values(), lr=0.01), scored, cfg)
        assert all(map(math.isfinite, step.values())) and (
            step["kl"] >= -1e-5 or cfg.kl == "sampled" or cfg.condition == "grpo"
        )


# ---- README


def test_the_readmes_step_by_hand_runs(capsys):
    """Fails if the block on the README's page no longer fits the code."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)[1]
    assert block.count("\n") <= 26
    exec(block, {})
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': ([\d.e-]+)", printed)]
    assert len(losses) == 3 and losses[2] < losses[0] and re.search(r"critique [sth]\d", printed)


def test_the_readme_names_only_flags_and_functions_that_exist(capsys):
    """Fails if a flag or a function of the README was renamed in the code."""
    readme = (HERE / "README.md").read_text("utf-8")
    for main in (sd.main, evaluation.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    ours = (
        readme[: readme.index("## When one GPU")] + readme[readme.index("## The log") :]
    )  # between them: others' flags
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known
    for name in re.findall(r"^\| \(\d\).*\| (.*) \|$", readme, re.MULTILINE):
        assert all(hasattr(sd, function) for function in re.findall(r"`(\w+)`", name))
    assert any("python sd.py" in line for line in readme.splitlines()[:30])


# ---- eval


def test_pass_at_k_and_maj_at_k_equal_numbers_worked_by_hand():
    """Fails if Pass@k is the biased 1 − (1 − c/n)^k, or a tie goes to whoever came first."""
    assert (
        sd.pass_at_k(4, 1, 2) == pytest.approx(0.5)
        and sd.pass_at_k(4, 0, 4) == 0
        and sd.pass_at_k(4, 1, 4) == 1
    )
    vote = lambda *answers: sd.maj_at_k([{"answer": a, "correct": a in ("1", "1.0")} for a in answers])
    assert (
        vote("1", "2", "1.0") == 1
        and vote("1", "2") == 0.5
        and vote("2", "2", "1") == 0
        and vote(None, None, "1") == 1
        and vote(None) == 0
    )


def test_intervals_cover_and_repeat():
    """Fails if the bootstrap is unseeded, or resamples attempts instead of problems."""
    values = np.random.default_rng(1).random(200)
    low, high = sd.interval(values)
    error = values.std() / math.sqrt(200)
    assert (low, high) == sd.interval(values)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1) and low < values.mean() < high
    one = [{"correct": value > 0.5, "answer": "1", "length": 1, "truncated": False} for value in values]
    once, twelve = ([[a] * n for a in one] for n in (1, 12))
    assert sd.interval(sd.scores(once)["Avg"]) == sd.interval(sd.scores(twelve)["Avg"])


def test_eval_compares_runs_with_their_base_and_repeats_to_the_digit(tmp_path, folder, capsys):
    """Fails if base and run see other problems or seeds: an untrained run must equal the base exactly."""
    run_in(tmp_path, folder, "--condition", "grpo", "--steps", "0")
    (tmp_path / "run").rename(tmp_path / "untrained")
    run_in(tmp_path, folder, "--condition", "reference", "--steps", "2", "--lr", "0.1")
    capsys.readouterr()
    arguments = [str(tmp_path / "untrained"), str(tmp_path / "run"), "--samples", "3"]
    assert evaluation.main(arguments) == 0
    first = capsys.readouterr().out
    assert evaluation.main(arguments) == 0 and capsys.readouterr().out == first
    cells = {line.split("|")[1].strip(): line.split("|")[2:] for line in first.splitlines() if line.startswith("| ")}
    assert cells["base"] == cells["untrained"] != cells["run"]
    assert all(cell.strip().replace("-", "") == "0.0 [0.0, 0.0]" for cell in cells["untrained − base"][:-1])
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 5 * 3 and set(rows[0]) == {
        "run",
        "problem",
        "wanted",
        "text",
        "answer",
        "correct",
        "length",
        "truncated",
    }
    assert first.strip() == (tmp_path / "eval.md").read_text().strip()


def toy_rollout(chat, problem, text, answer):
    ids = chat.tokenizer(text)["input_ids"] + [0]
    prompt = chat.encode(critic_prompts.FORMATS["toy"].student(problem))
    return sd.Rollout(
        sd.Problem(problem, "", answer), prompt, sd.Sample(ids, False, 0.0), text, float(sd.is_correct(text, answer))
    )


@pytest.mark.parametrize("critique, place", [
    ("s7+6=3s3*3=9s9+1=0####0", (6, 12, 11)), ("s7+6=3t3*3=9s9+1=0####0", (6, 12, 6)), ("s7+6=4s", (0, 6, 5)),
    ("s7+6=3s3*3=6s6+1=7####8", (18, 21, 19)), ("", (0, 6, 0)),
])  # fmt: skip
def test_the_first_wrong_step_is_the_one_in_which_the_critique_departs(chat, critique, place):
    """Fails if a step's bounds are off by a token, or an edit in the answer is blamed on the last step."""
    rollout = toy_rollout(chat, "7+6*3+1", "s7+6=3s3*3=6s6+1=7####7", "0")
    assert evaluation.wrong_step(chat, rollout, critique, critic_prompts.FORMATS["toy"]) == place


def test_a_text_without_steps_counts_its_lines(chat):
    """Fails if an attempt in free text, as weak models write, breaks the localisation."""
    plain = critic_prompts.FORMATS["steps"]
    rollout = toy_rollout(chat, "7", "12345", "0")
    assert evaluation.wrong_step(chat, rollout, "129", plain) == (0, 6, 2)


def test_localisation_equals_numbers_worked_by_hand(chat):
    """Fails if positive advantage is counted as negative, right and wrong attempts mix, or shares are means of shares."""
    wrong = toy_rollout(chat, "7", "s7+6=3####3", "4")
    right = toy_rollout(chat, "7", "s7+6=3####3", "3")
    a = [np.array([-1.0, 5.0, -3.0, -4.0]), np.array([0.5, -0.5, 0.0, -1.0]), np.array([-8.0, 0, 0, 0]), None]
    places = [(1, 3, 2), None, (0, 1, 0), None]
    got = {k: v["value"] for k, v in evaluation.localise([wrong, right, wrong, wrong], 2, a, places).items()}
    assert list(got.values()) == pytest.approx([1 / 16, 11 / 16, 4 / 16, 0.5, 0.5, -1.0])


def test_the_page_shows_what_a_model_wrote_as_text():
    """Fails if a response can run a script in the reader's browser, or an escape code reaches the terminal."""
    evil = "<script>alert('x')</script>\x1b[2J"
    row = {"advantage": [-1.0, 2.0], "context": evil, "teacher": [evil, evil]}
    e = {"problem": evil, "answer": evil, "right": False, "tokens": [evil, "b"], "edit": 0, "rows": {evil: row}}
    text = evaluation.page([e], evil)
    assert "<script" not in text and "&lt;script&gt;" in text and 'class="n e"' in text and "http" not in text
    assert "\x1b[2J" not in evaluation.terminal({**e, "rows": {"critique": row}})


def test_tokens_runs_on_a_trained_toy(tmp_path, monkeypatch, capsys):
    """The whole study. Fails if a context's advantage is that of another, or critique and
    reference do not differ where the paper says they do."""
    monkeypatch.chdir(tmp_path)
    assert sd.main(["--preset", "toy", "--steps", "0", "--final-problems", "0"]) == 0
    assert evaluation.main(["--tokens", "runs/critique", "--problems", "20"]) == 0
    first = capsys.readouterr().out
    assert evaluation.main(["--tokens", "runs/critique", "--problems", "20"]) == 0
    assert capsys.readouterr().out in first
    numbers = json.loads((tmp_path / "runs/critique/tokens.json").read_text())["numbers"]
    before = {name: row["wrong: negative A before the first wrong step"] for name, row in numbers.items()}
    assert before["critique (copy)"]["high"] < before["reference"]["low"]
    assert set(before) == {"critique (copy)", "critique (quote)", "critique (omit)", "reference"}


def test_reproduce_goes_on_where_it_stopped_and_repeats_to_the_digit(folder, tmp_path, monkeypatch, capsys):
    """Fails if a finished run is trained again, or the table depends on when it was made."""
    monkeypatch.setattr(
        evaluation, "ARMS", {k: v for k, v in evaluation.ARMS.items() if k in ("grpo", "reference", "critique")}
    )
    monkeypatch.setitem(
        evaluation.ARMS, "critique", ["--condition", "reference", "--temperature", "0.9"]
    )  # the tiny model is no critic
    flags = ["--reproduce", "--seeds", "2", "--out", str(tmp_path / "r"), "--", "--preset", "toy", "--model", str(folder), "--data", str(folder / "problems.jsonl"),
             "--steps", "2", "--test-problems", "5", "--validation-problems", "4", "--eval-samples", "2", "--lora-rank", "4", "--attempts-per-step", "4",
             "--group-size", "2", "--max-new-tokens", "12"]  # fmt: skip
    assert evaluation.main(flags) == 0
    first = (tmp_path / "r/table.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(sd, "train", lambda cfg: pytest.fail("trained again"))
        for kept in (tmp_path / "r").rglob("test-*.json"):
            kept.unlink()
        assert evaluation.main(flags) == 0 and (tmp_path / "r/table.md").read_text() == first
        patch.setattr(sd, "main", lambda command: 130)
        longer = [
            {"2": "3"}.get(flag, flag) if before == "--steps" else flag for before, flag in zip(["", *flags], flags)
        ]
        assert evaluation.main(longer) == 130  # Ctrl-C passes through
    assert evaluation.main(longer) == 0 and (tmp_path / "r/table.md").read_text() != first
    assert evaluation.main([*longer, "--temperature", "0.5"]) == 2 and "another temperature" in capsys.readouterr().err
    assert len(list((tmp_path / "r").glob("*-seed1"))) == 3 and "| critique − grpo |" in first and "nan" not in first
    for other, words in ((["--critic", str(folder)], "another critic"), (["--eval-every", "1", "--patience", "2"], "drop --patience"), (["--steps", "2"], "3 steps already")):
        assert evaluation.main([*longer, *other]) == 2 and words in capsys.readouterr().err
    assert evaluation.main(["--reproduce", "--seeds", "0"]) == 2 and "--seeds" in capsys.readouterr().err


def test_filter_keeps_what_is_seldom_solved_and_resumes(folder, tmp_path, monkeypatch, capsys):
    """Fails if never-solved or often-solved problems are kept, a row is changed, or a second call samples again."""
    rows = [{"problem": f"{i}+1", "solution": "s", "answer": "1", "extra": f"{i}\ud800"} for i in range(6)]
    pool, out = tmp_path / "pool.jsonl", tmp_path / "hard.jsonl"
    pool.write_text("\n".join(map(json.dumps, [*rows, rows[0], {"problem": ""}])))
    solved, asked = {"0+1": 0, "1+1": 1, "2+1": 1, "3+1": 2, "4+1": 4, "5+1": 0}, []

    def evaluate(chat, problems, cfg, numbers):
        # a problem's draws are its own, whatever else is left to do
        assert [p.question for p in problems] == [f"{i}+1" for i in numbers]
        asked.extend(problems)
        return [[{"correct": k < solved[p.question]} for k in range(cfg.eval_samples)] for p in problems]

    monkeypatch.setattr(sd, "evaluate", evaluate)
    own, passed = (
        ["--filter", str(pool), "--out", str(out), "--samples", "4"],
        ["--preset", "toy", "--model", str(folder), "--max-new-tokens", "12"],
    )
    assert evaluation.main([*own, "--", *passed]) == 2 and "line 8" in capsys.readouterr().err
    for _ in range(2):
        assert evaluation.main([*own, "--", *passed, "--skip-bad-rows"]) == 0
        assert [json.loads(line) for line in out.read_text().splitlines()] == rows[1:3]
        assert "1 duplicate, 0 without a solution, 1 bad, 2 never solved, 2 solved 0.3125" in capsys.readouterr().out
    assert len(asked) == 6


# ---- benchmark: python test_sd.py [FOLDER OF A REAL MODEL]
#
# Ratios of forms that are timed in turn in this very run, median of 5 or more rounds; peak memory of each in a process of its own.

SHAPES = {
    "2,048 × 576 × 49,152": (2048, 576, 49_152, 128),
    "512 × 2,048 × 151,936": (512, 2048, 151_936, 64),
}  # N, D, V, chunk
HALF = {
    "N halved": (1024, 576, 49_152, 128),
    "V halved, twice the rows a chunk": (2048, 576, 24_576, 256),
}  # of the first


def loss_job(form: str, shape: tuple) -> callable:
    """One forward and backward of a divergence, as a call without arguments."""
    n, d, v, chunk = shape
    g = torch.Generator().manual_seed(0)
    h_student, h_teacher = (torch.randn(n, d, generator=g) / d**0.5 for _ in "pq")
    head, weight = torch.randn(v, d, generator=g), torch.full((n,), 1 / n)

    def floor():  # the three matmuls alone, through the buffers that the fused form uses
        z, z_q, grad = torch.empty(chunk, v), torch.empty(chunk, v), torch.empty(n, d)
        for start in range(0, n, chunk):
            rows, k = slice(start, start + chunk), min(chunk, n - start)
            torch.mm(h_student[rows], head.T, out=z[:k])
            torch.mm(h_teacher[rows], head.T, out=z_q[:k])
            torch.mm(z[:k], head, out=grad[rows])

    def naive(h):
        return (weight * sd.kl_naive(F.linear(h, head), F.linear(h_teacher, head), "student||teacher", 1.1)).sum()

    def fused(h):
        return sd.fused_loss(h, h_teacher, head, weight, kl="student||teacher", temperature=1.1, chunk=chunk)[0]

    def liger(h, compiled):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # beta 1: KL(student‖teacher)

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, temperature=1.1, compiled=compiled, chunk_size=chunk)
        return loss(h, head, h_teacher, head, torch.zeros(n, dtype=torch.long))

    forms = {
        "naive": naive,
        "fused": fused,
        "liger": lambda h: liger(h, False),
        "liger, compiled": lambda h: liger(h, True),
    }
    return floor if form == "floor" else lambda: forms[form](h_student.detach().requires_grad_(True)).backward()


def checkpointing_job(on: bool) -> callable:
    """Forward and backward of one micro-batch of a random 12-layer model: 8 rows of 256 tokens."""
    model, tokenizer = tiny_model(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        head_dim=32,
        initializer_range=0.02,
        max_position_embeddings=512,
    )
    chat, cfg = sd.Chat(model, tokenizer, [0], 512), config(condition="grpo", kl_chunk=128)
    sd.add_adapters(model, cfg)
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    sample = sd.Sample([3] * 224, False, 0.0)
    rollouts = [sd.Rollout(None, [1] * 32, sample, "", 0.0, advantage=1.0) for _ in range(8)]
    optimizer = torch.optim.SGD(sd.adapters(model).values(), lr=0.0)
    return lambda: sd.train_step(chat, optimizer, rollouts, replace(cfg, micro_batch=8))


def sampler_jobs(chat, prompts, ends, temperature, length) -> dict:
    """{name: call that returns the tokens it drew}, both from the full softmax, with the same end tokens."""
    chat.end_ids, seeds = ends, itertools.count()
    width = max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def ours():
        noise = np.random.default_rng(next(seeds)).random((len(prompts), length), np.float32)
        return sum(
            len(s.ids)
            for s in sd.generate(chat, prompts, length, uniforms=noise, temperature=temperature, batch=len(prompts))
        )

    def theirs():
        out = chat.model.generate(ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                                  eos_token_id=ends, pad_token_id=ends[0], max_new_tokens=length)[:, width:]  # fmt: skip
        ended = torch.isin(out, torch.tensor(ends))
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())

    return {"generate": theirs, "ours": ours}


def step_job(whose: str, folder: str, real: bool) -> callable:
    """One whole grpo step, ours or TRL's: same model, LoRA, prompts, group size and length."""
    out = Path(tempfile.mkdtemp())
    flags = ["--preset", "toy", "--condition", "grpo", "--model", folder, "--out", str(out / "run")]
    if real:
        rows = [{"problem": f"What is {i} + {i}?", "solution": f"{2 * i}", "answer": f"{2 * i}"} for i in range(20)]
        (out / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += [
            "--data",
            str(out / "problems.jsonl"),
            "--prompts",
            "steps",
            "--test-problems",
            "1",
            "--validation-problems",
            "0",
        ]
        flags += ["--attempts-per-step", "8", "--max-new-tokens", "32"]
    cfg, _ = sd.parse_config(flags)
    chat = sd.load_model(folder)
    problems = sd.load_problems(cfg, chat).train
    if whose == "ours":
        sd.add_adapters(chat.model, cfg)
        run = sd.Run(cfg, chat)
        return lambda: sd.take_step(run, problems, None)
    import datasets
    import peft
    import trl

    prompts = [{"prompt": sd.FORMATS[cfg.prompts].student(p.question), "truth": p.answer} for p in problems]

    def reward(completions, truth, **_):
        return [float(sd.is_correct(c[0]["content"], t)) for c, t in zip(completions, truth)]

    settings = trl.GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=cfg.attempts_per_step, num_generations=cfg.group_size,
        max_completion_length=cfg.max_new_tokens, temperature=cfg.temperature, top_k=0, top_p=1.0, beta=0.0,
        learning_rate=cfg.lr, max_steps=100, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=cfg.gradient_checkpointing, logging_strategy="no",
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    data = datasets.Dataset.from_list(prompts)
    trainer = trl.GRPOTrainer(folder, reward, settings, train_dataset=data, peft_config=lora)
    trainer.current_gradient_accumulation_steps = 1  # as its own train() sets it
    trainer.create_optimizer_and_scheduler(100)
    loader = iter(itertools.cycle(trainer.get_train_dataloader()))

    def theirs():
        trainer.training_step(trainer.model, next(loader), None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return theirs


def rounds(jobs: dict, pairs: int = 5) -> dict[str, list[float]]:
    """{name: seconds of each round}; the jobs take turns, so that a slow minute of the machine meets them all."""
    seconds = {name: [] for name in jobs}
    for _ in range(pairs + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}  # the first warms up


def ratio(seconds: dict, a: str, b: str) -> float:
    return float(np.median(np.array(seconds[a]) / np.array(seconds[b])))


def peak(*job) -> float:
    """Peak extra memory of a job, MiB, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--peak", json.dumps(job)], capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else math.nan


def measure_peak(kind: str, *arguments) -> None:
    job = {"loss": loss_job, "checkpointing": checkpointing_job, "step": step_job}[kind](*arguments)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    job()
    # not ru_maxrss: a child's starts at its parent's
    print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10 - before)


def row(name: str, *cells) -> None:
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def benchmark(real: str | None) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; time: median of 5 or more rounds in turn\n")
    print("| what | time | peak extra memory |\n|---|---|---|")
    installed = lambda *names: all(map(importlib.util.find_spec, names))
    for first, (name, shape) in zip((True, False), SHAPES.items()):
        forms = ["naive", "floor", "fused"] + ["liger", "liger, compiled"] * (first and installed("liger_kernel"))
        jobs = {form: loss_job(form, shape) for form in forms}
        jobs |= {what: loss_job("fused", half) for what, half in HALF.items() if first}
        seconds, memory = rounds(jobs), {form: peak("loss", form, shape) for form in forms}
        n, d, v, chunk = shape
        rate = {form: 6 * n * d * v / np.median(seconds[form]) / 1e9 for form in ("floor", "fused")}
        used = [f"{memory[form]:.0f}" for form in ("fused", "naive")]
        row(f"fused / naive, N × D × V = {name}, {chunk} rows a chunk", f"{ratio(seconds, 'fused', 'naive'):.2f}",
            f"{' / '.join(used)} MiB = {memory['fused'] / memory['naive']:.3f}")  # fmt: skip
        row("fused / the three bare matmuls in the same chunks", f"{ratio(seconds, 'fused', 'floor'):.2f}",
            f"{rate['fused']:.0f} of {rate['floor']:.0f} GFLOP/s")  # fmt: skip
        for form in forms[3:]:
            row(
                f"fused / Liger-Kernel{form[5:]}",
                f"{ratio(seconds, 'fused', form):.2f}",
                f"{memory['fused'] / memory[form]:.2f}",
            )
        for what in HALF if first else ():
            smaller = peak("loss", "fused", HALF[what]) / memory["fused"]
            row(f"fused, {what}", f"× {ratio(seconds, what, 'fused'):.2f}", f"× {smaller:.2f}")
    toy = HERE / "toy"
    chat = sd.load_model(str(toy))
    language, nine = make.ToyLanguage(1), chat.tokenizer.convert_tokens_to_ids("9")
    prompts = [chat.encode(sd.FORMATS["toy"].student(language.problem())) for _ in range(128)]
    sampled("toy, 128 rows, uneven (a 9 ends a row too)", 20, chat, prompts, [0, nine], 1.0, 64)
    sampled("toy, 128 rows of 39", 20, chat, prompts, [0], 1.0, 64)
    if real:
        chat = sd.load_model(real)
        prompts = [chat.encode(sd.FORMATS["steps"].student(f"What is {i} times {i + 3}?")) for i in range(16)]
        never = [len(chat.head) - 1]  # to the cap: else the draws' lengths decide the ratio
        sampled("the real model, 16 rows of 48", 5, chat, prompts, never, 1.1, 48)
    seconds = rounds({"on": checkpointing_job(True), "off": checkpointing_job(False)})
    used = [f"{peak('checkpointing', on):.0f}" for on in (True, False)]
    row(
        "checkpointing on / off, 12 layers of width 256, 8 rows of 256 tokens",
        f"{ratio(seconds, 'on', 'off'):.2f}",
        f"{' / '.join(used)} MiB",
    )
    for folder, own, what in [
        (str(toy), False, "toy, 32 attempts"),
        (real, True, "the real model, 8 attempts of 32 tokens"),
    ]:
        if folder and installed("trl", "peft"):
            seconds = rounds({whose: step_job(whose, folder, own) for whose in ("ours", "trl")}, 5 if own else 20)
            used = [f"{peak('step', whose, folder, own):.0f}" for whose in ("ours", "trl")]
            row(
                f"a grpo step / TRL's GRPOTrainer: {what}",
                f"{ratio(seconds, 'ours', 'trl'):.2f}",
                f"{' / '.join(used)} MiB",
            )
    breakdown(toy)


def sampled(name: str, pairs: int, *case) -> None:
    tokens, jobs = {"generate": [], "ours": []}, sampler_jobs(*case)
    timed = rounds({k: lambda k=k: tokens[k].append(jobs[k]()) for k in jobs}, pairs)
    speed = {k: np.array(tokens[k][1:]) / np.array(timed[k]) for k in jobs}
    row(f"tokens a second, sampler / generate: {name}", f"{np.median(speed['ours'] / speed['generate']):.2f}", "-")


def breakdown(toy: Path) -> None:
    """Where a critique step's time goes: each part is timed where the loop calls it."""
    cfg, _ = sd.parse_config(["--preset", "toy", "--out", tempfile.mkdtemp() + "/run"])
    chat = sd.load_model(str(toy))
    critic, problems = sd.load_critic(cfg, chat), sd.load_problems(cfg, chat).train
    sd.add_adapters(chat.model, cfg)
    run, spent = sd.Run(cfg, chat), dict.fromkeys(("sampling", "critic", "teacher", "optimiser", "all"), 0.0)

    def timed(name, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    sd.attempt, sd.query_critic, sd.teacher_hidden = (
        timed("sampling", sd.attempt),
        timed("critic", sd.query_critic),
        timed("teacher", sd.teacher_hidden),
    )
    sd.CONDITIONS["critique"], run.optimizer.step = sd.query_critic, timed("optimiser", run.optimizer.step)
    step = timed("all", sd.take_step)
    for _ in range(20):
        step(run, problems, critic)
    spent["student, loss and backward"] = 2 * spent["all"] - sum(spent.values())
    row(
        "a toy step's time",
        ", ".join(f"{name} {part / spent['all']:.0%}" for name, part in spent.items() if name != "all"),
        "-",
    )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(*json.loads(sys.argv[2]))
    else:
        benchmark(sys.argv[1] if sys.argv[1:] else None)
