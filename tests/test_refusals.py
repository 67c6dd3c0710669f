"""What a training refuses where FSDP shards its model; other refusals are tested elsewhere."""

import pytest
from training_job import arguments, heads, tiny_model

from hf_saereg.errors import UserError
from hf_saereg.refusals import check_training


@pytest.mark.parametrize(
    "option, words",
    [
        ({"eval_fidelity": True}, "eval_fidelity true"),
        ({"b_dec_init": "mean"}, "b_dec_init mean"),
        ({"resample_every": 2}, "resample_every 2"),
    ],
)
def test_what_runs_blocks_by_themselves_is_refused_with_shards(tmp_path, option, words):
    model, asked = tiny_model(heads()), arguments(tmp_path, **option)
    check_training(asked, model, is_sharded=False)
    with pytest.raises(UserError, match=rf"^{words} does not work where FSDP .*multi_gpu\.yaml"):
        check_training(asked, model, is_sharded=True)


def test_shards_take_every_other_option(tmp_path):
    asked = arguments(tmp_path, heads_learning_rate=0.1, anchor_weight=1.0, eval_base=True)
    check_training(asked, tiny_model(heads()), is_sharded=True)
