"""Proves that rendered prompts equal transformers' apply_chat_template on templates of several
families, that the sandbox holds, and how images are matched to parts:
python -m pytest tests/runtime/test_chat.py
"""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvlm_runtime.chat import ChatTemplate, chat
from qvlm_runtime.errors import PromptError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

LLAVA = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""  # noqa: E501 - as published
CHATML = """{% set count = namespace(value=0) %}
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' or 'image' in content %}
                {%- set count.value = count.value + 1 %}
                {{- 'Picture ' ~ count.value ~ ': <image>' }}
            {%- elif 'text' in content %}{{- content['text'] }}{% else %}{% continue %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
HELPERS = """{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}
    {% if messages | length > 3 %}
        {{ raise_exception('at most three turns') }}
    {% endif %}
{{ eos_token }}{{ strftime_now('%Y') | length }}{{ unknown_token }}{{ '<&>"é' | tojson }}"""
STRICT = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"""
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "helpers": HELPERS}

TALK = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": 'What\'s "this" <b>é</b>?'}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A door."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And\nhere?"}, {"type": "image"}, {"type": "image"}],
    },
]


def compiled(tmp_path: Path, source: str) -> ChatTemplate:
    path = tmp_path / "chat_template.jinja"
    path.write_text(source, encoding="utf-8")
    return ChatTemplate(path, TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equal_to_transformers(
    tmp_path: Path, name: str, turns: int, add_generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[TALK[:turns]],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        **TOKENS,
    )
    talk = chat(TALK[:turns], [f"{i}.png" for i in range(1 if turns < 3 else 3)])
    assert talk.messages == TALK[:turns]
    got = compiled(tmp_path, TEMPLATES[name]).render(talk.messages, add_generation_prompt)
    assert got == expected[0]


def test_a_refusal_of_the_template_is_a_prompt_error(tmp_path: Path) -> None:
    talk = chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(PromptError, match="roles must alternate"):
        compiled(tmp_path, STRICT).render(talk.messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ ('%s' | attr('format'))(1).__class__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__.__mro__ }}",
    ],
)
def test_the_sandbox_holds(tmp_path: Path, attack: str) -> None:
    talk = chat("hello")
    try:
        text = compiled(tmp_path, attack).render(talk.messages)
    except PromptError:
        return
    assert text == "", "an unsafe attribute is undefined, which renders as nothing"


def test_a_string_is_one_user_message_with_an_image_part_per_image() -> None:
    talk = chat("What?", ["a.png", "b.png"])
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    assert talk.messages == [{"role": "user", "content": [image, image, text]}]
    assert talk.images == ["a.png", "b.png"]
    assert chat("What?").messages == [{"role": "user", "content": [text]}]


def test_images_inside_parts_and_beside_them_keep_the_order_of_the_parts() -> None:
    own = Image.new("RGB", (1, 1))
    parts = [
        {"type": "image", "image": own},
        {"type": "image"},
        {"type": "image", "path": "p.png"},
        {"type": "image", "url": "u.png"},
        {"type": "image"},
    ]
    talk = chat([{"role": "user", "content": parts, "name": "Ann"}], ["one.png", "two.png"])
    assert talk.images == [own, "one.png", "p.png", "u.png", "two.png"]
    assert talk.messages == [{"role": "user", "name": "Ann", "content": [{"type": "image"}] * 5}]


def test_strings_are_kept_as_strings() -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert chat(talk).messages == talk


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([], [], "an empty list"),
        ([{"role": "user"}], [], r"messages\[0\].content"),
        ([{"content": "x"}], [], r"messages\[0\]: expected"),
        (["x"], [], r"messages\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], r"content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], r"content\[0\]: expected"),
        ([{"role": "user", "content": [3]}], [], r"content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "no image is left"),
        ([{"role": "user", "content": "x"}], ["a", "b"], "2 images given, 0 used"),
        ("x", "door.jpg", "images: str, expected a list"),
        ("x", b"\xff\xd8", "images: bytes, expected a list"),
        ("x", Path("door.jpg"), "images: PosixPath, expected a list"),
        ("x", Image.new("RGB", (1, 1)), "images: Image, expected a list"),
    ],
)
def test_malformed_messages_say_where(prompt: list, images: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        chat(prompt, images)
