"""Figures of a site, against cases counted by hand."""

import pytest
import torch

from hf_saereg.heads.statistics import LOG10_DENSITY_EDGES, SiteStatistics


def statistics(x, x_hat, fired):
    return SiteStatistics(
        tokens=torch.tensor(len(x)),
        squared_error=(x - x_hat).square().sum(),
        x_sum=x.sum(dim=0),
        x_square=x.square().sum(),
        x_norm=x.norm(dim=-1).sum(),
        fired=torch.tensor(fired),
    )


X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("x_hat", "explained"),
    [(X, 1.0), (X.mean(dim=0).expand_as(X), 0.0), (torch.zeros_like(X), -2.5), (X + 1, 0.0)],
)
def test_explained_variance(x_hat, explained):
    assert statistics(X, x_hat, [1]).explained_variance == pytest.approx(explained, abs=1e-12)


def test_densities_are_counted_by_half_decades():
    tokens = 10_000_000
    fired = [0, 1, 31, 32, 1_000_000, 1_000_001, tokens, 0]
    found = statistics(X, X, fired)._replace(tokens=torch.tensor(tokens))
    histogram = found.density_histogram()
    counts = dict.fromkeys(LOG10_DENSITY_EDGES[:-1], 0)
    counts[-6.0] += 2  # 1e-7, which is rarer than all bins, and 10^-5.51
    counts[-5.5] += 1  # 10^-5.495
    counts[-1.5] += 1  # 10^-1, the upper edge
    counts[-1.0] += 1
    counts[-0.5] += 1  # always
    assert dict(zip(histogram.log10_edges[:-1], histogram.counts, strict=True)) == counts
    assert histogram.never == 2
    assert found.dead_fraction == 0.25
    assert found.densities[4] == 0.1


def test_statistics_of_nothing_leave_others_as_they_are():
    some = statistics(X, X + 1, [1, 2, 3])
    nothing = SiteStatistics.of_nothing(2, 3, torch.device("cpu"))
    for mine, theirs in zip(nothing.merged(some), some, strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))
