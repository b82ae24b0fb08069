"""The report: its numbers, its size, and what it does in a real browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sd3_adrpo.bootstrap import Ratio, interval
from sd3_adrpo.report import charts, page, pictures, sources, tables

ROOT = Path(__file__).parent.parent
EVIL = '</script><script>window.hacked = 1</script><img src="http://nowhere.invalid/x" onerror="window.hacked = 1">'
PROMPTS = [("a red circle", "colours"), ("two blue squares", "counting"), (EVIL, "colours"), ("a cat", None)]
REWARD = {"before": [10, 12, 20, 22, 30, 32, 40, 42], "after": [14, 20, 21, 15, 30, 33, 41, 43]}  # two images a prompt


def _run(folder: Path, accuracy: bool = True, after: bool = True, **summary) -> Path:
    """A finished run's folder: gains of +6, -3, +0.5 and +1 on its four prompts."""
    samples = {"prompts": [p for p, _ in PROMPTS], "categories": [c for _, c in PROMPTS], "images_per_prompt": 2}
    right = {"before": [0, 0, 1, 1, 0, 0, 1, 1], "after": [1, 1, 1, 0, 0, 0, 1, 1]}
    for phase in ("before", "after"):
        values = {"reward": REWARD[phase], "accuracy": right[phase] if accuracy else [None] * 8}
        values |= {"clip_diversity": [0.5, 0.6, 0.7, 0.6 if phase == "before" else 0.8]}
        values |= {"w2_drift": [0.0] * 8 if phase == "before" else [0.001] * 8}
        samples[phase] = values if after or phase == "before" else None
        (folder / "samples" / phase).mkdir(parents=True)
        for number in range(8):
            colour = (200, 40 * (phase == "after"), 20 * number)
            image = Image.new("RGB", (64, 64), colour)
            image.save(folder / "samples" / phase / f"{number // 2:04}-{number % 2:02}.webp", lossless=True)
    (folder / "samples" / "samples.json").write_text(json.dumps(samples))
    means = {
        phase: samples[phase] and {name: _mean(values) for name, values in samples[phase].items()}
        for phase in ("before", "after")
    }
    result = {"model": "shapes", "reward": "100 x cosine, shapes", "epochs": 2, **means, **summary}
    (folder / "summary.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text("model: shapes # <b>not bold</b>\n")
    log = [{"kind": "epoch", "epoch": epoch, "reward": 25 + epoch, "w2": 0.001 * epoch} for epoch in (0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log) + '{"cut')
    return folder


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


@pytest.fixture
def command():
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "eval" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_headline_by_hand(tmp_path):
    [source] = sources.load([_run(tmp_path / "run")])
    rows = {row["title"]: row["cells"][0] for row in tables.headline([source])}
    assert list(rows) == ["Reward", "Accuracy", "CLIP diversity", "Drift"]
    assert (rows["Reward"]["before"], rows["Reward"]["after"]) == ("26.00", "27.12")
    assert rows["Reward"]["difference"] == "+1.12"  # (4 + 8 + 1 - 7 + 0 + 1 + 1 + 1) / 8
    expected = interval(Ratio.of(REWARD["after"], 4), Ratio.of(REWARD["before"], 4))
    assert rows["Reward"]["interval"] == f"{expected.low:+.2f} to {expected.high:+.2f}".replace("-", "−")
    assert rows["Reward"]["verdict"] == "" and rows["Drift"]["verdict"] == ""  # drift is neither better nor worse
    assert rows["Accuracy"]["difference"] == "+12.5 pp"
    colours, counting = tables.categories(source)
    assert (colours["title"], colours["prompts"], counting["title"]) == ("colours", 2, "counting")
    assert colours["cells"][0]["difference"] == "+3.25" and counting["cells"][0]["difference"] == "−3.00"


def test_optional_metrics_scores_and_distances(tmp_path):
    score = {"unit": "kB", "before": {"mean": 1.5, "stderr": 0.1}, "after": {"mean": 1.25, "stderr": 0.1}}
    score["difference"] = {"mean": -0.25, "stderr": 0.05}
    sets = {
        "features": "a CLIP",
        "reference": "8 images",
        "before": {"recall": 0.5},
        "after": {"recall": 0.75, "cmmd": 2},
    }
    folder = _run(tmp_path / "run", watch={"jpeg": score}, rewards={"clip": score}, distances=sets)
    summary, samples = (json.loads((folder / name).read_text()) for name in ("summary.json", "samples/samples.json"))
    for phase, values in (("before", [1.0, 2.0, 1.5, 1.5]), ("after", [2.0, 2.0, 2.0, 2.0])):
        summary[phase]["vendi"], samples[phase]["vendi"] = sum(values) / 4, values
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples" / "samples.json").write_text(json.dumps(samples))
    found = sources.load([folder, _run(tmp_path / "other")])
    rows = {row["title"]: row for row in tables.headline(found)}
    assert rows["Vendi score"]["note"].endswith("n = 2 images each")
    assert rows["Vendi score"]["cells"][0]["difference"] == "+0.500" and rows["Vendi score"]["cells"][1] is None
    watched = rows["Watched: jpeg"]["cells"][0]
    assert (watched["before"], watched["after"], watched["difference"]) == ("1.500", "1.250", "−0.250")
    assert "0.050 standard error" in watched["interval"] and "Part: clip" not in rows  # the only part is the reward
    shown = tables.distances(found)
    assert shown["columns"] == [(0, "base"), (0, "LoRA")]
    assert {row["title"]: row["cells"] for row in shown["rows"]} == {
        "CMMD": ["–", "2.000"],
        "Recall": ["50.0 %", "75.0 %"],
    }
    text = page.render(found)
    assert "against 8 images, on features of a CLIP:" in text and "<h3>Distances of sets</h3>" in text
    assert "<h3>Distances of sets</h3>" not in page.render(found[1:])


def test_rewards_of_other_units_have_charts_of_their_own(tmp_path):
    clip, other = _run(tmp_path / "clip"), _run(tmp_path / "other")
    jpeg = _run(tmp_path / "jpeg", reward="-kB, JPEG of quality 95")
    others = ["Accuracy", "CLIP diversity", "Drift"]
    same, mixed = sources.load([clip, other]), sources.load([clip, jpeg, other])
    assert [chart["title"] for chart in charts.curves(same)] == ["Reward", *others]
    found = charts.curves(mixed)
    titles = ["Reward, 100 x cosine, shapes", "Reward, -kB, JPEG of quality 95", *others]
    assert [chart["title"] for chart in found] == titles
    assert "line s1" in found[1]["svg"] and "line s1" not in found[0]["svg"]  # the second run's colour
    assert "line s0" in found[0]["svg"] and "line s2" in found[0]["svg"]
    titles = [f"Reward against diversity, {unit}" for unit in ("100 x cosine, shapes", "-kB, JPEG of quality 95")]
    assert [chart["title"] for chart in charts.reward_diversity(mixed)] == titles
    assert len(charts.reward_diversity(same)) == 1


def test_what_was_measured_on_the_way_is_a_point_of_the_curve(tmp_path):
    folder = _run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"kind": "evaluation", "epoch": 1, "reward": 31.0, "accuracy": None}) + "\n")
    [source] = sources.load([folder])
    assert charts._measured(source, "reward") == [(0, 26.0), (1, 31.0), (2, 27.125)]
    assert charts._measured(source, "accuracy") == [(0, 0.5), (2, 0.625)]
    assert "test prompts, epoch 1: 31.00" in charts.curves([source])[0]["svg"]


def test_drift_by_noise_level(tmp_path):
    values = [{"mean": 0.001, "stderr": None}, {"mean": 0.003, "stderr": 0.0005}]
    found = sources.load([_run(tmp_path / "run", by_sigma={"sigmas": [0.9, 0.1], "w2_drift": values})])
    [chart] = charts.by_sigma(found)
    frame = charts.Frame((0.0, 1.0), charts._range([0.001, 0.003 - 0.00098, 0.003 + 0.00098]))
    assert f'd="M{frame.at((0.1, 0.003))}L{frame.at((0.9, 0.001))}"' in chart["svg"]  # from little noise to much
    assert "σ 0.9: 0.0010" in chart["svg"] and chart["title"] in page.render(found)
    assert charts.by_sigma(sources.load([_run(tmp_path / "older")])) == []


def test_shown_images_are_at_even_steps_of_the_gain(tmp_path):
    gains = [[3.0, -1.0, 0.0, 7.0, 2.0]]
    assert pictures._shown(gains, 3) == [1, 4, 3]  # least, median, greatest
    assert pictures._shown(gains, 8) == [1, 2, 4, 0, 3]
    assert pictures._shown(gains, 1) == [4]
    many = pictures.gallery(sources.load([_run(tmp_path / "a"), _run(tmp_path / "b")]))
    assert len(many["prompts"]) == 4 and all(len(prompt["runs"]) == 2 for prompt in many["prompts"])
    assert len(many["images"]) == 16  # equal images of two runs are stored once


def test_large_images_are_reduced_until_they_fit(tmp_path):
    folder = _run(tmp_path / "run")
    for path in (folder / "samples").rglob("*.webp"):
        Image.effect_noise((640, 640), 80).convert("RGB").save(path, quality=95)
    loaded = sources.load([folder])
    assert sum(map(len, pictures.gallery(loaded, budget=150_000)["images"])) <= 150_000
    assert max(len(run["items"]) for p in pictures.gallery(loaded, most=1)["prompts"] for run in p["runs"]) == 1


def test_folders_without_some_of_it(tmp_path, command, capsys):
    bare = _run(tmp_path / "bare", accuracy=False, difference={"reward": {"mean": 1.125, "stderr": 0.5}})
    shutil.rmtree(bare / "samples")
    (bare / "metrics.jsonl").unlink()
    summary = json.loads((bare / "summary.json").read_text())
    for phase in ("before", "after"):
        summary[phase] = {"reward": summary[phase]["reward"], "accuracy": None}
    (bare / "summary.json").write_text(json.dumps(summary))
    assert command([str(bare)]) == 0
    assert "no pictures of" in capsys.readouterr().out
    assert "± 0.50 standard error" in (bare / "report.html").read_text()
    base = _run(tmp_path / "base", accuracy=False, after=False)
    (base / "summary.json").rename(base / "evaluation.json")
    assert command([str(base), str(bare), f"--output={tmp_path / 'both.html'}"]) == 0
    assert (tmp_path / "both.html").exists() and not (base / "report.html").exists()
    assert command([str(tmp_path)]) == 1
    assert "has neither a summary.json nor an evaluation.json" in capsys.readouterr().err
    assert command([str(base), f"--output={tmp_path}"]) == 1


def test_nothing_in_a_prompt_or_config_is_markup(tmp_path):
    text = page.render(sources.load([_run(tmp_path / "run", objective="<i>x</i>")]))
    assert "<script>window" not in text and "<img" not in text and text.count("<script") == 2
    assert "&lt;b&gt;not bold" in text and "&lt;i&gt;x" in text
    assert "http://" not in text.replace("http://nowhere.invalid", "")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        program = program or (Path(started.chromium.executable_path).exists() and started.chromium.executable_path)
        if not program:
            pytest.skip("no Chromium: install Debian's chromium, or run `playwright install chromium`")
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens runs as a page from disk; at the end nothing was said on the console and nothing left the page."""
    troubles, pages = [], []

    def start(*folders: Path, width: int = 1280):
        path = tmp_path / "page.html"
        path.write_text(page.render(sources.load(folders)), encoding="utf-8")
        opened = browser.new_page(viewport={"width": width, "height": 900})
        opened.on("console", lambda message: troubles.append(message.text))
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        outside = lambda request: not request.url.startswith(("data:", path.as_uri()))  # noqa: E731
        opened.on("request", lambda request: troubles.append(request.url) if outside(request) else None)
        opened.goto(path.as_uri())
        pages.append(opened)
        return opened

    yield start
    for opened in pages:
        opened.wait_for_timeout(50)
        assert opened.evaluate("window.hacked") is None
        opened.close()
    assert troubles == []


def _titles(opened) -> list[str]:
    return opened.locator(".card h3").all_text_contents()


def test_slider_and_flip(open_page, tmp_path):
    opened = open_page(_run(tmp_path / "run"))
    stage = opened.locator(".stage").first
    after = stage.locator("img.after")
    assert after.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 50%)"
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    opened.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    cut = float(after.evaluate("e => getComputedStyle(e).clipPath").removeprefix("inset(0px 0px 0px ")[:-2])
    assert 20 < cut < 30
    stage.locator("input").press("ArrowRight")
    assert after.evaluate("e => getComputedStyle(e).clipPath") != f"inset(0px 0px 0px {cut:g}%)"
    opened.get_by_text("Flip", exact=True).click()
    assert after.evaluate("e => getComputedStyle(e).opacity") == "0"
    stage.locator("button").click()
    assert after.evaluate("e => getComputedStyle(e).opacity") == "1"
    opened.get_by_text("Flip all").click()
    assert opened.locator(".stage.turned").count() == 4
    picked = stage.locator("img.before").get_attribute("src")
    opened.locator(".picks button[aria-pressed=false]").first.click()
    assert stage.locator("img.before").get_attribute("src") != picked


def test_filter_and_sort(open_page, tmp_path):
    opened = open_page(_run(tmp_path / "run"))
    assert _titles(opened) == [prompt for prompt, _ in PROMPTS]
    assert not opened.locator("#more").is_visible()  # all are there
    opened.select_option("#sort", "loss")
    assert _titles(opened) == ["two blue squares", EVIL, "a cat", "a red circle"]
    opened.select_option("#sort", "gain")
    assert _titles(opened)[0] == "a red circle"
    values = opened.locator(".values").first.locator("span").all_text_contents()
    assert values == ["reward 11.00 +6.00", "right 0 → 2 of 2 "]
    opened.select_option("#category", "colours")
    assert _titles(opened) == ["a red circle", EVIL]
    opened.select_option("#category", "")
    opened.select_option("#outcome", "wronged")
    assert _titles(opened) == ["two blue squares"]
    assert opened.locator("#count").text_content() == "1 of 4 prompts"
    opened.fill("#search", "nothing like it")
    assert _titles(opened) == []
    opened.get_by_text("Show all").click()
    assert len(_titles(opened)) == 4


@pytest.mark.parametrize("width", [390, 1280])
def test_pictures_come_first(open_page, tmp_path, width):
    opened = open_page(_run(tmp_path / "run"), width=width)
    image, table = (opened.locator(name).first.bounding_box() for name in (".stage", "table"))
    assert image["y"] + image["height"] / 2 < 900  # on the first screen
    assert image["y"] < table["y"]
    assert len(_titles(opened)) == (4 if width == 1280 else 2)
    if width == 390:
        opened.get_by_text("Show 2 more").click()
        assert len(_titles(opened)) == 4 and not opened.locator("#more").is_visible()


def test_prompts_without_a_value_are_sorted_last(open_page, tmp_path):
    opened = open_page(_run(tmp_path / "run"), _run(tmp_path / "other", accuracy=False))
    opened.select_option("#metric", "accuracy")
    for order in ("loss", "gain"):
        opened.select_option("#sort", order)
        opened.select_option("#run", "1")
        assert len(_titles(opened)) == 4  # none has a value, none is hidden
    opened.select_option("#run", "0")
    assert _titles(opened)[0] == "a red circle"


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_screen(open_page, tmp_path, width):
    runs = [_run(tmp_path / name) for name in ("one", "two", "three")]
    runs.append(_run(tmp_path / "base", accuracy=False, after=False))
    opened = open_page(*runs, width=width)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert opened.locator(".card").first.locator(".stage").count() == 4
    opened.select_option("#run", "3")
    opened.select_option("#sort", "gain")  # of a base alone: by its values
    assert _titles(opened)[0] == "a cat"
