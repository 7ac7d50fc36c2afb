"""Training with Trainer or TRL, exact match by generation, and LMAR, on lists of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from peft_ext.knockout.read.modality import ModalityAttention, lmar

from .data import Collator, Sample, normalise


class Samples(torch.utils.data.Dataset):
    """A list as a data set."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self.column_names = ["sample"]  # TRL asks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Sample]:
        return {"sample": self.samples[index]}


def train(
    model: Any,
    processor: Any,
    samples: list[Sample],
    out: Path,
    *,
    library: str = "trainer",
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpointing: bool = False,
) -> float:
    """Train the model in place; returns the last loss."""
    common = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "remove_unused_columns": False,
        "gradient_checkpointing": checkpointing,
        "bf16": torch.cuda.is_available(),
    }
    if library == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        index = Dataset.from_dict({"index": list(range(len(samples)))})
        collate = Collator(processor)
        trainer: Any = SFTTrainer(
            model=model,
            args=config,
            train_dataset=index,
            processing_class=processor,
            data_collator=lambda rows: collate([samples[row["index"]] for row in rows]),
        )
    else:
        arguments = TrainingArguments(**common)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Samples(samples), data_collator=Collator(processor)
        )
    return float(trainer.train().training_loss)


@torch.no_grad()
def exact_match(model: Any, processor: Any, samples: list[Sample], batch_size: int, max_new_tokens: int = 8) -> float:
    """The share of samples whose generated answer is the right one."""
    model.eval()
    right = 0
    for start in tqdm(range(0, len(samples), batch_size), desc="evaluating", leave=False):
        part = samples[start : start + batch_size]
        batch = prompts(processor, part).to(model.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        said = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(normalise(a) == normalise(s.answer) for a, s in zip(said, part, strict=True))
    return right / len(samples)


def prompts(processor: Any, samples: list[Sample]) -> Any:
    """The samples' prompts, padded on the left."""
    return processor(
        images=[sample.picture() for sample in samples],
        text=[sample.text for sample in samples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def measure(model: Any, processor: Any, samples: list[Sample], batch_size: int, **choices: Any) -> ModalityAttention:
    """LMAR on the samples' prompts."""
    model.eval()
    starts = range(0, len(samples), batch_size)
    batches = (dict(prompts(processor, samples[i : i + batch_size]).to(model.device)) for i in starts)
    return lmar(model, batches, **choices)
