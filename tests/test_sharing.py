"""What `python -m sd3_adrpo.export` makes: ComfyUI's form, the merged pipeline, the folder that is pushed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as from_original
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from test_export import SUMMARY, add_lora
from torch import Tensor

from sd3_adrpo.errors import UserError
from sd3_adrpo.export import (
    ExportError,
    __main__,
    hub,
    merge_lora,
    model_card,
    push_lora,
    read_lora,
    save_comfyui,
    save_lora,
    to_comfyui,
)

EVERY_LINEAR = [  # of SD3.5-medium
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"),
    *("norm_out.linear", "proj_out", "context_embedder", "linear_1", "linear_2"),
]


def original_checkpoint(width: int = 32, depth: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a small SD3.5-medium in the original's names and shapes, as Stability's file has them."""
    generator = torch.Generator().manual_seed(seed)
    file: dict[str, Tensor] = {"pos_embed": torch.zeros(1, 36, width)}

    def layer(name: str, rows: int, *columns: int) -> None:
        file[f"{name}.weight"] = 0.2 * torch.randn(rows, *columns, generator=generator)
        file[f"{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    def block(name: str, last: bool, attentions: int, modulation: int) -> None:
        layer(f"{name}.adaLN_modulation.1", modulation * width, width)
        for attention in ("attn", "attn2")[:attentions]:
            layer(f"{name}.{attention}.qkv", 3 * width, width)
            for norm in ("ln_q", "ln_k"):
                file[f"{name}.{attention}.{norm}.weight"] = 1 + 0.2 * torch.randn(16, generator=generator)
            if not last:
                layer(f"{name}.{attention}.proj", width, width)
        if not last:
            layer(f"{name}.mlp.fc1", 4 * width, width)
            layer(f"{name}.mlp.fc2", width, 4 * width)

    layer("x_embedder.proj", width, 16, 2, 2)
    layer("context_embedder", width, tiny.JOINT)
    for name, columns in (("t_embedder", 256), ("y_embedder", sum(tiny.WIDTHS))):
        layer(f"{name}.mlp.0", width, columns)
        layer(f"{name}.mlp.2", width, width)
    for number in range(depth):
        last, dual = number == depth - 1, number == 0
        block(f"joint_blocks.{number}.x_block", False, 1 + dual, 9 if dual else 6)
        block(f"joint_blocks.{number}.context_block", last, 1, 2 if last else 6)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    layer("final_layer.linear", 64, width)
    return file


def apply_as_comfyui(base: dict[str, Tensor], lora: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """The loader's rule for its generic keys: W + strength * alpha / rank * up @ down. No key may be left over."""
    base, left = dict(base), set(lora)
    for key in [key for key in base if key.endswith(".weight")]:
        name = "diffusion_model." + key.removesuffix(".weight")
        if f"{name}.lora_up.weight" in lora:
            down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
            change = lora[f"{name}.alpha"].item() / len(down) * (up.flatten(1) @ down.flatten(1))
            base[key] = base[key] + strength * change.reshape(base[key].shape)
            left -= {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert not left
    return base


@pytest.fixture
def trained(tmp_path) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    """A transformer from an original checkpoint, with a LoRA on every linear layer saved in tmp_path/lora; the
    checkpoint."""
    checkpoint = original_checkpoint()
    transformer = tiny.transformer()
    weights = {**from_original(dict(checkpoint)), "pos_embed.pos_embed": transformer.pos_embed.pos_embed}
    transformer.load_state_dict(weights)
    add_lora(transformer, targets=EVERY_LINEAR)
    save_lora(transformer, tmp_path / "lora")
    return transformer, checkpoint


def merged_by_peft(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    transformer.fuse_lora()
    state = {key.replace(".base_layer", ""): value for key, value in transformer.state_dict().items()}
    return {key: value for key, value in state.items() if ".lora_" not in key}


def test_comfyui_weights_equal_the_merged_model(trained, tmp_path):
    transformer, checkpoint = trained
    file = load_file(save_comfyui(tmp_path / "lora", tmp_path / "for_comfyui.safetensors"))
    changed = from_original(apply_as_comfyui(checkpoint, file))
    before, after = from_original(dict(checkpoint)), merged_by_peft(transformer)
    linear = [key for key, value in after.items() if value.dim() == 2]
    assert len(linear) == 36  # every one has been changed, by what was trained
    for key in linear:
        assert (after[key] - before[key]).abs().max() > 1e-2
        torch.testing.assert_close(changed[key], after[key], atol=1e-5, rtol=0)
    half = from_original(apply_as_comfyui(checkpoint, file, 0.5))["transformer_blocks.0.attn.to_k.weight"]
    key = "transformer_blocks.0.attn.to_k.weight"
    torch.testing.assert_close(half, (before[key] + after[key]) / 2, atol=1e-5, rtol=0)


def test_comfyui_names_and_missing_parts():
    down, up = torch.ones(2, 4), torch.arange(8.0).view(4, 2)
    file = to_comfyui({"transformer_blocks.3.attn.add_k_proj": (down, up), "norm_out.linear": (down, up)})
    joint, final = (
        "diffusion_model.joint_blocks.3.context_block.attn.qkv",
        "diffusion_model.final_layer.adaLN_modulation.1",
    )
    assert sorted(file) == [
        *(f"{final}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")),
        *(f"{joint}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")),
    ]
    assert torch.equal(file[f"{joint}.lora_up.weight"], torch.cat([torch.zeros(4, 2), up, torch.zeros(4, 2)]))
    assert torch.equal(file[f"{final}.lora_up.weight"], torch.tensor([[4.0, 5], [6, 7], [0, 1], [2, 3]]))
    assert file[f"{joint}.alpha"] == 2
    with pytest.raises(ExportError, match="attn.to_x has no counterpart"):
        to_comfyui({"transformer_blocks.3.attn.to_x": (down, up)})


def test_comfyui_file_is_refused_or_left_alone(trained, tmp_path):
    with pytest.raises(ExportError, match="must end in .safetensors"):
        save_comfyui(tmp_path / "lora", tmp_path / "comfyui.pt")
    with pytest.raises(ExportError, match="exists already"):
        save_comfyui(tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="no LoRA at"):
        save_comfyui(tmp_path / "elsewhere", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_read_lora_takes_alpha_from_the_metadata(tmp_path):
    path = tmp_path / "other.safetensors"
    weights = {f"transformer.proj_out.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}

    def save(**options) -> None:
        save_file(
            weights, path, {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in options.items()})}
        )

    save(r=2, lora_alpha=3)
    assert torch.equal(read_lora(path)["proj_out"][1], torch.full((2, 2), 1.5))
    save_file(weights, path)
    assert torch.equal(read_lora(path)["proj_out"][1], torch.ones(2, 2))  # as diffusers reads such a file
    save(r=2, lora_alpha=3, use_rslora=True)
    with pytest.raises(ExportError, match="use_rslora"):
        read_lora(path)
    save_file({**weights, "text_encoder.layer.lora_A.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ExportError, match="not a plain LoRA of the transformer: see text_encoder.layer"):
        read_lora(path)


@pytest.fixture
def lora_of_tiny(tiny_sd35, tmp_path):
    transformer = SD3Transformer2DModel.from_pretrained(tiny_sd35 / "transformer")
    add_lora(transformer)
    return save_lora(transformer, tmp_path / "run" / "lora")


def latents(pipeline: StableDiffusion3Pipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "guidance_scale": 2.0, "output_type": "latent"}
    return pipeline(tiny.PROMPTS, generator=generator, max_sequence_length=tiny.SEQUENCE, **options).images


def test_merged_pipeline_draws_as_base_with_lora(lora_of_tiny, tiny_sd35, tmp_path):
    (tmp_path / "base").mkdir()
    for part in tiny_sd35.iterdir():
        (tmp_path / "base" / part.name).symlink_to(part)  # as the hub's cache has it
    (tmp_path / "base" / "single_file.safetensors").write_bytes(b"x")  # as the hub's repositories have it
    folder = merge_lora(lora_of_tiny, str(tmp_path / "base"), tmp_path / "merged")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    base = latents(pipeline)
    pipeline.load_lora_weights(lora_of_tiny.parent)
    with_lora = latents(pipeline)
    assert (with_lora - base).abs().max() > 1e-2
    torch.testing.assert_close(latents(StableDiffusion3Pipeline.from_pretrained(folder)), with_lora, atol=1e-5, rtol=0)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "plain.txt").touch()
    assert modes == {(tmp_path / "plain.txt").stat().st_mode & 0o777}  # as any new file of the user
    made = {path.name for path in folder.iterdir()}
    assert made == {path.name for path in tiny_sd35.iterdir()} | {"README.md"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing partial stays
    assert (folder / "text_encoder" / "model.safetensors").read_bytes() == (
        tiny_sd35 / "text_encoder" / "model.safetensors"
    ).read_bytes()


def test_merge_stores_the_type_asked_for(lora_of_tiny, tiny_sd35, tmp_path):
    folder = merge_lora(lora_of_tiny, str(tiny_sd35), tmp_path / "merged", torch.bfloat16)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    down, up = read_lora(lora_of_tiny)["proj_out"]
    base = load_file(tiny_sd35 / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"]
    assert torch.equal(stored["proj_out.weight"], (base + up @ down).bfloat16())  # rounded once, after the sum


def test_merge_refuses(lora_of_tiny, tiny_sd35, tiny_sd3, tmp_path):
    with pytest.raises(UserError, match="not an empty folder"):
        merge_lora(lora_of_tiny, str(tiny_sd35), lora_of_tiny.parent)
    with pytest.raises(ExportError, match="another model"):
        merge_lora(lora_of_tiny, str(tiny_sd3), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def run(lora_of_tiny, tiny_sd35):
    """A run's folder, as far as sharing looks at it."""
    folder = lora_of_tiny.parent.parent
    (folder / "config.yaml").write_text(f"model: {tiny_sd35}\n")
    (folder / "before_after.png").write_bytes(b"picture")
    card = model_card(SUMMARY, base_model="owner/model", reward="CLIP", prompts="p.csv")
    (lora_of_tiny.parent / "README.md").write_text(card)
    return folder


FORBIDDEN = SimpleNamespace(status_code=403, headers={}, request=None)  # of an answer, what is looked at


class Hub:
    """Stands in for HfApi: keeps what would be uploaded."""

    made, files = None, None

    def create_repo(self, name, *, private, exist_ok):
        Hub.made = (name, private, exist_ok)
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Hub.files = {path.name: path.read_bytes() for path in hub.Path(folder_path).iterdir()}


def test_push_sends_weights_card_and_picture(run, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Hub)
    path = run / "lora" / "pytorch_lora_weights.safetensors"
    assert push_lora(path, "me/mine", private=True) == "https://hub/me/mine"
    assert Hub.made == ("me/mine", True, True)
    assert Hub.files.keys() == {"README.md", "before_after.png", "pytorch_lora_weights.safetensors"}
    assert Hub.files["pytorch_lora_weights.safetensors"] == path.read_bytes()
    card = Hub.files["README.md"].decode()
    assert 'pipeline.load_lora_weights("me/mine")' in card and "(before_after.png)" in card
    assert "| reward | 27 | 30.5 | +3.5 ± 0.2 |" in card
    (run / "lora" / "README.md").unlink()
    with pytest.raises(ExportError, match="README.md is missing"):
        push_lora(path, "me/mine")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.LocalTokenNotFoundError("no token"), "not logged in"),
        (hub_errors.HFValidationError("bad name"), "no name of a repository"),
        (hub_errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (hub_errors.HTTPError("no route"), "cannot be reached"),
        (hub_errors.HfHubHTTPError("Forbidden", response=FORBIDDEN), "refused me/mine: run `hf auth login`.*Forbidden"),
    ],
)
def test_push_explains_failures(run, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError, match=message):
        push_lora(run / "lora" / "pytorch_lora_weights.safetensors", "me/mine")


def test_program_on_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", Hub)
    loras = tmp_path / "loras"
    loras.mkdir()
    options = ["--comfyui", str(loras), "--merge", str(tmp_path / "merged"), "--push", "me/mine"]
    assert __main__.main([str(run), *options]) == 0
    assert (loras / "run.safetensors").is_file() and "run.safetensors" in Hub.files
    assert (tmp_path / "merged" / "model_index.json").is_file()  # the base is the run's own
    assert "pushed: https://hub/me/mine" in capsys.readouterr().out
    assert __main__.main([str(run), "--comfyui", str(loras)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_program_without_a_task_or_a_base(lora_of_tiny, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(lora_of_tiny)])
    assert stop.value.code == 2 and "nothing to do" in capsys.readouterr().err
    assert __main__.main([str(lora_of_tiny), "--merge", str(tmp_path / "merged")]) == 1
    assert "say --model M" in capsys.readouterr().err
