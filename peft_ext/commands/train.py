"""`peft-ext train`: a training run from a YAML file."""

from __future__ import annotations

import argparse

from ..extras import needs


DESCRIPTION = (
    "Train as TRL's own commands do, with an adapter of any PEFT method. The file holds TRL's options (the trainer's, "
    "ModelConfig and ScriptArguments), the trainer's name and a `peft:` block. Options on the command line, such as "
    "--max_steps 10, come before those of the file. Needs the extra trl."
)
TAKES_FURTHER_OPTIONS = True  # TRL's, such as --max_steps 10
EXAMPLE = """example:
  peft-ext train --config run.yaml --learning_rate 1e-3
  accelerate launch -m peft_ext.cli train --config run.yaml

run.yaml:
  trainer: sft                 # sft, dpo, reward, kto, grpo, rloo or distillation
  model_name_or_path: meta-llama/Llama-3.2-1B
  dataset_name: data.jsonl     # or a Hub id, or a folder
  output_dir: my-adapter
  learning_rate: 3.0e-3
  peft:
    peft_type: NEUROADA
    k: 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--config", required=True, help="the YAML file")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with needs("trl"):
        from ..train.training import train

    train(options.config, options.further)
    return 0
