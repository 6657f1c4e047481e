"""Messages to one prompt string, through the model's chat template or a plain fallback."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steered_lm.errors import ModelError

PromptFormat = Literal["chat", "plain"]
Message = Mapping[str, str]


def render_chat(tokenizer: Any, messages: Sequence[Message], *, prompt_format: PromptFormat = "chat", **template_args: Any) -> str:
    """Return the prompt up to where the assistant's reply starts.

    The result already holds the template's special tokens: tokenise it with ``add_special_tokens=False``. A template without a system
    turn gets the system text in front of the first user turn. ``plain`` writes ``User: …`` and ``Assistant:`` lines, for base models.

    Raises:
        ModelError: when the tokenizer has no chat template and ``prompt_format`` is ``chat``.
    """
    if prompt_format == "plain":
        names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        return "\n".join(names[m["role"]] + m["content"] for m in messages) + "\nAssistant:"
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"model {getattr(tokenizer, 'name_or_path', '?')!r} has no chat template, so prompt_format='chat' cannot be used. "
            "Allowed: a tokenizer with a chat template, or prompt_format='plain' (User:/Assistant: lines, for base models)."
        )
    return _render(tokenizer, messages, template_args)


def _render(tokenizer: Any, messages: Sequence[Message], template_args: Mapping[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(folded(tokenizer, messages), tokenize=False, add_generation_prompt=True, **template_args))


def folded(tokenizer: Any, messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as the chat template takes them: where it has no system turn, that text goes in front of the first user turn."""
    plain = [dict(m) for m in messages]
    if plain and plain[0]["role"] == "system" and not supports_system_turn(tokenizer):
        system, plain = plain[0]["content"], plain[1:]
        if plain and plain[0]["role"] == "user":
            plain[0]["content"] = f"{system}\n\n{plain[0]['content']}"
        else:
            plain.insert(0, {"role": "user", "content": system})
    return plain


def supports_system_turn(tokenizer: Any) -> bool:
    """Return whether the chat template shows a system message's text (some raise, some drop it silently)."""
    from jinja2.exceptions import TemplateError

    probe = [{"role": "system", "content": "qzsystemqz"}, {"role": "user", "content": "hi"}]
    try:
        return "qzsystemqz" in tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
