"""A run that takes its first samples and its base from a cache ends as one that makes them."""

import json

import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.collect import Collector
from sd3_adrpo.run import Run


def finish(folder, prompts, *more) -> dict:
    options = f"""--prompts {prompts} --rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --epochs 2
        --rollout.num_inference_steps 2 --train.sigmas_per_sample 1 --eval.samples_per_prompt 2 --report_to none
        --eval.num_inference_steps 2 --lora.rank 2 --output_dir {folder}""".split()
    config = cli.parse([*options, *more])
    return Run(config, plan.check(config))()


def lora(folder) -> dict:
    return torch.load(next(folder.glob("checkpoints/epoch-0002/state.pt")), weights_only=True)["lora"]


def test_the_same_result_with_one_rollout_less(tmp_path, monkeypatch):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    calls = []
    sample = Collector._sample_mine
    monkeypatch.setattr(
        Collector, "_sample_mine", lambda self, epoch, *a: (calls.append(epoch), sample(self, epoch, *a))
    )
    alone = finish(tmp_path / "alone", prompts)
    shared = ["--base_cache", str(tmp_path / "base")]
    finish(tmp_path / "first", prompts, *shared, "--objective", "raft")
    assert calls == [0, 1, 0, 1]
    second = finish(tmp_path / "second", prompts, *shared)
    assert calls == [0, 1, 0, 1, 1]  # the first epoch's came from the cache
    assert second["after"] == alone["after"] and second["before"] == alone["before"]
    ours, theirs = lora(tmp_path / "second"), lora(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds"] > 0 for row in rows if row["kind"] == "epoch")


def test_other_samples_have_another_name(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    shared = ["--base_cache", str(tmp_path / "base")]
    finish(tmp_path / "one", prompts, *shared)
    finish(
        tmp_path / "two", prompts, *shared, "--seed", "1", "--epochs", "1"
    )  # other noise, but the same base to measure
    assert sorted(path.name.split("_")[0] for path in (tmp_path / "base").iterdir()) == ["before", "samples", "samples"]
