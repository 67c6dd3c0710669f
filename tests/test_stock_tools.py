"""What users go on with opens our repository in a process that has no `hf_saereg`."""

import pytest
from launching import run_python
from peft import LoraConfig, get_peft_model
from training_job import arguments, heads, tiny_model, trainer
from transformers import GPT2LMHeadModel

from hf_saereg.corpora import character_tokenizer

TOOLS = """
import json
import sys
import time
import urllib.request

sys.modules["hf_saereg"] = None  # importing it fails from here on
import datasets
import evaluate
import torch
from peft import PeftModel
from tensorboard import program
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

checkpoint, adapter, run = sys.argv[1:]
generator = pipeline("text-generation", model=checkpoint)
assert generator("To be", max_new_tokens=4)[0]["generated_text"].startswith("To be")

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
inputs = tokenizer("To be, or not", return_tensors="pt")
assert tokenizer.decode(inputs["input_ids"][0]) == "To be, or not"
model = AutoModelForCausalLM.from_pretrained(checkpoint)
plain = model(**inputs).logits
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
assert not torch.allclose(adapted(**inputs).logits, plain)
with adapted.disable_adapter():
    torch.testing.assert_close(adapted(**inputs).logits, plain)


class CrossEntropy(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        losses = []
        for text in predictions:
            inputs = tokenizer(text, return_tensors="pt")
            losses.append(model(**inputs, labels=inputs["input_ids"]).loss.item())
        return {"ce": sum(losses) / len(losses)}


texts = ["To be, or not", "that is all"]
assert 0 < CrossEntropy().compute(predictions=texts, references=texts)["ce"] < 20

board = program.TensorBoard()
board.configure(argv=[None, "--logdir", run, "--port", "0", "--load_fast", "false"])
url = board.launch()
for _ in range(100):
    tags = json.load(urllib.request.urlopen(url + "data/plugin/scalars/tags"))
    if tags:
        break
    time.sleep(0.1)
(found,) = tags.values()
assert {"train/ce", "train/term", "train/l0/blocks.0.hook_resid_pre"} <= found.keys(), found.keys()
assert not [name for name in sys.modules if name.startswith("hf_saereg.")]
print("all tools work")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stock_tools_open_a_checkpoint_without_us(model, tmp_path):
    checkpoint, adapter, run = (tmp_path / name for name in ("checkpoint", "adapter", "run"))
    model.save_pretrained(checkpoint)
    character_tokenizer(32).save_pretrained(checkpoint)
    lora = get_peft_model(
        GPT2LMHeadModel.from_pretrained(checkpoint),
        LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    lora.save_pretrained(adapter)
    args = arguments(run, max_steps=3, report_to=["tensorboard"])
    trainer(tiny_model(heads(family="topk")), args).train()
    said = run_python("-c", TOOLS, checkpoint, adapter, run, folder=tmp_path, HF_HUB_OFFLINE="1")
    assert said.strip().endswith("all tools work")
