"""
The methods by name: `KIND[-LETTER SIZE][+OPTION=VALUE]...`.

- `neuroada-k<k>`, `gps-k<k>`: ours; options are fields of their configs, such as `+selection=gradient_layer`. GPS also
  takes `+scores=cross_entropy`: the gradients of that loss with the untrained head in place of the contrastive one.
- `lora-r<r>`, `ia3`: PEFT's. `shira-k<k>`, `supertuning-k<k>`: PEFT's, with as many entries as NeuroAda at k, as near
  as their settings allow. `masked-k<k>`: whole weights whose gradient is masked at NeuroAda's entries.
- `bitfit`: all biases. `probe`: the head alone. `full`: every weight.

All train the head too, from the same start.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from benchmarks._common import methods as benched
from peft import IA3Config, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from torch import Tensor, nn

from peft_ext import GPSConfig, NeuroAdaConfig, activation_scores, gradient_scores

from .problems import Classifier, Part


SYNTAX = re.compile(r"(?P<kind>[a-z0-9]+?)(-(?P<letter>[kr])(?P<size>[1-9]\d*))?(?P<options>(\+\w+=[\w.]+)*)")
OURS = {"neuroada": NeuroAdaConfig, "gps": GPSConfig}
SIZE_LETTER = {"neuroada": "k", "gps": "k", "shira": "k", "supertuning": "k", "masked": "k", "lora": "r"}
KINDS = (*SIZE_LETTER, "ia3", "bitfit", "probe", "full")
SCORING_BATCH = 64
SCORING_SAMPLES = 512  # that scores are computed on, at most
# Centres of the searched learning rates. k = 20 wants a tenth of what k = 1 does (thesis tables 14-16).
CENTRES = {
    "neuroada": 1e-2,
    "gps": 1e-2,
    "lora": 1e-3,
    "shira": 1e-2,
    "supertuning": 1e-2,
    "masked": 1e-2,
    "ia3": 3e-2,
    "bitfit": 1e-2,
    "probe": 1e-2,
    "full": 1e-4,
}


# Scores do not depend on the learning rate or the seed of a run: computed once per pretrained model and training set.
_scores: WeakKeyDictionary[Classifier, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Method:
    """A parsed name."""

    name: str
    kind: str
    size: int
    options: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> Method:
        match = SYNTAX.fullmatch(name)
        if match is None or match["kind"] not in KINDS or match["letter"] != SIZE_LETTER.get(match["kind"]):
            raise ValueError(f"{name!r} is no method: see {__name__}")
        pairs = (option.split("=") for option in match["options"].split("+") if option)
        options = {key: _value(text) for key, text in pairs}
        if options and match["kind"] not in OURS:
            raise ValueError(f"{name!r}: only {', '.join(OURS)} take options")
        return cls(name, match["kind"], int(match["size"] or 0), options)

    @property
    def centre(self) -> float:
        return CENTRES[self.kind] * (0.3 if self.kind in OURS and self.size >= 8 else 1.0)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def neurons(model: Classifier) -> list[str]:
    """Names of the encoder's linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name for name, module in model.named_modules() if name.startswith("encoder.") and isinstance(module, kinds)
    ]


def linears(model: Classifier) -> list[str]:
    """Names of the encoder's linear layers, or where it has none, of its convolutions of one pixel."""
    named = {name: model.get_submodule(name) for name in neurons(model)}
    found = [name for name, module in named.items() if isinstance(module, nn.Linear)]
    return found or [
        name
        for name, module in named.items()
        if module.kernel_size == (1, 1) and module.groups == 1  # type: ignore[union-attr]
    ]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators begin at `seed` inside and go on outside as before: LoRA's start, DARE's drops."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def adapt(base: Classifier, method: Method, part: Part, seed: int) -> nn.Module:
    """
    A copy of `base` to be trained: the method's parameters and a head that is new, but the same for all methods.

    Args:
        base (`Classifier`): stays as it is.
        method (`Method`): what to train.
        part (`Part`): training samples, for methods that score by them.
        seed (`int`): of the head, of LoRA's start and of our random entries; what scores choose does not depend on
            it, nor do SHiRA's entries.
    """
    model = copy.deepcopy(base).requires_grad_(False)
    model.reset_head(seed)
    adapted: nn.Module = model
    if method.kind == "full":
        model.requires_grad_(True)
    elif method.kind == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method.kind == "masked":
        benched.mask_gradients(model, [name.rpartition(".")[2] for name in linears(model)], method.size)
    elif method.kind != "probe":
        with seeded(seed):
            adapted = get_peft_model(model, configuration(base, method, part, seed))
    model.head.requires_grad_(True)
    return adapted


def configuration(model: Classifier, method: Method, part: Part, seed: int) -> Any:
    """Configuration of an adapter."""
    return ours(model, method, part, seed) if method.kind in OURS else theirs(model, method)


def theirs(model: Classifier, method: Method) -> Any:
    """Configuration of a method of PEFT."""
    targets = linears(model)
    if method.kind == "ia3":
        kind = model.encoder.config.model_type
        return IA3Config(target_modules=IA3_TARGETS[kind], feedforward_modules=IA3_FEEDFORWARD[kind])
    layers: Any = [model.get_submodule(name) for name in targets]
    return benched.peft_config(benched.Method(method.name, method.kind, method.size), layers, targets)


def ours(base: Classifier, method: Method, part: Part, seed: int) -> Any:
    """Configuration of NeuroAda, for linear layers, or of GPS, for convolutions too, with the scores they rank by."""
    options = dict(method.options)
    loss = "model" if options.pop("scores", None) == "cross_entropy" else None
    targets = linears(base) if method.kind == "neuroada" else neurons(base)
    config: Any = OURS[method.kind](k=method.size, target_modules=targets, modules_to_save=[], seed=seed, **options)
    criterion = config.selection.partition("_")[0]
    if criterion not in ("gradient", "activation"):
        return config
    known = _scores.setdefault(base, {})
    key = (criterion, loss, len(part), len(targets))
    if key not in known:
        batches = list(scoring_batches(part, two_views=criterion == "gradient" and loss is None))
        if criterion == "gradient":
            features = "pooling" if loss is None else None
            known[key] = gradient_scores(base, batches, loss, features=features, config=config, progress=False)
        else:
            known[key] = activation_scores(base, batches, config=config, progress=False)
    return config.with_scores(known[key])


def scoring_batches(part: Part, two_views: bool) -> Iterator[dict[str, Tensor]]:
    """Training samples; images twice where asked for, moved and brightened at random. Sentences are what they are."""
    generator = torch.Generator().manual_seed(0)
    for indices in part.first(SCORING_SAMPLES).epoch(SCORING_BATCH, generator):
        batch = part.batch(indices)
        if two_views and "pixel_values" in batch:
            images = batch["pixel_values"]
            batch = {
                "pixel_values": torch.cat([moved(images, generator) for _ in range(2)]),
                "labels": batch["labels"].repeat(2),
            }
        yield batch


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to a tenth of its side, with contrast changed by up to a fifth."""
    reach = images.shape[-1] // 10
    shifts = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator).tolist()
    contrast = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)]) * contrast


def refusal(base: Classifier, method: Method) -> str | None:
    """Why this version of peft_ext can't train the model so, an option or layers; `None` if it can."""
    if method.kind not in OURS:
        return None
    config = OURS[method.kind]
    missing = set(method.options) - {field.name for field in fields(config)} - {"scores"}
    if missing:
        return f"{config.__name__} has no option {', '.join(sorted(missing))}"
    names = linears(base) if method.kind == "neuroada" else neurons(base)
    try:
        get_peft_model(copy.deepcopy(base), config(selection="magnitude", target_modules=names, modules_to_save=[]))
    except (TypeError, ValueError) as error:
        return str(error).partition(". ")[0]
    return None


def trained_parameters(model: nn.Module, method: Method) -> tuple[int, int]:
    """Numbers that training moves: the method's, and the head's."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = sum(parameter.numel() for parameter in inner.head.parameters())
    if method.kind == "masked":
        layers = [inner.get_submodule(name) for name in linears(inner)]
        return sum(layer.weight.shape[0] * min(method.size, layer.weight.shape[1]) for layer in layers), head
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - head, head
