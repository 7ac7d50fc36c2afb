"""Steered models and batches for the tests of calls with caches, and the tokens that are to be steered."""

import functools
from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from peft_ext import MoReSConfig
from tests._models.vision_language import IMAGE, PAD, build, inputs, text_config
from tests.contract._common import fill
from tests.tuners.mores._common import ends


GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
GREEDY |= {"return_dict_in_generate": True, "pad_token_id": PAD}
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def text_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(text_config()).eval()


@dataclass(frozen=True)
class Case:
    """A base model and its adapter's options; `chosen` names the steered tokens of a batch."""

    family: str
    options: dict
    chosen: object

    def base(self):
        return text_model() if self.family == "text" else build(self.family)

    def model(self):
        return fill(get_peft_model(self.base(), MoReSConfig(rank=2, **self.options)).eval())


def ends_of_text(batch):
    """The first five and the last three."""
    chosen = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(batch["input_ids"]):
        places = ((batch["attention_mask"][row] == 1) & (ids != IMAGE)).nonzero().flatten().tolist()
        chosen[row, places[:5] + places[-3:]] = True
    return chosen


def ends_of_image(batch):
    return ends(batch["input_ids"], 0.5)


BY_IMAGE = {"token_ratio": 0.5}
BY_TEXT = {"token_positions": "f5+l3", "layers_to_transform": "all"}
CASES = {
    "loreft": Case("text", BY_TEXT, ends_of_text),
    "llava": Case("llava", BY_IMAGE, ends_of_image),
    "llava_next": Case("llava_next", BY_IMAGE, ends_of_image),
    "qwen2_vl": Case("qwen2_vl", BY_IMAGE, ends_of_image),
    "gemma3": Case("gemma3", BY_IMAGE, ends_of_image),
    "loreft on llava": Case("llava", BY_TEXT, ends_of_text),
}


@functools.cache
def adapted(name):
    return CASES[name].model()


def batch_of(name, padding=True):
    """Two rows, of which the first is padded on the left."""
    family = CASES[name].family
    texts = ((3, 4), (9, 9)) if padding else ((4, 6), (4, 6))
    batch = inputs("llava" if family == "text" else family, texts, padding="left")
    if family == "text":
        ids = batch["input_ids"]
        batch = {"input_ids": torch.where(ids == IMAGE, 7, ids), "attention_mask": batch["attention_mask"]}
    return batch


def caches(model):
    config = model.config.get_text_config()
    return {"dynamic": DynamicCache(config=config), "static": StaticCache(config=config, max_cache_len=48)}
