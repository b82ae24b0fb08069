"""With `train.paired_noise` a prompt's samples share sigmas and noise, and stay together in the order of updates."""

import torch
from small import small_trainer

from sd3_adrpo.draws import fresh_noise


def test_a_group_shares_its_draws():
    units = torch.tensor([[5], [0], [3], [4], [1]])
    draws = fresh_noise(units, 6, 2, 3.0, (1, 2, 2), (0, 0, 0), shared_by=3)
    for one, other, same in [(0, 2, True), (0, 3, True), (1, 4, True), (0, 1, False)]:
        assert torch.equal(draws.noise[one], draws.noise[other]) == same
        assert torch.equal(draws.sigma[one], draws.sigma[other]) == same


def test_groups_stay_together(tmp_path):
    trainer = small_trainer(tmp_path, "--train.paired_noise", "true")
    size = trainer.config.rollout.samples_per_prompt
    order = trainer.order(trainer.samples)
    assert sorted(order.tolist()) == list(range(trainer.samples))
    assert all(group.tolist() == list(range(group[0], group[0] + size)) for group in order.split(size))
    assert all(group[0] % size == 0 for group in order.split(size))
    assert trainer._draw(torch.arange(trainer.samples)[:, None]).sigma.unique(dim=0).shape[0] == trainer.samples // size
