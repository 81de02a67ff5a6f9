"""Writes gold_goldens.json: TRL's GOLD loss on small logits, for test_cross_tokenizer.

    python tests/distillation/make_gold_goldens.py     # where torch and trl 1.x are installed

Vocabularies of 7 and 9 entries, of which `PAIRS` are the same tokens; one row of 8 student and 7
teacher tokens whose bytes meet in chunks of 2:1, 1:1, 1:2 and 3:2 tokens.
"""

import json
import pathlib
from types import SimpleNamespace

import numpy as np

PAIRS = {0: 1, 2: 0, 3: 4, 8: 6}  # theirs: ours
OURS = [2, 1, 1, 1, 3, 1, 2, 1]  # byte lengths; the first has no predictor
THEIRS = [2, 2, 1, 2, 1, 2, 2]


def main() -> None:
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    rng = np.random.default_rng(0)
    student = rng.normal(size=(1, len(OURS), 7)).astype(np.float32)
    teacher = rng.normal(size=(1, len(THEIRS), 9)).astype(np.float32)
    our_ids = rng.integers(0, 7, (1, len(OURS)))
    their_ids = rng.integers(0, 9, (1, len(THEIRS)))
    losses = {}
    for beta in (0.0, 0.5, 1.0):
        loss = ULDLoss.__new__(ULDLoss)
        torch.nn.Module.__init__(loss)
        plain = SimpleNamespace(
            skip_student_eos=False,
            skip_teacher_eos=False,
            token_merge_strategy="bayesian",
            use_extended_uld=True,
            student_temperature=1.0,
            teacher_temperature=1.0,
            use_hybrid_loss=True,
            hybrid_matched_weight=None,
            hybrid_unmatched_weight=None,
            distillation_weight=1.0,
            ignore_index=-100,
            beta=beta,
            _vocab_mapping=PAIRS,
            _teacher_matched_ids=set(PAIRS),
        )
        for name, value in vars(plain).items():
            setattr(loss, name, value)
        mapping = torch.zeros(9, dtype=torch.long)
        for their_name, ours in PAIRS.items():
            mapping[their_name] = ours
        loss.mapping_tensor = mapping

        def offsets(lengths: list[int]) -> torch.Tensor:
            ends = np.cumsum(lengths)
            return torch.tensor(np.stack([ends - lengths, ends], -1)[None])

        def labels(ids: np.ndarray) -> torch.Tensor:
            out = torch.tensor(ids)
            out[:, 0] = -100
            return out

        value = loss._compute_distillation_loss(
            torch.tensor(student),
            torch.tensor(teacher),
            labels(our_ids),
            labels(their_ids),
            torch.tensor(our_ids),
            torch.tensor(their_ids),
            offsets(OURS),
            offsets(THEIRS),
        )
        losses[str(beta)] = float(value)
    record = {
        "student": student.tolist(),
        "teacher": teacher.tolist(),
        "our_ids": our_ids.tolist(),
        "their_ids": their_ids.tolist(),
        "losses": losses,
    }
    path = pathlib.Path(__file__).with_name("gold_goldens.json")
    path.write_text(json.dumps(record) + "\n")
    print(losses)


if __name__ == "__main__":
    main()
