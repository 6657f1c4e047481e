"""Only what the assistant says, and the end of its turn, carries loss: several kinds of templates, checked by decoding what is masked in."""

import json

import pytest
import tiny_harness
from training_data import conversations
from transformers import AutoTokenizer

from steered_lm.tiny_chat import WEIGHTS
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.loss_mask import ConversationEncoder, encode_file, read_conversations

SYSTEM = {"role": "system", "content": "Answer in verse."}
FIRST = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend, I say!"}]
SECOND = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": " Still me.\n"}]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# thoughts of all turns but the last are dropped, and a turn that thinks nothing says so when it is the last
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].strip() }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# nothing but whole conversations
WHOLE = (
    "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('incomplete') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}</s>\n{% endfor %}"
)
# no header for the turn to come, though past turns have one
HEADLESS = WHOLE.partition("{% endif %}")[2]


def learnt(tokenizer, messages):
    """The masked-in text, one string a run of tokens."""
    encoded = ConversationEncoder(tokenizer).encode(messages)
    runs, before = [], False
    for token, kept in zip(encoded.ids, encoded.mask, strict=True):
        if kept:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = kept
    assert [label for label in encoded.labels if label != -100] == [token for run in runs for token in run]
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="module")
def tiny_chat():
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "system"])
@pytest.mark.parametrize(
    ("template", "end", "first", "last"),
    [
        (CHATML, "<|im_end|>", "{}", "{}"),
        (LLAMA2, " </s>", " {}", " {}"),
        (MARKED, "</s>", "{}", "{}"),
        (THINKING, "<|im_end|>", "{}", "<think>\n\n</think>\n\n{}"),
        (WHOLE, "</s>", "{}", "{}"),
        (HEADLESS, "</s>", "{}", "{}"),
    ],
    ids=["chatml", "llama2", "generation", "thinking", "whole", "headless"],
)
def test_the_assistants_words_and_the_end_of_its_turn_carry_loss_and_nothing_else_does(template, end, first, last, system):
    tokenizer = tiny_harness.tokenizer(template)
    strip = template in (LLAMA2, THINKING)
    said = [m["content"].strip() if strip else m["content"] for m in (FIRST[1], SECOND[1])]
    assert learnt(tokenizer, [*system, *FIRST]) == [last.format(said[0]) + end]
    assert learnt(tokenizer, [*system, *FIRST, *SECOND]) == [first.format(said[0]) + end, last.format(said[1]) + end]


def test_the_rest_of_the_text_is_what_the_template_gives(tiny_chat):
    for template in (CHATML, LLAMA2, MARKED):
        tokenizer = tiny_harness.tokenizer(template)
        whole = tokenizer.apply_chat_template([*FIRST, *SECOND], tokenize=False)
        assert ConversationEncoder(tokenizer).encode([*FIRST, *SECOND]).ids == tokenizer(whole, add_special_tokens=False).input_ids
    assert "You are helpful." in tiny_harness.tokenizer(CHATML).apply_chat_template(FIRST, tokenize=False)


def test_the_tiny_chat_models_own_template(tiny_chat):
    for messages in conversations(30):
        assert learnt(tiny_chat, messages) == [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]


def test_a_system_turn_that_the_template_does_not_know_goes_in_front_of_the_first_user_turn():
    tokenizer = tiny_harness.tokenizer(LLAMA2)
    text = tokenizer.decode(ConversationEncoder(tokenizer).encode([SYSTEM, *FIRST]).ids)
    assert text == "<s>[INST] Answer in verse.\n\nWho goes there? [/INST] A friend, I say! </s>"


@pytest.mark.parametrize("merged", [False, True])
def test_without_a_template_there_are_user_and_assistant_lines(merged):
    tokenizer = AutoTokenizer.from_pretrained(tiny_harness.STORIES) if merged else tiny_harness.tokenizer(None)
    tokenizer.chat_template = None
    encoded = ConversationEncoder(tokenizer).encode([SYSTEM, *FIRST, *SECOND])
    text = tokenizer.decode(encoded.ids)
    assert text.replace(" ", "") == "<s>Answerinverse.\nUser:Whogoesthere?\nAssistant:Afriend,Isay!\nUser:Andnow?\nAssistant:Stillme.\n</s>"
    assert [part.strip() for part in learnt(tokenizer, [SYSTEM, *FIRST, *SECOND])] == ["A friend, I say!", "Still me.\n</s>"]
    assert not encoded.mask[0], "BOS is predicted by nothing"


@pytest.mark.parametrize("template", [CHATML, LLAMA2, MARKED, tiny_harness.TEMPLATE], ids=["chatml", "llama2", "generation", "turns"])
def test_merged_tokens_of_a_real_tokenizer_keep_to_the_borders(template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_harness.STORIES)
    tokenizer.chat_template = template
    ends = {CHATML: "<|im_end|>", LLAMA2: "</s>"}
    found = learnt(tokenizer, [*FIRST, *SECOND])
    assert [part.replace(" ", "").removesuffix(ends.get(template, "</s>")) for part in found] == [
        "Afriend,Isay!",
        "Stillme." + "\n" * (template != LLAMA2),
    ]


def test_a_tokenizer_that_does_not_say_where_tokens_stand_gives_the_same():
    tokenizer = tiny_harness.tokenizer(CHATML)
    encoder = ConversationEncoder(tokenizer)
    wanted = encoder.encode([*FIRST, *SECOND])
    encoder._fast = False
    assert encoder.encode([*FIRST, *SECOND]) == wanted


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}</s>{% endfor %}", "does not show every turn of the assistant once"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "turn 2 is not shown as it was written"),
        (
            "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}",
            "does not show every turn of the assistant once",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
            "around turn 2 depends on what is said",
        ),
    ],
)
def test_a_template_that_hides_its_turns_is_refused_by_name(template, why):
    tokenizer = tiny_harness.tokenizer(template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(
        ExperimentError, match=rf"the chat template of 'some/model' does not tell which tokens are the assistant's: .*{why}.*generation"
    ):
        ConversationEncoder(tokenizer).encode(FIRST)


def test_examples_without_an_assistant_turn_and_too_long_ones_are_named_by_line(tmp_path):
    encoder = ConversationEncoder(tiny_harness.tokenizer(CHATML))
    data = tmp_path / "d.jsonl"

    def refused(*rows):
        data.write_text("\n".join(row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows), encoding="utf-8")
        with pytest.raises(ExperimentError) as caught:
            encode_file(encoder, data, max_length=200)
        return str(caught.value)

    assert "line 2: messages have no assistant turn" in refused(FIRST, FIRST[:1])
    assert "line 3 has 2" in refused(FIRST, FIRST, [FIRST[0], {"role": "assistant", "content": "so " * 50}])
    assert "line 2, is not JSON" in refused(FIRST, "{")
    assert "line 1, has no list of messages" in refused('{"prompt": "a"}')
    assert "role" in refused([{"role": "bot", "content": "a"}])
    assert "is empty" in refused("")
    data.write_bytes(b"\xff")
    with pytest.raises(ExperimentError, match="is not UTF-8"):
        read_conversations(data)
    with pytest.raises(ExperimentError, match="does not exist"):
        read_conversations(tmp_path / "none.jsonl")


def test_line_separators_within_texts_do_not_split_lines(tmp_path):
    row = [FIRST[0], {"role": "assistant", "content": "one\u2028two\u0085three"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": row}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [messages for _, messages in read_conversations(tmp_path / "d.jsonl")] == [row]
