"""Records, intervals and equal-time values by hand; compare.py from start to finish, resumed and with a failure."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
from matplotlib.axes import Axes

import train_sd3
from sd3_adrpo import comparison
from sd3_adrpo.trainer import Trainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "eval"))
import compare  # noqa: E402


def values(reward: float) -> dict:
    return {"reward": reward, "accuracy": None, "clip_diversity": 0.5, "free_diversity": 1.0, "w2_drift": 0.0}


@pytest.fixture
def finished(tmp_path):
    """A run of two epochs of 32 images, 10 s and 30 s, from reward 1 over 2 to 5."""
    summary = {
        "objective": "adrpo",
        "ended_early": None,
        "seed": 3,
        "epochs": 2,
        "images": 64,
        "seconds": 99.0,
        "difference": {},
    }
    summary |= {"before": values(1.0), "after": values(5.0)}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [{"kind": "epoch", "epoch": 0, "seconds": 10.0}, {"kind": "evaluation", "epoch": 1, **values(2.0)}]
    rows += [{"kind": "update", "epoch": 1, "loss": 0.1}, {"kind": "epoch", "epoch": 1, "seconds": 30.0}]
    rows = [rows[0], *rows]  # an epoch that was done again after a crash, which cut the last line
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"kind": "ep')
    return tmp_path


def test_record(finished):
    run = comparison.record(finished, "adrpo beta0=1")
    assert run["label"] == "adrpo beta0=1" and run["seconds"] == 40.0 and run["seed"] == 3
    assert [(p["images"], p["seconds"], p["reward"]) for p in run["history"]] == [
        (0, 0.0, 1.0),
        (32, 10.0, 2.0),
        (64, 40.0, 5.0),
    ]


def test_value_at_a_time_lies_between_measurements(finished):
    run = comparison.record(finished, "adrpo")
    assert comparison.at_seconds(run, 5.0)["reward"] == pytest.approx(1.5)
    assert comparison.at_seconds(run, 20.0)["reward"] == pytest.approx(2.0 + 3.0 * 10 / 30)
    assert comparison.at_seconds(run, 1000.0)["reward"] == 5.0
    assert comparison.at_seconds(run, 5.0)["accuracy"] is None


def test_interval_is_students():
    # mean 2, standard deviation 1, t of 2 degrees of freedom at 97.5 % is 4.3027 (any table)
    mean, half = comparison.mean_and_interval([1.0, 2.0, None, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert comparison.mean_and_interval([1.5]) == (1.5, None)
    assert comparison.mean_and_interval([None]) == (None, None)


def test_table_and_figures(finished, tmp_path):
    runs = [comparison.record(finished, "adrpo"), comparison.record(finished, "raft")]
    text = comparison.table(runs)
    assert "| adrpo | 1 | 5.000 |" in text and "Equal time: after 40 s" in text and "| base | | 1.000 |" in text
    paths = comparison.figures(runs, tmp_path, {"drawn": {"reward": 9.0}})
    assert {path.name for path in paths} >= {"reward_against_free_diversity.png", "reward_against_images.png"}
    assert "accuracy_against_images.png" not in {path.name for path in paths}  # there is none to show


def test_figures_star_the_mean_of_the_seeds_with_its_interval(finished, tmp_path, monkeypatch):
    run = comparison.record(finished, "adrpo")
    runs = [{**run, "seed": s, "history": [run["history"][0], values(r)]} for s, r in enumerate((4.0, 6.0))]
    runs = [{**run, "history": [{**point, "images": 0} for point in run["history"]]} for run in runs]
    drawn = []
    bars = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axes, x, y, **more: drawn.append((y, more)) or bars(axes, x, y, **more)
    )
    comparison.figures(runs, tmp_path, {"drawn": {"reward": 900.0}})
    mean, more = drawn[0]
    assert mean == 5.0 and more["yerr"] == pytest.approx(12.7062, rel=1e-4)  # t of 1 degree of freedom, stderr 1


def test_differences_are_paired_by_seed(finished):
    """Seeds 0 to 2 of the one gain 1, 2, 9 and of the other 2, 3.5, 9.5: +1, +1.5, +0.5 whatever the seeds do."""
    run = comparison.record(finished, "adrpo")
    runs = [
        {**run, "label": label, "seed": seed, "after": values(reward)}
        for label, rewards in (("adrpo", (1.0, 2.0, 9.0)), ("awm", (2.0, 3.5, 9.5)), ("new", ()))
        for seed, reward in enumerate(rewards)
    ]
    runs.append({**run, "label": "new", "seed": 7, "after": values(5.0)})
    lines = comparison.table(runs).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("**Less adrpo, seed by seed**"))
    half = 4.302653 * 0.5 / math.sqrt(3)  # Student's t with 2 degrees of freedom
    cells = [cell.strip() for cell in lines[start + 4].split("|")]
    assert cells[1:5] == ["awm", "3", f"1.000 ± {half:.3f}", ""]
    assert lines[start + 5].startswith("| new | 0 |  |")  # no seed in common


def test_members_are_every_combination():
    args, options = compare.parse(
        ["--objectives", "adrpo,raft", "--seeds", "0,1", "--sweep", "train.learning_rate=1e-3,2e-3", "--epochs", "1"]
    )
    chosen = compare.members(args, options)
    assert [member.label for member in chosen[:4]] == [
        "adrpo learning_rate=1e-3",
        "adrpo learning_rate=2e-3",
        "raft learning_rate=1e-3",
        "raft learning_rate=2e-3",
    ]
    assert [member.seed for member in chosen] == [0] * 4 + [1] * 4
    assert "--epochs" in chosen[0].options and "--train.learning_rate=1e-3" in chosen[0].options


def test_an_objective_with_options_of_its_own():
    chosen = compare.members(
        *compare.parse(["--objectives", "raft,adrpo beta0=2 train.inner_epochs=1 epochs=5", "--seeds", "0"])
    )
    assert [member.label for member in chosen] == ["raft", "adrpo beta0=2 train.inner_epochs=1 epochs=5"]
    assert chosen[1].options[-3:] == ("--objective.beta0=2", "--train.inner_epochs=1", "--epochs=5")
    assert chosen[1].name == "adrpo_beta0=2_train.inner_epochs=1_epochs=5_seed0"


def test_misspelt_option_stops_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--output_dir", str(tmp_path / "c"), "--seeds", "0", "--epoch", "1"])
    assert stop.value.code == 2 and "did you mean --epochs" in capsys.readouterr().err
    assert compare.main(["--sweep", "objective.beta0"]) == 2


def in_this_process(command: list[str], **_) -> types.SimpleNamespace:
    """A member without the seconds that it takes to import everything again."""
    assert command[:2] == [sys.executable, str(ROOT / "train_sd3.py")]
    return types.SimpleNamespace(returncode=train_sd3.main(command[2:]))


def test_compare_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    """Two objectives, one of which fails at first: the other is kept, and the same command goes on."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    options = f"""--rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --rollout.num_inference_steps 2
        --epochs 2 --train.inner_epochs 1 --train.sigmas_per_sample 1 --eval.samples_per_prompt 2
        --eval.num_inference_steps 2 --report_to none --prompts {prompts} --lora.rank 2""".split()
    command = ["--objectives", "adrpo,raft", "--seeds", "0", "--output_dir", str(tmp_path / "c"), *options]
    run = compare.run
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 1)  # threads of a model this small wait for each other
    monkeypatch.setattr(
        compare, "run", lambda member, *rest: "it broke" if "raft" in member.name else run(member, *rest)
    )
    assert compare.main(command) == 1
    first = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [r["objective"] for r in first["runs"]] == ["adrpo"] and first["missing"] == ["raft_seed0"]
    assert first["failures"] == {"raft_seed0": "it broke"} and "it broke" in capsys.readouterr().err
    stamp = (tmp_path / "c" / "members" / "adrpo_seed0" / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr(compare, "run", run)
    here = types.SimpleNamespace(run=in_this_process, STDOUT=None)
    monkeypatch.setattr(compare, "subprocess", here)  # the first member was a program of its own
    monkeypatch.setattr(Trainer, "stop_on_signals", lambda self: None)  # signals are for main threads
    assert compare.main(command) == 0
    second = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [r["objective"] for r in second["runs"]] == ["adrpo", "raft"] and not second["missing"]
    assert (tmp_path / "c" / "members" / "adrpo_seed0" / "summary.json").stat().st_mtime_ns == stamp
    assert len(second["runs"][0]["history"]) == 3  # the base, after the first epoch, the end
    assert set(second["runs"][0]) >= {"objective", "seed", "images", "seconds", "before", "after", "history"}
    joined = compare.earlier(tmp_path / "c", compare.members(*compare.parse(["--seeds", "0", *options])), options)
    assert joined["runs"] == [] and len(joined["command"]) == 1  # all of them are run, or found, again
    only = compare.members(*compare.parse(["--objectives", "awm,raft", "--seeds", "0", *options]))
    assert [run["label"] for run in compare.earlier(tmp_path / "c", only, options)["runs"]] == ["adrpo"]
    assert compare.main([*command, "--epochs", "3"]) == 2
    assert "holds a comparison with the options --rollout.prompts_per_epoch 2" in capsys.readouterr().err
