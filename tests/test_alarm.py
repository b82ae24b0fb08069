"""The alarm rings when the held-out signal falls while the reward rises, and only then."""

from types import SimpleNamespace

import pytest
import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.alarm import Alarm
from sd3_adrpo.errors import UserError
from sd3_adrpo.run import Run

PROMPT = torch.arange(20).repeat_interleave(4)


def measured(accuracy: float, reward: float, watched: float | None = None) -> SimpleNamespace:
    """80 images, of which this share is right (the last ones fail first), all with this reward."""
    right = (torch.arange(80) < round(80 * accuracy)).float()
    scores = {} if watched is None else {"watch/shapes": torch.full((80,), watched) + 0.01 * PROMPT}
    return SimpleNamespace(accuracy=right, reward=torch.full((80,), reward), prompt=PROMPT, scores=scores)


def test_rings_for_more_reward_at_less_accuracy(tmp_path):
    alarm = Alarm(tmp_path / "best.pt", stderrs=2.0)
    assert alarm(1, measured(0.5, 80.0), {"w": torch.tensor(1.0)}) is None
    assert alarm(2, measured(0.8, 85.0), {"w": torch.tensor(2.0)}) is None  # better: the new best
    # 0.8 -> 0.4: 32 of 80 images, mean -0.4, standard error over 20 prompts 0.11
    message = alarm(3, measured(0.4, 88.0), {"w": torch.tensor(3.0)})
    assert "accuracy fell by 0.400 ± 0.1" in message and "since epoch 2" in message and "rose by 3.000" in message
    assert alarm.best["lora"]["w"].item() == 2.0


@pytest.mark.parametrize(
    ("accuracy", "reward"),
    [(0.4, 84.0), (0.79, 88.0), (0.8, 88.0)],
    ids=["reward falls too", "within the noise", "equal"],
)
def test_is_quiet_otherwise(tmp_path, accuracy, reward):
    alarm = Alarm(tmp_path / "best.pt", stderrs=2.0)
    alarm(1, measured(0.8, 85.0), {})
    assert alarm(2, measured(accuracy, reward), {}) is None


def test_a_watched_reward_comes_before_accuracy(tmp_path):
    alarm = Alarm(tmp_path / "best.pt", stderrs=2.0)
    alarm(1, measured(0.1, 80.0, watched=5.0), {})
    assert "watch/shapes fell by 1.000" in alarm(2, measured(0.9, 81.0, watched=4.0), {})


def test_remembers_over_a_resume(tmp_path):
    Alarm(tmp_path / "best.pt", 2.0)(1, measured(0.8, 85.0), {"w": torch.tensor(1.0)})
    assert "since epoch 1" in Alarm(tmp_path / "best.pt", 2.0)(2, measured(0.4, 88.0), {"w": torch.tensor(2.0)})


def test_a_run_stops_and_restores(tmp_path, monkeypatch, capsys):
    """The second measurement is made to look hacked: the run ends there with the LoRA of the first."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    options = f"""--prompts {prompts} --rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --epochs 6
        --rollout.num_inference_steps 2 --train.sigmas_per_sample 1 --eval.samples_per_prompt 2 --report_to none
        --eval.num_inference_steps 2 --lora.rank 2 --evaluation_epochs 1 --alarm restore --train.lr_scheduler cosine
        --output_dir {tmp_path / "run"}""".split()
    states = []

    def rings(self, epoch, measurement, lora):
        states.append(lora)
        self.best = self.best or {"epoch": epoch, "lora": lora}
        return "it is hacked" if epoch == 2 else None

    monkeypatch.setattr(Alarm, "__call__", rings)
    config = cli.parse(options)
    run = Run(config, plan.check(config))
    summary = run()
    assert summary["epochs"] == 2 and "ALARM: it is hacked" in capsys.readouterr().out
    restored = run.policy.state_dict()
    assert all(torch.equal(restored[name], states[0][name]) for name in restored)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in restored)


def test_a_drift_above_the_limit_ends_the_run(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    options = f"""--prompts {prompts} --rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --epochs 3
        --rollout.num_inference_steps 2 --train.sigmas_per_sample 1 --eval.samples_per_prompt 2 --report_to none
        --eval.num_inference_steps 2 --lora.rank 2 --evaluation_epochs 1 --drift_limit 1e-12 --checkpointing_epochs 10
        --output_dir {tmp_path / "run"}""".split()
    config = cli.parse(options)
    summary = Run(config, plan.check(config))()
    assert summary["epochs"] == 1 and "above drift_limit 1e-12" in summary["ended_early"]
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()  # measured and kept all the same
    assert (tmp_path / "run" / "checkpoints" / "epoch-0001").exists()  # between two of checkpointing_epochs


def test_a_drift_limit_that_nothing_looks_at_is_refused():
    with pytest.raises(UserError, match="drift_limit is 0.1, and nothing.*evaluation_epochs"):
        plan.check(cli.parse(["--drift_limit", "0.1"]))
