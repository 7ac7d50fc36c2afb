"""A prompt in pieces that can be read, each with the tokens that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..prompts.samples import FlowSample
from ..prompts.spans import consecutive_runs, segments


@dataclass
class Piece:
    """Some tokens of a prompt: text, or a run of image tokens."""

    text: str  # empty for the image
    positions: list[int]  # of its tokens


def pieces_of(tokenizer: Any, sample: FlowSample, patches: list[int]) -> list[Piece]:
    """The attended prompt in order: text of one token, or of tokens that share a character; runs of image tokens."""
    tokens = sample.inputs["input_ids"][0]
    attended = sample.inputs.get("attention_mask", torch.ones_like(tokens[None]))[0].bool()
    visual = torch.zeros_like(attended)
    visual[patches] = True
    for name in ("image", "newline"):
        if name in sample.groups:
            visual |= sample.groups[name][0].to(visual.device)
    pieces: list[Piece] = []
    for segment in segments(tokenizer, tokens.tolist(), (attended & ~visual).tolist()):
        for character, owners in zip(segment.text, segment.owners, strict=True):
            if pieces and pieces[-1].positions == owners:
                pieces[-1].text += character
            else:
                pieces.append(Piece(character, owners))
    pieces += [Piece("", run) for run in consecutive_runs((visual & attended).nonzero().flatten().tolist())]
    return sorted(pieces, key=lambda piece: piece.positions[0])
