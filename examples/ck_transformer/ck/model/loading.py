"""Pretrained encoders from local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, VisualBertConfig

from .encoders import ENCODERS, GEOMETRY, VisualBertWithRegions


def load_encoder(folder: str | Path, feature_size: int) -> Any:
    """
    An encoder for regions of `feature_size` numbers, with all pretrained weights that fit.

    From BERT or a model of its kind, such as MiniLM, VisualBERT takes everything; only its projection of regions is
    new, and segments and positions of regions begin as those of text. A VisualBERT's projection of features is kept
    and gets new columns for the geometry; LXMERT is kept whole; ViLT gets a projection of regions.

    Args:
        folder (`str` or `Path`): of a `bert`, `visual_bert`, `lxmert` or `vilt` model.
        feature_size (`int`): width of the region features.

    Raises:
        `ValueError`: if the model is of another kind, or was trained with features of another width.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "bert":
        return _from_bert(folder, config, feature_size)
    if config.model_type not in ENCODERS:
        kinds = ", ".join(("bert", *ENCODERS))
        raise ValueError(f"{folder} holds a {config.model_type} model; region features can go into: {kinds}.")
    trained = {"visual_bert": "visual_embedding_dim", "lxmert": "visual_feat_dim"}.get(config.model_type)
    width = getattr(config, trained) if trained else feature_size
    if width not in (feature_size, feature_size + GEOMETRY * (config.model_type == "visual_bert")):
        raise ValueError(f"{folder} was trained with region features of width {width}; these have {feature_size}.")
    if config.model_type == "vilt":
        config.region_size = feature_size
    encoder = ENCODERS[config.model_type].from_pretrained(folder, config=config)
    if config.model_type == "visual_bert" and width == feature_size:
        _add_geometry(encoder)
    return encoder


def _from_bert(folder: str | Path, config: Any, feature_size: int) -> VisualBertWithRegions:
    fields = set(VisualBertConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    shared = {name: value for name, value in config.to_dict().items() if name in fields}
    encoder = VisualBertWithRegions(VisualBertConfig(**{**shared, "visual_embedding_dim": feature_size + GEOMETRY}))
    weights = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if unexpected or not all("visual" in name for name in missing):
        raise ValueError(f"{folder} is no BERT whose weights VisualBERT can take: {[*unexpected, *missing]}.")
    embeddings = encoder.embeddings
    with torch.no_grad():
        embeddings.visual_token_type_embeddings.weight.copy_(embeddings.token_type_embeddings.weight)
        embeddings.visual_position_embeddings.weight.copy_(embeddings.position_embeddings.weight)
    return encoder.eval()


def _add_geometry(encoder: VisualBertWithRegions) -> None:
    """New columns for G in the projection. At zero, they leave the pretrained model as it is."""
    old = encoder.embeddings.visual_projection
    new = nn.Linear(old.in_features + GEOMETRY, old.out_features)
    with torch.no_grad():
        new.weight.zero_()[:, : old.in_features].copy_(old.weight)
        new.bias.copy_(old.bias)
    encoder.embeddings.visual_projection = new
    encoder.config.visual_embedding_dim = new.in_features
