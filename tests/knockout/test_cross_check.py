"""The same intervention made with nnsight, an independent library, on the same model. Skipped without it."""

import importlib.util

import pytest
import torch

from peft_ext.knockout import AttentionKnockout
from tests._models.vision_language import build, prepared


pytestmark = pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")


@pytest.mark.parametrize("pair", ["image:question", "question:last", "last:last"])
@pytest.mark.filterwarnings("ignore")
def test_equals_nnsight(pair):
    from nnsight import NNsight

    model, batch, groups = prepared("llava", "eager")
    source, target = (groups[name] for name in pair.split(":"))
    with torch.no_grad(), AttentionKnockout(model, [1, 2], [(source, target)]):
        ours = model(**batch).logits
    blocked = (source[:, None] & target[:, :, None])[:, None]
    lowest = torch.finfo(torch.float32).min
    traced = NNsight(build("llava", "eager"))
    with torch.no_grad(), traced.trace(**batch):
        for index in (1, 2):
            attention = traced.model.language_model.layers[index].self_attn
            arguments, named = attention.inputs
            named = dict(named)
            named["attention_mask"] = named["attention_mask"].masked_fill(blocked, lowest)
            attention.inputs = (arguments, named)
        theirs = traced.lm_head.output.save()
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[attended], theirs[attended], rtol=0, atol=1e-6)
