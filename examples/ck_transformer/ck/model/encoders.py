"""Vision-language encoders of transformers that take region features: one class each, with one more method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LxmertModel, PreTrainedConfig, ViltModel, VisualBertModel


GEOMETRY = 7  # x1, y1, x2, y2, w, h, w·h of a box


class VisualBertWithRegions(VisualBertModel):
    """
    VisualBERT with the geometry of the boxes.

    Its projection takes features and geometry side by side: one linear layer on [V, G] is fc(V) + fc(G) of equation 1,
    and VisualBERT adds the segment embedding and the layer norm.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, add_pooling_layer=False)

    @staticmethod
    def set_feature_size(values: dict[str, Any], size: int) -> None:
        values["visual_embedding_dim"] = size + GEOMETRY

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, geometry: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_embeds=torch.cat([features, geometry], dim=-1),
            visual_attention_mask=region_mask,
        ).last_hidden_state
        return hidden[:, 0], hidden[:, input_ids.shape[1] :]


class LxmertWithRegions(LxmertModel):
    """LXMERT, which embeds regions as (LN(fc(V)) + LN(fc(G))) / 2 and has two streams."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.pooler = nn.Identity()  # not used: without it, no parameter stays untrained

    @staticmethod
    def set_feature_size(values: dict[str, Any], size: int) -> None:
        values["visual_feat_dim"] = size

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, geometry: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_feats=features,
            visual_pos=geometry[..., : self.config.visual_pos_dim],  # pretrained ones know the corners only
            visual_attention_mask=region_mask,
        )
        return output.language_output[:, 0], output.vision_output


class ViltWithRegions(ViltModel):
    """ViLT with regions (equation 1) in the place of its patches."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.region_projection = nn.Linear(config.region_size + GEOMETRY, config.hidden_size)
        self.region_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @staticmethod
    def set_feature_size(values: dict[str, Any], size: int) -> None:
        values["region_size"] = size

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, geometry: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        regions = self.region_norm(self.region_projection(torch.cat([features, geometry], dim=-1)))
        hidden = self(
            input_ids=input_ids, attention_mask=attention_mask, image_embeds=regions, pixel_mask=region_mask
        ).last_hidden_state
        return hidden[:, 0], hidden[:, input_ids.shape[1] :]


ENCODERS: dict[str, Any] = {
    "visual_bert": VisualBertWithRegions,
    "lxmert": LxmertWithRegions,
    "vilt": ViltWithRegions,
}
