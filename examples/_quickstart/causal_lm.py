"""The same job on a causal language model: NeuroAda and LoRA with TRL's SFTTrainer."""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_ext import NeuroAdaConfig

from . import checks, report, texts
from .memory import peak_bytes
from .methods import LORA_RANK, trained_parameters
from .search import SPACING, Search, Trial, search
from .storage import save
from .timing import relative, seconds_per_step, training_step
from .training import WARMUP_SHARE, OnStep


REFERENCE = "lora"
SEARCH_SEED = 1000
TIMING_BLOCKS = 5
TIMING_STEPS = 4


@dataclass(frozen=True)
class Method:
    """A row of the table; `config` makes a new configuration on each call, since PEFT writes into it."""

    name: str
    label: str
    learning_rate: float
    config: Callable[[], PeftConfig]


def methods(k: int, targets: list[str] | None) -> list[Method]:
    """NeuroAda and LoRA on the same modules, by default all linear layers but the head."""
    modules = targets or "all-linear"
    # NeuroAda's authors tuned 8e-3 for k=1 and 7e-4 for k=20 on LLaMA-7B; this power of k goes through both
    rate = float(f"{8e-3 / k**0.8:.2g}")
    return [
        Method(
            "neuroada",
            f"NeuroAda k={k}",
            rate,
            lambda: NeuroAdaConfig(k=k, target_modules=modules, task_type="CAUSAL_LM"),
        ),
        Method(
            "lora",
            f"LoRA r={LORA_RANK}",
            3e-4,
            lambda: LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=modules, task_type="CAUSAL_LM"),
        ),
    ]


class LanguageJob:
    """
    One base model and one text data set, and what is done with them.

    Args:
        options (`argparse.Namespace`): The command line.
    """

    def __init__(self, options: argparse.Namespace):
        datasets.disable_progress_bars()  # several per run would break up this job's own
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # half precision on a CPU is slower than float32 there, and merging into it rounds
        self.dtype = "auto" if self.device == "cuda" else torch.float32
        self.autocast = torch.bfloat16 if self.device == "cuda" and torch.cuda.is_bf16_supported() else None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        except OSError as error:
            raise texts.UsageError(f"--model {options.model}: {error}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.texts = texts.load(options)
        self.max_steps = min(2, options.max_steps) if options.smoke else options.max_steps
        self.seeds = options.seeds or 1
        self.trials = options.trials or 1
        self.methods = methods(options.k, options.target_modules)
        runs = self.seeds + (self.trials if self.trials > 1 else 0)
        self.progress = tqdm(total=len(self.methods) * runs * self.max_steps, unit="step", smoothing=0.05)

    def base(self) -> PreTrainedModel:
        """The base model, loaded anew."""
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=self.dtype).to(self.device)

    def batch(self) -> dict[str, torch.Tensor]:
        """Texts to time and check on; padding does not count in the loss."""
        examples = self.texts.train[: self.options.batch_size][self.options.text_column]
        encoded = self.tokenizer(
            examples, truncation=True, max_length=self.options.max_length, padding=True, return_tensors="pt"
        ).to(self.device)
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs | {"labels": labels}

    def trainer(self, method: Method, learning_rate: float, seed: int, held_out: Any, folder: str) -> SFTTrainer:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.options.batch_size,
            per_device_eval_batch_size=self.options.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(WARMUP_SHARE * self.max_steps),
            weight_decay=0.0,
            seed=seed,
            use_cpu=self.device == "cpu",
            bf16=self.autocast is not None,
            gradient_checkpointing=False,  # as in the steps that are timed
            dataloader_pin_memory=self.device != "cpu",
            dataset_text_field=self.options.text_column,
            max_length=self.options.max_length,
            prediction_loss_only=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=self.base(),
            args=arguments,
            train_dataset=self.texts.train,
            eval_dataset=held_out,
            processing_class=self.tokenizer,
            peft_config=method.config(),
            callbacks=[OnStep(self.progress.update)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def fit(self, method: Method, learning_rate: float, seed: int, held_out: Any) -> tuple[PeftModel, float, float]:
        """The trained model, and its loss on `held_out` before and after."""
        gc.collect()  # the previous run's model, before the next one is loaded
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(method, learning_rate, seed, held_out, folder)
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            after = trainer.evaluate()["eval_loss"]
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return model, before, after

    def search(self, method: Method) -> Search | None:
        """`None` where there is nothing to choose from."""
        if self.trials == 1:
            return None
        self.progress.set_description(f"{method.label}, search")
        return search(
            method.learning_rate,
            self.trials,
            lambda rate: Trial(rate, self.fit(method, rate, SEARCH_SEED, self.texts.validation)[2]),
        )

    def costs(self) -> tuple[dict[str, list[float]], dict[str, int]]:
        """
        Step times and peak memory.

        A second copy of a large model may not fit, so the methods take turns in blocks of a few steps on one base,
        from which each is unloaded again.
        """
        self.progress.set_description("timing steps")
        base, batch = self.base(), self.batch()
        seconds: dict[str, list[float]] = {method.name: [] for method in self.methods}
        peaks: dict[str, int] = {}
        adapted: list[PeftModel] = []

        def build(method: Method) -> Callable[[], None]:
            adapted.append(get_peft_model(base, method.config()))
            return training_step(adapted[-1], batch, method.learning_rate, self.autocast)

        for _ in range(1 if self.options.smoke else TIMING_BLOCKS):
            for method in self.methods:
                times = seconds_per_step(build(method), TIMING_STEPS, self.device)
                seconds[method.name].append(statistics.median(times))
                base = adapted.pop().unload()
        for method in self.methods:
            peaks[method.name] = peak_bytes(partial(build, method), device=self.device)
            base = adapted.pop().unload()
        return seconds, peaks

    def check(self, trained: nn.Module) -> list[checks.Check]:
        """Merging into half precision rounds the weights: its effect is reported there, and fails nothing."""
        inputs = {name: value for name, value in self.batch().items() if name != "labels"}

        @torch.no_grad()
        def logits(model: nn.Module) -> torch.Tensor:
            return model.eval()(**inputs).logits.float()

        exact = next(trained.parameters()).dtype == torch.float32
        return checks.roundtrip(
            trained,
            self.options.out / "adapters" / "neuroada",
            self.base,
            logits,
            checks.MERGED_TOLERANCE if exact else None,
        )


def run(options: argparse.Namespace) -> tuple[str, list[checks.Check], dict[str, Any]]:
    """The comparison on a language model: the text to print, the checks, and the content of the JSON."""
    job = LanguageJob(options)
    seconds, peaks = job.costs()
    ratios = relative(seconds, REFERENCE)
    rows, checked, untrained = [], [], 0.0
    for method in job.methods:
        found = job.search(method)
        rate = options.lr or (found.best.learning_rate if found else method.learning_rate)
        job.progress.set_description(f"{method.label}, test")
        losses = []
        for seed in range(job.seeds):
            model, untrained, loss = job.fit(method, rate, seed, job.texts.test)
            losses.append(loss)
        adapter, head = trained_parameters(model)
        rows.append(
            report.Row(
                name=method.name,
                label=method.label,
                learning_rate=rate,
                search=found,
                adapter_parameters=adapter,
                head_parameters=head,
                seeds=list(range(job.seeds)),
                scores=losses,
                step_seconds=seconds[method.name],
                step_ratio=ratios[method.name],
                peak_bytes=peaks[method.name],
                peak_ratio=peaks[method.name] / peaks[REFERENCE],
                file_bytes=save(model, options.out / "adapters" / method.name),
            )
        )
        if method.name == "neuroada":
            checked = job.check(model)
    job.progress.close()
    return _text(job, rows, untrained), checked, _content(job, rows, untrained)


def _text(job: LanguageJob, rows: list[report.Row], untrained: float) -> str:
    options, sizes = job.options, job.texts.sizes()
    if options.lr:
        choice = "given with --lr"
    elif job.trials > 1:
        choice = f"best of {job.trials} a factor {SPACING:.2g} apart on {sizes['validation']} validation examples"
    else:
        choice = "each method's default, not searched (see --trials)"
    notes = [
        f"{options.model} on {options.dataset}: {job.max_steps} steps of {options.batch_size} examples, {job.seeds} "
        f"seed(s), loss on {sizes['test']} held-out examples; {untrained:.3f} before training.",
        f"Learning rates: {choice}.",
        "Step time: median ratio of alternating blocks of steps on one base model.",
        "Memory: peak during steps, beyond the base weights.",
    ]
    return "\n".join([report.table(rows, "eval loss", False, "LoRA"), "", *notes])


def _content(job: LanguageJob, rows: list[report.Row], untrained: float) -> dict[str, Any]:
    options = job.options
    named = ("dataset_config", "split", "text_column", "max_length", "batch_size", "max_examples", "k", "lr", "smoke")
    return {
        "task": "causal_lm",
        # a local path says something about this machine only
        "model": Path(options.model).name if Path(options.model).exists() else options.model,
        "dataset": Path(options.dataset).name if Path(options.dataset).exists() else options.dataset,
        "settings": {name: getattr(options, name) for name in named}
        | {"max_steps": job.max_steps, "trials": job.trials, "seeds": job.seeds, "learning_rate_spacing": SPACING}
        | {"target_modules": options.target_modules or "all-linear"},
        "examples": job.texts.sizes(),
        "eval_loss_before_training": untrained,
        "search_seed": SEARCH_SEED,
        "split_seed": texts.SPLIT_SEED,
        "metric": "eval loss",
        "relative_to": REFERENCE,
        "rows": [row.as_json() for row in rows],
    }
