import torch

from parallel.chunked_ops import sum_of_squares


def test_a_sum_of_squares_is_that_of_fp64(runtime) -> None:
    """Over sizes that are no whole rows, none at all, and values that fp32 would lose in a sum over millions."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((3, 700), (1024,), (0,), (1,), (4_000_003,))]
    tensors[1] *= 1e4
    wanted = sum(t.double().square().sum() for t in tensors)
    got = sum_of_squares([t.to(runtime.device) for t in tensors]).cpu()
    assert got.dtype == torch.float64 and abs(got / wanted - 1).item() < 2e-8
    large = torch.full((10,), 1e20, device=runtime.device)  # its squares are beyond fp32
    assert abs(sum_of_squares([large]).cpu() / 1e41 - 1).item() < 1e-6
    assert sum_of_squares([torch.tensor([1.0, float("nan")], device=runtime.device)]).isnan()


def test_a_sum_of_squares_of_bf16_is_not_rounded_to_bf16(runtime) -> None:
    tensor = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = tensor.double().square().sum()
    assert abs(sum_of_squares([tensor.to(runtime.device)]).cpu() / wanted - 1).item() < 1e-6
