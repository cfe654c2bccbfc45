"""The schedule of learning rates."""

import copy

import pytest
import torch
from bad_input import refused, small_config
from nerfstudio.configs.method_configs import all_methods

from ovs3d_nerfstudio.configs import semantics_alone
from ovs3d_nerfstudio.engine.cooling import over_steps


def rates(config, name: str, steps: int) -> list[float]:
    """The rates of one group's steps, as shares of its first."""
    group = over_steps(config.optimizers, steps)[name]
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=group["optimizer"].lr)
    schedule = group["scheduler"].setup().get_scheduler(optimizer, group["optimizer"].lr)
    shares = []
    for _ in range(steps):
        shares.append(schedule.get_last_lr()[0] / group["optimizer"].lr)
        optimizer.step()
        schedule.step()
    return shares


@pytest.mark.parametrize("steps", [100, 2000])
def test_rates_cool_at_the_end_of_the_run_however_long_it_is(steps):
    config = all_methods["ovs3d-lite"]
    shares = rates(config, "fields", steps)
    warm = round(0.7 * steps)
    decay = [10 ** (-step / steps) for step in range(steps)]
    assert shares[:warm] == pytest.approx(decay[:warm])
    assert shares == pytest.approx([d * min(1, (steps - i) / (0.3 * steps)) for i, d in enumerate(decay)])
    assert 0 < shares[-1] < 0.4 / steps
    assert config.optimizers["fields"]["scheduler"].max_steps is None  # the method itself is not of this run's length


def test_the_paper_decays_to_a_tenth():
    assert rates(all_methods["ovs3d-paper"], "fields", 1000)[-1] == pytest.approx(0.1, rel=0.01)


def test_semantics_of_gaussians_wait_for_them_and_cool_with_the_run():
    config = copy.deepcopy(all_methods["ovs3d-splat-lite"])
    shares = rates(config, "semantic_grid", 1000)
    assert shares[500] == 1 and shares[750] == pytest.approx(10**-0.5) and shares[-1] < 1e-3
    assert rates(config, "semantic_grid", 40)[-1] < 1  # a run that ends before they begin
    semantics_alone(config, 50)
    shares = rates(config, "semantic_grid", 50)
    assert shares[0] == 1 and shares[25] == pytest.approx(10**-0.5) and shares[-1] < 0.01


def test_an_end_that_is_asked_for_is_kept():
    config = copy.deepcopy(all_methods["ovs3d-lite"])
    config.optimizers["fields"]["scheduler"].max_steps = 50
    shares = rates(config, "fields", 100)
    assert shares[25] == pytest.approx(10**-0.5) and shares[50:] == [0.0] * 50


@pytest.mark.parametrize(("option", "value"), [("cooling", -0.5), ("cooling", 1.5), ("max_steps", 0)])
def test_a_schedule_that_cannot_be_is_refused(small, tmp_path, capsys, option, value):
    config = small_config(small)
    setattr(config.optimizers["fields"]["scheduler"], option, value)
    said = f"--optimizers.fields.scheduler.{option.replace('_', '-')} {value}"
    config.output_dir = tmp_path
    refused(capsys, tmp_path, config.setup().setup, said)
