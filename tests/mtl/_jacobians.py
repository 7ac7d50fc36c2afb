"""Gradients with known directions, and random ones over many scales."""

import torch


J3 = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])
J4 = torch.tensor([[1, 2, -1, 0.5], [-1.5, 0.5, 2, 1], [2, -1, 0.25, -2]])

SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


def random_jacobian(tasks: int, parameters: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Rows with a common part, so that some agree and some conflict, and norms an order of magnitude apart."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(parameters, generator=generator, dtype=torch.float64)
    own = torch.randn(tasks, parameters, generator=generator, dtype=torch.float64)
    norms = torch.logspace(-0.5, 0.5, tasks, dtype=torch.float64)[:, None]
    return scale * norms * (0.3 * common + own)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is at most `tolerance` of the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (actual.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), (actual, expected)
