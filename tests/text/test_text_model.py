"""A model folder as the gateway reads it."""

import json
from pathlib import Path

import pytest

from hexgen2.errors import ConfigError, InvalidRequest
from hexgen2.text.chat import ChatTemplate
from hexgen2.text.tokenizer import TextModel
from tests.models import EOS_TOKEN_ID, make_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny", num_layers=1)


def write(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_chat_is_rendered_by_the_models_template(folder: Path) -> None:
    model = TextModel.load(folder)
    ids = model.encode_chat([{"role": "user", "content": "<&> \u20ac"}])
    assert model.tokenizer.decode(list(ids), skip_special_tokens=False) == (
        "<|im_start|>user\n<&> \u20ac<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ends_of_answers_come_from_generation_config_and_the_eos_token(folder: Path) -> None:
    write(folder, "generation_config.json", eos_token_id=[7, 9], temperature=0.6, top_k=20)
    model = TextModel.load(folder)
    assert model.eos_token_ids == (EOS_TOKEN_ID, 7, 9)
    assert model.sampling_defaults == {"temperature": 0.6, "top_k": 20}


def test_ends_of_answers_come_from_config_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    write(folder, "config.json", eos_token_id=5)
    assert TextModel.load(folder).eos_token_ids == (EOS_TOKEN_ID, 5)


def test_truncation_settings_of_training_are_not_applied(folder: Path) -> None:
    model = TextModel.load(folder)
    model.tokenizer.enable_truncation(4)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    assert len(TextModel.load(folder).encode("longer than four")) == 16


def test_a_default_template_is_chosen_among_named_ones(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}yes"}]
    write(folder, "tokenizer_config.json", chat_template=named, eos_token={"content": "<|im_end|>"})
    model = TextModel.load(folder)
    assert model.encode_chat([]) == model.encode("<|im_end|>yes")


def test_a_model_without_a_template_refuses_chat_by_name(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        TextModel.load(folder).encode_chat([{"role": "user", "content": "hi"}])


def test_bytes_of_tokens(folder: Path) -> None:
    model = TextModel.load(folder)
    ids = model.encode(" \u20ac")
    assert b"".join(model.token_bytes(each) for each in ids) == " \u20ac".encode()
    assert model.token_bytes(EOS_TOKEN_ID) == b"<|im_end|>"
    assert model.token_bytes(model.vocab_size) == b""


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not exist"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), "chat template"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(folder: Path, break_it, message: str) -> None:  # type: ignore[no-untyped-def]
    break_it(folder)
    with pytest.raises(ConfigError, match=message):
        TextModel.load(folder)


class TestTemplate:
    def test_has_what_templates_in_the_wild_use(self) -> None:
        source = (
            "{{- bos_token }}\n{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
            "{% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%Y') | length }}"
        )
        rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "<b>'\u20ac'"}]
        )
        assert rendered == '<s>\n{"role": "user", "content": "<b>\'\u20ac\'"}4'

    def test_refusal_by_the_template_names_the_messages(self) -> None:
        template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
        with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
            template.render([])
        assert caught.value.field == "messages"

    @pytest.mark.parametrize(
        "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
    )
    def test_the_sandbox_lets_nothing_out(self, source: str) -> None:
        with pytest.raises(InvalidRequest):
            ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
