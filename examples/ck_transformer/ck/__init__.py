"""CK-Transformer (thesis chapter 3, appendix A): which object does an expression refer to, given facts about each?"""

from .knowledge.facts import FactBase
from .model.classifier import CKTransformer
from .model.config import CKTransformerConfig, FactSearchConfig
from .model.loading import load_encoder
from .model.processing import CKProcessor
from .model.search import FactSearch


__all__ = [
    "CKProcessor",
    "CKTransformer",
    "CKTransformerConfig",
    "FactBase",
    "FactSearch",
    "FactSearchConfig",
    "load_encoder",
]
