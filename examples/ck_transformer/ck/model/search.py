"""Fact search (thesis section 3.3.1): how well does a fact fit an expression, in the light of the image?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .config import FactSearchConfig
from .encoders import GEOMETRY
from .losses import SEARCH_LOSSES


@dataclass
class FactSearchOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): with labels.
        logits (`Tensor`): cosine of expression and fact, `[batch]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class FactSearch(PreTrainedModel):
    """
    An encoder that reads (image, expression) and (image, fact); the similarity is the cosine of its outputs at [CLS].

    With `variant="text"` all it sees of an image is one region with the mean of all features and boxes, which
    `set_mean` fills in, so that a text's embedding is the same for every image.
    """

    config_class = FactSearchConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True

    def __init__(self, config: FactSearchConfig) -> None:
        super().__init__(config)
        self.encoder = config.make_encoder()
        self.register_buffer("mean_region", torch.zeros(config.feature_size + GEOMETRY))
        self.post_init()

    def set_mean(self, features: Tensor, geometry: Tensor) -> None:
        """Keep the mean of all regions, of features `[regions, size]` and boxes `[regions, 7]`."""
        self.mean_region.copy_(torch.cat([features, geometry], dim=-1).mean(0))

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        region_features: Tensor,
        region_geometry: Tensor,
        region_mask: Tensor,
    ) -> Tensor:
        """Embeddings of unit length, `[rows, hidden]`."""
        if self.config.variant == "text":
            mean = self.mean_region.expand(len(input_ids), 1, -1)
            region_features, region_geometry = mean.split([self.config.feature_size, GEOMETRY], dim=-1)
            region_mask = region_mask.new_ones(len(input_ids), 1)
        cls, _ = self.encoder.encode(input_ids, attention_mask, region_features, region_geometry, region_mask)
        return F.normalize(cls, dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        fact_input_ids: Tensor,
        fact_attention_mask: Tensor,
        region_features: Tensor,
        region_geometry: Tensor,
        region_mask: Tensor,
        labels: Tensor | None = None,
    ) -> FactSearchOutput:
        """
        Args:
            input_ids, attention_mask (`Tensor`): the expressions, `[batch, length]`.
            fact_input_ids, fact_attention_mask (`Tensor`): one fact for each, `[batch, length]`.
            region_features, region_geometry, region_mask (`Tensor`): of the images, `[batch, candidates, size]`.
            labels (`Tensor`, *optional*): 1 for the true fact and 0 for a random one, `[batch]`.
        """
        regions = (region_features, region_geometry, region_mask)
        expression = self.embed(input_ids, attention_mask, *regions)
        cosine = (expression * self.embed(fact_input_ids, fact_attention_mask, *regions)).sum(-1)
        loss = None if labels is None else SEARCH_LOSSES[self.config.loss](cosine, labels)
        return FactSearchOutput(loss=loss, logits=cosine)


AutoConfig.register(FactSearchConfig.model_type, FactSearchConfig)
AutoModel.register(FactSearchConfig, FactSearch)
