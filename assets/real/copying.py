"""Where do the loss and its gradient lie: before the critique's first edit, on it, or after it?

  python assets/real/copying.py MODEL PROBLEMS [flags of sd.py]

The untrained model makes one attempt at each of so many test problems. Of the wrong attempts that
the scripted critic corrects, every context of `CONTEXTS` gives a loss and a gradient wrt the
student's logits at each token. The edit is that of the scripted critique, for all contexts. Shares
are of the loss, and of the sum of the gradient's norms, over all tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import svamp  # noqa: E402
from svamp import evaluation, sd  # noqa: E402

CONTEXTS = ("scripted", "copy", "reference")


def main(model: str, count: str, *flags: str) -> None:
    sd.prepare_output()
    cfg = sd.parse_config(["--model", model, *flags])
    chat = sd.load_model(cfg.model, cfg)
    problems = sd.load_problems(cfg, chat).test[: int(count)]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, seed=sd.EVAL_SEED)
    # only attempts for which every context exists: an attempt without an answer is not copied
    critiques = svamp.write_edits(rollouts, None, cfg)
    copies = sd.copy_attempts(rollouts, None, cfg)
    edited, edits = [], []
    for r, critique, copy in zip(rollouts, critiques, copies):
        if critique is not None and copy is not None:
            r.context = critique
            edited.append(r)
            edits.append(svamp.first_edit(chat, r))
    places = np.array([[edit, 1, len(r.ids) - edit - 1] for r, edit in zip(edited, edits)])
    everything = places.sum(1)
    rows = [["tokens", "", "", "", *shares(places)]]
    for name in CONTEXTS:
        for r, context in zip(edited, sd.CONTEXTS[name](edited, None, cfg)):
            r.context = context
        for kl in ("student||teacher", "teacher||student"):
            # || would end a cell of the table
            named = [name, kl.replace("||", "‖")]
            for what, sums in zip(("loss", "gradient"), measure(chat, edited, edits, kl, cfg)):
                mean = evaluation.bracketed(evaluation.estimate(sums.sum(1), everything), 1, ".3f")
                rows.append([*named, what, mean, *shares(sums)])
    print(f"{len(edited)} wrong attempts with all contexts, of {len(rollouts)} attempts\n")
    head = ["context", "divergence", "of", "a token", "before the edit", "on it", "after it"]
    print(evaluation.markdown(head, rows))


@torch.no_grad()
def measure(chat, rollouts, edits, kl, cfg) -> tuple[np.ndarray, np.ndarray]:
    """(rollouts, 3) sums before, on and after the edit: of the losses, of the gradient's norms."""
    losses, norms = [], []
    for r, edit in zip(sd.add_teacher_prompts(chat, rollouts, cfg), edits, strict=True):
        h_student, h_teacher, ids, advantage = sd.forward(chat, [r])
        log_p = sd.log_probs(h_student, chat.head, cfg.temperature)
        log_q = sd.log_probs(h_teacher, chat.head, cfg.temperature)
        loss, gradient = sd.DIVERGENCES[kl](log_p, log_q, ids, advantage)
        for sums, values in ((losses, loss), (norms, gradient.norm(dim=-1))):
            parts = values.split([edit, 1, len(ids) - edit - 1])
            sums.append([part.sum().item() for part in parts])
    return np.array(losses), np.array(norms)


def shares(sums: np.ndarray) -> list[str]:
    """(rollouts, 3) → the share of each place, with a bootstrap interval over problems."""
    whole = sums.sum(1)
    return [evaluation.bracketed(evaluation.estimate(part, whole), unit=" %") for part in sums.T]


if __name__ == "__main__":
    main(*sys.argv[1:])
