"""Chat templates of the field, written from their public description: ids as transformers' own.

Each shape is rendered for conversations of one turn, several turns, with and without a system turn,
by `apply_chat_template` and by `ChatFormat`, with tokenizers that have the special tokens of all of
them. Where ours does not give the same ids it must refuse, with the words that the table has.
"""

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.conversations import example_of

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import ChatFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import ASSETS


@dataclass(frozen=True)
class Shape:
    """A chat template, and what of it is refused.

    Refused are conversations that have all that is named: a "system" turn, several "turns", a "row"
    to train on (and no prompt); "" is all of them.
    """

    template: str
    eos: str = "</s>"
    bos: str = "<s>"
    refused: Sequence[tuple[str, str]] = ()  # (what, words of the reason)
    own_cue: bool = True  # add_generation_prompt does something
    # The cue ends in two line ends: one of GPT-2's tokens in a prompt, two before a word. A row
    # of ours begins with its prompt's tokens.
    seam: bool = False


NO_SYSTEM = (("system", "no place for a system turn"),)
RAISES = (("system", "failed"),)
ORDER = (("system turns", "in another order"),)
IM = "{% for message in messages %}"
END = "{% endfor %}"
CHATML_TURN = (
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
)
CHATML_CUE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
)

SHAPES = {
    # Phi
    "phi-3-mini-april": Shape(
        "{{ bos_token }}" + IM + "{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' +"
        " message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role']"
        " == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}" + END,
        "<|endoftext|>",
        refused=NO_SYSTEM,
        own_cue=False,
    ),
    "phi-3-mini-july": Shape(
        IM + "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] +"
        " '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] +"
        " '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' +"
        " message['content'] + '<|end|>\n'}}{% endif %}" + END + "{% if add_generation_prompt %}"
        "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
    ),
    "phi-3-medium": Shape(
        IM + "{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] +"
        " '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
        "{{message['content'] + '<|end|>' + '\n'}}{% endif %}" + END,
        "<|endoftext|>",
        refused=NO_SYSTEM,
        own_cue=False,
    ),
    "phi-3-small": Shape(
        "{{ bos_token }}" + IM + "{{'<|' + message['role'] + '|>' + '\n' + message['content'] +"
        " '<|end|>\n' }}" + END + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "phi-3.5-mini": Shape(
        IM + "{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' +"
        " message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' +"
        " message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}" + END +
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
    ),
    "phi-4": Shape(
        IM + "{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' +"
        " message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
        "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif"
        " (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' +"
        " message['content'] + '<|im_end|>'}}{% endif %}" + END + "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
    ),
    "phi-4-december": Shape(  # the cue follows every question
        IM + "{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' +"
        " message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
        "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant"
        "<|im_sep|>'}}{% elif (message['role'] == 'assistant') %}{{message['content'] +"
        " '<|im_end|>'}}{% endif %}" + END,
        "<|im_end|>",
        own_cue=False,
    ),
    "phi-4-mini": Shape(
        IM + "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not"
        " none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' +"
        " message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>'"
        " + message['content'] + '<|end|>' }}{% endif %}" + END + "{% if add_generation_prompt %}"
        "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
    ),
    "phi-4-reasoning": Shape(  # a system turn of its own, before the user's
        "<|im_start|>system<|im_sep|>You are Phi. Think first.<|im_end|>" + IM +
        "{% if (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] +"
        " '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant"
        "<|im_sep|>'}}{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
        "{% endif %}" + END + "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}"  # noqa: E501
        "{% endif %}",
        "<|im_end|>",
        refused=NO_SYSTEM,
    ),
    "phi-2-chatml": Shape(IM + CHATML_TURN + END + CHATML_CUE, "<|im_end|>"),
    "phi-2-instruct-output": Shape(
        IM + "{% if message['role'] == 'user' %}{{ 'Instruct: ' + message['content'] + '\nOutput:'"
        " }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token +"
        " '\n' }}{% else %}{{ message['content'] + '\n' }}{% endif %}" + END,
        "<|endoftext|>",
        own_cue=False,
    ),
    # ChatML and its relatives
    "chatml-no-cue": Shape(IM + CHATML_TURN + END, "<|im_end|>", own_cue=False),
    "chatml-no-last-line-end": Shape(
        IM + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}" + END +
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "chatml-default-system": Shape(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful"
        " assistant.<|im_end|>\n' }}{% endif %}" + IM + CHATML_TURN + END + CHATML_CUE,
        "<|im_end|>",
    ),
    "chatml-generation-tags": Shape(
        IM + "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}\n{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\n"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}" + END + CHATML_CUE,
        "<|im_end|>",
    ),
    "chatml-macro": Shape(
        "{% macro turn(m) -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
        "{%- endmacro %}" + IM + "{{ turn(message) }}" + END + CHATML_CUE,
        "<|im_end|>",
    ),
    "chatml-loop-controls": Shape(
        IM + "{% if message['role'] not in ['user', 'assistant', 'system'] %}{% continue %}"
        "{% endif %}" + CHATML_TURN + "{% if loop.index > 99 %}{% break %}{% endif %}" + END +
        CHATML_CUE,
        "<|im_end|>",
    ),
    "chatml-namespace": Shape(
        "{% set ns = namespace(first=true) %}" + IM + "{% if not ns.first %}{{ '\n' }}{% endif %}"
        "{% set ns.first = false %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>' }}" + END + "{% if add_generation_prompt %}"
        "{{ '\n<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "chatml-date": Shape(
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + IM +
        CHATML_TURN + END + CHATML_CUE,
        "<|im_end|>",
    ),
    "qwen-1.5": Shape(
        IM + "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
        " are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] +"
        " '\n' + message['content']}}{% if (loop.last and add_generation_prompt) or not loop.last"
        " %}{{ '<|im_end|>' + '\n'}}{% endif %}" + END + "{% if add_generation_prompt and"
        " messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "qwen-2.5": Shape(
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}{{- tools[0] | tojson }}\n"
        "{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n        {{- '<|im_start|>"
        "system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n        {{-"
        " '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful"
        " assistant.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n{%- for message in messages"
        " %}\n    {%- if (message.role == \"user\") or (message.role == \"system\" and not"
        " loop.first) or (message.role == \"assistant\" and not message.tool_calls) %}\n        {{-"
        " '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{-"
        " '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "<|im_end|>",
    ),
    "qwen-3": Shape(
        "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'system' %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
        "{%- set reasoning_content = '' %}{%- if '</think>' in message.content %}"
        "{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
        "{%- set reasoning_content = message.content.split('</think>')[0] %}{%- endif %}"
        "{%- if loop.last or reasoning_content %}{{- '<|im_start|>' + message.role +"
        " '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' +"
        " content.lstrip('\\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}"
        "{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        "<|im_end|>",
    ),
    "yi": Shape(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}" + IM + CHATML_TURN + END + CHATML_CUE,
        "<|im_end|>",
    ),
    "smollm2": Shape(
        IM + "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
        " are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}" + CHATML_TURN + END +
        CHATML_CUE,
        "<|im_end|>",
    ),
    "stablelm-2": Shape(
        IM + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
        " }}" + END + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|endoftext|>",
    ),
    "stablelm-zephyr": Shape(
        IM + "{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token"
        " }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] +"
        " eos_token }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% endif %}" + END,
        "<|endoftext|>",
    ),
    # Llama
    "llama-2": Shape(
        SPLIT_SYSTEM + "{% for message in loop_messages %}" + ALTERNATE +
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' +"
        " system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content ="
        " message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token +"
        " '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '"  # noqa: E501
        " + content.strip() + ' ' + eos_token }}{% endif %}" + END,
        own_cue=False,
    ),
    "llama-3": Shape(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
        " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] |"
        " trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}" + END + "{% if add_generation_prompt %}{{ '<|start_header_id|>"
        "assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        seam=True,
    ),
    "llama-3-no-cue": Shape(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
        " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] |"
        " trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}" + END,
        "<|eot_id|>",
        own_cue=False,
        seam=True,
    ),
    "llama-3.1": Shape(
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string ="
        " \"26 Jul 2024\" %}\n{%- endif %}\n{%- if not tools is defined %}\n    {%- set tools = none"  # noqa: E501
        " %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message ="
        " messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n"
        "    {%- set system_message = \"\" %}\n{%- endif %}\n{{- \"<|start_header_id|>system"
        "<|end_header_id|>\\n\\n\" }}\n{%- if tools is not none %}\n    {{- \"Environment:"
        " ipython\\n\" }}\n{%- endif %}\n{{- \"Cutting Knowledge Date: December 2023\\n\" }}\n{{-"
        " \"Today Date: \" + date_string + \"\\n\\n\" }}\n{{- system_message }}\n{{- \"<|eot_id|>\""
        " }}\n{%- for message in messages %}\n    {%- if not (message.role == 'ipython' or"
        " message.role == 'tool' or 'tool_calls' in message) %}\n        {{- '<|start_header_id|>'"
        " + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>'"
        " }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{-"
        " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        "<|eot_id|>",
        seam=True,
    ),
    "llama-3.2-date": Shape(
        "{{- bos_token }}{%- if strftime_now is defined %}{%- set date_string ="
        " strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = \"26 Jul 2024\" %}"
        "{%- endif %}{{- 'Today Date: ' + date_string + '\\n\\n' }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+"
        " message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
        "<|eot_id|>",
        seam=True,
    ),
    "tinyllama": Shape(
        IM + "\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token"  # noqa: E501
        " }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] +"
        " eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  +"
        " message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and"
        " add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n" + END,
    ),
    # Mistral
    "mistral-v1": Shape(
        "{{ bos_token }}" + IM + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' +"
        " message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{"
        " message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and"
        " assistant roles are supported!') }}{% endif %}" + END,
        refused=RAISES,
        own_cue=False,
    ),
    "mistral-v2": Shape(
        SPLIT_SYSTEM + "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE +
        "{% if message['role'] == 'user' %}{% if loop.first and system_message %}{{ ' [INST] ' +"
        " system_message + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}{{ ' [INST] ' +"
        " message['content'] + ' [/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token}}{% endif %}" + END,
        own_cue=False,
    ),
    "mistral-v3": Shape(
        SPLIT_SYSTEM + "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE +
        "{% if message['role'] == 'user' %}{% if loop.last and system_message %}{{ '[INST] ' +"
        " system_message + '\\n\\n' + message['content'] + '[/INST]' }}{% else %}{{ '[INST] ' +"
        " message['content'] + '[/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token}}{% endif %}" + END,
        refused=(("system row", "no place for a system turn"), *ORDER),
        own_cue=False,
    ),
    "mistral-tekken": Shape(
        SPLIT_SYSTEM + "{%- set user_messages = loop_messages | selectattr('role', 'equalto',"
        " 'user') | list %}{{- bos_token }}{%- for message in loop_messages %}"
        "{%- if message['role'] == 'user' %}{%- if message == user_messages[-1] and system_message"
        " %}{{- '[INST]' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}"
        "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token}}"
        "{%- endif %}{%- endfor %}",
        refused=ORDER,
        own_cue=False,
    ),
    "mistral-small-system-prompt": Shape(
        "{{ bos_token }}" + IM + "{% if message['role'] == 'user' %}{{ '[INST]' +"
        " message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}{{"
        " '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{% else %}{{"
        " message['content'] + eos_token }}{% endif %}" + END,
        own_cue=False,
    ),
    "zephyr": Shape(
        IM + "\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token"  # noqa: E501
        " }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] +"
        " eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  +"
        " message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and"
        " add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n" + END,
    ),
    # Others
    "gemma": Shape(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
        " supported') }}{% endif %}" + IM + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{"
        " '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}" + END +  # noqa: E501
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<|endoftext|>",
        refused=RAISES,
    ),
    "gemma-3": Shape(
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix ="
        " messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}{%- else -%}"
        "{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
        "{%- for message in loop_messages -%}{%- if (message['role'] == 'assistant') -%}{%- set role"  # noqa: E501
        " = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}{{"
        " '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}{{"
        " '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model"
        "\n'}}{%- endif -%}",
        "<|endoftext|>",
    ),
    "vicuna": Shape(
        SPLIT_SYSTEM + "{{ (system_message or 'A chat between a curious user and an assistant.') +"
        " ' ' }}{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ 'USER: ' +"
        " message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{% endif %}" + END + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "vicuna-no-cue": Shape(
        IM + "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] +"
        " eos_token + '\n' }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}" + END,
        own_cue=False,
    ),
    "alpaca": Shape(
        SPLIT_SYSTEM + "{{ system_message or 'Below is an instruction that describes a task.' }}"
        "{{ '\n\n' }}{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ '###"
        " Instruction:\n' + message['content'] + '\n\n' }}{% else %}{{ '### Response:\n' +"
        " message['content'] + eos_token + '\n\n' }}{% endif %}" + END +
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "alpaca-end-only-last": Shape(
        IM + "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] +"
        " '\n\n' }}{% elif message['role'] == 'assistant' %}{{ '### Response:\n' +"
        " message['content'] }}{% if loop.last %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
        "{% else %}{{ message['content'] + '\n\n' }}{% endif %}" + END +
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    "dolly-end": Shape(
        IM + "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] +"
        " '\n\n### Response:\n' }}{% elif message['role'] == 'assistant' %}{{ message['content'] +"
        " '\n\n### End' + eos_token + '\n\n' }}{% else %}{{ message['content'] + '\n\n' }}"
        "{% endif %}" + END,
        own_cue=False,
    ),
    "command-r": Shape(
        "{{ bos_token }}" + SPLIT_SYSTEM + "{% if system_message != false %}{{"
        " '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endif %}{% for message in loop_messages %}" + ALTERNATE + "{% set content ="
        " message['content'] %}{% if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% elif message['role'] =="
        " 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() +"
        " '<|END_OF_TURN_TOKEN|>' }}{% endif %}" + END + "{% if add_generation_prompt %}{{"
        " '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek-llm": Shape(
        "{{ bos_token }}" + IM + "{% if message['role'] == 'user' %}{{ 'User: ' +"
        " message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' +"
        " message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{"
        " message['content'] + '\n\n' }}{% endif %}" + END + "{% if add_generation_prompt %}{{"
        " 'Assistant:' }}{% endif %}",
    ),
    "deepseek-v3": Shape(
        "{% set ns = namespace(system_prompt='') %}" + IM + "{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}"
        "{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}"
        "{{'<|Assistant|>' + message['content'] + eos_token}}{%- endif %}{%- endfor %}"
        "{% if add_generation_prompt %}{{'<|Assistant|>'}}{% endif %}",
    ),
    "deepseek-r1": Shape(
        "{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{{ message['content'] }}{%- elif message['role'] == 'user' %}{{'<|User|>' +"
        " message['content']}}{%- else %}{% set content = message['content'] %}{% if '</think>' in"
        " content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endfor %}"
        "{% if add_generation_prompt %}{{'<|Assistant|><think>\n'}}{% endif %}",
        refused=(("row", "before an answer that is generated, and '<|Assistant|>' before"),),
    ),
    "falcon": Shape(
        IM + "{% if not loop.first %}{{ '\n' }}{% endif %}{% if message['role'] == 'system' %}{{"
        " 'System: ' }}{% elif message['role'] == 'user' %}{{ 'User: ' }}{% elif message['role'] =="
        " 'assistant' %}{{ 'Falcon: ' }}{% endif %}{{ message['content'] }}" + END +
        "{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}{% endif %}",
        "<|endoftext|>",
    ),
    "falcon-3": Shape(
        IM + "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' +"
        " message['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' +"
        " message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and"
        " add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}" + END,
        "<|endoftext|>",
    ),
    "openchat": Shape(
        "{{ bos_token }}" + IM + "{{ 'GPT4 Correct ' + message['role'].title() + ': ' +"
        " message['content'] + '<|end_of_turn|>'}}" + END + "{% if add_generation_prompt %}{{ 'GPT4"
        " Correct Assistant:' }}{% endif %}",
        "<|end_of_turn|>",
    ),
    "granite-3": Shape(
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"  # noqa: E501
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = \"Knowledge"
        " Cutoff Date: April 2024.\\nToday's Date: \" + strftime_now('%B %d, %Y') + \".\\nYou are"
        " Granite.\" %}{%- set loop_messages = messages %}{%- endif %}{{- '<|start_of_role|>system"
        "<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}{%- for message in"
        " loop_messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' +"
        " message['content'] + '<|end_of_text|>\\n' }}{%- if loop.last and add_generation_prompt"
        " %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}",
        "<|end_of_text|>",
    ),
    "olmo": Shape(
        "{{ eos_token }}" + IM + "{% if message['role'] == 'user' %}{{ '<|user|>\n' +"
        " message['content'] }}{% elif message['role'] == 'system' %}{{ '<|system|>\n' +"
        " message['content'] }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n'  +"
        " message['content'] + eos_token }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}" + END,
        "<|endoftext|>",
    ),
    "internlm-2": Shape(
        "{{ bos_token }}" + IM + CHATML_TURN + END + CHATML_CUE, "<|im_end|>"
    ),
    "orca-mini": Shape(
        IM + "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + '\n\n' }}" +
        END + "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
    ),
    "solar": Shape(
        IM + "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n'}}{% elif"
        " message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n'}}{% elif"
        " message['role'] == 'assistant' %}{{ '### Assistant:\n' + message['content'] }}"
        "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}" + END +
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
    ),
    # What texts cannot be put back into
    "upper-case": Shape(
        IM + "{{ '<|im_start|>' + message['content']|upper + '<|im_end|>' }}" + END,
        refused=(("", "changes the text of a user turn"),),
    ),
    "json": Shape(
        IM + "{{ message['content'] | tojson }}{{ eos_token }}" + END,
        refused=(("", "changes the text of a user turn"),),
    ),
    "short-texts": Shape(
        IM + "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
        "{% if message['content']|length < 9 %}!{% endif %}" + END,
        refused=(("", "looks into the text"),),
    ),
}  # fmt: skip
TOKENS = """
    <s> </s> <|endoftext|> <|end|> <|user|> <|assistant|> <|system|> <|im_start|> <|im_end|>
    <|im_sep|> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn>
    <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>
    <|SYSTEM_TOKEN|> <|User|> <|Assistant|> <think> </think> <|end_of_turn|> [INST] [/INST]
    [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <|start_of_role|> <|end_of_role|> <|end_of_text|>
""".split()  # noqa: SIM905
CONVERSATIONS = {
    "": example_of("What is 2 plus 2?", "It is 4."),
    "system": example_of("Hi there, you!", "Hello.\n\nYes?", system="Be brief."),
    "turns": example_of("Who?", "Me, {x}.", "Why (so)?", "Because.", "And now?", "The end"),
    "system turns": example_of("Who?", "Me.", "Why?", "Because.", system="Be kind."),
    "spaces": example_of("  Who?\n", "\nMe. ", "Why?", "Because."),
}


@pytest.fixture(scope="module", params=["tiny-phi-2", "tiny-phi-3.5", "phi-2", "phi-3.5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the special tokens of all shapes."""
    source = ASSETS / request.param
    if not source.is_dir():
        names = {"phi-2": "phi-2", "phi-3.5": "phi-3.5-mini-instruct"}
        source = request.getfixturevalue("shared") / "tokenizers" / names[request.param]
    folder = Path(tmp_path_factory.mktemp("templates")) / request.param
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    there = {token["content"] for token in spec["added_tokens"]}
    first = TextTokenizer(folder).size
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    missing = [token for token in TOKENS if token not in there]
    spec["added_tokens"] += [
        {"id": first + index, "content": token, "special": True, **flags}
        for index, token in enumerate(missing)
    ]
    file.write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": config.get("unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


@functools.cache
def _theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _ours(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


def reason_of(shape: Shape, turns: Sequence[Turn]) -> str | None:
    """The words of the refusal that a conversation must have."""
    has = {
        "system": turns[0].role == "system",
        "turns": sum(turn.role == "user" for turn in turns) > 1,
        "row": turns[-1].role == "assistant",
    }
    for what, words in shape.refused:
        if all(has[each] for each in what.split()):
            return words
    return None


@pytest.mark.parametrize("name", SHAPES)
def test_ids_are_those_of_transformers_or_the_construct_is_named(name: str, folder: Path) -> None:
    shape = SHAPES[name]
    theirs, tokenizer = _theirs(folder), _ours(folder)
    theirs.chat_template = tokenizer.chat_template = shape.template
    theirs.bos_token, theirs.eos_token = shape.bos, shape.eos
    tokenizer.special_tokens = {"bos_token": shape.bos, "eos_token": shape.eos}

    def ids(turns: Sequence[Turn], *, cue: bool) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        found: list[int] = theirs.apply_chat_template(
            messages, add_generation_prompt=cue, return_dict=False
        )
        return found

    def texts(turns: Sequence[Turn], *, cue: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(theirs.apply_chat_template(messages, add_generation_prompt=cue, tokenize=False))

    only = reason_of(shape, CONVERSATIONS[""].turns)
    if only:
        with pytest.raises(ModelError, match=only):
            Coder.of(tokenizer, "chat", remedy="")
        return
    coder = Coder.of(tokenizer, "chat", remedy="")
    for kind, example in CONVERSATIONS.items():
        for count in range(1, len(example.turns) + 1):
            turns = example.turns[:count]
            if turns[-1].role == "system":
                continue
            row = turns[-1].role == "assistant"
            wanted = reason_of(shape, turns)
            refused = coder.prompt_format.refusal(turns)
            assert (wanted or "") in (refused or ""), (kind, count)
            assert bool(wanted) == bool(refused), (kind, count, refused)
            if refused:
                assert "--prompt_format" not in refused
                continue
            encoded, text = coder.encode(turns), coder.text(turns)
            expected, rendered = ids(turns, cue=not row), texts(turns, cue=not row)
            if row:
                # We end where the answer ends, also where the template does not.
                end = coder.prompt_format.end_token
                ends = rendered.startswith(text)
                assert ends or rendered.startswith(text.removesuffix(end)), (kind, count)
                expected = expected[: len(encoded) - (not ends)]
                encoded = encoded[: len(expected)]
                prompt = coder.encode(turns[:-1])
                assert encoded[: len(prompt)] == prompt
            elif not shape.own_cue and text != rendered:
                # The cue is what stands before the answer.
                answered = (*turns, Turn("assistant", "Yes"))
                assert texts(answered, cue=False).startswith(text), (kind, count)
                expected = ids(answered, cue=False)[: len(encoded)]
            else:
                assert text == rendered, (kind, count)
            # Spaces that a user typed are kept behind special tokens that would take them.
            same = kind != "spaces" or folder.name == "tiny-phi-2"
            if same and not (shape.seam and folder.name == "phi-2"):
                assert encoded == expected, (kind, count)


def test_a_text_that_the_template_would_change_is_refused() -> None:
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-3.5")
    tokenizer.chat_template = SHAPES["qwen-3"].template
    chat = Coder.of(tokenizer, "chat").prompt_format
    turns = example_of("q", "why</think>a", "r", "b").turns
    said = chat.refusal(turns)
    assert said
    assert "changes texts with '</think>' in them" in said
    assert said.endswith("use --prompt_format instruct")
    assert chat.refusal(example_of("why</think>q", "a").turns) is None  # looked for in answers


def test_a_prompt_without_a_cue_of_its_own_may_hold_what_the_template_looks_for() -> None:
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-3.5")
    # It always ends with another cue than it writes before an answer.
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user|>' + message['content'] + '\\n' }}{% else %}"
        "{{ 'says:' + message['content'].replace('</think>', '') + '<|end|>' }}"
        "{% endif %}{% endfor %}{{ '<|assistant|>' }}"
    )
    chat = Coder.of(tokenizer, "chat").prompt_format
    assert isinstance(chat, ChatFormat)
    assert not chat.cues
    turns = example_of("why</think>q", "a").turns
    assert chat.refusal(turns) is None
    assert chat.refusal(turns[:1]) is None
    assert chat.refusal(example_of("q", "a</think>b").turns)


def test_what_a_template_puts_around_an_answer_is_generated_and_taken_off_again() -> None:
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-2")
    tokenizer.chat_template = SHAPES["llama-2"].template
    coder = Coder.of(tokenizer, "chat")
    question = example_of("Who?", "Me.").turns[:1]
    assert coder.text(question).endswith("[/INST]")
    ids = coder.answer_ids(question, "Me.")
    assert coder.tokenizer.decode_answer(ids, coder.encode(question)) == " Me. "
    assert coder.decode_answer(ids, coder.encode(question)) == "Me."


def test_there_are_shapes_enough() -> None:
    assert len(SHAPES) >= 40
