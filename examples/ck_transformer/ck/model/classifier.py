"""CK-Transformer: which of the candidates does the expression refer to, given facts about each of them?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .config import CKTransformerConfig
from .integrator import Integrator
from .losses import CLASSIFIER_LOSSES


@dataclass
class CKTransformerOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): with labels.
        logits (`Tensor`): s_i, of shape `[batch, candidates]`; the smallest number of the dtype where there is none.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class CKTransformer(PreTrainedModel):
    """
    The model of thesis section 3.3.2: the same encoder reads image and expression, and image and each fact; what it
    puts out at a candidate's position (f_i^e and F_i^f) goes through the integrator to the candidate's score s_i.
    """

    config_class = CKTransformerConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True

    def __init__(self, config: CKTransformerConfig) -> None:
        super().__init__(config)
        self.encoder = config.make_encoder()
        self.integrator = Integrator(config)
        self.scorer = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def encode(self, ids: Tensor, mask: Tensor, images: Tensor, regions: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Output at every region, `[rows, regions, hidden]`, of texts `ids` with the images of these numbers."""
        parts = []
        for chunk in torch.arange(len(ids), device=ids.device).split(self.config.rows_per_chunk or max(1, len(ids))):
            own = images[chunk]
            parts.append(self.encoder.encode(ids[chunk], mask[chunk], *(part[own] for part in regions))[1])
        return torch.cat(parts)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        region_features: Tensor,
        region_geometry: Tensor,
        region_mask: Tensor,
        fact_input_ids: Tensor,
        fact_attention_mask: Tensor,
        fact_index: Tensor,
        labels: Tensor | None = None,
    ) -> CKTransformerOutput:
        """
        Args:
            input_ids, attention_mask (`Tensor`): the expressions, `[batch, length]`.
            region_features, region_geometry (`Tensor`): V and G, `[batch, candidates, size]`.
            region_mask (`Tensor`): 1 for candidates and 0 for padding, `[batch, candidates]`.
            fact_input_ids, fact_attention_mask (`Tensor`):
                Each image's facts, every text once, `[batch, facts, length]`; mask of zeros where there is none.
            fact_index (`Tensor`): which of them are a candidate's K facts, `[batch, candidates, K]`; -1 for none.
            labels (`Tensor`, *optional*): the candidate that is meant, or -100.
        """
        batch, candidates = region_mask.shape
        is_text = fact_attention_mask.any(-1)  # [batch, facts]
        images = torch.arange(batch, device=region_mask.device)
        regions = (region_features, region_geometry, region_mask)
        expression = self.encode(input_ids, attention_mask, images, regions)  # [batch, candidates, hidden]
        if is_text.any():
            rows = self.encode(fact_input_ids[is_text], fact_attention_mask[is_text], is_text.nonzero()[:, 0], regions)
            row = (is_text.flatten().cumsum(0) - 1).view_as(is_text)  # row of each fact
            own = row[images[:, None, None], fact_index.clamp(min=0)]  # [batch, candidates, K]
            facts = rows[own, torch.arange(candidates, device=rows.device)[:, None]]  # F_i^f at candidate i
        else:
            facts = expression.new_zeros(*fact_index.shape, expression.shape[-1])
        scores = self.scorer(self.integrator(expression, facts, fact_index >= 0))[..., 0]
        logits = scores.masked_fill(region_mask == 0, torch.finfo(scores.dtype).min)
        loss = None if labels is None else CLASSIFIER_LOSSES[self.config.loss](logits, labels)
        return CKTransformerOutput(loss=loss, logits=logits)


AutoConfig.register(CKTransformerConfig.model_type, CKTransformerConfig)
AutoModel.register(CKTransformerConfig, CKTransformer)
