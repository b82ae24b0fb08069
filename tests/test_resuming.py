"""A run that goes on: what was half done, options given anew, and crashes while a checkpoint is written."""

import json
import os

import pytest
import torch
import yaml
from small import small_trainer

from sd3_adrpo import checkpoint, cli, judging, plan
from sd3_adrpo.base_cache import BaseCache
from sd3_adrpo.collect import Collector
from sd3_adrpo.errors import UserError
from sd3_adrpo.folders import dated_folder
from sd3_adrpo.run import Run
from sd3_adrpo.trainer import Trainer

SMALL = """--rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --rollout.num_inference_steps 2 --epochs 2
    --rollout.batch_size 2 --train.sigmas_per_sample 1 --eval.samples_per_prompt 2 --eval.num_inference_steps 2
    --report_to none --lora.rank 2 --checkpointing_epochs 1""".split()


@pytest.fixture
def options(tmp_path) -> list[str]:
    (tmp_path / "p.txt").write_text("a red circle\ntwo blue squares\n")
    return [*SMALL, "--prompts", str(tmp_path / "p.txt")]


def made(argv: list[str]) -> Run:
    config = cli.parse(argv)
    return Run(config, plan.check(config))


def lora(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(checkpoint.find_checkpoint(str(folder), None))["lora"]


def test_half_an_epoch_is_forgotten_when_the_cache_has_all_of_it(tmp_path, options, monkeypatch):
    """Interrupted in its first rollout, which another run then puts into the cache: epoch 2 must not begin with it."""
    made([*options, "--output_dir", str(tmp_path / "alone")])()
    cached = [*options, "--base_cache", str(tmp_path / "base")]
    scored, calls = Collector._scored, []

    def fails(self, sampled):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the reward broke")
        return scored(self, sampled)

    monkeypatch.setattr(Collector, "_scored", fails)
    with pytest.raises(KeyError):
        made([*cached, "--output_dir", str(tmp_path / "parts")])()
    monkeypatch.setattr(Collector, "_scored", scored)
    made([*cached, "--output_dir", str(tmp_path / "other"), "--objective", "raft"])()
    made(["--resume_from_checkpoint", str(tmp_path / "parts")])()
    ours, theirs = lora(tmp_path / "parts"), lora(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_options_given_anew_count_and_are_kept(tmp_path, options):
    folder = tmp_path / "run"
    made([*options, "--output_dir", str(folder), "--epochs", "1", "--objective.advantage", "running"])()
    given = "--epochs 3 --train.learning_rate 5e-5 --train.adam_beta1 0.5 --objective.advantage critic".split()
    run = made(["--resume_from_checkpoint", str(folder), *given])
    run()
    group = run.trainer.optimization.optimizer.param_groups[0]
    # a cosine of three epochs, at its end
    assert group["initial_lr"] == 5e-5 and group["betas"][0] == 0.5 and group["lr"] == pytest.approx(0, abs=1e-12)
    assert run.trainer.advantages.kind == "critic" and run.trainer.epoch == 3
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["epochs"] == 3 and kept["resume_from_checkpoint"] is None  # a second time they need not be given


def test_the_rate_goes_on_where_the_schedule_is(tmp_path):
    trainer = small_trainer(tmp_path, "--train.lr_scheduler", "cosine", "--train.learning_rate", "1e-3")
    trainer.run_epoch(lambda *_: None)
    state, rate = trainer.state_dict(), trainer.optimization.optimizer.param_groups[0]["lr"]
    trainer.load_state_dict(state)
    assert trainer.optimization.optimizer.param_groups[0]["lr"] == rate  # to the last bit
    for group in trainer.optimization.optimizer.param_groups:
        group["initial_lr"] = 2e-3  # as of a run that was started with it
    trainer.load_state_dict(state)
    assert trainer.optimization.optimizer.param_groups[0]["lr"] == pytest.approx(2 * rate)


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    for epoch in (1, 2):
        checkpoint.save_checkpoint(folder / f"epoch-{epoch:04d}", {"epoch": epoch})

    def full(_, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_checkpoint(folder / "epoch-0003", {})
    found = checkpoint.find_checkpoint(str(tmp_path), None)
    assert checkpoint.load_checkpoint(found) == {"epoch": 2}
    checkpoint.prune(folder, keep=2)
    assert (folder / "epoch-0001").exists()  # what was not written is none of the two
    monkeypatch.setattr(torch, "save", save)
    checkpoint.save_checkpoint(folder / "epoch-0003", {"epoch": 3})
    assert checkpoint.load_checkpoint(checkpoint.find_checkpoint(str(tmp_path), None)) == {"epoch": 3}


def test_measurements_on_the_way_are_normalised_by_the_base(tmp_path, options, monkeypatch):
    """Else a reward in units of its own spread would be 0 each time."""
    measure, references = judging.measure, []

    def watched(*args, reference=None, **more):
        references.append(reference)
        return measure(*args, reference=reference, **more)

    monkeypatch.setattr(judging, "measure", watched)
    mixed = "--reward jpeg=1,shapes=1 --reward.normalise batch --evaluation_epochs 1 --validation_epochs 9".split()
    run = made([*options, *mixed, "--output_dir", str(tmp_path / "run")])
    run()
    assert [reference is run.judge.base for reference in references] == [False, True, True]
    assert references[0] is None


def test_what_is_watched_does_not_change_the_first_weights(tmp_path, options):
    states = []
    for name, more in {"a": [], "b": ["--watch", "clip"]}.items():
        run = made([*options, "--reward", "jpeg", *more, "--output_dir", str(tmp_path / name)])
        run._load()
        states.append(run.policy.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_other_pairs_have_another_name_in_the_cache(tmp_path):
    names = []
    for number in (1, 2):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"prompt": "a", "chosen": f"{number}.png", "rejected": "0.png"}))
        config = cli.parse(["--objective", "dpo", "--objective.pairs_file", str(file)])
        names.append(set(BaseCache(str(tmp_path), config, [], []).names.values()))
    assert len(names[0] & names[1]) == 1  # the base's measurement


def test_metrics_are_means_over_an_updates_parts(tmp_path):
    """The same update in one part and in four."""
    logs = []
    for parts in ("1", "4"):
        size = ["--train.batch_size", str(8 // int(parts)), "--train.gradient_accumulation_steps", parts]
        trainer = small_trainer(tmp_path / parts, *size)
        logs.append(trainer.run_epoch(lambda *_: None)[1][0])
    for name, value in logs[0].items():
        assert logs[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("units", "members", "batch", "expected"), [(64, 1, 16, 4), (88, 1, 16, 6), (40, 1, 64, 1), (24, 2, 16, 3)]
)
def test_no_pass_has_more_samples_than_the_batch(tmp_path, monkeypatch, units, members, batch, expected):
    trainer = small_trainer(tmp_path, "--train.batch_size", str(batch))
    monkeypatch.setattr(type(trainer.objective), "members", members)
    assert Trainer._batches(trainer, units) == expected


def test_what_is_measured_otherwise_is_measured_anew(tmp_path, options):
    folder = tmp_path / "run"
    made([*options, "--output_dir", str(folder), "--epochs", "1"])()
    again = made(["--resume_from_checkpoint", str(folder), "--epochs", "2", "--eval.samples_per_prompt", "3"])
    summary = again()
    assert len(again.judge.base.reward) == 6
    assert summary["before"]["reward"] == pytest.approx(again.judge.base.reward.mean().item(), rel=1e-5)


def test_a_resume_that_fails_keeps_the_options(tmp_path, options):
    folder = tmp_path / "run"
    made([*options, "--output_dir", str(folder), "--epochs", "1"])()
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="is .* in the checkpoint"):
        made(["--resume_from_checkpoint", str(folder), "--lora.rank", "4"])()
    assert (folder / "config.yaml").read_text() == before


def test_batches_of_another_plan_are_drawn_again(tmp_path, options, monkeypatch):
    """Interrupted after one batch of its first epoch, then resumed with other sizes: as if it had begun with them."""
    scored, calls = Collector._scored, []

    def fails(self, sampled):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the reward broke")
        return scored(self, sampled)

    folder, other = tmp_path / "run", ["--rollout.prompts_per_epoch", "1", "--rollout.samples_per_prompt", "4"]
    monkeypatch.setattr(Collector, "_scored", fails)
    with pytest.raises(KeyError):
        made([*options, "--output_dir", str(folder)])()
    monkeypatch.setattr(Collector, "_scored", scored)
    made(["--resume_from_checkpoint", str(folder), *other])()
    made([*options, *other, "--output_dir", str(tmp_path / "alone")])()
    ours, theirs = lora(folder), lora(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_whole_rollout_of_another_plan_is_drawn_again(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer._sample(lambda *_: None)
    trainer.update = 1
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    assert trainer.rollout is not None and trainer.update == 1
    trainer.config.rollout.batch_size = 2  # how, not what
    trainer.load_state_dict(state)
    assert trainer.rollout is not None
    trainer.config.rollout.num_inference_steps = 2
    trainer.load_state_dict(state)
    assert trainer.rollout is None and trainer.update == 0


def test_the_newest_checkpoint_is_the_last_written(tmp_path):
    """Of a run that went back from epoch 30 to 20 and on to 24."""
    folder = tmp_path / "checkpoints"
    for second, epoch in enumerate((20, 30, 24)):
        checkpoint.save_checkpoint(folder / f"epoch-{epoch:04d}", {"epoch": epoch})
        os.utime(folder / f"epoch-{epoch:04d}" / checkpoint.STATE, (second, second))
    assert checkpoint.find_checkpoint(str(tmp_path), None).name == "epoch-0024"
    checkpoint.prune(folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["epoch-0024"]


def test_a_gradient_that_overflows_changes_nothing(tmp_path):
    trainer = small_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    for parameter in trainer.policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    trainer.policy.parameters()[3].grad[0, 0] = float("inf")
    trainer.optimization.optimizer.param_groups[0]["weight_decay"] = 0.0
    assert not trainer.optimization.step().isfinite()
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())


def test_weights_that_are_not_numbers_are_said(tmp_path):
    trainer = small_trainer(tmp_path, "--reward", "jpeg")
    with torch.no_grad():
        trainer.policy.parameters()[0].fill_(float("nan"))
    with pytest.raises(UserError, match="not finite.*older checkpoint"):
        trainer.run_epoch(lambda *_: None)


def test_a_constant_rate_warms_up(tmp_path):
    trainer = small_trainer(tmp_path, *"--train.lr_scheduler constant --train.lr_warmup_steps 4".split())
    rates = []
    for _ in range(6):
        rates.append(trainer.optimization.optimizer.param_groups[0]["lr"])
        trainer.optimization.optimizer.step()
        trainer.optimization.scheduler.step()
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])


def test_runs_of_one_second_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    assert [dated_folder("a").name for _ in range(3)] == ["now_a", "now_a-2", "now_a-3"]


def test_a_changed_reward_function_has_another_name_in_the_cache(tmp_path):
    names = []
    for text in ("def score(i, p): return [0] * len(p)", "def score(i, p): return [1] * len(p)"):
        (tmp_path / "mine.py").write_text(text)
        config = cli.parse(["--reward", "python", "--reward.function", f"{tmp_path}/mine.py:score"])
        names.append(set(BaseCache(str(tmp_path), config, [], []).names.values()))
    assert not names[0] & names[1]
