"""The configuration of a character run that takes seconds, with its text."""

import random

import yaml

WORDS = ["the", "king", "shall", "speak", "to", "all", "his", "men", "and", "queens", "hear", "it"]
TINY = {
    **{"block_size": 32, "split_multiple": 32},
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1},
    **{"architecture": "standard", "d_sae": [48], "sparsity_coefficient": [0.01]},
    **{"max_steps": 30, "save_steps": 5, "save_total_limit": 2, "logging_steps": 5},
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "seed": 3},
    **{"learning_rate": 1e-2, "use_cpu": True, "dataloader_drop_last": True},
    **{"fresh_architectures": ["topk", "standard"], "fresh_k": [2, 4], "fresh_coefficient": [1.0]},
    **{"fresh_d_sae": 32, "fresh_steps": 4, "fresh_batch_size": 4, "fidelity_blocks": 8},
}


def configuration(folder, **changes):
    """A tiny run's configuration in `folder`, with its text; returns the file's path."""
    choose = random.Random(0).choice
    (folder / "text.txt").write_text(" ".join(choose(WORDS) for _ in range(1200)))
    options = TINY | {"output_dir": str(folder / "run"), "dataset": str(folder / "text.txt")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(options | changes))
    return folder / "tiny.yaml"
