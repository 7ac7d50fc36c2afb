"""The methods of the tables, on the tiny Llama of `_trainers`."""

import torch

from peft_ext import GPSConfig, MoReSConfig, NeuroAdaConfig, PSNConfig, gradient_scores

from ._trainers import tokens


def _gps(base, **options):
    """By the gradient of the model's own loss; a reward model has no such loss here."""
    if options.get("task_type") == "SEQ_CLS":
        return GPSConfig(k=1, selection="magnitude", **options)
    config = GPSConfig(k=1, **options)
    batches = torch.utils.data.DataLoader(tokens().with_format("torch"), batch_size=4)
    return config.with_scores(gradient_scores(base, batches, config=config))


METHODS = {
    "NeuroAda": lambda base, **options: NeuroAdaConfig(k=1, **options),
    "GPS": _gps,
    "PSN": lambda base, **options: PSNConfig(k=4, **options),
    # The first tokens after the last layer are read by nothing.
    "MoReS": lambda base, **options: MoReSConfig(rank=2, token_positions="f2", layers_to_transform=0, **options),
}
