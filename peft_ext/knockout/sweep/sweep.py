"""Sweep knockouts over the layers of a model and the samples of a data set (https://arxiv.org/abs/2411.18620)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..model.architecture import Architecture, inspect_model
from ..prompts.samples import FlowSample, LazySample, Prompt, parse_pairs, prepare
from .clean_run import NotReusable
from .engines import ENGINES, Pair, Passes, Span, run_engine
from .processes import this_process
from .records import Record, RecordFile, read_records
from .windows import Window, windows


# How far a fast engine's log-probabilities of the answer may be from the full one's, by the model's dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SLOWER = {"packed": "suffix", "suffix": "full"}
# Pairs that the self-check runs in full, those of the largest changes: a sweep over patches has hundreds.
CHECKED_PAIRS = 8


def layer_sweep(
    model: nn.Module,
    samples: Iterable[FlowSample | LazySample] | FlowSample,
    pairs: Sequence[str | tuple[str, str]] | str,
    window: int = 9,
    mode: str = "centred",
    engine: str = "auto",
    answer_token: str | int = "first",
    layers: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    self_check: bool = True,
    progress: bool = True,
) -> list[Record]:
    """
    Block each pair of token groups in a window around each layer, and measure how the probability `p` of the answer
    changes: `change_percent` is `(p_blocked − p_clean) / p_clean · 100`. It is a ratio per sample; average it over
    samples.

    Paper: Zhang et al., [Cross-modal Information Flow in Multimodal Large Language
    Models](https://arxiv.org/abs/2411.18620).

    Args:
        model (`torch.nn.Module`):
            A decoder of transformers, in eval mode.
        samples (`Iterable[FlowSample]`):
            The data set. A [`LazySample`] is made when it is needed.
        pairs (`list[str]`):
            Pairs of group names, `"source:target"`. The target may not attend to the source.
        window (`int`, *optional*, defaults to 9):
            Number of layers per window.
        mode (`str`, *optional*, defaults to `"centred"`):
            `"centred"` or `"forward"`; see [`windows`].
        engine (`str`, *optional*, defaults to `"auto"`):
            `"full"`, `"suffix"` or `"packed"`. `"auto"` takes the fastest that is exact. All pairs of a sample share
            one clean pass.
        answer_token (`str` or `int`, *optional*, defaults to `"first"`):
            Sub-word of the answer whose probability is read: `"first"`, `"last"` or its number. The sub-words before
            it are part of the input.
        layers (`Sequence[int]`, *optional*):
            Layers to report; by default all.
        output (`str`, *optional*):
            File for the results, one JSON object per line, written sample by sample. Samples that the file holds
            already are not run again.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether to compare the largest change of each pair of the first sample with the full engine. If they
            differ, a slower engine is used, with a warning.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[dict]`: One record per sample, pair and layer, with `sample`, `pair`, `source`, `target`, `layer`,
        `window_start`, `window_end` (exclusive), `base_probability`, `probability`, `change_percent`, `answer_id`, the
        settings, the engine that was used, and the samples' `info`. Under accelerate's launcher each process runs its
        share of the samples; with `output` all processes return all records.

    Raises:
        `ValueError`: If an argument or a sample is malformed; the message names it. If `engine` is a fast one that
            would not be exact, as with PaliGemma's bidirectional prefix.

    Example:

        ```py
        >>> records = layer_sweep(model, [FlowSample(inputs, groups)], ["image:question", "question:last"])
        >>> plot_sweep(records, "sweep.png")
        ```
    """
    architecture = inspect_model(model)
    named = parse_pairs(pairs)
    layer_windows = windows(len(architecture.layers), window, mode)
    if layers is not None:
        layer_windows = [layer_windows[index] for index in architecture.check_layers(layers)]
    process = this_process()
    settings = {"window": window, "mode": mode, "answer_token": answer_token}
    sweep = Sweep(model, architecture, named, layer_windows, settings, engine, self_check)
    file = None
    if output is not None:
        expected = [(":".join(pair), window.layer) for pair in named for window in layer_windows]
        file = RecordFile(output, settings, expected, process.process_index, process.num_processes)
    seen: set[str] = set()
    found: list[Record] = list(file.kept) if file else []
    done = file.done if file else set()
    chosen = [samples] if isinstance(samples, FlowSample) else samples
    total = len(chosen) if isinstance(chosen, Sized) else None
    try:
        with tqdm(total=total, desc="samples", disable=not (progress and process.is_main_process)) as bar:
            for number, sample in _numbered(chosen):
                bar.update()
                if number % process.num_processes != process.process_index:
                    continue
                if isinstance(sample, LazySample):
                    if sample.name in done:
                        continue
                    made = sample.make()
                    if made is None:
                        continue
                    made.names = [sample.name]
                    sample = made
                prompt = prepare(sample, named, answer_token, number, device_of(model))
                if twice := seen.intersection(prompt.names):
                    raise ValueError(f"samples[{number}] has the name {twice.pop()!r}, as an earlier one: rename it.")
                seen.update(prompt.names)
                if set(prompt.names) <= done:
                    continue
                # of a batch some rows may be done
                records = [record for record in sweep.run(prompt, sample) if record["sample"] not in done]
                found += records
                if file:
                    file.add(records)
    finally:
        if file:
            file.close()
    process.wait_for_everyone()
    if file and process.is_main_process:
        file.join()
    if file and process.num_processes > 1:
        process.wait_for_everyone()
        return read_records(file.path)
    return found


def _numbered(samples: Iterable[Any]) -> Iterator[tuple[int, FlowSample | LazySample]]:
    number = -1
    for number, sample in enumerate(samples):
        if not isinstance(sample, (FlowSample, LazySample)):
            raise ValueError(f"samples[{number}] is a {type(sample).__name__}: make it a FlowSample.")
        yield number, sample
    if number < 0:
        raise ValueError("samples is empty, as a generator is that has been read before: give at least one.")


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's inputs."""
    return next(parameter.device for parameter in model.parameters())


@dataclass(eq=False)
class Sweep:
    """
    The state of one sweep: which engine is trusted by now.

    Raises:
        `ValueError`: for an unknown engine, a model in training mode, or a layer without edges in a window.
    """

    model: nn.Module
    architecture: Architecture
    pairs: list[Pair]
    layer_windows: list[Window]
    settings: dict[str, Any]
    given: str  # the engine that was asked for
    unchecked: bool  # whether a fast engine is still to be compared with the full one

    def __post_init__(self) -> None:
        if self.given != "auto" and self.given not in ENGINES:
            raise ValueError(f"engine is {self.given!r}: must be auto, {', '.join(ENGINES)}.")
        windows = self.layer_windows
        for index in range(min(window.start for window in windows), max(window.end for window in windows)):
            self.architecture.attention(index)
        if self.model.training:
            raise ValueError("model is in training mode, where dropout changes every pass: call model.eval() first.")
        self.engine = "packed" if self.given == "auto" else self.given
        self.unchecked = self.unchecked and self.engine != "full"
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        self.tolerance = TOLERANCE.get(dtype, 1e-1)

    def run(self, prompt: Prompt, sample: FlowSample) -> list[Record]:
        """The records of one prompt. Raises `ValueError` if a given engine would not be exact for it."""
        spans = {pair: list(dict.fromkeys((at.start, at.end) for at in self.layer_windows)) for pair in self.pairs}
        engine = self.engine
        try:
            passes = self._checked(prompt, spans) if self.unchecked else self._with(engine, prompt, spans)
            engine = self.engine
        except NotReusable as reason:
            if self.given != "auto":
                raise ValueError(
                    f'engine="{self.given}" would not be exact for sample {prompt.names[0]}: {reason}. '
                    'Use engine="full" or "auto".'
                ) from reason
            engine = "full"
            passes = self._with(engine, prompt, spans)
        base = passes.clean.double()  # [batch]
        lost = ~base.isfinite() | torch.stack(list(passes.knocked.values())).isnan().any(0)
        if lost.any():
            raise ValueError(
                f"sample {prompt.names[int(lost.int().argmax())]}: the model's logits are not finite, or its answer "
                "has no probability at all, so that no change of it can be told; load the model in bf16 or fp32."
            )
        records = []
        for row, name in enumerate(prompt.names):
            for pair in self.pairs:
                for window in self.layer_windows:
                    after = passes.knocked[pair, (window.start, window.end)][row].double()
                    records.append(
                        {
                            "sample": name,
                            "pair": ":".join(pair),
                            "source": pair[0],
                            "target": pair[1],
                            "layer": window.layer,
                            "window_start": window.start,
                            "window_end": window.end,
                            "answer_id": int(passes.answer[row]),
                            "base_probability": float(base[row].exp()),
                            "probability": float(after.exp()),
                            # of log-probabilities: small differences of large numbers stay exact
                            "change_percent": float(100 * torch.expm1(after - base[row])),
                            "engine": engine,
                            **self.settings,
                            **sample.info,
                        }
                    )
        return records

    def _with(self, engine: str, prompt: Prompt, spans: Mapping[Pair, Sequence[Span]]) -> Passes:
        return run_engine(engine, self.architecture, self.model, prompt, spans)

    def _checked(self, prompt: Prompt, spans: Mapping[Pair, Sequence[Span]]) -> Passes:
        """The first sample, whose largest change of each pair must be what the full engine finds."""
        while self.engine != "full":
            try:
                passes = self._with(self.engine, prompt, spans)
            except (NotReusable, torch.OutOfMemoryError):
                raise
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                problem = f"fails on this model ({error})"
            else:
                problem = self._difference(passes, prompt, spans)
            if not problem:
                self.unchecked = False
                return passes
            slower = _SLOWER[self.engine]
            warnings.warn(f'engine="{self.engine}" {problem}; using "{slower}" instead.', stacklevel=4)
            self.engine = slower
        self.unchecked = False
        return self._with("full", prompt, spans)

    def _difference(self, passes: Passes, prompt: Prompt, spans: Mapping[Pair, Sequence[Span]]) -> str:
        """Difference between a fast engine's numbers and the full engine's, as text; empty if there is none."""
        fixed = replace(prompt, answer=passes.answer)
        largest: dict[Pair, tuple[float, Span]] = {}
        for pair in self.pairs:
            changes = torch.stack([passes.knocked[pair, span] - passes.clean for span in spans[pair]]).abs().amax(1)
            at = int(changes.argmax())
            largest[pair] = float(changes[at]), spans[pair][at]
        most = sorted(largest, key=lambda pair: -largest[pair][0])[:CHECKED_PAIRS]
        exact = self._with("full", fixed, {pair: [largest[pair][1]] for pair in most})
        for pair in most:
            span = largest[pair][1]
            far = (passes.knocked[pair, span] - exact.knocked[pair, span]).abs().max()
            far = torch.maximum(far, (passes.clean - exact.clean).abs().max())
            if not float(far) <= self.tolerance:
                return f"is off by {float(far):.1e} in log-probability for {':'.join(pair)}"
        return ""
