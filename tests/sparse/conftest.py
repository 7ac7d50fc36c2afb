import pytest
import torch


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(20)  # no generator of the tests starts from it: weights must not repeat as noise or as x
