"""Rewards together: the options, the weighted sum, what is only watched, and rewards that fail, hang or return NaN."""

from __future__ import annotations

import math
import time
import types

import pytest
import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.errors import RewardError, UserError
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards import _guarded
from sd3_adrpo.rewards._guarded import guarded
from sd3_adrpo.rewards._mixed import MixedReward, parse_weights
from sd3_adrpo.rewards.clip import ClipReward
from sd3_adrpo.rewards.jpeg import JpegReward
from sd3_adrpo.rewards.shapes import ShapesReward
from sd3_adrpo.scoring import Scoring

PROMPTS = [Prompt("p"), Prompt("q"), Prompt("r"), Prompt("s")]
IMAGES = torch.zeros(4, 3, 8, 8)


def constant(values: list[float], unit: str = "u"):
    scorer = lambda images, prompts: torch.tensor(values)[: len(prompts)]  # noqa: E731
    holder = types.SimpleNamespace(unit=unit, encoder="none")
    return type("Fixed", (), {"__call__": lambda self, *given: scorer(*given), **vars(holder)})()


def test_weights():
    assert parse_weights("clip=1.0, ocr=0.5") == {"clip": 1.0, "ocr": 0.5}
    assert parse_weights("clip,jpeg=-2e-1") == {"clip": 1.0, "jpeg": -0.2}
    for name in ("clip=,ocr", "clip=x", "clip,,ocr", "clip=inf", "clip=nan", "=1"):
        with pytest.raises(UserError, match="NAME=WEIGHT"):
            parse_weights(name)
    with pytest.raises(UserError, match="names clip twice"):
        parse_weights("clip=1,clip=2")


def test_options_of_one_and_of_several(tmp_path):
    assert cli.parse(["--reward", "jpeg", "--reward.target", "3"]).reward == JpegReward(target=3.0)
    mixed = cli.parse(["--reward=clip=1.0,jpeg=0.5", "--reward.jpeg.target", "3", "--watch", "shapes"])
    parts = {"clip": ClipReward(), "jpeg": JpegReward(target=3.0)}
    assert mixed.reward == MixedReward("clip=1.0,jpeg=0.5", "none", parts) and mixed.watch == ShapesReward()
    assert mixed.reward.weights == {"clip": 1.0, "jpeg": 0.5}
    several = cli.parse(["--watch", "shapes,jpeg", "--watch.jpeg.quality=80"]).watch
    assert several.parts == {"shapes": ShapesReward(), "jpeg": JpegReward(quality=80)}
    for number, text in enumerate(
        [
            "reward: clip=1.0,jpeg=0.5\n",
            "reward: {clip: 1.0, jpeg: 0.5}\n",
            "reward: {name: 'clip=1.0,jpeg=0.5', jpeg: {target: 4}}\n",
        ]
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        reward = cli.parse(["--config", str(file), "--reward.jpeg.quality", "90"]).reward
        assert reward.weights == {"clip": 1.0, "jpeg": 0.5}
        assert reward.parts["jpeg"] == JpegReward(target=4.0 if number == 2 else None, quality=90)


def test_a_mix_of_rewards_survives_its_yaml(tmp_path):
    config = cli.parse(["--reward", "clip,jpeg=2", "--reward.normalise", "batch", "--watch", "shapes,jpeg"])
    (tmp_path / "config.yaml").write_text(cli.dump(config))
    assert cli.parse(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("model", ["someone/stable-diffusion-3.5", "a/b"])
def test_a_watched_clip_is_the_one_that_the_preset_optimises(tmp_path, model):
    large, mine = ClipReward(model="ViT-H-14", pretrained="laion2b_s32b_b79k"), ["--model", model]
    assert cli.parse([*mine, "--reward", "jpeg", "--watch", "clip"]).watch == large
    assert cli.parse([*mine, "--watch", "jpeg,clip", "--watch.jpeg.target=3"]).watch.parts == {
        "jpeg": JpegReward(target=3.0),
        "clip": large,
    }
    own = [*mine, "--watch=clip", "--watch.model=ViT-B-32", "--watch.pretrained=openai"]
    assert cli.parse(own).watch == ClipReward(model="ViT-B-32", pretrained="openai")
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {model}\nreward: {{name: clip, model: ViT-L-14}}\nwatch: clip\n")
    config = cli.parse(["--config", str(file)])
    assert config.watch == large
    assert config.reward.model == "ViT-L-14"  # what one's own file says of the reward is of the reward
    (tmp_path / "all.yaml").write_text(cli.dump(config))
    assert cli.parse(["--config", str(tmp_path / "all.yaml")]) == config
    assert cli.parse([*mine]).watch.name == "none" and cli.parse(["--watch", "clip"]).watch == ClipReward()
    assert cli.parse(["--config", "sd3.5-medium-24gb", "--watch", "clip"]).watch == large


def test_options_follow_a_reward_into_a_mix_and_out_of_it(tmp_path):
    """The preset of SD3.5 gives the CLIP; a mix with clip in it must not fall back to another one."""
    mixed = cli.parse(["--model", "someone/stable-diffusion-3.5", "--reward", "clip=1,jpeg=0.1"]).reward
    assert mixed.parts["clip"] == ClipReward(model="ViT-H-14", pretrained="laion2b_s32b_b79k")
    assert cli.parse(["--model", "someone/stable-diffusion-3.5", "--reward", "jpeg"]).reward == JpegReward()
    file = tmp_path / "mix.yaml"
    file.write_text("reward: {name: 'clip,jpeg', normalise: batch, jpeg: {target: 4}}\n")
    assert cli.parse(["--config", str(file), "--reward", "jpeg"]).reward == JpegReward(target=4.0)
    heavier = cli.parse(["--config", str(file), "--reward", "jpeg=3,shapes=1"]).reward
    assert heavier.normalise == "batch" and heavier.parts == {"jpeg": JpegReward(target=4.0), "shapes": ShapesReward()}
    assert cli.parse(["--config", str(file), "--reward", "shapes"]).reward == ShapesReward()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward", "clip=1,jpg=2"], "unknown reward 'jpg'"),
        (["--watch", "shaped"], "unknown reward 'shaped'"),
        (["--reward", "none"], "unknown reward 'none'"),
        (["--reward", "clip=much"], "'clip=much'; write NAME=WEIGHT"),
        (["--reward", "clip,jpeg", "--reward.model", "x"], "or --reward.clip.model?"),
        (["--reward", "clip,jpeg", "--reward.jpeg.target", "x"], "reward.jpeg.target is 'x'"),
        (["--reward", "clip,jpeg", "--reward.normalise", "all"], "it must be one of none, batch"),
        (["--watch.model", "x"], "unknown option --watch.model"),
        (["--reward", "clip=0,jpeg=0"], "weighs nothing: give one a weight other than 0"),
        (["--reward_retries", "-2"], "reward_retries is -2; it must be 0 or more"),
        (["--reward_timeout", "-1"], "reward_timeout is -1.0; it must be 0 or more"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        cli.parse(argv)
    assert message in capsys.readouterr().err


def test_the_plan_names_all_and_checks_the_prompts(tmp_path):
    text = str(plan.check(cli.parse(["--reward", "clip=1,jpeg=0.5", "--watch", "shapes"])))
    assert "1 x clip score (100 x cosine, built-in CLIP); 0.5 x jpeg score (-kB" in " ".join(text.split())
    assert "watch         1 right, 0 wrong" in text
    (tmp_path / "cats.txt").write_text("a cat\na red circle\n")
    for argv in (["--reward", "shapes"], ["--watch", "shapes"], ["--reward", "clip,shapes"]):
        with pytest.raises(UserError, match="cannot judge 'a cat'"):
            plan.check(cli.parse([*argv, "--prompts", str(tmp_path / "cats.txt")]))


def test_total_by_hand():
    """1 x (1, 2, 3, 4) - 0.5 x (10, 0, 10, 0); what is watched changes nothing."""
    parts = {"one": constant([1.0, 2.0, 3.0, 4.0]), "two": constant([10.0, 0.0, 10.0, 0.0], "v")}
    scoring = Scoring(parts, {"one": 1.0, "two": -0.5}, {"one": constant([7.0, 7.0, 7.0, 9.0])})
    scores = scoring(IMAGES, PROMPTS)
    assert list(scores) == ["reward/one", "reward/two", "watch/one"]
    assert scoring.total(scores).tolist() == [-4.0, 2.0, -2.0, 4.0]
    assert scoring.means(scores) == {"reward/one": 2.5, "reward/two": 5.0, "watch/one": 7.5}
    assert scoring.unit == "1 one (u) + -0.5 two (v)"
    alone = Scoring({"one": constant([1.0], "points")})
    assert alone.unit == "points" and alone.encoder == "none"


def test_normalised_total_by_hand():
    """(0, 4) and (30, 10) are -1, 1 and 1, -1 standard deviations; against a reference with mean 1, deviation 2 ..."""
    scoring = Scoring({"a": constant([0.0]), "b": constant([0.0])}, {"a": 1.0, "b": 3.0}, normalise="batch")
    scores = {"reward/a": torch.tensor([0.0, 4.0]), "reward/b": torch.tensor([30.0, 10.0])}
    assert scoring.total(scores).tolist() == [2.0, -2.0]
    reference = {"reward/a": torch.tensor([-1.0, 3.0]), "reward/b": torch.tensor([30.0, 10.0])}
    assert scoring.total(scores, reference).tolist() == [-0.5 + 3, 1.5 - 3]
    constant_scores = {"reward/a": torch.tensor([5.0, 5.0]), "reward/b": torch.tensor([30.0, 10.0])}
    assert scoring.total(constant_scores).tolist() == [3.0, -3.0]


def test_compared_by_hand():
    scoring = Scoring({"a": constant([0.0])}, watch={"b": constant([0.0], "v")})
    prompt = torch.tensor([0, 0, 1, 1])
    before = {"reward/a": torch.tensor([1.0, 3.0, 5.0, 7.0]), "watch/b": torch.zeros(4)}
    after = {"reward/a": torch.tensor([2.0, 4.0, 8.0, 10.0]), "watch/b": torch.ones(4)}
    found = scoring.compared(before, after, prompt)
    assert found["rewards"]["a"]["difference"] == pytest.approx({"mean": 2.0, "stderr": 1.0})
    assert found["watch"]["b"]["after"]["mean"] == 1.0 and found["watch"]["b"]["unit"] == "v, none"


def fails(times: int, error: Exception):
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return torch.ones(4)

    return call, calls


def test_a_reward_that_raises_is_called_again(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(_guarded.time, "sleep", waits.append)
    call, calls = fails(2, RuntimeError("busy"))
    with pytest.warns(UserWarning, match="the reward mine failed .RuntimeError: busy.; trying again"):
        assert guarded(call, "mine", PROMPTS, 5, 2).tolist() == [1.0] * 4
    assert len(calls) == 3 and waits == [1, 2]
    call, calls = fails(9, RuntimeError("busy"))
    with (
        pytest.warns(UserWarning),
        pytest.raises(RewardError, match="mine failed 3 times for the prompts 'p', 'q', 'r' and 1 more: Runtime"),
    ):
        guarded(call, "mine", PROMPTS, 5, 2)
    for error in (TypeError("no"), UserError("no")):  # no second try mends them
        call, calls = fails(9, error)
        with pytest.raises(UserError, match="no"):
            guarded(call, "mine", PROMPTS, 5, 2)
        assert len(calls) == 1


def test_a_reward_that_hangs_is_named():
    started = time.monotonic()
    with pytest.raises(RewardError, match="mine has not returned within 0.2 s .*reward_timeout"):
        guarded(lambda: time.sleep(30), "mine", PROMPTS, 0.2, 2)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, math.nan, 1.0, math.inf]), "mine is nan for 2 of 4 images, with the prompts 'q', 's'"),
        (torch.ones(3), "shape .3,. for"),
        (torch.ones(4, 1), "shape .4, 1. for"),
        ([1.0] * 4, "gave a list"),
    ],
)
def test_scores_that_cannot_be_used(value, message):
    with pytest.raises(RewardError, match=message):
        guarded(lambda: value, "mine", PROMPTS)


def test_no_gradient_is_kept_in_the_rewards_thread():
    weight = torch.ones(4, requires_grad=True)
    for timeout in (0, 5):
        assert not guarded(lambda: weight * 2, "mine", PROMPTS, timeout).requires_grad
    seen = []
    guarded(lambda: seen.append(torch.is_grad_enabled()) or torch.ones(4), "mine", PROMPTS)
    assert seen == [False]
