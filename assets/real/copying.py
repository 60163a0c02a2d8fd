"""Where do the loss and its gradient lie: before the critique's first edit, on it, or after it?

  python assets/real/copying.py 200 --preset toy
  python assets/real/copying.py 60 --condition scripted --model FOLDER --data assets/real/svamp.jsonl …

The untrained model makes one attempt at each of so many test problems. Of the wrong attempts that
the critique changes, the critique, a copy of the attempt and the reference give a loss and a
gradient wrt the student's logits at each token. The edit is the critique's, in all three. Shares
are of the loss, and of the sum of the gradient's norms, over all tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import svamp  # noqa: E402
from svamp import evaluation, sd  # noqa: E402


def main(count: str, *flags: str) -> None:
    sd.prepare_output()
    cfg = sd.parse_config(list(flags))
    chat = sd.load_model(cfg.model, cfg)
    critic = None if cfg.condition in sd.NO_CRITIC else sd.load_critic(cfg, chat)
    problems = sd.load_problems(cfg, chat).test[: int(count)]
    rollouts = sd.attempt(chat, list(enumerate(problems)), cfg, seed=sd.EVAL_SEED)
    critiques = sd.CONTEXTS[cfg.condition](rollouts, critic, cfg)
    copies = sd.copy_attempts(rollouts, None, cfg)
    # only attempts for which every context exists: an attempt without an answer is not copied
    edited, edits = [], []
    for r, critique, copy in zip(rollouts, critiques, copies):
        r.context = critique
        if not r.reward and critique not in (None, r.text) and copy:
            edited.append(r)
            edits.append(svamp.first_edit(chat, r))
    contexts = {
        cfg.condition: [r.context for r in edited],
        "copy": [r.text for r in edited],
        "reference": [r.problem.solution for r in edited],
    }
    places = np.array([[edit, 1, len(r.ids) - edit - 1] for r, edit in zip(edited, edits)])
    everything = places.sum(1)
    rows = [["tokens", "", "", "", *shares(places)]]
    for name, texts in contexts.items():
        for r, context in zip(edited, texts):
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
    # svamp's own add_teacher_prompts would shorten the rollouts of `edits`
    scored = svamp.add_all_teacher_prompts(chat, rollouts, cfg)
    for r, edit in zip(scored, edits, strict=True):
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
