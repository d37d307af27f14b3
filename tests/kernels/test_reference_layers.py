"""The element-wise reference kernels agree with direct float64 computations."""

import pytest
import torch

from albireo_kernels import reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(5, 7, 64, generator=generator)).to(dtype)
    weight = torch.randn(64, generator=generator).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    actual = reference.rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_rope_is_a_rotation_of_element_pairs() -> None:
    """As complex numbers, elements i and i + head_dim / 2 are multiplied by exp(i angle)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 16, generator=generator)
    angles = 10 * torch.rand(6, 8, generator=generator)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    turned = pairs * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    actual = reference.apply_rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_rope_keeps_the_type_of_its_input() -> None:
    x = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    assert reference.apply_rope(x, torch.ones(1, 2), torch.zeros(1, 2)).equal(x)


def test_silu_mul_takes_the_gate_first() -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up = torch.randn(2, 4, 10, generator=generator)
    expected = gate.double() * gate.double().sigmoid() * up.double()
    actual = reference.silu_mul(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 8, 20])
@pytest.mark.parametrize("has_fast_bfloat16", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(num_tokens: int, has_fast_bfloat16: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the detour of CPUs that lack bfloat16 instructions; also of no rows, an empty shard."""
    monkeypatch.setattr("albireo_kernels.reference.layers._HAS_FAST_BFLOAT16_ON_CPU", has_fast_bfloat16)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    weight = torch.randn(1100, 96, generator=generator).bfloat16()
    bias = torch.randn(1100, generator=generator).bfloat16() if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    actual = reference.linear(x, weight, bias)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-7, atol=2**-7)
    assert reference.linear(x, weight[:0]).shape == (num_tokens, 0)
