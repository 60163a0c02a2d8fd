"""Tests in the order of sd.py: the method, the plumbing, then eval.py, the forks, and a benchmark.

A docstring names the bug that makes its test fail. Conditions, divergences and prompt formats come
from the tables of the code: a row that is added there is tested without a change here, apart from
the autograd form of a divergence, which goes into NAIVE.

  python -m pytest -q         all tests
  python test_sd.py           the benchmark
  python test_sd.py --trace   the memory that Qwen3-1.7B takes, traced without a GPU
"""

import os

# the tests are of the CPU, also on a machine that has more
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gzip
import importlib.util
import itertools
import json
import math
import multiprocessing
import random
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import critic_prompts
import eval as evaluation
import sd
from critic_prompts import (
    FORMATS, check_math_verify, gradable, is_correct, plain_find, plain_trace, strip_thinking,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
TOY = HERE / "toy"
CONDITIONS = ["critique", "reference", "grpo"]
# (condition, kl): one step with each of the losses
STEPS = [*itertools.product(["critique"], sd.DIVERGENCES), ("grpo", "sampled")]
TRACE = "s7+6=3s3*3=9####9"  # a valid critique in the toy's format
EXACTLY = dict(rtol=0, atol=0)
CLOSELY = dict(rtol=1e-4, atol=1e-5)

torch.set_num_threads(1)


# ---- Helpers: a tiny model whose distributions are far from uniform, and rollouts of it. ---------


def byte_tokenizer():
    """A token is a byte, so any text is legal and a letter can be cut. The end token pads."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=(TOY / "chat_template.jinja").read_text(),
    )


SHAPE = dict(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.4,
    tie_word_embeddings=False,
    eos_token_id=0,
    pad_token_id=0,
    bos_token_id=None,
)


def tiny_model(family="qwen3", **changes):
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(family, **{**SHAPE, **changes})
    return transformers.AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)


def chat_of(model):
    """A model as load_model makes it, without a folder."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    return sd.make_chat(model, byte_tokenizer())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A chat model's folder, with problems beside it."""
    path = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    # a model's own sampling defaults, which must not reach our sampler
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    lines = (TOY / "problems.jsonl").read_text().splitlines()
    (path / "problems.jsonl").write_text("\n".join(lines[:60]))
    return path


def config(**changes):
    tiny = dict(
        preset="toy",
        prompts="toy",
        lora_rank=4,
        max_new_tokens=12,
        lr=1e-2,
        max_grad_norm=1.0,
        temperature=1.5,
        micro_batch=2,
    )
    return sd.Config(**{**tiny, **changes})


@pytest.fixture
def chat(folder):
    return sd.load_model(str(folder), config())


@pytest.fixture(scope="session")
def toy():
    """The toy model, not to be changed."""
    return sd.load_model("toy", sd.parse_config(["--preset", "toy"]))


def numbered_problems(count):
    lines = (TOY / "problems.jsonl").read_text().splitlines()[:count]
    return list(enumerate(map(sd.read_row, map(json.loads, lines))))


def rollouts_of(chat, cfg, count=6):
    """Of uneven length, with contexts and advantages, prepared for cfg's condition."""
    rollouts = sd.attempt(chat, numbered_problems(count), cfg)
    for i, r in enumerate(rollouts):
        r.context = r.problem.solution
        r.advantage = 2.5 - i
        r.ids = [*r.ids[: 8 - i], 0]
    return rollouts if cfg.condition == "grpo" else sd.add_teacher_prompts(chat, rollouts, cfg)


def written(text="", reward=0.0, **changes):
    """A rollout that was not sampled."""
    r = sd.Rollout(sd.Problem("", "", ""), [3], [5], text, False, 0.0, reward)
    return replace(r, **changes)


def adapt(chat, noise=0.0):
    """Add adapters. With noise, B is not zero, so that student and teacher differ."""
    sd.add_adapters(chat.model, config())
    torch.manual_seed(1)
    for layer in sd.lora_layers(chat.model).values():
        layer.B.data += noise * torch.randn_like(layer.B)
    return chat


def sgd(chat, lr=0.0):
    return torch.optim.SGD(sd.adapters(chat.model).values(), lr=lr)


def adamw(chat, lr):
    return torch.optim.AdamW(sd.adapters(chat.model).values(), lr=lr, weight_decay=0.0)


def gradients(chat, rollouts, cfg):
    """Of one step, unclipped."""
    sd.update(chat, sgd(chat), rollouts, replace(cfg, max_grad_norm=0.0))
    return {name: p.grad for name, p in sd.adapters(chat.model).items()}


class Watch(TorchDispatchMode):
    """Count operations and matrix products, and remember the size of the largest new tensor."""

    largest = operations = matmuls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        old = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        sizes = [t.numel() for t in tensors_in(out) if t.untyped_storage()._cdata not in old]
        # an operation in place has a name that ends in _; what else makes nothing new is a view
        self.operations += bool(sizes) or op.overloadpacket.__name__.endswith("_")
        self.matmuls += op.overloadpacket is torch.ops.aten.mm
        self.largest = max([self.largest, *sizes])
        return out


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class ScriptedCritic:
    """Gives the same replies every time, and remembers what it was asked."""

    last_error = ""

    def __init__(self, *replies):
        self.replies = itertools.cycle(replies)
        self.heard = ""

    def __call__(self, conversations, lengths):
        self.heard += str(conversations)
        return [(next(self.replies), 5) for _ in zip(conversations, lengths, strict=True)]


def run_in(tmp_path, folder, flags, data="problems.jsonl"):
    """A short run of sd.py on the tiny model, in tmp_path/run."""
    common = f"--preset toy --model {folder} --data {folder / data} --out {tmp_path / 'run'}"
    common += " --lora-rank 4 --lora-alpha 8 --attempts-per-step 4 --group-size 2"
    common += " --max-new-tokens 12 --test-problems 5 --closing-problems 2 --eval-samples 2"
    return sd.main([*common.split(), *flags.split()])


def error_of(capture):
    """What was printed on stderr, which must be one line."""
    text = capture.readouterr().err
    lines = [line for line in text.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and re.match(r"\w+\.py: ", lines[0])
    return text


# ---- Loss. ---------------------------------------------------------------------------------------


def naive_student_teacher(log_p, log_q, ids, advantage):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def naive_teacher_student(log_p, log_q, ids, advantage):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def naive_sampled(log_p, log_q, ids, advantage):
    drawn = sd.of_drawn(log_p, ids)
    a = sd.of_drawn(log_q, ids) - drawn.detach()
    return -a * (1 + drawn - drawn.detach())  # worth -a, with the gradient of -a log p_y


def naive_grpo(log_p, log_q, ids, advantage):
    return -advantage * sd.of_drawn(log_p, ids)


# the loss of each token, for autograd
NAIVE = {
    "student||teacher": naive_student_teacher,
    "teacher||student": naive_teacher_student,
    "sampled": naive_sampled,
    "grpo": naive_grpo,
}
LOSSES = {**sd.DIVERGENCES, "grpo": sd.policy_gradient}


def test_divergences_equal_numbers_worked_by_hand():
    """Eq (4) and (5) for p = (3/4, 1/4), q = (1/2, 1/2). Fails if the directions are exchanged."""
    logs = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]]).log()
    # the KL, and its derivative by the first logit
    by_hand = {"student||teacher": (0.130812, 0.205990), "teacher||student": (0.143841, 0.25)}
    for kl, wanted in by_hand.items():
        loss, gradient = sd.DIVERGENCES[kl](*logs, None, None)
        assert (loss.item(), gradient[0, 0].item()) == pytest.approx(wanted, rel=1e-5)
        assert_close(NAIVE[kl](*logs, None, None), loss)


def loss_inputs(rows, width, vocabulary, dtype=torch.float32):
    """(h_student, h_teacher, head, ids, advantage)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width), (rows, width), (vocabulary, width)]
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    return *tensors, torch.arange(rows) % vocabulary, torch.linspace(-1, 1, rows)


def assert_fused_is_naive(name, inputs, temperature, rtol):
    h_student, h_teacher, head, ids, advantage = inputs
    h_student.requires_grad_(True)
    log_p = F.log_softmax(F.linear(h_student, head).double() / temperature, -1)
    log_q = F.log_softmax(F.linear(h_teacher, head).double() / temperature, -1)
    wanted = NAIVE[name](log_p, log_q, ids, advantage.double())
    wanted.sum().backward()
    with Watch() as watch:
        value, gradient = sd.fused_loss(*inputs, LOSSES[name], temperature)
    assert_close(value.double(), wanted, rtol=rtol, atol=1e-5)
    assert_close(gradient, h_student.grad, rtol=5 * rtol, atol=rtol)
    return watch


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "temperature, chunk, rows", [(1.0, 8, 40), (0.7, 7, 40), (1.6, 100, 40), (1.1, 2, 3), (1, 4, 0)]
)
def test_fused_loss_equals_the_naive_one(name, temperature, chunk, rows, monkeypatch):
    """Fails if value or gradient of a row is wrong, be it by a factor; on a last, shorter chunk, or
    none; or if a tensor has a row of logits for every token, or logits are made again."""
    monkeypatch.setattr(sd, "CHUNK", chunk * 300)
    watch = assert_fused_is_naive(name, loss_inputs(rows, 8, 300), temperature, 2e-5)
    assert watch.largest <= min(chunk, rows) * 300
    assert watch.matmuls == 3 * math.ceil(rows / chunk)


@pytest.mark.parametrize("name", LOSSES)
def test_small_losses_survive_bfloat16_and_a_large_vocabulary(name):
    """Fails if the softmax runs in bfloat16: over 50,000 tokens a small KL becomes negative."""
    h, _, *others = loss_inputs(6, 32, 50_000, torch.bfloat16)
    assert_fused_is_naive(name, (h, h * 1.02, *others), 1.1, 0.01)


# ---- Step. ---------------------------------------------------------------------------------------


def row_log_probs(chat, prompt, ids, temperature):
    """(T, V) of one row, from the model's own logits."""
    logits = chat.model(input_ids=torch.tensor([prompt + ids])).logits[0]
    return F.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


@pytest.mark.parametrize("condition, kl", STEPS)
def test_a_step_equals_a_loop_over_rows_in_plain_autograd(chat, condition, kl):
    """Responses end in the token that pads. Fails if a mask is made from token values, a target is
    off by one, a block is recomputed without the adapter, or the mean is not over all tokens."""
    cfg = config(condition=condition, kl=kl)
    rollouts = rollouts_of(adapt(chat, noise=0.3), cfg)
    mute = replace(chat, tokenizer=None)
    parts = [gradients(mute, rollouts, replace(cfg, micro_batch=rows)) for rows in (1, 4, 100)]
    sd.set_training(chat.model, False)  # without checkpointing
    chat.model.zero_grad()
    losses = []
    for r in rollouts:
        log_p = row_log_probs(chat, r.prompt, r.ids, cfg.temperature)
        with torch.no_grad(), sd.adapters_off(chat.model):
            log_q = row_log_probs(chat, r.teacher_prompt or r.prompt, r.ids, cfg.temperature)
        naive = NAIVE["grpo" if condition == "grpo" else kl]
        losses.append(naive(log_p, log_q, torch.tensor(r.ids), r.advantage))
    torch.cat(losses).mean().backward()
    wanted = {name: p.grad for name, p in sd.adapters(chat.model).items()}
    for got in parts:
        assert_close(got, wanted, **CLOSELY)
    assert all(gradient.any() for gradient in wanted.values())


def test_a_small_learning_rate_moves_most_weights(folder):
    """Fails if adapters take the base's dtype: the updates of a small lr round to zero."""
    cfg = config(dtype="bfloat16")
    chat = adapt(sd.load_model(str(folder), cfg), noise=0.1)
    before = deepcopy(sd.adapters(chat.model))
    loss = sd.update(chat, adamw(chat, 5e-6), rollouts_of(chat, cfg), cfg)["loss"]
    moved = [(p != before[name]).float().mean() for name, p in sd.adapters(chat.model).items()]
    assert np.mean(moved) > 0.9 and 0 < loss < math.inf


@pytest.mark.parametrize("advantage", [0.0, math.nan])
def test_a_step_without_signal_or_with_nan_changes_nothing(chat, advantage):
    """Fails if equal rewards give NaN, or a step is taken before loss and gradient are finite."""
    cfg = config(condition="grpo")
    rollouts = rollouts_of(adapt(chat, noise=0.3), cfg, 4)
    rollouts[1].advantage = rollouts[0].advantage = advantage
    before = deepcopy(sd.adapters(chat.model))
    optimizer = sgd(chat, lr=1.0)
    if advantage:
        with pytest.raises(FloatingPointError):
            sd.update(chat, optimizer, rollouts, cfg)
    else:
        assert sd.update(chat, optimizer, rollouts[:2], cfg)["grad_norm"] == 0.0
        assert sd.update(chat, optimizer, [], cfg)["loss"] == 0.0
    assert_close(sd.adapters(chat.model), before, **EXACTLY)


def test_group_advantages_equal_numbers_worked_by_hand():
    """Eq (3). Fails if groups mix, or std is the sample's (n − 1)."""
    rollouts = [written(reward=reward) for reward in (1, 0, 0, 0, 1, 1, 1, 1)]
    found = sd.group_advantages(rollouts, config(group_size=4))
    root = math.sqrt(3)
    assert found == pytest.approx([root, -1 / root, -1 / root, -1 / root, 0, 0, 0, 0])
    assert sd.group_advantages(rollouts[:4], config(group_size=2)) == [1, -1, 0, 0]


# ---- LoRA. ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size, dtype", [(1.0, "float32"), (5e-5, "bfloat16")])
def test_an_adapter_adds_its_scaled_product_however_small(bias, size, dtype):
    """The delta is `size` times the output. Fails if scale or bias is lost; or if the delta is
    rounded before it is added: 3 % of its effect would be left."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 1024, bias, dtype=getattr(torch, dtype))
    layer = sd.LoRALinear(linear, 4, 8.0, torch.Generator().manual_seed(0))
    x = torch.randn(8, 64, 256).to(linear.weight.dtype)
    before = layer(x).float()
    assert_close(layer(x), linear(x), rtol=0.02, atol=1e-3)  # B starts at zero
    torch.nn.init.normal_(layer.B)
    delta = 8 / 4 * x.float() @ layer.A.T @ layer.B.T
    shrink = size * before.std() / delta.std()
    layer.B *= shrink
    delta *= shrink
    slope = ((layer(x).float() - before) * delta).sum() / (delta * delta).sum()
    assert 0.8 < slope < 1.2
    if dtype == "float32":
        assert_close(layer(x), before + delta)


def test_adapters_off_is_the_original_bit_for_bit_after_training(chat):
    """Fails if a frozen weight is trained, the adapter stays on, or a cast one hides an update."""
    cfg = config()
    ids = torch.arange(20)[None]
    before = chat.model(input_ids=ids).logits
    rollouts = rollouts_of(adapt(chat), cfg)
    for _ in range(3):
        with sd.cast_adapters(chat.model):
            cast = chat.model(input_ids=ids).logits
        assert torch.equal(chat.model(input_ids=ids).logits, cast)
        sd.update(chat, sgd(chat, lr=0.1), rollouts, cfg)
        assert not torch.equal(chat.model(input_ids=ids).logits, cast)
    with sd.adapters_off(chat.model), sd.cast_adapters(chat.model):
        assert torch.equal(chat.model(input_ids=ids).logits, before)


def operations_of_a_token(chat):
    """Of the third decoded token; what is made once for all tokens does not count."""
    counts = []
    for tokens in (2, 3):
        with Watch() as watch:
            sd.generate(chat, [[1, 5, 2]], [tokens], 1)
        counts.append(watch.operations)
    return counts[1] - counts[0]


def test_a_decoded_token_with_adapters_takes_few_operations_more():
    """Fails if adapters are cast at every token, or scale and sum are operations of their own."""
    chat = adapt(chat_of(tiny_model(num_hidden_layers=28, dtype=torch.bfloat16)), noise=0.3)
    chat.end_ids = [1000]
    with sd.adapters_off(chat.model):
        off = operations_of_a_token(chat)
    assert off < operations_of_a_token(chat) <= 1.35 * off


# ---- Sampler. ------------------------------------------------------------------------------------


def random_numbers(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def prompts_of(chat, *texts):
    return [chat.encode([critic_prompts.user(text)]) for text in texts]


def test_the_sampler_draws_from_the_full_softmax_at_its_temperature(chat):
    """4,000 draws. Fails if another temperature, or the model's own top-k, shapes the draw."""
    prompt = [1, 5, 2]
    drawn = sd.generate(chat, [prompt] * 4000, [1] * 4000, 4000, random_numbers(4000, 1), 2.0)
    p = row_log_probs(chat, prompt, [0], 2.0)[0].exp()
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=len(p))
    expected = 4000 * p
    chi_square = ((counts - expected) ** 2 / expected)[expected > 5]
    assert chi_square.mean() < 1.5
    assert drawn[0][1] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_a_sample_depends_on_no_other_row(chat):
    """Fails if rows share random numbers, padding shifts positions, a row that leaves takes another
    row's cache along, only one end token ends, or a row goes on beyond its own cap."""
    chat.end_ids = list(range(0, 200, 9))  # so that rows end at different times
    prompts = prompts_of(chat, "7", "7+6*3*9", "1+4*2", "3*3")
    caps = [20, 20, 3, 20]
    batches = []
    for rows in (4, 1, 3):
        drawn = sd.generate(chat, prompts, caps, rows, random_numbers(4, 20), 1.5)
        batches.append([ids for ids, _ in drawn])
    assert batches[0] == batches[1] == batches[2]
    assert len({len(ids) for ids in batches[0]}) > 2
    for ids, cap in zip(batches[0], caps):
        assert len(ids) == cap or ids[-1] in chat.end_ids
        assert len(ids) <= cap and not set(ids[:-1]) & set(chat.end_ids)


def test_every_attempt_has_random_numbers_of_its_own(chat):
    """Fails if seed, problem or attempt does not count, or the place in the list does."""
    _, problem = numbered_problems(1)[0]
    both = [(0, problem), (1, problem)]
    drawn = sd.attempt(chat, both, config(), 2) + sd.attempt(chat, both, config(seed=1), 2)
    assert len({str(r.ids) for r in drawn}) == 8
    (alone,) = sd.attempt(chat, both[1:], config())
    assert alone.ids == drawn[2].ids


@pytest.mark.parametrize("uniforms", [None, random_numbers(2, 4)])
def test_nan_logits_stop_the_sampler(chat, uniforms):
    """Fails if NaN logits, greedy or not, are drawn from as if they were a distribution."""
    chat.head[5] = math.nan
    with pytest.raises(FloatingPointError):
        sd.generate(chat, [[1, 5, 2]] * 2, [4, 4], 2, uniforms)


# ---- Two rows a rollout, and who reads what. -----------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_both_rows_end_in_the_very_ids_that_were_drawn(chat, name):
    """Watches the network. Fails if a prompt is rendered twice, or the headers differ."""
    cfg = config(micro_batch=1, prompts=name)
    rows = []
    rollouts = rollouts_of(adapt(chat), cfg)
    chat.model.base_model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    sd.update(chat, sgd(chat), rollouts, cfg)
    for r, student_row, teacher_row in zip(rollouts, rows[::2], rows[1::2], strict=True):
        student = chat.encode(FORMATS[name].student(r.problem.question))
        teacher = chat.encode(FORMATS[name].teacher(r.problem.question, r.context))
        assert student[-2:] == teacher[-2:] == [0, 2]
        assert (student_row, teacher_row) == (student + r.ids, teacher + r.ids)


@pytest.mark.parametrize("style", critic_prompts.STYLES)
@pytest.mark.parametrize("solution", ["SOLUTION", None])
@pytest.mark.parametrize("name", FORMATS)
def test_each_reader_is_told_what_it_may_see(name, solution, style):
    """Fails if a prompt loses its problem, attempt or context, or shows a hidden solution."""
    texts = FORMATS[name]
    critic = str(texts.critic("QUESTION", "ATTEMPT", solution, "ANSWER", style))
    teacher = str(texts.teacher("QUESTION", "CONTEXT"))
    assert "QUESTION" in str(texts.student("QUESTION"))
    assert "QUESTION" in teacher and "CONTEXT" in teacher
    assert "QUESTION" in critic and "ATTEMPT" in critic
    assert ("SOLUTION" in critic) == (solution is not None)
    assert "None" not in critic and (solution or "ANSWER" not in critic)


# ---- Contexts, and the local critic. -------------------------------------------------------------


@pytest.mark.parametrize("sees", [True, False])
def test_a_failed_critique_is_left_out_and_counted(chat, sees):
    """Fails if an empty, cut, step-less or far too long reply reaches the teacher, or a thought; or
    the solution whoever may not see it: the critic, the student, or the critique's teacher."""
    failures = ["", None, "I cannot help", "####9", "s7+6=3", "s7+6=3" * 99 + "####9"]
    replies = [f"<think>s7+6=4####4</think>{TRACE}", *failures, TRACE]
    critic = ScriptedCritic(*replies)
    cfg = config(attempts_per_step=8, critic_sees_reference=sees)
    problems = [problem for _, problem in numbered_problems(8)]
    entry, rollouts = sd.take_step(adapt(chat), problems, critic, sgd(chat), 0, cfg)
    assert [r.context for r in rollouts] == [TRACE] + [None] * 6 + [TRACE]
    assert (entry["scored"], entry["unscored"], entry["critic_tokens"]) == (2, 6, 40)
    for r in rollouts:
        assert bool(r.teacher_prompt) == (r.context == TRACE)
        assert (r.problem.solution in critic.heard) == sees
        assert r.problem.solution not in chat.decode(r.prompt + (r.teacher_prompt or []))


def test_the_copy_control_reads_the_attempt_and_loads_no_critic(tmp_path, folder):
    """Fails if the control is another text, if an attempt without an answer counts, or if --critic
    must exist."""
    rollouts = [written("s7+6=4####4"), written("s7+6=4")]
    assert sd.copy_attempts(rollouts, None, config()) == ["s7+6=4####4", None]
    assert run_in(tmp_path, folder, "--condition copy --steps 1 --critic /nowhere") == 0


def test_the_local_critic_is_the_base_and_drops_what_is_cut_off(chat, monkeypatch):
    """Fails if the critic has the adapter on, half a critique is kept, or a loop has no cap."""
    chat.end_ids = list(range(0, 200, 9))  # so that replies end
    conversations = [[critic_prompts.user(text)] for text in "7135"]
    critic = sd.LocalCritic(chat, 8)
    caps = []
    real = sd.generate
    monkeypatch.setattr(sd, "generate", lambda *a: caps.append(a[2]) or real(*a))
    before = critic(conversations, [2, 10, 40, 4000])
    adapt(chat, noise=2.0)
    assert critic(conversations, [2, 10, 40, 4000]) == before
    assert None not in [text for text, _ in before]
    prompt = len(prompts_of(chat, "7")[0])
    chat.window = prompt + 1
    assert critic(conversations[:1], [40]) == [(None, 1)]
    assert caps[1:] == [[259, 271, 316, 4096 - prompt], [1]]


@pytest.mark.parametrize("text", ["<|end|>", "<|assistant|>x", "\x00€"])
def test_a_text_ends_no_turn_and_a_context_must_fit(chat, text):
    """Fails if a text ends its own turn, or a context that does not fit the window is scored."""
    cfg = config()
    problem = sd.Problem("7+6" + text, "s" + text, "3")
    (r,) = sd.attempt(chat, [(0, problem)], cfg)
    r.context = problem.solution
    prompt = chat.encode(FORMATS["toy"].teacher(problem.question, r.context))
    for ids in (r.prompt, prompt):
        assert ids.count(2) == 1 and ids[-1] == 2
    chat.window = len(prompt + r.ids)
    assert sd.add_teacher_prompts(chat, [r], cfg) == [r] and r.teacher_prompt == prompt
    chat.window -= 1
    assert sd.add_teacher_prompts(chat, [r], cfg) == []


# ---- Reading and grading. ------------------------------------------------------------------------


# a response, the gold answer, and whether they agree
GRADES = [
    ("<answer>42</answer>", "42", True),
    ("<answer>42</answer> <answer>41</answer>", "42", False),
    (r"<answer>7</answer> \boxed{42}", "42", False),
    ("#### 42", "42", True),
    ("#### Step 2: add\n6 + 5 = 11", "step 2: add", False),
    ("<answer>The Red  House</answer>", "the red house", True),
    (r"\boxed{42}. I put it in \boxed{ }, \boxed{...}", "42", True),
    ("<answer>42</answer>, in <answer></answer> tags", "42", True),
    # Hunyuan wraps its whole reply
    ("<answer>3 * 2 = 6.\n\n" + "So it is. " * 200 + r"\boxed{11}</answer>", "11", True),
    (r"<answer>\boxed{11}", "11", True),
    # what wraps the gold answer; WRAPPINGS has what wraps the response
    ("<answer>12</answer>", "**12**", True),
    (r"\boxed{\{7\}}", r"$\left\{7\right\}$", True),
    (r"<answer>\(12\)</answer>", r"\[12\]", True),
    (r"\boxed{12} and so \boxed{}", r"\boxed{12}", True),
    (r"\boxed{−5}", "-5", True),
    # units
    (r"\boxed{2\text{ cm}^2}", "2", True),
    (r"\boxed{45^\circ}", "45", True),
    (r"\boxed{2\text{ hours }30\text{ minutes}}", "230", False),
    # multipliers and negations are no units
    (r"\boxed{5\text{{ million}}}", "5", False),
    (r"\boxed{2\sqrt{3}\text{ million}}", r"2\sqrt{3}", False),
    # percent: 12 where a percentage is asked for, or 0.12
    (r"\boxed{12\%}", "12", True),
    ("<answer>12</answer>", r"12\%", True),
    ("<answer>50%</answer>", "0.5", True),
    ("<answer>0.5%</answer>", "50%", False),
    # thousands
    (r"\boxed{1,\!234}", "1234", True),
    # fractions
    ("<answer>0.5</answer>", "1/2", True),
    (r"<answer>2\frac{3}{4}</answer>", "23/4", False),
    # digits that only stand beside one another
    ("<answer>1$2</answer>", "12", False),
    (r"\boxed{2^{1009}}", "$2^{1009}$", True),
    # what follows the thought is graded
    (r"<think>So \boxed{5}.", "5", False),
    (r"<think>So \boxed{6}.</think> \boxed{5}", "5", True),
]


@pytest.mark.parametrize("text, answer, right", GRADES)
def test_grader(text, answer, right):
    """Fails if a wrapping hides an answer, a word is ignored, or a number is compared as text."""
    assert is_correct(text, answer, "exact") == right
    pytest.importorskip("math_verify")
    assert is_correct(text, answer, "math-verify") == right


GOLDS = "0 1 2 7 10 12 25 48 100 999 1,200 2125 16,500 1000000".split()
WRAPPINGS = r"""<answer>N</answer>|\boxed{N}|#### N|<answer>**N**</answer>|**\boxed{N}**|\fbox{N}
    |<answer>\boxed{N}</answer>|\boxed{N\text{ cm}}|<answer>N dollars</answer>|\boxed{\text{N}}
    |<answer>$N</answer>|\boxed{\$N.00}|\boxed{N\%}|<answer>N%</answer>|<answer>$N$</answer>
    |<answer>\(N\)</answer>|\[\boxed{N}\]|<answer>N.</answer>|\boxed {N}|\boxed{\textbf{N}}
    |\boxed{\left\{N\right\}}|\boxed{N} It is in \boxed{}.|#### **$N**.""".split("|")
MULTIPLIERS = """million hundred dozen thousand k half billion K M score lakh pairs times
    tenths""".split()
NEGATIONS = [r"\text{not }N", "not N", r"\neq N", r"\not= N", "≠ N", "isn't N", "no N", "never N"]


def wrapped(number):
    return [wrapping.strip().replace("N", number) for wrapping in WRAPPINGS]


def wrong_answers(gold):
    value = int(gold.replace(",", ""))
    wrong = wrapped(str(value + 1)) + wrapped(f"{value + 1:,}")
    if value != 0:
        wrong += wrapped(f"-{value}")
    for word in MULTIPLIERS:
        wrong += [f"<answer>{gold} {word}</answer>", rf"\boxed{{{gold}\text{{ {word}}}}}"]
        wrong += [rf"\boxed{{{gold}~\mathrm{{{word}}}}}", f"<answer>**${gold} {word}**</answer>"]
    for phrase in NEGATIONS:
        wrong += [rf"\boxed{{{phrase.replace('N', gold)}}}"]
        wrong += [f"<answer>{phrase.replace('N', gold)}</answer>"]
    return wrong


@pytest.mark.parametrize("gold", GOLDS)
def test_every_wrapping_of_a_number_is_taken_off_and_no_word_is(gold):
    """Fails if a chat model's way of writing a right answer is refused, or "5 million" is 5."""
    value = int(gold.replace(",", ""))
    for number in (gold, str(value), f"{value:,}", f"{value:,}".replace(",", "{,}")):
        assert [text for text in wrapped(number) if not is_correct(text, gold, "exact")] == []
    assert [text for text in wrong_answers(gold) if is_correct(text, gold, "exact")] == []


def test_math_verify_takes_the_same_wrappings_and_no_word():
    """Fails if the library's own leniency lets a multiplier or a negation pass."""
    pytest.importorskip("math_verify")
    for gold in ("12", "1,200"):
        assert all(is_correct(text, gold, "math-verify") for text in wrapped(gold))
        wrong = wrong_answers(gold)
        assert [text for text in wrong if is_correct(text, gold, "math-verify")] == []


def test_only_math_verify_knows_algebra():
    """Fails if --grader math-verify changes nothing, or cannot be used and does not say so."""
    assert not is_correct("<answer>1+x</answer>", "x+1", "exact")
    pytest.importorskip("math_verify")
    check_math_verify()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError):
        pool.submit(check_math_verify).result()
    assert is_correct("<answer>1+x</answer>", "x+1", "math-verify")
    assert is_correct(r"\boxed{\frac{24}{2}}", "12", "math-verify")


class FakeMathVerify:
    """Takes no two texts for equal, and remembers what it had to parse."""

    def __init__(self):
        self.parsed = []

    def parse(self, text, parsing_timeout):
        assert 0 < parsing_timeout <= 1
        self.parsed.append(text)
        return text

    def verify(self, gold, response, timeout_seconds):
        assert 0 < timeout_seconds <= 1
        return False


@pytest.mark.parametrize("package, message", [(None, "pip install"), (FakeMathVerify(), "1.x")])
def test_a_math_verify_that_does_not_work_is_an_error_at_start(monkeypatch, package, message):
    """Fails if a run goes on with a missing package, or with one that takes nothing for equal."""
    monkeypatch.setitem(sys.modules, "math_verify", package)
    with pytest.raises(ValueError, match=message):
        check_math_verify()


HOSTILE_TEXTS = {
    "a factorial": "999999999!",
    "groups": ",".join(["111"] * 10**5),
    "line ends": "\n" * 20_000,
    "boxes": "\\boxed{" * 10_000,
    "answers": "<answer>" * 10_000,
    "steps": "<step_1>" * 10_000,
    "thoughts": "<think>" * 10_000,
}


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_hostile_texts_are_cheap(kind, monkeypatch):
    """Fails if we compute what we read, the library gets a long text, or a pattern backtracks."""
    package = FakeMathVerify()
    text = HOSTILE_TEXTS[kind]
    monkeypatch.setitem(sys.modules, "math_verify", package)
    start = time.process_time()
    for reply in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", text + "\\boxed{1}"):
        is_correct(reply, "x", "math-verify")
        plain_trace(strip_thinking(reply))
        plain_find(reply)
        FORMATS["steps"].extract_trace(reply)
    is_correct("<answer>x</answer>", text, "math-verify")
    assert time.process_time() - start < 2
    assert all(len(text) <= 1002 for text in package.parsed)


# each holds math-verify's default limits of 5 s, or needs more memory than there is
SLOW_ANSWERS = [
    "(x+1)^{999}",
    r"\binom{999999999}{499999999}",
    "9^{ 999999999 }",
    "((9!)!)!",
    "x^" * 150 + "x",
]


@pytest.mark.parametrize("answer", SLOW_ANSWERS, ids=range(len(SLOW_ANSWERS)))
def test_no_answer_holds_math_verify_for_long(answer):
    """Fails if the library runs with its own limits, 5 s for each text and 5 s for the pair."""
    pytest.importorskip("math_verify")
    start = time.monotonic()
    is_correct(f"\\boxed{{{answer}}}", "5", "math-verify")
    assert time.monotonic() - start < 2


# a gold answer, whether exact can judge it, and whether math-verify can
GRADABLE = [
    ("1,200", True, True),
    (r"\text{Tuesday}", True, True),
    (r"2\sqrt{3}", False, True),
    ("$2^{1009}$", False, True),
    ("x+1", False, True),
    ("5 million", False, True),
    ("notfound", False, False),
    ("Proof.", False, False),
    (r"\text{proof}", False, False),
    ("NaN", False, False),
    ("1+" * 600 + "1", False, False),
]


@pytest.mark.parametrize("answer, exact, math_verify", GRADABLE)
def test_what_a_grader_cannot_judge_it_is_not_given(answer, exact, math_verify):
    """Fails if formulas are compared as text, or "proof" is trained on as an answer."""
    assert gradable(answer, "exact") == exact
    assert gradable(answer, "math-verify") == math_verify


REST = r"It is 11, \boxed{11}"
# an opening and a closing mark, as the models' own templates write them
MARKS = [
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize("start, end", MARKS)
def test_a_thought_is_dropped(start, end):
    """Fails if a thought, with the wrong lines in it, becomes a critique or is graded."""
    thought = r"The 30 is wrong. \boxed{30}"
    for reply in (
        f"{start}{thought}{end}{REST}",
        f"{thought}{end}{REST}",  # the template has written the opening mark into the prompt
        f"{start}a{end}b{start}{thought}{end}{REST}",
    ):
        # the caller removes the special tokens that are no marks
        assert strip_thinking(reply).removeprefix("<|START_RESPONSE|>") == REST
    # a thought that never ends
    assert strip_thinking(f"{start}a{end}{start}{thought}") == ""
    assert not is_correct(f"{start}{thought}", "30", "exact")


def test_a_text_is_no_thought_and_a_thought_without_marks_is():
    """Fails if a reply is taken for a thought, or the thought of GPT-OSS for a reply."""
    for text in ("", "It is 11.", r"Think: \boxed{11}", "<answer>[11]</answer>"):
        assert strip_thinking(text) == text
    assert strip_thinking(f"analysisThe 30 is wrong.assistantfinal{REST}") == REST


STEP_TRACE = "<step_1>1 + 1 = 2</step_1>\n<answer>2</answer>"
# a critic's reply, and the trace in it
STEP_REPLIES = [
    (f"Here it is: {STEP_TRACE} Well done!", STEP_TRACE),
    (f"I kept <step_1> as it was.\n{STEP_TRACE}", STEP_TRACE),
    (f"I kept <step_1>, </step_1> and all.\n{STEP_TRACE}", None),  # that is a step, twice
    (STEP_TRACE.replace("_1", "_2"), STEP_TRACE.replace("_1", "_2")),
    # the first step has no end: without it the trace would lack a step
    (f"<step_1>1 + 1\n{STEP_TRACE.replace('_1', '_2')}", None),
    (STEP_TRACE[:-9], None),
    (f"{STEP_TRACE} {STEP_TRACE}", None),
]


@pytest.mark.parametrize("reply, trace", STEP_REPLIES, ids=range(len(STEP_REPLIES)))
def test_the_trace_of_steps_in_a_reply(reply, trace):
    """Fails if small talk is distilled, or a loop or half a trace is accepted."""
    assert FORMATS["steps"].extract_trace(reply) == trace


PLAIN_STEPS = {
    "1. a = 1\n2) b = 2\n\nSo \\boxed{2}": ["1. a = 1", "2) b = 2", "So \\boxed{2}"],
    "First a.\n\nThen b,\nand c.\n \t\nEnd.": ["First a.", "Then b,\nand c.", "End."],
    "1. a\r\n2. b\r\n\r\nc\r\n": ["1. a", "2. b", "c"],
    " \n\n ": [],
}


@pytest.mark.parametrize("text", PLAIN_STEPS)
def test_steps_of_plain_text(text):
    """Fails if a paragraph or an item is cut in two, or two of them count as one step."""
    assert plain_find(text) == PLAIN_STEPS[text]


PLAIN = critic_prompts.PLAIN_EXAMPLE["copy"]
# a critic's reply, and the trace in it
PLAIN_REPLIES = {
    "a trace": (PLAIN, PLAIN),
    "the whole label": (f"Corrected attempt, whose answer is 11:\n{PLAIN}", PLAIN),
    "a sentence before it": (f"Sure! Here is the corrected attempt:\n\n{PLAIN}", PLAIN),
    "a heading": (f"### Corrected Solution\n\n{PLAIN}", PLAIN),
    "a code fence": (f"```\n{PLAIN}\n```", PLAIN),
    "all of them": (f"Sure!\n\n## Answer\n\nHere is it:\n```text\n{PLAIN}\n```\nBye", PLAIN),
    "a heading that is a step": (f"### Step 1: add\n{PLAIN}",) * 2,
    "a trace that begins with such words": (f"Okay, here are 3 pens.\n\n{PLAIN}",) * 2,
    "a displayed answer": ("So:\n\\[\n\\boxed{11}\n\\]\nDone.", "So:\n\\[\n\\boxed{11}\n\\]"),
    "rules and a formula twice": ("---\n\n5 = 5\n\n---\n\n5 = 5\n\n\\boxed{5}",) * 2,
    "Windows line ends": (PLAIN.replace("\n", "\r\n"), PLAIN),
    "step tags without a box": (STEP_TRACE, None),
    "an echo of the request": (f"Problem: 6 + 5\n\nAttempt, whose answer is 30:\n{PLAIN}", None),
    "a loop": (f"{PLAIN}\n\n{PLAIN}", None),
    "a thought": (f"[THINK]The 30 is wrong. \\boxed{{30}}[/THINK]{PLAIN}", PLAIN),
    "a thought without end": (f"[THINK]The 30 is wrong. {PLAIN}", None),
}


@pytest.mark.parametrize("what", PLAIN_REPLIES)
def test_the_plain_trace_in_a_reply(what):
    """Fails if the critic's own words, an echo or a loop are distilled, or a trace is refused."""
    reply, trace = PLAIN_REPLIES[what]
    assert plain_trace(strip_thinking(reply)) == trace


# ---- A critic over HTTP. -------------------------------------------------------------------------


def choice(content, finish_reason="stop", usage=None, **message):
    """The body of a reply."""
    message["content"] = content
    choices = [{"message": message, "finish_reason": finish_reason}]
    return json.dumps({"choices": choices, "usage": usage})


GOOD = choice("Step 1.", usage={"completion_tokens": 7})
REPLY = [("Step 1.", 7)]
REFUSAL = '{"error": {"message": "the server says why"}}'


def answer(code=200, text=GOOD, **headers):
    return code, text, headers


class Handler(BaseHTTPRequestHandler):
    """Answers with the next of `server.answers`, the last of which is repeated.

    That is "drop", "question" (sent back, the first one late), or what `answer` makes.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        key = self.headers.get("Authorization")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.calls.append((self.path, body, key))
            reply = server.answers[0] if len(server.answers) == 1 else server.answers.pop(0)
        if reply == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if reply == "question":
            question = body["messages"][0]["content"]
            time.sleep(0.1 if question.endswith(" 0") else 0)
            reply = answer(text=choice(question))
        code, text, headers = reply
        if self.path.split("?")[0] != "/v1/chat/completions" and "Location" not in headers:
            code = 404
        if body["stream"] is not False:
            text = "data: [DONE]"
        payload = text.replace("KEY", str(key)).encode()  # a server may quote it
        if "Content-Encoding" in headers:
            payload = gzip.compress(payload)
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The user has a hub token, but no key and no proxy; pauses are short."""
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_hub_token")
    monkeypatch.setattr(sd, "ThreadPool", lambda count: ThreadPool(2))  # 16 take their time
    monkeypatch.setattr(sd.HTTPCritic, "pause", 0.01)
    monkeypatch.setattr(sd.HTTPCritic, "patience", 1.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = print  # of a client that hung up
    server.calls = []
    server.answers = [answer()]
    server.lock = threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def asking(count):
    return [[critic_prompts.user(f"correct this {i}")] for i in range(count)]


def ask(server, count=1, address="/v1", **extra):
    """The first replies of a new critic."""
    critic = sd.HTTPCritic(server.url + address, "critic-32b", 9, extra)
    return critic(asking(count), [1] * count)


def failure_of(server, count=1):
    """The message of a first call that fails whole."""
    with pytest.raises(sd.UserError) as caught:
        ask(server, count)
    return str(caught.value)


PASSES = {
    "rate limit": answer(429, **{"Retry-After": "0"}),
    "overload": answer(503),
    "dropped connection": "drop",
    "cut JSON": answer(text='{"choices": [{"mess'),
}


@pytest.mark.parametrize("kind", PASSES)
def test_what_may_pass_is_sent_again(server, kind):
    """Fails if a critique is lost by one bad moment of the server, or an exception gets out."""
    server.answers = [PASSES[kind], answer()]
    assert ask(server) == REPLY
    assert len(server.calls) == 2


@pytest.mark.parametrize("told, pauses", [("12", [12]), ("3600", []), ("9" * 5000, [])], ids=len)
def test_a_server_is_given_the_time_that_it_asks_for(server, monkeypatch, told, pauses):
    """Fails if a rate limit loses what it only delays, or a run stands still for an hour."""
    slept = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(sd, "time", clock)
    monkeypatch.setattr(sd.HTTPCritic, "patience", 13.0)
    server.answers = [answer(429, **{"Retry-After": told}), answer()]
    if pauses:
        assert ask(server) == REPLY
    else:
        assert "429 Too Many Requests" in failure_of(server)
    assert slept == pauses


REFUSALS = [(400, REFUSAL), (401, '[{"error": "why"}]'), (404, "who\nme")]


@pytest.mark.parametrize("code, words", REFUSALS)
def test_a_refusal_is_the_users_to_read(server, code, words):
    """Fails if a wrong key costs steps, or the server's words, be they a list, are lost."""
    server.answers = [answer(code, words)]
    message = failure_of(server, count=3)
    assert f"3 of 3 requests failed, {server.url}/v1: {code} " in message
    assert message.endswith(words.replace("\n", " "))
    assert len(server.calls) == 3


def test_what_is_lost_later_is_counted(server):
    """Fails if it ends the run, a loss goes unsaid or is told twice, or replies change places."""
    critic = sd.HTTPCritic(server.url, "critic-32b", 9, {})
    assert critic(asking(2), [1, 1]) == REPLY * 2
    server.answers = [answer(400, REFUSAL)]
    assert critic(asking(3), [1, 1, 1]) == [(None, 0)] * 3
    assert critic.last_error.startswith("3 of 3") and REFUSAL in critic.last_error
    server.answers = ["question"]
    replies = critic(asking(3), [1, 1, 1])
    assert replies == [(f"correct this {i}", 0) for i in range(3)]
    assert critic.last_error == ""


REPLIES = {
    "cut off": (choice("Step", "length"), (None, 0)),
    "half a pair": (choice("ok \ud83d"), (None, 0)),
    "reasoning apart": (choice("ok", reasoning_content="hm", reasoning="hm"), ("ok", 0)),
    "reasoning alone": (choice(None, reasoning_content="hm"), (None, 0)),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_only_a_whole_text_is_a_reply(server, kind):
    """Fails if half a critique or surrogate pair is passed on, or asked for again."""
    body, expected = REPLIES[kind]
    server.answers = [answer(text=body)]
    assert ask(server) == [expected]
    assert len(server.calls) == 1


@pytest.mark.parametrize("address", ["", "/v1", "/v1/", "/v1/chat/completions", "/v1?x=1"])
def test_every_form_of_an_address_will_do(server, address):
    """Fails if a form that servers print is a 404, or a zipped reply is read as it comes."""
    server.answers = [answer(**{"Content-Encoding": "gzip"})]
    assert ask(server, address=address) == REPLY


@pytest.mark.parametrize("code", [307, 308])
def test_a_redirect_keeps_the_question(server, code):
    """Fails if a redirect is an error, or loses the body."""
    server.answers = [answer(code, Location=server.url + "/v1/chat/completions"), answer()]
    assert ask(server, address="/old") == REPLY
    (old, first, _), (new, second, _) = server.calls
    assert (old, new) == ("/old/v1/chat/completions", "/v1/chat/completions")
    assert first == second


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_no_proxy_and_no_offline_hub_stands_between(server, monkeypatch, host):
    """Fails if http_proxy is asked for a server on this machine, or HF_HUB_OFFLINE forbids it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.url = server.url.replace("127.0.0.1", host)
    assert ask(server) == REPLY


def test_the_request_is_greedy_and_takes_the_users_parameters(server):
    """Fails if a default is not sent, null removes nothing, or an unknown parameter is lost."""
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    ask(server)
    ask(server, max_tokens=None, temperature=0.6, max_completion_tokens=99, **thinking)
    (_, plain, _), (_, changed, _) = server.calls
    common = dict(model="critic-32b", messages=asking(1)[0], stream=False)
    assert plain == dict(common, temperature=0, max_tokens=9)
    assert changed == dict(common, temperature=0.6, max_completion_tokens=99, **thinking)


@pytest.mark.parametrize("key", [None, "", "\n"])
def test_the_hub_token_is_not_the_critics(server, monkeypatch, key):
    """Fails if the user's hub token is sent, as the client does without a key."""
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    ask(server)
    assert "hf_" not in str(server.calls[0][2])


def test_the_key_is_sent_and_said_nowhere(server, monkeypatch, caplog, capfd):
    """Fails if the key is not sent, is sent with its line end, or is quoted in a message or log."""
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\r\n")
    caplog.set_level("DEBUG")
    server.answers = [answer(401, '{"error": "no such key: KEY"}')]
    message = failure_of(server)
    assert server.calls[0][2] == "Bearer sk-secret"
    assert "no such key" in message and "Bearer ***" in message
    assert "sk-secret" not in message + caplog.text + "".join(capfd.readouterr())


def test_the_key_follows_no_redirect_to_another_host(server, monkeypatch):
    """Fails if a server can pass the key on."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = server.url.replace("127.0.0.1", "localhost") + "/v1/chat/completions"
    server.answers = [answer(307, Location=other), answer()]
    assert ask(server) == REPLY
    assert [key for _, _, key in server.calls] == ["Bearer sk-secret", None]


# ---- Models and templates. -----------------------------------------------------------------------

# wide enough that positions are few of its weights
# wide enough that positions are few of its weights
WIDE = {"hidden_size": 32, "max_position_embeddings": 64}
GOOD_MODELS = {
    "llama": {},
    "gemma3_text": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo3": {"attention_dropout": 0.5},
    "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_bigcode": {"attn_pdrop": 0.5, "embd_pdrop": 0.5, **WIDE},
    "gemma3": {"text_config": SHAPE, "vision_config": {"hidden_size": 24, "num_hidden_layers": 1}},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", GOOD_MODELS)
def test_a_good_model_is_taken_and_samples_what_it_scores(family, capsys):
    """Fails if padding shifts positions, the cache differs from the whole pass, dropout is on,
    checkpointing changes a gradient, or adapters are put where they never train, without a word."""
    model = tiny_model(family, **GOOD_MODELS[family])
    cfg = config(condition="grpo")
    chat = chat_of(model)
    sd.check_model(chat)
    rollouts = rollouts_of(adapt(chat, noise=0.1), cfg, 3)
    saved = gradients(chat, rollouts, cfg)
    model.activation_checkpointing_disable()
    assert_close(gradients(chat, rollouts, cfg), saved, **CLOSELY)
    assert all(gradient.any() for gradient in saved.values())
    sd.print_opening(chat, sd.Split([], [], [], "none", ""))
    printed = capsys.readouterr().out
    assert re.search(r"adapt \d+%", printed)
    assert ("WARNING" in printed) == (family == "qwen3_moe")


BAD_MODELS = [
    ("mamba", {}, "cached decoding"),
    ("recurrent_gemma", {"num_hidden_layers": 3, "w_init_variance_scale": 1.0}, "caps or scales"),
    ("opt", {"ffn_dim": 16}, "cached decoding"),  # dropout in the layer itself
    ("gemma2", {}, "caps or scales"),
    ("cohere", {}, "caps or scales"),
    ("granite", {"logits_scaling": 1.005}, "caps or scales"),
    ("phi", {}, "bias"),
    ("zamba", {"attn_layer_period": 3, "attn_layer_offset": 2}, "share their weights"),
    ("llama4_text", {}, "no decoder apart"),
]


@pytest.mark.parametrize("family, changes, message", BAD_MODELS)
def test_a_model_that_would_train_wrongly_is_refused(family, changes, message):
    """Fails if the head's arithmetic, a sampler without history, or a shared weight passes."""
    large = dict(num_hidden_layers=6, initializer_range=1.0, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=message):
        sd.check_model(chat_of(tiny_model(family, **{**large, **changes})))


ROPES = [
    ("llama", {"rope_type": "dynamic", "factor": 8.0}, {"max_position_embeddings": 64}, 64),
    ("phi3", {"rope_type": "longrope"}, {"original_max_position_embeddings": 32}, 32),
]


@pytest.mark.parametrize("family, rope, changes, window", ROPES)
def test_the_window_ends_where_one_long_row_would_change_all_others(family, rope, changes, window):
    """Fails if rotary embeddings that switch with the longest row are used beyond the switch."""
    rope |= dict(rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    assert sd.window_of(tiny_model(family, rope_parameters=rope, **changes).config) == window


MESSAGES = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
MESSAGES += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
BAD_TEMPLATES = [
    (None, "no chat template"),
    (MESSAGES.replace("{{ m.content }}", PARTS), "drops or changes"),
    (MESSAGES.replace("m.content", "m.content | e"), "drops or changes"),
    (MESSAGES.replace("in messages", "in messages[-1:]"), "drops or changes"),
    (MESSAGES + "{{ raise_exception('no tools') }}", "fails .*no tools"),
    ({"tool_use": MESSAGES, "rag": MESSAGES}, "multiple chat templates"),
]


@pytest.mark.parametrize("template, message", BAD_TEMPLATES)
def test_a_template_that_does_not_say_all_it_is_told_is_refused(chat, template, message):
    """Fails if a missing template falls back to bare text, or a run trains on blank prompts."""
    chat.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        sd.make_chat(chat.model, chat.tokenizer)


def test_a_prompt_is_the_same_tomorrow(chat):
    """Fails if a template writes today's date, be it inside a macro."""
    dated = "{% macro top() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ top() }}"
    chat.tokenizer.chat_template = dated + MESSAGES
    dated = sd.make_chat(chat.model, chat.tokenizer)
    assert dated.decode(prompts_of(dated, "x")[0]) == "01 Jan 2026x"


def test_the_templates_own_tokens_end_turns_and_cannot_be_written_in_a_text(chat):
    """Fails if one of the end tokens, wherever it is named, is missed, or a text opens a turn."""
    chat.tokenizer.add_tokens(["<User>", "<stop>", "<other>"])  # 259, 260, 261
    own = MESSAGES.replace("<|user|>", "<User>").replace("<|end|>", "<stop>")
    chat.tokenizer.chat_template = own
    chat.model.generation_config.eos_token_id = [0, 7]
    marked = sd.make_chat(chat.model, chat.tokenizer)
    assert marked.end_ids == [0, 7, 260]
    (ids,) = prompts_of(marked, "<User><stop><|end|><|assistant|><other>")
    assert [ids.count(i) for i in (259, 260, 0, 2, 261)] == [1, 1, 0, 1, 1]


def test_thinking_is_asked_for_and_cut_off(tmp_path, folder, chat, capfd):
    """Fails if --teacher-thinking does not reach the template, or a thought would become c."""
    assert run_in(tmp_path, folder, "--condition reference --teacher-thinking") == 2
    assert "--teacher-thinking" in error_of(capfd)
    chat.tokenizer.chat_template = MESSAGES + "{{ enable_thinking }}"
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = sd.make_chat(chat.model, chat.tokenizer)
    (r,) = rollouts_of(chat, config(teacher_thinking=True), 1)
    assert chat.decode(r.prompt).endswith("False")
    assert chat.decode(r.teacher_prompt).endswith("True")
    assert chat.reply(chat.tokenizer(f"<think>no</think>{TRACE}<|end|>")["input_ids"]) == TRACE


# ---- Problems. -----------------------------------------------------------------------------------


def load(chat, tmp_path, content, **changes):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return sd.load_problems(config(data=str(path), **{"test_problems": 5, **changes}), chat)


ROW = '{"problem": "sara\'s 1+1", "solution": "s1+1=2####2", "answer": "2"}'
BAD_DATA = [
    (ROW + "\n" + ROW.replace("sara's 1", " Sara 's  1"), "1 problems .* 1 duplicate"),
    (ROW + "\n" + ROW.replace("1+1", "-1+1"), "2 problems"),
    ('{"problem": "1', "takes a .json .* line 1"),
    (b"PAR1\x15\x04\xff", "takes a .json .* 'utf-8'"),
    ('{"problem": "1+1", "answer": "2"}', "1 without a solution"),
    (ROW.replace('"s1+1=2####2"', "null"), "1 without a solution"),
    (ROW.replace('"2"', "NaN"), "1 not for"),
    (ROW + "\n{}", "row 2: needs the texts"),
    (ROW.replace("1+1", "1+" * 3000), "1 too long"),
    (ROW.replace("1+1", "\\ud800"), "surrogates"),
]


@pytest.mark.parametrize("content, message", BAD_DATA, ids=[message for _, message in BAD_DATA])
def test_bad_data_is_one_clear_line(chat, tmp_path, content, message):
    """Fails if a malformed file gives a traceback, or a message without file, place and field."""
    with pytest.raises(sd.UserError, match=message) as error:
        load(chat, tmp_path, content)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


NUMBERS = ["-5", "5", "12.50", "0.10"]
ROWS = [f'{{"problem": "{i}+1", "solution": "s", "answer": {a}}}' for i, a in enumerate(NUMBERS)]
ROWS.append('{"question": "9+1", "answer": "9+1 #### 10"}')


@pytest.mark.parametrize("text", ["\ufeff" + "\r\n".join(ROWS), "[" + ",\n".join(ROWS) + "]"])
def test_good_data_is_read_in_every_form(chat, tmp_path, text):
    """Fails on a byte-order mark, Windows line ends, an array, or a number that is rounded."""
    split = load(chat, tmp_path, text, test_problems=2)
    assert {p.answer for part in split[:3] for p in part} == {*NUMBERS, "10"}


def test_the_split_is_disjoint_and_depends_on_neither_order_nor_seed(chat, tmp_path):
    """Fails if a test problem can be trained on after the file is shuffled or the seed changed."""
    rows = [ROW.replace("1+1", f"{i}+{i}") for i in range(40)]
    one = load(chat, tmp_path, "\n".join(rows))
    other = load(chat, tmp_path, "\n".join(rows[::-1] + rows[:7]), seed=1)
    assert one[:3] == other[:3] and one.fingerprint == other.fingerprint
    assert "7 duplicate" in other.dropped
    assert len({p.question for part in one[:3] for p in part}) == 40 == sum(map(len, one[:3]))


def test_every_epoch_visits_every_problem_once():
    """Fails if a new epoch, or a resumed run, repeats or skips a problem."""
    problems = list("abcdefghij")
    seen = sd.next_problems(problems, 0, 20, 0)
    epochs = [problem for _, problem in seen[:10]], [problem for _, problem in seen[10:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == problems and epochs[0] != epochs[1]
    assert seen[:7] + sd.next_problems(problems, 7, 13, 0) == seen


# ---- Run folder: log, checkpoint, resume. --------------------------------------------------------


def log_of(run):
    """The last entry of each step and of each validation, without times."""
    entries = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        if line.endswith("}") and '"step"' in line:  # a kill may have cut a line off
            entry = json.loads(line)
            entry = {name: value for name, value in entry.items() if not name.endswith("_s")}
            entries[entry["step"], "kl_base" in entry] = entry
    return list(entries.values())


def checkpoint_of(tmp_path, name="checkpoint.pt"):
    return sd.load_checkpoint(tmp_path / "run" / name)


def assert_same_run(a, b, **tolerance):
    assert_close(log_of(a / "run"), log_of(b / "run"), **tolerance)
    assert_close(checkpoint_of(a)["adapters"], checkpoint_of(b)["adapters"], **tolerance)


def save_half(state, path):
    Path(path).write_bytes(b"half")
    raise OSError("killed")


@pytest.mark.parametrize("condition", ["reference", "grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, folder, condition, monkeypatch):
    """Bit for bit; all validations score 0. Fails if optimiser, random numbers, best score or place
    in the data are not restored, half a line or file is in the way, or best.pt is replaced."""
    flags = f"--condition {condition} --eval-every 2 --steps "
    assert run_in(tmp_path / "a", folder, flags + "5") == 0
    assert run_in(tmp_path / "b", folder, flags + "3") == 0
    with open(tmp_path / "b/run/log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "co')  # killed in the middle of a line
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", save_half)
        run_in(tmp_path / "b", folder, flags + "5 --resume")
    assert run_in(tmp_path / "b", folder, flags + "5 --resume") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b", **EXACTLY)
    assert [entry["step"] for entry in log_of(tmp_path / "a/run")] == [1, 2, 2, 3, 4, 4, 5]
    assert checkpoint_of(tmp_path / "b", "best.pt")["state"][0] == 2


def test_kill_9_at_random_moments_loses_nothing(tmp_path, folder):
    """Fails if a killed run cannot go on, or to other numbers. Forked, for speed."""
    flags = "--condition reference"
    log = tmp_path / "run/log.jsonl"
    rng = random.Random(0)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3"])
    for resume in ("", "--resume"):
        size = log.stat().st_size if log.exists() else 0
        arguments = (tmp_path, folder, f"{flags} --steps 9999 {resume}")
        child = forks.Process(target=run_in, args=arguments)
        child.start()
        while not log.exists() or log.stat().st_size <= size + 2000:  # until it takes steps
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        child.kill()
        child.join()
    steps = checkpoint_of(tmp_path)["state"][0] + 1
    assert run_in(tmp_path, folder, f"{flags} --resume --steps {steps}") == 0
    assert run_in(tmp_path / "whole", folder, f"{flags} --steps {steps}") == 0
    assert_same_run(tmp_path, tmp_path / "whole", **EXACTLY)


def test_a_resumed_run_takes_a_new_flag_and_refuses_other_problems(tmp_path, folder, capfd):
    """Fails if the old lr stays, or if problems that were tested are trained on."""
    assert run_in(tmp_path, folder, "--condition reference --steps 1") == 0
    before = checkpoint_of(tmp_path)["adapters"]
    lines = (folder / "problems.jsonl").read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join(lines[1:]))
    (folder / "turned.jsonl").write_text("\n".join(lines[::-1]))
    capfd.readouterr()
    assert run_in(tmp_path, folder, "--steps 2 --resume", "other.jsonl") == 2
    assert "other problems" in error_of(capfd)
    assert run_in(tmp_path, folder, "--steps 2 --resume --lr 0", "turned.jsonl") == 0
    after = checkpoint_of(tmp_path)
    assert (after["config"].lr, after["state"][0]) == (0, 2)
    assert_close(before, after["adapters"], **EXACTLY)


def test_three_steps_without_a_critique_stop_the_run(tmp_path, folder, capfd):
    """The tiny model writes no critique. Fails if such a run goes on, silently, untrained."""
    assert run_in(tmp_path, folder, "--condition critique --steps 9") == 2
    assert "no valid context" in capfd.readouterr().err
    assert checkpoint_of(tmp_path)["state"][0] == 3


def test_an_old_run_is_moved_aside_and_nothing_else_is_touched(tmp_path, folder, capfd):
    """Fails if a finished run, a running one, or somebody's other folder is written into."""
    flags = "--condition grpo --steps 0"
    other = tmp_path / "other/run"
    for _ in range(2):
        assert run_in(tmp_path, folder, flags) == 0
    assert (tmp_path / "run.1/checkpoint.pt").exists()
    with sd.lock(tmp_path / "run/log.jsonl"):
        for resume in ("", " --resume"):
            capfd.readouterr()
            assert run_in(tmp_path, folder, flags + resume) == 2
            assert "going on" in error_of(capfd)
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    assert run_in(tmp_path / "other", folder, flags) == 2
    assert "not a run folder" in error_of(capfd)
    assert os.listdir(other) == ["thesis.tex"]


def test_a_broken_or_hostile_checkpoint_is_one_line(tmp_path, folder, capfd):
    """Fails if code in a file is run, or the API key is sent to an address in a file."""
    assert run_in(tmp_path, folder, "--condition reference --steps 0") == 0
    path = tmp_path / "run/checkpoint.pt"
    owned = tmp_path / "owned"
    checkpoint = torch.load(path)
    for changes, words in (
        ({"temperature": -1.0}, "temperature"),
        (dict(condition="critique", critic="http://evil/v1", critic_model="m"), "--critic again"),
        (None, "cannot read"),
    ):
        if changes:
            torch.save({**checkpoint, "config": checkpoint["config"] | changes}, path)
        else:
            path.write_bytes(f"cos\nsystem\n(S'touch {owned}'\ntR.".encode())
        capfd.readouterr()
        assert run_in(tmp_path, folder, "--resume") == 2
        assert words in error_of(capfd)
    assert not owned.exists()


def test_kl_base_is_the_loss_of_a_teacher_with_the_students_prompt(chat, monkeypatch):
    """At first 0. Fails if it is a mean of means, the other way round, or of the base alone."""
    monkeypatch.setattr(sd, "evaluate", lambda *_: [[written()]])
    log = {}
    cfg = config()
    run = SimpleNamespace(cfg=cfg, step=1, best=1.0, write=log.update)
    rollouts = rollouts_of(adapt(chat), cfg)
    sd.validate(run, chat, rollouts, [])
    assert log["kl_base"] == pytest.approx(0, abs=1e-6)
    sd.update(chat, sgd(chat, lr=1.0), rollouts, cfg)
    sd.validate(run, chat, rollouts, [])
    same = [replace(r, teacher_prompt=r.prompt) for r in rollouts]
    loss = sd.update(chat, sgd(chat), same, cfg)["loss"]
    assert log["kl_base"] == pytest.approx(loss, rel=1e-4) and loss > 1e-4


def test_both_exports_hold_the_policy(tmp_path, folder, chat):
    """Fails if adapters are merged twice or not at all, or names and scale are not PEFT's."""
    assert run_in(tmp_path, folder, "--condition reference --steps 2 --lr 0.05") == 0
    run = tmp_path / "run"
    ids = torch.arange(15)[None]
    checkpoint = checkpoint_of(tmp_path)
    merged = sd.load_model(str(run / "model"), config())
    before = chat.model(input_ids=ids).logits
    sd.add_adapters(chat.model, checkpoint["config"])
    sd.load_adapters(chat, checkpoint, SimpleNamespace(**checkpoint))
    policy = chat.model(input_ids=ids).logits
    assert_close(merged.model(input_ids=ids).logits, policy, **CLOSELY)
    assert not torch.allclose(policy, before, atol=1e-2)
    assert merged.tokenizer.chat_template == chat.tokenizer.chat_template
    # PEFT's: y = W x + (lora_alpha / r) lora_B lora_A x in each of target_modules
    factors = load_file(run / "adapter/adapter_model.safetensors")
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    for name, layer in sd.lora_layers(chat.model).items():
        assert name.endswith(tuple(settings["target_modules"]))
        a, b = (factors.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        assert torch.equal(a, layer.A) and torch.equal(b, layer.B)
    assert not factors


# ---- Processes. ----------------------------------------------------------------------------------


def run_all_conditions(tmp_path, folder):
    """Each in a folder of its name."""
    sd.load_critic = lambda *_: ScriptedCritic(TRACE)
    for name in CONDITIONS:
        assert run_in(tmp_path / name, folder, f"--condition {name} --steps 2 --eval-every 2") == 0


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
    one = tmp_path / "one"
    two = tmp_path / "two"
    program = tmp_path / "program.py"
    program.write_text(RUN_ALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", program, HERE, two, folder]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step    2/2") == len(CONDITIONS)
    monkeypatch.setattr(sd, "load_critic", None)  # restored afterwards
    run_all_conditions(one, folder)
    for name in CONDITIONS:
        assert_same_run(one / name, two / name, rtol=1e-5, atol=1e-5)
        assert all(entry.get("scored", 4) == 4 for entry in log_of(one / name / "run"))


# ---- Command line and README. --------------------------------------------------------------------

WRONG_VALUES = {
    "--temperature nan": "temperature",
    "--condition grpo --attempts-per-step 9": "--group-size",
    "--resume --out /nowhere": "/nowhere",
    "--prompts steps": "no tokens",
}


@pytest.mark.parametrize("flags", WRONG_VALUES)
def test_a_wrong_value_is_one_line_and_exit_2(flags, capfd, tmp_path):
    """Fails if a mistake ends in a traceback, a usage text, or a run with another value."""
    out = tmp_path / "run"
    assert sd.main(["--preset", "toy", "--out", str(out), *flags.split()]) == 2
    assert WRONG_VALUES[flags] in error_of(capfd)
    assert not out.exists()


README = (HERE / "README.md").read_text("utf-8")


def test_the_readmes_step_by_hand_runs(capsys):
    """Fails if the block on the README's page no longer fits the code."""
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': ([\d.e-]+)", printed)]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert re.search(r"critique [sth]\d", printed)


# ---- eval.py. ------------------------------------------------------------------------------------


def test_scores_equal_numbers_worked_by_hand():
    """Fails if a problem's attempts are counted one by one, or Pass is not "at least once"."""
    right = written("<answer>1</answer>", 1.0)
    wrong = written("no idea", 0.0)
    values = evaluation.scores([[right, wrong, wrong, wrong], [wrong] * 4], "exact")
    avg, passed, maj, length, cut, unparsable = values.tolist()
    assert avg == [0.25, 0] and passed == maj == [1, 0]
    assert length == [1, 1] and cut == [0, 0] and unparsable == [0.75, 1]


VOTES = [
    ("1 2 1.0", 1.0),
    ("1 2", 0.5),
    ("2 2 1", 0.0),
    ("2 4/2 1", 0.0),
    ("none none 1", 1.0),
    ("2 2 3 3 1 1", 1 / 3),
    ("<think>2 <think>2 1", 1.0),
]


@pytest.mark.parametrize("answers, share", VOTES)
def test_majority_equals_numbers_worked_by_hand(answers, share):
    """1 is right. Fails if a tie goes to the first, or no answer or an open thought has a vote."""
    group = []
    for answer in answers.split():
        thought, _, value = answer.rpartition(">")
        text = "no idea" if answer == "none" else f"{thought}> <answer>{value}</answer>"
        group.append(written(text, float(answer in ("1", "1.0"))))
    assert evaluation.majority(group, "exact") == share


def test_votes_are_grouped_by_the_grader(monkeypatch):
    """Fails if 2√3, written in three ways, loses against two of 5."""

    def plain(text: str) -> str:
        return re.sub("[ {}]", "", text)

    def is_correct(text, answer, grader):
        assert grader == "math-verify"
        return plain(critic_prompts.extract_answer(text)) == plain(answer)

    monkeypatch.setattr(evaluation, "is_correct", is_correct)
    group = []
    for answer in (r"2\sqrt{3}", r"2\sqrt3", "5", "5", r"2 \sqrt{3}"):
        group.append(written(rf"\boxed{{{answer}}}", float(answer == "5")))
    assert evaluation.majority(group, "math-verify") == 0


def test_the_bootstrap_interval_covers_and_repeats():
    """Fails if it is unseeded, or too narrow."""
    values = np.random.default_rng(1).random(200)
    mean, low, high = evaluation.estimate(values)
    assert (mean, low, high) == evaluation.estimate(values)
    error = values.std() / math.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert mean == pytest.approx(values.mean()) and low < mean < high


def test_an_estimate_resamples_problems_and_not_attempts():
    """Fails if attempts at one problem are independent, or a problem without data counts."""
    hits = np.repeat([[0.0], [1.0]], 50, axis=1)  # (2 problems, 50 attempts)
    assert evaluation.bracketed(evaluation.estimate(hits), unit=" %") == "50.0 % [0.0, 100.0]"
    counts = hits.copy()
    counts[1, 10:] = 0
    assert evaluation.estimate(hits * counts, counts) == (1, 1, 1)
    assert evaluation.bracketed(evaluation.estimate(hits, 0 * hits)) == "-"


@pytest.mark.parametrize("value, lowest", [(0, 0), (1, 0), (0, -1)])
def test_equal_values_have_an_interval_that_knows_their_number(value, lowest):
    """Fails if 0 of 2 and 0 of 1,000 read alike, or an interval leaves its limits."""
    widths = []
    for n in (2, 8, 1000):
        mean, low, high = evaluation.estimate(np.full(n, value), limits=(lowest, 1))
        assert mean == value and lowest <= low <= value <= high <= 1
        widths.append((high - low) / (1 - lowest))
    # Wilson's upper ends for 0 of 2, 0 of 8 and 0 of 1,000
    assert widths == pytest.approx([0.658, 0.324, 0.0038], abs=0.001)


def test_eval_compares_runs_with_their_base_and_repeats(tmp_path, folder, monkeypatch, capsys):
    """Fails if base and run see other random numbers: an untrained run must equal the base."""
    assert run_in(tmp_path, folder, "--condition grpo --steps 0") == 0
    (tmp_path / "run").rename(tmp_path / "untrained")
    # the same problems with other solutions share the table
    rows = map(json.loads, (folder / "problems.jsonl").read_text().splitlines())
    reworded = tmp_path / "reworded.jsonl"
    reworded.write_text("\n".join(json.dumps({**row, "solution": "####0"}) for row in rows))
    assert run_in(tmp_path, folder, "--condition reference --steps 2 --lr 0.1", reworded) == 0
    (tmp_path / "run").rename(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert evaluation.main(["untrained", "base", "--samples", "3", "--sample-batch", "7"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == (tmp_path / "eval.md").read_text() + "\n"
    assert "| untrained − base | 0.0 [-43.4, 43.4] |" in texts[0]
    attempts = [json.loads(line)["text"] for line in (tmp_path / "eval.jsonl").open()]
    base, untrained, trained = np.reshape(attempts, (3, 5 * 3)).tolist()
    assert base == untrained != trained


def test_a_run_that_was_trained_on_other_problems_is_refused(tmp_path, folder, capsys):
    """Fails if problems of the training are tested, or other settings share a table."""
    data = tmp_path / "problems.jsonl"
    runs = []
    lines = (folder / "problems.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    for temperature in ("1.0", "0.5"):
        flags = f"--condition grpo --steps 0 --temperature {temperature}"
        assert run_in(tmp_path / temperature, folder, flags, data) == 0
        runs.append(str(tmp_path / temperature / "run"))
    assert evaluation.main([*runs, "--samples", "1"]) == 2
    assert "differ in temperature" in error_of(capsys)
    data.write_text("\n".join(lines[1:]))
    assert evaluation.main([runs[0], "--samples", "1"]) == 2
    assert "held other problems" in error_of(capsys)


# a critique of s7+6=3s3*3=6s6+1=7####7, and where the first wrong step is
EDITS = [
    ("s7+6=3s3*3=9s9+1=0####0", (6, 12)),
    ("s7+6=3t3*3=9s9+1=0####0", (6, 12)),
    ("s7+6=3s3*3=6s6+1=7####0", (18, 21)),
    ("####0", (0, 6)),
    ("s7+6=3s3*3=9s9+1=0####9", None),
]


@pytest.mark.parametrize("critique, place", EDITS)
def test_the_first_wrong_step_is_the_one_that_the_critique_does_not_copy(toy, critique, place):
    """Fails if bounds are off by a token, or a critique with a wrong answer is believed."""
    text = "s7+6=3s3*3=6s6+1=7####7"
    ids = toy.tokenizer(text)["input_ids"] + [0]
    r = written(text, ids=ids, context=critique, problem=sd.Problem("", "", "0"))
    assert evaluation.wrong_step(toy, r, config()) == place
    right = replace(r, text=TRACE, reward=1.0)
    assert evaluation.wrong_step(toy, right, config()) is None
    assert evaluation.wrong_step(toy, replace(right, context=TRACE), config()) == (0, 0)


def test_what_is_said_before_the_first_step_is_no_edit(toy):
    """Fails if an attempt's opening words, which a critique leaves out, count as the edit."""
    chat = replace(toy, tokenizer=byte_tokenizer())
    text = "In <step_1> I add.\n<step_1>1 + 1 = 3</step_1>"
    context = "<step_1>1 + 1 = 2</step_1>\n<answer>2</answer>"
    ids = chat.tokenizer(text)["input_ids"]
    r = written(text, ids=ids, context=context, problem=sd.Problem("", "", "2"))
    start, end = evaluation.wrong_step(chat, r, config(prompts="steps"))
    assert text[start:end] == "1 + 1 = 3"


def test_localisation_equals_numbers_worked_by_hand():
    """Fails if positive A counts as negative, or shares are means of shares."""
    cases = [
        (0, [-1.0, 5.0, -3.0, -4.0], (1, 3)),
        (1, [0.5, -0.5, 0.0, -1.0], (0, 0)),
        (0, [-8.0, 0.0, 0.0], (0, 1)),
        (0, [-9.0], None),
    ]
    sums = [evaluation.localise(reward, np.array(a), step) for reward, a, step in cases]
    cells = evaluation.measures(np.array(sums), 2)
    values = [float(cell.split()[0]) for cell in cells]
    assert values == pytest.approx([6.25, 68.75, 25.0, 0.5, 50.0], abs=0.06)


def test_the_pictures_show_what_a_model_wrote_as_text():
    """Fails if a response can run a script in the reader's browser."""
    evil = "<script>alert('x')</script>\x1b"
    row = {"advantage": [-1.0, 2.0], "context": evil, "note": evil}
    e = dict(problem=evil, answer=evil, outcome="wrong", tokens=[evil, "b" * 99], step=(0, 1))
    e |= dict(critic_prompt=evil, teacher_prompt=evil, corrected=evil)
    e |= dict(rows={"critique (copy)": row, evil: row, "grpo": row})
    text = evaluation.page([e], evil, {evil: [evil] * 5})
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_token_study_measures_every_context(tmp_path):
    """Fails if a row is left out, or critique and reference do not differ as the paper says."""
    run = tmp_path / "run"
    flags = f"--preset toy --steps 0 --closing-problems 0 --out {run}"
    assert sd.main(flags.split()) == 0
    assert evaluation.main(["--tokens", str(run), "--problems", "6"]) == 0
    content = json.loads((run / "tokens.json").read_text())
    styles = [f"critique ({style})" for style in critic_prompts.STYLES]
    assert list(content["numbers"]) == [*styles, "reference", "copy"]
    before = {}
    for name, cells in content["numbers"].items():
        before[name] = [float(number) for number in re.findall(r"\d+\.\d+", cells[0])]
    assert before["critique (copy)"][2] < before["reference"][1]
    page = (run / "tokens.html").read_text()
    for e in content["examples"]:
        for text in (e["problem"], e["critic_prompt"], e["rows"]["reference"]["context"]):
            assert f"{text}</pre>" in page or f"{text}\n" in page
    assert [e["outcome"] for e in content["examples"]] == ["wrong", "right"]


def test_the_token_study_sends_no_key_to_an_address_in_a_file(tmp_path, folder, monkeypatch, capfd):
    """Fails if --tokens asks the http critic that a checkpoint names."""
    assert run_in(tmp_path, folder, "--condition grpo --steps 0") == 0
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt")
    checkpoint["config"] |= dict(critic="http://127.0.0.1:9/v1", critic_model="good")
    torch.save(checkpoint, tmp_path / "run/checkpoint.pt")
    loaded = []
    critic = ScriptedCritic(TRACE)
    monkeypatch.setattr(sd, "load_critic", lambda *_: loaded.append(1) or critic)
    capfd.readouterr()
    command = ["--tokens", str(tmp_path / "run"), "--problems", "1", "--samples", "1"]
    assert evaluation.main(command) == 2
    assert "--critic" in error_of(capfd) and not loaded
    assert evaluation.main([*command, "--critic", "self"]) == 0


PREFLIGHT = ["--preflight", "--preset", "toy", "--problems", "16"]


def test_preflight_tells_a_critique_from_another_problems(capsys):
    """Fails if a control is no control, or a row is missing."""
    assert evaluation.main(PREFLIGHT) == 0
    text = capsys.readouterr().out
    gaps = [float(gap) for gap in re.findall(r"teacher − base: .*? \| ([+-][\d.]+)", text)]
    critique, reference, copy, other = gaps
    assert max(copy, other) < 20 and min(critique, reference) > 40
    for row in ("base: right", "cut at the cap", "critic: failed", "equal rewards", "tokens"):
        assert row in text
    for name in ("critique", "reference"):
        assert f"\n{name}: can work" in text


def test_preflight_with_a_wrong_key_shows_the_error_alone(monkeypatch, capsys):
    """Fails if "use a stronger critic" is said where the server refused the key."""

    def refuse(conversations, lengths):
        raise sd.UserError("http://x/v1: 401 Unauthorized: no such key")

    monkeypatch.setattr(sd, "load_critic", lambda *_: refuse)
    assert evaluation.main(PREFLIGHT) == 2
    printed = capsys.readouterr()
    assert "401" in printed.err and "base: right" not in printed.out


def test_the_advice_follows_the_interval_and_the_number_of_problems():
    """Fails if a gain that may be none is called one, or a gap of 2 of 2 problems a success."""
    for low, high, words in ((1, 3, "can work"), (-1, 3, "undecided"), (-3, -1, "do harm")):
        assert words in evaluation.advice((low + 1, low, high), 8)
        assert "no advice from fewer" in evaluation.advice((low + 1, low, high), 7)
    assert "no context is valid" in evaluation.advice((math.nan,) * 3, 8)


def test_the_gap_of_a_teacher_leaves_out_attempts_without_a_context(toy):
    """Fails if an attempt whose critique failed counts as one that gained nothing."""
    cfg = sd.parse_config(["--preset", "toy"])
    problems = sd.load_problems(cfg, toy).validation[:24]
    rollouts = sd.attempt(toy, list(enumerate(problems)), cfg)
    contexts = [r.problem.solution for r in rollouts]
    contexts[::3] = [None] * 8
    wrong = np.mean([1 - r.reward for r, context in zip(rollouts, contexts) if context])
    # the teacher that reads the solution is nearly always right
    gap, _, _ = evaluation.teacher_gap(toy, rollouts, contexts, cfg)
    assert gap == pytest.approx(wrong, abs=0.1) and wrong > 0.5


def test_filter_keeps_what_is_seldom_solved(tmp_path, folder, monkeypatch):
    """Fails if never- or often-solved problems are kept, or the pool itself is overwritten."""

    def attempt(chat, problems, cfg, samples, seed):
        rollouts = []
        for _, problem in problems:
            right = int(problem.question[0])  # of 4 attempts
            rollouts += [written(reward=float(k < right)) for k in range(samples)]
        return rollouts

    monkeypatch.setattr(sd, "attempt", attempt)
    pool = tmp_path / "pool.jsonl"
    out = tmp_path / "hard.jsonl"
    row = '{"problem": "%d+1", "solution": "s", "answer": "1", "extra": ["0"]}'
    pool.write_text("\n".join(row % i for i in range(5)))
    command = f"--filter {pool} --samples 4 --preset toy --model {folder} --sample-batch 8 --out"
    assert evaluation.main([*command.split(), str(out)]) == 0
    assert out.read_text() == row % 1 + "\n"
    assert evaluation.main([*command.split(), f"{tmp_path}/x/../pool.jsonl"]) == 2


def test_a_log_is_read_as_a_resumed_run_leaves_it(tmp_path, folder):
    """Fails if half a line stops the plot, or a step repeated after a kill counts twice."""
    assert run_in(tmp_path, folder, "--condition reference --steps 3 --eval-every 1") == 0
    steps, _ = evaluation.read_log(tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        # the end of a kill, a repeated step, the line being written
        log.write('{"step": 3, "lo\n' + json.dumps({**steps[1], "accuracy": 0.25}) + '\n{"st')
    again, checks = evaluation.read_log(tmp_path / "run")
    assert [entry["step"] for entry in again] == [entry["step"] for entry in checks] == [1, 2, 3]
    assert again[1]["accuracy"] == 0.25


# ---- Forks: assets/real/svamp.py, toy/critic_study.py, toy/reproduce.py. -------------------------


def load_script(name, monkeypatch):
    """A program of a subfolder; what it adds to sd.py leaves with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sd, "CONTEXTS", dict(sd.CONTEXTS))
    monkeypatch.setattr(sd, "add_teacher_prompts", sd.add_teacher_prompts)
    spec = importlib.util.spec_from_file_location(Path(name).stem, HERE / name)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, Path(name).stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def svamp(monkeypatch):
    return load_script("assets/real/svamp.py", monkeypatch)


SHOP = sd.Problem("What does Tom pay?", "3 * 2 = 6\n6 + 5 = 11", "11.0")
# what a critique keeps of an attempt, and what it replaces
SCRIPTED = [
    ("plain", "Pens: 3 \\text{ pens} * 2 dollars = 6.\n\n", "6 + 5 = 12, so \\boxed{12}"),
    ("steps", "<step_1>3 * 2 = 6</step_1>\n<step_2>", "6 - 5 = 1</step_2>\n<answer>1</answer>"),
    ("steps", "<step_1>3 * 2 = 6</step_1>\n", "6 - 5 = 1\n<answer>1</answer>"),
    # no equation: the number from nowhere, then the answer, in its whole sentence
    ("plain", "1. There are 3 pens.\n2. See step 9. ", "They cost 17 dollars: \\boxed{5}"),
    ("plain", "3 * 2 = 6. The bill:\n6.00 dollars and 5. ", "So 12 dollars: \\boxed{12}"),
    # a right equation may be stated again, and the end of a longer sum is no equation
    ("plain", "3 * 2 = 6. With these 3 * 2 = 6 ", "6 + 5 = 12 is right: \\boxed{12}"),
]


@pytest.mark.parametrize("prompts, copied, wrong", SCRIPTED)
def test_the_scripted_critic_corrects_from_the_first_wrong_equation(svamp, prompts, copied, wrong):
    """Fails if a right equation is not copied, anything behind it is, or a step is not closed."""
    critique = svamp.correct(written(copied + wrong, problem=SHOP), config(prompts=prompts))
    assert critique.startswith((copied + "3 * 2 = 6, 6 + 5 = 11", copied + "6 + 5 = 11"))
    assert critique.count("<step_1>") == critique.count("</step_1>")
    assert FORMATS[prompts].extract_trace(critique) == critique
    assert is_correct(critique, SHOP.answer, "exact")


def test_edits_scores_the_tokens_from_the_first_edit_on(svamp, toy):
    """Fails if a copied token is scored, a row loses a token, or the log sees the cut attempt."""
    cfg = config(condition="edits")
    (r,) = sd.attempt(toy, numbered_problems(1), cfg)
    other = "s" if toy.decode(r.ids[5:6]) == "t" else "t"
    r.context = toy.decode(r.ids[:5]) + other
    (scored,) = sd.add_teacher_prompts(toy, [r], cfg)
    assert scored.ids == r.ids[5:]
    assert scored.prompt + scored.ids == r.prompt + r.ids
    assert scored.teacher_prompt + scored.ids == r.teacher_prompt + r.ids
    # the critique goes on where the attempt ends: its last token is the edit
    r.context = r.text + other
    (scored,) = sd.add_teacher_prompts(toy, [r], cfg)
    assert scored.ids == r.ids[-1:]


def test_filtered_keeps_the_critiques_that_reach_the_answer(svamp):
    """Fails if a critique with another answer, or none, is taught."""
    replies = ["6 + 5 = 11: \\boxed{11}", "6 + 5 = 12: \\boxed{12}", "6 + 5 = 11"]
    rollouts = [written("6 + 5 = 13: \\boxed{13}", problem=SHOP) for _ in replies]
    critiques = svamp.write_filtered(
        rollouts, lambda conversations, lengths: [(reply, 9) for reply in replies],
        config(prompts="plain"),
    )  # fmt: skip
    assert critiques == [replies[0], None, None]


def test_copying_accounts_for_the_whole_gradient(svamp, monkeypatch, capsys):
    """Fails if a token is in no place or in another's, or a copy is not compared with itself."""
    copying = load_script("assets/real/copying.py", monkeypatch)
    copying.main("places", "10", "--preset", "toy")
    rows = re.findall(r"\| (?:tokens|loss|gradient) .*", capsys.readouterr().out)
    assert len(rows) == 1 + 3 * 2 * 2
    on_edit = []
    for row in rows:
        before, on, after = map(float, re.findall(r"([\d.]+) %", row))
        assert before + on + after == pytest.approx(100, abs=0.2)
        on_edit.append(on)
    # of the tokens, and of the critique's gradient under eq (4)
    assert on_edit[0] < 5 < 15 < on_edit[2]
    copying.main("agreement", "10", "--preset", "toy")
    cells = [row.split(" | ")[-1] for row in re.findall(r".*‖.*", capsys.readouterr().out)]
    assert cells[1::3] == ["1.00 |"] * 2 and set(cells[::3] + cells[2::3]).isdisjoint(cells[1::3])


def test_a_worked_solution_is_the_first_right_attempt(folder, tmp_path, monkeypatch):
    """Fails if a wrong attempt is kept, a right one is tried again, or a row's solution is lost."""
    worked = load_script("assets/real/worked.py", monkeypatch)
    rows = [{"problem": name, "solution": "equation", "answer": "1"} for name in "012"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tried = []

    def attempt(chat, problems, cfg, seed):
        tried.append([i for i, _ in problems])
        # problem 0 is right at once, problem 1 in its third attempt, problem 2 never
        return [written(ids=[70 + seed], reward=float(seed == (0, 2, 9)[i])) for i, _ in problems]

    monkeypatch.setattr(sd, "attempt", attempt)
    worked.main(str(folder), str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"))
    assert tried == [[0, 1, 2], [1, 2], [1, 2], [2]]
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert made[0]["solution"] != made[1]["solution"] != made[2]["solution"] == "equation"
    assert [row["source"][-9:] for row in made] == ["attempt 1", "attempt 3", "data set"]


@pytest.fixture
def critic_study(monkeypatch):
    """The study, reduced to four kinds of error."""
    load_script("toy/reproduce.py", monkeypatch)
    module = load_script("toy/critic_study.py", monkeypatch)
    kinds = {}
    for name in ("wrong value", "wrong value, all", "reference, wrong", "grpo, flipped"):
        kinds[name] = module.KINDS[name]._replace(shares=(100,))
    monkeypatch.setattr(module, "KINDS", kinds)
    monkeypatch.setattr(module, "LINES", dict.fromkeys(kinds, "o"))
    monkeypatch.setattr(module, "SHARES", (100,))
    monkeypatch.setattr(module, "PROBLEMS", 12)
    return module


@pytest.mark.filterwarnings("ignore:invalid value")  # two equal gains have no correlation
def test_the_critic_study_trains_every_arm_once(critic_study, folder, tmp_path, monkeypatch):
    """Fails if an arm is left out of the tables, or a second call trains or draws anew."""
    pytest.importorskip("matplotlib")
    command = f"--seeds 1 --out {tmp_path / 'runs'} --assets {tmp_path} -- --steps 1 --group-size 2"
    command += f" --data {folder / 'problems.jsonl'} --test-problems 4 --eval-samples 2"
    command += " --attempts-per-step 4"
    assert critic_study.main(command.split()) == 0
    made = [(tmp_path / f"critic_study.{suffix}").read_text() for suffix in ("md", "svg")]
    for arm in ("critique", "reference", "wrong value 100", *critic_study.KINDS):
        assert f"| {arm} |" in made[0]
    monkeypatch.setattr(sd, "train", lambda cfg: pytest.fail("trained again"))
    assert critic_study.main(command.split()) == 0
    assert made == [(tmp_path / f"critic_study.{suffix}").read_text() for suffix in ("md", "svg")]


def chain(text):
    """An attempt at a toy problem; its right values are 3 9 3 4 5 0."""
    solution = "h6+7=3h3*3=9h4+9=3h1+3=4h1+4=5h2*5=0####0"
    problem = sd.Problem("7+6*3+4+1+1*2", solution, "0")
    return written(text, float(text.endswith("####0")), problem=problem)


RIGHT = "s7+6=3t3*3=9s9+4=3s3+1=4s1+4=5s5*2=0####0"
WRONG = "s7+6=3t3*3=6s6+4=0s0+1=1s1+1=2s2*2=4####4"


def test_an_error_of_the_study_is_the_one_that_it_is_named_after(critic_study):
    """Fails if an error is none, in another step, the attempt's own, or not followed up."""
    right = chain(RIGHT)
    wrong = chain(WRONG)
    first = critic_study.pick_first
    # the right value is 9, and the next one 0
    fixed = "s7+6=3t3*3=0s0+4=4s4+1=5s5+1=6s6*2=2####2"
    assert critic_study.wrong_value(wrong, first) == fixed
    assert critic_study.wrong_place(wrong, first).startswith("s7+6=4t4*3=2")
    assert critic_study.right_attempt_spoilt(wrong, first) is None
    # the swapped operands of the right attempt's fifth step are kept
    assert critic_study.right_attempt_spoilt(right, first)[24:30] == "s1+7=8"


@pytest.fixture
def reproduce(monkeypatch):
    return load_script("toy/reproduce.py", monkeypatch)


def test_the_interval_over_seeds_equals_a_number_worked_by_hand(reproduce):
    """1 and 3: mean 2, standard error 1, t 12.71. Fails if the deviation is divided by n."""
    assert reproduce.half_width(np.array([1.0, 3.0])) == pytest.approx(12.71)


def test_reproduce_trains_every_arm_and_goes_on_where_it_stopped(
    reproduce, tmp_path, folder, monkeypatch, capsys
):
    """Fails if an arm is left out, a step is taken twice, or a run of another setting is used."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sd, "load_critic", lambda *_: ScriptedCritic(TRACE))
    monkeypatch.setattr(reproduce, "SWEEP", (1.0,))
    # the tiny model's attempts have no answer, so they would not be copied
    monkeypatch.setitem(sd.CONTEXTS, "copy", lambda rollouts, *_: [r.text for r in rollouts])
    command = f"--seeds 1 --out {tmp_path} -- --model {folder} --steps 2 --test-problems 6"
    command += f" --data {folder / 'problems.jsonl'} --eval-samples 2 --attempts-per-step 4"
    command += " --group-size 2 --max-new-tokens 12 --lora-rank 4 --temperature "
    take_step = sd.take_step
    taken = []
    tables = []

    def killed(*arguments):
        taken.append(arguments)
        if len(taken) == 4:
            raise sd.UserError("killed")
        return take_step(*arguments)

    monkeypatch.setattr(sd, "take_step", killed)
    for temperature, code in (("1.0", 2), ("1.0", 0), ("1.0", 0), ("0.5", 2)):
        assert reproduce.main([*command.split(), temperature]) == code
        if code == 0:
            tables.append((tmp_path / "table.md").read_text())
    assert "another temperature" in capsys.readouterr().err
    assert len(taken) == 2 * len(reproduce.ARMS) + 1
    assert tables[0] == tables[1]
    assert all(f"| {arm} | 0.002* |" in tables[0] for arm in reproduce.ARMS)


# ---- Memory: a GPU that is only traced. ----------------------------------------------------------


class MemoryTrace(TorchDispatchMode):
    """Bytes of the storages that are alive on the meta device, where tensors have no data.

    A number that is read is `number`, and every row is found to be unfinished. A tensor of the CPU
    in the path raises, as it would on a GPU.
    """

    def __init__(self, model, number=1):
        super().__init__()
        self.now = self.peak = 0
        self.number = number
        self.alive = set()
        self.add(model.state_dict())
        self.weights = self.now

    def add(self, tree):
        for tensor in tensors_in(tree):
            storage = tensor.untyped_storage()
            key = storage._cdata
            size = storage.nbytes()
            if tensor.is_meta and key not in self.alive:
                self.alive.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        inputs = tensors_in((args, kwargs))
        name = op.overloadpacket.__name__
        # a CPU tensor without dimensions is a number, which any device takes
        devices = {tensor.device.type for tensor in inputs if tensor.dim()}
        assert len(devices) < 2, f"{op} mixes {devices}"
        if name in ("_local_scalar_dense", "item", "is_nonzero") and inputs[0].is_meta:
            return self.number
        if name == "nonzero":
            return inputs[0].new_empty(inputs[0].numel(), 1, dtype=torch.long)
        out = op(*args, **(kwargs or {}))
        self.add(out)
        return out


def flash_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """CUDA's kernel. The meta device takes the plain one, which holds (L, L) matrices."""
    assert attn_mask is None
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]


@pytest.fixture
def patch(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    return monkeypatch


def meta_chat(cfg, **shape):
    """A Qwen3 without data: bfloat16 weights, float32 adapters."""
    with torch.device("meta"):
        chat = chat_of(tiny_model(dtype=torch.bfloat16, **shape))
    if not cfg.gradient_checkpointing:
        chat.model.activation_checkpointing_disable()
    sd.add_adapters(chat.model, cfg)
    return chat


def trace_update(chat, cfg, prompt, context):
    """Two steps of two micro-batches: gradients and AdamW's state are there at the peak."""
    r = replace(written(), prompt=[3] * prompt, ids=[5] * cfg.max_new_tokens)
    if cfg.condition != "grpo":
        r.teacher_prompt = [3] * (prompt + context)
    optimizer = adamw(chat, cfg.lr)
    with MemoryTrace(chat.model) as trace:
        for _ in range(2):
            sd.update(chat, optimizer, [r] * (2 * cfg.micro_batch), cfg)
    return trace


def trace_sampling(chat, rows, prompt, tokens, patch):
    """`tokens` tokens after a prompt; a cache of the prompt's length stands for the prompt."""
    shape = chat.model.config
    size = (rows, shape.num_key_value_heads, prompt - 1, shape.head_dim)
    with patch.context() as patch, MemoryTrace(chat.model, tokens) as trace:
        cache = transformers.DynamicCache(config=shape)
        for layer in range(shape.num_hidden_layers):
            empty = [torch.empty(size, dtype=chat.head.dtype, device="meta") for _ in range(2)]
            cache.update(*empty, layer)
        del empty
        patch.setattr(transformers, "DynamicCache", lambda config: cache)
        # the only place that reads more than a number
        patch.setattr(torch.Tensor, "tolist", lambda numbers: np.ones(numbers.shape, int).tolist())
        uniforms = np.zeros((rows, tokens), np.float32)
        sd.generate(chat, [[3]] * rows, [tokens] * rows, rows, uniforms, 1.1)
    return trace


def test_checkpointing_saves_memory_and_a_step_needs_no_cpu(patch):
    """On the meta device. Fails if the step runs in eval mode: checkpointing is silently off."""
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=32)
    peaks = {}
    for on in (True, False):
        cfg = config(gradient_checkpointing=on, max_new_tokens=40, kl="sampled")
        trace = trace_update(meta_chat(cfg, **shape), cfg, 20, 60)
        peaks[on] = trace.peak - trace.weights
    assert 0 < peaks[True] < 0.5 * peaks[False]


def test_the_sampler_needs_no_cpu_and_holds_one_cache(patch):
    """On the meta device. Fails if the cache is copied as a whole, or kept in the end."""
    trace = trace_sampling(meta_chat(config(), num_hidden_layers=16), 32, 500, 4, patch)
    cache = 32 * 504 * 16 * 2 * 8 * 2  # rows, tokens, layers, keys and values, width, bytes
    assert cache < trace.peak - trace.weights < 1.3 * cache
    assert trace.now - trace.weights < 0.1 * cache


# ---- Trace: python test_sd.py --trace. -----------------------------------------------------------

QWEN3_1_7B = dict(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
PROMPT, CONTEXT = 300, 2400  # tokens; the preset gives those of a response


def print_trace(patch):
    """What the qwen preset holds at its peak: no allocator's fragments, no kernel's workspace."""
    cfg = sd.Config()
    print("| Qwen3-1.7B, traced | GiB at the peak |\n|---|---|")
    for rows, on in itertools.product((cfg.micro_batch, 2, 1), (True, False)):
        own = replace(cfg, micro_batch=rows, gradient_checkpointing=on)
        trace = trace_update(meta_chat(own, **QWEN3_1_7B), own, PROMPT, CONTEXT)
        what = f"update, --micro-batch {rows}, checkpointing {'on' if on else 'off'}"
        print_row(what, f"{trace.peak / 2**30:.1f}")
    chat = meta_chat(cfg, **QWEN3_1_7B)
    # in a run the adapters' gradients and AdamW's two moments are there as well
    state = 3 * 4 * sum(p.numel() for p in sd.adapters(chat.model).values())
    attempt = PROMPT + cfg.max_new_tokens
    critique = PROMPT + CONTEXT + 3 * cfg.max_new_tokens // 2
    for length, rows in itertools.product((attempt, critique), (64, 32, 16)):
        # the last two tokens: that is where the cache is longest
        trace = trace_sampling(chat, rows, length - 2, 2, patch)
        print_row(f"{rows} rows of {length:,} tokens", f"{(trace.peak + state) / 2**30:.1f}")


# ---- Benchmark: python test_sd.py. ---------------------------------------------------------------
#
# Times are ratios of jobs that take turns in this very process, medians of 3 rounds. Peak memory is
# measured in a process of its own for each job.

SHAPES = [(2048, 576, 49_152), (512, 2048, 151_936)]  # (N, H, V)


def loss_job(form, shape):
    """Eq (4) with its gradient, as a call without arguments."""
    h_student, h_teacher, head, ids, advantage = loss_inputs(*shape)
    head /= shape[1] ** 0.5
    rows = max(1, sd.CHUNK // shape[2])

    def naive():
        h = h_student.clone().requires_grad_(True)
        log_p = F.log_softmax(h @ head.T / 1.1, -1)
        log_q = F.log_softmax(h_teacher @ head.T / 1.1, -1)
        naive_student_teacher(log_p, log_q, ids, advantage).sum().backward()

    def fused():
        sd.fused_loss(h_student, h_teacher, head, ids, advantage, sd.kl_student_teacher, 1.1)

    def matmuls():
        for part, other in zip(h_student.split(rows), h_teacher.split(rows)):
            z = part @ head.T
            other @ head.T
            z @ head

    return {"naive": naive, "fused": fused, "matmuls": matmuls}[form]


def checkpointing_job(on):
    """One micro-batch of 8 rows of 256 tokens through 12 layers of width 256."""
    shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=12, head_dim=32)
    chat = adapt(chat_of(tiny_model(num_attention_heads=8, initializer_range=0.02, **shape)))
    if not on:
        chat.model.activation_checkpointing_disable()
    r = replace(written(), prompt=[1] * 32, ids=[3] * 224, advantage=1.0)
    return lambda: sd.update(chat, sgd(chat), [r] * 8, config(condition="grpo", micro_batch=8))


def print_peak(form, shape):
    job = loss_job(form, shape)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    job()
    # not ru_maxrss, which starts at the parent's
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(int(peak[1]) // 2**10 - before // 2**20)


def peak(form, shape):
    """Extra memory of a loss at its peak, MiB."""
    command = [sys.executable, __file__, "--peak", form, *map(str, shape)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def compare(jobs):
    """The time of the first job by that of each other one. The first round warms up."""
    seconds = []
    for _ in range(4):
        clock = [time.perf_counter()]
        for job in jobs:
            job()
            clock.append(time.perf_counter())
        seconds.append(np.diff(clock))
    first, *others = np.array(seconds[1:]).T
    return " / ".join(f"{np.median(first / other):.2f}" for other in others)


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def sampler_jobs():
    """Ours and model.generate: 128 rows of 64 tokens, both from the full softmax."""
    chat = sd.load_model("toy", config())
    chat.end_ids = [1000]
    prompts = prompts_of(chat, *(p.question for _, p in numbered_problems(128)))
    numbers = random_numbers(128, 64)
    ids = torch.tensor(prompts)
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=1000)
    settings |= dict(max_new_tokens=64, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return [
        lambda: sd.generate(chat, prompts, [64] * 128, 128, numbers),
        lambda: chat.model.generate(ids, **settings),
    ]


def benchmark():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| what | time | peak extra memory, MiB |\n|---|---|---|")
    for shape in SHAPES:
        jobs = [loss_job(form, shape) for form in ("fused", "naive", "matmuls")]
        peaks = f"{peak('fused', shape)} / {peak('naive', shape)}"
        print_row(f"fused loss by naive / by bare matmuls, {shape}", compare(jobs), peaks)
    print_row("sampler by model.generate, toy, 128 × 64 tokens", compare(sampler_jobs()), "")
    jobs = [checkpointing_job(True), checkpointing_job(False)]
    print_row("checkpointing on by off; --trace has the memory", compare(jobs), "")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], [int(size) for size in sys.argv[3:]])
    elif sys.argv[1:] == ["--trace"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", flash_attention)
            print_trace(patch)
    else:
        torch.set_num_threads(os.cpu_count())
        benchmark()
