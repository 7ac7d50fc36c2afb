"""Attention on image and text: the layer-wise modality attention ratio (LMAR)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from ...sparse.bases.neurons import base_model_of
from ...tuners.mores import MoReSLayer
from ..model.implementation import switched_attention
from ..prompts.image_tokens import image_token_ids


CHOICES = {
    "reduction": ("mean", "sum"),
    "heads": ("mean", "ratio"),
    "queries": ("first", "generated"),
    "system": ("exclude", "text"),
    "average": ("ratios", "means"),
    "engine": ("step", "full"),
}
# Arguments of forward with one value per token, which are cut and extended with input_ids.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@dataclass
class ModalityAttention:
    """
    What [`lmar`] measured.

    Attributes:
        image (`torch.Tensor`): fp64 `[samples, layers, heads]`, attention on visual tokens, reduced as asked.
        text (`torch.Tensor`): the same on text tokens.
        image_share (`torch.Tensor`): fp64 `[samples, layers]`, the part of all attention that visual tokens get,
            mean over heads (the paper's fig. 1).
        heads (`str`), average (`str`): as asked.
    """

    image: Tensor
    text: Tensor
    image_share: Tensor
    heads: str = "mean"
    average: str = "ratios"

    @property
    def per_sample(self) -> Tensor:
        """fp64 `[samples, layers]`: each sample's ratios."""
        return self._ratios(self.image, self.text)

    @property
    def ratio(self) -> Tensor:
        """fp64 `[layers]`: LMAR."""
        if self.average == "ratios":
            return self.per_sample.mean(dim=0)
        return self._ratios(self.image.mean(dim=0), self.text.mean(dim=0))

    def _ratios(self, image: Tensor, text: Tensor) -> Tensor:
        """`[…, layers, heads]` to `[…, layers]`."""
        return (image / text).mean(dim=-1) if self.heads == "ratio" else image.mean(dim=-1) / text.mean(dim=-1)


@torch.no_grad()
def lmar(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    reduction: str = "mean",
    heads: str = "mean",
    queries: str = "first",
    max_new_tokens: int = 16,
    system: str = "exclude",
    count_generated: bool = False,
    average: str = "ratios",
    visual_token_ids: Iterable[int] | None = None,
    engine: str = "step",
    progress: bool = False,
) -> ModalityAttention:
    """
    Measure the layer-wise modality attention ratio (LMAR) of a vision-language model, with or without adapters:
    attention on visual tokens divided by attention on text tokens, per layer.

    Paper: Bi et al., [LLaVA Steering](https://arxiv.org/abs/2412.12359), equation 2. The paper leaves several choices
    open; each is an argument here.

    The prompt without its last token runs with the model's own attention and fills a cache. Then single tokens run
    with eager attention, and their rows are measured. No attention map of tokens × tokens is ever made.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, in eval mode.
        batches (iterable of `dict`):
            Arguments of the model: `input_ids` `[batch, tokens]`, `attention_mask`, `pixel_values` and so on, without
            labels. Padding must be on the left.
        reduction (`str`, *optional*, defaults to `"mean"`):
            How attention on a modality is computed from that on its tokens: their `"mean"`, or their `"sum"`, which
            grows with the number of tokens.
        heads (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: average over heads, then take the ratio. `"ratio"`: take the ratio of each head, then average.
            Heads that ignore text contribute very large numbers to the latter.
        queries (`str`, *optional*, defaults to `"first"`):
            Whose attention is measured. `"first"`: that of the last prompt token, which decides the first output
            token. `"generated"`: also that of each greedily generated token except the last, averaged.
        max_new_tokens (`int`, *optional*, defaults to 16):
            Number of output tokens with `queries="generated"`. An end-of-sequence token does not stop generation, so
            that all samples have as many.
        system (`str`, *optional*, defaults to `"exclude"`):
            What tokens before the first visual token count as (system prompt, template, beginning of sequence).
            `"exclude"`: neither image nor text, as equation 1 has it. `"text"`: text. The beginning of the sequence
            often gets most of the attention, so this matters.
        count_generated (`bool`, *optional*, defaults to `False`):
            Whether generated tokens count as text when later ones attend to them.
        average (`str`, *optional*, defaults to `"ratios"`):
            Average over samples: of their `"ratios"` (equation 2), or of attention first, then the ratio of the
            `"means"`.
        visual_token_ids (iterable of `int`, *optional*):
            Placeholders of visual tokens in `input_ids`. By default those of the model's config.
        engine (`str`, *optional*, defaults to `"step"`):
            `"full"` runs the whole prompt with eager attention. Use it if tokens of a prompt attend to later ones
            (PaliGemma), if a prompt ends in an image, or if MoReS steers text.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`ModalityAttention`]: The measured attention. Its `ratio` is LMAR per layer.

    Raises:
        `ValueError`: If a choice is not known, the model is in training mode, padding is on the right, a sample has no
            visual or no text tokens, or `engine="step"` cannot measure the model.
    """
    given = (reduction, heads, queries, system, average, engine)
    for (name, choices), value in zip(CHOICES.items(), given, strict=True):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}.")
    if model.training:
        raise ValueError("model is in training mode, where dropout would be measured; call model.eval() first.")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a whole number of at least 1.")
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch; pass a list of them: [batch].")
    if engine == "step":
        check_step(model)
    ids = tuple(visual_token_ids) if visual_token_ids is not None else image_token_ids(model.config)
    images, texts, shares = [], [], []
    for batch in tqdm(batches, desc="LMAR", disable=not progress):
        image, text = modality_groups(batch, ids, system)
        if engine == "step" and bool(image[:, -1].any()):
            raise ValueError("engine='step': a sample's prompt ends in a visual token; pass engine='full'.")
        totals: list[Tensor] = []
        for rows in attention_rows(model, batch, max_new_tokens if queries == "generated" else 1, engine):
            totals.append(modality_attention(rows, image, text, reduction, count_generated))
        found = torch.stack(totals).mean(dim=0)  # [3, batch, layers, heads]
        images.append(found[0])
        texts.append(found[1])
        shares.append(found[2].mean(dim=2))
    if not images:
        raise ValueError("batches is empty; pass at least one batch.")
    return ModalityAttention(torch.cat(images), torch.cat(texts), torch.cat(shares), heads, average)


def check_step(model: Any) -> None:
    """Raises `ValueError` if the model's prompt cannot run without its last token."""
    kind = str(getattr(model.config, "model_type", ""))
    if "paligemma" in kind:
        raise ValueError(f"engine='step': {kind}'s prompt attends to later tokens as well; pass engine='full'.")
    for layer in model.modules():
        if isinstance(layer, MoReSLayer) and not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.configs and layer.configs[name].token_positions is not None:
                    raise ValueError(
                        f"engine='step': adapter '{name}' steers tokens counted from the prompt's ends "
                        f"(token_positions={layer.configs[name].token_positions!r}); pass engine='full'."
                    )


def modality_groups(batch: dict[str, Tensor], visual_ids: tuple[int, ...], system: str) -> tuple[Tensor, Tensor]:
    """Bool `[batch, tokens]`: the visual tokens, and those that count as text."""
    if "input_ids" not in batch:
        raise ValueError(f"A batch has {', '.join(batch)}, but no input_ids, which tell visual tokens from text.")
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    if not bool(real[:, -1].all()):
        raise ValueError("attention_mask: samples must end at the last token; pad on the left (padding_side='left').")
    image = torch.isin(ids, torch.tensor(visual_ids, device=ids.device)) & real
    text = real & ~image
    if system == "exclude":
        text &= image.long().cumsum(dim=1) > 0
    for name, mask in (("visual", image), ("text", text)):
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Sample {empty[0]} of a batch has no {name} tokens, so its ratio is not defined.")
    return image, text


def modality_attention(
    rows: list[Tensor], image: Tensor, text: Tensor, reduction: str, count_generated: bool
) -> Tensor:
    """fp64 `[3, batch, layers, heads]`: on image, on text, and the image's share of all attention."""
    # Of all tokens, which the layers without a sliding window attend to.
    new = max(max(row.shape[-1] for row in rows) - image.shape[1], 0)
    masks = [pad(image, (0, new)), pad(text, (0, new), value=count_generated)]
    counts = [mask.sum(dim=1).view(-1, 1) for mask in masks]
    layers = []
    for row in rows:  # [batch, heads, keys]; keys may be only the last ones (sliding windows)
        row = row.double()
        keys = row.shape[-1]
        sums = [(row * mask[:, -keys:].unsqueeze(1)).sum(dim=-1) for mask in masks]  # [batch, heads]
        total = row.sum(dim=-1)
        if reduction == "mean":
            values = [value / count for value, count in zip(sums, counts, strict=True)]
        else:
            values = sums
        layers.append(torch.stack([*values, sums[0] / total]))
    return torch.stack(layers, dim=2)


def attention_rows(model: Any, batch: dict[str, Tensor], number: int, engine: str) -> Iterator[list[Tensor]]:
    """For each output token, each layer's attention `[batch, heads, keys]` of the token that decides it."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ids = inputs.pop("input_ids")
    mask = inputs.pop("attention_mask", torch.ones_like(ids))
    per_token = {name: inputs.pop(name) for name in _PER_TOKEN if name in inputs}
    base = base_model_of(model)
    inner = getattr(base, "model", base)
    cut = 0 if engine == "full" else ids.shape[1] - 1

    def call(start: int, stop: int, **kwargs: Any) -> Any:
        positions = (mask[:, :stop].long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
        if not hasattr(inner, "rope_deltas"):
            kwargs["position_ids"] = positions
        elif start > 0:  # positions in time, height and width; the model finds those of the images in the first call
            kwargs["position_ids"] = positions + inner.rope_deltas.to(positions).expand(3, -1, 1)
        aligned = {name: value[:, start:stop] for name, value in per_token.items()}
        return model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **aligned, **kwargs)

    past = None
    if cut:
        past = call(0, cut, **inputs).past_key_values
        inputs = {}
    with switched_attention(base, base.config.get_text_config(), ["eager"]):
        for index in range(number):
            output = call(cut, ids.shape[1], past_key_values=past, output_attentions=True, **inputs)
            yield [weights[:, :, -1] for weights in output.attentions]
            if index + 1 < number:
                past, cut, inputs = output.past_key_values, ids.shape[1], {}
                ids = torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                per_token = {name: pad(value, (0, 1)) for name, value in per_token.items()}
