"""The encoder product in panels of columns."""

import pytest
import torch

from hf_saereg.kernels.product import PADDING, PANEL, multiply


@pytest.mark.parametrize("d_sae", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_column_is_written_and_the_padding_is_not(d_sae, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=dtype)
    W_enc = torch.randn(5, d_sae, generator=generator, dtype=dtype)
    out = torch.full((7, d_sae + PADDING), torch.nan, dtype=dtype)
    multiply(x, W_enc, out=out)
    torch.testing.assert_close(out[:, :d_sae], x @ W_enc)
    assert out[:, d_sae:].isnan().all()
