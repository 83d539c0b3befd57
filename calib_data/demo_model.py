"""The demo VLM before training: tokenizer, processor and `LlavaForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from qvlm_calib_data.scenes import (
    BAR_LETTERS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZE,
    TASKS,
    WORDS,
    ask,
    make_scene,
    seed_at,
)

VOCAB = 640
PATCH = 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% else %}SYSTEM: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on rendered questions; every digit is a token of its own.

    Its result is kept in `demo_tokenizer.json`: weights mean nothing under another vocabulary, so
    a change of the questions must not change it.
    """
    corpus = ["USER: ASSISTANT: SYSTEM: "]
    for index in range(2000):
        scene = make_scene(seed_at("train", index))
        rng = np.random.default_rng(index)
        for task in TASKS:
            question = ask(scene, task, rng)
            corpus.append(f" {question.prompt} ASSISTANT: {question.answer}")
            corpus.append(question.prompt)
    for word in (*WORDS, *SHAPES, *COLOURS, *PLACES, *BAR_LETTERS, "equal"):
        corpus.extend([f" {word}"] * 50)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return core


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer, from the kept vocabulary."""
    core = Tokenizer.from_file(str(Path(__file__).with_name("demo_tokenizer.json")))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: images are 128 x 128 already, so it only rescales and normalises."""
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, layers: int = 8, hidden: int = 256
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; `hidden` and `layers` only shrink it for tests."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4 if layers > 2 else layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=hidden,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model


def write_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write a whole Hugging Face directory with fp16 weights; the model itself stays fp32."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit into float16")
    half = type(model)(model.config).half()
    half.load_state_dict(state)
    half.generation_config = model.generation_config
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)
