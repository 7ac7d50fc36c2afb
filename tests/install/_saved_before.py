"""Adapters as an earlier version wrote them, by `python -m tests.install._saved_before FOLDER` with that version."""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

import peft_ext


IDS = torch.tensor([[5, 9, 3, 7, 2, 11]])


def base():
    """A model whose weights depend on nothing but their names and shapes."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, pad_token_id=0, num_labels=3, attention_bias=True, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) * (number + 1.7)).view_as(parameter) / 2)
    return model


def _scores():
    return {
        name: torch.cos(torch.arange(module.weight.numel()) * 1.3).view_as(module.weight)
        for name, module in base().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "score"
    }


CONFIGS = {
    "neuroada": lambda: peft_ext.NeuroAdaConfig(k=2, task_type="SEQ_CLS"),
    "neuroada_network": lambda: peft_ext.NeuroAdaConfig(k=2, selection="magnitude_network", train_bias=True),
    "gps": lambda: peft_ext.GPSConfig(k=1).with_scores(_scores()),
    "psn": lambda: peft_ext.PSNConfig(density=0.3, modules_to_save=["score"]),
    "mores": lambda: peft_ext.MoReSConfig(rank=2, token_positions="f1+l1", layers_to_transform="all"),
}


def write(folder):
    for name, config in CONFIGS.items():
        model = get_peft_model(base(), config()).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
        with torch.no_grad():
            (folder / name / "logits.json").write_text(json.dumps(model(IDS).logits.tolist()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
