"""Answers read after each layer: the logit lens, with or without the final norm, and a tuned lens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.architecture import bind, inspect_model
from ..model.threads import own_thread
from ..prompts.samples import last_positions
from ..sweep.records import Record


@torch.no_grad()
def residual_stream(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor | None = None) -> Tensor:
    """
    States at one position of each row, before the first layer and after each layer. All are taken before the final
    norm, unlike the last entry of transformers' `hidden_states`.

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers.
        inputs (`dict`):
            Arguments of the model.
        positions (`torch.Tensor`, *optional*):
            Position per row, int64 `[batch]`. By default the last attended token.

    Returns:
        `torch.Tensor`: `[layers + 1, batch, D]`, on the CPU.
    """
    architecture = inspect_model(model)
    at = (last_positions(inputs) if positions is None else positions) + architecture.virtual_tokens
    rows = torch.arange(len(at))
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        states.append(hidden[rows.to(hidden.device), at.to(hidden.device)].cpu())

    before = own_thread(lambda module, args, kwargs: keep(bind(module, args, kwargs)["hidden_states"]))
    after = own_thread(lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output))
    with ExitStack() as stack:
        first = architecture.layers[0].module
        stack.enter_context(first.register_forward_pre_hook(before, with_kwargs=True))
        for layer in architecture.layers:
            stack.enter_context(layer.module.register_forward_hook(after))
        model(**inputs, use_cache=False)
    return torch.stack(states)


class RidgeLens:
    """
    A tuned lens: one affine map per layer, from the state at the last position to the state after the last layer. It
    is fitted in closed form by ridge regression.

    Paper: Belrose et al., [Eliciting Latent Predictions from Transformers with the Tuned
    Lens](https://arxiv.org/abs/2303.08112), which fits the maps by gradient descent instead.

    Args:
        weight (`torch.Tensor`):
            Float32 `[layers + 1, D, D]`.
        bias (`torch.Tensor`):
            Float32 `[layers + 1, D]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        if weight.dim() != 3 or bias.shape != weight.shape[:2] or weight.shape[1] != weight.shape[2]:
            raise ValueError(
                f"weight must be [layers + 1, D, D] and bias [layers + 1, D], but they are {tuple(weight.shape)} and "
                f"{tuple(bias.shape)}."
            )
        self.weight, self.bias = weight, bias

    @classmethod
    def fit(
        cls, model: nn.Module, batches: Iterable[Mapping[str, Any]], ridge: float = 1e-2, progress: bool = True
    ) -> RidgeLens:
        """
        Fit the lens on prompts. Use more than `D` prompts, and others than those that you read with the lens
        afterwards.

        Args:
            model (`torch.nn.Module`):
                A decoder of transformers.
            batches (`Iterable[dict]`):
                Arguments of the model, batch by batch.
            ridge (`float`, *optional*, defaults to 0.01):
                Penalty, relative to the mean variance of the states.
            progress (`bool`, *optional*, defaults to `True`):
                Whether to show a progress bar.
        """
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge!r}: must be greater than 0.")
        parts = [residual_stream(model, inputs) for inputs in tqdm(batches, desc="lens", disable=not progress)]
        if sum(part.shape[1] for part in parts) < 2:
            raise ValueError("batches must hold at least two prompts to fit a lens on.")
        states = torch.cat(parts, dim=1).double()  # [layers + 1, prompts, D]
        mean = states.mean(1, keepdim=True)
        centred = states - mean
        target = centred[-1]
        weights, biases = [], []
        for own, average in zip(centred, mean[:, 0], strict=True):
            gram = own.T @ own
            penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
            gram.diagonal().add_(penalty)
            weight = torch.linalg.solve(gram, own.T @ target).T  # [D, D]
            weights.append(weight)
            biases.append(mean[-1, 0] - weight @ average)
        weights[-1], biases[-1] = torch.eye(len(target.T), dtype=torch.float64), torch.zeros_like(biases[-1])
        return cls(torch.stack(weights).float(), torch.stack(biases).float())

    def __call__(self, states: Tensor) -> Tensor:
        """`[layers + 1, batch, D]` to the same, as if after the last layer."""
        if states.shape[0] != self.weight.shape[0] or states.shape[-1] != self.weight.shape[-1]:
            layers, width = self.bias.shape
            raise ValueError(
                f"lens was fitted on a model of {layers - 1} layers, {width} wide, but this one has "
                f"{states.shape[0] - 1} layers, {states.shape[-1]} wide: fit another."
            )
        return torch.einsum("lbd,led->lbe", states.float(), self.weight) + self.bias[:, None]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RidgeLens:
        """Read a file that [`RidgeLens.save`] wrote."""
        tensors = load_file(path)
        return cls(tensors["weight"], tensors["bias"])


@torch.no_grad()
def answer_probability_by_layer(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tokens: Mapping[str, Sequence[int] | int],
    norm: bool = True,
    lens: RidgeLens | None = None,
    positions: Tensor | None = None,
    names: Sequence[str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> list[Record]:
    """
    Read the probability of some words at the last position after each layer.

    Paper: Zhang et al., [Cross-modal Information Flow in Multimodal Large Language
    Models](https://arxiv.org/abs/2411.18620).

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers.
        inputs (`dict`):
            Arguments of the model.
        tokens (`dict[str, int | list[int]]`):
            Per name of a word, its first token, or one token per row. [`answer_tokens`] makes this dict.
        norm (`bool`, *optional*, defaults to `True`):
            Whether to apply the final norm before the output embeddings, as the model does. `False` follows equation
            7.8 of Zhi Zhang's thesis, which has no norm.
        lens ([`RidgeLens`], *optional*):
            A lens to apply to the states first.
        positions (`torch.Tensor`, *optional*):
            Position to read per row, int64 `[batch]`. By default the last attended token.
        names (`list[str]`, *optional*):
            Names of the rows, for the column `sample`.
        info (`dict`, *optional*):
            Further columns of the records.

    Returns:
        `list[dict]`: One record per row, word and layer, with `sample`, `word`, `token_id`, `layer` (0 is before the
        first layer) and `probability`.

    Raises:
        `ValueError`: If an argument is malformed; the message names it.
    """
    architecture = inspect_model(model)
    batch = len(inputs["input_ids"])
    wanted = _check_tokens(tokens, batch, architecture.vocabulary)
    rows = [str(row) for row in range(batch)] if names is None else list(names)
    if len(rows) != batch:
        raise ValueError(f"names must hold {batch} names, one per row, but holds {len(rows)}.")
    if positions is not None and (positions.shape != (batch,) or positions.is_floating_point()):
        raise ValueError(f"positions must be int64 of shape ({batch},), but is {tuple(positions.shape)}.")
    length = inputs["input_ids"].shape[1]
    if positions is not None and not bool(((positions >= 0) & (positions < length)).all()):
        raise ValueError(
            f"positions is {positions.tolist()}, but the prompt has {length} tokens: give 0 to {length - 1}."
        )
    states = residual_stream(model, inputs, positions)
    dtype = next(architecture.norm.parameters(), states).dtype
    read = states if lens is None else lens(states).to(dtype)
    records: list[Record] = []
    for layer, hidden in enumerate(read):
        probabilities = architecture.logits(hidden, norm=norm).softmax(-1)  # [batch, vocabulary]
        for word, numbers in wanted.items():
            records += [
                {
                    "sample": name,
                    "word": word,
                    "token_id": number,
                    "layer": layer,
                    "probability": float(probabilities[row, number]),
                    "norm": norm,
                    "lens": "logit" if lens is None else "ridge",
                    **(info or {}),
                }
                for row, (name, number) in enumerate(zip(rows, numbers, strict=True))
            ]
    return records


def _check_tokens(tokens: Any, batch: int, vocabulary: int) -> dict[str, list[int]]:
    if not isinstance(tokens, Mapping) or not tokens:
        raise ValueError(f'tokens must be a dict such as {{"answer": 17}}, but is {tokens!r}.')
    found = {}
    for word, given in tokens.items():
        given = given.tolist() if isinstance(given, Tensor) else given
        numbers = [given] * batch if isinstance(given, int) else list(given) if isinstance(given, Sequence) else []
        whole = all(isinstance(number, int) and 0 <= number < vocabulary for number in numbers)
        if len(numbers) != batch or not whole:
            raise ValueError(
                f"tokens[{word!r}] must be one token per row ({batch}) below {vocabulary}, but is {given!r}."
            )
        found[word] = numbers
    return found


def answer_tokens(tokenizer: Any, answer: str, like: int | None = None, **others: str) -> dict[str, int]:
    """
    Find the first token of an answer, with an upper-case and with a lower-case initial, and of other words, such as
    the options.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        answer (`str`):
            The answer.
        like (`int`, *optional*):
            A token that the model has answered. It tells whether the model's answers begin with a space.
        **others (`str`):
            Further words by their names. Words whose first token is that of the answer are left out, because their
            probability would be the answer's.

    Raises:
        `ValueError`: If a word has no tokens.
    """
    words = {"capitalized": answer[:1].upper() + answer[1:], "noncapitalized": answer[:1].lower() + answer[1:]}
    numbers = {name: first_token(tokenizer, word, like) for name, word in words.items()}
    answer_numbers = set(numbers.values())
    for name, word in others.items():
        number = first_token(tokenizer, word, like)
        if number not in answer_numbers:
            numbers[name] = number
    return numbers


def first_token(tokenizer: Any, word: str, like: int | None = None) -> int:
    """The token that a word begins with, after a space if the token `like` begins with one."""
    if not word.strip():
        raise ValueError(f"{word!r} is empty: give a word of which to read the probability.")
    spaced = None if like is None else _spaced(tokenizer, like)
    candidates = []
    for text in (word.strip(), " " + word.strip()):
        numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
        candidates += [next((n for n in numbers if tokenizer.decode([n]).strip()), None)]
    known = [number for number in candidates if number is not None]
    if not known:
        raise ValueError(f"The tokenizer has no token for {word!r}.")
    return int(
        next((number for number in known if spaced is not None and _spaced(tokenizer, number) == spaced), known[0])
    )


def _spaced(tokenizer: Any, number: int) -> bool:
    return str(tokenizer.convert_ids_to_tokens(number)).startswith(("▁", "Ġ", " "))
