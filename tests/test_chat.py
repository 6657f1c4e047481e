import pytest
import transformers as hf
from jinja2.exceptions import TemplateError

from steered_lm.chat import render_chat, supports_system_turn
from steered_lm.errors import ModelError

SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS
DROPS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def tokenizer(template):
    from tokenizers import Tokenizer, models

    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)


def test_a_template_with_a_system_turn_is_used_as_it_is():
    assert render_chat(tokenizer(TURNS), [SYSTEM, USER]) == "<system>Be kind.<user>Hello?<assistant>"


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_without_a_system_turn_the_system_text_goes_in_front_of_the_user_s(template):
    made = tokenizer(template)
    assert not supports_system_turn(made)
    assert render_chat(made, [SYSTEM, USER]) == "<user>Be kind.\n\nHello?<assistant>"
    assert render_chat(made, [SYSTEM]) == "<user>Be kind.<assistant>"


def test_a_template_s_other_errors_are_not_hidden():
    with pytest.raises(TemplateError):
        render_chat(tokenizer("{{ raise_exception('never') }}"), [USER])


def test_without_a_chat_template_the_error_says_what_to_do_and_plain_works():
    with pytest.raises(ModelError, match="has no chat template.*prompt_format='plain'"):
        render_chat(tokenizer(None), [USER])
    assert render_chat(tokenizer(None), [SYSTEM, USER], prompt_format="plain") == "Be kind.\nUser: Hello?\nAssistant:"
