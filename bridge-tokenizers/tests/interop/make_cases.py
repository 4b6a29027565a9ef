#!/usr/bin/env python3
"""Reference cases for tokenizers and chat templates, computed with `transformers`.

    python make_cases.py fixtures OUT            makes OUT/{byte_bpe,sentencepiece}/ (small tokenizers trained on the bundled
                                                 corpus, with cases.json each) and OUT/chat_cases.json
    python make_cases.py tokenizer FOLDER        writes FOLDER/cases.json for any Hugging Face tokenizer folder
    python make_cases.py templates FOLDER OUT    writes OUT for all *.jinja files of a folder

The committed fixtures were made with transformers 5.23.0, tokenizers 0.23.3 and jinja2 3.1.6. Set BRIDGE_TEST_TOKENIZERS (folders
separated by `:`) and BRIDGE_TEST_CHAT_CASES (a file) to run the tests on more.
"""
import datetime
import json
import os
import pathlib
import sys

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent
CORPUS = HERE.parents[2] / "bridge-data/corpus/moby_dick.txt"
NOW = datetime.datetime(2024, 7, 26, 15, 4, 5)

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "It's what they'd've said: WE'LL see, I'M sure.",
    "tabs\tand\nnew lines\r\n\r\n  indented\n\n\n   more",
    "1 12 123 1234 12345 3.14159 1,000,000",
    "def f(x):\n    return x ** 2  # squared\n",
    "Être ou ne pas être; naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "日本語のテキスト。中文文本,한국어 텍스트",
    "emoji 🦀🚀 family 👨‍👩‍👧‍👦 flag 🇫🇷 skin 👍🏽",
    "combining e\u0301 vs \u00e9, ligature \ufb01, fullwidth ＡＢＣ, nbsp\u00a0here, zero\u200bwidth",
    "controls \x00 \x01 \x7f end",
    "spaces" + " " * 40 + "in the middle" + "\n" * 12 + "end   ",
    "http://example.com/path?query=1&x=[y]#frag {\"json\": [1, 2.5, null]}",
    "<|endoftext|> in text, </s><s> too, <|im_start|>user\nhi<|im_end|>\n <unk>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕸𝖆𝖙𝖍 ∑∫√ ½ ²",
]


def tokenizer_cases(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    cases = []
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False).input_ids
        full = tokenizer(text, add_special_tokens=True).input_ids
        cases.append({
            "text": text,
            "ids": plain,
            "ids_special": full,
            "decoded": tokenizer.decode(full, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            "decoded_plain": tokenizer.decode(full, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        })
    chats = []
    if tokenizer.chat_template:
        for request in (r for r in REQUESTS if not isinstance(tokenizer.chat_template, dict)):
            try:
                expected = {"text": tokenizer.apply_chat_template(request["messages"], tools=request.get("tools"), tokenize=False,
                                                                  add_generation_prompt=request.get("add_generation_prompt", False))}
            except Exception as error:
                expected = {"error": str(error)}
            chats.append({"request": request, **expected})
    summary = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "cases": cases,
        "chats": chats,
    }
    (pathlib.Path(folder) / "cases.json").write_text(json.dumps(summary, ensure_ascii=False, indent=0), encoding="utf-8")


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def train(folder, tokenizer, trainer, config, template):
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(lines[:3000], trainer)
    return save(folder, tokenizer, config, template)


def save(folder, tokenizer, config, template):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def byte_bpe(folder):
    """GPT-4 style: a regular expression, byte-level BPE, a begin-of-text token added by the post-processor."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(lines[:3000], trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]),
    ])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
              "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
              "clean_up_tokenization_spaces": False, "model_max_length": 2048}
    save(folder, tokenizer, config, TEMPLATES["turns"])


def sentencepiece(folder):
    """Llama 2 style: BPE over characters with `▁` for spaces, unknown characters as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=16)
    words = [word for line in CORPUS.read_text(encoding="utf-8").splitlines()[:1500] for word in line.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens, not special ones.
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "clean_up_tokenization_spaces": False, "chat_template": [
                  {"name": "default", "template": TEMPLATES["headers"]}, {"name": "tool_use", "template": TEMPLATES["tools"]}]}
    save(folder, tokenizer, config, None)


TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather now, in °C. It's \"live\" <b>data</b> & more.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "the city"}, "days": {"type": "integer", "default": 1.0}},
                   "required": ["city"]}}}]
USER = {"role": "user", "content": "  What's the weather in Zürich?  "}
REQUESTS = [
    {"messages": [USER], "add_generation_prompt": True},
    {"messages": [{"role": "system", "content": "Be brief.\n"}, USER, {"role": "assistant", "content": "Sunny ☀."}, {"role": "user", "content": "Thanks"}]},
    {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSunny."}, {"role": "user", "content": "And tomorrow?"}, {"role": "assistant", "content": "Rain."}]},
    {"messages": [{"role": "system", "content": "Use tools."}, USER,
                  {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call_12345", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}]},
                  {"role": "tool", "name": "get_weather", "tool_call_id": "call_12345", "content": "{\"temp\": 21.5}"},
                  {"role": "assistant", "content": "21.5 °C"}],
     "tools": TOOLS, "add_generation_prompt": True},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}, {"type": "text", "text": " joined"}]}]},
    {"messages": [{"role": "assistant", "content": "I start"}, {"role": "assistant", "content": "twice"}]},
    {"messages": [USER, {"role": "assistant", "content": "ok", "reasoning": "because"}], "variables": {"enable_thinking": False, "flag": True}},
    {"messages": []},
]

TEMPLATES = {
    "turns": """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "headers": """{{- bos_token }}
{%- if messages and messages[0].role == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "none" %}
{%- endif %}
{{- "<sys>" + date_string + "\\n" + system + "</sys>" }}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) and message['role'] != 'tool' and not message.tool_calls %}
        {{- raise_exception('Roles must alternate: ' + message.role) }}
    {% endif %}
{{ message.role | capitalize }}: {{ message.content | trim if message.content is string else message.content }}
    {% if loop.last and add_generation_prompt %}
Assistant:
    {%- endif %}
{% endfor %}
{{ eos_token }}""",
    "tools": """{%- macro show(name, schema) %}
    {{- name }}: {{ schema.type }}{% if schema.description is defined %} ({{ schema.description }}){% endif %}
{%- endmacro %}
{%- set ns = namespace(count=0, names=[]) %}
{%- if tools is not none and tools %}
{{ tools | tojson }}
{{ tools[0] | tojson(indent=2) }}
{{ tools[0].function | tojson(sort_keys=true, separators=(',', ':')) }}
{{ tools | tojson(ensure_ascii=True) }}
    {%- for tool in tools %}
        {%- set fn = tool.function %}
        {%- set ns.count = ns.count + 1 %}
        {%- for key, value in fn.parameters.properties.items() %}
            {{- '\\n- ' ~ show(key, value) }}
        {%- endfor %}
        {%- for key, value in fn.parameters.properties | dictsort %}
            {{- key ~ ';' }}
        {%- endfor %}
    {%- endfor %}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson ~ '</call>' ~ call.id[-5:] }}
        {%- endfor %}
    {%- elif message.content is string %}
        {{- message.role.upper() ~ '|' ~ message.content.strip() ~ '|' }}
    {%- elif message.content is iterable %}
        {{- message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('+') }}
    {%- endif %}
    {%- if not loop.last %}{{ ', ' }}{% endif %}
{%- endfor %}
{{- '#' ~ ns.count }}""",
    "thinking": """{% set ns = namespace(last=-1) %}
{% for message in messages[::-1] %}
    {% set index = (messages | length - 1) - loop.index0 %}
    {% if ns.last < 0 and message.role == "user" and not (message.content is string and message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {% set ns.last = index %}
    {% endif %}
{% endfor %}
{{ ns.last }}
{% for message in messages %}
    {% set content = message.content if message.content is string else '' %}
    {% if '</think>' in content %}
        {% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {% set content = content.split('</think>')[-1].lstrip('\\n') %}
[{{ reasoning }}]
    {% endif %}
    {% if message.reasoning_content %}
({{ message.reasoning_content }}/{{ message.thinking }})
    {% endif %}
{{ loop.index }}/{{ loop.length }}/{{ loop.revindex }} {{ content }}{% if enable_thinking is defined and enable_thinking is false %} (no){% endif %}

{% endfor %}
{% if add_generation_prompt %}{{ 'go' }}{% endif %}""",
    "values": """{{ messages | length }} {{ true }} {{ none }} {{ flag }} {{ [1, 'a', none, 2.0, "it's"] }} {{ {'k': 'v', 'n': [true]} }}
{{ 1 / 2 }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 5 }} {{ 1e20 }} {{ 0.00001 }} {{ 3 * 'ab' }} {{ 'x' * 3 }}
{{ 'a,b,c'.split(',') }} {{ 'a b'.split() }} {{ ' pad '.strip() }}| {{ 'xxabcxx'.strip('x') }} {{ 'Hello'.replace('l', 'L') }} {{ 'abc'.find('c') }}
{{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ [1, 2, 3][:2] }} {{ 'hello world'.title() }} {{ 'a' in 'cat' }} {{ 'k' in {'k': 1} }} {{ {'k': 1}.get('z', 'none') }}
{{ {'b': 1, 'a': 2}.keys() | list }} {{ {'b': 1}.values() | list }} {{ [3, 1, 2] | sort }} {{ [1, 1, 2] | unique | list }} {{ ['a', 'b'] | join('-') }} {{ undefined_thing }}|{{ undefined_thing | default('dflt') }}
{{ '%s is %d' | format('x', 3) }} {{ "quote ' and \\" both" }} {{ ['quote \\' and " both', 'tab\\t'] }} {{ 'é' | upper }} {{ 'abc' | first }} {{ [1,2] | last }} {{ 'A-B' | lower }} {{ '3' | int + 1 }} {{ 3 | string + '1' }}
{{ range(3) | list }} {% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %} {{ [1,2,3] | map('string') | join }} {{ ['x', none] | reject('none') | list }}
{% set a, b = 1, 2 %}{{ a + b }} {% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% endfor %} {{ not true }} {{ 1 == 1.0 }} {{ 'a' ~ 1 ~ none ~ true }} {{ 5 is odd }} {{ 'x' is string }} {{ {} is mapping }} {{ [] is iterable }} {{ 1.5 is number }} {{ 2 is divisibleby 2 }}
{{ [1, 2, 3] | tojson }} {{ 'é<>&\\'\\u2028' | tojson }} {{ 1.0 | tojson }} {{ none | tojson }} {{ {} | tojson }} {{ [] | tojson(indent=2) }} {{ {'a': [1, {'b': []}]} | tojson(indent=4) }}""",
    "space": """  {% if true %}  
  a
  {%- if true -%}  
  b
  {%- endif +%}
  {#- comment -#}
  c  {# comment #}
  {% generation %}
  d
  {% endgeneration %}
  e
  {%- generation -%}
  f
  {%- endgeneration -%}
  g
{% endif %}
{% raw %}{% generation %}{{ raw }}{% endraw %}
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
end
""",
    "refuses": """{{ raise_exception('Only "one" thing is allowed') }}""",
    "broken": """{% if %}""",
    "undefined": """{{ messages[0].nothing.more }}""",
}


def chat_case(name, template, request):
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    chat_template_utils.datetime = Frozen
    variables = {"bos_token": "<s>", "eos_token": "</s>", **request.get("variables", {})}
    case = {"name": name, "template": template, "request": request, "bos_token": "<s>", "eos_token": "</s>"}
    try:
        rendered, ranges = chat_template_utils.render_jinja_template(
            [request["messages"]], tools=request.get("tools"), chat_template=template,
            add_generation_prompt=request.get("add_generation_prompt", False), return_assistant_tokens_mask=True, **variables)
        text = rendered[0]
        case["text"] = text
        # Byte ranges; empty ones say nothing.
        case["assistant"] = [[len(text[:start].encode()), len(text[:end].encode())] for start, end in ranges[0] if end > start]
    except Exception as error:
        case["error"] = f"{type(error).__name__}: {error}"
    return case


def write_chat_cases(path, templates):
    # What does not depend on the messages needs one request.
    fixed = ("values", "space", "refuses", "broken", "undefined")
    cases = [chat_case(name, template, request) for name, template in templates.items()
             for request in (REQUESTS[6:7] if name in fixed else REQUESTS)]
    pathlib.Path(path).write_text(json.dumps(cases, ensure_ascii=False, indent=0), encoding="utf-8")


def main(command, *arguments):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if command == "fixtures":
        out = pathlib.Path(arguments[0])
        for make in (byte_bpe, sentencepiece):
            make(out / make.__name__)
            tokenizer_cases(out / make.__name__)
        write_chat_cases(out / "chat_cases.json", TEMPLATES)
    elif command == "tokenizer":
        tokenizer_cases(arguments[0])
    elif command == "templates":
        folder, out = arguments
        write_chat_cases(out, {path.name: path.read_text(encoding="utf-8") for path in sorted(pathlib.Path(folder).glob("*.jinja"))})
    else:
        sys.exit(__doc__)


main(*sys.argv[1:])
