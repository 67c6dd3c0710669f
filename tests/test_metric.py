"""The metric: the same figures as `fidelity`, however the rows came in."""

import pytest
import torch

from hf_saereg import FidelityMetric
from hf_saereg.fidelity import baselines, fidelity
from hf_saereg.heads.bank import HeadBank


@pytest.fixture
def metric(tmp_path):
    return FidelityMetric(cache_dir=str(tmp_path))


@pytest.fixture
def batches(input_ids):
    return [{"input_ids": ids, "labels": ids} for ids in (input_ids[:2], input_ids[2:, :4])]


def expected(model, heads, batches):
    return fidelity(model, heads, batches, baselines(model, batches)).figures()


def test_rows_of_different_lengths_give_the_figures_of_fidelity(metric, model, batches):
    for batch in batches:
        metric.add_batch(**batch)
    found = metric.compute(model=model)
    theirs = expected(model, model.heads, batches)
    assert found.keys() == theirs.keys()
    for name, figure in theirs.items():
        assert found[name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name


def test_batch_size_and_way_of_adding_change_nothing(metric, model, batches):
    lists = {
        name: [row.tolist() for batch in batches for row in batch[name]]
        for name in ("input_ids", "labels")
    }
    by_one = metric.compute(**lists, attention_mask=None, model=model, batch_size=1)
    metric.add_batch(**lists)
    together = metric.compute(model=model, batch_size=8)
    for name, figure in together.items():
        assert by_one[name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name


def test_padding_is_left_out(metric, model, input_ids):
    rows = [{"input_ids": row[None, :6], "labels": row[None, :6]} for row in input_ids]
    padding = torch.full((3, 3), 9)
    padded = torch.cat([padding, input_ids[:, :6]], dim=1)
    mask = torch.cat([torch.zeros_like(padding), torch.ones(3, 6, dtype=torch.int64)], dim=1)
    metric.add_batch(input_ids=padded, labels=padded, attention_mask=mask)
    found = metric.compute(model=model)
    for name, figure in expected(model, model.heads, rows).items():
        assert found[name] == pytest.approx(figure, rel=2e-4, abs=2e-5), name


def test_other_heads_can_be_scored_and_the_model_keeps_its_mode(metric, model, batches):
    some = HeadBank([list(model.heads)[1]])
    model.train()
    for batch in batches:
        metric.add_batch(**batch)
    found = metric.compute(model=model, heads=some)
    assert model.training
    model.eval()
    assert found == pytest.approx(expected(model, some, batches), rel=1e-4, abs=1e-5)
