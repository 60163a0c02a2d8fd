"""What is in the gradient of the untrained model: the correction, or mere copying?

  python assets/real/copying.py places 200 --preset toy
  python assets/real/copying.py agreement 64 --preset toy
  python assets/real/copying.py places 60 --condition scripted --model FOLDER …

places     Where do the loss and its gradient lie: before the critique's first edit, on it, or after
           it? For the wrong attempts that the critique changes, and the loss of three contexts: the
           critique, a copy of the attempt, the reference. The edit is the critique's, in all three.
           Shares are of the loss, and of the sum of its gradients' norms wrt the student's logits.
agreement  The cosine between the adapters' gradients of two halves of the attempts: 1 if both say
           the same, 0 if there is nothing but noise. And the cosine with the copy's gradient of the
           same attempts: 1 if the correction changes nothing.

One attempt at each of so many test problems.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import svamp  # noqa: E402
from svamp import evaluation, sd  # noqa: E402

DIVERGENCES = ("student||teacher", "teacher||student")


def main(table: str, count: str, *flags: str) -> None:
    sd.prepare_output()
    cfg = sd.parse_config(list(flags))
    chat = sd.load_model(cfg.model, cfg)
    critic = None if cfg.condition in sd.NO_CRITIC else sd.load_critic(cfg, chat)
    problems = sd.load_problems(cfg, chat).test[: int(count)]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, seed=sd.EVAL_SEED)
    contexts = {
        cfg.condition: sd.CONTEXTS[cfg.condition](rollouts, critic, cfg),
        "copy": sd.copy_attempts(rollouts, None, cfg),
        "reference": sd.copy_solutions(rollouts, None, cfg),
    }
    # only attempts for which every context exists: one without an answer is not copied
    kept = [i for i in range(len(rollouts)) if all(texts[i] for texts in contexts.values())]
    readers = {
        name: [replace(rollouts[i], context=texts[i]) for i in kept]
        for name, texts in contexts.items()
    }
    print({"places": places, "agreement": agreement}[table](chat, readers, cfg))


# ---- Places. -------------------------------------------------------------------------------------


def places(chat, readers, cfg) -> str:
    critiqued = readers[cfg.condition]
    wrong = [i for i, r in enumerate(critiqued) if not r.reward and r.context != r.text]
    edits = [svamp.first_edit(chat, critiqued[i]) for i in wrong]
    lengths = [len(critiqued[i].ids) for i in wrong]
    tokens = np.array([[edit, 1, n - edit - 1] for edit, n in zip(edits, lengths)])
    rows = [["tokens", "", "", "", *shares(tokens)]]
    for name, rollouts in readers.items():
        measured = measure(chat, [rollouts[i] for i in wrong], edits, cfg)
        for (kl, what), sums in measured.items():
            mean = evaluation.estimate(sums.sum(1), tokens.sum(1))
            # || would end a cell of the table
            named = [name, kl.replace("||", "‖"), what, evaluation.bracketed(mean, 1, ".3f")]
            rows.append([*named, *shares(sums)])
    head = ["context", "divergence", "of", "a token", "before the edit", "on it", "after it"]
    return f"{len(wrong)} wrong attempts\n\n{evaluation.markdown(head, rows)}"


@torch.no_grad()
def measure(chat, rollouts, edits, cfg) -> dict[tuple[str, str], np.ndarray]:
    """{(divergence, loss or gradient): (rollouts, 3) sums before, on and after the edit}.

    Of the gradient it is the sum of the norms.
    """
    sums = {(kl, what): [] for kl in DIVERGENCES for what in ("loss", "gradient")}
    # svamp's own add_teacher_prompts would shorten the rollouts of `edits`
    scored = svamp.add_all_teacher_prompts(chat, rollouts, cfg)
    for r, edit in zip(scored, edits, strict=True):
        h_student, h_teacher, ids, advantage = sd.forward(chat, [r])
        log_p = sd.log_probs(h_student, chat.head, cfg.temperature)
        log_q = sd.log_probs(h_teacher, chat.head, cfg.temperature)
        for kl in DIVERGENCES:
            loss, gradient = sd.DIVERGENCES[kl](log_p, log_q, ids, advantage)
            for what, values in (("loss", loss), ("gradient", gradient.norm(dim=-1))):
                parts = values.split([edit, 1, len(ids) - edit - 1])
                sums[kl, what].append([part.sum().item() for part in parts])
    return {key: np.array(rows) for key, rows in sums.items()}


def shares(sums: np.ndarray) -> list[str]:
    """(rollouts, 3) → the share of each place, with a bootstrap interval over problems."""
    whole = sums.sum(1)
    return [evaluation.bracketed(evaluation.estimate(part, whole), unit=" %") for part in sums.T]


# ---- Agreement. ----------------------------------------------------------------------------------


def agreement(chat, readers, cfg) -> str:
    sd.add_adapters(chat.model, cfg)
    scored = {}
    for name, rollouts in readers.items():
        scored[name] = svamp.add_all_teacher_prompts(chat, rollouts, cfg)
    rows = []
    for kl in DIVERGENCES:
        whole = {}
        for name, rollouts in scored.items():
            # two halves of the same size, and their sum
            first, second = (gradient(chat, rollouts[half::2], kl, cfg) for half in (0, 1))
            whole[name] = first + second
            cosine = torch.cosine_similarity(first, second, 0).item()
            rows.append([name, kl.replace("||", "‖"), f"{cosine:.2f}"])
        for row, name in zip(rows[-len(readers) :], readers):
            row.append(f"{torch.cosine_similarity(whole[name], whole['copy'], 0).item():.2f}")
    head = ["context", "divergence", "cosine of two halves", "cosine with the copy"]
    return f"{len(scored['copy'])} attempts, in two halves\n\n{evaluation.markdown(head, rows)}"


def gradient(chat, rollouts, kl, cfg) -> torch.Tensor:
    """The gradient of the sum over tokens, wrt all adapters."""
    weights = sd.adapters(chat.model).values()
    no_step = torch.optim.SGD(weights, lr=0.0)
    sd.update(chat, no_step, rollouts, replace(cfg, kl=kl, condition="copy", max_grad_norm=0.0))
    tokens = sum(len(r.ids) for r in rollouts)
    return tokens * torch.cat([p.grad.flatten() for p in weights])


if __name__ == "__main__":
    main(*sys.argv[1:])
