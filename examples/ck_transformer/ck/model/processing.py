"""Samples and facts to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from ..data.samples import Features, Sample, geometry


CandidateFacts = Sequence[Sequence[str]]  # for each candidate its facts, the best first


class CKProcessor(ProcessorMixin):
    """
    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the encoder.
        num_facts (`int`, *optional*, defaults to 3): K, the facts of a candidate that are used.
        max_length (`int`, *optional*, defaults to 64): tokens of an expression or fact; the rest is cut off.
        no_facts (`bool`, *optional*, defaults to `False`):
            Put one mask token in the place of all words of every fact (CK-T-nf of the thesis).
    """

    def __init__(
        self, tokenizer: Any, num_facts: int = 3, max_length: int = 64, no_facts: bool = False, **kwargs: Any
    ) -> None:
        if num_facts < 0:
            raise ValueError(f"num_facts={num_facts} must not be negative.")
        if no_facts and tokenizer.mask_token is None:
            raise ValueError("no_facts=True needs a tokenizer with a mask token.")
        super().__init__(tokenizer, **kwargs)
        self.num_facts, self.max_length, self.no_facts = num_facts, max_length, no_facts

    def texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, `[texts, length]`."""
        if not texts:
            return torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long)
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.max_length)
        return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])

    def regions(self, samples: Sequence[Sample], features: Features) -> dict[str, torch.Tensor]:
        """Features, geometry and mask of the candidates, padded to the most that a sample has."""
        own = [features(sample) for sample in samples]
        boxes = [geometry(sample.boxes, sample.size) for sample in samples]
        return {
            "region_features": pad_sequence(own, batch_first=True),
            "region_geometry": pad_sequence(boxes, batch_first=True),
            "region_mask": pad_sequence([torch.ones(len(part), dtype=torch.long) for part in boxes], batch_first=True),
        }

    def __call__(
        self, samples: Sequence[Sample], features: Features, facts: Sequence[CandidateFacts] | None = None
    ) -> BatchFeature:
        """
        A batch of [`CKTransformer`].

        Args:
            samples (`Sequence[Sample]`): what to classify.
            features (`Features`): gives a sample's region features.
            facts (`Sequence[CandidateFacts]`, *optional*): of each sample's candidates; the first K are used.
        """
        facts = facts or [[()] * len(sample.boxes) for sample in samples]
        ids, mask = self.texts([sample.expression for sample in samples])
        batch = {"input_ids": ids, "attention_mask": mask, **self.regions(samples, features)}
        texts: list[list[str]] = []  # of each sample, every text once
        index = torch.full((*batch["region_mask"].shape, self.num_facts), -1)
        for number, own in enumerate(facts):
            numbers: dict[str, int] = {}
            for candidate, known in enumerate(own):
                for place, fact in enumerate(known[: self.num_facts]):
                    text = self.tokenizer.mask_token if self.no_facts else fact
                    index[number, candidate, place] = numbers.setdefault(text, len(numbers))
            texts.append(list(numbers))
        fact_ids, fact_mask = self.texts([text for own in texts for text in own])
        counts = [len(own) for own in texts]
        batch["fact_input_ids"] = pad_sequence(fact_ids.split(counts), batch_first=True)  # [batch, facts, length]
        batch["fact_attention_mask"] = pad_sequence(fact_mask.split(counts), batch_first=True)
        batch["fact_index"] = index
        batch["labels"] = torch.tensor([sample.label for sample in samples])
        return BatchFeature(batch)
