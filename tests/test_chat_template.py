"""Chat templates: as transformers renders them, the same every day, and never without an end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from onnx_files import tokenizer, write_reward
from tokenizers import Tokenizer, models, pre_tokenizers

from aisp_local.errors import RewardError, ScoreError
from aisp_local.rewards import OnnxReward
from aisp_local.rewards.chat_template import ChatTemplate, usual_tokens

TURNS: Any = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is 1 < 2 & 'é'?"},
    {"role": "assistant", "content": "Yes."},
]


def render(source: str, messages: Any = TURNS, **tokens: str) -> str:
    return ChatTemplate(source, "tiny", tokens).render(messages)


USED = {
    # Blocks alone on their line leave nothing of it.
    "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}": "user\n",
    "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }} {% endfor %}": "system user ",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role[0] }}{% endfor %}": "sa",
    "{{ messages[1] | tojson }}": '{"role": "user", "content": "Is 1 < 2 & \'é\'?"}',
    "{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 2,\n "b": [\n  1\n ]\n}',
    "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}": "True True False",
    "{{ custom is defined }}{{ custom }}": "False",
    "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M') }}": "26 Jul 2024 2024-07-26 00:00",
    "{{ messages[2].content }}{% generation %}{{ messages[2].role }}{% endgeneration %}!": "Yes.assistant!",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "3",
    "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{{ turn(messages[0]) ~ turn(messages[1]) }}": "[system][user]",
    "{% for m in messages[1:] recursive %}{{ m.role }}{% if loop.last %}.{% endif %}{% endfor %}": "userassistant.",
    "{{ messages | map(attribute='role') | join(', ') }}": "system, user, assistant",
    "{{ '%s-%d' % ('a', 3) }} {{ '{}!'.format('b') }}": "a-3 b!",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '-' * 3 }}{{ 2 ** 8 }}": "1---256",
    "{{ messages[1]['content'].split('<')[-1].strip() | upper }}": "2 & 'É'?",
    "{{ bos_token }}{{ messages[2]['content'] + eos_token }}": "<s>Yes.</s>",
}


@pytest.mark.parametrize("source", USED)
def test_what_templates_use(source: str) -> None:
    assert render(source, bos_token="<s>", eos_token="</s>") == USED[source]


def test_a_template_refuses_a_conversation() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('only users may begin') }}{% endif %}"
    with pytest.raises(ScoreError, match="refuses this conversation of system, user, assistant: only users may begin$"):
        render(source)


@pytest.mark.parametrize("source", ["{% for m in messages %}\n{{ m.role", "{% endfor %}", "{{ x | nosuch }}"])
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(RewardError, match="'tiny' (is not valid Jinja, line \\d|cannot be compiled).*repair it"):
        render(source)


@pytest.mark.parametrize("source", ["{{ messages.__class__ }}", "{{ ''.__class__.mro() }}", "{{ messages.append(1) }}"])
def test_the_sandbox(source: str) -> None:
    with pytest.raises(ScoreError, match="failed: .*unsafe|failed: .*not safely"):
        render(source + "{{ messages.__class__.x }}")


RUN_AWAY = {
    "range": "{% for i in range(1000000000) %}a{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long rows": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "one long value": "{{ 'abc' * 1000000000 }}",
    "a list": "{{ ([0] * 1000000000) | length }}",
    "doubling": "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "doubling by blocks": "{% set a = 'aa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "doubling by lists": "{% set a = ['aa'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "doubling by format": "{% set a = 'aa' %}" + "{% set a = '%s%s' % (a, a) %}" * 60,
    "doubling by replace": "{% set a = 'aa' %}" + "{% set a = a | replace('a', 'aa') %}" * 60,
    "doubling by replace()": "{% set a = 'aa' %}" + "{% set a = a.replace('a', a) %}" * 60,
    "copies kept": "{% set ns = namespace(l=[], a='a' * 999999) %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [ns.a[1:]] %}{% endfor %}",
    "joined": "{{ range(99999) | join('a' * 99999) }}",
    "joined by its method": "{{ ('a' * 99999).join('a' * 99999) }}",
    "centred": "{{ 'a' | center(1000000000) }}",
    "centred by its method": "{{ 'a'.center(1000000000) }}",
    "mapped": "{{ ['a'] | map('center', 1000000000) | list }}",
    "formatted": "{{ '%1000000000d' % 1 }}",
    "formatted by its method": "{{ '{:1000000000}'.format(1) }}",
    "formatted by a width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "indented": "{{ [[1], [2]] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "translated": "{{ ('a' * 9999).translate({97: 'a' * 99999}) }}",
    "power": "{{ 10 ** 1000000000 }}",
    "product": "{% set ns = namespace(a=9**9999) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "namespaces": "{% set a = namespace() %}"
    + "{% set b = namespace(x=a, y=a) %}{% set a = namespace(x=b, y=b) %}" * 60
    + "{{ [a] | string }}{% for i in range(1000000000) %}{% endfor %}",
}


@pytest.mark.parametrize("name", RUN_AWAY)
def test_templates_that_run_away(name: str) -> None:
    began = time.process_time()
    with pytest.raises((RewardError, ScoreError), match="far more than a conversation needs|Range too big|recursion"):
        render(RUN_AWAY[name])
    assert time.process_time() - began < 10


def test_a_long_conversation_does_not_run_away() -> None:
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text + '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' %}"
        "{% endfor %}{{ ns.text }}"
    )
    turns: Any = [{"role": "user", "content": "word " * 200}] * 300
    assert len(render(source, turns)) == 300 * len("<|im_start|>user\n" + "word " * 199 + "word<|im_end|>\n")
    one: Any = [{"role": "user", "content": "x" * 5_000_000}]
    assert len(render("{{ messages[0].content.replace('x', 'y') | trim }}", one)) == 5_000_000
    plain = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
    assert len(render(plain, [{"role": "user", "content": "hi"}] * 20_000)) == 20_000 * len("user: hi")


def test_chance_and_the_clock_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert render("{{ strftime_now('%s') is string }}{{ strftime_now('%Y') }}") == "True2024"
    assert render("{{ lipsum is defined }}") == "False"
    with pytest.raises(RewardError, match="No filter named 'random'"):
        render("{{ messages | random }}")


def test_tokens_by_their_usual_names() -> None:
    assert usual_tokens(["<s>", "</s>", "<unk>"]) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert usual_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == {}  # two that may end a turn


def test_a_token_that_the_folder_lacks() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    says = r"names 'eos_token'.*perhaps <\|endoftext\|> or <\|im_end\|>.*\{% set eos_token = \"<\|endoftext\|>\" %\}"
    with pytest.raises(RewardError, match=says):
        ChatTemplate(source, "tiny", {}, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with pytest.raises(RewardError, match=r"names 'bos_token'.*\{% set bos_token = \"</s>\" %\}$"):
        ChatTemplate("{{ bos_token }}", "tiny", {})
    said = '{% set eos_token = "<|im_end|>" %}' + source
    assert ChatTemplate(said, "tiny", {}).render(TURNS[2:]) == "Yes.<|im_end|>"


def test_a_folder_whose_tokenizer_tells_the_tokens(tmp_path: Path) -> None:
    """By its post-processor, by a usual name, or not at all."""
    folder = write_reward(
        tmp_path, input_kind="chat", input_bos="none", input_template="{{ bos_token }} good {{ eos_token }}"
    )
    reward = OnnxReward.load(folder)
    assert reward._template.render(TURNS) == "[CLS] good [SEP]"
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 4}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens(["<s>", "</s>"])
    by_name = OnnxReward(reward.manifest, reward._session, plain)
    assert by_name._template.render(TURNS) == "<s> good </s>"
    plain.add_special_tokens(["<|im_end|>"])
    neither = OnnxReward(reward.manifest, reward._session, plain)
    with pytest.raises(RewardError, match="names 'eos_token'.*perhaps </s> or <\\|im_end\\|>"):
        neither.score("tell", ["good"])
    assert tokenizer().get_vocab_size()  # the folder's own has both


def test_agrees_with_transformers() -> None:
    """The templates of known models, rendered by both."""
    transformers = pytest.importorskip("transformers")
    from hf_models import CHATML, GEMMA, LLAMA, MISTRAL
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers
    turns = TURNS[1:]
    for source in (CHATML, GEMMA, LLAMA, MISTRAL):
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        expected = render_jinja_template([turns], chat_template=source, **tokens)[0][0]
        assert render(source, turns, **tokens) == expected
