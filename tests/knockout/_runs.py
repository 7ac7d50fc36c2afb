"""What a model says to a batch, in one pass or token by token, and that it is left as it was."""

import copy
from contextlib import contextmanager

import torch

from peft_ext.knockout import AttentionKnockout, ModuleKnockout


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def generated(model, batch, **options):
    """Scores of four greedily generated tokens, `[4, batch, vocabulary]`, and all tokens."""
    made = model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True,
        do_sample=False, **options,
    )  # fmt: skip
    return torch.stack(made.logits), made.sequences


def knockout(model, groups, kind):
    """Of layers 1 and 2: `"attention"` from the image to the question, or the question's `"mlp"`."""
    if kind == "attention":
        return AttentionKnockout(model, [1, 2], [(groups["image"], groups["question"])])
    return ModuleKnockout(model, [1, 2], groups["question"], kind)


@contextmanager
def left_alone(model, batch):
    """Afterwards the model has the same state, the same hooks and the same logits, bit for bit."""

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before, state, count = logits(model, batch), copy.deepcopy(model.state_dict()), hooks()
    yield
    assert hooks() == count
    assert torch.equal(before, logits(model, batch))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
