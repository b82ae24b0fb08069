"""Optional metrics against closed forms: identical images, orthogonal embeddings, Gaussians of known distance."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from sd3_adrpo import optional_metrics
from sd3_adrpo.errors import UserError
from sd3_adrpo.geneval import check_geneval, write_geneval
from sd3_adrpo.metrics import compare_velocities
from sd3_adrpo.metrics.dino import MEAN, STD, load_dino
from sd3_adrpo.metrics.distances import cmmd, fid, kid, precision_recall
from sd3_adrpo.metrics.lpips_diversity import lpips_diversity
from sd3_adrpo.metrics.vendi import vendi
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.types import Condition


def test_vendi_counts_different_images():
    rows = torch.cat([torch.ones(4, 8), 3 * torch.eye(8)[:4], torch.eye(8)[[0, 0, 1, 1]], torch.eye(8)[:1]])
    prompt = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3])
    found = vendi(rows, prompt)
    assert found[:3].tolist() == pytest.approx([1.0, 4.0, 2.0]) and math.isnan(found[3])


def test_frechet_distance_of_gaussians():
    def exact(mean: list[float], spread: list[float]) -> torch.Tensor:
        """Points whose mean and covariance are exactly these."""
        points = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.double) * math.sqrt(1.5)
        return points * torch.tensor(spread) + torch.tensor(mean)

    x, y = exact([0, 0], [1, 2]), exact([3, 4], [3, 1])
    assert torch.cov(x.T).diagonal().tolist() == pytest.approx([1, 4])
    assert fid(x, y) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)  # |m - m'|^2 + sum of (s - s')^2
    assert fid(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_by_hand():
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.5]])  # unit vectors at distance sqrt(2)
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    assert cmmd(x, x) == 0.0


def test_kid_by_hand_and_without_bias():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    # kernels (a.b / 2 + 1)^3: within x 1, within y 8, across 1.5^3
    assert kid(x, y) == pytest.approx(1 + 8 - 2 * 1.5**3)
    generator = torch.Generator().manual_seed(0)
    same = [kid(*torch.randn(2, 20, 4, generator=generator)) for _ in range(200)]
    assert abs(sum(same) / 200) < 3 * torch.tensor(same).std().item() / math.sqrt(200)


def test_precision_and_recall_of_two_clusters():
    line = torch.arange(8.0)[:, None]
    both = torch.cat([line, line + 1000])
    assert precision_recall(line, both) == (1.0, 0.5)  # all it draws is real, half of what is real is drawn
    assert precision_recall(both, line) == (0.5, 1.0)
    assert precision_recall(line, line + 500) == (0.0, 0.0)


def test_lpips_is_averaged_over_the_pairs_of_a_prompt():
    images = torch.tensor([0, 51, 255, 0, 0, 9], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    distance = lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)  # noqa: E731
    found = lpips_diversity(images, torch.tensor([0, 0, 0, 1, 1, 2]), distance)
    assert found[:2].tolist() == pytest.approx([2 * (0.2 + 0.8 + 1.0) / 3, 0.0], abs=1e-6) and math.isnan(found[2])


def test_dino_from_a_folder_with_the_published_preprocessing(tmp_path):
    from torchvision.transforms import v2
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    dino = load_dino(str(tmp_path))
    images = torch.randint(256, (2, 3, 300, 400), dtype=torch.uint8)
    steps = [v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    expected = torch.stack([v2.Compose(steps)(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert (dino.preprocess(images) - expected).abs().mean() < 0.005  # PIL's rounding
    with torch.no_grad():
        tokens = model(dino.preprocess(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(dino.embed_images(images), tokens)
    with pytest.raises(UserError, match="does not load"):
        load_dino(str(tmp_path / "nowhere"))


def test_velocities_by_sigma():
    from test_metrics import _Policy

    condition = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    drift, ratio = compare_velocities(
        _Policy(), torch.zeros(2, 4, 8, 8), condition, torch.tensor([0, 0]), [1, 2], (1.0, 0.5)
    )
    # v = 3 noisy, v_ref = 2 noisy, noisy = sigma noise: drift sigma^2 |noise|^2, with the noise of each sigma its own
    torch.testing.assert_close(ratio, torch.full((2, 2), 1.5))
    assert drift[:, 0].tolist() == pytest.approx([1, 1], abs=0.4) and drift[:, 1].tolist() == pytest.approx(
        [0.25] * 2, abs=0.1
    )


def test_names_and_what_they_need():
    assert (
        optional_metrics.parse_names("vendi, cmmd,") == ("vendi", "cmmd") and optional_metrics.parse_names(None) == ()
    )
    with pytest.raises(UserError, match="'vendy' is not known; allowed are vendi"):
        optional_metrics.parse_names("vendy")
    with pytest.raises(UserError, match="give a CLIP"):
        optional_metrics.by_prompt(["vendi"], torch.zeros(2, 3, 4, 4), torch.tensor([0, 0]), None, "", "cpu")
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert optional_metrics.set_distances(["recall", "cmmd"], x, x) == {"cmmd": 0.0, "recall": 1.0}


def test_geneval_layout(tmp_path):
    records = [{"tag": "counting", "prompt": "two cats", "include": []}, {"tag": "colors", "prompt": "a red cat"}]
    prompts = [Prompt(record["prompt"], record["tag"], None, record) for record in records]
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    check_geneval(prompts, tmp_path / "out")
    write_geneval(prompts, images, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == records[1]
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert files == [f"0000{row}/samples/000{index}.png" for row in (0, 1) for index in (0, 1)]
    assert Image.open(tmp_path / "out" / "00001" / "samples" / "0000.png").getpixel((0, 0)) == (2, 2, 2)
    with pytest.raises(UserError, match="is not empty"):
        check_geneval(prompts, tmp_path / "out")
    with pytest.raises(UserError, match="no GenEval record"):
        check_geneval([Prompt("a cat")], tmp_path / "new")
