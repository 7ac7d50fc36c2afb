"""
Where information flows in a tiny LLaVA that answers questions about coloured shapes.

    python examples/flow_shapes.py

blocks the attention between image, question and last position around each layer, on the checkpoint in
examples/shapes_llava (no network, no GPU, about a minute), prints what the answer's probability loses, and writes the
figures; with --report also one HTML page of it all (make flow-demo). It is a positive control: image → question → last
carries the answer, image → last and last → last do not, and of the image the objects' patches matter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from _shapes.flow import TASKS, flow_table, readouts, samples, views
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from peft_ext.knockout import (
    layer_sweep,
    plot_answer_probability,
    plot_jaccard,
    plot_sweep,
    plot_token_map,
    report,
)


CHECKPOINT = Path(__file__).parent / "shapes_llava"
PAIRS = (
    "image:question",
    "question:last",
    "image:last",
    "last:last",
    "related_patches:question",
    "other_patches:question",
)


def parser() -> argparse.ArgumentParser:
    description, _, usage = (__doc__ or "").strip().partition("\n\n")
    options = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the model [examples/shapes_llava]")
    options.add_argument("--questions", type=int, default=32, help="per task [%(default)s]")
    options.add_argument("--window", type=int, default=1, help="layers that are blocked together [%(default)s]")
    options.add_argument(
        "--engine", default="auto", choices=("auto", "full", "suffix", "packed"), help="[%(default)s]"
    )
    options.add_argument("--seed", type=int, default=7, help="of the scenes and questions [%(default)s]")
    options.add_argument("--report", type=Path, help="HTML page to write as well")
    options.add_argument(
        "--views", type=int, default=3, help="questions per task that it shows one by one [%(default)s]"
    )
    options.add_argument("--out", type=Path, default=Path("flow_shapes_output"), help="[%(default)s]")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.questions < 1:
        parser().error(f"--questions is {options.questions}: must be at least 1")
    if options.report is not None and options.report.suffix != ".html":
        parser().error(f"--report is {options.report}: must end in .html")
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = LlavaForConditionalGeneration.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    drawn = samples(processor, options.questions, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    records = layer_sweep(
        model,
        [own for own, _, _ in drawn],
        PAIRS,
        window=options.window,
        engine=options.engine,
        output=options.out / f"sweep_{options.model.name}_window{options.window}_seed{options.seed}.jsonl",
    )
    names = {name for own, _, _ in drawn for name in own.names or []}
    records = [record for record in records if record["sample"] in names]  # not those of an earlier, larger run
    print(flow_table(records))
    plot_sweep(records, options.out / "flow.png", title=f"window of {options.window}")
    for task in TASKS:
        plot_sweep([r for r in records if r["task"] == task], options.out / f"flow_{task}.png", title=task)
    chosen = [own for own in drawn if own[1].task.startswith("Choose")]
    answers, similarities = readouts(model, processor, chosen, options.window)
    plot_answer_probability([a for a in answers if a["word"] != "false option"], options.out / "answer_by_layer.png")
    plot_jaccard(similarities, options.out / "jaccard.png", title="top words of the question without a module")
    if options.report is not None:
        shown = views(model, processor, drawn, options.views, options.window)
        report(records, shown, options.report, title="Where a tiny LLaVA looks")
        print(f"\nPage: {options.report}")
    own, question, picture = drawn[0]
    related = own.groups["related_patches"][own.groups["image"]].float()
    plot_token_map(picture, related, options.out / "related_patches.png", title=question.text, label="related")
    print(f"\n{len(drawn)} questions, {time.perf_counter() - start:.0f} s. Results and figures: {options.out}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
