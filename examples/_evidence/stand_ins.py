"""Tiny random models and made-up data in place of the pretrained and the real ones: does all of it run?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pretrained.data import Labelled
from pretrained.encoders import Encoder
from torch import nn


PREFIX = "stand-in:"
WORDS = 40
LIKED, DISLIKED = range(2, 12), range(12, 22)


class Words:
    """A tokenizer of `w0 w1 …`."""

    pad_token_id = 0

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}


def _bert() -> Encoder:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return Encoder(BertModel(config, add_pooling_layer=False), 16, "mean", Words())


def _llama() -> Encoder:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return Encoder(LlamaModel(config), 16, "last", Words())


def _vit() -> Encoder:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    return Encoder(Dinov2Model(config), 16, "first")


def _convolutional() -> Encoder:
    from pretrained.encoders import ConvolutionalEncoder

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.pointwise = nn.Conv2d(8, 16, 1)

        def extract_features(self, pixel_values: Any) -> Any:
            return self.pointwise(self.depthwise(self.norm(self.stem(pixel_values)).relu()).relu())

    return Encoder(ConvolutionalEncoder(Network()), 16, "mean")


ENCODERS: dict[str, Callable[[], Encoder]] = {
    f"{PREFIX}minilm": _bert,
    f"{PREFIX}smollm2": _llama,
    f"{PREFIX}dinov2": _vit,
    f"{PREFIX}efficientnet": _convolutional,
}


def encoder(model: str) -> Encoder:
    """The stand-in of this name, always with the same weights."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    made = ENCODERS[model]()
    torch.set_rng_state(state)
    return made


def data(source: str) -> Labelled:
    """Sentences with more liked or more disliked words, or images that are brighter above or below."""
    count = 1300
    generator = torch.Generator().manual_seed(sum(map(ord, source)))
    labels = torch.randint(2, (count,), generator=generator)
    if source.removeprefix(PREFIX) in ("mnist", "digits"):
        images = torch.randint(0, 128, (count, 1, 28, 28), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[:, :14] += 100 * label
            image[:, 14:] += 100 * (1 - label)
        return Labelled(images.to(torch.uint8), labels)
    texts = []
    for label in labels.tolist():
        length = int(torch.randint(3, 9, (), generator=generator))
        words = LIKED if label else DISLIKED
        chosen = [words[int(torch.randint(10, (), generator=generator))] for _ in range(length)]
        noise = torch.randint(22, WORDS, (length,), generator=generator).tolist()
        texts.append(" ".join(f"w{word}" for word in [1, *chosen, *noise]))
    return Labelled(texts, labels)
