"""Chat templates frozen as texts: around items and pairs, with and without images, and what cannot be frozen."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from rtx.trainer.rendering import (
    Chat,
    Rendered,
    choose_format,
    judge_template,
    passes_roles_through,
    render_item,
    render_pair,
)

# Parts of a message: an image, or a text.
PARTS = (
    "{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}<img>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
)
TURNS = (
    "{% for message in messages %}<{{ message.role }}>{% set content = message.content %}" + PARTS + "</>{% endfor %}"
)
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<system>be kind</>{% endif %}" + TURNS


def chat(template: str | None, message_format: Any = "structured", **variables: Any) -> Chat:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = template
    return Chat(tokenizer, message_format, variables)


def refusal(template: str | None, *, pair: bool = False, images: bool = True) -> str:
    def render() -> Rendered:
        return render_pair(chat(template), "", images=images) if pair else render_item(chat(template), images=images)

    with pytest.raises(ValueError, match=r"^chat_template: ") as found:
        render()
    assert "\n" not in str(found.value)
    return str(found.value).removeprefix("chat_template: ")


# ---------------------------------------------------------------- items


def test_an_item() -> None:
    assert render_item(chat(OWN_SYSTEM), images=True) == Rendered(
        ("<system>be kind</><user>", "</>"), False, ("<system>", "</><user>"), "<img>"
    )
    # Not asked for images, it is not looked for what they are written as.
    assert render_item(chat(OWN_SYSTEM)).image == ""


def test_variables_of_the_template() -> None:
    template = TURNS + "{% if think %}<think>{% endif %}"
    assert render_item(chat(template, think=True)).parts == ("<user>", "</><think>")
    assert render_item(chat(template)).parts == ("<user>", "</>")


@pytest.mark.parametrize("strips_text", [False, True])
@pytest.mark.parametrize("strips_prompt", [False, True])
def test_whitespace_that_a_template_drops(strips_text: bool, strips_prompt: bool) -> None:
    def part(role: str, strip: bool) -> str:
        found = f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first | default('')"
        return f"{{{{ ({found}) {'| trim' if strip else ''} }}}}"

    template = f"[{part('system', strips_prompt)}]({part('user', strips_text)})"
    found = render_item(chat(template, "flat"))
    assert (found.strip_sides, found.strip_prompt) == (strips_text, strips_prompt)
    assert found.prompt == ("[", "](")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].role }}", "expected the messages of the roles system and user, each once and in this order"),
        (TURNS + TURNS, "expected the messages of the roles system and user, each once and in this order"),
        ("{{ raise_exception('no') }}", "cannot render the role user: no"),
        ("{{ messages[0].content[0].text | upper }}", "expected the messages of the roles"),
        (
            TURNS + "{% if messages[0].role == 'system' %}!{% endif %}",
            "writes something else behind an item that has a prompt",
        ),
        (
            "{% for message in messages %}[{{ message.content[-1].text | replace('<e>', 'x') }}]{% endfor %}",
            "writes something else around or in place of some texts; expected fixed texts around them",
        ),
        (None, "cannot render the role user: Cannot use chat template functions"),
    ],
)
def test_templates_that_cannot_be_frozen_around_an_item(template: str | None, message: str) -> None:
    assert refusal(template, images=False).startswith(message)


UNEVEN = "expected the same text for every image, before the text of its message"
UNEVEN_TEMPLATES = {
    "counted": TURNS.replace("<img>", "<img {{ loop.index }}>"),
    "behind the text": (
        "{% for message in messages %}<{{ message.role }}>"
        "{% for part in message.content %}{{ part.text }}{% endfor %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<img>{% endif %}{% endfor %}</>{% endfor %}"
    ),
    "not written": TURNS.replace("<img>", ""),
    "joined": TURNS.replace("<img>", "{% if not loop.first %}, {% endif %}<img>"),
    "another text beside them": TURNS.replace("{{ part.text }}", "{% if not loop.first %} {% endif %}{{ part.text }}"),
    "said once more": TURNS + "{% if messages[-1].content[0].type == 'image' %}(images){% endif %}",
}


@pytest.mark.parametrize("template", UNEVEN_TEMPLATES)
@pytest.mark.parametrize("pair", [False, True])
def test_images_that_are_not_written_alike(template: str, pair: bool) -> None:
    """Where one differs from the next, or depends on the text beside it, or stands behind that."""
    assert refusal(UNEVEN_TEMPLATES[template], pair=pair) == UNEVEN
    # Of a model that takes no images the template would do.
    assert render_item(chat(UNEVEN_TEMPLATES[template])).image == ""


# ---------------------------------------------------------------- pairs


def test_a_pair_with_its_prompt() -> None:
    assert render_pair(chat(OWN_SYSTEM), "", images=True) == Rendered(
        ("<system>be kind</><query>", "</><document>", "</>"), False, (), "<img>"
    )
    assert render_pair(chat(OWN_SYSTEM), "judge").parts[0] == "<system>judge</><query>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "expected the messages of the roles query and document, each once and in this"),
        (
            "{{ messages[1].content[0].text }}{{ messages[0].content[0].text }}",
            "expected the messages of the roles query and document, each once and in this order",
        ),
        ("{{ raise_exception('no') }}", "cannot render the roles query and document: no"),
        ("{{ messages[2].content }}", "cannot render the roles query and document: "),
    ],
)
def test_templates_that_cannot_be_frozen_around_a_pair(template: str, message: str) -> None:
    assert refusal(template, pair=True, images=False).startswith(message)


# ---------------------------------------------------------------- which form, which template


def test_the_form_of_messages() -> None:
    def chosen(template: str, *, images: bool) -> str:
        tokenizer = chat(template)._tokenizer
        return choose_format(tokenizer, {}, lambda chat: render_item(chat, images=images))

    assert chosen(TURNS, images=False) == "flat"
    # A text as it is has no place for an image.
    assert chosen(TURNS, images=True) == "structured"
    assert chosen(TURNS.replace("content is string", "false"), images=False) == "structured"
    with pytest.raises(ValueError, match="expected the messages of the roles system and user"):
        chosen("{{ messages[0].role }}", images=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, True),
        (TURNS.replace("{{ message.role }}", "{{ message.role | upper }}"), False),
        (TURNS.replace("{{ message.role }}", ""), False),
        (TURNS.replace("{{ message.role }}", "{{ message.role if message.role == 'query' else 'x' }}"), False),
        ("{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}", False),
        ("{{ raise_exception('no') }}", False),
    ],
)
def test_whether_roles_are_passed_through(template: str, expected: bool) -> None:
    assert passes_roles_through(chat(template)) is expected
    assert passes_roles_through(chat(template, "flat")) is expected


CHATML = {"<|im_start|>": 0, "<|im_end|>": 1}
VISION = {"<|vision_start|>": 2, "<|image_pad|>": 3, "<|vision_end|>": 4}
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)


@pytest.mark.parametrize("thinks", [False, True])
def test_the_judges_template_of_texts(thinks: bool) -> None:
    template = judge_template(CHATML | ({"<think>": 5} if thinks else {}))
    found = render_pair(chat(template, "flat"), "Find it.")
    assert found.parts == (
        f"{JUDGE}<Instruct>: Find it.\n<Query>: ",
        "\n<Document>: ",
        f"<|im_end|>\n<|im_start|>assistant\n{'<think>' + chr(10) * 2 + '</think>' + chr(10) * 2 if thinks else ''}",
    )


def test_the_judges_template_of_images() -> None:
    """Models of images that think are not told that they have: the published reranker was trained so."""
    template = judge_template(CHATML | VISION | {"<think>": 5}, images=True)
    found = render_pair(chat(template), "Find it.", images=True)
    assert found.parts == (
        f"{JUDGE}<Instruct>: Find it.<Query>:",
        "\n<Document>:",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    assert found.image == "<|vision_start|><|image_pad|><|vision_end|>"
    assert "<Instruct>: Given a search query, retrieve" in render_pair(chat(template), "", images=True).parts[0]


def test_no_judge_for_other_ways_of_marking_turns_and_images() -> None:
    assert judge_template({"<|im_start|>": 0}) is None
    assert judge_template(CHATML, images=True) is None
    assert judge_template(CHATML | {"<|vision_start|>": 2, "<|vision_end|>": 3}, images=True) is None
