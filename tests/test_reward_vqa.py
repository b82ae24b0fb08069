"""The vqa reward on a small random Qwen2-VL with a processor of the true form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, images, pil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from sd3_adrpo.errors import UserError
from sd3_adrpo.rewards.vqa import VqaReward

SPECIAL = "<|pad|> <|unk|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
WORDS = "Yes No user assistant Does this figure show a red cube two blue balls left of caf Please answer or".split()
TEMPLATE = (  # Qwen's form
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, entries = tmp_path_factory.mktemp("qwen"), SPECIAL + WORDS
    vocab = {word: index for index, word in enumerate(entries)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", additional_special_tokens=SPECIAL[2:]
    )
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 64, "longest_edge": 1024}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(size=pixels, **sizes),
        tokenizer,
        Qwen2VLVideoProcessor(size=pixels, **sizes),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(path)
    text = {"vocab_size": len(entries), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    tokens = {f"{name}_token_id": vocab[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": vocab[f"<|{name}_pad|>"] for name in ("image", "video")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
        ).save_pretrained(path)
    return path


def test_vqa_is_the_probability_that_generate_would_give_yes(qwen):
    """One image at a time on PIL images, by generate's own scores, as VQAScore has it; ours in one padded batch."""
    scorer, batch = VqaReward(model=str(qwen)).load(), images(24)
    model = AutoModelForImageTextToText.from_pretrained(qwen).eval()
    processor, expected = AutoProcessor.from_pretrained(qwen), []
    for image, prompt in zip(pil(batch), PROMPTS, strict=True):
        question = f'Does this figure show "{prompt.text}"? Please answer Yes or No.'
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        expected.append(output.scores[0][0].softmax(-1)[len(SPECIAL)].item())  # "Yes" is the first word
    rewards = scorer(batch, PROMPTS)
    assert (rewards - torch.tensor(expected)).abs().max() < 1e-5
    assert rewards.unique().numel() == 3 and 0 < rewards.min() and rewards.max() < 1
    assert scorer.unit == 'probability of the answer "Yes"' and not scorer.model.training


def test_the_answer_is_one_token_that_the_model_knows(qwen):
    assert VqaReward(model=str(qwen), answer="No").load().token == len(SPECIAL) + 1
    for answer in ("Yes No", "Perhaps"):
        with pytest.raises(UserError, match=f"reward.answer is '{answer}'.*single one"):
            VqaReward(model=str(qwen), answer=answer).load()


def test_unusable_options_and_models_are_refused():
    with pytest.raises(ValueError, match="must hold {prompt}"):
        VqaReward(question="Is it good?")
    with pytest.raises(UserError, match="hf download Qwen/Qwen2-VL-2B-Instruct"):
        VqaReward().load()
