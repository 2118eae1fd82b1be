"""What every test starts from: one thread, a fixed seed, few and reproducible hypothesis examples."""

import random

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the tensors here are tiny: a second thread costs more than it brings

hypothesis.settings.register_profile(
    'xtloss',
    deadline=None,
    derandomize=True,
    max_examples=20,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # examples are seeds: a smaller one says no more
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile('xtloss')


def _devices() -> list[str]:
    return ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn."""
    return torch.device(request.param)
