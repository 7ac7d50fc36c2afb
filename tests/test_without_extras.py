"""Fresh interpreters: what works without extras, which extra the rest asks for, and what importing loads."""

import re
import subprocess
import sys


EXTRAS = (
    "trl", "datasets", "bitsandbytes", "torchao", "torchjd", "matplotlib", "PIL", "diffusers", "sklearn", "evaluate",
    "lm_eval", "triton",
)  # fmt: skip
CODE = """
import sys
sys.modules.update(dict.fromkeys({extras!r}))  # importing them is an ImportError
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
import peft_ext
from peft_ext import cli

base, folder = {base!r}, {folder!r}
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft_ext.NeuroAdaConfig(k=1, column_budget=4))
ids = torch.arange(3, 9)[None]
model(input_ids=ids, labels=ids).loss.backward()
torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
model.save_pretrained(folder + "/adapter")
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder + "/adapter")
assert cli.main(["inspect", folder + "/adapter"]) == 0
assert cli.main(["merge", base, folder + "/adapter", folder + "/merged"]) == 0
assert cli.main(["export", folder + "/adapter", folder + "/lora", "--to", "lora", "--rank", "4"]) == 0
assert cli.main(["train", "--config", "run.yaml"]) == 1
assert cli.main(["llava", "methods", "--model", base]) == 1
assert cli.main(["flow", "--model", base, "--data", "none.csv", "--images", ".", "--out", folder + "/flow"]) == 1
assert cli.main(["eval", folder + "/adapter", "--tasks", "hellaswag"]) == 1
for imports in ("peft_ext.factory", "peft_ext.mtl.sft"):
    try:
        __import__(imports)
    except ImportError as error:
        print(imports, error)
try:
    peft_ext.selection_report(model).plot()
except ImportError as error:
    print("plot", error)
"""


def test_what_needs_no_extra_works_and_the_rest_names_it(model_dir, tmp_path):
    code = CODE.format(extras=EXTRAS, base=model_dir("llama"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rank 4, exact" in done.stdout and "replaced" in done.stdout
    for asks, extra in {"train": "trl", "flow": "plot", "llava": "vlm", "eval": "eval"}.items():
        assert re.search(rf"peft-ext {asks}: .* pip install 'peft-ext\[{extra}\]'", done.stderr)
    for asks, extra in {"peft_ext.factory": "vlm", "peft_ext.mtl.sft": "trl", "plot": "plot"}.items():
        assert re.search(rf"^{asks} .* pip install 'peft-ext\[{extra}\]'", done.stdout, re.M)


IMPORTED = """
import sys
import peft_ext
assert not {"peft_ext.mtl", "matplotlib"} & sys.modules.keys()
import torch
print(peft_ext.mtl.aggregate(torch.eye(2), method="mgda").tolist())
peft_ext.knockout.AttentionKnockout, peft_ext.export.merge_checkpoint, peft_ext.mtl.MTLTrainer
assert "matplotlib" not in sys.modules
"""


def test_rooms_are_loaded_on_first_use_and_need_no_import_of_their_own():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.5")
